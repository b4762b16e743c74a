"""Finding scans and naming them."""

from __future__ import annotations

from pathlib import Path

import pytest

from brainfm_monai.data.scans import find_scans


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_a_folder_is_searched_in_order_and_hidden_files_are_passed_over(tmp_path: Path) -> None:
    touch(tmp_path, "b.nii", "a/c.mgz", "a/.hidden.nii", ".git/x.nii", "notes.txt", "T1.v2.NII.GZ")
    found = find_scans(tmp_path)
    assert [scan["image"] for scan in found] == [str(tmp_path / name) for name in ("T1.v2.NII.GZ", "a/c.mgz", "b.nii")]
    assert [scan["name"] for scan in found] == ["T1.v2", "c", "b"]


def test_equal_stems_get_different_names(tmp_path: Path) -> None:
    touch(tmp_path, "s1/anat/T1w.nii.gz", "s2/anat/T1w.nii.gz", "s2/anat/T1w.mgz", "s1/FLAIR.nii", "t1W.nii", "s1_anat/T1w.nii")
    names = [scan["name"] for scan in find_scans(tmp_path)]
    assert len({name.lower() for name in names}) == len(names)
    assert names == ["FLAIR", "s1_anat_T1w", "s1_anat_T1w-2", "s2_anat_T1w", "s2_anat_T1w-2", "t1W"]


def test_results_are_not_taken_for_scans(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii", "out/a/a_dseg.nii.gz")
    assert [scan["name"] for scan in find_scans(tmp_path, tmp_path / "out")] == ["a"]
    with pytest.raises(ValueError, match="results need a folder of their own, found output_dir to be the folder of the scans"):
        find_scans(tmp_path, tmp_path / "out/..")


def test_a_file_is_one_scan_and_must_look_like_one(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii.gz", "b.dcm")
    assert find_scans(tmp_path / "a.nii.gz") == [{"image": str(tmp_path / "a.nii.gz"), "name": "a"}]
    with pytest.raises(
        ValueError, match=r"b\.dcm: a scan is a file of the kind \.nii\.gz, \.nii, \.mgz, \.mgh, found another suffix"
    ):
        find_scans(tmp_path / "b.dcm")
    assert find_scans("") == []
