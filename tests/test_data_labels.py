"""Label maps from disk onto the grid of a prepared subject."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from nibabel.orientations import axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform

from brainfm_monai.data.labels import crop_to_brain, load_label_map
from brainfm_monai.io import ScanError


def load(path: str | Path) -> Any:
    """An image with the attributes that nibabel's declared type lacks."""
    return nib.load(path)


def make_ids() -> np.ndarray:
    """A small map without any symmetry: left white matter, right cortex in front, cerebellum below."""
    ids = np.zeros((20, 24, 28), dtype=np.int32)
    ids[3:8, 5:20, 10:25] = 2
    ids[12:18, 12:20, 12:20] = 42
    ids[5:9, 3:6, 2:5] = 8
    return ids


def make_affine(spacing: float = 1.0) -> np.ndarray:
    affine = np.diag([spacing, spacing, spacing, 1.0])
    affine[:3, 3] = (-9.5, -11.0, 4.0)
    return affine


def save_turned(path: Path, axes: str, affine: np.ndarray) -> None:
    """Save the RAS map with other array axes and the affine that goes with them."""
    turn = ornt_transform(axcodes2ornt("RAS"), axcodes2ornt(axes))
    image = nib.Nifti1Image(make_ids().astype(np.uint8), affine).as_reoriented(turn)
    nib.save(image, path)


@pytest.mark.parametrize("axes", ["RAS", "LIA", "PSR", "LPS"])
def test_axes_of_the_file_do_not_matter(tmp_path: Path, axes: str) -> None:
    save_turned(tmp_path / "map.nii.gz", axes, make_affine())
    ids, affine = load_label_map(tmp_path / "map.nii.gz")
    np.testing.assert_array_equal(ids, make_ids())
    np.testing.assert_allclose(affine, make_affine(), atol=1e-6)
    assert ids.dtype == np.int32


def test_oblique_grid_keeps_its_angle(tmp_path: Path) -> None:
    angle = np.deg2rad(10)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    oblique = turn @ make_affine()
    nib.save(nib.Nifti1Image(make_ids().astype(np.int16), oblique), tmp_path / "map.nii")
    ids, affine = load_label_map(tmp_path / "map.nii")
    np.testing.assert_array_equal(ids, make_ids())
    np.testing.assert_allclose(affine, oblique, atol=1e-5)


def test_mgh_and_a_single_fourth_dimension(tmp_path: Path) -> None:
    nib.save(nib.MGHImage(make_ids(), make_affine()), tmp_path / "map.mgz")
    nib.save(nib.Nifti1Image(make_ids()[..., None], make_affine()), tmp_path / "map.nii.gz")
    for name in ("map.mgz", "map.nii.gz"):
        ids, affine = load_label_map(tmp_path / name)
        np.testing.assert_array_equal(ids, make_ids())
        np.testing.assert_allclose(affine, make_affine(), atol=1e-5)


def test_large_voxels_become_1_mm_and_stay_in_place(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(make_ids().astype(np.int16), make_affine(2.0)), tmp_path / "map.nii.gz")
    ids, affine = load_label_map(tmp_path / "map.nii.gz")
    np.testing.assert_allclose(affine[:3, :3], np.eye(3), atol=1e-6)
    assert set(np.unique(ids)) == {0, 2, 8, 42}
    for label in (2, 8, 42):
        before = np.argwhere(make_ids() == label).mean(axis=0) * 2 + make_affine(2.0)[:3, 3]
        after = np.argwhere(ids == label).mean(axis=0) + affine[:3, 3]
        np.testing.assert_allclose(after, before, atol=1e-6)
        assert (ids == label).sum() == 8 * (make_ids() == label).sum()


def save_bad(path: Path, kind: str) -> None:
    if kind == "text":
        path.write_text("not an image\n", encoding="utf-8")
    elif kind == "truncated":
        whole = gzip.compress(
            nib.Nifti1Image(
                np.random.default_rng(0).integers(0, 99, (20, 20, 20), dtype=np.uint8), np.eye(4)
            ).to_bytes()
        )
        path.write_bytes(whole[: len(whole) // 2])
    else:
        values = {
            "4-D": np.zeros((4, 4, 4, 3), np.uint8),
            "2-D": np.zeros((4, 4), np.uint8),
            "fractions": np.full((4, 4, 4), 1.5, np.float32),
            "negative": np.full((4, 4, 4), -1, np.int16),
            "nan": np.full((4, 4, 4), np.nan, np.float32),
        }[kind]
        nib.save(nib.Nifti1Image(values, np.eye(4)), path)


@pytest.mark.parametrize(
    ("kind", "rule"),
    [
        ("text", "a NIfTI header is needed"),
        ("truncated", "the voxels cannot be read, found"),
        ("4-D", r"one 3-D volume is needed, found 4-D data of shape \(4, 4, 4, 3\)"),
        ("2-D", "a 3-D volume of at least 2 voxels along each axis is needed"),
        ("fractions", "ids must be whole numbers from 0 to 2147483647, found values up to 0.5 off one"),
        ("negative", "negative, larger or not finite"),
        ("nan", "negative, larger or not finite"),
    ],
)
def test_bad_files_are_named_in_one_line(tmp_path: Path, kind: str, rule: str) -> None:
    path = tmp_path / "bad.nii.gz"
    if kind == "text":
        path = tmp_path / "bad.nii"
    save_bad(path, kind)
    with pytest.raises(ValueError, match=rule) as caught:
        load_label_map(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ScanError, match=r"none\.nii\.gz: .* found no such file"):
        load_label_map(tmp_path / "none.nii.gz")


def test_a_map_without_a_brain_has_no_box() -> None:
    with pytest.raises(ValueError, match=r"x\.nii: cerebrum or cerebellum labels are needed"):
        crop_to_brain(np.full((8, 8, 8), 511, dtype=np.int32), make_affine(), (8, 8, 8), "x.nii")


@pytest.mark.parametrize("size", [(8, 8, 8), (32, 16, 48), (9, 31, 12)])
def test_box_keeps_every_voxel_at_its_place_in_the_world(size: tuple[int, int, int]) -> None:
    ids, affine = make_ids(), make_affine()
    box, moved = crop_to_brain(ids, affine, size)
    assert box.shape == size
    index = np.argwhere(np.ones(size, dtype=bool))
    world = index @ moved[:3, :3].T + moved[:3, 3]
    source = np.rint((world - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T).astype(int)
    inside = ((source >= 0) & (source < ids.shape)).all(axis=1)
    expected = np.zeros(len(index), dtype=ids.dtype)
    expected[inside] = ids[tuple(source[inside].T)]
    np.testing.assert_array_equal(box.ravel(), expected)
    centre = (np.array(size) - 1) / 2 + moved[:3, 3] - affine[:3, 3]
    assert np.abs(centre - (10.0, 11.0, 13.0)).max() <= 0.5  # of the bounding box of all three structures


def test_the_turned_files_of_these_tests_are_turned(tmp_path: Path) -> None:
    save_turned(tmp_path / "map.nii.gz", "PSR", make_affine())
    image = load(tmp_path / "map.nii.gz")
    assert nib.aff2axcodes(image.affine) == ("P", "S", "R")
    turn = io_orientation(image.affine)
    np.testing.assert_allclose(image.affine @ inv_ornt_aff(turn, image.shape), make_affine(), atol=1e-6)
