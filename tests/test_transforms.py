"""Reading scans, and naming the maps of the network's output."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from brainfm_monai.functional.intensity import normalise_percentiles
from brainfm_monai.tasks import TaskLayout
from brainfm_monai.transforms import (
    LoadScand,
    NormalisePercentilesd,
    ScanError,
    ScanSpacingd,
    SplitTasksd,
    check_header,
    scan_stem,
)

RAMP = np.arange(12 * 14 * 16, dtype=np.float32).reshape(12, 14, 16)


def write(path: Path, data: np.ndarray, zooms_mm: float = 1.0) -> Path:
    nib.save(nib.Nifti1Image(data, np.diag([zooms_mm] * 3 + [1.0])), path)
    return path


@pytest.mark.parametrize(
    ("name", "stem"), [("a/T1w.nii.gz", "T1w"), ("T1.v2.nii", "T1.v2"), ("norm.mgz", "norm"), ("X.MGH", "X"), ("odd.img", "odd")]
)
def test_the_stem_is_the_name_without_the_suffix(name: str, stem: str) -> None:
    assert scan_stem(name) == stem


def test_loading_gives_one_channel_and_the_scans_name(tmp_path: Path) -> None:
    path = write(tmp_path / "scan.nii.gz", RAMP[..., None])  # a fourth axis of one volume is no fourth dimension
    loaded = LoadScand("image")({"image": str(path)})["image"]
    np.testing.assert_array_equal(loaded.numpy(), RAMP[None])
    assert loaded.meta["scan_name"] == "scan"
    named = LoadScand("image")({"image": str(path), "name": "sub-01"})["image"]
    assert named.meta["scan_name"] == "sub-01"


def test_loading_sets_what_is_not_finite_to_zero(tmp_path: Path) -> None:
    data = RAMP.copy()
    data[3, 4, 5], data[6, 7, 8], data[1, 1, 1] = np.nan, np.inf, -np.inf
    loaded = LoadScand("image")({"image": str(write(tmp_path / "scan.nii", data))})["image"].numpy()[0]
    expected = RAMP.copy()
    expected[3, 4, 5] = expected[6, 7, 8] = expected[1, 1, 1] = 0
    np.testing.assert_array_equal(loaded, expected)


def test_a_constant_image_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "flat.nii", np.full_like(RAMP, 7))
    with pytest.raises(ScanError, match=r"flat\.nii: an image with contrast is needed, found the value 7 in every voxel"):
        LoadScand("image")({"image": str(path)})


def test_a_file_cut_short_is_refused_in_one_line(tmp_path: Path) -> None:
    path = write(tmp_path / "cut.nii.gz", np.random.default_rng(0).random((40, 40, 40)).astype(np.float32))
    path.write_bytes(path.read_bytes()[:30000])
    with pytest.raises(ScanError, match=r"cut\.nii\.gz: the voxels cannot be read, found \S+") as caught:
        LoadScand("image")({"image": str(path)})
    assert "\n" not in str(caught.value)


def test_headers_that_cannot_be_a_head_scan_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ScanError, match=r"absent\.nii: a NIfTI or MGH file is needed, found no such file"):
        check_header(tmp_path / "absent.nii")
    with pytest.raises(ScanError, match="a NIfTI or MGH file is needed, found a folder"):
        check_header(tmp_path)
    with pytest.raises(ScanError, match=r"extends over 10 to 600 mm along each axis, found 0\.012 x 0\.014 x 0\.016 mm"):
        check_header(write(tmp_path / "metres.nii", RAMP, zooms_mm=0.001))
    with pytest.raises(ScanError, match=r"extends over 10 to 600 mm along each axis, found 1\.2e"):
        check_header(write(tmp_path / "micrometres.nii", RAMP, zooms_mm=1000))
    colours = np.zeros((12, 14, 16), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    with pytest.raises(ScanError, match="one real number per voxel is needed, found colours"):
        check_header(write(tmp_path / "rgb.nii", colours))
    with pytest.raises(ScanError, match="one real number per voxel is needed, found complex numbers"):
        check_header(write(tmp_path / "kspace.nii", RAMP.astype(np.complex64)))
    flat: Any = nib.Nifti1Image(RAMP, np.eye(4))
    flat.header["srow_z"] = 0
    flat.header["sform_code"] = 1
    nib.save(nib.Nifti1Image(RAMP, None, flat.header), tmp_path / "flat.nii")
    with pytest.raises(ScanError, match="an affine of three independent axes is needed, found"):
        check_header(tmp_path / "flat.nii")


def test_a_header_without_orientation_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    image: Any = nib.Nifti1Image(RAMP, np.eye(4))
    image.set_sform(None, 0)
    image.set_qform(None, 0)
    nib.save(image, tmp_path / "unknown.nii")
    check_header(tmp_path / "unknown.nii")
    assert "the header states no orientation; left and right are taken from the order of the voxels" in caplog.text
    caplog.clear()
    check_header(write(tmp_path / "known.nii", RAMP))
    assert not caplog.text


def test_spacing_leaves_entries_that_begin_like_the_key_alone() -> None:
    # monai.transforms.Spacingd fails on the string that MONAI Label puts beside the image.
    image = MetaTensor(torch.from_numpy(RAMP)[None], affine=torch.diag(torch.tensor([2.0, 2.0, 2.0, 1.0])))
    image.meta["filename_or_obj"] = "scan.nii.gz"
    data: dict[Hashable, Any] = {"image": image, "image_path": "scan.nii.gz", "image_id": 3, "other": "x"}
    spacing = ScanSpacingd("image", pixdim=(1.0, 1.0, 1.0))
    result = spacing(data)
    assert {k: v for k, v in result.items() if k != "image"} == {"image_path": "scan.nii.gz", "image_id": 3, "other": "x"}
    np.testing.assert_allclose(result["image"].pixdim, 1.0)
    assert spacing.inverse({"image": result["image"]})["image"].shape == image.shape


def test_normalisation_is_that_of_the_training_and_keeps_metadata() -> None:
    image = MetaTensor(torch.from_numpy(RAMP)[None], affine=torch.diag(torch.tensor([2.0, 2.0, 2.0, 1.0])))
    result = NormalisePercentilesd("image", lower=0.1, upper=0.9)({"image": image})["image"]
    expected = normalise_percentiles(torch.from_numpy(RAMP)[None, None], 0.1, 0.9)[0]
    np.testing.assert_array_equal(result.numpy(), expected.numpy())
    np.testing.assert_array_equal(result.affine, image.affine)


def test_splitting_names_the_tasks_in_the_units_of_their_files() -> None:
    layout = TaskLayout(["segmentation", "distance", "log_bias_field", "mni"], "synthseg_head")
    generator = torch.Generator().manual_seed(0)
    output = torch.randn(layout.channels, 3, 4, 5, generator=generator)
    output[layout.slices["distance"]] *= 4
    pred = MetaTensor(output, affine=torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0])))
    parts = SplitTasksd("pred", layout)({"pred": pred, "image": 1})
    assert set(parts) == {"pred", "image", "distance", "bias_field", "mni"}
    assert parts["pred"].dtype == torch.uint8
    labels = np.array([[[int(np.argmax(output[:44, i, j, k].numpy())) for k in range(5)] for j in range(4)] for i in range(3)])
    np.testing.assert_array_equal(parts["pred"].numpy()[0], labels)
    np.testing.assert_allclose(parts["distance"].numpy(), np.clip(output[44:48].numpy(), -3, 3))
    np.testing.assert_allclose(parts["bias_field"].numpy(), np.exp(output[48:49].numpy()), rtol=1e-6)
    np.testing.assert_allclose(parts["mni"].numpy(), 100 * output[49:52].numpy(), rtol=1e-6)
    for name in ("pred", "distance", "bias_field", "mni"):
        np.testing.assert_array_equal(parts[name].affine, pred.affine)
    assert pred.shape == (52, 3, 4, 5)


def test_splitting_a_layout_of_other_tasks() -> None:
    layout = TaskLayout(["segmentation", "T1w", "CT"], "synthseg_head")
    parts = SplitTasksd("pred", layout)({"pred": torch.full((layout.channels, 2, 2, 2), 0.04)})
    assert set(parts) == {"pred", "T1w", "CT"}
    np.testing.assert_allclose(parts["CT"].numpy(), 40.0, rtol=1e-6)  # HU
    np.testing.assert_allclose(parts["T1w"].numpy(), 0.04, rtol=1e-6)
