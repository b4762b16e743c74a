"""The page: sides, proportions, the choice of slices and what it says, on a small head made of boxes; and in a browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from monai.data import MetaTensor

from brainfm_monai.outputs import ScanResult, warps
from brainfm_monai.report import Page, view, write_report, write_view
from brainfm_monai.report import page as page_module
from brainfm_monai.report.document import compose_document, volume_rows
from brainfm_monai.report.figures import SLICES, draw_panels, draw_segmentation, sections
from brainfm_monai.report.page import PLANES
from brainfm_monai.tasks import TaskLayout

LAYOUT = TaskLayout(["segmentation", "distance", "log_bias_field", "mni"], "synthseg_head")
SHAPE = (60, 70, 14)
AFFINE = np.array([[-1.0, 0, 0, 30], [0, -1.0, 0, 35], [0, 0, 5.0, -30], [0, 0, 0, 1]])  # LPS, 5 mm slices
LEFT_CORTEX, RIGHT_CORTEX, SKIN = 6, 20, 38
AXIAL, _, SAGITTAL = PLANES


@pytest.fixture(scope="module", autouse=True)
def small_template() -> Iterator[None]:
    """A template of 4 mm instead of 1 mm."""
    template = (
        np.ones((20, 24, 20), dtype=np.float32),
        np.array([[4.0, 0, 0, -40], [0, 4, 0, -48], [0, 0, 4, -40], [0, 0, 0, 1]]),
    )
    with pytest.MonkeyPatch.context() as patch:
        for module in (page_module, warps):
            patch.setattr(module, "load_template", lambda: template)
        yield


def make_scan(folder: Path, labels: np.ndarray, affine: np.ndarray = AFFINE, maps_wanted: bool = True) -> ScanResult:
    index = np.stack(np.meshgrid(*(np.arange(n) for n in labels.shape), indexing="ij"), axis=-1)
    world = np.moveaxis(index @ affine[:3, :3].T + affine[:3, 3], -1, 0).astype(np.float32)
    image = (labels > 0) * (100 + world[0])  # brighter towards the patient's right
    nib.save(nib.Nifti1Image(image.astype(np.float32), affine), folder / "scan.nii.gz")
    inside = np.where(np.isin(labels, (LEFT_CORTEX, RIGHT_CORTEX)), -1.0, 1.0).astype(np.float32)
    maps = {
        "segmentation": labels[None],
        "distance": np.broadcast_to(inside, (4, *labels.shape)).copy(),
        "bias_field": np.exp(world[:1] / 100),
        "mni": world,
        "entropy": np.zeros((1, *labels.shape), np.float32),
    }
    kept = maps if maps_wanted else {"segmentation": maps["segmentation"]}
    tensors = {
        name: MetaTensor(torch.from_numpy(value), affine=torch.from_numpy(affine)) for name, value in kept.items()
    }
    return ScanResult("scan", folder / "scan.nii.gz", folder, LAYOUT, labels, affine, tensors)


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> ScanResult:
    """A left and a right block of cortex within skin; array axis 0 runs from the patient's right to left."""
    labels = np.zeros(SHAPE, dtype=np.uint8)
    labels[8:52, 8:62, 1:13] = SKIN
    labels[14:30, 14:56, 2:12] = RIGHT_CORTEX
    labels[30:46, 14:56, 2:12] = LEFT_CORTEX
    return make_scan(tmp_path_factory.mktemp("scan"), labels)


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


def test_thick_slices_are_drawn_in_true_proportions(scan: ScanResult) -> None:
    page = Page.of(scan)
    figures = [draw_segmentation(page), *(draw_panels(page, panels) for _, panels in sections(page))]
    panels = [axes for figure in figures for axes in figure.axes]
    aspects = {
        name: {axes.get_aspect() for axes in panels if axes.get_label() == name}
        for name in ("axial", "coronal", "sagittal")
    }
    assert aspects == {"axial": {1.0}, "coronal": {5.0}, "sagittal": {5.0}}
    assert len(figures[0].axes) == 2 * 3 * len(SLICES)


def texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def test_sides_are_marked(scan: ScanResult) -> None:
    for axes in draw_segmentation(Page.of(scan)).axes:
        assert texts(axes)[:2] == (["A", "P"] if axes.get_label() == "sagittal" else ["R", "L"])


def test_the_document_says_what_it_shows(scan: ScanResult) -> None:
    written = compose_document(scan)
    assert "the patient&#x27;s right (R) is on the left of a picture" in written
    assert "60 x 70 x 14 voxels of 1.00 x 1.00 x 5.00 mm, stored as LPS" in written
    headings = re.findall("<h2>(.*?)</h2>", written)
    expected = [
        "Scan and segmentation",
        "Cortex",
        "Bias field",
        "Way to the template",
        "Certainty",
        "Volumes, mL",
        "What was used",
    ]
    assert headings == expected
    assert len(re.findall(r'<img alt="[^"]+" src="data:image/webp;base64,', written)) == 5
    assert not re.findall(r'(?:src|href)="(?!data:)', written)  # one file, nothing from elsewhere
    assert "No rule of quality found anything" in written


def test_warnings_come_first_and_are_escaped(scan: ScanResult, tmp_path: Path) -> None:
    warned = make_scan(tmp_path, scan.labels, maps_wanted=False)
    warned.warnings.append("left < right & more")
    written = compose_document(warned)
    assert "Look at this first" in written
    assert "left &lt; right &amp; more" in written
    assert written.index("left &lt; right") < written.index("<img")


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
    assert page.maps["bias_field"].max() / page.maps["bias_field"].min() == pytest.approx(
        ratio, rel=1e-5
    )  # nothing else changes


def test_the_table_gives_millilitres(scan: ScanResult) -> None:
    rows = {s.name: (left, right) for s, left, right in volume_rows(scan)}
    volume = 16 * 42 * 10 * 5 / 1000
    assert rows["Left-Cerebral-Cortex"] == pytest.approx((volume, volume))
    assert rows["Brain-Stem"] == (0.0, None)
    assert "skin" not in rows
    assert f'<td class="number">{volume:.1f}</td>' in compose_document(scan)


def test_a_scan_without_a_brain_gets_a_page(tmp_path: Path) -> None:
    labels = np.zeros(SHAPE, dtype=np.uint8)
    labels[5:9, 5:9, 5:9] = SKIN
    page = Page.of(make_scan(tmp_path, labels))
    assert not page.has_brain
    assert len(draw_segmentation(page).axes) == 2 * 3 * len(SLICES)


def test_tasks_that_are_absent_have_no_section(scan: ScanResult, tmp_path: Path) -> None:
    alone = make_scan(tmp_path, scan.labels, maps_wanted=False)
    assert list(sections(Page.of(alone))) == []


SCRIPT = "/* NiiVue would be here </script> */ var niivue = {};"


def test_the_view_holds_everything_it_needs(
    scan: ScanResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shown = make_scan(tmp_path, scan.labels)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NODE_PATH", "")
    view.find_niivue.cache_clear()
    write_view(shown)
    write_view(shown)
    assert [r.getMessage() for r in caplog.records if "NiiVue" in r.getMessage()] == [
        "no interactive view: NiiVue is needed, found no node_modules/@niivue/niivue/dist/niivue.umd.js: "
        "run 'npm install @niivue/niivue' here"
    ]
    write_report(shown)
    assert not shown.path("view.html").exists()
    assert "interactive view" not in shown.path("report.html").read_text()

    script = tmp_path / "node_modules/@niivue/niivue/dist/niivue.umd.js"
    script.parent.mkdir(parents=True)
    script.write_text(SCRIPT)
    view.find_niivue.cache_clear()
    write_view(shown)
    write_report(shown)
    view.find_niivue.cache_clear()
    written = shown.path("view.html").read_text()
    assert written.count("</script>") == 2  # the package's script cannot end the element early
    assert '"Left-Cerebral-Cortex"' in written
    assert not re.findall(r'(?:src|href)="', written)
    assert 'href="scan_view.html"' in shown.path("report.html").read_text()


def test_the_page_in_a_browser(scan: ScanResult, tmp_path: Path) -> None:
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("no chromium on this machine: the page's parts have tests without it")
    shown = make_scan(tmp_path, scan.labels)
    write_report(shown)
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    options += [
        "--disable-background-networking",
        "--disable-component-update",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    options += ["--window-size=1000,3000", "--hide-scrollbars", f"--screenshot={tmp_path / 'page.png'}"]
    address = shown.path("report.html").as_uri()
    subprocess.run([browser, *options, address], check=True, capture_output=True, timeout=180)
    import matplotlib.image

    picture = matplotlib.image.imread(tmp_path / "page.png")
    assert picture.shape[:2] == (3000, 1000)
    rows = (picture[..., :3].max(axis=(1, 2)) > 0.3).sum()  # text and pictures on black
    assert rows > 1500
    done = subprocess.run([browser, *options[:-1], "--dump-dom", address], check=True, capture_output=True, timeout=180)
    assert done.stdout.decode().count("<img") == 5
