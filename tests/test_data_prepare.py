"""Prepared subjects: what is in the files, and how the preparation of many goes on after trouble."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from monai.data import load_decathlon_datalist

from brainfm_monai.anatomy import Protocol
from brainfm_monai.data import freesurfer, prepare, subjects
from brainfm_monai.data.datalist import write_datalist
from brainfm_monai.data.loading import LoadSubjectd
from brainfm_monai.data.prepare import PreparationError, prepare_label, prepare_subjects
from brainfm_monai.data.registration import coarsen_affine, compute_jacobian
from brainfm_monai.data.subjects import Source
from brainfm_monai.io import write_whole

SIZE = (32, 40, 36)
FILES = ("generation_labels.nii.gz", "segmentation.nii.gz", "distance.nii.gz", "mni.nii.gz")


def load(path: str | Path) -> Any:
    """An image with the attributes that nibabel's declared type lacks."""
    return nib.load(path)


def make_head() -> np.ndarray:
    """Left cortex around white matter and a ventricle, a smaller right side, cerebellum, skin all around."""
    ids = np.full((48, 48, 48), 511, dtype=np.int32)
    ids[4:44, 4:44, 4:44] = 24
    ids[10:24, 10:36, 12:34] = 3
    ids[13:22, 13:33, 15:31] = 2
    ids[16:20, 18:28, 20:26] = 4
    ids[25:37, 12:34, 14:32] = 42
    ids[28:34, 15:31, 17:29] = 41
    ids[18:30, 8:16, 7:12] = 8
    return ids


def save_head(path: Path, ids: np.ndarray | None = None) -> Path:
    """Save a head with the axes of the SynthSeg maps, left-inferior-anterior."""
    affine = np.array([[-1.0, 0, 0, 24], [0, 0, 1, -20], [0, -1, 0, 30], [0, 0, 0, 1]])
    turned = np.transpose(make_head() if ids is None else ids, (0, 2, 1))[::-1, ::-1]
    nib.save(nib.Nifti1Image(turned, affine), path)
    return path


def fake_coordinates(
    ids: np.ndarray, affine: np.ndarray, factor: int, initial: object
) -> tuple[np.ndarray, np.ndarray]:
    """World coordinates shifted by 2 mm to the right: stands in for the registration, which has tests of its own."""
    grid = coarsen_affine(affine, factor)
    index = np.stack(np.meshgrid(*(np.arange(n // factor) for n in ids.shape), indexing="ij"), axis=-1)
    return (index @ grid[:3, :3].T + grid[:3, 3] + (2, 0, 0)).astype(np.float32), grid


@pytest.fixture(autouse=True)
def _no_registration(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not request.node.get_closest_marker("shared_data"):
        monkeypatch.setattr(freesurfer, "compute_mni_coordinates", fake_coordinates)


def test_subject_has_all_files_on_their_grids(tmp_path: Path) -> None:
    (folder,) = prepare_subjects("labels", save_head(tmp_path / "sub-01.nii.gz"), tmp_path / "out", size=SIZE)
    assert folder == tmp_path / "out" / "sub-01"
    assert sorted(f.name for f in folder.iterdir()) == sorted((*FILES, "subject.json"))
    images = {name: load(folder / name) for name in FILES}
    generation, segmentation, distance, mni = images.values()
    assert generation.shape == segmentation.shape == distance.shape[:3] == SIZE
    assert distance.shape[3] == 4
    assert mni.shape == (8, 10, 9, 3)
    assert [i.get_data_dtype() for i in images.values()] == [np.uint8, np.uint8, np.uint8, np.int16]
    for image in (generation, segmentation, distance):
        np.testing.assert_array_equal(image.affine, generation.affine)
        assert nib.aff2axcodes(image.affine) == ("R", "A", "S")
    np.testing.assert_allclose(mni.affine, coarsen_affine(generation.affine, 4))
    record = json.loads((folder / "subject.json").read_text(encoding="utf-8"))
    assert record["sources"]["labels"]["name"] == "sub-01.nii.gz"
    assert record["kind"] == "labels"
    assert record["dataset"] == tmp_path.name
    assert record["generation_protocol"] == "synthseg_generation"
    assert record["spatial_size"] == list(SIZE)
    assert len(record["sources"]["labels"]["sha256"]) == 64
    assert str(tmp_path.parent) not in json.dumps(record)


def test_labels_and_distances_lie_where_the_source_says(tmp_path: Path) -> None:
    (folder,) = prepare_subjects("labels", save_head(tmp_path / "sub-01.nii.gz"), tmp_path, size=SIZE)
    protocol = Protocol.load("synthseg_head")
    segmentation = load(folder / "segmentation.nii.gz")
    labels = np.asarray(segmentation.dataobj)
    # RAS voxel (i, j, k) of the head is at (i - 23, j - 20, k - 17) mm
    for position, structure in (((-5, 0, 5), "Left-Lateral-Ventricle"), ((8, 3, 5), "Right-Cerebral-White-Matter")):
        voxel = np.rint(np.linalg.inv(segmentation.affine) @ (*position, 1)).astype(int)[:3]
        assert protocol.structures[labels[tuple(voxel)]].name == structure
    for name, labels_of in (("segmentation", protocol), ("generation_labels", Protocol.load("synthseg_generation"))):
        ids = labels_of.freesurfer_ids[np.asarray(load(folder / f"{name}.nii.gz").dataobj)]
        assert (ids == 4).sum() == (make_head() == 4).sum()
        assert (ids == 42).sum() == (make_head() == 42).sum()
    distance = load(folder / "distance.nii.gz").get_fdata()
    assert distance.min() == pytest.approx(-6.4, abs=1e-4)
    assert distance.max() == pytest.approx(6.35, abs=1e-4)  # saturated
    world_x = np.arange(SIZE[0]) + segmentation.affine[0, 3]
    for channel, inside_is_left in enumerate((True, True, False, False)):
        x = world_x[np.argwhere(distance[..., channel] < 0)[:, 0]]
        assert (x < 1).all() if inside_is_left else (x > 1).all()
    ids = protocol.freesurfer_ids[labels]
    np.testing.assert_array_equal(distance[..., 3] < 0, ids == 41)
    np.testing.assert_array_equal(distance[..., 0] < 0, np.isin(ids, (2, 3, 4)))
    assert distance[..., 2][ids == 42].max() == pytest.approx(
        -0.5, abs=0.026
    )  # half a voxel, and half a step of rounding
    mni = load(folder / "mni.nii.gz")
    shift = mni.get_fdata()[2, 3, 4] - (mni.affine @ (2, 3, 4, 1))[:3]
    np.testing.assert_allclose(shift, (2, 0, 0), atol=0.006)  # half a step of rounding


def test_the_box_is_around_the_brain(tmp_path: Path) -> None:
    (folder,) = prepare_subjects("labels", save_head(tmp_path / "sub-01.nii.gz"), tmp_path, size=(64, 64, 64))
    labels = Protocol.load("synthseg_head").freesurfer_ids[np.asarray(load(folder / "segmentation.nii.gz").dataobj)]
    where = np.argwhere(np.isin(labels, (2, 3, 4, 8, 41, 42)))
    np.testing.assert_allclose((where.min(axis=0) + where.max(axis=0)) / 2, 31.5, atol=0.5)
    assert (labels[0] == 0).all()  # nothing but padding out there


def test_many_maps_one_bad(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    maps = tmp_path / "maps"
    maps.mkdir()
    save_head(maps / "a.nii.gz")
    unknown = make_head()
    unknown[0, 0, 0] = 999  # far from the brain, and still an error
    save_head(maps / "b.nii.gz", unknown)
    (maps / "c.nii").write_text("no image", encoding="utf-8")
    save_head(maps / "d.nii.gz")
    with pytest.raises(PreparationError) as caught:
        prepare_subjects("labels", maps, tmp_path / "out", size=SIZE)
    message = str(caught.value).splitlines()
    assert message[0] == "2 of 4 subjects were not prepared:"
    assert "b.nii.gz" in message[1]
    assert "999" in message[1]
    assert "c.nii: a NIfTI header is needed" in message[2]
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["a", "d"]
    assert "4/4" in capsys.readouterr().err


def test_finished_subjects_are_skipped_and_changed_ones_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = [save_head(tmp_path / f"{name}.nii.gz") for name in "abc"]
    assert prepare_subjects("labels", sources, tmp_path / "out", size=SIZE) == [
        tmp_path / "out" / name for name in "abc"
    ]
    done: list[str] = []

    def note(source: Source, output_dir: Path) -> list[str]:
        done.append(source.place.name)
        return []

    monkeypatch.setattr(prepare, "make_subject", note)
    prepare_subjects("labels", sorted(tmp_path.glob("*.nii.gz")), tmp_path / "out", size=SIZE)
    assert done == []
    (tmp_path / "out" / "a" / "mni.nii.gz").unlink()
    changed = make_head()
    changed[20, 20, 20] = 30
    save_head(sources[1], changed)
    prepare_subjects("labels", sources, tmp_path / "out", size=SIZE)
    assert done == ["a.nii.gz", "b.nii.gz"]
    done.clear()
    prepare_subjects("labels", sources, tmp_path / "out", size=(32, 32, 32))
    assert len(done) == 3
    done.clear()
    prepare_subjects("labels", sources[:1], tmp_path / "out", size=SIZE, overwrite=True)
    assert done == ["a.nii.gz"]


def test_an_interrupted_subject_leaves_nothing_and_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_head(tmp_path / "a.nii.gz")
    save, written = nib.save, []

    def stop_at_the_third(image: Any, path: Path) -> None:
        written.append(path)
        if len(written) == 3:
            raise KeyboardInterrupt
        save(image, path)

    monkeypatch.setattr(subjects.nib, "save", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        prepare_subjects("labels", source, tmp_path / "out", size=SIZE)
    assert not list((tmp_path / "out").iterdir())
    monkeypatch.setattr(subjects.nib, "save", save)
    leftover = tmp_path / "out" / ".0123abcd.partial.a"  # as a power cut leaves it
    leftover.mkdir()
    (leftover / "mni.nii.gz").write_text("half", encoding="utf-8")
    prepare_subjects("labels", source, tmp_path / "out", size=SIZE)
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["a"]


def test_a_folder_that_another_process_fills_is_left_alone(tmp_path: Path) -> None:
    target = tmp_path / "a"
    with write_whole(target, folder=True) as first:
        (first / "one").touch()
        with write_whole(target, folder=True) as second:
            (second / "two").touch()
        assert first.is_dir()
        assert [f.name for f in target.iterdir()] == ["two"]
    assert [f.name for f in tmp_path.rglob("*")] == ["a", "one"]


def test_a_table_translates_ids_of_ones_own(tmp_path: Path) -> None:
    ids = make_head()
    own = np.zeros_like(ids)
    table = ["id\tfreesurfer_id"]
    for number, i in enumerate(np.unique(ids), start=100):
        own[ids == i] = number
        table.append(f"{number}\t{i}")
    (tmp_path / "ids.tsv").write_text("\n".join(table), encoding="utf-8")
    source, plain = save_head(tmp_path / "own.nii.gz", own), save_head(tmp_path / "plain.nii.gz")
    folders = prepare_subjects("labels", source, tmp_path / "out", size=SIZE, ids=tmp_path / "ids.tsv")
    folders += prepare_subjects("labels", plain, tmp_path / "out", size=SIZE)
    for key in ("generation_labels", "segmentation", "distance"):
        found, expected = (load(folder / f"{key}.nii.gz").get_fdata() for folder in folders)
        np.testing.assert_array_equal(found, expected)
    (tmp_path / "few.tsv").write_text("\n".join(table[:4]), encoding="utf-8")
    with pytest.raises(PreparationError, match=r"own\.nii\.gz: every id must be in the table of ids, found unknown"):
        prepare_subjects("labels", source, tmp_path / "other", size=SIZE, ids=tmp_path / "few.tsv")
    for rows, found in (
        ("1\telbow", "invalid literal"),
        ("1\t2\n1\t3", r"each id must stand once, found twice: \[1\]"),
    ):
        (tmp_path / "bad.tsv").write_text(f"id\tfreesurfer_id\n{rows}", encoding="utf-8")
        with pytest.raises(PreparationError, match=rf"bad\.tsv: .*{found}"):
            prepare_subjects("labels", source, tmp_path / "other", size=SIZE, ids=tmp_path / "bad.tsv")
    with pytest.raises(PreparationError, match=r"own\.nii\.gz: every id must be in protocol"):
        prepare_subjects("labels", source, tmp_path / "other", size=SIZE)


def test_a_corrected_scan_and_its_label_map_become_one_subject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The label map has ids of its own; the scan is stored with other axes."""
    made: list[int] = []

    def count(ids: np.ndarray, affine: np.ndarray, factor: int, initial: object) -> tuple[np.ndarray, np.ndarray]:
        made.append(1)
        return fake_coordinates(ids, affine, factor, initial)

    monkeypatch.setattr(freesurfer, "compute_mni_coordinates", count)
    ids = make_head()
    table: dict[int, int] = {}
    own = np.zeros_like(ids)
    for number, i in enumerate((2, 3, 41, 511, 4, 8, 24, 42), start=1):
        own[ids == i], table[number] = number, i
    label = save_head(tmp_path / "sub-01.nii.gz", own)
    t2w = np.select([ids == i for i in (2, 41, 3, 42, 4, 24, 8)], [60, 62, 85, 87, 200, 190, 80], 30).astype(np.float32)
    image = tmp_path / "scan.nii"
    nib.save(
        nib.Nifti1Image(t2w[:, ::-1], np.array([[1, 0, 0, -23], [0, -1, 0, 27], [0, 0, 1, -17], [0, 0, 0, 1.0]])), image
    )
    entry = prepare_label(image, label, tmp_path / "out", ids=table, size=SIZE)
    assert (entry["protocol"], entry["generation_protocol"]) == ("synthseg_head", "synthseg_generation")
    assert "T2w" in entry, "its contrast is recognised"
    assert entry["simulated"] == ["T1w", "FLAIR", "CT"]
    subject = LoadSubjectd(["segmentation", "T2w", "CT"])(entry)
    found = Protocol.load("synthseg_head").freesurfer_ids[subject["segmentation"][0].numpy()]
    scan = subject["T2w"][0].numpy()
    assert scan[found == 4].min() > scan[found == 3].max() > scan[found == 2].max()
    assert (found == 4).sum() == (ids == 4).sum()
    assert prepare_label(image, label, tmp_path / "out", ids=table, size=SIZE) == entry
    assert len(made) == 1, "the same content is prepared once"
    own[ids == 4] = 0
    save_head(tmp_path / "sub-01.nii.gz", own)
    assert prepare_label(image, label, tmp_path / "out", ids=table, size=SIZE)["subject"] != entry["subject"]
    assert len(made) == 2
    nib.save(nib.Nifti1Image(own, np.eye(4)), tmp_path / "far.nii.gz")  # off by half a head
    with pytest.raises(ValueError, match=r"scan\.nii: a scan on whose head the labels of far\.nii\.gz lie is needed"):
        prepare_label(image, tmp_path / "far.nii.gz", tmp_path / "out", ids=table, size=SIZE)


@pytest.mark.parametrize(
    ("axes", "rule"),
    [((0,), r"left and right: left hemisphere at x = \d+ mm"), ((1, 2), r"axes: cerebellum .* above the cerebrum")],
)
def test_heads_on_the_wrong_side_are_refused(tmp_path: Path, axes: tuple[int, ...], rule: str) -> None:
    source = save_head(tmp_path / "a.nii.gz", np.flip(make_head(), axes))
    with pytest.raises(PreparationError, match=rf"\n{source}: {rule}"):
        prepare_subjects("labels", source, tmp_path / "out", size=SIZE)
    assert list((tmp_path / "out").iterdir()) == []


def test_what_the_check_finds_is_reported_and_recorded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder,) = prepare_subjects("labels", save_head(tmp_path / "a.nii.gz"), tmp_path / "out", size=SIZE)
    faults = subjects.read_record(folder)["faults"]
    assert "head size: brain of 13 ml, 400 to 2600 are plausible" in faults
    assert [r.getMessage() for r in caplog.records if r.levelname == "WARNING"] == [f"a: {fault}" for fault in faults]


@pytest.mark.parametrize(
    ("inputs", "rule"),
    [("empty", "are needed, found none"), ("", "found twice: \\['a'\\]")],
)
def test_inputs_that_cannot_be_prepared(tmp_path: Path, inputs: str, rule: str) -> None:
    (tmp_path / "empty").mkdir()
    save_head(tmp_path / "a.nii.gz")
    save_head(tmp_path / "a.nii")
    with pytest.raises(ValueError, match=rule):
        prepare_subjects("labels", f"{tmp_path}/{inputs}", tmp_path / "out")


def test_sizes_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"three positive multiples of 4, found \(30, 32, 32\)"):
        prepare_subjects("labels", save_head(tmp_path / "a.nii.gz"), tmp_path, size=(30, 32, 32))
    with pytest.raises(PreparationError, match=r"b\.nii\.gz: .* found no such file"):
        prepare_subjects("labels", tmp_path / "b.nii.gz", tmp_path / "out", size=SIZE)


def test_arguments_of_another_kind_are_refused(tmp_path: Path) -> None:
    source = save_head(tmp_path / "a.nii.gz")
    with pytest.raises(ValueError, match=r"one of labels, freesurfer, bids is needed, found 'maps'"):
        prepare_subjects("maps", source, tmp_path / "out")
    rule = r"label maps are needed for 'ids', 'contrasts' and 'generation_protocol', found "
    with pytest.raises(ValueError, match=f"{rule}bids"):
        prepare_subjects("bids", tmp_path, tmp_path / "out", contrasts="CT")
    with pytest.raises(ValueError, match=f"{rule}freesurfer"):
        prepare_subjects("freesurfer", tmp_path, tmp_path / "out", generation_protocol="synthseg_generation")


def test_prepared_subjects_become_a_datalist(tmp_path: Path) -> None:
    prepare_subjects("labels", [save_head(tmp_path / f"{name}.nii.gz") for name in "ab"], tmp_path / "out", size=SIZE)
    path = write_datalist(tmp_path / "out", validation=["b"])
    training = load_decathlon_datalist(path, data_list_key="training")
    assert [Path(item["mni"]) for item in training] == [tmp_path / "out" / "a" / "mni.nii.gz"]
    assert load(training[0]["generation_labels"]).shape == SIZE


@pytest.mark.shared_data
def test_a_real_map_with_its_registration(tmp_path: Path, shared_data: Path) -> None:
    source = shared_data / "synthseg" / "training_label_maps" / "training_seg_09.nii.gz"
    (folder,) = prepare_subjects("labels", source, tmp_path)
    assert sum(f.stat().st_size for f in folder.iterdir()) < 25e6
    generation, mni = load(folder / "generation_labels.nii.gz"), load(folder / "mni.nii.gz")
    ids = Protocol.load("synthseg_generation").freesurfer_ids[np.asarray(generation.dataobj)][2::4, 2::4, 2::4]
    coordinates = mni.get_fdata()
    assert compute_jacobian(coordinates, mni.affine).min() > 0.15
    # centres of structures in MNI152 space, in mm
    for structure, centre in ((10, (-11, -18, 8)), (51, (26, 4, 1)), (17, (-26, -23, -14)), (8, (-25, -64, -36))):
        assert np.linalg.norm(coordinates[ids == structure].mean(axis=0) - centre) < 6, structure
