"""The surfaces of a case against those of its reference: files, or what its distances or labels give."""

from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import igl
import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Transform
from scipy.spatial import cKDTree
from torch import Tensor

from brainfm_monai import surfaces
from brainfm_monai.data.distances import compute_hemisphere_distances
from brainfm_monai.data.labels import fold_ids
from brainfm_monai.evaluation.cases import SURFACES
from brainfm_monai.evaluation.conditions import TARGET
from brainfm_monai.io import ScanError, first_line
from brainfm_monai.metrics import make_rows
from brainfm_monai.outputs import resample
from brainfm_monai.tasks import MAX_DISTANCE_MM, TASKS
from brainfm_monai.transforms import find_boundaries

# FreeSurfer's surface RAS: directions of the axes of a conformed volume, by columns
SURFACE_AXES = np.array([[-1.0, 0, 0], [0, 0, 1], [0, -1, 0]])
MEDIAL_WALL_MM = 0.1  # below it a reference has no cortex: both of its surfaces are one there

Mesh = tuple[np.ndarray, np.ndarray]  # vertices in mm, (V, 3), and their numbers in each triangle, (F, 3)


def _find_distances(points: np.ndarray, mesh: Mesh) -> np.ndarray:
    """Distance of points, (N, 3), to the triangles of a mesh, (N,)."""
    arrays = zip((points, *mesh), (np.float64, np.float64, np.int64), strict=True)
    return np.sqrt(igl.point_mesh_squared_distance(*(np.ascontiguousarray(*array) for array in arrays))[0])


def compare_surfaces(pred: Mesh, reference: Mesh, cortex: np.ndarray | None = None) -> dict[str, float]:
    """Distances in mm between two surfaces of the same space, and what is wrong with the predicted one by itself.

    The measures are defined in ``metrics/measures.tsv``; ``from_cortex_*`` are of the vertices of the reference that
    ``cortex``, (V,) bool, tells: references differ in the medial wall, which has none.
    """
    back = _find_distances(reference[0], pred)
    distances = {"to_reference": _find_distances(pred[0], reference), "from_reference": back}
    if cortex is not None and cortex.any():
        distances["from_cortex"] = back[cortex]
    statistics: dict[str, Any] = {"mean": np.mean, "median": np.median, "p95": partial(np.percentile, q=95)}
    measures = {f"{name}_{s}": float(of(mm)) for name, mm in distances.items() for s, of in statistics.items()}
    euler, share = surfaces.compute_euler_number(pred[1]), surfaces.compute_crossing_share(*pred)
    return measures | {"euler_number": euler, "crossing_share": share}


def _find_thickness(pair: Sequence[Mesh]) -> np.ndarray:
    (white, faces), (pial, _) = pair
    return surfaces.compute_thickness_mm(white, pial, faces)


def compare_thickness(pred: Sequence[Mesh], reference: Sequence[Mesh]) -> dict[str, float]:
    """Error of the thickness at the vertices of the reference's white surface, without the medial wall; mm.

    Each is a white and a pial surface with the same triangles, whose thickness is that of ``predict``. The thickness at
    the predicted vertex that is nearest to one of the reference is compared; the medial wall is where both surfaces of
    the reference are less than 0.1 mm apart. The measures, defined in ``metrics/measures.tsv``, begin with
    ``vertex_thickness``; NaN without a vertex or without variation.
    """
    true, nearest = _find_thickness(reference), cKDTree(pred[0][0]).query(reference[0][0])[1]
    predicted, true = _find_thickness(pred)[nearest][true > MEDIAL_WALL_MM], true[true > MEDIAL_WALL_MM]
    parts = {"": predicted, "_reference": true, "_bias": predicted - true, "_error": np.abs(predicted - true)}
    measures = {f"vertex_thickness{name}": float(x.mean()) if len(x) else np.nan for name, x in parts.items()}
    varies = len(true) > 1 and min(np.ptp(predicted), np.ptp(true)) > 0
    measures["vertex_thickness_correlation"] = float(np.corrcoef(predicted, true)[0, 1]) if varies else np.nan
    return measures


def read_mesh(path: str | Path) -> Mesh:
    """Read a triangle surface, vertices in scanner RAS mm; a file that is none is a ScanError.

    The file is GIFTI (``.gii``), or FreeSurfer's geometry (``lh.white``, ``rh.pial``), whose surface RAS is taken to
    scanner RAS by the volume that the file names.
    """
    try:
        if Path(path).suffix in (".gii", ".gz"):
            vertices, faces = nib.gifti.GiftiImage.from_filename(path).agg_data(("pointset", "triangle"))
        else:
            vertices, faces, info = nib.freesurfer.read_geometry(path, read_metadata=True)
            axes = np.stack([info["xras"], info["yras"], info["zras"]], axis=1)
            vertices = vertices @ (axes @ SURFACE_AXES.T).T + info["cras"]
        return np.asarray(vertices, np.float64), np.asarray(faces, np.int64)
    except Exception as error:  # damaged files show as many kinds of errors of the libraries
        rule = "a GIFTI or FreeSurfer surface with its volume is needed"
        raise ScanError(f"{path}: {rule}, found {first_line(error)}") from error


class MeasureSurfaces(Transform):
    """Compare the surfaces of the predicted distances with those of the reference; after :class:`MeasureMaps`.

    The reference is the files that the item names, else what its distances, else what its labels give. Without a
    predicted distance or any reference nothing is added. For ``levels_mm`` see
    :func:`~brainfm_monai.transforms.find_boundaries`.
    """

    def __init__(self, levels_mm: Sequence[float] = (0.0, 0.0)) -> None:
        self.levels_mm = tuple(levels_mm)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Add rows of the tasks ``surface_white``, ``surface_pial`` and ``surface_thickness``."""
        d = dict(data)
        reference = _find_reference(d)
        if "distance" not in d or not reference:
            return d
        distance: MetaTensor = d["distance"]
        image = d["image"].as_tensor()[0].cpu().float() if "image" in d else None
        pred = grow_meshes(distance.as_tensor().cpu().float(), np.asarray(distance.affine), self.levels_mm, image)
        d["rows"] = list(d.get("rows", ()))
        for side in ("left", "right"):
            names = {f"surface_{kind}": f"{side}_{kind}" for kind in ("white", "pial")}
            pairs = [[meshes[name] for name in names.values() if name in meshes] for meshes in (pred, reference)]
            has_thickness = [len(pair) == len(names) and np.array_equal(pair[0][1], pair[1][1]) for pair in pairs]
            cortex = _find_thickness(pairs[1]) > MEDIAL_WALL_MM if has_thickness[1] else None
            measures: dict[str, dict[str, float]] = {}
            for task, name in names.items():
                if name in reference:
                    own = compare_surfaces(pred[name], reference[name], cortex) if name in pred else {}
                    measures[task] = {"found": float(name in pred), **own}
            if all(has_thickness):
                measures["surface_thickness"] = compare_thickness(*pairs)
            for task, values in measures.items():
                named = {("cortex", side, metric): value for metric, value in values.items()}
                d["rows"] += make_rows(str(d["scan"]), str(d["condition"]), task, named)
        return d


def grow_meshes(
    distance: Tensor, affine: np.ndarray, levels_mm: Sequence[float] = (0.0, 0.0), image: Tensor | None = None
) -> dict[str, Mesh]:
    """The surfaces that ``predict`` makes of distances lp, lw, rp, rw in mm, shape (4, H, W, D), by their names.

    For the other arguments see :func:`~brainfm_monai.transforms.find_boundaries`.
    """
    near = distance.clamp(-MAX_DISTANCE_MM, MAX_DISTANCE_MM)
    named = dict(zip(TASKS["distance"].channel_names, near, strict=True))
    voxel_mm = float(abs(np.linalg.det(affine[:3, :3])) ** (1 / 3))
    grown = surfaces.grow_hemispheres(find_boundaries(named, voxel_mm, levels_mm, image).distance, affine)
    sides = [(side, grown[side[0].upper()]) for side in ("left", "right") if side[0].upper() in grown]
    white = {f"{side}_white": (one.white_mm, one.faces) for side, one in sides}
    return white | {f"{side}_pial": (one.pial_mm, one.faces) for side, one in sides}


def _find_reference(data: Mapping[Hashable, Any]) -> dict[str, Mesh]:
    if files := {name: read_mesh(str(data[name])) for name in SURFACES if name in data}:
        return files
    if f"{TARGET}distance" in data:
        distance: MetaTensor = data[f"{TARGET}distance"]
        return grow_meshes(distance.as_tensor().cpu().float(), np.asarray(distance.affine, dtype=np.float64))
    if f"{TARGET}segmentation" not in data:
        return {}
    grid: MetaTensor = data["image"]  # isotropic
    affine = np.asarray(grid.affine, dtype=np.float64)
    ids = resample(data[f"{TARGET}segmentation"], grid.shape[1:], affine, "nearest", "zeros")
    spacing_mm = float(nib.affines.voxel_sizes(affine)[0])
    distances = compute_hemisphere_distances(fold_ids(np.asarray(ids[0].cpu()).astype(np.int64)), spacing_mm)
    return grow_meshes(torch.from_numpy(np.moveaxis(distances, -1, 0).copy()), affine)
