"""The surfaces of a case against those of its reference: files, or what its distances or labels give."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from monai.data import MetaTensor
from monai.transforms import Transform
from scipy import ndimage
from skimage.measure import marching_cubes

from brainfm_monai.data.distances import compute_hemisphere_distances
from brainfm_monai.evaluation.cases import SURFACES
from brainfm_monai.evaluation.degradations import TARGET
from brainfm_monai.io import ScanError, first_line
from brainfm_monai.metrics import MetricRow
from brainfm_monai.metrics.surfaces import Mesh, compare_surfaces, compare_thickness
from brainfm_monai.outputs import resample
from brainfm_monai.surfaces import grow_hemisphere

__all__ = ["MeasureSurfaces", "extract_level", "read_mesh"]

# FreeSurfer's surface RAS: directions of the axes of a conformed volume, by columns
SURFACE_AXES = np.array([[-1.0, 0, 0], [0, 0, 1], [0, -1, 0]])
PURE = ("found", "euler_number", "crossing_share", "vertex_thickness_correlation")  # numbers; the others are in mm


def read_mesh(path: str | Path) -> Mesh:
    """Read a triangle surface.

    Args:
        path: GIFTI file (``.gii``) with vertices in scanner RAS mm, or FreeSurfer's geometry (``lh.white``, ``rh.pial``), whose
            surface RAS is taken to scanner RAS by the volume that the file names.

    Returns:
        Vertices in scanner RAS mm, shape (V, 3), and triangles, shape (F, 3).

    Raises:
        ScanError: if it is no such file; one line.
    """
    try:
        if Path(path).suffix in (".gii", ".gz"):
            vertices, faces = nib.gifti.GiftiImage.from_filename(path).agg_data(("pointset", "triangle"))
            return np.asarray(vertices, np.float64), np.asarray(faces, np.int64)
        vertices, faces, info = nib.freesurfer.read_geometry(path, read_metadata=True)
        axes = np.stack([info["xras"], info["yras"], info["zras"]], axis=1)
        return vertices @ (axes @ SURFACE_AXES.T).T + info["cras"], np.asarray(faces, np.int64)
    except Exception as error:  # damaged files show as many kinds of errors of the libraries
        raise ScanError(
            f"{path}: a GIFTI or FreeSurfer surface with its volume is needed, found {first_line(error)}"
        ) from error


class MeasureSurfaces(Transform):
    """Compare the surfaces of the predicted distances with those of the reference; after :class:`MeasureMaps`.

    The reference's surfaces are the files that the case names (``left_white``, ``left_pial``, ``right_white``, ``right_pial``), else
    those on which its distances are 0, else those on which the distances to its labels are. A case with none of these has no
    rows of surfaces.

    Args:
        levels_mm: see :func:`~brainfm_monai.surfaces.grow_hemisphere`.
    """

    def __init__(self, levels_mm: Sequence[float] = (0.0, 0.0)) -> None:
        self.levels_mm = tuple(levels_mm)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Add rows of the tasks ``surface_white``, ``surface_pial`` and ``surface_thickness``."""
        d = dict(data)
        reference = _find_reference(d)
        if "distance" not in d or not reference:
            return d
        pred = self._grow(d["distance"])
        rows: list[MetricRow] = []
        for side in ("left", "right"):
            pairs = {kind: (pred.get(f"{side}_{kind}"), reference.get(f"{side}_{kind}")) for kind in ("white", "pial")}
            matched = {kind: (a, b) for kind, (a, b) in pairs.items() if a is not None and b is not None}
            measures = {
                f"surface_{k}": {"found": float(k in matched)} for k, pair in pairs.items() if pair[1] is not None
            }
            for kind, pair in matched.items():
                measures[f"surface_{kind}"] |= compare_surfaces(*pair)
            if len(matched) == len(pairs):
                white, pial = matched["white"], matched["pial"]
                measures["surface_thickness"] = compare_thickness((white[0], pial[0]), (white[1], pial[1]))
            names = (str(d["scan"]), str(d["condition"]))
            rows += [
                MetricRow(*names, task, "cortex", side, metric, value, "1" if metric in PURE else "mm")
                for task, values in measures.items()
                for metric, value in values.items()
            ]
        return d | {"rows": [*d.get("rows", ()), *rows]}

    def _grow(self, distance: MetaTensor) -> dict[str, Mesh]:
        """The surfaces that ``predict`` makes of distances lp, lw, rp, rw, shape (4, H, W, D)."""
        affine = np.asarray(distance.affine, dtype=np.float64)
        left_pial, left_white, right_pial, right_white = distance.as_tensor().cpu().float()
        surfaces: dict[str, Mesh] = {}
        for side, white, pial, opposite in (
            ("left", left_white, left_pial, right_pial),
            ("right", right_white, right_pial, left_pial),
        ):
            grown = grow_hemisphere(white, pial, opposite, affine, self.levels_mm)
            if grown is not None:
                surfaces |= {
                    f"{side}_white": (grown.white_mm, grown.faces),
                    f"{side}_pial": (grown.pial_mm, grown.faces),
                }
        return surfaces


def _find_reference(data: Mapping[Hashable, Any]) -> dict[str, Mesh]:
    files = {name: read_mesh(str(data[name])) for name in SURFACES if name in data}
    if files:
        return files
    if f"{TARGET}distance" in data:
        distance: MetaTensor = data[f"{TARGET}distance"]
        channels, affine = np.asarray(distance.cpu()), np.asarray(distance.affine, dtype=np.float64)
    elif f"{TARGET}segmentation" in data:
        grid: MetaTensor = data["image"]  # isotropic
        affine = np.asarray(grid.affine, dtype=np.float64)
        ids = resample(data[f"{TARGET}segmentation"], grid.shape[1:], affine, "nearest", "zeros")
        spacing_mm = float(nib.affines.voxel_sizes(affine)[0])
        channels = compute_hemisphere_distances(np.asarray(ids[0].cpu()).astype(np.int64), spacing_mm)
        channels = np.moveaxis(channels, -1, 0)
    else:
        return {}
    names = ("left_pial", "left_white", "right_pial", "right_white")  # lp, lw, rp, rw
    return {
        name: extract_level(one, affine) for name, one in zip(names, channels, strict=True) if one.min() < 0 < one.max()
    }


def extract_level(distance: np.ndarray, affine: np.ndarray) -> Mesh:
    """The largest connected piece of the surface on which a distance, (H, W, D), is 0, by marching cubes, in RAS mm."""
    inside = distance < 0
    regions, _ = ndimage.label(inside)
    largest = np.bincount(regions.ravel())[1:].argmax() + 1
    # what is beyond the image is outside: the surface is closed there
    level = np.pad(
        np.where(inside & (regions != largest), -distance, distance), 1, constant_values=np.abs(distance).max()
    )
    vertices, faces, _, _ = marching_cubes(level, 0.0)
    return nib.affines.apply_affine(affine, vertices - 1), faces
