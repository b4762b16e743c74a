"""Datalists of prepared subjects."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from monai.data import load_decathlon_datalist

from brainfm_monai.data.datalist import count_subjects, find_persons, read_datalist, write_datalist

KEYS = ("generation_labels", "segmentation", "distance", "mni")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("s1", "s2", "s3", "s4", ".s5.part"):
        (tmp_path / "prepared" / name).mkdir(parents=True)
        for file in ("subject.json", *(f"{key}.nii.gz" for key in KEYS)):
            (tmp_path / "prepared" / name / file).write_text("{}", encoding="utf-8")
    (tmp_path / "prepared" / "unfinished").mkdir()
    return tmp_path / "prepared"


def read(path: Path) -> dict[str, list[str]]:
    sections = json.loads(path.read_text(encoding="utf-8"))
    return {key: [item["subject"] for item in items] for key, items in sections.items()}


@pytest.mark.parametrize("validation", [["s4", "s2"], "s4, s2", ("s2", "s4")])
def test_named_subjects_are_kept_for_validation(root: Path, validation: list[str] | str) -> None:
    path = write_datalist(root, validation=validation)
    assert path == root / "datalist.json"
    assert read(path) == {"training": ["s1", "s3"], "validation": ["s2", "s4"], "test": []}


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
    draws = [
        read(write_datalist(root, validation_fraction=0.5, seed=seed))["validation"] for seed in (0, 0, 1, 2, 3, 4)
    ]
    assert all(len(draw) == 2 for draw in draws)
    assert draws[0] == draws[1]
    assert any(draw != draws[0] for draw in draws[2:])
    with_name = read(write_datalist(root, validation=["s1"], validation_fraction=0.34))["validation"]
    assert len(with_name) == 2
    assert "s1" in with_name


def test_visits_of_a_person_stay_together(root: Path) -> None:
    for name in ("s1", "s2", "s3"):
        (root / name / "subject.json").write_text('{"person": "anna", "dataset": "clinic"}', encoding="utf-8")
    for seed in range(6):
        sections = read(write_datalist(root, validation_fraction=0.5, seed=seed))
        together = [section for section, names in sections.items() if {"s1", "s2", "s3"} & set(names)]
        assert len(together) == 1, seed
    assert read(write_datalist(root, test=["s2"]))["test"] == ["s1", "s2", "s3"]


def test_visits_and_templates_are_one_person_by_their_names(tmp_path: Path) -> None:
    people = {
        "a": ["sub-01", "sub-01_ses-1", "sub-01_ses-10_run-2", "sub-01_ses-1.long.sub-01"],
        "b": ["sub-011_ses-1"],
        "c": ["ann1", "ann2", "ann_base", "ann1.long.ann_base", "ann2.long.ann_base"],
        "d": ["bob_tp1", "bob_tp2", "bob_20240131", "bob-baseline"],
        "e": ["OAS30001_MR_d0129", "OAS30001_MR_d2430"],
        "f": ["training_seg_01"],
        "g": ["training_seg_02"],
    }
    entries = {name: {"subject": name, "dataset": "x"} for names in people.values() for name in names}
    found = find_persons(entries)
    groups = [{found[name] for name in names} for names in people.values()]
    assert [len(group) for group in groups] == [1] * len(people)
    assert len(set.union(*groups)) == len(people)
    recorded = find_persons({n: {"subject": n, "person": n} for n in ("case_v1", "case_v2")})
    assert len(set(recorded.values())) == 2, "a record of the person goes before the name"


def test_one_training_has_one_protocol(root: Path) -> None:
    for name, protocol in (("s1", "brainfm"), ("s2", "synthseg_head")):
        (root / name / "subject.json").write_text(json.dumps({"protocol": protocol}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"of one protocol are needed, found brainfm: s1; synthseg_head: s2"):
        write_datalist(root)
    (root / "s1" / "subject.json").write_text('{"protocol": "synthseg_head"}', encoding="utf-8")
    path = write_datalist(root, validation="s1")
    assert [item["subject"] for item in read_datalist(path, "training", "synthseg_head")] == ["s2", "s3", "s4"]
    for section, name in (("training", "s2"), ("validation", "s1")):
        with pytest.raises(ValueError, match=rf"json: .* protocol 'brainfm' are needed, found synthseg_head: {name}"):
            read_datalist(path, section, "brainfm")
    with pytest.raises(
        ValueError, match="with the sections testing is needed, found the sections training, validation"
    ):
        read_datalist(path, "testing")


def test_paths_are_whole_and_names_stay_names(root: Path) -> None:
    (root / "extra").mkdir()
    items = [{"subject": "extra", "dataset": "extra", "T1w": "extra/x", "lesion_shape": "extra/l.nii.gz", "age": 3}]
    items[0] |= {"simulated": ["CT"]}
    (root / "list.json").write_text(json.dumps({"training": items}), encoding="utf-8")
    (item,) = read_datalist(root / "list.json", "training")
    files = {"T1w": f"{root}/extra/x", "lesion_shape": f"{root}/extra/l.nii.gz"}
    assert item == items[0] | files


def test_three_sections_share_no_subject(root: Path) -> None:
    sections = read(write_datalist(root, validation="s1", test_fraction=0.34, seed=3))
    assert sections["validation"] == ["s1"]
    assert len(sections["test"]) == 1
    assert sorted(name for names in sections.values() for name in names) == ["s1", "s2", "s3", "s4"]


def test_folders_of_several_sets_are_counted_apart(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = root.parent / "other"
    for name in ("x1", "x2"):
        (other / name).mkdir(parents=True)
        facts = {"dataset": "clinic", "generation_protocol": "brainfm_generation", "protocol": "synthseg_brain"}
        (other / name / "subject.json").write_text(json.dumps(facts), encoding="utf-8")
        (other / name / "FLAIR.nii.gz").touch()
    with caplog.at_level("INFO"):
        path = write_datalist([root, other])
    items = {item["subject"]: item for item in json.loads(path.read_text(encoding="utf-8"))["training"]}
    assert items["x1"] == {"subject": "x1", **facts, "FLAIR": "../other/x1/FLAIR.nii.gz"}
    assert count_subjects(items.values()).set_index("dataset").loc["clinic"].to_dict()["FLAIR"] == 2
    table = [line.split() for line in caplog.text.splitlines()[-3:]]
    assert table[-1] == ["clinic", "2", "0", "0", "0", "0", "2"]
    entries = {entry["subject"]: entry for entry in read_datalist(path)}
    assert Path(entries["x1"]["FLAIR"]).resolve() == other / "x1" / "FLAIR.nii.gz"
    assert entries["s1"]["section"] == "training"


def test_equal_names_in_two_sets_are_two_persons(tmp_path: Path) -> None:
    for dataset in ("first", "second"):
        for name in ("sub-01", "sub-02" if dataset == "first" else "sub-03"):
            (tmp_path / dataset / name).mkdir(parents=True)
            record = json.dumps({"dataset": dataset, "person": name})
            (tmp_path / dataset / name / "subject.json").write_text(record, encoding="utf-8")
    roots = [tmp_path / "first", tmp_path / "second"]
    sections = read(write_datalist(roots, validation=["first_sub-01"]))
    assert sections["validation"] == ["first_sub-01"]
    assert sections["training"] == ["second_sub-01", "sub-02", "sub-03"]
    (tmp_path / "second" / "sub-01" / "subject.json").write_text('{"dataset": "first"}', encoding="utf-8")
    with pytest.raises(ValueError, match="subjects of one set need different names, found twice: first_sub-01"):
        write_datalist(roots)


def test_errors_name_the_rule(root: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none: a folder of prepared subjects is needed"):
        write_datalist(tmp_path / "none")
    with pytest.raises(ValueError, match=r"prepared subjects .* are needed, found none"):
        write_datalist(root / "s1")
    with pytest.raises(ValueError, match="'validation' must name prepared subjects, found no s9"):
        write_datalist(root, validation=["s1", "s9"])
    with pytest.raises(ValueError, match="must be left for training, found all 4 in 'validation' or 'test'"):
        write_datalist(root, validation=["s1", "s2", "s3", "s4"])
    with pytest.raises(ValueError, match=r"must be in \[0, 1\), found 1.5"):
        write_datalist(root, validation_fraction=1.5)
    with pytest.raises(ValueError, match="a person is in one section, found s1"):
        write_datalist(root, validation=["s1"], test=["s1"])
    (root / "s1" / "subject.json").write_text("half", encoding="utf-8")
    with pytest.raises(ValueError, match=r"s1/subject\.json: the record of a prepared subject is needed, found"):
        write_datalist(root)
    assert not (root / "datalist.json").exists()


def test_visits_that_names_tell_in_words_are_one_person() -> None:
    same = [("ann_pre", "ann_post"), ("ann_week0", "ann_week12"), ("s1_tp1_T1w", "s1_tp2_T1w"), ("b_test", "b_retest")]
    for names in same:
        assert len(set(find_persons({name: {"subject": name} for name in names}).values())) == 1
    assert len(set(find_persons({name: {"subject": name} for name in ("ann_1", "ann_2", "bob")}).values())) == 3


def test_persons_and_labels_in_two_sections_are_warned_of(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    (root / "s1" / "segmentation.nii.gz").write_text("other labels", encoding="utf-8")
    write_datalist(root, validation="s1")
    assert "the same labels" not in caplog.text
    path = write_datalist(root, validation="s2")
    assert "s3 and s2" in caplog.text or "s2 and s3" in caplog.text
    sections = json.loads(path.read_text(encoding="utf-8"))
    sections["validation"][0]["subject"] = "s3_ses-2"
    path.write_text(json.dumps(sections), encoding="utf-8")
    read_datalist(path, "training")
    assert "a person must be in one section, found s3 in 'training' and s3_ses-2 in 'validation'" in caplog.text
