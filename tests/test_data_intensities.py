"""Scans on the box of a subject: geometry, scaling, the head, classes outside the brain, and generation labels."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.affines import apply_affine

from brainfm_monai.data.contrasts import (
    cluster_extracerebral,
    find_head,
    read_scan,
    scale_contrast,
    white_matter_level,
)
from brainfm_monai.data.labels import make_generation_labels
from brainfm_monai.data.registration import resample_to_box
from brainfm_monai.io import ScanError
from brainfm_monai.tasks import TASKS

SIZE = (48, 44, 40)


def ball(centre: tuple[float, float, float], radius: float) -> np.ndarray:
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in SIZE), indexing="ij"), axis=-1)
    return np.asarray(np.linalg.norm(grid - np.array(centre), axis=-1) < radius)


def make_scan() -> np.ndarray:
    """A head of bright scalp, dark skull with holes of air, and brain, in noise."""
    noise = np.abs(np.random.default_rng(3).normal(0, 4, SIZE))
    scan = np.where(ball((24, 22, 20), 18), 300.0, 0.0)
    scan[ball((24, 22, 20), 14)] = 12
    scan[ball((24, 22, 20), 12)] = 180
    return (scan + noise).astype(np.float32)


def test_a_scan_of_any_axes_lands_where_its_affine_says() -> None:
    """A ramp that tells the place of each voxel is stored back to front, left to right exchanged, oblique and fine."""
    angle = np.deg2rad(20)
    affine = np.eye(4)
    turn = np.array([[np.cos(angle), 0, np.sin(angle)], [0, 1, 0], [-np.sin(angle), 0, np.cos(angle)]])
    affine[:3, :3] = turn @ np.array([[0, -0.5, 0], [0, 0, -3], [0.7, 0, 0]])
    affine[:3, 3] = (10, 40, -30)
    index = np.stack(np.meshgrid(*(np.arange(n) for n in (100, 120, 40)), indexing="ij"), axis=-1)
    world = apply_affine(affine, index)
    slope = np.array([1.0, 2.0, -0.5])
    box = np.eye(4)
    box[:3, 3] = (-20, -30, -20)
    found = resample_to_box((world @ slope + 500).astype(np.float32), affine, box, (24, 20, 16))
    places = apply_affine(box, np.stack(np.meshgrid(*(np.arange(n) for n in (24, 20, 16)), indexing="ij"), axis=-1))
    inside = apply_affine(np.linalg.inv(affine), places)
    inner = ((inside > 4) & (inside < (95, 115, 35))).all(
        axis=-1
    )  # away from the scan's edge, which the smoothing sees
    assert inner.sum() > 2000
    np.testing.assert_allclose(found[inner], (places @ slope + 500)[inner], atol=0.05)


def test_a_fine_scan_is_smoothed_and_a_coarse_one_is_not() -> None:
    fine = np.random.default_rng(0).normal(0, 1, (80, 80, 80)).astype(np.float32)
    box = np.eye(4)
    box[:3, 3] = 6
    half = resample_to_box(fine, np.diag([0.5, 0.5, 0.5, 1]), box, (24, 24, 24))
    assert half.std() < 0.45  # eight voxels of noise in one
    same = resample_to_box(fine, np.eye(4), box, (24, 24, 24))
    np.testing.assert_allclose(same, fine[6:30, 6:30, 6:30], atol=1e-5)
    assert (resample_to_box(fine, np.eye(4), box, (100, 24, 24), outside=-1000)[90:] == -1000).all()


def test_the_head_has_no_holes_and_no_air() -> None:
    head = find_head(make_scan())
    truth = ball((24, 22, 20), 18)
    assert 2 * (head & truth).sum() / (head.sum() + truth.sum()) > 0.97
    assert head[ball((24, 22, 20), 13)].all()
    assert not find_head(np.zeros(SIZE, dtype=np.float32)).any()
    assert not find_head(np.full(SIZE, 7.0, dtype=np.float32)).any()


def test_scaling_is_robust_and_keeps_the_order() -> None:
    scan = make_scan()
    scan[24, 22, 20] = 1e5  # a vessel
    scaled = scale_contrast(scan * 3 + 100, "T1w")
    assert (scaled.min(), scaled.max()) == (0, 1)
    inner = ball((24, 22, 20), 10)
    np.testing.assert_allclose(scaled[inner].mean(), scale_contrast(scan, "T1w")[inner].mean(), atol=0.01)
    assert 0.5 < scaled[ball((24, 22, 20), 10)].mean() < 0.7
    assert (scale_contrast(np.zeros(SIZE, dtype=np.float32), "T1w") == 0).all()


def test_white_matter_decides_the_scale_whatever_lies_around_the_brain() -> None:
    scan = make_scan()
    ids = np.where(ball((24, 22, 20), 11), 2, 0)
    ids[ball((24, 22, 20), 8)] = 41
    level = white_matter_level("T1w")
    bright = np.where(ball((24, 22, 20), 18) & ~ball((24, 22, 20), 14), 3 * scan, scan)  # a scalp three times as bright
    for values in (scan, bright, np.where(ball((24, 22, 20), 12), scan, 0), scan * 7 + 100):
        scaled = scale_contrast(values, "T1w", ids)
        np.testing.assert_allclose(np.median(scaled[ids > 0]), level, atol=0.01)
        assert scaled.min() == 0
        assert scaled.max() <= 1
    for name in ("T1w", "T2w", "FLAIR"):  # what files and sidecars say of the unit
        assert TASKS[name].output_unit.endswith(f"white matter at {white_matter_level(name):.2f}")
    # the tables of contrasts: white matter is the brightest tissue of the brain in T1w and the darkest in T2w
    assert 1 > level > white_matter_level("FLAIR") > white_matter_level("T2w") > 0


def test_classes_outside_the_brain_are_ordered_and_repeat() -> None:
    scan = make_scan()
    scan[ball((24, 36, 20), 4)] = 120
    brain = ball((24, 22, 20), 12)
    classes = cluster_extracerebral(scan, brain)
    assert set(np.unique(classes)) == {0, 1, 2, 3, 4, 5}
    assert (classes[brain] == 0).all()
    assert (classes[~find_head(scan)] == 0).all()
    means = [scan[classes == number].mean() for number in range(1, 6)]
    assert means == sorted(means)
    np.testing.assert_array_equal(classes, cluster_extracerebral(scan, brain))
    assert not cluster_extracerebral(np.where(brain, scan, 0), brain).any()


def test_generation_labels_without_surfaces_and_with_a_head() -> None:
    ids = np.array([[[0, 2, 42, 77, 78, 24, 10]]])
    clusters = np.array([[[3, 1, 1, 1, 1, 1, 1]]], dtype=np.uint8)
    labels, protocol = make_generation_labels(ids, None, clusters)
    assert protocol == "brainfm_generation"
    np.testing.assert_array_equal(labels[0, 0], [253, 2, 42, 77, 77, 24, 10])
    labels, protocol = make_generation_labels(np.array([[[2, 511]]]))
    assert protocol == "synthseg_generation"
    with pytest.raises(ValueError, match=r"FreeSurfer ids below 100 are needed, found \[136\]"):
        make_generation_labels(np.array([[[2, 136]]]))


def test_mixtures_follow_the_distance() -> None:
    ids = np.full((1, 1, 6), 2)
    ids[..., 2:4], ids[..., 4:] = 3, 24
    distance = np.full((1, 1, 6, 4), 7.0)
    distance[0, 0, :, 1] = np.array([-2.3, -0.3, 0.2, 1.7, 2.7, 3.7])  # left white
    distance[0, 0, :, 0] = np.array([-4.1, -2.1, -1.6, -0.1, 0.9, 1.9])  # left pial
    labels, _ = make_generation_labels(ids, distance)
    np.testing.assert_array_equal(labels[0, 0], [2, 150 + 10, 150 + 35, 200 + 20, 24, 24])
    distance[0, 0, 2, :2] = (-0.3, -0.2)  # thin cortex, both surfaces in one voxel: the white one counts
    assert make_generation_labels(ids, distance)[0][0, 0, 2] == 150 + 15


def test_unreadable_scans_are_named(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(np.zeros((8, 8, 8, 3), dtype=np.float32), np.eye(4)), tmp_path / "four.nii")
    with pytest.raises(ScanError, match=r"four\.nii: one 3-D volume is needed, found 4-D data"):
        read_scan(tmp_path / "four.nii")
    values = np.ones((16, 16, 16), dtype=np.float32)
    values[0, 0, 0] = np.nan
    nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / "nan.nii")
    assert read_scan(tmp_path / "nan.nii")[0][0, 0, 0] == 0


def test_a_view_of_turned_axes_is_resampled() -> None:
    values = np.random.default_rng(3).random((6, 5, 4), dtype=np.float32)
    turned = values[::-1, :, ::-1]
    moved = resample_to_box(turned, np.eye(4), np.eye(4), (6, 5, 4))
    np.testing.assert_allclose(moved, turned, atol=1e-5)


def test_a_reference_may_be_an_nrrd_file(tmp_path: Path) -> None:
    values = np.arange(6 * 7 * 8, dtype=np.int16).reshape(6, 7, 8)
    head = "NRRD0004\ntype: short\ndimension: 3\nspace: left-posterior-superior\nsizes: 6 7 8\n"
    head += "space directions: (-2,0,0) (0,-2,0) (0,0,3)\nspace origin: (5,6,7)\nencoding: raw\nendian: little\n\n"
    (tmp_path / "scan.nrrd").write_bytes(head.encode() + values.tobytes(order="F"))
    found, affine = read_scan(tmp_path / "scan.nrrd")
    np.testing.assert_array_equal(found, values)
    np.testing.assert_array_equal(affine, [[2, 0, 0, -5], [0, 2, 0, -6], [0, 0, 3, 7], [0, 0, 0, 1]])
