"""The kit for a bare GPU machine: what it holds of a subject is what a training at 2 mm reads, on the side where it was."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from brainfm_monai.data.loading import HoldSubjectd

SIZE = (16, 24, 32)
AFFINE = np.diag([1.0, 1.0, 1.0, 1.0])


@pytest.fixture
def kit(repository: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_gpu_kit", repository / "packaging" / "make_gpu_kit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def save(path: Path, values: np.ndarray, affine: np.ndarray, slope: float = 1.0, inter: float = 0.0) -> str:
    image = nib.Nifti1Image(values, affine)
    image.header.set_slope_inter(slope, inter)
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    return f"{path.parent.name}/{path.name}"


def write_subject(folder: Path, name: str) -> dict[str, Any]:
    """An asymmetric subject: a ramp along each axis, one structure on the left alone."""
    ramp = np.stack(np.meshgrid(*(np.arange(n) for n in SIZE), indexing="ij"), axis=-1)
    generation = np.zeros(SIZE, dtype=np.uint8)
    generation[2:6, 4:20, 4:28], generation[6:14, 4:12, 8:20] = 5, 9
    segmentation = np.choose(np.searchsorted([0, 5, 9], generation), [0, 2, 1]).astype(np.uint8)
    coarse = np.diag([4.0, 4.0, 4.0, 1.0])
    coarse[:3, 3] = 1.5
    mni = (ramp[2::4, 2::4, 2::4] * [100, 90, 80] - 700).astype(np.int16)
    return {
        "subject": name,
        "generation_protocol": "synthseg_generation",
        "protocol": "synthseg_head",
        "generation_labels": save(folder / name / "generation_labels.nii.gz", generation, AFFINE),
        "segmentation": save(folder / name / "segmentation.nii.gz", segmentation, AFFINE),
        "distance": save(
            folder / name / "distance.nii.gz", (ramp[..., [0, 1, 2, 0]] * 4).astype(np.uint8), AFFINE, 0.05, -3.0
        ),
        "mni": save(folder / name / "mni.nii.gz", mni, coarse, 0.01),
        "T1w": save(folder / name / "T1w.nii.gz", (ramp[..., 0] * 12 + ramp[..., 2]).astype(np.uint8), AFFINE, 1 / 255),
    }


# packages of ours that the machine has not, nor the wheels of the kit: what the package requires, less what both hold
MISSING = ("igl", "itk", "nilearn", "nitransforms", "sklearn", "pydicom", "dcm2niix", "distributed", "onnx", "elastix")


def test_a_training_imports_nothing_that_the_machine_lacks(repository: Path) -> None:
    script = f"""
import sys
for name in {MISSING}: sys.modules[name] = None
from monai.bundle import ConfigParser
from brainfm_monai.io import find_config
parser = ConfigParser()
names = ["train.json", "release.json", "finetune.json", "muon.json"]
parser.read_config([str(find_config({str(repository / "bundle")!r}, name)) for name in names])
for line in parser["imports"]: exec(line.removeprefix("$"))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_unpacked_subject_is_the_subject_that_a_training_at_two_millimetres_reads(
    kit: ModuleType, tmp_path: Path
) -> None:
    items = [write_subject(tmp_path / "prepared", name) for name in ("one", "two")]
    datalist = tmp_path / "prepared" / "datalist.json"
    items[1]["simulated"] = ["T1w"]  # painted by the training: the kit holds no file of it
    datalist.write_text(json.dumps({"training": [items[0], items[0]], "validation": [items[1]], "test": []}))
    weights = tmp_path / "model.pt"
    torch.save({}, weights)
    kit.make_kit(datalist, tmp_path / "kit", 10, weights, wheels=False)
    words = [
        sys.executable,
        str(tmp_path / "kit/kit.py"),
        str(tmp_path / "kit/subjects.tar"),
        "--output",
        str(tmp_path / "machine"),
    ]
    subprocess.run(words, check=True, cwd=tmp_path)
    listed = json.loads((tmp_path / "machine/datalist.json").read_text())
    assert [[item["subject"] for item in listed[part]] for part in ("training", "validation")] == [
        ["one", "one"],
        ["two"],
    ]
    assert ("T1w" in listed["training"][0], "T1w" in listed["validation"][0]) == (True, False)
    hold = HoldSubjectd(label_mm=1.0, image_mm=2.0, images=["T1w"])
    keys = ("generation_labels", "segmentation", "distance", "mni", "T1w")
    expected, unpacked = (
        hold({**item, **{key: str(folder / item[key]) for key in keys}})
        for item, folder in ((items[0], tmp_path / "prepared"), (listed["training"][0], tmp_path / "machine"))
    )
    assert expected["generation_labels"].unique().tolist() == [0, 5, 9]
    for key in ("generation_labels", "segmentation"):
        assert torch.equal(expected[key], unpacked[key]), key
    assert (expected["distance"] - unpacked["distance"]).abs().max() <= 0.5 * 0.05 + 1e-5  # half a step of the file
    assert (expected["T1w"] - unpacked["T1w"]).abs().max() <= 0.5 / 255 + 1e-5
    inner = (slice(None), *[slice(1, -1)] * 3)  # voxels of 8 mm know nothing beyond their outermost centres
    assert (expected["mni"][inner] - unpacked["mni"][inner]).abs().max() <= 0.02  # of mm; two steps of the file
    assert (expected["T1w"] - unpacked["T1w"].flip(1)).abs().max() > 0.1  # a mirrored subject would not have passed


def test_a_kit_that_is_full_reports_the_subjects_that_have_no_room(kit: ModuleType, tmp_path: Path) -> None:
    items = [write_subject(tmp_path / "prepared", name) for name in ("one", "two")]
    datalist = tmp_path / "prepared" / "datalist.json"
    datalist.write_text(json.dumps({"training": items, "validation": []}))
    one = len(kit.lzma.compress(kit.make_tar(kit.pack_subject(items[0], tmp_path / "prepared"))))
    packed, names, left_out = kit.pack_subjects(datalist, kit.SPARE + 3 * one // 2)
    assert (names, left_out) == (["one"], ["two"])
    assert len(packed) < kit.SPARE + 3 * one // 2
    torch.save({}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"at most 0\.01 MiB are allowed, the kit has"):
        kit.make_kit(datalist, tmp_path / "kit", 0.01, tmp_path / "model.pt", wheels=False)


def test_a_label_that_no_table_can_fold_is_refused(kit: ModuleType, tmp_path: Path) -> None:
    item = write_subject(tmp_path / "prepared", "one")
    labels = np.zeros(SIZE, dtype=np.uint8)
    labels[3, 5, 5] = 1  # generation label 5 is 2 elsewhere
    save(tmp_path / "prepared/one/segmentation.nii.gz", labels, AFFINE)
    with pytest.raises(ValueError, match="one: one segmentation label for each generation label is needed"):
        kit.pack_subject(item, tmp_path / "prepared")
