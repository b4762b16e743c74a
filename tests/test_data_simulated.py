"""Simulated contrasts: the tables' values at the right place, what is refused, and when a subject is made again."""

from __future__ import annotations

import csv
import json
from importlib import resources
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from monai.data import load_decathlon_datalist
from scipy import ndimage

from brainfm_monai.anatomy import Protocol
from brainfm_monai.data import freesurfer
from brainfm_monai.data import labels as label_maps
from brainfm_monai.data.datalist import count_subjects, make_entry, read_datalist, write_datalist
from brainfm_monai.data.labels import simulate_contrasts
from brainfm_monai.data.loading import LoadSubjectd
from brainfm_monai.data.prepare import PreparationError, prepare_subjects

SIZE = (32, 40, 36)
LARGE = (48, 48, 48)  # the whole head and some air
ALL = ("T1w", "T2w", "FLAIR", "CT")
PROTOCOL = Protocol.load("synthseg_generation")
# mm in RAS, as in the file below: (place, FreeSurfer id); the left has fluid and the right has a pallidum where the left has none
PLACES = (((-9, 0, 0), 4), ((9, 4, 0), 52), ((0, 17, 0), 507), ((-9, -13, 0), 8), ((14, -1, 0), 41))


def table_mean(name: str, freesurfer_id: int) -> float:
    """A mean of the package's tables, read apart from the package."""
    text = (resources.files("brainfm_monai") / "contrasts" / f"{name}.tsv").read_text(encoding="utf-8")
    rows = csv.DictReader(text.splitlines(), delimiter="\t")
    return next(float(row["mean"]) for row in rows if int(row["freesurfer_id"]) == freesurfer_id)


def save_head(path: Path, extra: int | None = None) -> Path:
    """An asymmetric head of 40 mm around the origin, stored with the axes left, inferior, anterior."""
    ids = np.zeros((48, 48, 48), dtype=np.int32)  # RAS voxel (i, j, k) is at (i - 24, j - 24, k - 24) mm
    ids[4:45, 4:45, 4:45] = 507
    ids[8:24, 8:40, 12:36] = 3
    ids[9:23, 14:34, 14:34] = 2
    ids[12:19, 20:28, 20:28] = 4
    ids[9:22, 8:14, 16:32] = 8
    ids[24:42, 10:40, 12:36] = 42
    ids[25:41, 14:34, 14:34] = 41
    ids[30:36, 25:31, 21:27] = 52
    if extra is not None:
        ids[24, 24, 24] = extra
    affine = np.array([[-1.0, 0, 0, 23], [0, 0, 1, -24], [0, -1, 0, 23], [0, 0, 0, 1]])
    nib.save(nib.Nifti1Image(np.transpose(ids, (0, 2, 1))[::-1, ::-1], affine), path)
    return path


def load(path: str | Path) -> Any:
    """An image with the attributes that nibabel's declared type lacks."""
    return nib.load(path)


def read_record(folder: Path) -> Any:
    return json.loads((folder / "subject.json").read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def registrations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Something in place of the registration, which has tests of its own; the list grows with every subject that is made."""
    done: list[int] = []

    def fake(ids: np.ndarray, affine: np.ndarray, factor: int, initial: None) -> tuple[np.ndarray, np.ndarray]:
        done.append(1)
        return np.zeros((*(n // factor for n in ids.shape), 3), dtype=np.float32), affine

    monkeypatch.setattr(freesurfer, "compute_mni_coordinates", fake)
    return done


def read_painted(folder: Path, *names: str) -> dict[str, Any]:
    """A subject as a training reads it: the contrasts are painted."""
    item: dict[str, Any] = LoadSubjectd(["generation_labels", *names], allow_missing_keys=False)(make_entry(folder))
    return item


@pytest.mark.parametrize("name", ALL)
def test_the_tables_values_lie_where_the_affine_says(tmp_path: Path, name: str) -> None:
    (folder,) = prepare_subjects("labels", save_head(tmp_path / "a.nii.gz"), tmp_path, size=SIZE, contrasts=[name])
    assert not (folder / f"{name}.nii.gz").exists()
    item = read_painted(folder, name)
    image, labels = item[name], item["generation_labels"]
    np.testing.assert_array_equal(image.affine, labels.affine)
    assert image.shape == (1, *SIZE)
    for place, freesurfer_id in PLACES:
        voxel = tuple(np.rint(np.linalg.inv(np.asarray(image.affine)) @ (*place, 1)).astype(int)[:3])
        assert PROTOCOL.freesurfer_ids[int(labels[0][voxel])] == freesurfer_id
        expected = table_mean(name, freesurfer_id) / (1 if name == "CT" else 255)
        assert float(image[0][voxel]) == pytest.approx(expected, abs=0.05 if name == "CT" else 1e-3), freesurfer_id


def test_every_voxel_away_from_a_boundary_has_its_mean_and_boundaries_lie_between(tmp_path: Path) -> None:
    (folder,) = prepare_subjects("labels", save_head(tmp_path / "a.nii.gz"), tmp_path, size=LARGE, contrasts="CT,T1w")
    item = read_painted(folder, "T1w", "CT")
    labels = item["generation_labels"][0].numpy()
    same = ndimage.minimum_filter(labels, 5) == ndimage.maximum_filter(labels, 5)
    ids = PROTOCOL.freesurfer_ids[labels]
    assert set(ids[same]) == {0, 2, 3, 4, 8, 41, 42, 52, 507}
    for name, air, scale in (("T1w", 0, 255), ("CT", -1000, 1)):
        values = item[name][0].numpy()
        for i in np.unique(ids[same]):
            expected = air if i == 0 else table_mean(name, i) / scale
            np.testing.assert_allclose(
                values[same & (ids == i)], expected, atol=0.05 if name == "CT" else 1e-3, err_msg=f"{name} {i}"
            )
    skin = values[(ids == 507) & ~same]  # of the CT: the outermost voxels of the head are mixed with air
    assert skin.min() < -100
    assert skin.min() > -500


def test_a_list_names_painted_contrasts_and_the_subjects_of_earlier_versions_keep_their_files(tmp_path: Path) -> None:
    out = tmp_path / "out"
    prepare_subjects("labels", [save_head(tmp_path / f"{n}.nii.gz") for n in "ab"], out, size=SIZE, contrasts=ALL)
    stored = nib.Nifti1Image(np.full(SIZE, 0.25, np.float32), np.eye(4))
    nib.save(stored, out / "b" / "T2w.nii.gz")  # earlier versions stored what they had painted
    path = write_datalist(out)
    assert count_subjects(read_datalist(path)).set_index("dataset").loc[tmp_path.name, "CT"] == 2
    for reader in (read_datalist(path, "training"), load_decathlon_datalist(path, True, "training")):
        painted, kept = (LoadSubjectd(ALL)(item) for item in reader)
        assert all(painted[name].shape == (1, *SIZE) for name in ALL)
        assert float(painted["T2w"].max()) == pytest.approx(221 / 255, abs=1e-3)
        assert float(kept["T2w"].max()) == 0.25
        np.testing.assert_array_equal(painted["T1w"], kept["T1w"])


def test_the_record_names_what_is_simulated(tmp_path: Path) -> None:
    source = save_head(tmp_path / "a.nii.gz")
    (folder,) = prepare_subjects("labels", source, tmp_path / "out", size=SIZE, contrasts="CT, T1w,CT")
    record = read_record(folder)
    assert record["simulated"] == ["T1w", "CT"]
    assert set(record["keys"]) == {"generation_labels", "segmentation", "distance", "mni"}
    (plain,) = prepare_subjects("labels", source, tmp_path / "plain", size=SIZE)
    assert "simulated" not in read_record(plain)
    with pytest.raises(KeyError, match="a: the item has no 'T1w'"):
        read_painted(plain, "T1w")


def test_a_subject_is_made_again_when_its_contrasts_change(tmp_path: Path, registrations: list[int]) -> None:
    source = save_head(tmp_path / "a.nii.gz")

    def times_made(contrasts: str | tuple[str, ...]) -> int:
        registrations.clear()
        prepare_subjects("labels", str(source), str(tmp_path / "out"), size=SIZE, contrasts=contrasts)
        return len(registrations)

    assert [times_made(()), times_made(())] == [1, 0]
    assert [times_made("T1w"), times_made(("T1w",))] == [1, 0]
    assert [times_made("T1w,CT"), times_made(("CT", "T1w"))] == [1, 0], "their order does not count"
    assert times_made(()) == 0, "a subject that has more than is asked for is finished"
    assert times_made("CT") == 1
    assert read_record(tmp_path / "out" / "a")["simulated"] == ["CT"]


def test_mixtures_get_the_weighted_means_of_their_parts() -> None:
    protocol = Protocol.load("brainfm_generation")
    mixed = protocol.structures[protocol.label_of_id[164]]
    labels = np.full((8, 8, 8), mixed.label, dtype=np.uint8)
    images = simulate_contrasts(labels, np.eye(4), protocol, ["T1w", "CT"], "a")
    for name, scale in (("T1w", 255), ("CT", 1)):
        expected = sum(share * table_mean(name, i) for i, share in mixed.mixture) / scale
        np.testing.assert_allclose(images[name], expected, rtol=1e-5)
        assert expected != table_mean(name, mixed.freesurfer_id) / scale, (
            "the code's number is an id of another structure"
        )


def test_an_id_that_a_table_lacks_is_refused_in_one_line(tmp_path: Path) -> None:
    table = tmp_path / "own.tsv"
    shipped = (resources.files("brainfm_monai") / "protocols" / "synthseg_generation.tsv").read_text(encoding="utf-8")
    rows = [shipped.rstrip().replace("\tincludes", "\tincludes\tmixture", 1)]
    for label, i, mixture in ((len(PROTOCOL), 900, ""), (len(PROTOCOL) + 1, 901, "900:0.5 2:0.5")):
        rows.append(f"{label}\t{i}\tOwn-{i}\tnone\t{label}\t1\t2\t3\t\t{mixture}")
    table.write_text("\n".join(rows), encoding="utf-8")
    settings: dict[str, Any] = {"generation_protocol": str(table), "protocol": str(table), "size": SIZE}
    for extra in (900, 901):  # the mixture is refused for the part that has no mean
        source = save_head(tmp_path / f"{extra}.nii.gz", extra=extra)
        with pytest.raises(PreparationError) as caught:
            prepare_subjects("labels", source, tmp_path / "out", contrasts=["T1w"], **settings)
        line = f"{source}: the table of T1w must know every id that is painted, found no [900]"
        assert str(caught.value).splitlines() == ["1 of 1 subjects were not prepared:", line]
        assert not (tmp_path / "out" / str(extra)).exists()
        prepare_subjects("labels", source, tmp_path / "out", **settings)
    known = save_head(tmp_path / "known.nii.gz")
    prepare_subjects(
        "labels", known, tmp_path / "out", contrasts=["T1w"], **settings
    )  # what no voxel holds need not be known
    table.unlink()  # the subjects have a copy beside them
    path = write_datalist(tmp_path / "out", tmp_path / "lists" / "all.json")
    assert json.loads(path.read_text(encoding="utf-8"))["training"][-1]["protocol"] == "../out/own.tsv"
    item = read_datalist(path, "training", "own.tsv")[-1]
    assert float(LoadSubjectd(["T1w"])(item)["T1w"].max()) > 0.3


@pytest.mark.parametrize("names", ["T1w,PD", ["PD"]])
def test_contrasts_that_are_none(tmp_path: Path, names: str | list[str]) -> None:
    with pytest.raises(ValueError, match=r"^prepare: 'contrasts' must be out of T1w, T2w, FLAIR, CT, found PD$"):
        prepare_subjects("labels", save_head(tmp_path / "a.nii.gz"), tmp_path / "out", contrasts=names)
    assert not (tmp_path / "out").exists()


def test_the_smoothing_is_in_mm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(label_maps, "SMOOTHING_MM", 1.0)
    labels = np.zeros((21, 21, 21), dtype=np.uint8)
    labels[10:] = PROTOCOL.label_of_id[2]
    fine = simulate_contrasts(labels, np.diag([0.5, 0.5, 0.5, 1]), PROTOCOL, ["T1w"], "a")["T1w"]
    monkeypatch.setattr(label_maps, "SMOOTHING_MM", 2.0)
    coarse = simulate_contrasts(labels, np.eye(4), PROTOCOL, ["T1w"], "a")["T1w"]
    np.testing.assert_array_equal(fine, coarse)
