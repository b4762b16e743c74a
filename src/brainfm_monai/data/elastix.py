"""Linear registration by elastix, with RAS matrices in and out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import itk
import numpy as np
import torch
from monai.data import MetaTensor
from monai.data.itk_torch_bridge import metatensor_to_itk_image
from nibabel.affines import apply_affine, from_matvec, voxel_sizes

from brainfm_monai.data.intensities import resample_to_box
from brainfm_monai.io import read_table

__all__ = ["AFFINE", "RIGID", "register_linear"]

RAS_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
ORTHOGONAL_TOLERANCE_MM = 1e-4  # per voxel
_ROWS = read_table(str(resources.files("brainfm_monai") / "datasets" / "elastix.tsv"))
# what differs from elastix's own parameters of affine registrations: of images of one contrast, and of any two contrasts
AFFINE: dict[str, Sequence[str]] = {row["parameter"]: row["affine"].split() for row in _ROWS if row["affine"]}
RIGID: dict[str, Sequence[str]] = {row["parameter"]: row["rigid"].split() for row in _ROWS if row["rigid"]}


def register_linear(
    fixed: tuple[np.ndarray, np.ndarray],
    moving: tuple[np.ndarray, np.ndarray],
    parameters: Mapping[str, Sequence[str]],
    *,
    from_headers: bool = False,
) -> np.ndarray:
    """Find the linear map from the points of one image to those of another.

    Args:
        fixed: volume, shape (H, W, D), and its affine to RAS mm.
        moving: the same of the other image.
        parameters: :data:`AFFINE` or :data:`RIGID`, or a variation of them.
        from_headers: start where the affines place the images; else with the centres of gravity on each other.

    Returns:
        Matrix from RAS mm of the fixed image to RAS mm of the moving one, shape (4, 4).

    Raises:
        RuntimeError: if elastix fails, as for an image without contrast.
    """
    stages = itk.ParameterObject.New()
    start = {"AutomaticTransformInitialization": ["false"]} if from_headers else {}
    stages.AddParameterMap(dict(stages.GetDefaultParameterMap("affine")) | dict(parameters) | start)
    try:
        elastix = itk.ElastixRegistrationMethod.New(_to_itk(*fixed), _to_itk(*moving), parameter_object=stages)
        elastix.SetLogToConsole(False)
        elastix.SetNumberOfThreads(1)
        elastix.Update()
    except RuntimeError as error:
        raise RuntimeError(f"registration: elastix gave up: {' '.join(str(error).split())[-200:]}") from error
    transform = elastix.ConvertToItkTransform(elastix.GetNthTransform(0))
    origin, *axes = (np.array(transform.TransformPoint(point)) for point in np.eye(4)[[3, 0, 1, 2], :3].tolist())
    return np.asarray(RAS_LPS @ from_matvec(np.stack(axes, axis=1) - origin[:, None], origin) @ RAS_LPS)


def _to_itk(volume: np.ndarray, affine: np.ndarray) -> Any:
    """An ITK image of a volume in RAS mm, on the closest grid with orthogonal axes, which ITK needs.

    A CT with tilted gantry has axes that are not orthogonal.
    """
    spacing = voxel_sizes(affine)
    left, _, right = np.linalg.svd(affine[:3, :3] / spacing)
    if np.abs(affine[:3, :3] - (left @ right) * spacing).max() > ORTHOGONAL_TOLERANCE_MM:
        grid = from_matvec((left @ right) * spacing)
        middle = (np.array(volume.shape) - 1) / 2
        grid[:3, 3] = apply_affine(affine, middle) - apply_affine(grid, middle)
        volume, affine = resample_to_box(volume, affine, grid, volume.shape, outside=float(volume.min())), grid
    values = torch.from_numpy(np.ascontiguousarray(volume[None], dtype=np.float32))
    return metatensor_to_itk_image(MetaTensor(values, affine=torch.from_numpy(affine)), dtype=np.float32)
