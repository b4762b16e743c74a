"""MNI coordinates of a subject: elastix registration of a T1-like rendering of its labels to the MNI152 T1 template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from tempfile import TemporaryDirectory
from typing import Any

import edt
import itk
import numpy as np
from monai.transforms import GaussianSmooth
from nibabel.affines import voxel_sizes
from nilearn.datasets import load_mni152_brain_mask, load_mni152_template

__all__ = [
    "T1_OF_ID",
    "TEMPLATE_NAME",
    "coarsen_affine",
    "compute_jacobian",
    "compute_mni_coordinates",
    "load_template",
    "render_t1",
    "unfold_coordinates",
]

TEMPLATE_NAME = "MNI152 ICBM 2009a symmetric T1, as shipped with nilearn"
SPACING_VOX = 2
MINIMUM_JACOBIAN, UNFOLDING_ROUNDS = 0.2, 100
RAS_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])

# Medians of the template's T1 in its own tissue maps, and its value in the nuclei, white matter = 110.
T1_OF_TISSUE: dict[float, tuple[int, ...]] = {
    110.0: (2, 7, 41, 46, 78, 79),
    101.0: (13, 52),
    98.0: (28, 60, 85),
    95.0: (12, 51),
    92.0: (16, 26, 58),
    89.0: (10, 11, 49, 50),
    85.0: (8, 47, 25, 57),
    82.0: (3, 17, 18, 42, 53, 54, 77),
    32.0: (4, 5, 14, 15, 24, 30, 31, 43, 44, 62, 63, 72, 136, 137, 163, 164),
}
T1_OF_ID: dict[int, float] = {i: value for value, ids in T1_OF_TISSUE.items() for i in ids}
FLUID_OUTSIDE = 24


def render_t1(ids: np.ndarray, fluid_rim_vox: float = 2.0) -> np.ndarray:
    """Brain-only picture with the contrasts of a T1, one mean per label.

    Args:
        ids: map of FreeSurfer ids, shape (H, W, D).
        fluid_rim_vox: fluid further than this from any brain tissue is left out, as in a brain-extracted template.

    Returns:
        Intensities in [0, 110], shape (H, W, D), float32.
    """
    table = np.zeros(max(int(ids.max()), *T1_OF_ID) + 1, dtype=np.float32)
    for i, value in T1_OF_ID.items():
        table[i] = value
    picture = table[ids]
    tissue = (picture > 0) & (ids != FLUID_OUTSIDE)
    far = edt.edt(np.ascontiguousarray(~tissue), parallel=1) > fluid_rim_vox
    picture[far & (ids == FLUID_OUTSIDE)] = 0
    return picture


@lru_cache(maxsize=1)
def load_template() -> tuple[np.ndarray, np.ndarray]:
    """The brain-extracted MNI152 T1 at 2 mm, white matter = 110, and its affine; from nilearn's own files, without a network."""
    template = load_mni152_template(resolution=SPACING_VOX)
    mask = load_mni152_brain_mask(resolution=SPACING_VOX).get_fdata() > 0
    picture = np.where(mask, template.get_fdata(), 0) * (110.0 / 0.87)
    return picture.astype(np.float32), np.asarray(template.affine, dtype=np.float64)


def compute_mni_coordinates(
    ids: np.ndarray, affine: np.ndarray, factor: int = 4, overrides: Mapping[str, Sequence[str]] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Register a subject to MNI152: affine, then a B-spline with a penalty on bending.

    The rendering is the fixed image, so that the transform takes the subject's points to the template's.

    Args:
        ids: map of FreeSurfer ids, shape (H, W, D), sizes that are multiples of ``factor``, voxels of 1 mm.
        affine: voxels to RAS mm, shape (4, 4).
        factor: voxels of the map per voxel of the result.
        overrides: elastix parameters that replace those of the B-spline stage.

    Returns:
        MNI152 RAS coordinates in mm, shape (H / factor, W / factor, D / factor, 3), float32, and the affine of that grid.

    Raises:
        ValueError: if a size is no multiple of ``factor`` and of 2.
        RuntimeError: if elastix fails.
    """
    if any(n % factor or n % SPACING_VOX for n in ids.shape):
        raise ValueError(f"compute_mni_coordinates: sizes must be multiples of {SPACING_VOX} and {factor}, got {ids.shape}")
    smooth = GaussianSmooth(sigma=1.0)(render_t1(ids)[None])[0].numpy()
    fixed = _to_itk(_block_mean(smooth, SPACING_VOX), coarsen_affine(affine, SPACING_VOX))
    template, template_affine = load_template()
    moving = _to_itk(template, template_affine)
    grid_affine = coarsen_affine(affine, factor)
    grid = _to_itk(np.zeros([n // factor for n in ids.shape], dtype=np.float32), grid_affine)
    field = _displacement(fixed, moving, grid, overrides or {})
    index = np.stack(np.meshgrid(*(np.arange(n) for n in field.shape[:3]), indexing="ij"), axis=-1)
    points = index @ grid_affine[:3, :3].T + grid_affine[:3, 3]
    return unfold_coordinates(points, field, grid_affine).astype(np.float32), grid_affine


def unfold_coordinates(
    points: np.ndarray, displacement: np.ndarray, affine: np.ndarray, minimum: float = MINIMUM_JACOBIAN
) -> np.ndarray:
    """Smooth a displacement where it folds or is about to, and nowhere else, until its Jacobian is at least ``minimum``.

    Args:
        points: positions of the voxels in mm, shape (H, W, D, 3).
        displacement: from these positions to the template, in mm, same shape.
        affine: voxels to mm.
        minimum: smallest determinant that is left, relative to no change of volume.

    Returns:
        Template coordinates in mm, shape (H, W, D, 3).

    Raises:
        RuntimeError: if the folds do not go away.
    """
    smooth: Any = GaussianSmooth(sigma=1.0)
    for _ in range(UNFOLDING_ROUNDS):
        folded = compute_jacobian(points + displacement, affine) < minimum
        if not folded.any():
            return points + displacement
        # around a lone voxel the weight is still one, and it fades out over some three voxels
        weight = np.clip(smooth(folded[None].astype(np.float32))[0].numpy() * 16, 0, 1)[..., None]
        smoother = np.moveaxis(smooth(np.moveaxis(displacement, -1, 0).astype(np.float32)).numpy(), 0, -1)
        displacement = displacement + weight * (smoother - displacement)
    raise RuntimeError(
        f"the map to the template has a Jacobian below {minimum} at {int(folded.sum())} voxels, and smoothing does not help"
    )


def coarsen_affine(affine: np.ndarray, factor: int) -> np.ndarray:
    """Affine of the grid whose voxels are blocks of ``factor`` voxels along each axis."""
    scale = np.diag([factor, factor, factor, 1.0])
    scale[:3, 3] = (factor - 1) / 2
    return affine @ scale


def compute_jacobian(coordinates: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Jacobian determinant of a coordinate map; folds are where it is not positive.

    Args:
        coordinates: template coordinates in mm, shape (H, W, D, 3).
        affine: voxels of that grid to RAS mm.

    Returns:
        Determinant of the map from subject mm to template mm, shape (H, W, D).
    """
    columns = [np.stack(np.gradient(coordinates[..., i], axis=(0, 1, 2)), axis=-1) for i in range(3)]
    return np.linalg.det(np.stack(columns, axis=-2)) / np.linalg.det(affine[:3, :3])


def _block_mean(volume: np.ndarray, factor: int) -> np.ndarray:
    h, w, d = (n // factor for n in volume.shape)
    return np.asarray(volume.reshape(h, factor, w, factor, d, factor).mean(axis=(1, 3, 5)), dtype=np.float32)


def _to_itk(volume: np.ndarray, affine: np.ndarray) -> Any:
    """An ITK image (LPS, fastest axis first) of a volume in RAS."""
    lps = RAS_LPS @ affine
    spacing = voxel_sizes(lps)
    image = itk.image_from_array(np.ascontiguousarray(volume.T, dtype=np.float32))
    image.SetSpacing([float(s) for s in spacing])
    image.SetOrigin([float(o) for o in lps[:3, 3]])
    image.SetDirection(itk.matrix_from_array(np.ascontiguousarray(lps[:3, :3] / spacing)))
    return image


def _displacement(fixed: Any, moving: Any, grid: Any, overrides: Mapping[str, Sequence[str]]) -> np.ndarray:
    """Displacement from subject to template on ``grid``, in RAS mm, shape (H, W, D, 3)."""
    parameters = itk.ParameterObject.New()
    for stage in (_affine_stage(), _bspline_stage() | dict(overrides)):
        parameters.AddParameterMap({key: [str(v) for v in value] for key, value in stage.items()})
    _, result = itk.elastix_registration_method(
        fixed, moving, parameter_object=parameters, log_to_console=False, number_of_threads=1
    )
    # The transform is asked for its displacement on the coarse grid of the result instead of the grid of the registration.
    geometry = {
        "Size": itk.size(grid),
        "Spacing": itk.spacing(grid),
        "Origin": itk.origin(grid),
        "Direction": itk.array_from_matrix(grid.GetDirection()).T.ravel(),
    }
    for number in range(result.GetNumberOfParameterMaps()):
        for key, value in geometry.items():
            result.SetParameter(number, key, [f"{v:.12g}" for v in value])
    # Transformix also writes the field to a file of fixed name, by default into the working directory.
    with TemporaryDirectory() as scratch:
        field = np.asarray(itk.transformix_deformation_field(moving, result, output_directory=scratch))
    return field.transpose(2, 1, 0, 3).astype(np.float64) * (-1, -1, 1)


def _common_stage() -> dict[str, Sequence[str]]:
    return {
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
        "HowToCombineTransforms": ["Compose"],
        "UseDirectionCosines": ["true"],
        "Metric": ["AdvancedNormalizedCorrelation"],
        "RandomSeed": ["20"],
        "WriteResultImage": ["false"],
    }


def _affine_stage() -> dict[str, Sequence[str]]:
    return _common_stage() | {
        "Transform": ["AffineTransform"],
        "AutomaticScalesEstimation": ["true"],
        "AutomaticTransformInitialization": ["true"],
        "AutomaticTransformInitializationMethod": ["CenterOfGravity"],
        "NumberOfResolutions": ["2"],
        "ImagePyramidSchedule": ["4", "4", "4", "2", "2", "2"],
        "NumberOfSpatialSamples": ["4000"],
        "MaximumNumberOfIterations": ["250"],
    }


def _bspline_stage() -> dict[str, Sequence[str]]:
    return _common_stage() | {
        "Registration": ["MultiMetricMultiResolutionRegistration"],
        "Metric": ["AdvancedNormalizedCorrelation", "TransformBendingEnergyPenalty"],
        "Metric0Weight": ["1.0"],
        "Metric1Weight": ["3.0"],
        "Transform": ["RecursiveBSplineTransform"],
        "FinalGridSpacingInPhysicalUnits": ["10.0", "10.0", "10.0"],
        "GridSpacingSchedule": ["4.0", "2.0", "1.0"],
        "NumberOfResolutions": ["3"],
        "ImagePyramidSchedule": ["4", "4", "4", "2", "2", "2", "1", "1", "1"],
        "NumberOfSpatialSamples": ["3000"],
        "MaximumNumberOfIterations": ["200"],
    }
