"""Reading scans, and naming the maps of the network's output."""

from __future__ import annotations

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.data import MetaTensor

from brainfm_monai.functional.intensity import normalise_percentiles
from brainfm_monai.io import ScanError
from brainfm_monai.tasks import TaskLayout
from brainfm_monai.transforms import (
    MODES,
    LoadScand,
    NormalisePercentilesd,
    ScanSpacingd,
    SplitTasksd,
    allowed_labels,
)

RAMP = np.arange(12 * 14 * 16, dtype=np.float32).reshape(12, 14, 16)


def write(path: Path, data: np.ndarray, zooms_mm: float = 1.0) -> Path:
    nib.save(nib.Nifti1Image(data, np.diag([zooms_mm] * 3 + [1.0])), path)
    return path


def test_a_scan_is_read_as_an_image(tmp_path: Path) -> None:
    load, path = LoadScand("image"), write(tmp_path / "scan.nii", RAMP, zooms_mm=2.0)
    image = load({"image": path})["original"]
    np.testing.assert_array_equal(image.numpy()[0], RAMP)
    np.testing.assert_array_equal(image.affine.numpy(), np.diag([2.0, 2.0, 2.0, 1.0]))
    with pytest.raises(ScanError, match="found no such file"):
        load({"image": tmp_path / "none.nii"})


def test_loading_gives_one_channel_and_the_scans_name(tmp_path: Path) -> None:
    path = write(tmp_path / "scan.nii.gz", RAMP[..., None])  # a fourth axis of one volume is no fourth dimension
    loaded = LoadScand("image")({"image": str(path)})["image"]
    np.testing.assert_array_equal(loaded.numpy(), RAMP[None])
    assert loaded.meta["scan_name"] == "scan"
    named = LoadScand("image")({"image": str(path), "name": "sub-01"})["image"]
    assert named.meta["scan_name"] == "sub-01"


def test_a_loader_that_is_asked_for_metadata_loads_the_same(tmp_path: Path) -> None:
    path = write(tmp_path / "scan.nii", RAMP)
    load = LoadScand("image")
    expected = load({"image": str(path)})["image"]
    load._loader.image_only = False  # as MONAI Label sets it in every loader of a bundle
    found = load({"image": str(path)})["image"]
    assert torch.equal(found.as_tensor(), expected.as_tensor())
    assert torch.equal(found.affine, expected.affine)


def test_loading_sets_what_is_not_finite_to_zero(tmp_path: Path) -> None:
    data = RAMP.copy()
    data[3, 4, 5], data[6, 7, 8], data[1, 1, 1] = np.nan, np.inf, -np.inf
    loaded = LoadScand("image")({"image": str(write(tmp_path / "scan.nii", data))})["image"].numpy()[0]
    expected = RAMP.copy()
    expected[3, 4, 5] = expected[6, 7, 8] = expected[1, 1, 1] = 0
    np.testing.assert_array_equal(loaded, expected)


def test_a_constant_image_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "flat.nii", np.full_like(RAMP, 7))
    with pytest.raises(
        ScanError, match=r"flat\.nii: an image with contrast is needed, found the value 7 in every voxel"
    ):
        LoadScand("image")({"image": str(path)})


def test_a_file_cut_short_is_refused_in_one_line(tmp_path: Path) -> None:
    path = write(tmp_path / "cut.nii.gz", np.random.default_rng(0).random((40, 40, 40)).astype(np.float32))
    path.write_bytes(path.read_bytes()[:30000])
    with pytest.raises(ScanError, match=r"cut\.nii\.gz: the voxels cannot be read, found \S+") as caught:
        LoadScand("image")({"image": str(path)})
    assert "\n" not in str(caught.value)


def test_spacing_leaves_entries_that_begin_like_the_key_alone() -> None:
    # monai.transforms.Spacingd fails on the string that MONAI Label puts beside the image.
    image = MetaTensor(torch.from_numpy(RAMP)[None], affine=torch.diag(torch.tensor([2.0, 2.0, 2.0, 1.0])))
    image.meta["filename_or_obj"] = "scan.nii.gz"
    data: dict[Hashable, Any] = {"image": image, "image_path": "scan.nii.gz", "image_id": 3, "other": "x"}
    spacing = ScanSpacingd("image", pixdim=(1.0, 1.0, 1.0))
    result = spacing(data)
    assert {k: v for k, v in result.items() if k != "image"} == {
        "image_path": "scan.nii.gz",
        "image_id": 3,
        "other": "x",
    }
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
    labels = np.array(
        [[[int(np.argmax(output[:44, i, j, k].numpy())) for k in range(5)] for j in range(4)] for i in range(3)]
    )
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


def test_a_scale_of_error_is_in_the_unit_of_its_task() -> None:
    layout = TaskLayout(["mni", "T1w", "age"], uncertainty=["mni", "T1w"])
    parts = SplitTasksd("pred", layout)({"pred": torch.full((layout.channels, 2, 2, 2), -2.0)})
    assert set(parts) == {"mni", "T1w", "age", "mni_scale", "T1w_scale"}
    scale = float(np.exp(7 * np.tanh(-2 / 7)))
    np.testing.assert_allclose(parts["mni_scale"].numpy(), np.full((3, 2, 2, 2), 100 * scale), rtol=1e-5)  # mm
    np.testing.assert_allclose(parts["T1w_scale"].numpy(), np.full((1, 2, 2, 2), scale), rtol=1e-5)
    np.testing.assert_allclose(parts["age"].numpy(), -200.0)  # years


def phantom_of_a_ct() -> np.ndarray:
    """Air, skin with fat, bone, brain with noise: shells around the middle, in HU."""
    radius = np.linalg.norm(np.stack(np.meshgrid(*[np.arange(40) - 19.5] * 3, indexing="ij")), axis=0)
    hounsfield = np.select([radius < 11, radius < 13, radius < 16], [35.0, 900.0, -90.0], -1000.0)
    return (hounsfield + np.random.default_rng(0).normal(0, 8, radius.shape)).astype(np.float32)


def load(path: Path, **options: Any) -> MetaTensor:
    image: MetaTensor = LoadScand("image", **options)({"image": str(path)})["image"]
    return image


def test_a_ct_is_clipped_to_the_brains_window_and_its_original_is_kept(tmp_path: Path) -> None:
    hounsfield = phantom_of_a_ct()
    path = write(tmp_path / "ct.nii", hounsfield)
    loaded = LoadScand("image", window="auto")({"image": str(path)})
    np.testing.assert_allclose(loaded["image"].numpy()[0], np.clip(hounsfield, 0, 80), atol=1e-3)
    np.testing.assert_array_equal(loaded["original"].numpy()[0], hounsfield)
    assert loaded["image"].meta["window"] == "0 to 80"
    assert loaded["image"].meta["modality"].startswith("ct: the values are those of Hounsfield units: ")
    asked = load(path, window="auto", modality="mr")
    assert "window" not in asked.meta
    assert asked.meta["modality"] == "mr: as asked by --modality"
    chosen = load(path, window=[5, 60])
    assert (float(chosen.min()), float(chosen.max())) == (5.0, 60.0)
    asked = load(write(tmp_path / "mr.nii", RAMP), window="auto", modality="ct")
    assert (float(asked.min()), float(asked.max())) == (0.0, 80.0)
    with pytest.raises(
        ValueError, match=r"window: 'auto' or two rising numbers \[low, high\] are needed, found \[3, 1\]"
    ):
        LoadScand("image", window=[3, 1])
    with pytest.raises(ValueError, match="modality: one of auto, mr, ct is needed, found 'pet'"):
        LoadScand("image", modality="pet")


def test_an_mr_scan_padded_like_a_ct_is_none_and_its_padding_becomes_zero(tmp_path: Path) -> None:
    head = np.clip(phantom_of_a_ct() + 1000, 0, None) / 2  # bright bone, dark air: no values below 0
    padded = np.pad(head, 6, constant_values=-1024)
    found = load(write(tmp_path / "mr.nii", padded), window="auto")
    np.testing.assert_array_equal(found.numpy()[0], np.pad(head, 6))
    assert "are -1024: taken for padding of an MR scan and set to 0" in found.meta["warnings"]
    assert found.meta["modality"].startswith("mr: the values are not those of Hounsfield units")
    for values in (RAMP - 500, np.random.default_rng(0).normal(0, 1500, RAMP.shape).astype(np.float32)):
        signed = load(write(tmp_path / "signed.nii", values), window="auto")  # contrast below 0 is no padding
        np.testing.assert_array_equal(signed.numpy()[0], values)
        assert re.fullmatch("no side of the volume is dark, .*|values reach from .*", signed.meta["warnings"])


def phantom_of_mr() -> np.ndarray:
    """A head in dark air: a ball of noisy tissue, other tissue in its middle, float32."""
    radius = np.linalg.norm(np.stack(np.meshgrid(*[np.arange(40) - 19.5] * 3, indexing="ij")), axis=0)
    noise = np.random.default_rng(0).normal(0, 1, (2, 40, 40, 40))
    return np.hypot(np.select([radius < 8, radius < 15], [600.0, 400.0], 0.0) + 12 * noise[0], 12 * noise[1]).astype(
        "f4"
    )


def test_a_scan_of_a_head_raises_no_doubt(tmp_path: Path) -> None:
    scan, brain = phantom_of_mr(), phantom_of_mr()
    brain[brain < 200] = 0
    for values in (scan, brain, scan[:20], scan[:, :, 10:30], -5 + scan / 10, np.pad(brain[5:35, 5:35, 5:35], 40)):
        assert not load(write(tmp_path / "mr.nii", values)).meta["warnings"]
    assert not load(write(tmp_path / "ct.nii", phantom_of_a_ct())).meta["warnings"]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda mr: np.digitize(mr, [200, 500]).astype(np.int16), "a label map or a mask"),
        (lambda mr: (mr > 200).astype(np.float32) / 255, "a label map or a mask"),
        (lambda mr: np.pi * np.random.default_rng(1).uniform(-1, 1, mr.shape), "a phase image"),
        (lambda mr: np.where(mr > 200, (mr - 450) / 90, 0), "standardised values"),
        (lambda mr: mr.max() - mr, "an inverted contrast"),
        (lambda mr: (mr - mr.mean()) / mr.std(), "values reach from .*, where a magnitude image begins at 0"),
        (lambda mr: np.clip(mr - 150, 0, 250), "the highest values have a share of [0-9]+%: clipped values"),
    ],
    ids=["labels", "mask", "phase", "standardised brain", "inverted", "standardised head", "clipped"],
)
def test_what_is_no_magnitude_image_is_warned_of(tmp_path: Path, make: Any, words: str) -> None:
    path = write(tmp_path / "odd.nii", make(phantom_of_mr()).astype(np.float32))
    assert re.search(words, load(path).meta["warnings"])


def test_padding_above_all_values_becomes_zero(tmp_path: Path) -> None:
    scan = np.round(phantom_of_mr())
    for fill in (65535.0, 1e30):
        found = load(write(tmp_path / "filled.nii", np.pad(scan, 6, constant_values=fill)))
        np.testing.assert_array_equal(found.numpy()[0], np.pad(scan, 6))
        assert "taken for padding of a scan and set to 0" in found.meta["warnings"]


def test_a_few_damaged_voxels_and_a_mark_in_the_picture_do_not_take_the_range_of_the_scan(tmp_path: Path) -> None:
    scan = np.round(phantom_of_mr())
    damaged, marked = scan.copy(), scan.copy()
    damaged.reshape(-1)[::9973] = -32768
    marked[:5, :5, :5] = 32767
    found = load(write(tmp_path / "damaged.nii", damaged))
    np.testing.assert_array_equal(found.numpy()[0][damaged >= 0], np.maximum(scan, found.min())[damaged >= 0])
    assert 0 <= found.min() < 10
    assert "7 voxels lie far below all others, down to -32768" in found.meta["warnings"]
    found = load(write(tmp_path / "marked.nii", marked))
    np.testing.assert_array_equal(found.numpy()[0], np.where(marked > 2000, 0, scan))
    assert "0.2% of the voxels are 32767: taken for padding of a scan and set to 0" in found.meta["warnings"]


@pytest.mark.parametrize("stored", ["1024", "1000", "2000", "3024", "8192", "sign"])
def test_a_ct_without_its_intercept_or_sign_is_brought_to_hounsfield_units(tmp_path: Path, stored: str) -> None:
    hounsfield = np.round(phantom_of_a_ct())
    numbers = hounsfield.astype(np.int16).view(np.uint16) if stored == "sign" else hounsfield + float(stored)
    path = write(tmp_path / "ct.nii", numbers.astype(np.uint16 if stored == "sign" else np.float32))
    loaded = LoadScand("image", window="auto")({"image": str(path)})
    found = loaded["original"].numpy()[0] - hounsfield
    assert np.ptp(found) == 0
    assert abs(found[0, 0, 0]) <= 48  # 1024 and 1000, or 2048 and 2000, cannot always be told apart
    assert loaded["image"].meta["modality"].startswith("ct: ")
    assert "the values are those of a CT" in loaded["image"].meta["warnings"]
    assert load(path, modality="mr").meta["modality"] == "mr: as asked by --modality"


def test_a_ct_without_its_negative_numbers_is_warned_of(tmp_path: Path) -> None:
    path = write(tmp_path / "ct.nii", np.clip(np.round(phantom_of_a_ct()), 0, None))
    assert "a CT without its negative numbers: if it is one, pass --modality ct" in load(path).meta["warnings"]
    assert not load(path, window="auto", modality="ct").meta["warnings"]


def test_a_ct_in_another_unit_is_warned_of(tmp_path: Path) -> None:
    path = write(tmp_path / "ct.nii", phantom_of_a_ct() / 1000)
    assert "are these Hounsfield units?" in load(path, window="auto", modality="ct").meta["warnings"]


def test_what_becomes_coarser_is_smoothed_first() -> None:
    fine = torch.from_numpy(np.indices((40, 40, 40)).sum(0) % 2 * 1.0).float()[None]  # a checkerboard of 0.5 mm
    affine = torch.diag(torch.tensor([0.5, 0.5, 1.0, 1.0]))
    spacing = ScanSpacingd("image", pixdim=(1.0, 1.0, 1.0))
    found = spacing({"image": MetaTensor(fine, affine=affine)})["image"][0, 3:-3, 3:-3, 3:-3]
    assert float((found - 0.5).abs().max()) < 0.02  # as voxels of 1 mm see it
    coarse = MetaTensor(fine, affine=torch.eye(4))
    np.testing.assert_array_equal(spacing({"image": coarse})["image"].numpy(), fine.numpy())


def test_modes_leave_labels_out_before_the_decision() -> None:
    layout = TaskLayout(["segmentation"], "synthseg_head")
    names = {
        mode: {layout.protocol.structures[label].name for label in allowed_labels(layout.protocol, mode)}
        for mode in MODES
    }
    assert len(names["whole_head"]) == 44
    assert "skin" not in names["brain"]
    assert {"CSF", "Brain-Stem", "Left-Cerebellum-Cortex"} <= names["brain"]
    assert names["brain"] - names["ex_vivo"] == {"CSF"}
    assert not {"Brain-Stem", "4th-Ventricle", "Left-Cerebellum-Cortex"} & names["cerebrum"]
    assert not any(name.startswith("Right") for name in names["left_hemisphere"])
    assert not any(name.startswith("Left") for name in names["right_hemisphere"])
    assert "3rd-Ventricle" in names["left_hemisphere"]
    with pytest.raises(ValueError, match=r"mode: one of whole_head, .* is needed, found 'half'"):
        SplitTasksd("pred", layout, mode="half")
    logits = torch.zeros(44, 2, 2, 2)
    logits[38], logits[6], logits[20] = 9.0, 3.0, 5.0  # skin, left and right cortex
    for mode, label in (("whole_head", 38), ("brain", 20), ("left_hemisphere", 6), ("right_hemisphere", 20)):
        found = SplitTasksd("pred", layout, mode=mode, probabilities=True)({"pred": logits})
        assert set(np.unique(found["pred"])) == {label}
        assert float(found["soft_volumes"].sum()) == pytest.approx(8)


def test_entropy_and_soft_volumes_are_those_of_the_softmax() -> None:
    layout = TaskLayout(["segmentation"], "synthseg_head")
    logits = 3 * torch.randn(44, 40, 5, 6, generator=torch.Generator().manual_seed(0))
    logits[0, :, :, :2] = 60  # air
    pred = MetaTensor(logits, affine=torch.diag(torch.tensor([2.0, 1.0, 1.5, 1.0])))
    found = SplitTasksd("pred", layout, probabilities=True)({"pred": pred})
    probability = logits.double().softmax(dim=0)
    inside = probability[:, :, :, 2:]
    entropy = -(inside * inside.log()).sum(0) / np.log(44)
    np.testing.assert_allclose(found["entropy"].numpy()[0][..., 2:], entropy, atol=1e-5)
    assert not found["entropy"].numpy()[0][..., :2].any()
    np.testing.assert_allclose(found["soft_volumes"][1:], probability.sum(dim=(1, 2, 3))[1:] * 3.0, rtol=1e-5)
    np.testing.assert_array_equal(found["segmentation"].numpy(), found["pred"].numpy())


def test_labels_that_were_decided_already_stay() -> None:
    layout = TaskLayout(["segmentation"], "synthseg_head")
    decided = torch.tensor([3.0, 7.0]).reshape(1, 2, 1, 1)
    splitter = SplitTasksd("pred", layout, probabilities=True)
    assert splitter._decide("pred", decided, decided)["segmentation"].flatten().tolist() == [3, 7]


def test_maps_beside_decided_labels_take_the_memory_of_the_output() -> None:
    layout = TaskLayout(["segmentation", "distance", "CT"])
    output = torch.linspace(-5, 5, layout.label_channels * 8).reshape(layout.label_channels, 2, 2, 2)
    output[0] = 3
    expected = {name: layout.tasks[name].to_map(x[0]) for name, x in layout.split(output.clone()[None]).items()}
    found = SplitTasksd("pred", layout)({"pred": output})
    assert (found["pred"] == 3).all()
    for name in ("distance", "CT"):
        assert torch.equal(found[name].as_tensor(), expected[name])
        assert found[name].untyped_storage().data_ptr() == output.untyped_storage().data_ptr()


def test_labels_that_were_decided_already_cannot_be_restricted() -> None:
    layout = TaskLayout(["segmentation"])
    decided: dict[Any, Any] = {"pred": torch.ones(1, 2, 2, 2)}

    class Decided(TaskLayout):
        """A layout whose segmentation comes as labels, as from an inferer in little memory."""

        def split(self, output: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"segmentation": output}

    known = Decided(["segmentation"])
    assert len(known.protocol) == len(layout.protocol)
    assert int(SplitTasksd("pred", known)(decided)["pred"].max()) == 1
    assert int(SplitTasksd("pred", known, mode="brain")(decided)["pred"].max()) == 1
    skin = known.protocol.label_of_id[511]
    with pytest.raises(ValueError, match=rf"the mode excludes the labels \[{skin}\]"):
        SplitTasksd("pred", known, mode="brain")({"pred": torch.full((1, 2, 2, 2), float(skin))})
