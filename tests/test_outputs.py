"""Tables, label maps and the folder of one scan."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Engine
from monai.data import MetaTensor

from brainfm_monai.outputs import (
    ScanResult,
    ScanWriter,
    compute_volumes_mm3,
    name_by_scan,
    write_freesurfer_segmentation,
    write_label_table,
    write_volumes,
)
from brainfm_monai.tasks import TaskLayout

LAYOUT = TaskLayout(["segmentation"], "synthseg_head")
AFFINE = np.array([[0, -2.0, 0, 5], [1.5, 0, 0, -7], [0, 0, -4.0, 3], [0, 0, 0, 1]])


@pytest.fixture
def scan(tmp_path: Path) -> ScanResult:
    labels = torch.zeros(1, 4, 5, 6, dtype=torch.uint8)
    labels[0, :2] = 11  # 60 voxels of the left thalamus
    labels[0, 3, 0] = 43  # 6 of the optic nerve
    return ScanResult("sub-01", tmp_path / "sub-01.nii.gz", tmp_path, LAYOUT, {"pred": labels}, AFFINE)


def read_table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_volumes_count_voxels_of_any_affine() -> None:
    labels = np.array([[0, 1, 1], [2, 2, 2]], dtype=np.uint8)
    np.testing.assert_allclose(compute_volumes_mm3(labels, AFFINE, 4), np.array([1, 2, 3, 0]) * 12.0)


def test_the_volume_table_names_every_structure(scan: ScanResult) -> None:
    write_volumes(scan)
    rows = read_table(scan.folder / "sub-01_volumes.tsv")
    assert len(rows) == 43
    volumes = {row["name"]: float(row["volume_mm3"]) for row in rows}
    assert {name: v for name, v in volumes.items() if v} == {"Left-Thalamus": 60 * 12.0, "optic-nerve": 6 * 12.0}
    assert rows[10] == {"index": "11", "name": "Left-Thalamus", "freesurfer_id": "10", "side": "left", "volume_mm3": "720.0"}


def test_the_label_table_gives_ids_and_colours(scan: ScanResult) -> None:
    write_label_table(scan)
    rows = read_table(scan.folder / "sub-01_dseg.tsv")
    assert [int(row["index"]) for row in rows] == list(range(44))
    assert rows[11] == {"index": "11", "name": "Left-Thalamus", "freesurfer_id": "10", "side": "left", "color": "#00760e"}


def test_the_freesurfer_map_keeps_grid_and_structures(scan: ScanResult) -> None:
    write_freesurfer_segmentation(scan)
    image: Any = nib.load(scan.folder / "sub-01_desc-freesurfer_dseg.nii.gz")
    ids = np.asarray(image.dataobj)
    np.testing.assert_array_equal(image.affine, AFFINE)
    assert ids.dtype == np.int16
    np.testing.assert_array_equal(ids, np.where(scan.labels == 11, 10, np.where(scan.labels == 43, 530, 0)))


def test_a_dot_in_a_name_is_no_suffix() -> None:
    assert name_by_scan({"scan_name": "sub-01_1.5T"}, None) == {"subject": "sub-01_1.5T.nii.gz"}


def item(name: str) -> dict[str, MetaTensor]:
    image = MetaTensor(torch.zeros(1, 4, 5, 6), affine=torch.eye(4), meta={"scan_name": name, "filename_or_obj": f"{name}.nii"})
    return {"image": image, "pred": MetaTensor(torch.zeros(1, 4, 5, 6, dtype=torch.uint8), affine=torch.from_numpy(AFFINE))}


def run(output_dir: Path, writers: list[Any], step: Any = None) -> None:
    """One iteration of an engine with the handler, as the evaluator makes it."""

    def process(engine: Engine, batch: dict[str, Any]) -> list[dict[str, MetaTensor]]:
        partial = output_dir / ".partial/sub-01"
        partial.mkdir(parents=True)  # fails if what an earlier run left is still there
        (partial / "sub-01_dseg.nii.gz").write_text("new")
        return [item("sub-01")]

    engine = Engine(process)
    ScanWriter(output_dir, LAYOUT, writers).attach(engine)
    image = MetaTensor(torch.zeros(1, 1, 4, 5, 6), meta={"scan_name": ["sub-01"]})
    engine.run([{"image": image}])


def test_the_folder_appears_when_all_writers_are_done(tmp_path: Path) -> None:
    seen: list[bool] = []

    def write(scan: ScanResult) -> None:
        seen.append((tmp_path / "sub-01").exists())
        scan.path("note.txt").write_text(str(scan.source))
        np.testing.assert_array_equal(scan.affine, AFFINE)

    run(tmp_path, [write])
    assert seen == [False]
    assert sorted(str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*")) == [
        "sub-01",
        "sub-01/sub-01_dseg.nii.gz",
        "sub-01/sub-01_note.txt",
    ]


def test_a_second_run_replaces_its_files_and_leaves_others(tmp_path: Path) -> None:
    (tmp_path / "sub-01").mkdir()
    (tmp_path / "sub-01/sub-01_dseg.nii.gz").write_text("old")
    (tmp_path / "sub-01/mine.txt").write_text("mine")
    (tmp_path / ".partial/sub-01").mkdir(parents=True)
    (tmp_path / ".partial/sub-01/stale.txt").write_text("of an interrupted run")
    run(tmp_path, [])
    assert {f.name: f.read_text() for f in (tmp_path / "sub-01").iterdir()} == {"sub-01_dseg.nii.gz": "new", "mine.txt": "mine"}
    assert not (tmp_path / ".partial").exists()


def test_a_failing_writer_leaves_the_old_results_and_no_new_ones(tmp_path: Path) -> None:
    (tmp_path / "sub-01").mkdir()
    (tmp_path / "sub-01/sub-01_dseg.nii.gz").write_text("old")

    def fail(scan: ScanResult) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        run(tmp_path, [write_volumes, fail])
    assert {f.name: f.read_text() for f in (tmp_path / "sub-01").iterdir()} == {"sub-01_dseg.nii.gz": "old"}
    assert not (tmp_path / ".partial").exists()
