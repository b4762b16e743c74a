"""From predicted template coordinates to a transform: robust affine fit, smooth residual without folds, and the inverse of both.

All coordinates are RAS mm. A deformation is a :class:`Warp`: for each voxel of a grid the point that it is mapped to.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from nibabel.affines import apply_affine
from scipy.ndimage import gaussian_filter
from torch import Tensor

from brainfm_monai.functional.spatial import jacobian_determinant
from brainfm_monai.functional.spatial import warp as sample

ROUNDS, STILL = 30, 1e-7  # of reweighting, at most; it ends when no element of the matrix moves by more
HUBER_MM = 2.0  # residuals above count by their length, those below by its square: the error of good coordinates
SAMPLES = 200_000  # voxels of the brain that the affine is fitted to: a brain has a million of 1 mm
SMOOTHING_MM = (
    5.0  # width of the Gaussian that the residual is averaged with: what is finer is noise of the coordinates
)
SMOOTHING_GROWTH, SMOOTHING_ROUNDS = 1.5, 8  # until nothing folds: 5 mm become 85 mm
MINIMUM_JACOBIAN = 0.05  # a voxel of the brain that shrinks to less counts as folded
DECAY = 0.01  # share of brain in the Gaussian's reach below which the residual goes to 0, and the affine alone is left
INVERSION_ROUNDS, INVERSION_TOLERANCE_MM = 60, 0.01
SLAB = 32  # slices that are resampled at once


def grid_points(shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """RAS mm of every voxel, shape (*shape, 3), float32."""
    index = np.moveaxis(np.indices(shape, dtype=np.float32), 0, -1)
    return apply_affine(affine, index).astype(np.float32)


@dataclass(frozen=True)
class Warp:
    """A smooth map of space: the point that each voxel of a grid goes to; between voxels linear, beyond the grid affine.

    Attributes:
        points: RAS mm, shape (H, W, D, 3).
        affine: voxel indices of the grid to RAS mm, shape (4, 4).
        matrix: the map far from the brain, shape (4, 4).
    """

    points: np.ndarray
    affine: np.ndarray
    matrix: np.ndarray

    @cached_property
    def residual(self) -> Tensor:
        """What the map adds to its affine part, mm, shape (1, 3, H, W, D), float32."""
        residual = self.points - apply_affine(self.matrix, grid_points(self.points.shape[:3], self.affine))
        return torch.from_numpy(residual.astype(np.float32)).movedim(-1, 0)[None]

    def residual_at(self, points: np.ndarray) -> np.ndarray:
        """The residual at points of shape (..., 3), linearly interpolated, 0 beyond the grid."""
        index = apply_affine(np.linalg.inv(self.affine), points.reshape(-1, 3))
        coordinates = torch.from_numpy(index.T.astype(np.float32)).reshape(1, 3, -1, 1, 1)
        return sample(self.residual, coordinates)[0, :, :, 0, 0].T.numpy().reshape(points.shape)

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """Map points of shape (..., 3)."""
        return apply_affine(self.matrix, points) + self.residual_at(points)

    @property
    def displacement(self) -> np.ndarray:
        """How far each voxel goes, mm in RAS, shape (H, W, D, 3)."""
        return np.asarray(self.points - grid_points(self.points.shape[:3], self.affine))


def fit_affine(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Affine map by least squares in which outliers count little (Huber's function, by reweighting).

    Args:
        source: points, shape (N, 3), N at least 4 and not in a plane.
        target: where they go, shape (N, 3).

    Returns:
        Matrix of shape (4, 4) with target = matrix @ source.

    Raises:
        ValueError: if the points do not determine it.
    """
    step = max(1, len(source) // SAMPLES)
    points = np.column_stack([source[::step], np.ones(len(source[::step]))]).astype(np.float64)
    goal = target[::step].astype(np.float64)
    if len(points) < 4 or np.linalg.matrix_rank(points - points.mean(axis=0), tol=1e-3) < 3:
        raise ValueError(f"affine fit: points that fill a volume are needed, found {len(points)} that do not")
    weight, matrix = np.ones(len(points)), np.eye(4)
    for _ in range(ROUNDS):
        weighted, last = points * weight[:, None], matrix.copy()
        matrix[:3] = np.linalg.solve(weighted.T @ points, weighted.T @ goal).T
        if np.abs(matrix - last).max() < STILL:
            break
        error = np.linalg.norm(points @ matrix[:3].T - goal, axis=1)
        weight = HUBER_MM / np.maximum(error, HUBER_MM)
    return matrix


def fit_warp(
    coordinates: np.ndarray, brain: np.ndarray, affine: np.ndarray, matrix: np.ndarray, spacing_vox: int = 3
) -> Warp:
    """Smooth map to the template that follows predicted coordinates within the brain, and is affine far from it.

    The residual of the affine fit is averaged with a Gaussian over the brain alone (normalised convolution), and with a wider one
    as long as the map folds anywhere.

    Args:
        coordinates: predicted template RAS mm, shape (3, H, W, D).
        brain: where they are to be believed, bool, shape (H, W, D).
        affine: voxel indices to RAS mm, shape (4, 4).
        matrix: affine map to the template, see :func:`fit_affine`.
        spacing_vox: voxels per voxel of the result.

    Returns:
        The map on a coarser grid that covers the given one.
    """
    coarse = affine @ np.diag([spacing_vox] * 3 + [1.0])
    cut = (slice(None, None, spacing_vox),) * 3
    mask = brain[cut].astype(np.float32)
    spread = apply_affine(matrix, grid_points(mask.shape, coarse))
    residual = (np.moveaxis(coordinates[(slice(None), *cut)], 0, -1) - spread) * mask[..., None]
    # a coordinate that is far off is not smoothed but limited, as in the affine fit
    length = np.linalg.norm(residual, axis=-1, keepdims=True)
    limit = 5 * max(float(np.median(length[mask > 0])), HUBER_MM)
    residual *= np.minimum(1.0, limit / np.maximum(length, 1e-6))
    zooms = np.linalg.norm(coarse[:3, :3], axis=0)
    for number in range(SMOOTHING_ROUNDS):
        sigma = SMOOTHING_MM * SMOOTHING_GROWTH**number / zooms
        weight = gaussian_filter(mask, sigma, mode="constant")[..., None]
        smooth = np.stack([gaussian_filter(residual[..., i], sigma, mode="constant") for i in range(3)], axis=-1)
        warp = Warp((spread + smooth / (weight + DECAY)).astype(np.float32), coarse, matrix)
        if fold_fraction(warp, minimum=MINIMUM_JACOBIAN) == 0:
            break
    return warp


def fold_fraction(warp: Warp, where: np.ndarray | None = None, minimum: float = 0.0) -> float:
    """Share of voxels whose Jacobian determinant is not above ``minimum`` times that of the affine part.

    Args:
        warp: the map.
        where: voxels that count, bool, shape (H, W, D); None: all.
        minimum: 0 counts what is folded or collapsed.
    """
    coordinates = torch.from_numpy(warp.points.astype(np.float32)).movedim(-1, 0)[None]
    scale = np.linalg.det(warp.affine[:3, :3]) * np.linalg.det(warp.matrix[:3, :3])
    determinant = jacobian_determinant(coordinates)[0, 0].numpy() / scale
    counted = determinant if where is None else determinant[where]
    return float((counted <= minimum).mean()) if counted.size else 0.0


def invert_warp(warp: Warp, shape: tuple[int, ...], affine: np.ndarray) -> Warp:
    """The inverse of a map, on a grid of its target space, by fixed-point iteration on the residual.

    With y = A x + r(x), x = A^-1 (y - r(x)) is repeated from x = A^-1 y until no point moves by more than 0.01 mm.

    Args:
        warp: the map.
        shape: size of the grid of the inverse.
        affine: its voxel indices to RAS mm of the target space.
    """
    inverse, goal = np.linalg.inv(warp.matrix), grid_points(shape, affine).reshape(-1, 3)
    points = apply_affine(inverse, goal)
    for _ in range(INVERSION_ROUNDS):
        last, points = points, apply_affine(inverse, goal - warp.residual_at(points))
        if float(np.abs(points - last).max()) < INVERSION_TOLERANCE_MM:
            break
    return Warp(points.reshape(*shape, 3).astype(np.float32), affine, inverse)


def resample_through(
    image: Tensor, affine: np.ndarray, shape: tuple[int, ...], grid_affine: np.ndarray, to_image: Warp
) -> np.ndarray:
    """Read an image where a map sends each voxel of another grid.

    Args:
        image: shape (1, h, w, d).
        affine: its voxel indices to RAS mm.
        shape: size of the other grid.
        grid_affine: its voxel indices to RAS mm.
        to_image: map from the space of the grid to that of the image.

    Returns:
        float32 array of the other grid, 0 beyond the image.
    """
    source, to_index, parts = image[None].float(), np.linalg.inv(affine), []
    turn = torch.from_numpy(to_index[:3, :3].astype(np.float32))
    for first in range(0, shape[0], SLAB):
        size = (min(SLAB, shape[0] - first), *shape[1:])
        residual = sample(to_image.residual, _coordinates(np.linalg.inv(to_image.affine) @ grid_affine, size, first))
        places = _coordinates(to_index @ to_image.matrix @ grid_affine, size, first)
        places += torch.einsum("ij,bjhwd->bihwd", turn, residual)
        parts.append(sample(source, places)[0, 0].numpy())
    return np.concatenate(parts)


def _coordinates(matrix: np.ndarray, size: tuple[int, ...], first: int) -> Tensor:
    """A matrix applied to the indices of a slab that begins at ``first``, shape (1, 3, *size)."""
    axes = np.ogrid[first : first + size[0], : size[1], : size[2]]
    x, y, z = (torch.from_numpy(axis).float() for axis in axes)
    rows = torch.from_numpy(matrix[:3].astype(np.float32))
    return torch.stack([row[0] * x + row[1] * y + row[2] * z + row[3] for row in rows])[None]


@lru_cache(maxsize=1)
def load_template() -> tuple[np.ndarray, np.ndarray]:
    """The MNI152 T1 that nilearn ships, brain only, 1 mm: intensities, shape (H, W, D), and affine to RAS mm."""
    from nilearn.datasets import load_mni152_template  # slow to import

    image: Any = load_mni152_template(resolution=1)
    return np.asarray(image.get_fdata(dtype=np.float32)), np.asarray(image.affine, dtype=np.float64)
