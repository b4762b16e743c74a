"""The page: sides, proportions, the choice of slices and what it says, on a small head made of boxes; and in a browser."""

from __future__ import annotations

import dataclasses
import html
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from PIL import Image

from brainfm_monai.io import read_table
from brainfm_monai.outputs import RunSettings, ScanResult
from brainfm_monai.outputs.maps import EXPECTED_DICE
from brainfm_monai.report import page, write_report, write_view
from brainfm_monai.report.page import colour_by_thickness, compose_page, draw_sections
from brainfm_monai.tasks import TASKS, TaskLayout

LAYOUT = TaskLayout(["segmentation", "distance", "log_bias_field", "mni"], "synthseg_head")
SHAPE = (60, 70, 14)
AFFINE = np.array([[-1.0, 0, 0, 30], [0, -1.0, 0, 35], [0, 0, 5.0, -30], [0, 0, 0, 1]])  # LPS, 5 mm slices
LEFT_CORTEX, RIGHT_CORTEX, SKIN = 6, 20, 38


@pytest.fixture(scope="module", autouse=True)
def small_template() -> Iterator[None]:
    """A template of 4 mm instead of 1 mm."""
    template = (
        np.ones((20, 24, 20), dtype=np.float32),
        np.array([[4.0, 0, 0, -40], [0, 4, 0, -48], [0, 0, 4, -40], [0, 0, 0, 1]]),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("brainfm_monai.outputs.template.load_template", lambda: template)
        yield


def make_scan(folder: Path, labels: np.ndarray, affine: np.ndarray = AFFINE, maps_wanted: bool = True) -> ScanResult:
    index = np.stack(np.meshgrid(*(np.arange(n) for n in labels.shape), indexing="ij"), axis=-1)
    world = np.moveaxis(index @ affine[:3, :3].T + affine[:3, 3], -1, 0).astype(np.float32)
    image = (labels > 0) * (100 + world[0])  # brighter towards the patient's right
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
    original = MetaTensor(torch.from_numpy(image.astype(np.float32))[None], affine=torch.from_numpy(affine))
    return ScanResult("scan", folder / "scan.nii.gz", folder, LAYOUT, labels, affine, tensors, original=original)


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> ScanResult:
    """A left and a right block of cortex within skin; array axis 0 runs from the patient's right to left."""
    labels = np.zeros(SHAPE, dtype=np.uint8)
    labels[8:52, 8:62, 1:13] = SKIN
    labels[14:30, 14:56, 2:12] = RIGHT_CORTEX
    labels[30:46, 14:56, 2:12] = LEFT_CORTEX
    return make_scan(tmp_path_factory.mktemp("scan"), labels)


def test_the_page_says_what_it_shows(scan: ScanResult) -> None:
    written = compose_page(scan)
    assert "the patient's right (R) is on the left of a picture" in written
    assert "60 x 70 x 14 voxels of 1.00 x 1.00 x 5.00 mm, stored as LPS" in written
    headings = re.findall("<h2>(.*?)</h2>", written)
    pictures = ["Scan and segmentation", "Cortex", "Bias field", "Way to the template", "Certainty"]
    assert headings == [*pictures, "Volumes, mL", "What was used"]
    assert len(re.findall(r'<img alt="[^"]+" src="data:image/webp;base64,', written)) == 5
    assert not re.findall(r'(?:src|href)="(?!data:)', written)  # one file, nothing from elsewhere
    assert "No rule of quality found anything" in written


def test_boundaries_are_drawn_once(tmp_path: Path) -> None:
    """As contours of the surfaces where there are surfaces, else as the zero of the distances."""
    voxels = np.indices((60, 36, 36))
    left, right = (np.linalg.norm(voxels - np.reshape((x, 18, 18), (3, 1, 1, 1)), axis=0) for x in (15, 44))
    labels = np.where(left < 12, LEFT_CORTEX, np.where(right < 12, RIGHT_CORTEX, 0)).astype(np.uint8)
    distance = np.stack([left - 12, left - 9, right - 12, right - 9]).clip(-3, 3).astype(np.float32)
    balls = make_scan(tmp_path, labels, np.eye(4))
    maps = {**balls.maps, "distance": MetaTensor(torch.from_numpy(distance), affine=torch.eye(4, dtype=torch.float64))}
    headings = {}
    for outputs in ({"distance"}, {"distance", "surfaces"}):
        shown = dataclasses.replace(balls, maps=maps, outputs=outputs, computed={})
        headings[len(outputs)] = [heading for heading, _, _ in draw_sections(shown)]
    assert "Cortex" in headings[1]
    assert "White and pial surface" not in headings[1]
    assert headings[2] == [*(heading for heading in headings[1] if heading != "Cortex"), "White and pial surface"]


def test_warnings_come_first_and_names_are_text(scan: ScanResult, tmp_path: Path) -> None:
    warned = make_scan(tmp_path, scan.labels, maps_wanted=False)
    warned = dataclasses.replace(warned, name="<script>alert(1)</script>", warnings=["left < right & more"])
    written = compose_page(warned)
    assert "Look at this first" in written
    assert "left &lt; right &amp; more" in written
    assert written.index("left &lt; right") < written.index("<img")
    assert "<script" not in written
    viewed = page.compose_view(warned, SCRIPT)
    assert viewed.count("<script") == 1
    assert "<title>&lt;script&gt;alert(1)" in viewed


def test_the_stylesheet_has_no_class_that_no_page_uses() -> None:
    pages = Path(page.__file__).parent / "templates"
    style = re.search("<style>(.*?)</style>", (pages / "base.html").read_text(encoding="utf-8"), re.S)
    assert style is not None
    used = "".join(path.read_text(encoding="utf-8") for path in pages.glob("*.html"))
    words = {word for classes in re.findall('class="([^"]*)"', used) for word in classes.split()}
    assert set(re.findall(r"\.([a-z]+)\b[^{};]*\{", style[1])) - {"light"} <= words  # a theme that Python names


def find(scan: ScanResult, heading: str) -> np.ndarray:
    return next(picture for title, _, picture in draw_sections(scan) if title == heading)


def test_left_and_right_of_the_page(scan: ScanResult) -> None:
    """The first axial slice with labels: right cortex on the left of the picture, and the picture brighter there."""
    picture = find(scan, "Scan and segmentation")
    height, width = picture.shape[0] // 6, picture.shape[1] // 7
    row = picture[height // 2, 3 * width : 4 * width, 0].astype(int)
    inside = row[row.nonzero()[0][12:-12]]
    assert inside[:8].mean() > inside[-8:].mean() + 10  # the scan is brighter towards the patient's right


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_the_page_is_the_same_however_the_voxels_are_stored(
    scan: ScanResult, tmp_path: Path, order: tuple[int, int, int]
) -> None:
    labels = np.ascontiguousarray(scan.labels.transpose(order)[::-1])
    matrix = np.eye(4)
    matrix[:3, :3] = np.eye(3)[:, order]
    matrix = matrix @ np.array([[-1, 0, 0, labels.shape[0] - 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    (tmp_path / "turned").mkdir()
    turned = make_scan(tmp_path / "turned", labels, AFFINE @ matrix)
    for (heading, _, picture), (_, _, other) in zip(draw_sections(scan), draw_sections(turned), strict=True):
        assert (np.abs(picture.astype(int) - other) > 2).mean() < 0.002, (
            heading
        )  # a voxel on a border may round otherwise


def test_a_ct_is_shown_in_the_windows_of_brain_and_bone(scan: ScanResult, tmp_path: Path) -> None:
    ct = dataclasses.replace(make_scan(tmp_path, scan.labels, maps_wanted=False), window="0 to 80")
    assert "The CT in two windows" not in {heading for heading, _, _ in draw_sections(ct)}  # an MR scan with --window
    ct = dataclasses.replace(ct, modality="ct: air at -1000 <HU>")
    sections = {heading: caption for heading, caption, _ in draw_sections(ct)}
    assert sections["The CT in two windows"] == "0 to 80 HU; -450 to 1050 HU"
    assert "taken for ct: air at -1000 &lt;HU&gt;" in compose_page(ct)
    assert list(sections) == ["Scan and segmentation", "The CT in two windows"]


def test_the_table_gives_millilitres(scan: ScanResult) -> None:
    volume = 16 * 42 * 10 * 5 / 1000
    written = compose_page(scan)
    row = r'Cerebral Cortex</td><td class="number">([\d.]+)</td><td class="number">([\d.]+)</td>'
    assert re.findall(row, written) == [(f"{volume:.1f}", f"{volume:.1f}")]
    assert re.findall(r'Brain Stem</td><td class="number">([\d.]+)</td>', written) == ["0.0"]
    assert "skin" not in written


def test_the_table_has_the_dice_to_expect_for_the_shipped_weights_alone(scan: ScanResult, repository: Path) -> None:
    line = next(row for row in read_table(EXPECTED_DICE) if row["structure"] == "cerebral_cortex")
    shipped = dataclasses.replace(scan, settings=RunSettings(weights_sha256=line["weights_sha256"]), computed={})
    written = compose_page(shipped)
    assert "expected Dice" in written
    cortex = f"{min(float(line['intercept']), 1):.2f}"  # the entropy of this scan is 0
    assert re.search(rf"<td class=\"number\">{cortex} {cortex} </td>", written)
    assert "expected Dice" not in compose_page(scan)


def test_every_map_has_a_picture(tmp_path: Path) -> None:
    layout = TaskLayout([name for name in TASKS if name not in ("age", "embedding")], uncertainty=["CT", "mni"])
    labels = np.zeros(SHAPE, dtype=np.uint8)
    labels[14:46, 14:56, 2:12] = LEFT_CORTEX
    maps = {
        task.entry: MetaTensor(torch.rand(max(task.channels, 1), *SHAPE), affine=torch.from_numpy(AFFINE))
        for task in layout.tasks.values()
    }
    maps["segmentation"] = MetaTensor(torch.from_numpy(labels)[None], affine=torch.from_numpy(AFFINE))
    scan = dataclasses.replace(make_scan(tmp_path, labels), layout=layout, maps=maps)
    captions = " ".join(caption for _, caption, _ in draw_sections(scan))
    for words in (
        "T1w;",
        "CT, -450 to 1050 HU",
        "super_resolution",
        "lesion, probability",
        "mni_scale, mm",
        "CT_scale, HU",
    ):
        assert words in captions


def test_a_scan_without_a_brain_gets_a_page(tmp_path: Path) -> None:
    labels = np.zeros(SHAPE, dtype=np.uint8)
    labels[5:9, 5:9, 5:9] = SKIN
    assert "Way to the template" in compose_page(make_scan(tmp_path, labels))


SCRIPT = "/* NiiVue would be here </script> */ class Niivue {}"


def test_the_view_holds_everything_it_needs(
    scan: ScanResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shown = make_scan(tmp_path, scan.labels)
    with monkeypatch.context() as patch:
        patch.setattr(page.util, "find_spec", lambda name: None)
        page.find_niivue.cache_clear()
        write_view(shown)
        write_view(shown)
    assert [r.getMessage() for r in caplog.records if "NiiVue" in r.getMessage()] == [
        "no interactive view: NiiVue is needed, found no package ipyniivue: pip install 'ipyniivue>=2.4.4,<2.5'"
    ]
    write_report(shown)
    assert not shown.path("view.html").exists()
    assert "interactive view" not in shown.path("report.html").read_text()
    monkeypatch.setattr(page, "find_niivue", lambda: SCRIPT)
    write_view(shown)
    write_report(shown)
    written = shown.path("view.html").read_text()
    assert written.count("</script>") == 1  # the package's script cannot end the element early
    assert '"Left-Cerebral-Cortex"' in written
    assert not re.findall(r'(?:src|href)="', written)
    assert 'href="scan_view.html"' in shown.path("report.html").read_text()


BROWSER = ["--headless", "--no-sandbox", "--disable-quic", "--no-first-run", "--disable-sync", "--hide-scrollbars"]
BROWSER += ["--disable-background-networking", "--disable-component-update", "--host-resolver-rules=MAP * ~NOTFOUND"]
BROWSER += ["--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist"]
# The browser's clock jumps from one look of the probe to the next, 50 ms each, and a loaded machine needs many looks.
BUDGET = "--virtual-time-budget=3600000"
# After the page is ready: the crosshair moves, the overlay is switched off, and what was fetched is counted.
PROBE = """<script type="module">
while (document.body.dataset.ready !== "yes") await new Promise((done) => setTimeout(done, 50));
const canvas = document.getElementById("view");
const picture = async () => { viewer.drawScene(); const data = canvas.toDataURL(); return data; };
const start = await picture();
viewer.moveCrosshairInVox(6, 9, 2);
const moved = await picture();
viewer.setOpacity(1, 0);
const bare = await picture();
const fetched = performance.getEntriesByType("resource").filter((entry) => !/^(data|blob):/.test(entry.name));
document.body.dataset.probe = JSON.stringify({ volumes: viewer.volumes.length, moved: start !== moved, overlay: moved !== bare,
  fetched: fetched.map((entry) => entry.name), place: document.getElementById("place").textContent });
</script>"""


def find_browser() -> str:
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("no chromium on this machine: the page's parts have tests without it")
    return browser


def test_the_view_in_a_browser_without_a_network(scan: ScanResult, tmp_path: Path) -> None:
    pytest.importorskip("ipyniivue", reason="the interactive view needs the extra view")
    browser = find_browser()
    page.find_niivue.cache_clear()
    shown = make_scan(tmp_path, scan.labels)
    write_view(shown)
    file = shown.path("view.html")
    file.write_text(PROBE.join(file.read_text(encoding="utf-8").rsplit("</body>", 1)), encoding="utf-8")
    options = [*BROWSER, f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", BUDGET]
    done = subprocess.run([browser, *options, file.as_uri()], check=True, capture_output=True, timeout=1200, text=True)
    probe = re.search(r'data-probe="([^"]*)"', done.stdout)
    assert probe is not None, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads(html.unescape(probe[1]))
    assert (found["volumes"], found["moved"], found["overlay"], found["fetched"]) == (2, True, True, [])
    assert "mm" in found["place"]


def test_thin_cortex_is_not_drawn_black_on_black() -> None:
    colours = colour_by_thickness(np.array([0.0, 1.0, 2.5, 5.0, 9.0])).sum(axis=1)
    assert colours[0] > 0.5
    assert (np.diff(colours[:4]) > 0).all()
    assert colours[3] == colours[4] == 3  # white


def test_the_page_in_a_browser(scan: ScanResult, tmp_path: Path) -> None:
    browser = find_browser()
    shown = make_scan(tmp_path, scan.labels)
    write_report(shown)
    options = [*BROWSER, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1000,3000"]
    address = shown.path("report.html").as_uri()
    screenshot = f"--screenshot={tmp_path / 'page.png'}"
    subprocess.run([browser, *options, screenshot, address], check=True, capture_output=True, timeout=1200)
    picture = np.asarray(Image.open(tmp_path / "page.png").convert("RGB"))
    assert picture.shape[:2] == (3000, 1000)
    rows = (picture.max(axis=(1, 2)) > 76).sum()  # text and pictures on black
    assert rows > 1400
    done = subprocess.run([browser, *options, "--dump-dom", address], check=True, capture_output=True, timeout=1200)
    assert done.stdout.decode().count("<img") == 5
