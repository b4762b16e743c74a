"""Every fault that the check knows is put into a sound set, and found; the sound set has none."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from brainfm_monai import cli
from brainfm_monai.anatomy import Protocol
from brainfm_monai.data import check
from brainfm_monai.data.check import check_set
from brainfm_monai.data.datalist import write_datalist
from brainfm_monai.data.labels import compute_hemisphere_distances
from brainfm_monai.data.registration import coarsen_affine
from brainfm_monai.data.subjects import read_record, write_subject

SIZE = (48, 40, 36)
AFFINE = np.array([[1.0, 0, 0, -23.5], [0, 1, 0, -30], [0, 0, 1, 7], [0, 0, 0, 1]])
Volumes = dict[str, tuple[np.ndarray, np.ndarray]]


def make_volumes() -> Volumes:
    """A small brain, larger on the left, with everything a subject may have."""
    ids = np.zeros(SIZE, dtype=np.int32)
    ids[5:23, 6:34, 8:30], ids[9:20, 10:30, 12:26] = 3, 2
    ids[25:40, 8:32, 9:28], ids[28:37, 12:28, 13:24] = 42, 41
    labels = Protocol.load("synthseg_brain").encode(ids)
    grid = coarsen_affine(AFFINE, 4)
    index = np.stack(np.meshgrid(*(np.arange(n // 4) for n in SIZE), indexing="ij"), axis=-1)
    mni = (index @ grid[:3, :3].T + grid[:3, 3]).astype(np.float32)
    return {
        "generation_labels": (Protocol.load("brainfm_generation").encode(ids), AFFINE),
        "segmentation": (labels, AFFINE),
        "distance": (compute_hemisphere_distances(ids), AFFINE),
        "mni": (mni, grid),
        "T1w": (np.where(ids > 0, 0.2 + ids % 7 / 10, 0).astype(np.float32), AFFINE),
        "CT": (np.where(ids > 0, 35, -1000).astype(np.int16), AFFINE),
    }


RECORD = {"dataset": "clinic", "protocol": "synthseg_brain", "generation_protocol": "brainfm_generation"}


@pytest.fixture(autouse=True)
def _small_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "BRAIN_RANGE_ML", (10.0, 30.0))


def swap_sides(volumes: Volumes) -> None:
    for key, (values, affine) in volumes.items():
        if key != "mni":
            volumes[key] = (values[::-1].copy(), affine)


def change(key: str, edit: Callable[[np.ndarray], np.ndarray]) -> Callable[[Volumes], None]:
    def apply(volumes: Volumes) -> None:
        volumes[key] = (edit(volumes[key][0].copy()), volumes[key][1])

    return apply


def unknown_label(values: np.ndarray) -> np.ndarray:
    values[3, 3, 3] = 200
    return values


def fold(values: np.ndarray) -> np.ndarray:
    values[5, 5, 4, 0] += 30
    return values


def hole(values: np.ndarray) -> np.ndarray:
    values[9:20, 10:30, 14:26] = np.where(values[9:20, 10:30, 14:26] == 5, 6, values[9:20, 10:30, 14:26])
    return values


FAULTS: dict[str, tuple[Callable[[Volumes], None], str, str]] = {
    "shape": (
        change("T1w", lambda v: v[:-2]),
        "one grid",
        r"T1w \(46, 40, 36\) does not lie on the grid of generation_labels",
    ),
    "place": (
        lambda volumes: volumes.update(segmentation=(volumes["segmentation"][0], AFFINE + np.eye(4, k=3) * 2)),
        "one grid",
        "segmentation .* does not lie on the grid",
    ),
    "coarse grid": (change("mni", lambda v: v[:-1]), "one grid", "mni .* does not divide the box"),
    "label": (
        change("segmentation", unknown_label),
        "known ids",
        r"segmentation holds \[200\], and protocol 'synthseg_brain'",
    ),
    "no labels": (change("segmentation", np.zeros_like), "targets", "segmentation is empty"),
    "no inside": (change("distance", np.abs), "targets", "distance lp is negative nowhere"),
    "no contrast": (change("T1w", np.zeros_like), "targets", "T1w is 0 everywhere"),
    "units of a CT": (change("CT", lambda v: v + 1000), "intensities", "CT begins at 0: HU are needed"),
    "sides": (swap_sides, "left and right", "left hemisphere at x = 10 mm, right one at -8 mm in the affine's RAS"),
    "sides of the template": (
        change("mni", lambda v: v * (-1, 1, 1)),
        "coordinates",
        "left hemisphere at MNI x = 10 mm",
    ),
    "hole": (change("segmentation", hole), "sides alike", "Left-Cerebral-White-Matter has 0.4 ml and Right-.* 1.6 ml"),
    "small head": (change("segmentation", lambda v: v * (np.indices(SIZE)[1] < 12)), "head size", "brain of . ml"),
    "mirrored distances": (change("distance", lambda v: v[..., [2, 3, 0, 1]]), "distances", "channel lp .* Dice 0.00"),
    "folds": (change("mni", fold), "coordinates", "the map to MNI space folds at"),
    "far away": (change("mni", lambda v: v + 200), "coordinates", "from the template's origin"),
}


def test_a_sound_set_has_no_fault(tmp_path: Path) -> None:
    for name in ("s1", "s2"):
        write_subject(tmp_path / name, make_volumes(), RECORD)
    findings, entries = check_set(write_datalist(tmp_path))
    assert findings == []
    assert [entry["subject"] for entry in entries] == ["s1", "s2"]
    assert read_record(tmp_path / "s1")["keys"] == sorted(make_volumes())


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found(tmp_path: Path, fault: str) -> None:
    spoil, rule, message = FAULTS[fault]
    write_subject(tmp_path / "good", make_volumes(), RECORD)
    volumes = make_volumes()
    spoil(volumes)
    write_subject(tmp_path / "bad", volumes, RECORD)
    findings, _ = check_set(tmp_path)
    assert {f.subject for f in findings} == {"bad"}
    assert any(f.rule == rule and re.search(message, f.found) for f in findings), findings


def test_an_unreadable_file_and_two_protocols(tmp_path: Path) -> None:
    write_subject(tmp_path / "s1", make_volumes(), RECORD)
    write_subject(tmp_path / "s2", make_volumes(), {**RECORD, "protocol": "brainfm"})
    (tmp_path / "s1" / "distance.nii.gz").write_bytes(b"half")
    findings, _ = check_set(tmp_path)
    assert ("s1", "distances") in {(f.subject, f.rule) for f in findings}
    assert findings[-1].rule == "one protocol"
    assert "found brainfm: s2; synthseg_brain: s1" in findings[-1].found


def test_the_command_tells_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    volumes = make_volumes()
    swap_sides(volumes)
    write_subject(tmp_path / "subjects" / "s1", volumes, RECORD)
    arguments = ["data", "check", str(tmp_path / "subjects")]
    monkeypatch.setattr("sys.argv", ["brainfm-monai", *arguments])
    with pytest.raises(SystemExit) as end:
        cli.main()
    lines = str(end.value).splitlines()
    assert lines[0].endswith("faults in 1 subjects:")
    assert "s1: left and right: left hemisphere at x = 10 mm" in lines[1]


def test_every_subject_is_checked_in_a_process_of_its_own(tmp_path: Path) -> None:
    for name in ("s1", "s2"):
        write_subject(tmp_path / name, make_volumes(), RECORD)
    (tmp_path / "s2" / "subject.json").write_text(json.dumps({**RECORD, "protocol": "none"}), encoding="utf-8")
    findings = {(f.subject, f.rule) for f in check_set(tmp_path, jobs=2)[0]}
    assert {("s1", "head size"), ("s2", "known ids")} <= findings  # heads of 20 ml are small in a fresh process


def test_nothing_to_check(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[1]", encoding="utf-8")
    with pytest.raises(ValueError, match=r"list\.json: a JSON datalist with the sections"):
        check_set(tmp_path / "list.json")
    (tmp_path / "list.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"list\.json: subjects are needed, found none"):
        check_set(tmp_path / "list.json")
    nib.save(nib.Nifti1Image(np.zeros(SIZE, dtype=np.uint8), AFFINE), tmp_path / "one.nii")
    with pytest.raises(ValueError, match="prepared subjects"):
        check_set(tmp_path)
