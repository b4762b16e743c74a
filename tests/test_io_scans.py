"""Finding scans and naming them; what is found among them and left out."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from pathlib import Path

import pytest

from brainfm_monai.io import Scan, ScanError, find_scans, make_scans, unique_names


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def names_of(scans: list[Scan]) -> list[str]:
    return [scan.name for scan in scans if not scan.skipped]


def left_out(scans: list[Scan]) -> dict[str, str]:
    return {Path(scan.path).name: scan.skipped or scan.problem for scan in scans if scan.skipped or scan.problem}


def test_a_folder_is_searched_in_order_and_what_is_no_scan_is_listed(tmp_path: Path) -> None:
    touch(tmp_path, "b.nii", "b.json", "a/c.mgz", "a/.hidden.nii", ".git/x.nii", "notes.txt", "T1.v2.NII.GZ")
    found = find_scans(tmp_path)
    images = [scan.path for scan in found if not scan.skipped]
    assert images == [str(tmp_path / name) for name in ("T1.v2.NII.GZ", "a/c.mgz", "b.nii")]
    assert names_of(found) == ["T1.v2", "c", "b"]
    reasons = left_out(found)
    assert set(reasons) == {".hidden.nii", "notes.txt"}
    assert reasons["notes.txt"].startswith("not a scan: a file of the kind .nii.gz, ")


def test_links_pipes_loops_and_unreadable_files_are_listed_with_the_reason(tmp_path: Path) -> None:
    source = tmp_path / "in"
    touch(source, "good.nii", "sub/deep.nii", "closed.nii")
    touch(tmp_path, "elsewhere/far.nii")
    (source / "loop.nii.gz").symlink_to("loop.nii.gz")
    (source / "dead.nii.gz").symlink_to("annex/gone")
    (source / "sub/up").symlink_to(source, target_is_directory=True)
    (source / "linked").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    os.mkfifo(source / "pipe.nii")
    (source / "folder.nii.gz").mkdir()
    (source / "closed.nii").chmod(0)
    found = find_scans(source)
    assert names_of(found) == ["closed", "dead", "good", "far", "loop", "pipe", "deep"]
    reasons = left_out(found)
    assert reasons["loop.nii.gz"] == "a link to itself"
    assert reasons["dead.nii.gz"] == "a dead link, to annex/gone"
    assert reasons["pipe.nii"] == "a regular file is needed, found a named pipe, a socket or a device"
    assert reasons["up"] == f"the same folder as {source}, which is searched already"
    assert ("closed.nii" in reasons) == (os.geteuid() != 0)
    assert find_scans(source / "loop.nii.gz")[0].problem == "a link to itself"


def test_results_of_earlier_runs_are_not_scans(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii", "out/a/a_dseg.nii.gz", "old/a/a_dseg.nii.gz", "old/a/mine.nii")
    (tmp_path / "old/a/a_finished.json").write_text(json.dumps({"files": ["a_dseg.nii.gz"]}))
    found = find_scans(tmp_path, tmp_path / "out")
    assert names_of(found) == ["a", "mine"]
    assert left_out(found) == {"out": "the folder of the results", "a_finished.json": "results of an earlier run"}
    with pytest.raises(
        ValueError, match="results need a folder of their own, found output_dir to be the folder of the"
    ):
        find_scans(tmp_path, tmp_path / "out/..")


def test_equal_stems_get_different_names(tmp_path: Path) -> None:
    touch(tmp_path, "s1/anat/T1w.nii.gz", "s2/anat/T1w.nii.gz", "s2/anat/T1w.mgz", "s1/FLAIR.nii", "t1W.nii")
    touch(tmp_path, "s1_anat/T1w.nii")
    assert names_of(find_scans(tmp_path)) == [
        "FLAIR",
        "s1_anat_T1w",
        "s1_anat_T1w-2",
        "s2_anat_T1w",
        "s2_anat_T1w-2",
        "t1W",
    ]
    assert unique_names([Path("caf\u00e9.nii"), Path("cafe\u0301.nii")]) == ["caf\u00e9", "cafe\u0301-2"]


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a/b", "a\\b", "../../victim", ".hidden", "a\nb", "a\0", "x" * 151, "summary.tsv", "\udcff"]
)
def test_a_name_that_could_leave_the_output_folder_is_refused(name: str) -> None:
    with pytest.raises(ScanError, match=r"^scan\.nii: the name of a scan must be one visible file name"):
        Scan(name, "scan.nii")
    with pytest.raises(ScanError, match="the name of a scan must be") if name != "a/b" else nullcontext():
        Scan("good", "scan.nii", folder=f"sub-01/{name}")


@pytest.mark.parametrize(
    "name", ["2024_05_02", "1.10", "a#1", "$HOME", "%x", "@x", "-x", "a b", "Étude n° 1 [x]", "=1+1", "<b>"]
)
def test_any_visible_name_is_kept(name: str, tmp_path: Path) -> None:
    assert Scan(name).name == name
    touch(tmp_path, f"{name}.nii.gz")
    assert names_of(find_scans(tmp_path)) == [name]
    (tmp_path / "list.tsv").write_text(f"image\tname\n{name}.nii.gz\t{name}\n", encoding="utf-8")
    assert [(scan.name, scan.path) for scan in find_scans(tmp_path / "list.tsv")] == [
        (name, str(tmp_path / f"{name}.nii.gz"))
    ]


def test_file_names_that_no_name_can_have_are_mended(tmp_path: Path) -> None:
    paths = [Path("a\nb.nii"), Path(os.fsdecode(b"\xff.nii")), Path("x" * 240 + ".nii"), Path(".h.nii")]
    names = unique_names(paths)
    assert names[:2] == ["a_b", "_"]
    assert len(names[2]) == 150
    assert names[3] == "h"
    for name in names:
        Scan(name)


def test_items_of_datalists_are_scans() -> None:
    scan = Scan("me", "a/b.nii.gz", "sub-01/anat", 2)
    assert scan.item == {"image": "a/b.nii.gz", "name": "me", "folder": "sub-01/anat", "frame": 2}
    assert Scan.of({**scan.item, "label": "x.nii"}) == scan
    with pytest.raises(ScanError, match="the name of a scan must be"):
        Scan.of({"image": "a.nii", "name": "../../../victim"})
    bad, twice, good = make_scans([{"image": "a.nii", "name": "../v"}, {"image": "b.nii"}, {"image": "b.nii"}])
    assert (bad.name, twice.name, good.name) == ("v", "b", "b-2")
    assert bad.problem.startswith("the name of a scan must be")
    assert not good.problem


def test_a_file_is_one_scan_and_must_look_like_one(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii.gz", "b.dcm")
    assert find_scans(tmp_path / "a.nii.gz") == [Scan("a", str(tmp_path / "a.nii.gz"))]
    with pytest.raises(ValueError, match=r"b\.dcm: a scan is a file of the kind \.nii\.gz, .*, found another suffix"):
        find_scans(tmp_path / "b.dcm")
    assert find_scans("") == []


def test_a_pattern_lists_scans(tmp_path: Path) -> None:
    touch(tmp_path, "[x]/s1/T1w.nii.gz", "[x]/s2/T1w.nii.gz", "[x]/s2/T1w.txt", "[x]/s2/FLAIR.nii")
    found = find_scans(str(tmp_path / "[x]/*/T1w*"))
    assert names_of(found) == ["s1_T1w", "s2_T1w"]
    assert list(left_out(found)) == ["T1w.txt"]
    with pytest.raises(FileNotFoundError, match=r"a pattern of scans \(.*\) is needed, found none"):
        find_scans(str(tmp_path / "*/T2w*"))


def test_a_table_lists_scans_and_a_bad_row_is_one_bad_scan(tmp_path: Path) -> None:
    touch(tmp_path, "s1/T1w.nii.gz", "s2/T1w.nii.gz", "s2/FLAIR.nii")
    table = tmp_path / "scans.tsv"
    table.write_text(
        "image\tname\tframe\tnote\ts\ns1/T1w.nii.gz\tme\tn/a\t\t\ns2/FLAIR.nii\t\t2\tmine\t\n"
        "s2/T1w.nii.gz\tme\t\t\t\ns1/T1w.nii.gz\t../x\t\t\t\ns1/none.nii\t=1+1\t\t\t\n"
    )
    good, flair, twice, outside, absent = find_scans(table)
    assert good == Scan("me", str(tmp_path / "s1/T1w.nii.gz"))
    assert flair == Scan("FLAIR", str(tmp_path / "s2/FLAIR.nii"), "", 2)
    assert (twice.name, twice.problem) == ("me-2", "the names of scans must differ, found 'me' twice")
    assert outside.problem.startswith("the name of a scan must be one visible file name")
    assert (absent.name, absent.problem) == ("=1+1", "no such file")
    for text, found in {"path\nx\n": "path", "": "no rows"}.items():
        table.write_text(text)
        with pytest.raises(ValueError, match=rf"scans\.tsv: a table of scans needs the column 'image', found {found}"):
            find_scans(table)


def test_a_bids_dataset_gives_its_anatomical_images(tmp_path: Path) -> None:
    touch(tmp_path, "dataset_description.json", "sub-01/anat/sub-01_T1w.nii.gz", "sub-01/anat/sub-01_FLAIR.nii.gz")
    touch(tmp_path, "sub-02/ses-a/anat/sub-02_ses-a_run-1_T2w.nii", "sub-02/ses-a/func/sub-02_ses-a_bold.nii.gz")
    touch(tmp_path, "sub-01/anat/sub-01_desc-x_mask.nii.gz", "derivatives/x/sub-01/anat/sub-01_T1w.nii.gz")
    touch(tmp_path, "sub-01/anat/sub-01_T1w.json", "sub-02/anat/sub-01_T1w.nii.gz", "extra.nii")
    (tmp_path / "sub-02/anat/sub-02_T1w.nii.gz").symlink_to("../../.git/annex/gone")
    found = find_scans(tmp_path, tmp_path / "derivatives/maps")
    assert [(scan.name, scan.folder) for scan in found if not scan.skipped] == [
        ("sub-01_space-FLAIR", "sub-01/anat"),
        ("sub-01_space-T1w", "sub-01/anat"),
        ("sub-01_space-T1w-2", "sub-02/anat"),
        ("sub-02_space-T1w", "sub-02/anat"),
        ("sub-02_ses-a_run-1_space-T2w", "sub-02/ses-a/anat"),
    ]
    reasons = left_out(found)
    assert reasons["sub-02_T1w.nii.gz"] == "a dead link, to ../../.git/annex/gone"
    assert reasons["sub-01_desc-x_mask.nii.gz"].startswith("the BIDS suffix 'mask' is none of T1w, ")
    assert reasons["func"] == "1 files that are not anatomical images"
    assert reasons["extra.nii"] == "lies outside the folders sub-*"
    for label in ("01", "sub-01", ["01"], "01,", "01 01"):
        assert names_of(find_scans(tmp_path, None, label)) == ["sub-01_space-FLAIR", "sub-01_space-T1w"]
    assert left_out(find_scans(tmp_path, None, "01 03"))["sub-03"] == "no such folder"
    with pytest.raises(FileNotFoundError, match=r"the participants 03, 7 are wanted, found no such folders sub-\*"):
        find_scans(tmp_path, None, ["03", 7])
    with pytest.raises(ValueError, match="'participant_label' needs a BIDS dataset"):
        find_scans(tmp_path / "sub-01", None, "01")


@pytest.mark.parametrize("folder", ["sub-0\n2", "sub-0\x1b[31m2", os.fsdecode(b"sub-0\xff2"), "sub-" + "x" * 160])
def test_a_bids_subject_whose_folder_no_results_can_have_is_one_bad_scan(tmp_path: Path, folder: str) -> None:
    touch(tmp_path, "sub-01/anat/sub-01_T1w.nii.gz", f"{folder}/anat/sub-02_T1w.nii.gz", f"{folder}/anat/notes.txt")
    found = find_scans(tmp_path)
    good, bad = sorted((scan for scan in found if not scan.skipped), key=lambda scan: scan.name)
    assert [good.name, bad.name] == ["sub-01_space-T1w", "sub-02_space-T1w"]
    assert (good.folder, good.problem) == ("sub-01/anat", "")
    assert bad.folder == ""
    assert bad.problem.startswith("the name of a scan must be one visible file name of 1 to 150 bytes without ")
    assert bad.problem.endswith(f"found {folder!a}")
    assert left_out(found)["notes.txt"].startswith("not a scan")
    assert make_scans([scan.item for scan in (good, bad)]) == [good, bad]
    items = [{"image": "a.nii", "name": "a", "folder": "../.."}, {"image": "b.nii", "name": "b", "folder": "b/anat"}]
    assert [(scan.folder, bool(scan.problem)) for scan in make_scans(items)] == [("", True), ("b/anat", False)]


def test_a_bids_image_whose_name_contradicts_its_folder_fails_and_a_phase_image_is_skipped(tmp_path: Path) -> None:
    for name in ("sub-01/ses-1/anat/sub-02_ses-1_T1w", "sub-01/ses-1/anat/sub-01_ses-2_T1w",
                 "sub-01/ses-1/anat/sub-01_ses-1_part-phase_T1w", "sub-01/ses-1/anat/sub-01_ses-1_part-mag_T1w",
                 "derivatives/x/sub-01/anat/sub-01_desc-preproc_T1w"):  # fmt: skip
        touch(tmp_path, f"{name}.nii.gz")
    scans = {Path(scan.path).name: scan for scan in find_scans(tmp_path)}
    assert scans["sub-02_ses-1_T1w.nii.gz"].problem.endswith("found sub-02 in sub-01")
    assert scans["sub-01_ses-2_T1w.nii.gz"].problem.endswith("found ses-2 in ses-1")
    assert "part-phase" in scans["sub-01_ses-1_part-phase_T1w.nii.gz"].skipped
    assert not scans["sub-01_ses-1_part-mag_T1w.nii.gz"].problem
    assert scans["derivatives"].skipped == "lies outside the folders sub-*"


def test_names_that_show_nothing_or_turn_the_text_around_are_mended_and_blanks_at_the_end_do_not_count(
    tmp_path: Path,
) -> None:
    for name in ("a\u200bb", "\u202eevil", "line\u2028end", "x", "x.", "x ", "\U0001f469\u200d\U0001f52c"):
        touch(tmp_path, f"{name}.nii.gz")
    names = [scan.name for scan in find_scans(tmp_path)]
    assert {"a_b", "_evil", "line_end", "\U0001f469\u200d\U0001f52c"} < set(names)
    assert len({name.rstrip(". ") for name in names}) == len(names)


def test_a_table_with_one_column_twice_is_refused_and_a_path_that_none_can_be_is_one_bad_scan(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii.gz")
    (tmp_path / "twice.tsv").write_text("image\timage\na.nii.gz\tb.nii.gz\n")
    with pytest.raises(ValueError, match="columns with different names are needed, found twice: image"):
        find_scans(tmp_path / "twice.tsv")
    (tmp_path / "bad.tsv").write_text("image\tnote\na.nii.gz\tmine\na\0.nii\tn/a\n")
    problems = [scan.problem for scan in find_scans(tmp_path / "bad.tsv")]
    assert problems[0] == ""
    assert "found embedded null byte" in problems[1]


def test_the_voxels_beside_a_header_are_part_of_its_content(tmp_path: Path) -> None:
    header, voxels = "a.hdr", "a.img"
    found = []
    for person in ("one", "two"):
        folder = tmp_path / person
        folder.mkdir()
        (folder / header).write_text("header")
        (folder / voxels).write_bytes(person.encode() * 8)
        found.append(Scan("a", str(folder / header)))
    assert found[0].hash_content() != found[1].hash_content()
    earlier = found[0].identify()
    (tmp_path / "one" / voxels).write_bytes(b"new" * 8)
    assert found[0].identify() != earlier


def test_a_time_that_a_program_sets_does_not_hide_a_change(tmp_path: Path) -> None:
    path = tmp_path / "a.nii"
    path.write_bytes(b"one")
    os.utime(path, (0, 0))
    earlier = Scan("a", str(path)).identify()
    path.write_bytes(b"two")
    os.utime(path, (0, 0))
    assert Scan("a", str(path)).identify() != earlier


def test_a_bids_participant_without_images_or_behind_a_dead_link_is_listed(tmp_path: Path) -> None:
    touch(tmp_path, "sub-01/anat/sub-01_T1w.nii.gz", "sub-04/func/sub-04_bold.nii.gz")
    (tmp_path / "sub-02").symlink_to("nowhere")
    (tmp_path / "sub-03").mkdir()
    found = find_scans(tmp_path)
    assert names_of(found) == ["sub-01_space-T1w", "sub-02"]
    assert left_out(found)["sub-02"] == "a dead link, to nowhere"
    assert left_out(found)["sub-03"] == left_out(found)["sub-04"] == "a participant without an anatomical image"


def test_a_table_with_an_open_quotation_mark_does_not_swallow_the_rows_after_it(tmp_path: Path) -> None:
    touch(tmp_path, "a.nii.gz", "b.nii.gz")
    (tmp_path / "scans.tsv").write_text('image\tnote\na.nii.gz\t"moved\nb.nii.gz\tstill\n')
    with pytest.raises(ValueError, match="a tab-separated table in UTF-8 is needed, found unexpected end of data"):
        find_scans(tmp_path / "scans.tsv")
