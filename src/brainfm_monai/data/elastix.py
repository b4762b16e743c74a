"""Linear registration by elastix, with RAS matrices in and out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import itk
import numpy as np
from nibabel.affines import from_matvec, voxel_sizes

from brainfm_monai.data.intensities import resample_to_box

__all__ = ["register_linear"]

RAS_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
EULER = "EulerTransform"
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
    "Transform": [EULER],
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
        _, result = itk.elastix_registration_method(
            _to_itk(*_straighten(*fixed)),
            _to_itk(*_straighten(*moving)),
            parameter_object=stages,
            log_to_console=False,
            number_of_threads=1,
        )
    except RuntimeError as error:
        raise RuntimeError(f"registration: elastix gave up: {' '.join(str(error).split())[-200:]}") from error
    return _read_matrix(result.GetParameterMap(0))


def _straighten(volume: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A volume on the closest grid with orthogonal axes, which ITK needs; a CT with tilted gantry has others."""
    spacing = voxel_sizes(affine)
    left, _, right = np.linalg.svd(affine[:3, :3] / spacing)
    if np.abs(affine[:3, :3] - (left @ right) * spacing).max() < ORTHOGONAL_TOLERANCE_MM:
        return volume, affine
    grid = from_matvec((left @ right) * spacing)
    middle = [*((np.array(volume.shape) - 1) / 2), 1]
    grid[:3, 3] = (affine @ middle - grid @ middle)[:3]
    return resample_to_box(volume, affine, grid, volume.shape, outside=float(volume.min())), grid


def _read_matrix(found: Mapping[str, Sequence[str]]) -> np.ndarray:
    """The RAS matrix of an affine or Euler transform: x -> M (x - c) + c + t in LPS."""
    numbers = np.array([float(v) for v in found["TransformParameters"]])
    centre = np.array([float(v) for v in found["CenterOfRotationPoint"]])
    linear = _euler(numbers[:3]) if found["Transform"][0] == EULER else numbers[:9].reshape(3, 3)
    matrix = np.eye(4)
    matrix[:3, :3] = linear
    matrix[:3, 3] = numbers[-3:] + centre - linear @ centre
    return RAS_LPS @ matrix @ RAS_LPS


def _euler(angles: np.ndarray) -> np.ndarray:
    """ITK's Euler angles (radians, ZXY order): R = Rz Rx Ry."""
    (cx, cy, cz), (sx, sy, sz) = np.cos(angles), np.sin(angles)
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    return np.asarray(about_z @ about_x @ about_y)


def _to_itk(volume: np.ndarray, affine: np.ndarray) -> Any:
    """An ITK image (LPS, fastest axis first) of a volume in RAS."""
    lps = RAS_LPS @ affine
    spacing = voxel_sizes(lps)
    image = itk.image_from_array(np.ascontiguousarray(volume.T, dtype=np.float32))
    image.SetSpacing([float(s) for s in spacing])
    image.SetOrigin([float(o) for o in lps[:3, 3]])
    image.SetDirection(itk.matrix_from_array(np.ascontiguousarray(lps[:3, :3] / spacing)))
    return image
