"""BIDS folders: what is found in them, and contrasts that end up on each other."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from brainfm_monai.anatomy import Protocol
from brainfm_monai.data import bids, freesurfer
from brainfm_monai.data.bids import find_bids, predicted_file
from brainfm_monai.data.contrasts import (
    BoxScan,
    align_scan,
    carry_lesion,
    check_hounsfield,
    find_removed,
    measure_motion,
    read_scan,
)
from brainfm_monai.data.prepare import PreparationError, prepare_subjects
from brainfm_monai.data.registration import coarsen_affine, resample_to_box
from brainfm_monai.data.subjects import CONTRASTS, read_record
from brainfm_monai.io import read_table

SIZE = (48, 44, 40)
AFFINE = np.array([[1.0, 0, 0, -24], [0, 1, 0, 10], [0, 0, 1, -31], [0, 0, 0, 1]])
INTENSITY = {
    "T1w": {2: 110, 41: 108, 3: 75, 42: 73, 4: 25, 24: 20},
    "T2w": {2: 60, 41: 62, 3: 85, 42: 87, 4: 150, 24: 140},
}
INTENSITY["FLAIR"] = {2: 70, 41: 71, 3: 95, 42: 94, 4: 20, 24: 18}


def make_head() -> np.ndarray:
    """A brain without symmetry in fluid."""
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in SIZE), indexing="ij"), axis=-1)
    ids = np.where((((grid - (24, 22, 20)) / (21, 19, 17)) ** 2).sum(axis=-1) < 1, 24, 0)
    for centre, radii, (cortex, white) in (
        ((14, 24, 21), (9, 14, 11), (3, 2)),
        ((32, 20, 19), (8, 11, 12), (42, 41)),
    ):
        depth = (((grid - centre) / radii) ** 2).sum(axis=-1)
        ids[depth < 1], ids[depth < 0.5] = cortex, white
        ids[depth < 0.08] = 4
    return ids.astype(np.int32)


def render(contrast: str) -> np.ndarray:
    ids = make_head()
    table = np.zeros(100)
    for i, value in INTENSITY[contrast].items():
        table[i] = value
    return gaussian_filter(table[ids], 0.5).astype(np.float32)


def save(path: Path, values: np.ndarray, affine: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(values, affine), path)
    return path


def make_motion() -> np.ndarray:
    angle = np.deg2rad(7)
    motion = np.eye(4)
    motion[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    motion[:3, 3] = (4, -5, 3)
    return motion


@pytest.fixture(autouse=True)
def _no_coordinates(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(ids: np.ndarray, affine: np.ndarray, factor: int, initial: object) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros((*(n // factor for n in ids.shape), 3), dtype=np.float32), coarsen_affine(affine, factor)

    monkeypatch.setattr(freesurfer, "compute_mni_coordinates", fake)


def load(path: Path) -> Any:
    return nib.load(path)


def test_visits_scans_masks_and_labels_are_found(tmp_path: Path) -> None:
    files = ["sub-01/ses-a/anat/sub-01_ses-a_T1w.nii.gz", "sub-01/ses-a/anat/sub-01_ses-a_acq-x_FLAIR.nii.gz"]
    files += ["sub-01/ses-b/anat/sub-01_ses-b_T2w.nii", "sub-02/ct/sub-02_ct.nii.gz", "sub-02/anat/sub-02_T1w.nii.gz"]
    files += ["sub-02/anat/sub-02_mod-T1w_defacemask.nii.gz", "sub-03/func/sub-03_bold.nii.gz"]
    files += ["derivatives/fastsurfer/sub-01_ses-a/mri/aparc.DKTatlas+aseg.deep.mgz"]
    files += ["derivatives/synthseg/sub-01/ses-b/anat/sub-01_ses-b_T2w_synthseg.nii.gz"]
    files += ["derivatives/fmriprep/sub-02/anat/sub-02_dseg.nii.gz"]  # grey, white, fluid: no FreeSurfer ids
    files += ["derivatives/fmriprep/sub-02/anat/sub-02_space-MNI_desc-aseg_dseg.nii.gz"]
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    first, second, third = find_bids(tmp_path)
    assert [s.name for s in (first, second, third)] == ["sub-01_ses-a", "sub-01_ses-b", "sub-02"]
    assert [[k for k in s.files if k in CONTRASTS] for s in (first, second, third)] == [
        ["T1w", "FLAIR"],
        ["T2w"],
        ["T1w", "CT"],
    ]
    assert first.files["labels"].name == "aparc.DKTatlas+aseg.deep.mgz"
    assert second.files["labels"].name == "sub-01_ses-b_T2w_synthseg.nii.gz"
    assert "labels" not in third.files
    assert third.files["T1w_mask"].name == "sub-02_mod-T1w_defacemask.nii.gz"
    with pytest.raises(FileNotFoundError, match="a BIDS folder with"):
        find_bids(tmp_path / "sub-01")


def test_labels_lesions_and_masks_of_other_scans_are_not_paired(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = {
        "1": "run-01_T1w run-02_T1w derivatives/run-02_desc-aseg_dseg run-01_label-lesion_mask run-02_mod-T1w_defacemask",
        "2": "acq-hires_T1w acq-std_T1w derivatives/acq-std_desc-aparcaseg_dseg acq-hires_mod-T1w_defacemask",
        "3": "T1w T2w derivatives/T2w_synthseg space-T2w_label-lesion_mask",
        "4": "T1w FLAIR derivatives/space-MNI152_desc-aseg_dseg FLAIR_label-lesion_roi",
        "5": "T2w FLAIR derivatives/desc-aseg_dseg",
        "6": "acq-a_T1w derivatives/desc-aseg_dseg derivatives/desc-aparcaseg_dseg label-lesion_mask",
        "7": "run-1_T1w run-2_T1w derivatives/desc-aseg_dseg part-phase_T2w",
        "8": "ses-1_T1w ses-2_T1w derivatives/ses-2_desc-aseg_dseg derivatives/label-lesion_mask",
        "10": "T1w derivatives/space-T1w_desc-aseg_dseg",
    }
    for person, names in files.items():
        for name in names.split():
            folder, _, rest = name.rpartition("/")
            path = tmp_path / folder / f"sub-{person}" / "anat" / f"sub-{person}_{rest}.nii.gz"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()

    def name_of(path: Path | None) -> str:
        return path.name.split("_", 1)[1].removesuffix(".nii.gz") if path else ""

    found = {}
    for s in find_bids(tmp_path):
        reference, *_ = s.files.values()
        masks = ",".join(name_of(path) for role, path in s.files.items() if role.endswith("_mask"))
        labels, lesion = (name_of(s.files.get(role)) for role in ("labels", "lesion"))
        found[s.name] = (name_of(reference), labels, lesion, s.facts.get("lesion_of", ""), masks)
    assert found == {
        "sub-1": ("run-02_T1w", "run-02_desc-aseg_dseg", "", "", "run-02_mod-T1w_defacemask"),
        "sub-2": ("acq-std_T1w", "acq-std_desc-aparcaseg_dseg", "", "", ""),
        "sub-3": ("T2w", "T2w_synthseg", "space-T2w_label-lesion_mask", "T2w", ""),
        "sub-4": ("T1w", "", "FLAIR_label-lesion_roi", "FLAIR", ""),
        "sub-5": ("T2w", "", "", "", ""),
        "sub-6": ("acq-a_T1w", "desc-aparcaseg_dseg", "label-lesion_mask", "", ""),
        "sub-7": ("run-1_T1w", "", "", "", ""),
        "sub-8_ses-1": ("ses-1_T1w", "", "", "", ""),
        "sub-8_ses-2": ("ses-2_T1w", "ses-2_desc-aseg_dseg", "", "", ""),
        "sub-10": ("T1w", "space-T1w_desc-aseg_dseg", "", "", ""),
    }
    warned = {record.getMessage().split(": not used")[0].rpartition("/")[2] for record in caplog.records}
    unused = ("1_run-01_label-lesion_mask", "4_space-MNI152_desc-aseg_dseg", "5_desc-aseg_dseg", "7_desc-aseg_dseg")
    assert warned == {f"sub-{name}.nii.gz" for name in (*unused, "8_label-lesion_mask")}


def test_freesurfer_does_not_tell_which_of_several_scans_or_visits_it_is_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scans = {"1": "T1w", "2": "run-1_T1w run-2_T1w T2w", "3": "ses-1_T1w ses-2_T1w", "4": "ses-9_T1w"}
    for person, names in scans.items():
        for name in names.split():
            (tmp_path / f"sub-{person}" / "anat").mkdir(parents=True, exist_ok=True)
            (tmp_path / f"sub-{person}" / "anat" / f"sub-{person}_{name}.nii.gz").touch()
        mri = tmp_path / "derivatives" / "freesurfer" / f"sub-{person}" / "mri"
        mri.mkdir(parents=True)
        for name in ("aseg.mgz", "orig.mgz"):
            (mri / name).touch()
    one, two, three, also_three, four = find_bids(tmp_path)
    assert (one.files["T1w"].name, list(one.files)) == ("sub-1_T1w.nii.gz", ["T1w", "labels"])
    assert (two.files["T1w"].name, list(two.files)) == ("orig.mgz", ["T1w", "T2w", "labels"])
    assert ["labels" in session.files for session in (three, also_three, four)] == [False, False, True]
    assert "sub-3: not used: it does not tell of which visit of sub-3 it is" in caplog.text
    assert caplog.text.count("not used") == 1


def test_a_lesion_is_brought_over_from_the_scan_on_which_it_was_drawn(tmp_path: Path) -> None:
    """The lesion lies left, in front and above in the head; the other scan was taken after the head had moved."""
    grid = np.array([[0, -1.0, 0, 40], [-1.0, 0, 0, 70], [0, 0, 1.0, -36], [0, 0, 0, 1]])
    shape, centre = (72, 80, 52), AFFINE[:3, :3] @ [12, 30, 26] + AFFINE[:3, 3]
    there = (make_motion() @ [*centre, 1])[:3]
    points = np.moveaxis(np.indices(shape), 0, -1) @ grid[:3, :3].T + grid[:3, 3]
    mask = (np.linalg.norm(points - there, axis=-1) < 4).astype(np.uint8)
    files = {"lesion": save(tmp_path / "lesion.nii.gz", mask, grid)}
    empty, seen = np.zeros(SIZE, np.float32), np.ones(SIZE, dtype=bool)

    def corners(shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
        index = np.array([(i, j, k) for i in (0, 1) for j in (0, 1) for k in (0, 1)])
        return np.asarray((index * (np.array(shape) - 1)) @ affine[:3, :3].T + affine[:3, 3])

    scans = {
        "T1w": BoxScan(empty, seen, np.eye(4), corners(SIZE, AFFINE)),
        "FLAIR": BoxScan(empty, seen, make_motion(), corners(shape, grid)),
    }
    for contrast in ("FLAIR", ""):  # named, or recognised by its grid
        found, fault = carry_lesion(files, contrast, scans, AFFINE)
        assert found is not None
        assert fault == ""
        np.testing.assert_allclose(np.argwhere(found).mean(axis=0), (12, 30, 26), atol=0.3)
        assert found.sum() == pytest.approx(mask.sum(), rel=0.05)
    shifted = {"lesion": save(tmp_path / "other.nii.gz", mask, grid + np.eye(4, k=3) * 5)}
    assert carry_lesion(shifted, "", scans, AFFINE)[1].startswith(
        "other.nii.gz is left out: its grid must be that of T1w or"
    )
    assert carry_lesion(files, "T2w", scans, AFFINE)[0] is None
    assert carry_lesion(files, "", {"T1w": scans["T1w"]}, AFFINE)[0] is not None, (
        "a name and a grid are not needed for one scan"
    )


def test_contrasts_end_up_on_the_labels_with_left_on_the_left(tmp_path: Path) -> None:
    root = tmp_path / "study"
    save(root / "sub-01/anat/sub-01_T1w.nii.gz", render("T1w"), AFFINE)
    # the other scan was taken after the head had moved, and is stored from right to left, front to back
    grid = np.diag([-1.0, -1.0, 1.0, 1.0])
    grid[:3, 3] = (40, 70, -36)
    moved = resample_to_box(render("T2w"), make_motion() @ AFFINE, grid, (72, 72, 52))
    save(root / "sub-01/anat/sub-01_T2w.nii.gz", moved, grid)
    save(root / "derivatives/synthseg/sub-01_T1w_synthseg.nii.gz", make_head(), AFFINE)
    lesion = np.zeros(SIZE, dtype=np.uint8)
    lesion[10:14, 20:26, 18:22] = 1
    save(
        root / "sub-01/anat/sub-01_label-lesion_roi.nii.gz",
        lesion[::-1],
        AFFINE @ np.array([[-1, 0, 0, 47], *np.eye(4)[1:]]),
    )
    (folder,) = prepare_subjects("bids", root, tmp_path / "out", size=SIZE)
    record = read_record(folder)
    assert (record["labels_from"], record["reference"], record["dataset"]) == ("derivatives", "T1w", "study")
    assert record["registered"]["T2w"]["rotation_deg"] == pytest.approx(7, abs=0.7)
    segmentation = load(folder / "segmentation.nii.gz")
    ids = Protocol.load("synthseg_brain").freesurfer_ids[np.asarray(segmentation.dataobj)]
    for contrast in ("T1w", "T2w"):
        image = load(folder / f"{contrast}.nii.gz")
        np.testing.assert_array_equal(image.affine, segmentation.affine)
        values = image.get_fdata()
        source = INTENSITY[contrast]
        means = {i: values[ids == i].mean() for i in (2, 41, 3, 42, 4)}
        expected = np.array([source[i] for i in means])
        assert np.corrcoef(expected, list(means.values()))[0, 1] > 0.97, contrast
    found = load(folder / "lesion.nii.gz")
    where = np.argwhere(np.asarray(found.dataobj)) @ found.affine[:3, :3].T + found.affine[:3, 3]
    np.testing.assert_allclose(where.mean(axis=0), AFFINE[:3, :3] @ [11.5, 22.5, 19.5] + AFFINE[:3, 3])
    # the head without symmetry: the larger hemisphere is the left one, in the scan as in the labels
    scan = load(folder / "T2w.nii.gz").get_fdata() > 0.2
    assert 2 * (scan & (ids > 0)).sum() / (scan.sum() + (ids > 0).sum()) > 0.9
    left_of_middle = np.argwhere(np.isin(ids, (2, 3)))[:, 0].mean()
    assert segmentation.affine[0, 0] > 0
    assert left_of_middle < np.argwhere(np.isin(ids, (41, 42)))[:, 0].mean()


def test_a_visit_without_labels_is_labelled_by_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root, bundle = tmp_path / "study", tmp_path / "bundle"
    save(root / "sub-01/anat/sub-01_FLAIR.nii.gz", render("FLAIR"), AFFINE)
    save(root / "sub-02/anat/sub-02_FLAIR.nii.gz", render("FLAIR"), AFFINE)
    (bundle / "configs").mkdir(parents=True)
    (bundle / "configs" / "inference.json").write_text("{}", encoding="utf-8")
    calls: list[dict[str, Any]] = []

    def run(**settings: Any) -> None:
        """Stands in for MONAI's run: labels the first scan, fails on the second."""
        calls.append(settings)
        rows = read_table(settings["input"])
        assert [(row["name"], Path(row["image"]).name) for row in rows] == [
            (f"sub-0{n}", f"sub-0{n}_FLAIR.nii.gz") for n in (1, 2)
        ]
        assert (settings["outputs"], settings["grid"]) == ("segmentation", "1mm")
        save(predicted_file(Path(settings["output_dir"]), "sub-01"), make_head(), AFFINE)
        raise SystemExit("1 of 2 scans failed")

    monkeypatch.setattr(bids, "run", run)
    with pytest.raises(PreparationError, match=r"sub-02_desc-freesurfer_dseg\.nii\.gz.* found no such file"):
        prepare_subjects("bids", root, tmp_path / "out", bundle=bundle, size=SIZE)
    assert read_record(tmp_path / "out" / "sub-01")["labels_from"] == "model"
    assert calls[0]["bundle_root"] == str(bundle)
    with pytest.raises(
        FileNotFoundError, match=r"inference\.json: 1 subjects have no labels and need the bundle's model"
    ):
        prepare_subjects("bids", root, tmp_path / "out", bundle=tmp_path / "none", size=SIZE)


def test_a_ct_must_be_in_hounsfield_units() -> None:
    values = np.array([-3024.0, -1000, 40, 900])
    np.testing.assert_array_equal(check_hounsfield(values, "ct.nii"), [-1024, -1000, 40, 900])
    with pytest.raises(ValueError, match=r"ct\.nii: a CT in HU with air at about -1000 is needed, found 0\.00 %"):
        check_hounsfield(values.clip(0), "ct.nii")


def test_removed_voxels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head in noisy air; then its face is cleared; then all but the brain."""
    size = (80, 96, 80)
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in size), indexing="ij"), axis=-1)
    ids = np.where(np.linalg.norm(grid - (40, 44, 44), axis=-1) < 24, 2, 0)
    affine, seen = np.diag([2.0, 2.0, 2.0, 1.0]), np.ones(size, dtype=bool)
    seen[:3] = False
    mni = (grid[::4, ::4, ::4] - (40, 44, 44)) * 2.0 + (0, -18, 10)
    scan = 1 + np.random.default_rng(0).random(size)

    def find(values: np.ndarray) -> np.ndarray:
        return find_removed("T1w", BoxScan(values, seen, np.eye(4), np.zeros((8, 3))), None, ids, affine, mni)

    np.testing.assert_array_equal(find(scan), ~seen)
    face = (grid[..., 1] > 66) & (grid[..., 2] < 36)
    removed = find(np.where(face, 0, scan))
    assert removed[~seen].all()
    assert (removed & seen & ~face).sum() == 0
    assert removed[40, 80, 25]
    np.testing.assert_array_equal(find(np.where(ids > 0, scan, 0)), (ids == 0) | ~seen)


def test_motion_in_words() -> None:
    told = measure_motion(make_motion(), np.zeros(3))
    assert told == {"rotation_deg": 7.0, "shift_mm": round(float(np.sqrt(50)), 2)}


@pytest.mark.shared_data
def test_real_contrasts_overlap(shared_data: Path) -> None:
    """T1w and FLAIR of one person, after the FLAIR's header was turned by 7 degrees: the motion is found back."""
    folder = shared_data / "open_ms" / "longitudinal" / "raw" / "patient01"
    t1w, affine = read_scan(folder / "study1_T1W.nii.gz")
    flair, flair_affine = read_scan(folder / "study1_FLAIR.nii.gz")
    box = np.diag([2.0, 2.0, 2.0, 1.0])
    centre = affine @ [*((np.array(t1w.shape) - 1) / 2), 1]
    box[:3, 3] = centre[:3] - 2 * np.array([48, 56, 48])
    fixed = resample_to_box(t1w, affine, box, (96, 112, 96))
    turned = align_scan((fixed, box), (flair, make_motion() @ flair_affine))
    straight = align_scan((fixed, box), (flair, flair_affine))
    difference = np.linalg.inv(make_motion()) @ turned - straight
    places = np.argwhere(fixed > fixed.mean()) @ box[:3, :3].T + box[:3, 3]
    assert np.linalg.norm(places @ difference[:3, :3].T + difference[:3, 3], axis=1).mean() < 0.5  # mm
    assert (
        np.linalg.norm(places @ (straight - np.eye(4))[:3, :3].T + straight[:3, 3], axis=1).mean() < 1.5
    )  # one session
