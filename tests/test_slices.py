"""The renderer: sides, proportions and any orientation, on volumes that know where they are."""

from __future__ import annotations

import io

import nibabel as nib
import numpy as np
import pytest
import torch

from brainfm_monai.anatomy import Protocol
from brainfm_monai.slices import (
    Cell,
    compose,
    cut_slices,
    encode,
    find_box,
    heat,
    label_colours,
    outline,
    paint,
    signed,
)
from brainfm_monai.tasks import TASKS, TaskLayout

AFFINE = np.array([[-1.0, 0, 0, 30], [0, -1.0, 0, 35], [0, 0, 5.0, -30], [0, 0, 0, 1]])  # LPS, 5 mm slices
SHAPE = (60, 70, 14)
ALL = {"axial": (0.5,), "coronal": (0.5,), "sagittal": (0.25,)}


def world(shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """RAS mm of every voxel, shape (3, H, W, D)."""
    index = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), axis=-1)
    return np.moveaxis(nib.affines.apply_affine(affine, index), -1, 0).astype(np.float32)


def head() -> np.ndarray:
    mask = np.zeros(SHAPE, dtype=bool)
    mask[14:40, 10:60, 2:12] = True
    return mask


def test_right_anterior_and_superior_have_their_sides_in_a_picture() -> None:
    places = world(SHAPE, AFFINE)
    axial, coronal, sagittal = (
        cut.read(places, AFFINE) for cut in cut_slices(head(), AFFINE, ALL)
    )  # x, y, z of every pixel
    for picture in (axial, coronal):
        assert picture[0, 0, 0] > picture[0, -1, 0] + 50  # right of the patient on the left of the picture
    assert sagittal[0, 0, 1] > sagittal[0, -1, 1] + 60  # anterior on the left
    assert axial[0, 0, 1] > axial[-1, 0, 1] + 60  # anterior above
    for picture in (coronal, sagittal):
        assert picture[0, 0, 2] > picture[-1, 0, 2] + 55  # superior above


def test_the_letters_at_the_edges_name_the_sides() -> None:
    for cut in cut_slices(head(), AFFINE, ALL):
        picture = cut.read(world(SHAPE, AFFINE), AFFINE)
        first, last = picture[0, 0], picture[0, -1]
        axis = int(np.abs(first - last).argmax())
        low, high = ("LR", "PA", "IS")[axis]
        assert cut.plane.marks == (high + low if first[axis] > last[axis] else low + high)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_slices_are_the_same_however_the_voxels_are_stored(order: tuple[int, int, int]) -> None:
    mask = np.ascontiguousarray(head().transpose(order)[::-1])
    matrix = np.eye(4)
    matrix[:3, :3] = np.eye(3)[:, order]
    matrix = matrix @ np.array([[-1, 0, 0, mask.shape[0] - 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    for one, turned in zip(cut_slices(head(), AFFINE, ALL, 8), cut_slices(mask, AFFINE @ matrix, ALL, 8), strict=True):
        np.testing.assert_allclose(turned.points_mm, one.points_mm, atol=1e-9)
        np.testing.assert_array_equal(
            turned.read(mask[None], AFFINE @ matrix, nearest=True), one.read(head()[None], AFFINE, nearest=True)
        )


def test_pixels_are_square_and_a_slice_lies_in_the_middle_of_a_voxel() -> None:
    axial, coronal, _ = cut_slices(head(), AFFINE, ALL, margin_mm=None, pixel_mm=0.5)
    assert axial.points_mm.shape[:2] == (140, 120)
    assert coronal.points_mm.shape[:2] == (140, 120)  # 14 slices of 5 mm
    for cut in (axial, coronal):
        steps = [np.linalg.norm(np.diff(cut.points_mm, axis=axis), axis=-1) for axis in (0, 1)]
        np.testing.assert_allclose(steps[0], 0.5)
        np.testing.assert_allclose(steps[1], 0.5)
    assert (axial.points_mm[0, 0, 2] + 30) / 5 % 1 == 0


def test_slices_are_those_of_the_mask_and_a_stray_voxel_does_not_move_them() -> None:
    mask = head()
    assert find_box(mask) == [(14, 39), (10, 59), (2, 11)]
    mask[1, 1, 0] = True
    assert find_box(mask) == [(14, 39), (10, 59), (2, 11)]
    assert find_box(np.zeros(SHAPE)) == [(0, 59), (0, 69), (0, 13)]


def test_a_volume_of_another_grid_lies_where_it_belongs() -> None:
    coarse = np.array([[0, 2.0, 0, -50], [0, 0, 2.0, -50], [2.0, 0, 0, -50], [0, 0, 0, 1]])  # axes exchanged
    for cut in cut_slices(head(), AFFINE, ALL, margin_mm=5):
        np.testing.assert_allclose(cut.read(world((50, 50, 50), coarse), coarse), cut.points_mm, atol=1e-4)


def test_a_line_is_drawn_where_values_cross_a_level() -> None:
    values = np.tile(np.arange(6.0), (4, 1))
    drawn = outline(np.zeros((4, 6, 3)), values, [2.5], (1, 0, 0))
    assert drawn[..., 0].nonzero()[1].tolist() == [2] * 4
    assert not outline(np.zeros((4, 6, 3)), values, [2.5], (1, 0, 0), values < 1).any()


def test_colours_of_values() -> None:
    values = np.array([[-2.0, -1.0, 0.0, 1.0]])
    np.testing.assert_allclose(signed(values, 1.0)[0], [[0, 0, 1], [0, 0, 1], [1, 1, 1], [1, 0, 0]])
    ramp = heat(np.linspace(0, 1, 50)[None])[0].sum(axis=-1)
    assert (np.diff(ramp) > 0).all()


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.picture])
def test_every_map_with_a_picture_is_painted(name: str) -> None:
    layout = TaskLayout([name])
    task, plane = layout.tasks[name], cut_slices(head(), AFFINE, ALL)[0].plane
    values = np.ones((4, 6, 1 if task.kind == "labels" else task.channels))
    values[:, :3] = 0.1 if name != "segmentation" else 0
    picture = paint(task, values, np.zeros((4, 6, 3)), layout.protocol, plane, (0, 2) if name == "T1w" else None)
    assert picture.shape == (4, 6, 3)
    assert 0 <= picture.min() <= picture.max() <= 1
    assert name in ("distance", "mni") or picture[0, 5].any()
    with pytest.raises(ValueError, match="a task with a picture is needed, found 'age'"):
        paint(TASKS["age"], values, np.zeros((4, 6, 3)), layout.protocol, plane)


def test_tissues_of_the_head_are_faint() -> None:
    protocol = Protocol.load("synthseg_head")
    colours = label_colours(protocol)
    assert colours[0, 3] == 0
    assert colours[protocol.is_head, 3].max() < colours[protocol.is_brain, 3].min()


def test_cells_of_different_size_are_centred_and_text_is_drawn() -> None:
    cells = [Cell(np.ones((20, 30, 3))), Cell(np.ones((10, 20, 3)), "RL", "a\nb")]
    sheet = compose([cells, cells[:1]])
    assert sheet.shape == (2 * 22, 64, 3)
    assert (sheet[1:21, 1:31] == 255).all()
    assert not sheet[22:, 32:].any()  # the second row has one cell
    assert (sheet[6:16, 38:58] == 0).any()  # letters with a black edge
    from PIL import Image

    for kind in ("webp", "png"):
        assert Image.open(io.BytesIO(encode(sheet, kind))).size == (64, 44)


def test_labels_are_not_mixed_and_tensors_are_read() -> None:
    labels = torch.zeros(1, *SHAPE, dtype=torch.uint8)
    labels[:, ::2] = 200
    cut = cut_slices(head(), AFFINE, ALL, pixel_mm=0.3)[0]
    assert set(np.unique(cut.read(labels, AFFINE, nearest=True))) == {0, 200}


def test_pages_escape_what_they_are_given() -> None:
    from brainfm_monai.report import render

    page = render("base.html", title="<script>alert(1)</script>")
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)" in page
