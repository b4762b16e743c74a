"""The surfaces of a case against those of its reference: what its distances or its labels give."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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
from brainfm_monai.data.labels import compute_hemisphere_distances, fold_ids
from brainfm_monai.evaluation.conditions import TARGET
from brainfm_monai.metrics.scan import make_rows
from brainfm_monai.outputs import resample
from brainfm_monai.surfaces import Hemisphere
from brainfm_monai.tasks import MAX_DISTANCE_MM, TASKS
from brainfm_monai.transforms import find_boundaries

MEDIAL_WALL_MM = 0.1  # below it a reference has no cortex: both of its surfaces are one there

Mesh = tuple[np.ndarray, np.ndarray]  # vertices in mm, (V, 3), and their numbers in each triangle, (F, 3)
SIDES = {"L": "left", "R": "right"}  # of the hemispheres


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


def compare_thickness(pred: Hemisphere, reference: Hemisphere) -> dict[str, float]:
    """Error of the thickness at the vertices of the reference's white surface, without the medial wall; mm.

    The thickness at the nearest predicted vertex is compared; the medial wall is where both surfaces of the reference
    are less than 0.1 mm apart. See ``metrics/measures.tsv``; NaN without a vertex or without variation.
    """
    nearest, cortex = cKDTree(pred.white_mm).query(reference.white_mm)[1], reference.thickness_mm > MEDIAL_WALL_MM
    predicted, true = pred.thickness_mm[nearest][cortex], reference.thickness_mm[cortex]
    parts = {"": predicted, "_reference": true, "_bias": predicted - true, "_error": np.abs(predicted - true)}
    measures = {f"vertex_thickness{name}": float(x.mean()) if len(x) else np.nan for name, x in parts.items()}
    varies = len(true) > 1 and min(np.ptp(predicted), np.ptp(true)) > 0
    measures["vertex_thickness_correlation"] = float(np.corrcoef(predicted, true)[0, 1]) if varies else np.nan
    return measures


@dataclass(eq=False)
class MeasureSurfaces(Transform):
    """Compare the surfaces of the predicted distances with those of the reference; after :class:`MeasureMaps`.

    The reference's surfaces grow out of its distances, else out of the distances to its labels; a case without both has
    no rows of surfaces. For ``levels_mm`` see :func:`~brainfm_monai.transforms.find_boundaries`.
    """

    levels_mm: Sequence[float] = (0.0, 0.0)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Add rows of the tasks ``surface_white``, ``surface_pial`` and ``surface_thickness``."""
        d = dict(data)
        if "distance" not in d or not (reference := _grow_reference(d)):
            return d
        image = d["image"].as_tensor()[0].cpu().float() if "image" in d else None
        pred = grow_surfaces(d["distance"].as_tensor(), np.asarray(d["distance"].affine), self.levels_mm, image)
        d["rows"] = list(d.get("rows", ()))
        for letter, true in reference.items():
            found, cortex = pred.get(letter), true.thickness_mm > MEDIAL_WALL_MM
            measures: dict[str, dict[str, float]] = {}
            for kind in ("white", "pial"):
                meshes = [(getattr(one, f"{kind}_mm"), one.faces) for one in (true, found) if one]
                own = compare_surfaces(meshes[1], meshes[0], cortex) if found else {}
                measures[f"surface_{kind}"] = {"found": float(found is not None), **own}
            if found:
                measures["surface_thickness"] = compare_thickness(found, true)
            for task, values in measures.items():
                named = {("cortex", SIDES[letter], metric): value for metric, value in values.items()}
                d["rows"] += make_rows(str(d["scan"]), str(d["condition"]), task, named)
        return d


def grow_surfaces(
    distance: Tensor, affine: np.ndarray, levels_mm: Sequence[float] = (0.0, 0.0), image: Tensor | None = None
) -> dict[str, Hemisphere]:
    """The surfaces that ``predict`` makes of distances lp, lw, rp, rw in mm, (4, H, W, D), by ``L`` and ``R``.

    For the other arguments see :func:`~brainfm_monai.transforms.find_boundaries`.
    """
    near = distance.cpu().float().clamp(-MAX_DISTANCE_MM, MAX_DISTANCE_MM)
    named = dict(zip(TASKS["distance"].channel_names, near, strict=True))
    voxel_mm = float(abs(np.linalg.det(affine[:3, :3])) ** (1 / 3))
    return surfaces.grow_hemispheres(find_boundaries(named, voxel_mm, levels_mm, image).distance, affine)


def _grow_reference(data: Mapping[Hashable, Any]) -> dict[str, Hemisphere]:
    if f"{TARGET}distance" in data:
        distance: MetaTensor = data[f"{TARGET}distance"]
        return grow_surfaces(distance.as_tensor(), np.asarray(distance.affine, dtype=np.float64))
    if f"{TARGET}segmentation" not in data:
        return {}
    grid: MetaTensor = data["image"]  # isotropic
    affine = np.asarray(grid.affine, dtype=np.float64)
    ids = resample(data[f"{TARGET}segmentation"], grid.shape[1:], affine, "nearest", "zeros")
    spacing_mm = float(nib.affines.voxel_sizes(affine)[0])
    distances = compute_hemisphere_distances(fold_ids(np.asarray(ids[0].cpu()).astype(np.int64)), spacing_mm)
    return grow_surfaces(torch.from_numpy(np.moveaxis(distances, -1, 0).copy()), affine)
