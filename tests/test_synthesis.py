"""Rendering: analytic phantoms, alignment of image and every target, and the reference's faults, each as a test."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from brainfm_monai.anatomy import Protocol
from brainfm_monai.engines import SynthesisPrepareBatch
from brainfm_monai.functional import spatial
from brainfm_monai.synthesis import FLAGS, SynthesisParams, SynthesisRanges, Synthesizer, render
from brainfm_monai.synthesis.acquisition import acquire
from brainfm_monai.synthesis.rendering import make_coordinates
from brainfm_monai.tasks import TASKS, TaskLayout

SIZE = (24, 28, 20)
GENERATION = Protocol.load("synthseg_generation")
TARGETS = ["segmentation", "T1w", "T2w", "FLAIR", "CT", "distance", "log_bias_field", "mni", "lesion"]
LAYOUT = TaskLayout(TARGETS)
LEFT_CORTEX, RIGHT_CORTEX, SKIN = (LAYOUT.protocol.label_of_id[i] for i in (3, 42, 511))
CENTRE = torch.tensor([11.5, 13.5, 9.5]).reshape(1, 3, 1, 1, 1)
# A draw of these does nothing: the sample is the subject itself.
STILL = SynthesisRanges(
    rotation_deg=(0, 0),
    shear=(0, 0),
    scaling=(1, 1),
    translation_mm=(0, 0),
    velocity_std_mm=(0, 0),
    mirror_prob=0,
    gamma_log_std=0,
    bias_log_std=(0, 0),
    resolution_weights=(1, 0, 0, 0),
    noise_std=(0, 0),
    real_noise_std=(0, 0),
    rician_prob=0,
    skull_strip_prob=0,
    head_removal_prob=0,
    head_cluster_prob=0,
    deface_prob=0,
    field_of_view_prob=0,
    std=(0, 0),
    dark_background_prob=1,
    mixup_prob=0,
)
# Everything at once, often.
BUSY = SynthesisRanges(
    contrast_prior_prob=0.5,
    head_cluster_prob=0.5,
    mixup_prob=0.5,
    dissection_photo_prob=0.3,
    ghost_prob=0.5,
    head_removal_prob=0.2,
    hemisphere_prob=0.2,
    deface_prob=0.5,
    deface_offset_mm=(3, 6),
    field_of_view_prob=0.5,
    lesion_prob=0.7,
    translation_mm=(-2, 2),
)


def change(**changes: Any) -> SynthesisRanges:
    return dataclasses.replace(STILL, **changes)


def draw(
    ranges: SynthesisRanges,
    *seeds: int,
    stride: int = 1,
    available: Mapping[str, Tensor] | None = None,
    generation: str = "synthseg_generation",
) -> SynthesisParams:
    size = tuple(n // stride for n in SIZE)
    synthesizer = Synthesizer(ranges, LAYOUT, size, scan_mm=stride, label_mm=1.0, generation_protocol=generation)
    flags = {f"available_{name}": value for name, value in (available or {}).items()}
    return synthesizer.draw(flags, seeds, device="cpu")


def make_subject(batch: int = 1, images: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """An asymmetric head: skin around, left cortex a box, right cortex a smaller and lower one; world coordinates as MNI."""
    ids = torch.zeros(SIZE, dtype=torch.long)
    ids[2:22, 3:25, 2:18] = 511
    ids[4:11, 6:22, 4:16] = 3
    ids[13:19, 6:15, 4:9] = 42
    labels, segmentation = (torch.as_tensor(p.encode(ids.numpy()))[None, None] for p in (GENERATION, LAYOUT.protocol))
    world = spatial.identity_grid(SIZE) - CENTRE
    distance = torch.cat([world[:, :1] + 4, world[:, :1] + 3, 4 - world[:, :1], 5 - world[:, :1]], dim=1).clamp(
        -6.4, 6.35
    )
    subject = {"generation_labels": labels, "segmentation": segmentation, "distance": distance, "mni": world}
    for place, name in enumerate(images):
        image = (ids > 0) * (0.2 + 0.02 * spatial.identity_grid(SIZE)[0, place % 3]) + 0.3 * (ids == 3)
        subject[name] = (image * 80 if name == "CT" else image)[None, None].float()
    return {name: value.expand(batch, *value.shape[1:]) for name, value in subject.items()}


def there(*names: str, batch: int = 1) -> dict[str, Tensor]:
    return {name: torch.ones(batch, dtype=torch.bool) for name in names}


def only(name: str) -> tuple[float, ...]:
    return tuple(float(n == name) for n in ("synthetic", "T1w", "T2w", "FLAIR", "CT"))


# -- one sample ------------------------------------------------------------------------------------------------------------


def test_a_draw_of_nothing_gives_the_subject_itself() -> None:
    subject = make_subject(images=("T1w", "CT"))
    out = render(subject, draw(STILL, 3, available={}), LAYOUT)
    assert torch.equal(out["segmentation"], subject["segmentation"].long())
    torch.testing.assert_close(out["distance"], subject["distance"], atol=1e-4, rtol=0)
    torch.testing.assert_close(out["mni"] * 100, subject["mni"], atol=1e-3, rtol=0)
    # Every plane is there, also the first ones (the reference's interpolation loses them).
    torch.testing.assert_close(out["T1w"], subject["T1w"], atol=1e-5, rtol=0)
    torch.testing.assert_close(
        out["CT"][subject["segmentation"] > 0], subject["CT"][subject["segmentation"] > 0] / 1000, atol=1e-5, rtol=0
    )
    assert float(out["log_bias_field"].abs().max()) == 0
    assert not out["lesion"].any()
    # Painted without spread: one intensity for each label, and nothing else.
    for label in subject["generation_labels"].unique():
        assert float(out["image"][subject["generation_labels"] == label].std()) < 1e-4


def test_image_and_every_target_move_together() -> None:
    ranges = change(rotation_deg=(12, 12), translation_mm=(2, 2), velocity_std_mm=(1, 1), scaling=(0.9, 0.9))
    subject = make_subject(images=("T1w", "T2w", "FLAIR"))
    params = draw(ranges, 4)
    out = render(subject, params, LAYOUT)
    source = make_coordinates(params.geometry, SIZE)
    inside = ((source > 1) & (source < torch.tensor(SIZE).reshape(1, 3, 1, 1, 1) - 2)).all(1, keepdim=True)
    # MNI is the source position here; it is interpolated between points of 2 mm, where the field bends.
    missed = ((out["mni"] * 100 + CENTRE - source).abs() * inside).amax(1)
    assert float(missed.max()) < 0.5
    assert float(missed.sum() / inside.sum()) < 0.03
    expected = spatial.gather_nearest(subject["segmentation"], source).long()
    assert float((out["segmentation"] == expected)[inside].float().mean()) > 0.999
    for name in ("T1w", "T2w", "FLAIR"):
        torch.testing.assert_close(out[name] * inside, spatial.warp(subject[name], source) * inside, atol=1e-4, rtol=0)
    shrink = float(torch.linalg.det(params.geometry.matrix)) ** (-1 / 3)
    assert shrink == pytest.approx(1 / 0.9, rel=1e-4)
    distance = spatial.warp(subject["distance"], source, padding_mode="border") * shrink
    torch.testing.assert_close(out["distance"] * inside, distance * inside, atol=1e-3, rtol=0)
    painted = spatial.gather_nearest(subject["generation_labels"], source)
    core = inside & (torch.nn.functional.max_pool3d((painted != GENERATION.label_of_id[3]).float(), 5, 1, 2) == 0)
    assert int(core.sum()) > 50
    assert float(out["image"][core].std()) < 1e-3


def test_distances_of_a_scaled_plane_are_millimetres_again() -> None:
    subject = make_subject()
    subject["distance"] = (spatial.identity_grid(SIZE)[:, 1:2] - 13.5).expand(-1, 4, -1, -1, -1)
    out = render(subject, draw(change(scaling=(0.8, 0.8)), 0), LAYOUT)
    expected = spatial.identity_grid(SIZE)[:, 1:2] - 13.5
    torch.testing.assert_close(out["distance"][:, :1], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_mirror_turns_the_grid_over_without_folds(stride: int) -> None:
    ranges = change(rotation_deg=(10, 10), translation_mm=(1, 2), velocity_std_mm=(1, 1), mirror_prob=1)
    params = draw(dataclasses.replace(ranges, velocity_spacing_mm=(14, 14)), 1, 2, stride=stride)
    coordinates = make_coordinates(params.geometry, SIZE)
    assert float((coordinates - spatial.identity_grid(coordinates.shape[2:]) * stride).abs().max()) > 3
    assert float(spatial.jacobian_determinant(coordinates).max()) < 0


def test_velocity_fields_of_the_default_ranges_do_not_fold() -> None:
    size = (96, 96, 96)
    ranges = change(velocity_std_mm=(4, 4), velocity_spacing_mm=(18, 18))
    params = Synthesizer(ranges, LAYOUT, size).draw({}, [0], device="cpu")
    coordinates = make_coordinates(params.geometry, size)
    assert float((coordinates - spatial.identity_grid(size)).abs().max()) > 6
    # Control vectors of 4 mm every 18 mm are the roughest field that can be drawn; a linear lattice may crease in a few voxels.
    assert float((spatial.jacobian_determinant(coordinates) <= 0).float().mean()) < 1e-3


def test_coarser_targets_and_stride_two_keep_world_positions() -> None:
    subject = make_subject(images=("T1w",))
    half = {**subject, **{name: torch.nn.functional.avg_pool3d(subject[name], 2) for name in ("mni", "distance")}}
    fine = render(subject, draw(STILL, 0, stride=2), LAYOUT)
    coarse = render(half, draw(STILL, 0, stride=2), LAYOUT)
    assert fine["image"].shape[2:] == (12, 14, 10)
    torch.testing.assert_close(fine["mni"] * 100, half["mni"], atol=1e-3, rtol=0)
    torch.testing.assert_close(coarse["mni"], fine["mni"], atol=1e-5, rtol=0)
    torch.testing.assert_close(coarse["distance"][:, :, 1:-1], fine["distance"][:, :, 1:-1], atol=0.05, rtol=0)


@pytest.mark.parametrize("mirrored", [False, True])
def test_voxels_of_two_millimetres_are_means_of_the_labels_in_them(mirrored: bool) -> None:
    subject = make_subject()
    params = draw(change(mirror_prob=float(mirrored)), 0, stride=2)
    means = params.appearances[0].mean[0, subject["generation_labels"][0, 0].long()]
    expected = torch.nn.functional.avg_pool3d(means[None, None], 2)
    expected = (expected.flip(2) if mirrored else expected) / expected.max()
    image = render(subject, params, LAYOUT)["image"]
    assert len(expected.unique()) > len(means.unique()) + 3  # partial volumes
    assert float((image / image.max() - expected).abs().max()) < 0.02


def test_millimetres_stay_millimetres_on_a_coarser_source() -> None:
    ranges = dataclasses.replace(
        SynthesisRanges(),
        velocity_std_mm=(4, 4),
        translation_mm=(6, 6),
        resolution_weights=(0, 1, 0, 0),
        clinical_spacing_mm=(8, 8),
    )
    draws = []
    for mm in (1.0, 2.0):
        sizes = tuple(int(49 / mm) for _ in range(3))
        draws.append(Synthesizer(ranges, LAYOUT, sizes, scan_mm=mm).draw({}, range(8), device="cpu"))
    fine, coarse = (d.geometry for d in draws)
    torch.testing.assert_close(coarse.translation * 2, fine.translation)
    torch.testing.assert_close(coarse.velocity_spacing * 2, fine.velocity_spacing)
    assert float(coarse.velocity.std() * 2) == pytest.approx(float(fine.velocity.std()), rel=0.1)
    appearance = draws[1].appearances[0]
    assert sorted(appearance.spacing[0].tolist()) == [1, 1, 4]
    # White noise of 1 mm is averaged over eight voxels.
    torch.testing.assert_close(appearance.std * 8**0.5, draws[0].appearances[0].std)


# -- mirror ----------------------------------------------------------------------------------------------------------------


def test_mirror_moves_everything_to_the_other_side_by_the_tables() -> None:
    subject = make_subject(images=("T1w", "CT"))
    subject["T1w_defacing_mask"] = (spatial.identity_grid(SIZE)[:, :1] < 5).to(torch.uint8)
    subject["lesion"] = (subject["segmentation"] == RIGHT_CORTEX).to(torch.uint8)
    plain, mirrored = (render(subject, draw(change(mirror_prob=p), 0), LAYOUT) for p in (0, 1))
    # Left is low along the first axis; each of these would lie on the wrong side if it were mirrored twice or not at all.
    for name in ("image", "T1w", "CT", "valid_T1w", "lesion"):
        torch.testing.assert_close(mirrored[name], plain[name].flip(2))
        assert not torch.equal(mirrored[name], plain[name])
    left = plain["segmentation"] == LEFT_CORTEX
    assert int(left.sum()) > 0
    assert torch.equal(mirrored["segmentation"].flip(2) == RIGHT_CORTEX, left)
    torch.testing.assert_close(mirrored["distance"], plain["distance"].flip(2)[:, [2, 3, 0, 1]])
    torch.testing.assert_close(mirrored["mni"][:, 0], -plain["mni"].flip(2)[:, 0])
    torch.testing.assert_close(mirrored["mni"][:, 1:], plain["mni"].flip(2)[:, 1:])


def test_mirroring_a_mirrored_subject_gives_the_subject_for_every_task() -> None:
    subject = make_subject(images=("T1w", "T2w", "FLAIR", "CT"))
    once = render(subject, draw(change(mirror_prob=1), 0), LAYOUT)
    again = {
        **subject,
        "segmentation": once["segmentation"].to(torch.uint8),
        "distance": once["distance"],
        "mni": once["mni"] * 100,
    }
    again |= {name: once[name] * TASKS[name].scale for name in ("T1w", "T2w", "FLAIR", "CT")}
    twice = render(again, draw(change(mirror_prob=1), 0), LAYOUT)
    plain = render(subject, draw(STILL, 0), LAYOUT)
    for name in ("segmentation", "distance", "mni", "T1w", "T2w", "FLAIR", "CT"):
        torch.testing.assert_close(twice[name], plain[name], atol=1e-4, rtol=0)


def test_mirror_rules_are_their_own_inverse() -> None:
    for task in TASKS.values():
        order = task.mirror_order or tuple(range(task.channels))
        assert [order[i] for i in order] == list(range(task.channels))


# -- what is taken away ----------------------------------------------------------------------------------------------------


def test_skull_stripping_removes_the_head_from_image_and_segmentation() -> None:
    out = render(
        make_subject(images=("T1w", "CT")), draw(change(skull_strip_prob=1, strip_threshold=(0.5, 0.5)), 0), LAYOUT
    )
    assert set(out["segmentation"].unique().tolist()) == {0, LEFT_CORTEX, RIGHT_CORTEX}
    head = (slice(None), slice(None), 2, 3, 2)
    assert float(out["image"][head].max()) == 0
    assert float(out["T1w"][head].max()) == 0
    assert float(out["CT"][head].max()) == -1  # air, in units of 1000 HU
    assert float(out["image"][:, :, 7, 12, 10].min()) > 0


def test_a_removed_head_is_painted_as_background() -> None:
    ranges = change(head_removal_prob=1, dark_background_prob=0, mean=(100, 200))
    out = render(make_subject(), draw(ranges, 0), LAYOUT)
    assert SKIN not in out["segmentation"]
    skin, air = out["image"][0, 0, 2, 3, 2], out["image"][0, 0, 0, 0, 0]
    torch.testing.assert_close(skin, air)
    assert out["visible"].all()


@pytest.mark.parametrize("mirror_prob", [0.0, 1.0])
def test_left_hemispheres_are_left_ones_whatever_the_mirror(mirror_prob: float) -> None:
    ranges = change(hemisphere_prob=1, left_hemisphere=True, mirror_prob=mirror_prob, strip_threshold=(0.5, 0.5))
    out = render(make_subject(), draw(ranges, 0), LAYOUT)
    assert set(out["segmentation"].unique().tolist()) == {0, LEFT_CORTEX}
    assert bool((out["distance"][:, 2:] >= 6).all())
    assert float(out["distance"][:, :2].min()) < 0


def test_either_hemisphere_may_stay() -> None:
    found = [
        render(make_subject(), draw(change(hemisphere_prob=1, strip_threshold=(0.5, 0.5)), seed), LAYOUT)[
            "segmentation"
        ]
        for seed in range(8)
    ]
    assert {tuple(f.unique().tolist()) for f in found} == {(0, LEFT_CORTEX), (0, RIGHT_CORTEX)}


def test_field_of_view_empties_everything_outside_it() -> None:
    out = render(make_subject(), draw(change(field_of_view_prob=1, field_of_view_loss=(0.25, 0.25)), 0), LAYOUT)
    assert torch.equal(out["visible"][0, 0].nonzero().amin(0), torch.tensor([6, 7, 5]))
    assert torch.equal(out["visible"][0, 0].nonzero().amax(0), torch.tensor([17, 20, 14]))
    assert float((out["image"] * ~out["visible"]).abs().max()) == 0
    assert int((out["segmentation"] * ~out["visible"]).max()) == 0


def test_defacing_takes_what_lies_before_a_plane_and_never_the_brain() -> None:
    ranges = change(deface_prob=1, deface_angle_deg=(45, 45), deface_offset_mm=(4, 4))
    subject = make_subject()
    out = render(subject, draw(ranges, 0), LAYOUT)
    world = spatial.identity_grid(SIZE) - CENTRE
    before = (world[:, 1:2] - world[:, 2:3]) / 2**0.5 > 4
    brain = (subject["segmentation"] == LEFT_CORTEX) | (subject["segmentation"] == RIGHT_CORTEX)
    assert int((before & brain).sum()) > 0
    assert torch.equal(out["visible"], ~(before & ~brain))
    assert float((out["image"] * ~out["visible"]).max()) == 0
    assert not (out["segmentation"] * ~out["visible"]).any()
    without = render({k: v for k, v in subject.items() if k != "mni"}, draw(ranges, 0), LAYOUT)
    assert without["visible"].all()


def test_a_given_defacing_mask_moves_with_its_image() -> None:
    subject = make_subject(images=("T1w", "T2w"))
    subject["T1w_defacing_mask"] = (subject["segmentation"] == RIGHT_CORTEX).to(torch.uint8)
    out = render(subject, draw(change(rotation_deg=(8, 8), mirror_prob=1), 0), LAYOUT)
    assert "valid_T2w" not in out
    assert torch.equal(~out["valid_T1w"], out["segmentation"] == LEFT_CORTEX)
    nothing = {**subject, "T1w_defacing_mask": torch.zeros_like(subject["T1w_defacing_mask"])}
    assert render(nothing, draw(STILL, 0), LAYOUT)["valid_T1w"].all()


def test_outside_the_subject_there_is_air() -> None:
    subject = make_subject(images=("T1w", "CT"))
    out = render(subject, draw(change(translation_mm=(15, 15), dark_background_prob=0), 2), LAYOUT)
    outside = (slice(None), slice(None), slice(14, None))
    # A bright background goes on outside the subject's box.
    assert float(out["image"][outside].std()) < 1e-5
    torch.testing.assert_close(out["image"][0, 0, 20, 5, 5], out["image"][0, 0, 8, 0, 0])
    assert float(out["image"][0, 0, 20, 5, 5]) > 0
    assert float(out["CT"][outside].max()) == pytest.approx(-1, abs=1e-5)
    assert float(out["distance"][outside].min()) == 6


# -- contrast --------------------------------------------------------------------------------------------------------------


def test_partial_volume_codes_are_painted_between_their_tissues() -> None:
    appearance = draw(SynthesisRanges(), 0, generation="brainfm_generation").appearances[0]
    mean, variance = appearance.mean[0], appearance.std[0].square()
    for code, (first, second, share) in {
        125: (1, 2, 0.5),
        160: (2, 3, 0.2),
        230: (3, 4, 0.6),
        250: (4, 4, 1.0),
    }.items():
        for values in (mean, variance):
            torch.testing.assert_close(
                values[code], (1 - share) * values[first] + share * values[second], rtol=1e-4, atol=1e-4
            )
    torch.testing.assert_close(mean[77], mean[2])


def test_gamma_turns_about_its_top() -> None:
    appearance, image = draw(STILL, 0, 1).appearances[0], spatial.identity_grid(SIZE)[:, :1].repeat(2, 1, 1, 1, 1) * 15
    appearance.gamma = torch.tensor([1.0, 2.0])
    out = acquire(image, appearance)[2]
    torch.testing.assert_close(out[0], image[0])
    torch.testing.assert_close(out[1], image[1] ** 2 / 300)


def test_texture_has_the_std_of_its_law() -> None:
    subject = make_subject()
    image = render(subject, draw(change(mean=(100, 100), std=(7, 7)), 0), LAYOUT)["image"]
    inner = image[subject["segmentation"] == LEFT_CORTEX]
    assert float(inner.std() / inner.mean()) == pytest.approx(0.07, rel=0.1)


def test_both_sides_of_a_structure_share_their_contrast() -> None:
    appearance = draw(SynthesisRanges(contrast_prior_prob=0.5), 0, 1, 2, 3).appearances[0]
    mirror = GENERATION.mirror_permutation
    assert torch.equal(appearance.mean, appearance.mean[:, mirror])
    assert torch.equal(appearance.std, appearance.std[:, mirror])


def test_contrast_priors_follow_their_tables() -> None:
    def means(name: str) -> dict[int, float]:
        ranges = change(
            contrast_prior_prob=1, contrast_priors=(name,), contrast_prior_spread=0, contrast_inversion_prob=0
        )
        mean = draw(ranges, 0).appearances[0].mean[0]
        return {i: float(mean[GENERATION.label_of_id[i]]) for i in (2, 3, 4, 515)}

    t1w, t2w, flair, ct = (means(name) for name in ("T1w", "T2w", "FLAIR", "CT"))
    assert t1w[4] < t1w[3] < t1w[2]
    assert t2w[2] < t2w[3] < t2w[4]
    assert flair[4] < flair[2] < flair[3]
    # CT in a window of 0 to 80 HU: fluid dark, grey above white matter, bone at the top.
    assert ct[4] < ct[2] < ct[3] < ct[515] == 225
    assert ct[2] == pytest.approx(29 / 80 * 225, abs=6)


def test_ct_like_contrasts_have_no_bias_field_and_no_rician_noise() -> None:
    ranges = dataclasses.replace(SynthesisRanges(), contrast_prior_prob=1, contrast_priors=("CT",), rician_prob=1)
    appearance = draw(ranges, 0, 1, 2).appearances[0]
    assert not appearance.bias.any()
    assert not appearance.rician.any()


def test_head_clusters_divide_the_head_alone_into_connected_parts() -> None:
    from scipy import ndimage

    ranges = change(
        head_cluster_prob=1,
        head_cluster_std=(40, 40),
        head_cluster_spacing_mm=(12, 12),
        dark_background_prob=1,
        mean=(120, 180),
    )
    subject = make_subject()
    out = render(subject, draw(ranges, 2), LAYOUT)["image"]
    skin, cortex = out[subject["segmentation"] == SKIN], out[subject["segmentation"] == LEFT_CORTEX]
    levels = [round(float(v), 3) for v in skin.unique()]
    values, counts = np.unique(np.round(skin.numpy(), 3), return_counts=True)
    big = values[counts > 50]
    assert 2 <= len(big) <= 4, levels
    assert float(cortex.std()) < 1e-5
    for value in big:
        _, parts = ndimage.label(np.isclose(out[0, 0].numpy(), value, atol=2e-3))
        assert parts <= 12  # blobs and not salt: hundreds of voxels in a handful of pieces


# -- real images -----------------------------------------------------------------------------------------------------------


def test_a_real_image_is_shown_as_it_is_and_mirrored_once() -> None:
    subject = make_subject(images=("T1w", "T2w"))
    for probability in (0.0, 1.0):
        ranges = change(input_weights=only("T2w"), mirror_prob=probability)
        out = render(subject, draw(ranges, 0, available=there("T1w", "T2w")), LAYOUT)
        expected = subject["T2w"].flip(2) if probability else subject["T2w"]
        seen = out["image"] / out["T2w"].clamp_min(1e-6)
        inner = (expected > 0.1) & (out["image"] < 0.99)
        assert float(seen[inner].std() / seen[inner].mean()) < 1e-3
        torch.testing.assert_close(out["T2w"], expected, atol=1e-5, rtol=0)


def test_only_images_that_are_there_are_drawn() -> None:
    available = {
        "T1w": torch.tensor([True, False, True, False] * 100),
        "CT": torch.tensor([True, True, False, False] * 100),
    }
    blend = draw(dataclasses.replace(STILL, mixup_prob=0.5), *range(400), available=available).appearances[0].blend
    torch.testing.assert_close(blend.sum(1), torch.ones(400))
    assert float(blend[1::2, 1].max()) == 0
    assert float(blend[2::4, 4].max()) == 0
    assert float(blend[:, 2:4].max()) == 0
    assert float(blend[3::4, 0].min()) == 1
    # Equal chance for the synthetic image and every real one.
    alone = blend[0::4][(blend[0::4] == 1).any(1)]
    real = (alone.argmax(1) == 1).float().sum() / 100
    assert float(real) == pytest.approx(1 / 3, abs=5 * (2 / 9 / 100) ** 0.5)


def test_mixup_mixes_images_of_one_scale() -> None:
    # The reference adds images in [0, 1] to one in [0, 255]: its mixture is the synthetic image, dimmed.
    subject = make_subject(images=("T1w",))
    params = draw(dataclasses.replace(STILL, mixup_prob=1, input_weights=only("synthetic")), 5, available=there("T1w"))
    share = params.appearances[0].blend[0]
    assert 0.1 < float(share[1]) < 0.9
    assert float(share[2:].max()) == 0
    out = render(subject, params, LAYOUT)
    mean = params.appearances[0].mean[0][subject["generation_labels"].long()]
    expected = share[0] * mean + share[1] * 255 * subject["T1w"]
    inner = (subject["segmentation"] > 0) & (out["image"] < 0.99)
    ratio = (out["image"] / expected)[inner]
    assert float(ratio.std() / ratio.mean()) < 1e-3


def test_ct_as_input_is_clamped_to_its_window_and_has_no_bias() -> None:
    subject = make_subject(images=("CT",))
    subject["CT"][:, :, 14:18] = 300
    subject["CT"][0, 0, 5, 7, 5:15] = torch.linspace(-20, 120, 10)
    ranges = change(input_weights=only("CT"), ct_low_hu=(10, 10), ct_high_hu=(60, 60), bias_log_std=(0.5, 0.5))
    out = render(subject, draw(ranges, 0, available=there("CT")), LAYOUT)
    shown, hu = out["image"][0, 0, 5, 7, 5:15], torch.linspace(-20, 120, 10)
    torch.testing.assert_close(shown, ((hu - 10) / 50).clamp(0, 1), atol=2e-3, rtol=0)
    assert float(out["log_bias_field"].abs().max()) == 0
    torch.testing.assert_close(out["CT"][0, 0, 5, 7, 5:15], hu / 1000, atol=1e-5, rtol=0)


def test_real_images_get_noise_of_their_own_size() -> None:
    # The reference's noise of real scans is in [0, 0.02] whatever the scanner's unit, which is nothing.
    subject = make_subject(images=("T1w",))
    ranges = change(input_weights=only("T1w"), real_noise_std=(5, 5), noise_std=(50, 50))
    noisy, plain = (
        render(subject, draw(r, 0, available=there("T1w")), LAYOUT)["image"]
        for r in (ranges, change(input_weights=only("T1w")))
    )
    inner = subject["segmentation"] == LEFT_CORTEX
    scale = float((plain / subject["T1w"])[inner & (plain < 0.99)].mean())
    inner = inner & (plain < 0.9) & (noisy < 0.99)
    assert float((noisy - plain)[inner].std() / scale) == pytest.approx(5 / 255, rel=0.35)


# -- several samples of a subject ------------------------------------------------------------------------------------------


def test_samples_of_a_subject_share_anatomy_and_differ_in_appearance() -> None:
    severe = SynthesisRanges(mean=(50, 200), bias_log_std=(0.5, 0.6), noise_std=(10, 15), translation_mm=(0, 0))
    synthesizer = Synthesizer(severe, LAYOUT, SIZE, samples=4, mild_samples=2)
    out = synthesizer(make_subject(2), [0, 1])
    assert out["image"].shape == (8, 1, *SIZE)
    for name in ("segmentation", "distance", "mni", "visible"):
        first = out[name].reshape(2, 4, *out[name].shape[1:])
        assert torch.equal(first[:, :1].expand_as(first), first)
        assert not torch.equal(first[0], first[1])
    images = out["image"].reshape(2, 4, -1)
    for i in range(4):
        for j in range(i):
            assert float((images[:, i] - images[:, j]).abs().mean()) > 0.01
    bias = out["log_bias_field"].reshape(2, 4, -1).std(2)
    assert float(bias[:, :2].max()) < 0.02
    assert float(bias[:, 2:].min()) > 2 * float(bias[:, :2].max())
    assert [r.noise_std for r in synthesizer.laws] == [(0, 5), (0, 5), (10, 15), (10, 15)]


def test_super_resolution_is_the_sample_before_slices_and_noise() -> None:
    layout = TaskLayout(["segmentation", "super_resolution", "log_bias_field"])
    kinder = change(bias_log_std=(0.3, 0.3), gamma_log_std=0.2, std=(0, 0))
    thick = dataclasses.replace(kinder, resolution_weights=(0, 0, 0, 1), coarse_spacing_mm=(4, 4), noise_std=(10, 10))
    sharp, blurred = (Synthesizer(r, layout, SIZE, samples=2)(make_subject(2), [0, 1]) for r in (kinder, thick))
    assert sharp["super_resolution"].shape == sharp["image"].shape == (4, 1, *SIZE)
    torch.testing.assert_close(sharp["super_resolution"], sharp["image"], atol=1e-5, rtol=0)
    # What is drawn apart from slices and noise does not depend on them: only the scan is degraded.
    torch.testing.assert_close(blurred["super_resolution"], sharp["super_resolution"], atol=1e-5, rtol=0)
    assert float((blurred["image"] - sharp["image"]).abs().mean()) > 0.02
    assert "super_resolution" not in render(make_subject(), draw(STILL, 0), LAYOUT)


def test_the_age_goes_with_its_samples() -> None:
    layout = TaskLayout(["segmentation", "age"])
    ages = torch.tensor([31.0, 64.5], dtype=torch.float64)  # as a DataLoader makes them of Python's numbers
    batch = {**make_subject(2), "subject": ["a", "b"], "age": ages, "available_age": torch.tensor([1.0, 0.0])}
    _, targets = SynthesisPrepareBatch(Synthesizer(STILL, layout, SIZE, samples=2))(batch, "cpu")
    torch.testing.assert_close(targets["age"], torch.tensor([0.31, 0.31, 0.645, 0.645]))  # unit: 100 years
    assert targets["available_age"].tolist() == [1, 1, 0, 0]
    assert "age" not in render({**make_subject(), "age": ages[:1]}, draw(STILL, 0), LAYOUT)


def test_mild_laws_are_an_instance_and_leave_the_severe_ones_alone() -> None:
    severe = SynthesisRanges()
    mild = severe.make_mild()
    assert severe == SynthesisRanges()
    assert mild.noise_std == (0, 5)
    assert mild.bias_log_std == (0, 0.02)
    assert mild.rotation_deg == severe.rotation_deg


def test_too_many_mild_samples_are_named() -> None:
    with pytest.raises(ValueError, match=r"'mild_samples' must be in \[0, 2\] of at least one sample, found 3"):
        Synthesizer(SynthesisRanges(), LAYOUT, SIZE, samples=2, mild_samples=3)


# -- lesions ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bright", [True, False])
def test_lesions_lie_in_the_brain_and_change_the_image_there(bright: bool) -> None:
    prior = {"contrast_prior_prob": 1, "contrast_prior_spread": 0, "contrast_inversion_prob": 0}
    ranges = change(
        lesion_prob=1,
        lesion_coverage=(0.2, 0.2),
        lesion_change=(0.5, 0.5),
        contrast_priors=("T2w" if bright else "T1w",),
        **prior,
    )
    subject = make_subject()
    out = render(subject, draw(ranges, 1), LAYOUT)
    brain = (subject["segmentation"] == LEFT_CORTEX) | (subject["segmentation"] == RIGHT_CORTEX)
    assert 0.03 < float(out["lesion"].sum() / brain.sum()) < 0.4
    assert not (out["lesion"] & ~brain).any()
    healthy = float(out["image"][brain & ~out["lesion"]].mean())
    ill = float(out["image"][out["lesion"]].mean())
    assert ill > 1.3 * healthy if bright else ill < 0.7 * healthy


def test_own_lesions_move_with_the_subject_and_are_not_painted_over_real_images() -> None:
    subject = make_subject(images=("T1w",))
    subject["lesion"] = torch.zeros_like(subject["segmentation"])
    subject["lesion"][:, :, 5:9, 8:14, 6:10] = 1
    ranges = change(input_weights=only("T1w"), rotation_deg=(7, 7))
    with_map, without = (
        render(s, draw(ranges, 0, available=there("T1w")), LAYOUT)
        for s in (subject, {k: v for k, v in subject.items() if k != "lesion"})
    )
    assert torch.equal(with_map["image"], without["image"])
    source = with_map["mni"] * 100 + CENTRE  # a linear map: exact
    expected = spatial.gather_nearest(subject["lesion"], source) > 0
    assert float((with_map["lesion"] == expected).float().mean()) > 0.999
    painted = render(subject, draw(change(rotation_deg=(7, 7), lesion_change=(0.8, 0.8)), 0), LAYOUT)
    bare = render(
        {k: v for k, v in subject.items() if k != "lesion"},
        draw(change(rotation_deg=(7, 7), lesion_change=(0.8, 0.8)), 0),
        LAYOUT,
    )
    assert float((painted["image"] - bare["image"])[painted["lesion"]].abs().mean()) > 0.02


def test_a_borrowed_shape_is_carried_by_a_flow_and_stays_in_the_brain() -> None:
    subject = make_subject()
    subject["lesion_shape"] = torch.zeros_like(subject["segmentation"])
    subject["lesion_shape"][:, :, 5:10, 8:20, 5:15] = 1
    still, flowing = (
        render(subject, draw(change(lesion_prob=1, lesion_coverage=(0.1, 0.1), lesion_flow_mm=(mm, mm)), 3), LAYOUT)[
            "lesion"
        ]
        for mm in (0, 3)
    )
    shape = subject["lesion_shape"] > 0
    assert float((still & shape).sum() / (still | shape).sum()) > 0.7
    assert not torch.equal(still, flowing)
    assert int(flowing.sum()) > 50
    left = subject["segmentation"] == LEFT_CORTEX
    assert not (flowing & ~(left | (subject["segmentation"] == RIGHT_CORTEX))).any()


# -- targets that are absent -----------------------------------------------------------------------------------------------


def test_no_target_for_what_the_subject_lacks_and_availability_is_handed_on() -> None:
    subject = {name: value for name, value in make_subject(2).items() if name != "distance"}
    subject["available_mni"] = torch.tensor([1.0, 0.0])
    out = Synthesizer(STILL, LAYOUT, SIZE, samples=2)(subject, [0, 1])
    assert "distance" not in out
    assert "T1w" not in out
    assert out["available_mni"].tolist() == [1, 1, 0, 0]


def test_missing_and_painted_images_are_never_inputs() -> None:
    subject = make_subject(images=("T1w", "T2w"))
    subject |= {"available_T1w": torch.ones(1), "real_T1w": torch.ones(1)}
    real = {"available_T2w": torch.ones(1), "real_T2w": torch.ones(1)}
    ranges = change(input_weights=(0, 1, 1, 0, 0))

    def shares(flags: dict[str, Tensor]) -> Tensor:
        draws = [Synthesizer(ranges, LAYOUT, SIZE).draw(subject | flags, [seed]) for seed in range(12)]
        return torch.cat([params.appearances[0].blend for params in draws])

    assert set(shares(real).argmax(1).tolist()) == {1, 2}
    for flags in (real | {"available_T2w": torch.zeros(1)}, real | {"real_T2w": torch.zeros(1)}):
        assert set(shares(flags).argmax(1).tolist()) == {1}
    flags_alone = {key: value for key, value in (subject | real).items() if key.startswith(FLAGS)}
    synthesizer = Synthesizer(ranges, LAYOUT, SIZE)
    drawn, again = synthesizer.draw(subject | real, [3]), synthesizer.draw(flags_alone, [3], device="cpu")
    assert torch.equal(drawn.appearances[0].noise, again.appearances[0].noise)
    assert torch.equal(drawn.appearances[0].blend, again.appearances[0].blend)


# -- seeds, batches, faces -------------------------------------------------------------------------------------------------


def full_batch(batch: int) -> dict[str, Tensor]:
    subject = make_subject(batch, images=("T1w", "T2w", "FLAIR", "CT"))
    subject["lesion"] = (subject["segmentation"] == RIGHT_CORTEX).to(torch.uint8)
    return subject


def test_the_same_seed_gives_the_same_sample_in_any_batch_and_order() -> None:
    synthesizer = Synthesizer(BUSY, LAYOUT, SIZE, samples=2)
    seeds = list(range(5, 13))
    batch = synthesizer(full_batch(8), seeds)
    turned = synthesizer(full_batch(8), seeds[::-1])
    for place, seed in enumerate(seeds):
        alone = synthesizer(full_batch(1), [seed])
        for name, value in alone.items():
            here, there_ = slice(2 * place, 2 * place + 2), slice(14 - 2 * place, 16 - 2 * place)
            for other in (batch[name][here], turned[name][there_]):
                if value.dtype.is_floating_point:
                    torch.testing.assert_close(other, value, atol=2e-3, rtol=1e-3)
                else:
                    assert float((other != value).float().mean()) < 2e-3  # a tie of rounding on a boundary
    assert float((batch["image"][0] - batch["image"][2]).abs().mean()) > 0.01


def test_global_generators_are_left_alone() -> None:
    before, python_before = torch.get_rng_state(), random.getstate()
    numpy_before = np.random.get_state()  # noqa: NPY002 (this is the global generator that has to stay untouched)
    Synthesizer(BUSY, LAYOUT, SIZE)(full_batch(1), [0])
    numpy_after = np.random.get_state()  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before)
    assert random.getstate() == python_before
    assert all(np.array_equal(a, b) for a, b in zip(numpy_before, numpy_after, strict=True))


def test_a_subject_may_name_its_generation_protocol_but_a_batch_has_one() -> None:
    subject = make_subject(2)
    subject["generation_labels"] = (subject["segmentation"] > 0).to(torch.uint8) * 175
    prepare = SynthesisPrepareBatch(Synthesizer(STILL, LAYOUT, SIZE))
    image, _ = prepare({**subject, "subject": ["a", "b"], "generation_protocol": ["brainfm_generation"] * 2}, "cpu")
    assert float(image.max()) > 0
    with pytest.raises(
        ValueError, match=r"one 'generation_protocol', found \['brainfm_generation', 'synthseg_generation'\]"
    ):
        prepare({**subject, "generation_protocol": ["brainfm_generation", "synthseg_generation"]}, "cpu")


# -- purity ----------------------------------------------------------------------------------------------------------------


def test_rendering_waits_for_nothing_and_draws_nothing(watch_host: Any) -> None:
    subject, params = full_batch(2), None
    synthesizer = Synthesizer(BUSY, LAYOUT, SIZE, samples=2)
    params = synthesizer.draw(subject, [0, 1])
    with watch_host() as watch, torch.no_grad():
        render(subject, params, LAYOUT)
    assert watch.found == []
    with watch_host() as watch:
        torch.tensor([1.0]).item()
    assert {"lift_fresh", "_local_scalar_dense"} <= set(watch.found)


def test_rendering_leaves_subject_and_draw_as_they_were() -> None:
    subject = full_batch(1)
    before = {name: value.clone() for name, value in subject.items()}
    synthesizer = Synthesizer(BUSY, LAYOUT, SIZE)
    params = synthesizer.draw(subject, [0])
    first, second = render(subject, params, LAYOUT), render(subject, params, LAYOUT)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(torch.equal(subject[name], before[name]) for name in before)


@pytest.mark.gpu
def test_a_gpu_renders_what_the_host_renders_without_synchronisation() -> None:
    synthesizer = Synthesizer(BUSY, LAYOUT, SIZE)
    subject = full_batch(2)
    params = synthesizer.draw(subject, [0, 1])
    expected = render(subject, params, LAYOUT)
    device = torch.device("cuda")
    there_, moved = {name: value.to(device) for name, value in subject.items()}, params.to(device)
    render(there_, moved, LAYOUT)
    torch.cuda.set_sync_debug_mode("error")
    found = render(there_, moved, LAYOUT)
    torch.cuda.set_sync_debug_mode("default")
    for name, value in expected.items():
        if value.dtype.is_floating_point:
            torch.testing.assert_close(found[name].cpu(), value, atol=2e-2, rtol=1e-2)
        else:
            assert float((found[name].cpu() != value).float().mean()) < 1e-2
