"""Folders in the reference's layout: found, listed and read without a copy, in this package's units."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import load_decathlon_datalist

from brainfm_monai.anatomy import Protocol
from brainfm_monai.data.check import check_set
from brainfm_monai.data.datalist import write_datalist
from brainfm_monai.data.loading import LoadSubjectd, decode_reference, find_reference_subjects

SIZE = (40, 24, 20)
AFFINE = np.array([[1.0, 0, 0, -19.5], [0, 1, 0, -30], [0, 0, 1, 7], [0, 0, 0, 1]])
KEYS = ("T1w", "CT", "generation_labels", "segmentation", "distance", "mni", "T1w_defacing_mask")


def save(path: Path, values: np.ndarray) -> None:
    nib.save(nib.Nifti1Image(values, AFFINE), path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two subjects of two sets: one has everything, one the least."""
    folder = tmp_path / "set"
    folder.mkdir()
    x = np.broadcast_to((np.arange(SIZE[0]) - 19.5)[:, None, None], SIZE)
    prefix = "HCP.100.a"
    save(folder / f"{prefix}.T1w.nii", (500 + 10 * x).astype(np.int16))
    save(folder / f"{prefix}.CT.nii", (40 * x - 700).astype(np.int16))
    save(folder / f"{prefix}.T1w.defacingmask.nii", (x > 15).astype(np.uint8))
    save(folder / f"{prefix}.generation_labels.nii", np.where(x < 0, 2, 160).astype(np.uint8))
    # 1 and 18 are the reference's own ids of left and right white matter, 56 of the right septal nucleus
    save(
        folder / f"{prefix}.brainseg_with_extracerebral.nii",
        np.where(x < 0, 1, np.where(x < 18, 18, 56)).astype(np.uint8),
    )
    for side, sign in (("l", 1), ("r", -1)):
        for boundary in "pw":
            stored = np.clip(np.rint(128 + 20 * sign * x), 0, 255).astype(np.uint8)
            save(folder / f"{prefix}.{side}{boundary}_dist_map.nii", stored)
    for axis, name in enumerate("xyz"):
        grid = np.broadcast_to(np.indices(SIZE)[axis] + AFFINE[axis, 3], SIZE)
        save(folder / f"{prefix}.mni_reg.{name}.nii", np.rint(100 * grid).astype(np.int16))
    save(folder / "ADNI.7.T1w.nii", (x + 20).astype(np.float32))
    save(folder / "ADNI.7.lp_dist_map.nii", np.zeros(SIZE, dtype=np.uint8))  # one of four: not a target
    return folder


def test_subjects_are_found_with_what_they_have(root: Path) -> None:
    least, most = find_reference_subjects(root)
    facts = {"layout": "brainfm", "generation_protocol": "brainfm_generation", "protocol": "brainfm"}
    assert least == {"subject": "ADNI.7", "dataset": "ADNI", **facts, "T1w": str(root / "ADNI.7.T1w.nii")}
    assert set(most) == {"subject", "dataset", *facts, *KEYS}
    assert (most["subject"], most["dataset"]) == ("HCP.100.a", "HCP")
    assert [Path(p).name.split(".")[3] for p in most["distance"]] == [f"{c}_dist_map" for c in ("lp", "lw", "rp", "rw")]


def test_monai_reads_them_in_our_units(root: Path, tmp_path: Path) -> None:
    before = sorted(root.iterdir())
    path = write_datalist(root, tmp_path / "lists" / "all.json")
    assert sorted(root.iterdir()) == before  # nothing is copied
    assert json.loads(path.read_text(encoding="utf-8"))["training"][1]["mni"][2] == "../set/HCP.100.a.mni_reg.z.nii"
    item = load_decathlon_datalist(path, data_list_key="training")[1]
    subject = LoadSubjectd(KEYS)(item)
    x = torch.arange(SIZE[0]) - 19.5
    assert subject["distance"].shape == (4, *SIZE)
    for channel, sign in enumerate((1, 1, -1, -1)):
        torch.testing.assert_close(
            subject["distance"][channel, :, 3, 4].as_tensor(), (sign * x).clamp(-6.4, 6.35).float(), atol=0.026, rtol=0
        )
    torch.testing.assert_close(subject["mni"][:, 3, 5, 7].as_tensor(), torch.tensor([-16.5, -25.0, 14.0]))
    structures = Protocol.load("brainfm").structures
    names = [structures[int(label)].name for label in subject["segmentation"][0, [0, 30, 39], 2, 2]]
    assert names == ["Left-Cerebral-White-Matter", "Right-Cerebral-White-Matter", "Right-SeptalNuc"]
    assert (float(subject["T1w"].min()), float(subject["T1w"].max())) == (0.0, 1.0)
    assert float(subject["CT"].min()) == pytest.approx(-1480)
    assert int(subject["generation_labels"].max()) == 160
    torch.testing.assert_close(torch.as_tensor(subject["mni"].affine), torch.from_numpy(AFFINE))


def test_an_id_that_the_reference_lacks() -> None:
    for wrong in (45, 57, 90):
        with pytest.raises(ValueError, match="segmentation: ids of the reference"):
            decode_reference("segmentation", torch.full((1, 2, 2, 2), wrong))


def test_the_check_reads_them_too(root: Path) -> None:
    findings, entries = check_set(root)
    assert [entry["subject"] for entry in entries] == ["ADNI.7", "HCP.100.a"]
    # a box of 19 ml, twice as large on one side, is no head, and this T1w is not scaled where the reference's layout is not known
    assert {(f.subject, f.rule) for f in findings} == {("HCP.100.a", "head size"), ("HCP.100.a", "sides alike")}
