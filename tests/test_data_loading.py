"""Volumes into memory: as MONAI reads them, whatever the header's scale and the file's axes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from brainfm_monai.data.loading import LoadSubjectd
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
