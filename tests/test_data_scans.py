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
    touch(
        tmp_path,
        "s1/anat/T1w.nii.gz",
        "s2/anat/T1w.nii.gz",
        "s2/anat/T1w.mgz",
        "s1/FLAIR.nii",
        "t1W.nii",
        "s1_anat/T1w.nii",
    )
    names = [scan["name"] for scan in find_scans(tmp_path)]
    assert len({name.lower() for name in names}) == len(names)
    assert names == ["FLAIR", "s1_anat_T1w", "s1_anat_T1w-2", "s2_anat_T1w", "s2_anat_T1w-2", "t1W"]


def test_results_are_not_taken_for_scans(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii", "out/a/a_dseg.nii.gz")
    assert [scan["name"] for scan in find_scans(tmp_path, tmp_path / "out")] == ["a"]
    with pytest.raises(
        ValueError, match="results need a folder of their own, found output_dir to be the folder of the scans"
    ):
        find_scans(tmp_path, tmp_path / "out/..")


def test_a_file_is_one_scan_and_must_look_like_one(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii.gz", "b.dcm")
    assert find_scans(tmp_path / "a.nii.gz") == [{"image": str(tmp_path / "a.nii.gz"), "name": "a"}]
    with pytest.raises(
        ValueError,
        match=r"b\.dcm: a scan is a file of the kind \.nii\.gz, \.nii, \.hdr, \.mgz, \.mgh, \.nrrd, \.nhdr, found another suffix",
    ):
        find_scans(tmp_path / "b.dcm")
    assert find_scans("") == []


def test_a_pattern_and_a_table_list_scans(tmp_path: Path) -> None:
    touch(tmp_path, "s1/T1w.nii.gz", "s2/T1w.nii.gz", "s2/FLAIR.nii", "s2/lesions.nii")
    found = find_scans(str(tmp_path / "*/T1w*"))
    assert [scan["name"] for scan in found] == ["s1_T1w", "s2_T1w"]
    with pytest.raises(FileNotFoundError, match=r"a pattern of scans \(.*\) is needed, found none that it fits"):
        find_scans(str(tmp_path / "*/T2w*"))
    table = tmp_path / "scans.tsv"
    table.write_text("image\tname\tframe\tlesions\ts\ns1/T1w.nii.gz\tme\t\t\t\ns2/FLAIR.nii\t\t2\ts2/lesions.nii\t\n")
    assert find_scans(table) == [
        {"image": str(tmp_path / "s1/T1w.nii.gz"), "name": "me"},
        {
            "image": str(tmp_path / "s2/FLAIR.nii"),
            "name": "FLAIR",
            "frame": 2,
            "lesions": str(tmp_path / "s2/lesions.nii"),
        },
    ]
    table.write_text("path\nx\n")
    with pytest.raises(ValueError, match=r"scans\.tsv: a table of scans needs the column 'image', found path"):
        find_scans(table)


def test_a_bids_dataset_gives_its_anatomical_images(tmp_path: Path) -> None:
    touch(tmp_path, "dataset_description.json", "sub-01/anat/sub-01_T1w.nii.gz", "sub-01/anat/sub-01_FLAIR.nii.gz")
    touch(tmp_path, "sub-02/ses-a/anat/sub-02_ses-a_run-1_T2w.nii", "sub-02/ses-a/func/sub-02_ses-a_bold.nii.gz")
    touch(tmp_path, "sub-01/anat/sub-01_desc-x_mask.nii.gz", "derivatives/x/sub-01/anat/sub-01_T1w.nii.gz")
    found = find_scans(tmp_path, tmp_path / "derivatives/maps")
    assert [(scan["name"], scan["folder"]) for scan in found] == [
        ("sub-01_space-FLAIR", "sub-01/anat"),
        ("sub-01_space-T1w", "sub-01/anat"),
        ("sub-02_ses-a_run-1_space-T2w", "sub-02/ses-a/anat"),
    ]
    for label in ("02", "sub-02", ["02"], "02,"):
        assert [scan["name"] for scan in find_scans(tmp_path, None, label)] == ["sub-02_ses-a_run-1_space-T2w"]
    with pytest.raises(FileNotFoundError, match=r"the participants 03, 7 are wanted, found no such folders sub-\*"):
        find_scans(tmp_path, None, ["03", 7])
    with pytest.raises(ValueError, match="'participant_label' needs a BIDS dataset"):
        find_scans(tmp_path / "sub-01", None, "01")
