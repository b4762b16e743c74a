"""Tables, label maps and the folder of one scan."""

from __future__ import annotations

import csv
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from threadpoolctl import threadpool_info

from brainfm_monai import io
from brainfm_monai.io import ScanError, hash_file, write_table
from brainfm_monai.outputs import (
    RunSettings,
    ScanResult,
    ScanWriter,
    begun_ahead,
    compute_totals_mm3,
    compute_volumes_mm3,
    expect_dice,
    once_per_scan,
)
from brainfm_monai.outputs.maps import write_segmentation, write_volumes
from brainfm_monai.prediction.loop import ScanDataset, choose_scans
from brainfm_monai.tasks import TaskLayout

LAYOUT = TaskLayout(["segmentation"], "synthseg_head")
AFFINE = np.array([[0, -2.0, 0, 5], [1.5, 0, 0, -7], [0, 0, -4.0, 3], [0, 0, 0, 1]])


@pytest.fixture
def scan(tmp_path: Path) -> ScanResult:
    labels = torch.zeros(1, 4, 5, 6, dtype=torch.uint8)
    labels[0, :2] = 11  # 60 voxels of the left thalamus
    labels[0, 3, 0] = 43  # 6 of the optic nerve
    soft = np.arange(44.0)
    maps = {"segmentation": MetaTensor(labels, affine=torch.from_numpy(AFFINE))}
    return ScanResult("sub-01", tmp_path / "sub-01.nii.gz", tmp_path, LAYOUT, labels[0].numpy(), AFFINE, maps, soft)


def read_table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_volumes_count_voxels_of_any_affine() -> None:
    labels = np.array([[0, 1, 1], [2, 2, 2]], dtype=np.uint8)
    np.testing.assert_allclose(compute_volumes_mm3(labels, AFFINE, 4), np.array([1, 2, 3, 0]) * 12.0)


def test_the_volume_table_names_every_structure(scan: ScanResult) -> None:
    write_volumes(scan)
    rows = read_table(scan.folder / "sub-01_volumes.tsv")
    assert len(rows) == 43 + 2
    volumes = {row["name"]: float(row["hard_mm3"]) for row in rows[:43]}
    assert {name: v for name, v in volumes.items() if v} == {"Left-Thalamus": 60 * 12.0, "optic-nerve": 6 * 12.0}
    thalamus = {
        "index": "11",
        "name": "Left-Thalamus",
        "freesurfer_id": "10",
        "side": "left",
        "soft_mm3": "11.0",
        "hard_mm3": "720.0",
        "expected_dice": "n/a",
    }
    assert rows[10] == thalamus
    assert (rows[43]["name"], rows[43]["hard_mm3"]) == ("Total-Brain", "720.0")
    assert rows[44]["name"] == "Intracranial-Volume"
    definitions = json.loads((scan.folder / "sub-01_volumes.json").read_text())
    assert "the fluid around" in definitions["Intracranial-Volume"]["Description"]
    assert scan.summary["Left-Thalamus_mm3"] == 11.0


def test_the_dice_to_expect_is_a_line_in_the_entropy_of_the_weights_in_use(
    scan: ScanResult, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    entropy = torch.full(scan.maps["segmentation"].shape, 0.9)
    entropy[0, :2] = 0.25  # of the left thalamus
    scan.maps = {**scan.maps, "entropy": MetaTensor(entropy, affine=torch.from_numpy(AFFINE))}
    scan.settings = RunSettings(weights_sha256="mine")
    lines = [("mine", "thalamus", "10 49", 1.0, -0.6, 0.01, 4), ("other", "thalamus", "10 49", 0.5, 0, 0.01, 4)]
    columns = ("weights_sha256", "structure", "freesurfer_ids", "intercept", "slope", "error", "pairs")
    write_table(tmp_path / "lines.tsv", columns, lines)
    monkeypatch.setattr("brainfm_monai.outputs.maps.EXPECTED_DICE", tmp_path / "lines.tsv")
    assert expect_dice(scan) == {11: pytest.approx(0.85)}  # there is no right thalamus, whose entropy is not known
    write_volumes(scan)
    rows = {row["name"]: row["expected_dice"] for row in read_table(scan.folder / "sub-01_volumes.tsv")}
    assert (rows["Left-Thalamus"], rows["Right-Thalamus"], rows["Total-Brain"]) == ("0.85", "n/a", "n/a")
    assert expect_dice(replace(scan, settings=RunSettings(weights_sha256="trained by somebody"), computed={})) == {}


def test_the_lines_of_the_expected_dice_are_those_of_the_shipped_weights(repository: Path) -> None:
    rows = read_table(repository / "src/brainfm_monai/outputs/expected_dice.tsv")
    assert {row["weights_sha256"] for row in rows} == {hash_file(repository / "bundle/models/model.pt")}
    ids = [int(i) for row in rows for i in row["freesurfer_ids"].split()]
    assert {2, 3, 10, 17, 41, 42, 49, 53} < set(ids)  # both sides of cortex, white matter, thalamus, hippocampus
    assert len(ids) == len(set(ids))
    assert all(float(row["slope"]) <= 0 for row in rows)


def test_totals_are_sums_of_the_stated_structures() -> None:
    protocol = LAYOUT.protocol
    each = np.ones(len(protocol))
    fluid = sum(s.freesurfer_id in (4, 5, 14, 15, 24, 43, 44) for s in protocol.structures)
    brain = sum(0 < s.freesurfer_id < 500 for s in protocol.structures)
    assert compute_totals_mm3(each, protocol) == {"Total-Brain": brain - fluid, "Intracranial-Volume": brain}


def test_the_label_tables_give_ids_and_colours(scan: ScanResult) -> None:
    write_segmentation(scan)
    rows = read_table(scan.folder / "sub-01_dseg.tsv")
    assert [int(row["index"]) for row in rows] == list(range(44))
    assert rows[11] == {"index": "11", "name": "Left-Thalamus", "mapping": "10", "side": "left", "color": "#00760e"}
    freeview = (scan.folder / "sub-01_desc-lut_dseg.txt").read_text().splitlines()
    assert freeview[12] == "11 Left-Thalamus 0 118 14 255"
    snap = (scan.folder / "sub-01_desc-itksnap_dseg.txt").read_text().splitlines()
    assert snap[12] == '11 0 118 14 1 1 1 "Left-Thalamus"'


def test_label_maps_keep_grid_and_structures(scan: ScanResult) -> None:
    write_segmentation(scan)
    image: Any = nib.load(scan.folder / "sub-01_desc-freesurfer_dseg.nii.gz")
    ids = np.asarray(image.dataobj)
    np.testing.assert_array_equal(image.affine, AFFINE)
    assert ids.dtype == np.int16
    np.testing.assert_array_equal(ids, np.where(scan.labels == 11, 10, np.where(scan.labels == 43, 530, 0)))
    labels: Any = nib.load(scan.folder / "sub-01_dseg.nii.gz")
    np.testing.assert_array_equal(np.asarray(labels.dataobj), scan.labels)
    sidecar = json.loads((scan.folder / "sub-01_dseg.json").read_text())
    assert sidecar["GeneratedBy"]["mode"] == "whole_head"


def test_images_are_stored_in_steps_and_zero_stays_zero(scan: ScanResult) -> None:
    volume = np.linspace(-2.0, 3.0, 120).reshape(4, 5, 6).astype(np.float32)
    volume[0, 0, 0] = 0
    scan.save_image("a", volume, step=0.01)
    scan.save_image("b", volume)
    for suffix, step in (("a", 0.01), ("b", 6 / 60000)):
        image: Any = nib.load(scan.path(f"{suffix}.nii.gz"))
        stored = image.get_fdata()
        assert image.get_data_dtype() == np.int16
        assert np.abs(stored - volume).max() <= step / 2 * 1.01
        assert stored[0, 0, 0] == 0


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="grid: 'scan' or '1mm' is needed, found '2mm'"):
        RunSettings(grid="2mm")


ITEM_AFFINE = torch.from_numpy(AFFINE)


def item() -> dict[str, MetaTensor]:
    labels = torch.zeros(1, 4, 5, 6, dtype=torch.uint8)
    image = MetaTensor(torch.zeros(1, 4, 5, 6), affine=ITEM_AFFINE, meta={"filename_or_obj": "sub-01.nii"})
    pred, segmentation = (MetaTensor(labels, affine=ITEM_AFFINE) for _ in range(2))
    return {"image": image, "pred": pred, "segmentation": segmentation}


@pytest.fixture
def entry(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "sub-01.nii").write_text("a scan")
    return {"image": str(tmp_path / "sub-01.nii"), "name": "sub-01"}


def write_note(scan: ScanResult) -> None:
    scan.path("note.txt").write_text("new")


def names(folder: Path) -> list[str]:
    return sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())


def test_the_folder_appears_when_all_writers_are_done(tmp_path: Path, entry: dict[str, str]) -> None:
    out = tmp_path / "out"
    seen: list[bool] = []
    writers = {"look": lambda scan: seen.append((out / "sub-01").exists()), "note": write_note}
    writer = ScanWriter(out, LAYOUT, writers)
    assert not writer.is_finished(entry)
    writer.write(item(), entry)
    assert seen == [False]
    assert names(out) == ["sub-01/sub-01_finished.json", "sub-01/sub-01_note.txt"]
    assert writer.is_finished(entry)
    assert not ScanWriter(out, LAYOUT, {**writers, "more": write_note}).is_finished(entry)
    assert not ScanWriter(out, LAYOUT, writers, RunSettings(weights="other.pt", protocol="synthseg_head")).is_finished(
        entry
    )
    Path(entry["image"]).touch()
    assert writer.is_finished(entry)  # the same bytes
    moved = Path(entry["image"]).rename(tmp_path / "moved.nii")
    assert writer.is_finished(entry | {"image": str(moved)})
    assert not writer.is_finished(entry | {"image": str(moved), "frame": 1})
    moved.write_text("another scan under the same name")
    assert not writer.is_finished(entry | {"image": str(moved)})


def test_what_the_reader_noticed_stands_among_the_warnings_and_the_modality_in_the_summary(
    tmp_path: Path, entry: dict[str, str]
) -> None:
    noticed = item()
    noticed["image"].meta |= {"warnings": "two forms\n3 voxels", "modality": "ct: the DICOM header says so"}
    seen: list[ScanResult] = []
    ScanWriter(tmp_path / "out", LAYOUT, {"look": seen.append}).write(noticed, entry)
    marker = json.loads((tmp_path / "out/sub-01/sub-01_finished.json").read_text())
    assert marker["warnings"][:2] == ["two forms", "3 voxels"]
    assert marker["summary"]["modality"] == seen[0].modality == "ct: the DICOM header says so"


def test_a_second_run_replaces_its_files_and_leaves_those_of_others(tmp_path: Path, entry: dict[str, str]) -> None:
    out = tmp_path / "out"
    ScanWriter(out, LAYOUT, {"old": lambda scan: scan.path("old.txt").write_text("old"), "note": write_note}).write(
        item(), entry
    )
    (out / "sub-01/mine.txt").write_text("mine")
    writer = ScanWriter(out, LAYOUT, {"note": write_note})
    writer.write(item(), entry)
    assert names(out) == ["sub-01/mine.txt", "sub-01/sub-01_finished.json", "sub-01/sub-01_note.txt"]


def test_outputs_run_side_by_side_and_what_they_find_has_their_order(tmp_path: Path, entry: dict[str, str]) -> None:
    second_ended, computed = Event(), []

    @once_per_scan
    def shared(scan: ScanResult) -> int:
        computed.append(scan.name)
        return 7

    def first(scan: ScanResult) -> None:
        assert second_ended.wait(60)
        scan.summary["first"] = shared(scan)
        scan.warnings.append("of the first")

    def second(scan: ScanResult) -> None:
        scan.summary["second"] = shared(scan)
        scan.warnings.append("of the second")
        second_ended.set()

    @begun_ahead(shared, shown=True)
    def show(scan: ScanResult) -> None:
        scan.path("shown.txt").write_text(f"{list(scan.summary)} {scan.warnings[-2:]}")

    ScanWriter(tmp_path / "out", LAYOUT, {"show": show, "first": first, "second": second}).write(item(), entry)
    expected = "['first', 'second'] ['of the first', 'of the second']"
    assert (tmp_path / "out/sub-01/sub-01_shown.txt").read_text() == expected
    assert computed == ["sub-01"]

    def fail(scan: ScanResult) -> None:
        assert second_ended.wait(60)
        raise ScanError("the first error")

    def fail_early(scan: ScanResult) -> None:
        second_ended.set()
        raise ScanError("an earlier error of a later output")

    second_ended.clear()
    with pytest.raises(ScanError, match="the first error"):
        ScanWriter(tmp_path / "bad", LAYOUT, {"fail": fail, "fail_early": fail_early}).write(item(), entry)
    assert names(tmp_path / "bad") == []


def test_outputs_share_the_processors_and_parts_begin_ahead(tmp_path: Path, entry: dict[str, str]) -> None:
    begun: list[tuple[str, int, set[int]]] = []
    part_begun, last_begun = Event(), Event()

    def note(name: str) -> Any:
        def write(scan: ScanResult) -> None:
            pools = {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}
            if name == "other part":  # begins at the same time as the part: notes it second
                part_begun.wait(60)
            begun.append((name, torch.get_num_threads(), pools))
            if name == "part":  # keeps its thread, so that the others follow one another in the other
                part_begun.set()
                last_begun.wait(60)
            elif name == "surfaces":
                last_begun.set()

        return write

    before, pools_before = torch.get_num_threads(), threadpool_info()
    torch.set_num_threads(4)
    try:
        writers = {name: note(name) for name in ("first", "view", "surfaces", "transforms")}
        begun_ahead(note("part"), note("other part"))(writers["surfaces"])
        ScanWriter(tmp_path / "out", LAYOUT, writers).write(item(), entry)
        assert torch.get_num_threads() == 4
        with ThreadPoolExecutor(1) as pool:  # a thread that begins later
            assert pool.submit(torch.get_num_threads).result() == 4
    finally:
        torch.set_num_threads(before)
    order = ["part", "other part", "view", "transforms", "first", "surfaces"]  # what takes long begins early
    assert [name for name, *_ in begun] == order
    assert {(threads, *pools) for _, threads, pools in begun} == {(2, 1)}
    assert threadpool_info() == pools_before


def test_a_failing_writer_leaves_the_old_results_and_no_new_ones(tmp_path: Path, entry: dict[str, str]) -> None:
    out = tmp_path / "out"
    ScanWriter(out, LAYOUT, {"note": lambda scan: scan.path("note.txt").write_text("old")}).write(item(), entry)

    def fail(scan: ScanResult) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        ScanWriter(out, LAYOUT, {"note": write_note, "fail": fail}).write(item(), entry)
    assert (out / "sub-01/sub-01_note.txt").read_text() == "old"
    assert not (out / ".partial").exists()


def test_files_of_a_bids_scan_lie_in_its_subjects_folder(tmp_path: Path, entry: dict[str, str]) -> None:
    bids = entry | {"name": "sub-01_space-T1w", "folder": "sub-01/anat"}
    flair = entry | {"name": "sub-01_space-FLAIR", "folder": "sub-01/anat"}
    writer = ScanWriter(tmp_path / "out", LAYOUT, {"note": write_note})
    for one in (bids, flair):
        writer.write(item(), one)
    writer.write_summary([bids, flair])
    assert names(tmp_path / "out") == [
        "dataset_description.json",
        *(
            f"sub-01/anat/sub-01_space-{kind}_{end}"
            for kind in ("FLAIR", "T1w")
            for end in ("finished.json", "note.txt")
        ),
        "summary.tsv",
    ]
    assert [row["status"] for row in read_table(tmp_path / "out/summary.tsv")] == ["done", "done"]


def test_results_of_another_scan_are_not_replaced(tmp_path: Path, entry: dict[str, str]) -> None:
    out = tmp_path / "out"
    writer = ScanWriter(out, LAYOUT, {"note": write_note})
    writer.write(item(), entry)
    (tmp_path / "b").mkdir()
    (tmp_path / "b/sub-01.nii").write_text("the scan of another person")
    other = {"image": str(tmp_path / "b/sub-01.nii"), "name": "sub-01"}
    before = (out / "sub-01/sub-01_finished.json").read_bytes()
    for refuse in (writer.check_place, lambda scan: writer.write(item(), scan)):
        with pytest.raises(
            FileExistsError, match=r"b/sub-01\.nii: .*found those of another scan, .*/sub-01\.nii: give"
        ):
            refuse(other)
    with pytest.raises(FileExistsError, match=r"another scan, .*/sub-01\.nii with frame None and series '': give"):
        writer.check_place(entry | {"frame": 1})  # another volume of the same file
    assert (out / "sub-01/sub-01_finished.json").read_bytes() == before
    ScanWriter(out, LAYOUT, {"note": write_note}, overwrite=True).write(item(), other)
    assert writer.is_finished(other)
    assert not (out / ".partial").exists()


def test_a_scan_that_is_what_it_was_when_it_was_finished_has_not_failed(tmp_path: Path, entry: dict[str, str]) -> None:
    writer = ScanWriter(tmp_path / "out", LAYOUT, {"note": write_note})
    writer.write(item(), entry)
    writer.note_failure(entry, "the file was damaged for a while")
    assert choose_scans(ScanDataset([entry]), writer, None, overwrite=False) == []
    assert read_table(writer.write_summary([entry]))[0]["status"] == "done"


def test_files_of_the_users_are_not_replaced(tmp_path: Path, entry: dict[str, str]) -> None:
    out = tmp_path / "out"
    (out / "sub-01").mkdir(parents=True)
    (out / "sub-01/sub-01_note.txt").write_text("mine")
    with pytest.raises(
        FileExistsError, match=r"sub-01_note\.txt: no file of this name must be there, found one that is"
    ):
        ScanWriter(out, LAYOUT, {"note": write_note}).write(item(), entry)
    assert names(out) == ["sub-01/sub-01_note.txt"]
    assert (out / "sub-01/sub-01_note.txt").read_text() == "mine"


def test_a_publication_that_was_interrupted_is_done_again(
    tmp_path: Path, entry: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    writers = {"note": write_note, "more": lambda scan: scan.path("more.txt").write_text("new")}
    writer = ScanWriter(out, LAYOUT, writers)
    replace = Path.replace

    def interrupted(path: Path, target: Path) -> Path:
        if path.name.endswith("_note.txt"):
            raise KeyboardInterrupt
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            writer.write(item(), entry)
    assert names(out) == ["sub-01/sub-01_more.txt", "sub-01/sub-01_unfinished.json"]
    assert not writer.is_finished(entry)
    writer.write_summary([entry])
    assert read_table(out / "summary.tsv")[0]["status"] == "missing"
    writer.write(item(), entry)
    assert writer.is_finished(entry)
    assert "sub-01/sub-01_unfinished.json" not in names(out)


def test_a_name_never_leaves_the_output_folder(tmp_path: Path, entry: dict[str, str]) -> None:
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim/precious.txt").write_text("precious")
    writer = ScanWriter(tmp_path / "a/out", LAYOUT, {"note": write_note})
    for bad in ({"name": "../../victim"}, {"name": ".."}, {"folder": "../../victim"}, {"folder": "/" + str(tmp_path)}):
        for use in (writer.is_finished, writer.check_place, lambda scan: writer.write(item(), scan)):
            with pytest.raises(ScanError, match="the name of a scan must be"):
                use({**entry, **bad})
        with pytest.raises(ScanError, match="the name of a scan must be"):
            writer.note_failure({**entry, **bad}, "x")
    assert (tmp_path / "victim/precious.txt").read_text() == "precious"


def test_many_writers_share_one_folder(tmp_path: Path, entry: dict[str, str]) -> None:
    def work(number: int) -> None:
        writer = ScanWriter(tmp_path / "out", LAYOUT, {"note": write_note})
        for _ in range(25):
            writer.write(item(), {**entry, "name": f"scan{number % 2}"})

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))  # raises what a worker raised
    assert not (tmp_path / "out/.partial").exists()
    assert len(names(tmp_path / "out")) == 4


def test_what_interrupted_runs_left_is_removed_and_what_runs_stays(tmp_path: Path, entry: dict[str, str]) -> None:
    out = tmp_path / "out"
    seen: list[int] = []

    def look(scan: ScanResult) -> None:
        dead = scan.folder.with_name(".x" + scan.folder.name[2:])
        dead.mkdir()
        ScanWriter(out, LAYOUT, {"note": write_note}).write(item(), entry | {"name": "sub-02"})
        seen.append(len(list((out / ".partial").iterdir())))
        assert scan.folder.is_dir()

    ScanWriter(out, LAYOUT, {"look": look}).write(item(), entry)
    assert seen == [1]
    assert not (out / ".partial").exists()


def test_the_summary_keeps_the_rows_of_earlier_runs_and_lists_what_was_skipped(
    tmp_path: Path, entry: dict[str, str]
) -> None:
    writer = ScanWriter(tmp_path / "out", LAYOUT, {"note": write_note})
    second = {**entry, "name": "=1+1"}
    for scan in (entry, second):
        writer.write(item(), scan)
        writer.write_summary([scan, {"image": "x/notes\udcff.txt", "name": "notes", "skipped": "not a scan"}])
    rows = io.read_table(tmp_path / "out/summary.tsv")
    assert [(row["scan"], row["status"], row["folder"]) for row in rows] == [
        ("=1+1", "done", "=1+1"),
        ("notes", "skipped", "n/a"),
        ("sub-01", "done", "sub-01"),
    ]
    assert "\n=" not in (tmp_path / "out/summary.tsv").read_text()  # a spreadsheet would compute it
