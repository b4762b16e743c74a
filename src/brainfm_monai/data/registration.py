"""MNI coordinates of a subject: its tissues are registered to those of MNI152, affine first, then diffeomorphic."""

from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from importlib import resources
from typing import NamedTuple

import edt
import numpy as np
import torch
import torch.nn.functional as nnf
from nibabel.affines import apply_affine, from_matvec
from nilearn import datasets as mni
from scipy.ndimage import gaussian_filter, maximum_filter
from torch import Tensor

from brainfm_monai.data.contrasts import AFFINE, register_linear
from brainfm_monai.data.subjects import Image
from brainfm_monai.functional.spatial import identity_grid, integrate_velocity, jacobian_determinant, warp
from brainfm_monai.io import read_table, refuse_if

TEMPLATE_NAME = "MNI152 ICBM 2009a symmetric, T1 and tissue maps as shipped with nilearn"
SPACING_VOX = 2
MINIMUM_JACOBIAN, UNFOLDING_ROUNDS = 0.2, 100
# fluid further than this from any brain tissue is left out, as in a brain-extracted template
FLUID_OUTSIDE, FLUID_RIM_VOX = 24, 2.0
# Chosen on one label map: white matter overlaps with a Dice of 0.803, 0.789 and 0.776 at 0.6, 1 and 1.5, and 223, 133
# and 87 voxels of the 4 mm grid come below MINIMUM_JACOBIAN.
STIFFNESS = 1.0
BENDING = 4.0  # weight of second derivatives relative to first ones
STEP_VOX = 0.1  # of the optimiser, in voxels of the velocity field
SMOOTHING_MM = 0.7
MARGIN_VOX = 3  # around tissue, within which the images are compared

_ROWS = read_table(str(resources.files("brainfm_monai") / "datasets" / "registration.tsv"))
# Medians of the template's T1 in its own tissue maps, and its value in the nuclei, white matter = 110; and shares of
# white and grey matter: where the template's maps mix both, as in the nuclei, these are its means in the structure.
T1_OF_ID = {int(row["freesurfer_id"]): float(row["t1"]) for row in _ROWS}
TISSUES_OF_ID = {int(row["freesurfer_id"]): (float(row["white"]), float(row["grey"])) for row in _ROWS}


class Level(NamedTuple):
    """One resolution of the registration: voxels of its images and of its velocity field, and its number of steps."""

    image_mm: int  # a multiple of 2
    velocity_mm: int
    iterations: int


LEVELS = (Level(4, 8, 60), Level(2, 4, 40))
_resize = partial(nnf.interpolate, mode="trilinear")  # a field on another grid over the same box, values as they are


def look_up(ids: np.ndarray, values: Mapping[int, Sequence[float]]) -> np.ndarray:
    """Values of the ids of a map, shape (N, H, W, D), float32; 0 for other ids."""
    table = np.zeros((len(next(iter(values.values()))), max(int(ids.max()), *values) + 1), dtype=np.float32)
    table[:, list(values)] = np.transpose(list(values.values()))
    return table[:, ids]


def render_t1(ids: np.ndarray) -> np.ndarray:
    """Brain-only picture with a T1's contrasts, one mean per id: intensities in [0, 110], shape of ``ids``, float32."""
    picture = look_up(ids, {i: (value,) for i, value in T1_OF_ID.items()})[0]
    tissue = (picture > 0) & (ids != FLUID_OUTSIDE)
    far = edt.edt(np.ascontiguousarray(~tissue), parallel=1) > FLUID_RIM_VOX
    picture[far & (ids == FLUID_OUTSIDE)] = 0
    return picture


@lru_cache(maxsize=1)
def load_template() -> Image:
    """The brain-extracted MNI152 T1 at 2 mm, white matter = 110, and its affine, which nilearn ships."""
    template = mni.load_mni152_template(resolution=SPACING_VOX)
    mask = mni.load_mni152_brain_mask(resolution=SPACING_VOX).get_fdata() > 0
    picture = np.where(mask, template.get_fdata(), 0) * (110.0 / 0.87)
    return picture.astype(np.float32), np.asarray(template.affine, dtype=np.float64)


@lru_cache(maxsize=1)
def load_tissue_maps() -> Image:
    """Probabilities of white and grey matter in MNI152 at 2 mm, (2, H, W, D), and their affine, which nilearn ships."""
    maps = [load(resolution=SPACING_VOX) for load in (mni.load_mni152_wm_template, mni.load_mni152_gm_template)]
    return np.stack([m.get_fdata(dtype=np.float32) for m in maps]), np.asarray(maps[0].affine, dtype=np.float64)


def compute_mni_coordinates(
    ids: np.ndarray,
    affine: np.ndarray,
    factor: int = 4,
    *,
    initial: np.ndarray | None = None,
    levels: Sequence[Level] = LEVELS,
) -> Image:
    """Register a subject to MNI152: affine, then the flow of a stationary velocity field.

    The affine map makes a T1-like rendering of the labels agree with the template's T1 (elastix). The flow brings the
    template's maps of white and grey matter onto the subject's: mean squared difference, with a penalty on first and
    second derivatives of the velocity, from coarse to fine (Ashburner, A fast diffeomorphic image registration
    algorithm, NeuroImage 38, 2007). ``ids`` are those of FreeSurfer, shape (H, W, D), voxels of 1 mm that ``affine``
    takes to RAS mm; ``initial`` is a rough matrix from RAS mm to MNI152 mm, with which the affine registration starts.
    Returns MNI152 RAS coordinates in mm, shape (H / factor, W / factor, D / factor, 3), float32, and the affine of that
    grid. ValueError if a size is no multiple of ``factor`` and of 2, RuntimeError if elastix fails, or the map folds.
    """
    rule = f"compute_mni_coordinates: sizes must be multiples of {SPACING_VOX} and {factor}"
    refuse_if(any(n % factor or n % SPACING_VOX for n in ids.shape), rule, ids.shape)
    fixed_affine = coarsen_affine(affine, SPACING_VOX)
    fixed = _halve(render_t1(ids)[None], sigma_vox=1.0)[0].numpy()
    start = np.eye(4) if initial is None else initial
    moving = load_template()
    matrix = register_linear((fixed, start @ fixed_affine), moving, AFFINE, from_headers=initial is not None) @ start
    velocity_mm = _flow(_halve(look_up(ids, TISSUES_OF_ID), SMOOTHING_MM)[None], fixed_affine, matrix, levels)
    grid_affine = coarsen_affine(affine, factor)
    spacing = levels[-1].velocity_mm
    ddf = _resize(integrate_velocity(velocity_mm / spacing) * (spacing / factor), [n // factor for n in ids.shape])
    displacement = ddf[0].movedim(0, -1).double().numpy()
    to_mni = matrix @ grid_affine
    points = apply_affine(to_mni, np.moveaxis(np.indices(displacement.shape[:3]), 0, -1))
    return unfold_coordinates(points, displacement @ to_mni[:3, :3].T, to_mni).astype(np.float32), grid_affine


def _halve(volumes: np.ndarray, sigma_vox: float) -> Tensor:
    """Volumes of shape (C, H, W, D), smoothed, at twice the voxel size."""
    smooth = np.stack([gaussian_filter(volume, sigma_vox, truncate=3.0) for volume in volumes])
    return nnf.avg_pool3d(torch.from_numpy(smooth), SPACING_VOX)


def _flow(fixed: Tensor, affine: np.ndarray, matrix: np.ndarray, levels: Sequence[Level]) -> Tensor:
    """Velocity field in mm, shape (1, 3, ...), after whose flow ``matrix`` leads to the template.

    ``fixed`` has shape (1, 2, H, W, D) and voxels of 2 mm, with ``affine`` to RAS mm.
    """
    maps, template_affine = load_tissue_maps()
    moving = torch.from_numpy(maps)[None]
    extent_mm = [n * SPACING_VOX for n in fixed.shape[2:]]
    velocity_mm = torch.zeros(1, 3, *(n // levels[0].velocity_mm for n in extent_mm))
    for level in levels:
        ratio = level.image_mm // SPACING_VOX
        subject, template = (nnf.avg_pool3d(maps, ratio) for maps in (fixed, moving))
        to_template = np.linalg.inv(coarsen_affine(template_affine, ratio)) @ matrix @ coarsen_affine(affine, ratio)
        read_template = partial(_read_template, template, torch.from_numpy(to_template).float())
        grid, scale = identity_grid(subject.shape[2:]), level.velocity_mm / level.image_mm
        # voxels far from any tissue of both images are 0 in both: a third to a quarter of the box remains
        tissue = (subject.flatten(2) + read_template(grid.flatten(2))).sum(1).reshape(subject.shape[2:])
        near = torch.from_numpy(maximum_filter(tissue.numpy(), 2 * MARGIN_VOX + 1)).flatten() > 0
        target = subject.flatten(2)[..., near]
        velocity = _resize(velocity_mm, [n // level.velocity_mm for n in extent_mm]) / level.velocity_mm
        velocity.requires_grad_()  # in its own voxels
        optimiser = torch.optim.Adam([velocity], lr=STEP_VOX)
        for _ in range(level.iterations):
            optimiser.zero_grad()
            moved = grid + _resize(integrate_velocity(velocity), subject.shape[2:]) * scale
            difference = read_template(moved.flatten(2)[..., near]) - target
            roughness = STIFFNESS * (level.velocity_mm / 4) ** 2 * _roughness(velocity)
            (difference.square().sum() / target.square().sum().clamp_min(1) + roughness).backward()
            optimiser.step()
        velocity_mm = velocity.detach() * level.velocity_mm
    return velocity_mm


def _read_template(template: Tensor, to_template: Tensor, voxels: Tensor) -> Tensor:
    """Maps of the template, (1, 2, N), at voxels of the subject, (1, 3, N)."""
    return warp(template, (to_template[:3, :3] @ voxels + to_template[:3, 3:])[..., None, None])[..., 0, 0]


def _roughness(velocity: Tensor) -> Tensor:
    """Mean square of first derivatives and, weighted, of second ones along the axes."""
    total = velocity.new_zeros(())
    for axis in (2, 3, 4):
        first = velocity.diff(dim=axis)
        total = total + first.square().mean() + BENDING * first.diff(dim=axis).square().mean()
    return total


def unfold_coordinates(points: np.ndarray, displacement: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Smooth a displacement where it folds or is about to, and nowhere else, until its Jacobian is at least 0.2.

    ``points`` are voxels in mm, ``displacement`` leads from these to the template, both (H, W, D, 3); ``affine`` takes
    voxels to mm. The result are template coordinates in mm, same shape. RuntimeError if folds remain.
    """
    for _ in range(UNFOLDING_ROUNDS):
        folded = compute_jacobian(points + displacement, affine) < MINIMUM_JACOBIAN
        if not folded.any():
            return points + displacement
        # around a lone voxel the weight is still one, and it fades out over some three voxels
        weight = np.clip(gaussian_filter(folded.astype(np.float32), 1.0) * 16, 0, 1)[..., None]
        displacement = displacement + weight * (gaussian_filter(displacement, 1.0, axes=(0, 1, 2)) - displacement)
    found = f"the map to the template has a Jacobian below {MINIMUM_JACOBIAN} at {int(folded.sum())} voxels"
    raise RuntimeError(f"{found}, and smoothing does not help")


def coarsen_affine(affine: np.ndarray, factor: int) -> np.ndarray:
    """Affine of the grid whose voxels are blocks of ``factor`` voxels along each axis."""
    return affine @ from_matvec(np.eye(3) * factor, [(factor - 1) / 2] * 3)


def compute_jacobian(coordinates: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Jacobian determinant (H, W, D) of a map from subject mm to template mm; folds are where it is not positive.

    ``coordinates`` are those in the template in mm, shape (H, W, D, 3); ``affine`` takes voxels of that grid to RAS mm.
    """
    in_mm = torch.from_numpy(np.moveaxis(coordinates, -1, 0)[None])
    return jacobian_determinant(in_mm)[0, 0].numpy() / np.linalg.det(affine[:3, :3])
