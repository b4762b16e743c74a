"""The surfaces of a case against those of its reference: files, or what its distances or labels give."""

from collections.abc import Hashable, Mapping, Sequence
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
from brainfm_monai.metrics import MetricRow
from brainfm_monai.metrics.tables import unit_of
from brainfm_monai.outputs import resample
from brainfm_monai.tasks import MAX_DISTANCE_MM, TASKS
from brainfm_monai.transforms import find_boundaries

# FreeSurfer's surface RAS: directions of the axes of a conformed volume, by columns
SURFACE_AXES = np.array([[-1.0, 0, 0], [0, 0, 1], [0, -1, 0]])
MEDIAL_WALL_MM = 0.1  # below it a reference has no cortex: both of its surfaces are one there

Mesh = tuple[np.ndarray, np.ndarray]  # vertices in mm, (V, 3), and their numbers in each triangle, (F, 3)


def _find_nearest(points: np.ndarray, mesh: Mesh) -> tuple[np.ndarray, np.ndarray]:
    """Distance of points, (N, 3), to the triangles of a mesh, (N,), and the nearest points on them, (N, 3)."""
    vertices, faces = (np.ascontiguousarray(a, dtype=t) for a, t in zip(mesh, (np.float64, np.int64), strict=True))
    squared, _, nearest = igl.point_mesh_squared_distance(np.ascontiguousarray(points, np.float64), vertices, faces)
    return np.sqrt(squared), nearest


def compare_surfaces(pred: Mesh, reference: Mesh, cortex: np.ndarray | None = None) -> dict[str, float]:
    """Distances in mm between two surfaces of the same space, and what is wrong with the predicted one by itself.

    The measures are defined in ``metrics/measures.tsv``; ``from_cortex_*`` are of the vertices of the reference that
    ``cortex``, (V,) bool, tells: references differ in the medial wall, which has none.
    """
    back = _find_nearest(reference[0], pred)[0]
    distances = {"to_reference": _find_nearest(pred[0], reference)[0], "from_reference": back}
    if cortex is not None and cortex.any():
        distances["from_cortex"] = back[cortex]
    measures: dict[str, float] = {}
    for name, distance in distances.items():
        statistics = {"mean": distance.mean(), "median": np.median(distance), "p95": np.percentile(distance, 95)}
        measures |= {f"{name}_{statistic}": float(value) for statistic, value in statistics.items()}
    euler, share = surfaces.compute_euler_number(pred[1]), surfaces.compute_crossing_share(*pred)
    return measures | {"euler_number": euler, "crossing_share": share}


def compute_vertex_thickness(white: Mesh, pial: Mesh) -> np.ndarray:
    """Thickness of the cortex in mm at the vertices of the white surface, shape (V,).

    Of surfaces in correspondence, which have the same triangles, it is that of ``predict``
    (:func:`~brainfm_monai.surfaces.compute_thickness_mm`), else the mean of the distance from a vertex to the nearest
    point on the triangles of the pial surface, and of that from this point back to the white surface, which is shorter.
    """
    if np.array_equal(white[1], pial[1]):
        return surfaces.compute_thickness_mm(white[0], pial[0], white[1])
    outwards, nearest = _find_nearest(white[0], pial)
    return np.asarray((outwards + _find_nearest(nearest, white)[0]) / 2)


def compare_thickness(pred: Sequence[Mesh], reference: Sequence[Mesh]) -> dict[str, float]:
    """Error of the thickness at the vertices of the reference's white surface, without the medial wall; mm.

    Each is a white and a pial surface. The thickness at the predicted vertex that is nearest to one of the reference is
    compared; the medial wall is where both surfaces of the reference are less than 0.1 mm apart. The measures, defined
    in ``metrics/measures.tsv``, begin with ``vertex_thickness``; NaN without a vertex or without variation.
    """
    true = compute_vertex_thickness(*reference)
    predicted = compute_vertex_thickness(*pred)[cKDTree(pred[0][0]).query(reference[0][0])[1]]
    predicted, true = predicted[true > MEDIAL_WALL_MM], true[true > MEDIAL_WALL_MM]
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

    The reference's surfaces are the files that the case names, :data:`~brainfm_monai.evaluation.cases.SURFACES`, else
    those that grow out of its distances, else those out of the distances to its labels. A case with none of these has
    no rows of surfaces. For ``levels_mm`` see :func:`~brainfm_monai.transforms.find_boundaries`.
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
        rows = list(d.get("rows", ()))
        for side in ("left", "right"):
            measures: dict[str, dict[str, float]] = {}
            names = {kind: f"{side}_{kind}" for kind in ("white", "pial")}
            both = [reference[name] for name in names.values() if name in reference]
            cortex = compute_vertex_thickness(*both) > MEDIAL_WALL_MM if len(both) == len(names) else None
            for kind, name in names.items():
                if name in reference:
                    same = cortex is not None and len(cortex) == len(reference[name][0])
                    mask = cortex if same else None
                    own = compare_surfaces(pred[name], reference[name], mask) if name in pred else {}
                    measures[f"surface_{kind}"] = {"found": float(name in pred), **own}
            if {*names.values()} <= pred.keys() & reference.keys():
                pairs = ([meshes[name] for name in names.values()] for meshes in (pred, reference))
                measures["surface_thickness"] = compare_thickness(*pairs)
            rows += [
                MetricRow(str(d["scan"]), str(d["condition"]), task, "cortex", side, metric, value, unit_of(metric))
                for task, values in measures.items()
                for metric, value in values.items()
            ]
        return d | {"rows": rows}


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
    sides = {"L": "left", "R": "right"}
    return {
        f"{sides[letter]}_{kind}": (vertices, one.faces)
        for letter, one in grown.items()
        for kind, vertices in (("white", one.white_mm), ("pial", one.pial_mm))
    }


def _find_reference(data: Mapping[Hashable, Any]) -> dict[str, Mesh]:
    if files := {name: read_mesh(str(data[name])) for name in SURFACES if name in data}:
        return files
    if f"{TARGET}distance" in data:
        distance: MetaTensor = data[f"{TARGET}distance"]
        channels, affine = distance.as_tensor().cpu().float(), np.asarray(distance.affine, dtype=np.float64)
    elif f"{TARGET}segmentation" in data:
        grid: MetaTensor = data["image"]  # isotropic
        affine = np.asarray(grid.affine, dtype=np.float64)
        ids = resample(data[f"{TARGET}segmentation"], grid.shape[1:], affine, "nearest", "zeros")
        spacing_mm = float(nib.affines.voxel_sizes(affine)[0])
        distances = compute_hemisphere_distances(fold_ids(np.asarray(ids[0].cpu()).astype(np.int64)), spacing_mm)
        channels = torch.from_numpy(np.moveaxis(distances, -1, 0).copy())
    else:
        return {}
    return grow_meshes(channels, affine)
