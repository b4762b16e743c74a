"""Volumes into memory: as MONAI reads them, whatever the header's scale and the file's axes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from brainfm_monai.data.loading import HoldSubjectd, LoadSubjectd
from brainfm_monai.data.subjects import write_subject
from brainfm_monai.io import ScanError

SIZE = (5, 7, 6)
AFFINE = np.array([[0.0, -1, 0, 3], [1.0, 0, 0, -2], [0, 0, 1.0, 5], [0, 0, 0, 1]])


@pytest.fixture
def item(tmp_path: Path) -> dict[str, str]:
    """Every kind of file that a subject has, with different numbers in every voxel."""
    random = np.random.default_rng(0)
    volumes: dict[str, np.ndarray] = {
        "segmentation": random.integers(0, 200, SIZE).astype(np.uint8),
        "distance": random.uniform(-6, 6, (*SIZE, 4)),
        "mni": random.uniform(-90, 90, (*SIZE, 3)),
        "T1w": random.random(SIZE),
        "CT": random.integers(-1000, 2000, SIZE).astype(np.int16),
    }
    write_subject(tmp_path / "s1", {key: (values, AFFINE) for key, values in volumes.items()}, {})
    return {"subject": "s1", **{key: str(tmp_path / "s1" / f"{key}.nii.gz") for key in volumes}}


def test_it_reads_what_nibabel_reads(item: dict[str, str]) -> None:
    keys = [key for key in item if key != "subject"]
    found = LoadSubjectd(keys)(item)
    for key in keys:
        image: Any = nib.load(item[key])
        values = image.get_fdata().reshape(*image.shape[:3], -1)
        np.testing.assert_allclose(found[key].as_tensor().movedim(0, -1), values, atol=1e-5, rtol=1e-6)
        np.testing.assert_array_equal(found[key].affine, image.affine)
    types = {key: found[key].dtype for key in keys}
    whole = {"segmentation": torch.uint8, "CT": torch.int16}
    assert types == {**dict.fromkeys(keys, torch.float32), **whole}


def test_uncompressed_files_and_missing_keys(item: dict[str, str], tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.arange(24, dtype=np.float32).reshape(2, 3, 4), AFFINE)
    nib.save(image, tmp_path / "plain.nii")
    found = LoadSubjectd(["T1w"])({"T1w": str(tmp_path / "plain.nii")})["T1w"]
    torch.testing.assert_close(found.as_tensor(), torch.arange(24.0).reshape(1, 2, 3, 4))
    torch.testing.assert_close(found.affine, torch.from_numpy(AFFINE))
    assert set(LoadSubjectd(["FLAIR", "T1w"])(item)) == set(item)
    with pytest.raises(KeyError):
        LoadSubjectd(["FLAIR"], allow_missing_keys=False)(item)


def test_what_is_no_volume_is_named(tmp_path: Path) -> None:
    for name, content in (("half.nii.gz", b"\x1f\x8bhalf"), ("none.nii", b"none"), ("gone.nii.gz", None)):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ScanError, match=rf"{name}: .*, found"):
            LoadSubjectd(["T1w"])({"T1w": str(tmp_path / name)})


def write_head(folder: Path) -> dict[str, str]:
    """A subject of 8 x 12 x 8 mm without symmetry: labels of 1 mm, coordinates of 4 mm."""
    x, y, z = np.indices((8, 12, 8)) + 0.5  # mm from the corner of the box
    labels = ((x < 2) + 2 * (y < 4) + 4 * (z > 6)).astype(np.uint8)
    coarse = 4 * np.indices((2, 3, 2)) + 2.0
    volumes = {
        "generation_labels": labels,
        "segmentation": labels,
        "distance": np.stack([x - 4, y - 4, z - 4, x - y], axis=-1).clip(-6.4, 6.35),
        "mni": np.moveaxis(coarse, 0, -1),
        "CT": np.where(x < 4, -1000, 40).astype(np.int16),
    }
    affines = {key: np.diag([4.0, 4, 4, 1]) if key == "mni" else np.eye(4) for key in volumes}
    write_subject(folder, {key: (values, affines[key]) for key, values in volumes.items()}, {})
    return {"subject": folder.name, **{key: str(folder / f"{key}.nii.gz") for key in volumes}}


def test_a_subject_is_held_at_the_resolution_of_the_training_in_the_box_of_its_files(tmp_path: Path) -> None:
    item = write_head(tmp_path / "sub-1") | {"age": 31.5, "generation_protocol": "synthseg_generation"}
    held = HoldSubjectd(1.0, 2.0, images=["CT", "FLAIR"], masks=["lesion"], scalars=["age"])(item)
    labels = LoadSubjectd(["segmentation"])(item)["segmentation"].as_tensor()
    assert torch.equal(held["segmentation"], labels)
    assert {key: tuple(held[key].shape) for key in ("distance", "CT", "FLAIR", "mni", "lesion")} == {
        "distance": (4, 4, 6, 4),
        "CT": (1, 4, 6, 4),
        "FLAIR": (1, 4, 6, 4),
        "mni": (3, 2, 3, 2),
        "lesion": (1, 8, 12, 8),
    }
    centre = torch.arange(4) * 2 + 1.0  # mm of the middle of a voxel of 2 mm, whose mean is that of its eight
    torch.testing.assert_close(held["distance"][0, :, 0, 0], centre - 4, atol=0.05, rtol=0)
    torch.testing.assert_close(held["distance"][2, 0, 0, :], centre - 4, atol=0.05, rtol=0)
    assert held["CT"][0, :, 3, 1].tolist() == [-1000, -1000, 40, 40]  # HU, as in the file
    torch.testing.assert_close(held["mni"][1, 0, :, 0], torch.tensor([2.0, 6.0, 10.0]))
    flags = {key: float(value) for key, value in held.items() if key.startswith(("available_", "real_"))}
    assert flags == {
        **{f"available_{key}": 1.0 for key in ("distance", "mni", "CT", "age")},
        **{f"available_{key}": 0.0 for key in ("FLAIR", "lesion")},
        **{"real_CT": 1.0, "real_FLAIR": 0.0},
    }
    assert not held["FLAIR"].any()
    assert (float(held["age"]), held["subject"]) == (31.5, "sub-1")
    coarse = HoldSubjectd(2.0, 4.0)(item)
    assert torch.equal(coarse["segmentation"][0], labels[0, 1::2, 1::2, 1::2])  # of eight labels one at the middle
    assert torch.equal(HoldSubjectd()(item)["segmentation"], labels)
    with pytest.raises(
        ValueError, match="sub-1: a box that divides into voxels of 3 mm is needed, found 8 x 12 x 8 mm"
    ):
        HoldSubjectd(3.0)(item)
    without = {key: value for key, value in item.items() if key != "segmentation"}
    with pytest.raises(
        ValueError, match="sub-1: a subject with segmentation is needed, found subject, generation_labels"
    ):
        HoldSubjectd()(without)
