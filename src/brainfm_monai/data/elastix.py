"""Linear registration by elastix, with RAS matrices in and out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import itk
import numpy as np
import torch
from monai.data import MetaTensor
from monai.data.itk_torch_bridge import metatensor_to_itk_image
from nibabel.affines import apply_affine, from_matvec, voxel_sizes

from brainfm_monai.data.intensities import resample_to_box

__all__ = ["register_linear"]

RAS_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
ORTHOGONAL_TOLERANCE_MM = 1e-4  # per voxel

COMMON: dict[str, Sequence[str]] = {
    "FixedInternalImagePixelType": ["float"],
    "MovingInternalImagePixelType": ["float"],
    "Registration": ["MultiResolutionRegistration"],
    "FixedImagePyramid": ["FixedSmoothingImagePyramid"],
    "MovingImagePyramid": ["MovingSmoothingImagePyramid"],
    "Optimizer": ["AdaptiveStochasticGradientDescent"],
    "AutomaticParameterEstimation": ["true"],
    "ASGDParameterEstimationMethod": ["DisplacementDistribution"],
    "NumberOfSamplesForExactGradient": ["10000"],
    "ImageSampler": ["RandomCoordinate"],
    "NewSamplesEveryIteration": ["true"],
    "Interpolator": ["LinearInterpolator"],
    "ResampleInterpolator": ["FinalLinearInterpolator"],
    "Resampler": ["DefaultResampler"],
    "UseDirectionCosines": ["true"],
    "AutomaticScalesEstimation": ["true"],
    "AutomaticTransformInitialization": ["true"],
    "AutomaticTransformInitializationMethod": ["CenterOfGravity"],
    # mm; the usual step, a voxel, sends coarse scans off
    "MaximumStepLength": ["0.5"],
    "RequiredRatioOfValidSamples": ["0.05"],
    "RandomSeed": ["20"],
    "WriteResultImage": ["false"],
}
AFFINE: dict[str, Sequence[str]] = COMMON | {
    "Transform": ["AffineTransform"],
    "Metric": ["AdvancedNormalizedCorrelation"],
    "NumberOfResolutions": ["2"],
    "ImagePyramidSchedule": ["4", "4", "4", "2", "2", "2"],
    "NumberOfSpatialSamples": ["4000"],
    "MaximumNumberOfIterations": ["400"],
}
RIGID: dict[str, Sequence[str]] = COMMON | {
    "Transform": ["EulerTransform"],
    "Metric": ["AdvancedMattesMutualInformation"],
    "NumberOfHistogramBins": ["32"],
    "NumberOfResolutions": ["3"],
    "ImagePyramidSchedule": ["4", "4", "4", "2", "2", "2", "1", "1", "1"],
    "NumberOfSpatialSamples": ["5000"],
    "MaximumNumberOfIterations": ["300"],
}


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
        parameters: :data:`AFFINE` (one contrast) or :data:`RIGID` (any two contrasts), or a variation of them.
        from_headers: start where the affines place the images; else with the centres of gravity on each other.

    Returns:
        Matrix from RAS mm of the fixed image to RAS mm of the moving one, shape (4, 4).

    Raises:
        RuntimeError: if elastix fails, as for an image without contrast.
    """
    chosen = dict(parameters) | ({"AutomaticTransformInitialization": ["false"]} if from_headers else {})
    stages = itk.ParameterObject.New()
    stages.AddParameterMap({key: [str(v) for v in value] for key, value in chosen.items()})
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
    channel_first = MetaTensor(values, affine=torch.from_numpy(affine))
    return metatensor_to_itk_image(channel_first, dtype=np.float32)
