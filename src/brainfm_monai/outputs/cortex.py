"""The cortex: distance maps, ribbon, thickness, and white and pial surfaces in scanner coordinates."""

from typing import Any

import nibabel as nib
import numpy as np

from brainfm_monai import surfaces
from brainfm_monai.io import write_table
from brainfm_monai.outputs.result import ScanResult, once_per_scan
from brainfm_monai.transforms import MODES

# By BIDS letter: channel letters of the hemisphere and of the opposite one, FreeSurfer ids of white matter and cortex.
HEMISPHERES = {"L": ("l", "r", 2, 3), "R": ("r", "l", 41, 42)}
THICKNESS_STEP_MM = 0.01
SCANNER: Any = nib.gifti.GiftiCoordSystem("NIFTI_XFORM_SCANNER_ANAT", "NIFTI_XFORM_SCANNER_ANAT", np.eye(4))
COLUMNS = "hemisphere surface vertices faces euler_number crossing_share closed_share area_mm2 volume_mm3".split()
COLUMNS += ["mean_curvature_per_mm", "mean_thickness_mm", "median_thickness_mm"]


def compute_ribbon(distance: dict[str, np.ndarray]) -> np.ndarray:
    """FreeSurfer's ribbon of the hemispheres: 2 and 41 within the white surface, 3 and 42 between it and the pial one.

    The signed distances ``lp``, ``lw``, ``rp``, ``rw`` have one shape, as the result, uint8; a hemisphere may be
    missing. Where both hemispheres claim a voxel, the one that it lies deeper in has it.
    """
    shape = next(iter(distance.values())).shape
    ribbon, depth = np.zeros(shape, dtype=np.uint8), np.zeros(shape, dtype=np.float32)
    for side, _, white_id, cortex_id in HEMISPHERES.values():
        if side + "p" in distance:
            pial, white = distance[side + "p"], distance[side + "w"]
            nearest = np.minimum(pial, white)
            deeper = nearest < depth
            ribbon[deeper] = np.where(white < 0, white_id, cortex_id)[deeper]
            depth = np.minimum(depth, nearest)
    return ribbon


def compute_ribbon_thickness_mm(distance: dict[str, np.ndarray], ribbon: np.ndarray) -> np.ndarray:
    """Thickness in each voxel of the cortex: distance to the white plus distance to the pial surface; else 0.

    Distances end at 3 mm, so that no voxel can show more than 6 mm.
    """
    thickness = np.zeros(ribbon.shape, dtype=np.float32)
    for side, _, _, cortex_id in HEMISPHERES.values():
        if side + "p" in distance:
            cortex = ribbon == cortex_id
            thickness[cortex] = (distance[side + "w"] - distance[side + "p"])[cortex]
    return thickness.clip(min=0)


def write_distances(scan: ScanResult) -> None:
    """Write the distance maps, the cortical ribbon and the thickness map, in the grid of the files."""
    distance = scan.in_grid("distance")
    text = "signed distance to the surfaces, negative inside, clipped at 3 mm; l, r: hemisphere, p, w: pial, white"
    scan.save_map("distance", distance, text)
    shown = _shown_hemispheres(scan, distance)
    ribbon = compute_ribbon(shown)
    thickness = compute_ribbon_thickness_mm(shown, ribbon)
    text = "2, 41: left and right white matter; 3, 42: left and right cortex"
    scan.save_image("desc-ribbon_dseg", ribbon, Description=text)
    text = "distance to white + to pial surface"
    scan.save_image("thickness", thickness, step=THICKNESS_STEP_MM, Units="mm", Description=text)
    cortex = thickness[thickness > 0]
    scan.summary["cortical_thickness_mm"] = round(float(np.median(cortex)), 3) if cortex.size else "n/a"


def _shown_hemispheres(scan: ScanResult, distance: Any) -> dict[str, Any]:
    """The channels of the distances by name, without those of a hemisphere that the mode leaves out."""
    channels = zip(scan.layout.tasks["distance"].channel_names, distance, strict=True)
    left_out = MODES[scan.settings.mode].excluded_side[:1]
    return {name: value for name, value in channels if not left_out or not name.startswith(left_out)}


@once_per_scan
def grow_surfaces(scan: ScanResult) -> dict[str, surfaces.Hemisphere]:
    """White and pial surfaces by the letter of the hemisphere, ``L`` and ``R``; computed once for a scan.

    They are grown from the distances in the network's grid, where these were computed, and from the scan there.
    """
    shown, grown = _shown_hemispheres(scan, scan.maps["distance"].as_tensor().cpu().float()), {}
    image = None if scan.normalised is None else scan.normalised.as_tensor()[0].cpu().float()
    levels = scan.settings.surface_levels_mm
    for letter, (side, opposite, _, _) in HEMISPHERES.items():
        if side + "w" in shown:
            fields = shown[side + "w"], shown[side + "p"], shown.get(opposite + "p")
            grown[letter] = surfaces.grow_hemisphere(*fields, scan.network_affine, levels, image)
    return {letter: surface for letter, surface in grown.items() if surface is not None}


@once_per_scan
def measure_thickness(scan: ScanResult) -> dict[str, np.ndarray]:
    """Thickness in mm at the vertices of each hemisphere, by its letter."""
    measure = surfaces.compute_thickness_mm
    return {name: measure(s.white_mm, s.pial_mm, s.faces) for name, s in grow_surfaces(scan).items()}


def write_surfaces(scan: ScanResult) -> None:
    """Write both surfaces as GIFTI, thickness, curvature and closed sulci at their vertices, and a table of both."""
    rows = []
    for letter, surface in grow_surfaces(scan).items():
        faces, thickness = surface.faces, measure_thickness(scan)[letter]
        euler = surfaces.compute_euler_number(faces)
        mean = float(np.average(thickness, weights=surfaces.compute_areas_mm2(surface.white_mm, faces)))
        for name, vertices in (("white", surface.white_mm), ("pial", surface.pial_mm)):
            curvature = surfaces.compute_mean_curvature(vertices, faces)
            areas, volume = surfaces.compute_areas_mm2(vertices, faces), surfaces.compute_volume_mm3(vertices, faces)
            crossing = surfaces.compute_crossing_share(vertices, faces)
            counts = len(vertices), len(faces), euler, f"{crossing:.5f}", f"{surface.closed.mean():.4f}"
            sizes = f"{areas.sum():.0f}", f"{volume:.0f}", f"{np.average(curvature, weights=areas):.4f}"
            rows.append((letter, name, *counts, *sizes, f"{mean:.3f}", f"{np.median(thickness):.3f}"))
            _save_gifti(scan, f"hemi-{letter}_{name}.surf", POINTSET=vertices, TRIANGLE=faces)
            scan.write_sidecar(f"hemi-{letter}_{name}.surf", Units="mm, RAS of the scanner", EulerNumber=euler)
            scan.summary[f"euler_number_{letter}_{name}"] = euler
            scan.summary[f"crossing_share_{letter}_{name}"] = round(crossing, 5)
            if name == "white":
                _save_gifti(scan, f"hemi-{letter}_curv.shape", SHAPE=curvature)
        _save_gifti(scan, f"hemi-{letter}_thickness.shape", SHAPE=thickness)
        _save_gifti(scan, f"hemi-{letter}_desc-closed_mask.shape", SHAPE=surface.closed.astype(np.float32))
        scan.summary[f"mean_thickness_{letter}_mm"] = round(mean, 3)
    write_table(scan.path("surfaces.tsv"), COLUMNS, rows)


def _save_gifti(scan: ScanResult, suffix: str, **arrays: np.ndarray) -> None:
    """Write arrays by their intent; points lie in the coordinates of the scanner."""
    systems: dict[str, Any] = {"POINTSET": SCANNER}
    make = nib.gifti.GiftiDataArray
    data = [make(values, f"NIFTI_INTENT_{name}", coordsys=systems.get(name)) for name, values in arrays.items()]
    nib.save(nib.GiftiImage(darrays=data), scan.path(f"{suffix}.gii"))
