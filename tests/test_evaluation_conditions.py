"""Conditions of an evaluation: their table, real scans made worse, and generated scans with their truth."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from torch import Tensor

from brainfm_monai.anatomy import Protocol
from brainfm_monai.evaluation.conditions import DegradeScan, GenerateScan, check_for_real_scans, parse_conditions
from brainfm_monai.synthesis import SynthesisRanges
from brainfm_monai.tasks import TaskLayout

SIZE = (24, 20, 28)
QUIET = SynthesisRanges(
    noise_std=(0, 0), bias_log_std=(0, 0), resolution_weights=(1, 0, 0, 0), skull_strip_prob=0, head_removal_prob=0,
    deface_prob=0, field_of_view_prob=0, mixup_prob=0, rician_prob=0, velocity_std_mm=(0, 0), contrast_prior_prob=1,
    contrast_priors=("T1w",), contrast_inversion_prob=0, input_weights=(1, 0, 0, 0, 0), mirror_prob=0, gamma_log_std=0,
    head_cluster_prob=0, rotation_deg=(0, 0), translation_mm=(0, 0), scaling=(1, 1), shear=(0, 0),
)  # fmt: skip


def make_head() -> MetaTensor:
    """A box with a finer box in it, exact zeros around."""
    image = torch.zeros(1, *SIZE)
    image[:, 3:21, 3:17, 3:25] = 0.4
    image[:, 8:12, 6:12, 9:13] = 0.9
    return MetaTensor(image, affine=torch.eye(4, dtype=torch.float64))


def degrade(**settings: Any) -> dict[Hashable, Any]:
    parse_conditions({"case": settings})
    return DegradeScan()({"image": make_head(), "settings": settings, "seed": 5})


def sharpness(image: Tensor, axis: int) -> float:
    return float(torch.diff(image, dim=axis).abs().max())


def test_a_sweep_stands_for_one_condition_for_each_value() -> None:
    conditions = parse_conditions(
        {"native": {}, "slices": {"axial_slices_mm": {"sweep": [1, 2.5]}, "noise_percent": 3}}
    )
    assert list(conditions) == ["native", "slices-1", "slices-2.5"]
    assert conditions["slices-2.5"] == {"axial_slices_mm": 2.5, "noise_percent": 3}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({}, "conditions: different ones are needed, found none"),
        ({"a": {"thick": 3}}, "condition a: .* found the setting thick"),
        ({"a/b": {}}, "condition a/b: .* found this name"),
        ({"a-1": {}, "a": {"gamma": {"sweep": [1]}}}, r"conditions: different ones are needed, found twice: \['a-1'\]"),
        (
            {"a": {"gamma": {"sweep": [1]}, "noise_percent": {"sweep": [1]}}},
            "condition a: one setting may be swept, found .*",
        ),
        ({"a": {"contrast": "T3w"}}, "condition a: 'contrast' must be one of T1w, T2w, .*, found T3w"),
        (
            {"a": {"spacing_mm": [1, 5]}},
            "condition a: slices, their profile and the three spacings must be positive .*",
        ),
        ({"a": {"axial_slices_mm": 5, "slice_fwhm_mm": -1}}, "condition a: slices, their profile and .*"),
        (
            {"a": {"axial_slices_mm": 0}},
            "condition a: slices, their profile and the three spacings must be positive .*",
        ),
        (
            {"a": {"axial_slices_mm": 2, "spacing_mm": [1, 1, 2]}},
            "condition a: either 'spacing_mm' or slices are set, .*",
        ),
    ],
)
def test_a_wrong_table_is_told_in_one_line(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        parse_conditions(table)


def test_what_needs_the_anatomy_is_refused_on_real_scans() -> None:
    check_for_real_scans(parse_conditions({"a": {"contrast": "inverted", "noise_percent": 3, "gamma": 1.2}}))
    for settings in ({"rotation_deg": 10}, {"contrast": "T2w"}, {"ranges": {"noise_std": [0, 1]}}):
        with pytest.raises(ValueError, match=r"condition a: for generated scans alone, found .* on real ones"):
            check_for_real_scans(parse_conditions({"a": settings}))


def test_unknown_laws_are_told() -> None:
    with pytest.raises(ValueError, match=r"SynthesisRanges: .* found no noise"):
        parse_conditions({"a": {"ranges": {"noise": 3}}})


def test_a_native_scan_is_left_as_it_is() -> None:
    assert torch.equal(degrade()["image"], make_head())


def test_slices_are_thick_along_their_axis_alone() -> None:
    before = make_head()
    for axis, name in enumerate(("sagittal", "coronal", "axial"), start=1):
        after = degrade(**{f"{name}_slices_mm": 4})["image"]
        for other in (1, 2, 3):
            # the finer box inside: its step along the axis of the slices is spread, that across is weakened by half at most
            inner, was = after[:, 4:20, 4:16, 4:24], before[:, 4:20, 4:16, 4:24]
            share = sharpness(inner, other) / sharpness(was, other)
            assert (share < 0.5) == (other == axis), (name, other, share)
        assert not after[before == 0].any()


def test_slices_of_a_given_profile_without_the_outline_of_the_voxels() -> None:
    """The slices along each axis are Gaussian means about their centres, and what is between is interpolated linearly."""
    head = make_head()
    for axis, name in enumerate(("sagittal", "coronal", "axial")):
        profile = {f"{name}_slices_mm": 4, "slice_fwhm_mm": 4}
        moved = head.as_tensor()[0].movedim(axis, 0).numpy()
        offset = np.arange(len(moved)) - (np.arange(len(moved) // 4)[:, None] * 4 + 1.5)
        weight = np.exp(-4 * np.log(2) * (offset / 4) ** 2)
        slices = np.tensordot(weight / weight.sum(1, keepdims=True), moved, 1)
        position = np.clip((np.arange(len(moved)) - 1.5) / 4, 0, len(slices) - 1)
        below = np.minimum(position.astype(int), len(slices) - 2)
        share = (position - below)[:, None, None]
        expected = (1 - share) * slices[below] + share * slices[below + 1]
        thick = degrade(**profile, keep_zeros=False)["image"].as_tensor()[0].movedim(axis, 0).numpy()
        top = np.quantile(expected, 0.999, method="nearest")
        np.testing.assert_allclose(thick, (expected / top).clip(max=1), atol=0.02)
        assert thick[moved == 0].max() > 0.1  # the outline is as blurred as the rest
        assert not degrade(**profile)["image"].as_tensor()[0].movedim(axis, 0).numpy()[moved == 0].any()


def test_degrading_is_the_same_for_the_same_seed_and_scales_with_the_setting() -> None:
    little, again, much = (degrade(noise_percent=p)["image"].as_tensor() for p in (2, 2, 8))
    assert torch.equal(little, again)
    inside = make_head().as_tensor() == 0.4
    assert 2.5 < float(much[inside].std() / little[inside].std()) < 6


def test_an_added_bias_field_is_the_truth() -> None:
    out = degrade(bias_log_std=0.5)
    field = out["target_log_bias_field"].as_tensor()
    image, before = out["image"].as_tensor(), make_head().as_tensor()
    corrected = image / field.exp()
    assert float(field.std()) > 0.05
    inside = (before == 0.4) & (image < 1)
    assert float(corrected[inside].std() / corrected[inside].mean()) < 1e-3
    assert "target_log_bias_field" not in degrade(noise_percent=2)


def test_an_added_bias_field_is_added_to_that_of_the_scan_in_its_own_grid() -> None:
    turned = torch.tensor([[-2.0, 0, 0, 24], [0, 0, 2, -4], [0, 2, 0, -4], [0, 0, 0, 1]], dtype=torch.float64)
    own = MetaTensor(torch.full((1, 14, 18, 14), 0.25), affine=turned)
    item: dict[Hashable, Any] = {
        "image": make_head(),
        "settings": {"bias_log_std": 0.5},
        "seed": 5,
        "target_log_bias_field": own,
    }
    both, added = (one["target_log_bias_field"] for one in (DegradeScan()(item), degrade(bias_log_std=0.5)))
    torch.testing.assert_close(both.as_tensor(), added.as_tensor() + 0.25)


def test_an_inverted_scan_keeps_its_air() -> None:
    image, before = degrade(contrast="inverted")["image"].as_tensor(), make_head().as_tensor()
    assert not image[before == 0].any()
    assert float(image[before == 0.4].mean()) > float(image[before == 0.9].mean())


@pytest.fixture(scope="module")
def subject() -> dict[Hashable, Any]:
    maps = []
    for name in ("synthseg_generation", "synthseg_head"):
        label_of_id = Protocol.load(name).label_of_id
        maps.append(torch.zeros(1, *SIZE, dtype=torch.uint8))
        maps[-1][:, 3:21, 3:17, 3:25] = label_of_id[3]
        maps[-1][:, 8:12, 6:12, 9:13] = label_of_id[2]
    distance = torch.ones(4, *SIZE)
    return {
        "generation_labels": maps[0], "segmentation": maps[1], "distance": distance, "mni": torch.full((3, *SIZE), 7.0),
        "subject": "one", "name": "one_01", "scan": "one_01", "seed": 3,
    }  # fmt: skip


def generate(subject: dict[Hashable, Any], table: dict[str, Any], name: str) -> dict[Hashable, Any]:
    layout = TaskLayout(["segmentation", "distance", "log_bias_field", "mni"], "synthseg_head")
    return GenerateScan(QUIET, layout, SIZE)({**subject, "settings": table[name]})


def test_conditions_show_the_same_head_with_its_truth(subject: dict[Hashable, Any]) -> None:
    table = {"native": {}, "T2w": {"contrast": "T2w"}, "biased": {"bias_log_std": 0.4}, "turned": {"rotation_deg": 20}}
    native, t2w, biased, turned = (generate(subject, table, name) for name in table)
    ids = native["target_segmentation"].as_tensor()
    assert set(ids.unique().tolist()) == {0, 2, 3}
    for other in (t2w, biased):
        assert torch.equal(other["target_segmentation"], native["target_segmentation"])
    assert not torch.equal(turned["target_segmentation"], native["target_segmentation"])
    white, grey = (native["image"][ids == i].mean() for i in (2, 3))
    assert white > grey
    assert t2w["image"][ids == 2].mean() < t2w["image"][ids == 3].mean()
    assert not native["target_log_bias_field"].any()
    assert float(biased["target_log_bias_field"].std()) > 0.01
    assert native["target_mni"][:, ids[0] > 0].mean() == pytest.approx(7.0)  # mm, not the network's 100 mm
    assert native["target_distance"].shape == (4, *SIZE)
    assert "generation_labels" not in native
    assert torch.equal(generate(subject, table, "native")["image"], native["image"])


def test_the_grid_of_a_generated_scan_is_centred(subject: dict[Hashable, Any]) -> None:
    image = generate(subject, {"native": {}}, "native")["image"]
    centre = torch.tensor([*((n - 1) / 2 for n in SIZE), 1.0], dtype=torch.float64)
    assert torch.allclose(image.affine @ centre, torch.tensor([0.0, 0, 0, 1], dtype=torch.float64))
