"""The cortex: distance maps, ribbon, thickness, and white and pial surfaces in scanner coordinates."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np

from brainfm_monai.io import write_table
from brainfm_monai.outputs.images import save_map
from brainfm_monai.outputs.result import ScanResult, once_per_scan
from brainfm_monai.transforms import MODES

if TYPE_CHECKING:
    from brainfm_monai.surfaces import Hemisphere

__all__ = [
    "compute_ribbon",
    "compute_ribbon_thickness_mm",
    "grow_surfaces",
    "measure_thickness",
    "write_distances",
    "write_surfaces",
]

HEMISPHERES = {
    "left": ("L", "l", 2, 3),
    "right": ("R", "r", 41, 42),
}  # BIDS letter, channel letter, ids of white matter and cortex
OPPOSITE = {"l": "r", "r": "l"}
DISTANCE_STEP_MM = 0.01
TABLE = (
    "hemisphere", "surface", "vertices", "faces", "euler_number", "crossing_share", "closed_share", "area_mm2",
    "volume_mm3", "mean_curvature_per_mm", "mean_thickness_mm", "median_thickness_mm",
)  # fmt: skip


def compute_ribbon(distance: dict[str, np.ndarray]) -> np.ndarray:
    """Label the hemispheres as FreeSurfer's ribbon does: 2 and 41 within the white surface, 3 and 42 between it and the pial one.

    Args:
        distance: signed distances ``lp``, ``lw``, ``rp``, ``rw`` of one shape; a hemisphere may be missing.

    Returns:
        uint8 array of that shape. Where both hemispheres claim a voxel, the one that it lies deeper in has it.
    """
    shape = next(iter(distance.values())).shape
    ribbon, depth = np.zeros(shape, dtype=np.uint8), np.zeros(shape, dtype=np.float32)
    for _, letter, white_id, cortex_id in HEMISPHERES.values():
        if letter + "p" in distance:
            pial, white = distance[letter + "p"], distance[letter + "w"]
            nearest = np.minimum(pial, white)
            deeper = nearest < depth
            ribbon[deeper] = np.where(white < 0, white_id, cortex_id)[deeper]
            depth = np.minimum(depth, nearest)
    return ribbon


def compute_ribbon_thickness_mm(distance: dict[str, np.ndarray], ribbon: np.ndarray) -> np.ndarray:
    """Thickness of the cortex: in each voxel of it the distance to the white plus the distance to the pial surface; else 0.

    Distances end at 3 mm, so that no voxel can show more than 6 mm.
    """
    thickness = np.zeros(ribbon.shape, dtype=np.float32)
    for _, letter, _, cortex_id in HEMISPHERES.values():
        if letter + "p" in distance:
            cortex = ribbon == cortex_id
            thickness[cortex] = (distance[letter + "w"] - distance[letter + "p"])[cortex]
    return thickness.clip(min=0)


def write_distances(scan: ScanResult) -> None:
    """Write the distance maps, the cortical ribbon and the thickness map, in the grid of the files."""
    distance = scan.in_grid("distance")
    names = scan.layout.tasks["distance"].channel_names
    text = "signed distance to the surfaces, negative inside, clipped at 3 mm; l, r: hemisphere, p, w: pial, white"
    save_map(scan, "distance", np.moveaxis(distance, 0, -1), text)
    known = _shown_hemispheres(scan, dict(zip(names, distance, strict=True)))
    ribbon = compute_ribbon(known)
    thickness = compute_ribbon_thickness_mm(known, ribbon)
    scan.save_image(
        "desc-ribbon_dseg", ribbon, Description="2, 41: left and right white matter; 3, 42: left and right cortex"
    )
    scan.save_image(
        "thickness", thickness, step=DISTANCE_STEP_MM, Units="mm", Description="distance to white + to pial surface"
    )
    cortex = thickness[thickness > 0]
    scan.summary["cortical_thickness_mm"] = round(float(np.median(cortex)), 3) if cortex.size else "n/a"


@once_per_scan
def grow_surfaces(scan: ScanResult) -> dict[str, Hemisphere]:
    """White and pial surfaces by the letter of the hemisphere, ``L`` and ``R``; computed once for a scan.

    They are grown from the distances in the network's grid, where these were computed.
    """
    from brainfm_monai.surfaces import grow_hemisphere  # needs scipy, which an extra brings

    names = scan.layout.tasks["distance"].channel_names
    distance: dict[str, Any] = dict(zip(names, scan.maps["distance"].as_tensor().cpu().float(), strict=True))
    levels = scan.settings.surface_levels_mm
    shown = _shown_hemispheres(scan, distance)
    grown = {
        letter: grow_hemisphere(
            shown[side + "w"], shown[side + "p"], shown.get(OPPOSITE[side] + "p"), scan.network_affine, levels
        )
        for letter, side, _, _ in HEMISPHERES.values()
        if side + "w" in shown
    }
    return {letter: surface for letter, surface in grown.items() if surface is not None}


@once_per_scan
def measure_thickness(scan: ScanResult) -> dict[str, np.ndarray]:
    """Thickness in mm at the vertices of each hemisphere, by its letter."""
    from brainfm_monai.surfaces import compute_thickness_mm  # needs scipy, which an extra brings

    return {
        letter: compute_thickness_mm(surface.white_mm, surface.pial_mm, surface.faces)
        for letter, surface in grow_surfaces(scan).items()
    }


def write_surfaces(scan: ScanResult) -> None:
    """Write white and pial surfaces as GIFTI, thickness, curvature and closed sulci at their vertices, and a table of both."""
    from brainfm_monai import surfaces as of_triangles  # needs scipy, which an extra brings

    rows = []
    for letter, surface in grow_surfaces(scan).items():
        thickness = measure_thickness(scan)[letter]
        white_areas = of_triangles.compute_areas_mm2(surface.white_mm, surface.faces)
        mean = float(np.average(thickness, weights=white_areas))
        for name, vertices in (("white", surface.white_mm), ("pial", surface.pial_mm)):
            curvature = of_triangles.compute_mean_curvature(vertices, surface.faces)
            areas = of_triangles.compute_areas_mm2(vertices, surface.faces)
            crossing = of_triangles.compute_crossing_share(vertices, surface.faces)
            euler = of_triangles.compute_euler_number(surface.faces)
            closed = float(surface.closed.mean())
            rows.append(
                (
                    letter, name, len(vertices), len(surface.faces), euler, f"{crossing:.5f}", f"{closed:.4f}",
                    f"{areas.sum():.0f}", f"{of_triangles.compute_volume_mm3(vertices, surface.faces):.0f}",
                    f"{np.average(curvature, weights=areas):.4f}", f"{mean:.3f}", f"{np.median(thickness):.3f}",
                )
            )  # fmt: skip
            _save_surface(scan, f"hemi-{letter}_{name}", vertices, surface.faces, euler)
            scan.summary[f"euler_number_{letter}_{name}"] = euler
            scan.summary[f"crossing_share_{letter}_{name}"] = round(crossing, 5)
            if name == "white":
                _save_shape(scan, f"hemi-{letter}_curv", curvature)
        _save_shape(scan, f"hemi-{letter}_thickness", thickness)
        _save_shape(scan, f"hemi-{letter}_desc-closed_mask", surface.closed.astype(np.float32))
        scan.summary[f"mean_thickness_{letter}_mm"] = round(mean, 3)
    write_table(scan.path("surfaces.tsv"), TABLE, rows)


def _shown_hemispheres(scan: ScanResult, distance: dict[str, Any]) -> dict[str, Any]:
    """Distances of the hemispheres that the mode leaves in."""
    left_out = MODES[scan.settings.mode].excluded_side[:1]
    return {name: value for name, value in distance.items() if not left_out or not name.startswith(left_out)}


def _save_surface(scan: ScanResult, suffix: str, vertices: np.ndarray, faces: np.ndarray, euler: int) -> None:
    scanner: Any = nib.gifti.GiftiCoordSystem("NIFTI_XFORM_SCANNER_ANAT", "NIFTI_XFORM_SCANNER_ANAT", np.eye(4))
    arrays = [
        nib.gifti.GiftiDataArray(vertices, "NIFTI_INTENT_POINTSET", coordsys=scanner),
        nib.gifti.GiftiDataArray(faces, "NIFTI_INTENT_TRIANGLE"),
    ]
    nib.save(nib.GiftiImage(darrays=arrays), scan.path(f"{suffix}.surf.gii"))
    scan.write_sidecar(f"{suffix}.surf", Units="mm, RAS of the scanner", EulerNumber=euler)


def _save_shape(scan: ScanResult, suffix: str, values: np.ndarray) -> None:
    array = nib.gifti.GiftiDataArray(values, "NIFTI_INTENT_SHAPE")
    nib.save(nib.GiftiImage(darrays=[array]), scan.path(f"{suffix}.shape.gii"))
