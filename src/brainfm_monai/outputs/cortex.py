"""The cortex: distance maps, ribbon, and white and pial surfaces with thickness in scanner coordinates."""

import base64
import zlib
from typing import Any

import nibabel as nib
import numpy as np
import torch
from isal import isal_zlib
from monai.data import MetaTensor

from brainfm_monai import surfaces
from brainfm_monai.io import write_table
from brainfm_monai.outputs.result import PACKING, ScanResult, begun_ahead, once_per_scan, resample
from brainfm_monai.transforms import HEMISPHERES, FindBoundariesd

SCANNER: Any = nib.gifti.GiftiCoordSystem("NIFTI_XFORM_SCANNER_ANAT", "NIFTI_XFORM_SCANNER_ANAT", np.eye(4))
EMPTY_DATA = base64.b64encode(zlib.compress(b""))  # as nibabel writes it, in the place of the data
COLUMNS = "hemisphere surface vertices faces euler_number crossing_share closed_share area_mm2 volume_mm3".split()
COLUMNS += ["mean_curvature_per_mm", "mean_thickness_mm", "median_thickness_mm"]


def compute_ribbon(distance: dict[str, np.ndarray]) -> np.ndarray:
    """FreeSurfer's ribbon of the hemispheres: 2 and 41 within the white surface, 3 and 42 between it and the pial one.

    The signed distances ``lp``, ``lw``, ``rp``, ``rw`` have one shape, as the result, uint8. Where both hemispheres
    claim a voxel, the one that it lies deeper in has it.
    """
    ribbon, depth = np.zeros(distance["lp"].shape, dtype=np.uint8), np.float32(0)
    for side, (white_id, cortex_id) in HEMISPHERES.items():
        nearest = np.minimum(distance[side + "p"], distance[side + "w"])
        labels = np.where(distance[side + "w"] < 0, np.uint8(white_id), np.uint8(cortex_id))
        np.copyto(ribbon, labels, where=nearest < depth)
        depth = np.minimum(depth, nearest)
    return ribbon


def write_distances(scan: ScanResult) -> None:
    """Write the distance maps and the cortical ribbon, in the grid of the files."""
    text = "signed distance to the surfaces, negative inside, clipped at 3 mm; l, r: hemisphere, p, w: pial, white"
    scan.save_map("distance", scan.in_grid("distance"), text)
    boundaries = resample(find_boundaries(scan), scan.labels.shape, scan.affine).cpu().numpy()
    text = "2, 41: left and right white matter; 3, 42: left and right cortex"
    scan.save_image("desc-ribbon_dseg", compute_ribbon(_by_name(scan, boundaries)), Description=text)


def _by_name(scan: ScanResult, channels: Any) -> dict[str, Any]:
    return dict(zip(scan.layout.tasks["distance"].channel_names, channels, strict=True))


@once_per_scan
def find_boundaries(scan: ScanResult) -> MetaTensor:
    """The distances, (4, h, w, d), whose zero is where FindBoundariesd takes the boundaries to be, if not done yet."""
    item: dict[Any, Any] = dict(scan.maps)
    if "boundaries" not in item:
        settings = scan.settings
        find = FindBoundariesd("boundaries", scan.layout, settings.surface_levels_mm, settings.mode, relabel=False)
        item = find(item if scan.normalised is None else item | {"image": scan.normalised})
    return MetaTensor(item["boundaries"].as_tensor().cpu(), affine=torch.from_numpy(scan.network_affine))


@once_per_scan
def _grow(scan: ScanResult, letter: str) -> dict[str, surfaces.Hemisphere]:
    boundaries = _by_name(scan, find_boundaries(scan).as_tensor())
    own = {name: distance for name, distance in boundaries.items() if name.startswith(letter.lower())}
    return surfaces.grow_hemispheres(own, scan.network_affine)


def grow_surfaces(scan: ScanResult) -> dict[str, surfaces.Hemisphere]:
    """White and pial surfaces by the letter of the hemisphere, ``L`` and ``R``; computed once for a scan."""
    return _grow(scan, "L") | _grow(scan, "R")


@once_per_scan
def _write_hemisphere(scan: ScanResult, letter: str) -> tuple[list[Any], dict[str, Any]]:
    """Write the files of a hemisphere; returns rows of the table and entries of the summary."""
    rows, summary = list[Any](), dict[str, Any]()
    if not (surface := _grow(scan, letter).get(letter)):
        return rows, summary
    faces, thickness = surface.faces, surface.thickness_mm
    euler = surfaces.compute_euler_number(faces)
    mean = float(np.average(thickness, weights=surfaces.compute_areas_mm2(surface.white_mm, faces)))
    pairs = ("white", surface.white_mm), ("pial", surface.pial_mm)
    for (name, vertices), crossing in zip(pairs, surface.crossing_shares, strict=True):
        curvature, areas = surfaces.compute_mean_curvature(vertices, faces), surfaces.compute_areas_mm2(vertices, faces)
        volume = surfaces.compute_volume_mm3(vertices, faces)
        counts = len(vertices), len(faces), euler, f"{crossing:.5f}", f"{surface.closed.mean():.4f}"
        sizes = f"{areas.sum():.0f}", f"{volume:.0f}", f"{np.average(curvature, weights=areas):.4f}"
        rows.append((letter, name, *counts, *sizes, f"{mean:.3f}", f"{np.median(thickness):.3f}"))
        summary |= {f"euler_number_{letter}_{name}": euler, f"crossing_share_{letter}_{name}": round(crossing, 5)}
        _save_gifti(scan, f"hemi-{letter}_{name}.surf", POINTSET=vertices, TRIANGLE=faces)
        scan.write_sidecar(f"hemi-{letter}_{name}.surf", Units="mm, RAS of the scanner", EulerNumber=euler)
        if name == "white":
            _save_gifti(scan, f"hemi-{letter}_curv.shape", SHAPE=curvature)
    _save_gifti(scan, f"hemi-{letter}_thickness.shape", SHAPE=thickness)
    _save_gifti(scan, f"hemi-{letter}_desc-closed_mask.shape", SHAPE=surface.closed.astype(np.float32))
    summary[f"mean_thickness_{letter}_mm"] = round(mean, 3)
    return rows, summary


@begun_ahead(lambda scan: _write_hemisphere(scan, "L"), lambda scan: _write_hemisphere(scan, "R"))
def write_surfaces(scan: ScanResult) -> None:
    """Write both surfaces as GIFTI, thickness, curvature and closed sulci at their vertices, and a table of them."""
    (left, of_left), (right, of_right) = (_write_hemisphere(scan, letter) for letter in "LR")
    write_table(scan.path("surfaces.tsv"), COLUMNS, left + right)
    scan.summary |= of_left | of_right


def _save_gifti(scan: ScanResult, suffix: str, **arrays: np.ndarray) -> None:
    """Write arrays by their intent; points lie in the coordinates of the scanner. igzip compresses them, not zlib."""
    systems: dict[str, Any] = {"POINTSET": SCANNER}
    make = nib.gifti.GiftiDataArray
    data = [make(values, f"NIFTI_INTENT_{name}", coordsys=systems.get(name)) for name, values in arrays.items()]
    packed = [base64.b64encode(isal_zlib.compress(array.data.tobytes(), PACKING)) for array in data]
    for array in data:
        array.data = array.data[:0]
    content = nib.GiftiImage(darrays=data).to_xml()
    for text in packed:
        content = content.replace(EMPTY_DATA, text, 1)
    scan.path(f"{suffix}.gii").write_bytes(content)
