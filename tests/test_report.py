"""The page: sides, proportions and the choice of slices, on a small head made of boxes."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from brainfm_monai.outputs import ScanResult
from brainfm_monai.report import Page, draw_report
from brainfm_monai.report.page import PLANES
from brainfm_monai.tasks import TaskLayout

LAYOUT = TaskLayout(["segmentation", "distance", "log_bias_field", "mni"], "synthseg_head")
SHAPE = (60, 70, 14)
AFFINE = np.array([[-1.0, 0, 0, 30], [0, -1.0, 0, 35], [0, 0, 5.0, -30], [0, 0, 0, 1]])  # LPS, 5 mm slices
LEFT_CORTEX, RIGHT_CORTEX, SKIN = 6, 20, 38
AXIAL, _, SAGITTAL = PLANES


def make_scan(folder: Path, labels: np.ndarray, affine: np.ndarray = AFFINE) -> ScanResult:
    index = np.stack(np.meshgrid(*(np.arange(n) for n in labels.shape), indexing="ij"), axis=-1)
    world = np.moveaxis(index @ affine[:3, :3].T + affine[:3, 3], -1, 0).astype(np.float32)
    image = (labels > 0) * (100 + world[0])  # brighter towards the patient's right
    nib.save(nib.Nifti1Image(image.astype(np.float32), affine), folder / "scan.nii.gz")
    inside = torch.from_numpy(np.where(np.isin(labels, (LEFT_CORTEX, RIGHT_CORTEX)), -1.0, 1.0)).float()
    maps = {
        "pred": torch.from_numpy(labels)[None],
        "distance": inside.expand(4, *labels.shape),
        "bias_field": torch.from_numpy(np.exp(world[:1] / 100)),
        "mni": torch.from_numpy(world),
    }
    return ScanResult("scan", folder / "scan.nii.gz", folder, LAYOUT, maps, affine)


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> ScanResult:
    """A left and a right block of cortex within skin; array axis 0 runs from the patient's right to left."""
    labels = np.zeros(SHAPE, dtype=np.uint8)
    labels[8:52, 8:62, 1:13] = SKIN
    labels[14:30, 14:56, 2:12] = RIGHT_CORTEX
    labels[30:46, 14:56, 2:12] = LEFT_CORTEX
    return make_scan(tmp_path_factory.mktemp("scan"), labels)


@pytest.fixture(scope="module")
def figure(scan: ScanResult) -> Figure:
    return draw_report(scan)


def test_pictures_have_the_patients_right_and_anterior_on_their_left(scan: ScanResult) -> None:
    page = Page.of(scan)
    axial = page.cut(page.labels, AXIAL, index=6)
    columns = [np.argwhere(axial == label)[:, 1].mean() for label in (RIGHT_CORTEX, LEFT_CORTEX)]
    assert columns[0] < columns[1]
    y_mm = page.cut(page.maps["mni"][..., 1], SAGITTAL, index=30)
    assert y_mm[0, 0] > y_mm[0, -1]  # anterior first
    z_mm = page.cut(page.maps["mni"][..., 2], SAGITTAL, index=30)
    assert z_mm[0, 0] < z_mm[-1, 0]  # superior up, as the origin is below


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_the_page_is_the_same_however_the_voxels_are_stored(
    scan: ScanResult, tmp_path: Path, order: tuple[int, int, int]
) -> None:
    labels = np.ascontiguousarray(scan.labels.transpose(order)[::-1])
    matrix = np.eye(4)
    matrix[:3, :3] = np.eye(3)[:, order]
    matrix = matrix @ np.array([[-1, 0, 0, labels.shape[0] - 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    (tmp_path / "turned").mkdir()
    turned, page = Page.of(make_scan(tmp_path / "turned", labels, AFFINE @ matrix)), Page.of(scan)
    np.testing.assert_array_equal(turned.labels, page.labels)
    np.testing.assert_array_equal(turned.image, page.image)
    np.testing.assert_allclose(turned.maps["mni"], page.maps["mni"], atol=1e-4)
    np.testing.assert_allclose(turned.zooms_mm, (1, 1, 5))
    assert turned.box == page.box


def test_thick_slices_are_drawn_in_true_proportions(figure: Figure) -> None:
    panels = [axes for axes in figure.axes if axes.images]
    aspects = {
        name: {axes.get_aspect() for axes in panels if axes.get_label() == name} for name in ("axial", "coronal", "sagittal")
    }
    assert aspects == {"axial": {1.0}, "coronal": {5.0}, "sagittal": {5.0}}
    assert len(panels) == 3 * (5 + 5 + 4)


def texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_sides_and_convention_are_written(figure: Figure) -> None:
    for axes in (a for a in figure.axes if a.images):
        assert texts(axes)[:2] == (["A", "P"] if axes.get_label() == "sagittal" else ["R", "L"])
    written = " ".join(text.get_text() for text in figure.texts)
    assert "Radiological convention: the patient's right (R)" in written
    assert "60 x 70 x 14 voxels of 1.00 x 1.00 x 5.00 mm, stored as LPS" in written
    assert "NO BRAIN" not in written


def test_slices_are_those_of_the_brain_and_a_stray_voxel_does_not_move_them(scan: ScanResult, tmp_path: Path) -> None:
    labels = scan.labels.copy()
    box = Page.of(scan).box
    assert box[2] == (2, 11)
    assert box[1][1] - box[1][0] == 41
    labels[1, 1, 0] = LEFT_CORTEX
    assert Page.of(make_scan(tmp_path, labels)).box == box


def test_the_bias_field_is_shown_relative_to_its_median_in_the_head(scan: ScanResult) -> None:
    page = Page.of(scan)
    assert np.median(page.maps["bias_field"][page.labels > 0]) == pytest.approx(1.0)
    ratio = np.asarray(scan.maps["bias_field"]).max() / np.asarray(scan.maps["bias_field"]).min()
    assert page.maps["bias_field"].max() / page.maps["bias_field"].min() == pytest.approx(ratio, rel=1e-5)  # nothing else changes


def test_the_table_gives_millilitres(figure: Figure) -> None:
    table = next(axes.tables[0] for axes in figure.axes if axes.tables)
    cells = {position: cell.get_text().get_text() for position, cell in table.get_celld().items()}
    assert cells[0, 0] == "cerebral cortex"
    assert cells[1, 0] == cells[2, 0] == f"{16 * 42 * 10 * 5 / 1000:.1f}"
    assert cells[3, 0] == ""


def test_a_scan_without_a_brain_gets_a_page_that_says_so(tmp_path: Path) -> None:
    labels = np.zeros(SHAPE, dtype=np.uint8)
    labels[5:9, 5:9, 5:9] = SKIN
    scan = make_scan(tmp_path, labels)
    scan.source.unlink()
    nib.save(nib.Nifti1Image(np.random.default_rng(0).random(SHAPE).astype(np.float32), AFFINE), scan.source)
    assert any("NO BRAIN WAS FOUND IN THIS SCAN" in text.get_text() for text in draw_report(scan).texts)


def test_tasks_that_are_absent_have_no_column(scan: ScanResult) -> None:
    alone = ScanResult(scan.name, scan.source, scan.folder, scan.layout, {"pred": scan.maps["pred"]}, scan.affine)
    assert len([axes for axes in draw_report(alone).axes if axes.images]) == 3 * (5 + 5)
