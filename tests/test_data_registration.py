"""MNI coordinates by registration, on a head whose coordinates are known: the template's own tissue, moved and turned."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from nilearn.datasets import load_mni152_gm_template, load_mni152_wm_template

from brainfm_monai.anatomy import Protocol
from brainfm_monai.data.registration import (
    LOOK_OF_ID,
    coarsen_affine,
    compute_jacobian,
    compute_mni_coordinates,
    load_template,
    render_subject,
    unfold_coordinates,
)

SIZE = (56, 64, 52)
SPACING = 4.0
SHEAR = np.array([[1.0, 0.06, 0, 3], [0, 0.95, 0.04, -4], [-0.03, 0, 1.04, 2], [0, 0, 0, 1]])
# Few iterations: the moved template needs no fine deformation.
QUICK = ((2, 4, 10),)


def make_motion() -> np.ndarray:
    """From MNI mm to the mm of the moved head: 8 degrees about the vertical axis, 6 % larger, shifted most to the right."""
    angle = np.deg2rad(8)
    motion = np.eye(4)
    motion[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    motion[:3, :3] *= 1.06
    motion[:3, 3] = (11, -6, 8)
    return motion


def make_grid() -> np.ndarray:
    """An oblique grid (turned by 6 degrees about the left-right axis) around the head."""
    angle = np.deg2rad(6)
    grid = np.diag([SPACING, SPACING, SPACING, 1.0])
    grid[1:3, 1:3] = SPACING * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    grid[:3, 3] = np.array([11, -24, 16]) - grid[:3, :3] @ (np.array(SIZE) / 2)
    return grid


@cache
def make_head() -> tuple[np.ndarray, np.ndarray]:
    """Ids of the moved head and the true MNI coordinate of each voxel."""
    index = np.stack(np.meshgrid(*(np.arange(n) for n in SIZE), indexing="ij"), axis=-1)
    to_mni = np.linalg.inv(make_motion()) @ make_grid()
    truth = index @ to_mni[:3, :3].T + to_mni[:3, 3]
    white, grey = load_mni152_wm_template(resolution=1), load_mni152_gm_template(resolution=1)
    voxel = np.rint((truth - white.affine[:3, 3]) @ np.linalg.inv(white.affine[:3, :3]).T).astype(int)
    inside = ((voxel >= 0) & (voxel < white.shape)).all(axis=-1)
    voxel = tuple(np.moveaxis(np.where(inside[..., None], voxel, 0), -1, 0))
    ids = np.where(white.get_fdata()[voxel] > 0.5, 2, np.where(grey.get_fdata()[voxel] > 0.4, 3, 0)) * inside
    ids[(ids > 0) & (truth[..., 0] > 0)] += 39
    return ids.astype(np.int32), truth


@cache
def register_head() -> tuple[np.ndarray, np.ndarray]:
    return compute_mni_coordinates(make_head()[0], make_grid(), factor=2, levels=QUICK)


def test_known_motion_is_found_back() -> None:
    coordinates, affine = register_head()
    ids, truth = make_head()
    assert coordinates.shape == (*(n // 2 for n in SIZE), 3)
    np.testing.assert_allclose(affine, coarsen_affine(make_grid(), 2))
    blocks = truth.reshape(28, 2, 32, 2, 26, 2, 3).mean(axis=(1, 3, 5))
    error = np.linalg.norm(coordinates - blocks, axis=-1)[ids[::2, ::2, ::2] > 0]
    assert np.median(error) < 2.0  # mm; the voxels of the head are 4 mm, of the registration 8 mm
    assert np.quantile(error, 0.95) < 4.0


def test_the_map_does_not_fold_and_goes_on_beyond_the_brain() -> None:
    coordinates, affine = register_head()
    jacobian = compute_jacobian(coordinates, affine)
    assert jacobian.min() > 0.2
    assert jacobian.mean() == pytest.approx(1.06**-3, rel=0.05)
    corner = coordinates[0, 0, 0] - make_head()[1][:2, :2, :2].mean(axis=(0, 1, 2))
    assert np.linalg.norm(corner) < 25


def test_registration_repeats_itself_and_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    again, _ = compute_mni_coordinates(make_head()[0], make_grid(), factor=2, levels=QUICK)
    np.testing.assert_array_equal(again, register_head()[0])
    assert not list(tmp_path.iterdir())


def test_a_rough_start_from_another_place_is_used() -> None:
    ids, truth = make_head()
    away = make_grid()
    away[:3, 3] += (150, -90, 60)  # as a scanner that is not centred on the head would have it
    back = np.eye(4)
    back[:3, 3] = (-150, 90, -60)
    coordinates, _ = compute_mni_coordinates(
        ids, away, factor=2, levels=QUICK, initial=SHEAR @ np.linalg.inv(make_motion()) @ back
    )
    blocks = truth.reshape(28, 2, 32, 2, 26, 2, 3).mean(axis=(1, 3, 5))
    error = np.linalg.norm(coordinates - blocks, axis=-1)[ids[::2, ::2, ::2] > 0]
    assert np.median(error) < 2.0


def test_the_flow_brings_tissues_closer_than_the_affine_map() -> None:
    """White matter stretched along one axis in one half, which no affine map can follow."""
    ids, _ = make_head()
    bent = ids.copy()
    bent[:, 32:] = ids[:, 32 + np.rint(np.arange(32) * 0.65).astype(int)]
    (_, *template), affine = load_template()
    dice = []
    for levels in (((2, 4, 0),), ((2, 4, 40),)):
        coordinates, _ = compute_mni_coordinates(bent, make_grid(), factor=2, levels=levels)
        voxel = np.rint((coordinates - affine[:3, 3]) / np.diag(affine)[:3]).astype(int)
        inside = ((voxel >= 0) & (voxel < template[0].shape)).all(axis=-1)
        white = template[0][tuple(np.moveaxis(np.where(inside[..., None], voxel, 0), -1, 0))] > 0.5
        truth = np.isin(bent[::2, ::2, ::2], (2, 41))
        dice.append(2 * (white & truth).sum() / (white.sum() + truth.sum()))
    assert dice[1] > dice[0] + 0.05


def test_tissues_of_the_two_sides_are_alike() -> None:
    structures = Protocol.load("synthseg_generation").structures
    for s in structures:
        other = structures[s.mirror].freesurfer_id
        assert LOOK_OF_ID.get(s.freesurfer_id) == LOOK_OF_ID.get(other), s.name
    shares = render_subject(np.array([[[0, 2, 3, 4, 10, 515]]]))[1:]
    np.testing.assert_allclose(shares[:, 0, 0].T, [(0, 0), (1, 0), (0, 1), (0, 0), (0.35, 0.65), (0, 0)])
    assert max(white + grey for _, white, grey in LOOK_OF_ID.values()) <= 1


def test_sizes_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match=r"multiples of 2 and 4, found \(10, 8, 8\)"):
        compute_mni_coordinates(np.zeros((10, 8, 8), dtype=np.int32), np.eye(4))


def test_rendering_has_the_contrast_of_a_t1_and_no_skull() -> None:
    ids = np.zeros((24, 12, 12), dtype=np.int32)
    ids[2:] = 515
    ids[6:18] = 24
    ids[8:12], ids[12:14] = 2, 3
    picture = render_subject(ids)[0, :, 6, 6]
    assert picture[9] > picture[13] > picture[14] > 0
    assert (picture[:4] == 0).all()  # bone
    assert (picture[18:] == 0).all()
    assert picture[15] > 0  # fluid at the rim of the brain stays
    assert picture[16] == 0  # fluid far from it goes


def test_every_brain_structure_of_the_shipped_protocol_is_rendered() -> None:
    structures = Protocol.load("synthseg_generation").structures
    brain = {s.freesurfer_id for s in structures if 0 < s.freesurfer_id < 500}
    assert brain == brain & set(LOOK_OF_ID)
    for s in structures:
        if s.freesurfer_id in brain:
            assert LOOK_OF_ID[s.freesurfer_id][0] == LOOK_OF_ID[structures[s.mirror].freesurfer_id][0], s.name


def test_template_is_brain_only_and_in_mni_space() -> None:
    (picture, *_), affine = load_template()
    assert picture[0].max() == picture[:, 0].max() == 0
    thalamus = np.rint(np.linalg.inv(affine) @ (10, -18, 8, 1)).astype(int)[:3]
    assert 80 < picture[tuple(thalamus)] < 110
    inside = np.argwhere(picture > 0) @ affine[:3, :3].T + affine[:3, 3]
    assert abs(inside[:, 0].mean()) < 2


def test_coarse_grid_covers_the_same_box() -> None:
    fine = make_grid()
    coarse = coarsen_affine(fine, 4)
    for corner in ((0, 0, 0), (1, 0, 1)):
        outer_fine = fine @ (*(c * n - 0.5 for c, n in zip(corner, SIZE, strict=True)), 1)
        outer_coarse = coarse @ (*(c * n / 4 - 0.5 for c, n in zip(corner, SIZE, strict=True)), 1)
        np.testing.assert_allclose(outer_fine, outer_coarse, atol=1e-9)


def make_fold() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions and a displacement that folds along x in one place."""
    affine = np.diag([4.0, 4.0, 4.0, 1.0])
    points = 4.0 * np.stack(np.meshgrid(*(np.arange(24.0),) * 3, indexing="ij"), axis=-1)
    displacement = np.zeros_like(points)
    displacement[10, 10:14, 10:14, 0] = 9.0
    return points, displacement, affine


def test_jacobian_of_an_affine_map() -> None:
    points, _, affine = make_fold()
    matrix = np.array([[1.2, 0.1, 0.0], [0.0, 0.9, 0.2], [0.1, 0.0, 1.1]])
    np.testing.assert_allclose(compute_jacobian(points @ matrix.T, affine), np.linalg.det(matrix), rtol=1e-9)
    np.testing.assert_allclose(compute_jacobian(points * (-1, 1, 1), affine), -1, rtol=1e-9)


def test_folds_are_smoothed_where_they_are() -> None:
    points, displacement, affine = make_fold()
    assert compute_jacobian(points + displacement, affine).min() < 0
    unfolded = unfold_coordinates(points, displacement, affine)
    assert compute_jacobian(unfolded, affine).min() >= 0.2
    np.testing.assert_array_equal(unfolded[18:], points[18:])
    smooth = 0.5 * np.sin(points / 10)
    np.testing.assert_array_equal(unfold_coordinates(points, smooth, affine), points + smooth)


def test_a_mirrored_map_cannot_be_smoothed_away() -> None:
    points, _, affine = make_fold()
    with pytest.raises(RuntimeError, match=r"Jacobian below 0\.2 at 13824 voxels"):
        unfold_coordinates(points * (-1, 1, 1), np.zeros_like(points), affine)
