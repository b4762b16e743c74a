"""Linear registration: known motions are found back, with the sides where they were."""

from __future__ import annotations

import numpy as np
import pytest
from nibabel.affines import from_matvec
from scipy.ndimage import gaussian_filter

from brainfm_monai.data.registration import AFFINE, RIGID, register_linear, resample_to_box

SIZE = (48, 44, 40)
QUICK = {"NumberOfSpatialSamples": ["2000"], "MaximumNumberOfIterations": ["150"]}


def make_scan() -> tuple[np.ndarray, np.ndarray]:
    """A head-like body without any symmetry, in voxels of 3 mm."""
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in SIZE), indexing="ij"), axis=-1)
    values = np.zeros(SIZE, dtype=np.float32)
    for centre, radii, value in (
        ((24, 22, 20), (15, 17, 13), 50),
        ((19, 25, 22), (7, 5, 6), 90),
        ((31, 16, 17), (4, 6, 3), 20),
    ):
        values[(((grid - centre) / radii) ** 2).sum(axis=-1) < 1] = value
    values = gaussian_filter(values, 0.7)
    affine = np.diag([3.0, 3.0, 3.0, 1.0])
    affine[:3, 3] = (-70, -66, -60)
    return values, affine


def make_motion(angles_deg: tuple[float, float, float], shift_mm: tuple[float, float, float]) -> np.ndarray:
    """Rotation about z, y and x in turn, then a shift."""
    matrix = np.eye(3)
    for axis, angle in zip((2, 1, 0), np.deg2rad(angles_deg), strict=True):
        i, j = [a for a in range(3) if a != axis]
        turn = np.eye(3)
        turn[i, i] = turn[j, j] = np.cos(angle)
        turn[i, j], turn[j, i] = -np.sin(angle), np.sin(angle)
        matrix = matrix @ turn
    return from_matvec(matrix, shift_mm)


@pytest.mark.parametrize(("angles", "shift"), [((9, -6, 4), (8, -5, 6)), ((-5, 8, -10), (-6, 9, 3))])
def test_rigid_motion_of_another_contrast_is_found(angles: tuple[float, ...], shift: tuple[float, ...]) -> None:
    values, affine = make_scan()
    motion = make_motion(angles, shift)  # type: ignore[arg-type]
    # the other scan: contrast turned around, axes stored left-anterior-superior, finer voxels
    grid = np.diag([-2.0, 2.5, 3.0, 1.0])
    grid[:3, 3] = (80, -70, -66)
    inverted = np.where(values > 0, 110 - values, 0)
    moving = resample_to_box(inverted, motion @ affine, grid, (84, 60, 48))
    found = register_linear((values, affine), (moving, grid), RIGID | QUICK, from_headers=True)
    places = np.argwhere(values > 0) @ affine[:3, :3].T + affine[:3, 3]
    error = np.linalg.norm((places @ (found - motion)[:3, :3].T) + (found - motion)[:3, 3], axis=1)
    assert error.mean() < 1.0  # mm, a third of a voxel
    assert np.linalg.det(found[:3, :3]) == pytest.approx(1, abs=1e-6)


def test_affine_map_and_a_start_from_the_centres() -> None:
    values, affine = make_scan()
    motion = make_motion((4, 0, -5), (140, 60, -90)) @ np.diag([1.1, 0.95, 1.05, 1])
    found = register_linear((values, affine), (values, motion @ affine), AFFINE)
    places = np.argwhere(values > 0) @ affine[:3, :3].T + affine[:3, 3]
    error = np.linalg.norm((places @ (found - motion)[:3, :3].T) + (found - motion)[:3, 3], axis=1)
    assert error.mean() < 1.0


def test_a_tilted_gantry_is_straightened() -> None:
    values, affine = make_scan()
    tilted = affine @ np.array([[1, 0, 0, 0], [0, 1, 0.3, -6], [0, 0, 1, 0], [0, 0, 0, 1.0]])
    moving = resample_to_box(values, affine, tilted, SIZE)
    found = register_linear((values, affine), (moving, tilted), RIGID | QUICK, from_headers=True)
    places = np.argwhere(values > 0) @ affine[:3, :3].T + affine[:3, 3]
    assert np.linalg.norm(places @ found[:3, :3].T + found[:3, 3] - places, axis=1).mean() < 0.7


def test_an_empty_scan_fails_in_one_line() -> None:
    values, affine = make_scan()
    with pytest.raises(RuntimeError, match=r"^registration: elastix gave up: [^\n]*$"):
        register_linear((values, affine), (np.zeros_like(values), affine), AFFINE | QUICK)
