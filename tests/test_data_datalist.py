"""Datalists of prepared subjects."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from monai.data import load_decathlon_datalist

from brainfm_monai.data.datalist import write_datalist

KEYS = ("generation_labels", "segmentation", "distance", "mni")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("s1", "s2", "s3", "s4", ".s5.part"):
        (tmp_path / "prepared" / name).mkdir(parents=True)
        for file in ("subject.json", *(f"{key}.nii.gz" for key in KEYS)):
            (tmp_path / "prepared" / name / file).touch()
    (tmp_path / "prepared" / "unfinished").mkdir()
    return tmp_path / "prepared"


def read(path: Path) -> dict[str, list[str]]:
    sections = json.loads(path.read_text(encoding="utf-8"))
    return {key: [item["subject"] for item in items] for key, items in sections.items()}


@pytest.mark.parametrize("validation", [["s4", "s2"], "s4, s2", ("s2", "s4")])
def test_named_subjects_are_kept_for_validation(root: Path, validation: list[str] | str) -> None:
    path = write_datalist(root, validation=validation)
    assert path == root / "datalist.json"
    assert read(path) == {"training": ["s1", "s3"], "validation": ["s2", "s4"]}


def test_monai_reads_it_and_finds_the_files(root: Path) -> None:
    items = load_decathlon_datalist(write_datalist(root), data_list_key="training")
    assert len(items) == 4
    for item in items:
        assert set(item) == {"subject", *KEYS}
        assert all(Path(item[key]).is_file() for key in KEYS)
        # MONAI turns every value that is a path into an absolute one, and the name of a subject is the path of its folder
        assert Path(item["subject"]).name in ("s1", "s2", "s3", "s4")


def test_list_in_another_folder_points_back(root: Path, tmp_path: Path) -> None:
    path = write_datalist(root, tmp_path / "lists" / "all.json")
    assert json.loads(path.read_text(encoding="utf-8"))["training"][0]["mni"] == "../prepared/s1/mni.nii.gz"
    assert [f.name for f in path.parent.iterdir()] == ["all.json"]


def test_missing_targets_are_left_out(root: Path) -> None:
    (root / "s1" / "mni.nii.gz").unlink()
    first, second = json.loads(write_datalist(root).read_text(encoding="utf-8"))["training"][:2]
    assert "mni" not in first
    assert "mni" in second


def test_draw_depends_on_the_seed_alone(root: Path) -> None:
    draws = [read(write_datalist(root, validation_fraction=0.5, seed=seed))["validation"] for seed in (0, 0, 1, 2, 3, 4)]
    assert all(len(draw) == 2 for draw in draws)
    assert draws[0] == draws[1]
    assert any(draw != draws[0] for draw in draws[2:])
    with_name = read(write_datalist(root, validation=["s1"], validation_fraction=0.34))["validation"]
    assert len(with_name) == 2
    assert "s1" in with_name


def test_errors_name_the_rule(root: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none: a folder of prepared subjects is needed"):
        write_datalist(tmp_path / "none")
    with pytest.raises(ValueError, match=r"prepared subjects .* are needed, found none"):
        write_datalist(root / "s1")
    with pytest.raises(ValueError, match="'validation' must name prepared subjects, found no s9"):
        write_datalist(root, validation=["s1", "s9"])
    with pytest.raises(ValueError, match="must be left for training, found all 4"):
        write_datalist(root, validation=["s1", "s2", "s3", "s4"])
    with pytest.raises(ValueError, match=r"must be in \[0, 1\), got 1.5"):
        write_datalist(root, validation_fraction=1.5)
    assert not (root / "datalist.json").exists()
