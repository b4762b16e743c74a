"""Every formula against one written out, missing targets, and the faults of the reference."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf
from monai.losses import DiceLoss
from torch import Tensor

from brainfm_monai.losses import (
    MultiTaskLoss,
    compute_banded_error,
    compute_centred_mse,
    compute_dice_ce,
    compute_gradient_l1,
    compute_info_nce,
    compute_laplace_nll,
    compute_mask_loss,
    compute_masked_mean,
    compute_pooled_l1,
)
from brainfm_monai.tasks import TASKS, TaskLayout

LAYOUT = TaskLayout(["segmentation", "distance", "log_bias_field", "mni"])
SIZE = (5, 6, 4)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def at(values: Tensor, place: tuple[int, ...], sample: int = 0) -> Tensor:
    """All channels at a voxel of a sample."""
    return values[sample].flatten(1)[:, int(np.ravel_multi_index(place, values.shape[2:]))]


def gradient_of(loss: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """Gradient of the sum of a loss, weighted differently for each sample."""
    leaf = at.clone().requires_grad_()
    values = loss(leaf)
    (values * torch.linspace(0.5, 2, values.numel()).reshape(values.shape)).sum().backward()
    assert leaf.grad is not None
    return leaf.grad


# -- labels ----------------------------------------------------------------------------------------------------------------


def test_dice_and_cross_entropy_by_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 3, 4, 2, generator=generator)
    labels = torch.randint(0, 4, (2, 1, 3, 4, 2), generator=generator)  # class 4 is absent
    found = compute_dice_ce(logits, labels)
    for sample in range(2):
        cross_entropy, sums = 0.0, {c: [0.0, 0.0, 0.0] for c in range(5)}
        for place in torch.cartesian_prod(torch.arange(3), torch.arange(4), torch.arange(2)).tolist():
            scores = [math.exp(float(logits[(sample, c, *place)])) for c in range(5)]
            prob, true = [s / sum(scores) for s in scores], int(labels[(sample, 0, *place)])
            cross_entropy -= math.log(prob[true]) / 24
            for c in range(5):
                sums[c][0] += prob[c] * (c == true)
                sums[c][1] += prob[c] ** 2
                sums[c][2] += c == true
        present = [c for c in range(1, 5) if sums[c][2] > 0]
        dice = sum(1 - 2 * sums[c][0] / (sums[c][1] + sums[c][2]) for c in present) / len(present)
        assert float(found[sample]) == pytest.approx(cross_entropy + dice, abs=1e-5)


def test_dice_and_cross_entropy_are_those_of_monai_and_torch() -> None:
    logits, labels = draw(2, 5, *SIZE), draw(2, 5, *SIZE, seed=1).argmax(1, keepdim=True)  # every class is there
    dice = DiceLoss(
        False, to_onehot_y=True, softmax=True, squared_pred=True, reduction="none", smooth_nr=0, smooth_dr=0
    )

    def theirs(x: Tensor) -> Tensor:
        entropy = nnf.cross_entropy(x, labels[:, 0], reduction="none").mean((1, 2, 3))
        return entropy + dice(x, labels).flatten(1).mean(1)

    torch.testing.assert_close(compute_dice_ce(logits, labels), theirs(logits), atol=1e-6, rtol=1e-6)
    found, expected = gradient_of(lambda x: compute_dice_ce(x, labels), logits), gradient_of(theirs, logits)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("spread", [1.0, 60.0])
def test_the_gradient_written_out_is_that_of_the_formula(spread: float) -> None:
    logits, labels = (
        spread * draw(3, 6, *SIZE),
        draw(3, 4, *SIZE, seed=1).argmax(1, keepdim=True),
    )  # classes 4 and 5 are absent
    labels[2] = 0  # nothing but background

    def formula(x: Tensor) -> Tensor:
        log_prob, truth = x.log_softmax(1).flatten(2), nnf.one_hot(labels[:, 0], 6).movedim(-1, 1).flatten(2)
        dice = 1 - 2 * (log_prob.exp() * truth).sum(2) / (log_prob.exp().square() + truth).sum(2)
        present = truth.sum(2) > 0
        present[:, 0] = False
        return -(log_prob * truth).sum(1).mean(1) + (dice * present).sum(1) / present.sum(1).clamp_min(1)

    torch.testing.assert_close(compute_dice_ce(logits, labels), formula(logits), atol=1e-6, rtol=1e-5)
    found, expected = (
        gradient_of(lambda x: compute_dice_ce(x, labels.to(torch.uint8)), logits),
        gradient_of(formula, logits),
    )
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_beside_the_logits_no_volume_of_their_size_waits_for_the_gradient() -> None:
    logits, labels = draw(1, 40, *SIZE).requires_grad_(), torch.zeros(1, 1, *SIZE, dtype=torch.long)
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        compute_dice_ce(logits, labels).sum().backward()
    assert sum(size == logits.numel() for size in kept) == 1
    assert sum(kept) < 1.2 * logits.numel()


# -- maps ------------------------------------------------------------------------------------------------------------------


def test_distance_counts_inside_the_band_and_the_side_beyond_it() -> None:
    target = torch.tensor([1.0, 3.5, -4.0, 3.5, -4.0]).reshape(1, 1, 5, 1, 1)
    pred = torch.tensor([2.0, 6.0, -9.0, 1.0, 0.0]).reshape(1, 1, 5, 1, 1).requires_grad_()
    mask = torch.ones(1, 1, 5, 1, 1, dtype=torch.bool)
    loss = compute_masked_mean(compute_banded_error(pred, target), mask)
    assert float(loss.detach()) == pytest.approx((1 + 0 + 0 + 2 + 3) / 5)
    loss.sum().backward()
    assert pred.grad is not None
    # An error far outside the band still pulls back: the reference clamps the prediction and loses this gradient.
    assert pred.grad.flatten().tolist() == pytest.approx([0.2, 0, 0, -0.2, 0.2])
    far = torch.full((1, 1, 1, 1, 1), 50.0, requires_grad=True)
    compute_banded_error(far, torch.full((1, 1, 1, 1, 1), 0.5)).sum().backward()
    assert far.grad is not None
    assert float(far.grad) == 1.0


def test_bias_error_is_blind_to_the_overall_gain_and_to_what_lies_outside() -> None:
    truth = torch.randn(1, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(1, 1, 4, 4, 4, dtype=torch.bool)
    mask[..., :2] = True
    pred = truth + 0.7
    pred[..., 2:] = 99
    assert float(compute_centred_mse(pred, truth, mask)) == pytest.approx(0, abs=1e-10)
    pred[0, 0, 0, 0, 0] += 1.6
    assert float(compute_centred_mse(pred, truth, mask)) == pytest.approx(1.6**2 / 32 * (1 - 1 / 32), rel=1e-4)


def test_masked_error_divides_by_the_mask() -> None:
    mask = torch.zeros(1, 1, 2, 2, 2)
    mask[..., 0] = 1
    assert float(compute_masked_mean(torch.full((1, 3, 2, 2, 2), 2.0), mask)) == 2.0


def make_targets(batch: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    size = (4, 4, 4)
    return {
        "segmentation": torch.randint(0, 44, (batch, 1, *size), generator=generator),
        "distance": torch.randn(batch, 4, *size, generator=generator),
        "log_bias_field": torch.randn(batch, 1, *size, generator=generator),
        "mni": torch.randn(batch, 3, *size, generator=generator),
        "visible": torch.ones(batch, 1, *size, dtype=torch.bool),
    }


def test_a_missing_target_gives_no_loss_and_no_gradient() -> None:
    targets = make_targets(2)
    pred = torch.randn(2, LAYOUT.channels, 4, 4, 4, requires_grad=True)
    del targets["mni"]
    targets["available_distance"] = torch.tensor([1.0, 0.0])
    targets["distance"][1] = float("nan")
    loss = MultiTaskLoss(LAYOUT)
    loss(pred, targets).backward()
    assert pred.grad is not None
    grads = LAYOUT.split(pred.grad)
    assert float(grads["mni"].abs().max()) == 0
    assert float(grads["distance"][1].abs().max()) == 0
    assert float(grads["distance"][0].abs().min()) > 0
    assert set(loss.components) == {"segmentation", "distance", "log_bias_field"}
    alone = MultiTaskLoss(LAYOUT)
    alone(pred[:1].detach(), {name: value[:1] for name, value in targets.items()})
    assert float(alone.components["distance"]) == pytest.approx(float(loss.components["distance"]))


def test_weights_weigh() -> None:
    targets, pred = make_targets(1), torch.randn(1, LAYOUT.channels, 4, 4, 4)
    loss = MultiTaskLoss(LAYOUT, {"segmentation": 2.0, "distance": 0.0, "log_bias_field": 0.0, "mni": 3.0})
    total = loss(pred, targets)
    assert float(total) == pytest.approx(
        float(2 * loss.components["segmentation"] + 3 * loss.components["mni"]), rel=1e-5
    )
    with pytest.raises(ValueError, match=r"'weights' may name .* found \['T1'\]"):
        MultiTaskLoss(LAYOUT, {"T1": 1.0, "FLAIR": 2.0})  # FLAIR is a task, though not of this layout


def test_mask_loss_is_cross_entropy_plus_dice_inside_the_mask() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 1, 4, 5, 6, generator=generator)
    truth, mask = (torch.rand(2, 1, 4, 5, 6, generator=generator) > 0.6 for _ in range(2))
    found = compute_mask_loss(logits, truth, mask)
    for b in range(2):
        p, t = logits[b][mask[b]].sigmoid(), truth[b][mask[b]].float()
        entropy = -(t * p.log() + (1 - t) * (1 - p).log()).mean()
        dice = (2 * (p * t).sum() + 1) / (p.sum() + t.sum() + 1)
        assert float(found[b]) == pytest.approx(float(entropy + 1 - dice), rel=1e-5)


def test_nothing_predicted_where_nothing_is_costs_nothing() -> None:
    nothing = torch.zeros(1, 1, 4, 4, 4)
    assert float(compute_mask_loss(nothing - 30, nothing, torch.ones_like(nothing))) == pytest.approx(0, abs=1e-5)
    # Dice would punish the sum of all small probabilities, and take the gradient from those of the next lesion.
    few = compute_mask_loss(nothing - 6, nothing, torch.ones_like(nothing))
    assert float(few) == pytest.approx(math.log1p(math.exp(-6)), rel=1e-4)


def test_a_defaced_part_of_an_image_does_not_count() -> None:
    layout = TaskLayout(["T1w"])
    truth, valid = torch.zeros(1, 1, 4, 4, 4), torch.ones(1, 1, 4, 4, 4, dtype=torch.bool)
    valid[:, :, :2] = False
    pred = torch.zeros(1, 1, 4, 4, 4)
    pred[:, :, :2] = 5
    pred[:, :, 2:] = 0.25
    target = {"T1w": truth, "visible": torch.ones_like(valid), "valid_T1w": valid}
    assert float(MultiTaskLoss(layout)(pred, target)) == pytest.approx(0.25)


def test_gradient_error_by_loops() -> None:
    pred, target, mask = draw(2, 3, *SIZE), draw(2, 3, *SIZE, seed=1), draw(2, 1, *SIZE, seed=2) > -0.5

    def formula(x: Tensor) -> Tensor:
        losses = []
        for b in range(2):
            axes = []
            for axis in range(3):
                steps = []
                for place in itertools.product(*map(range, SIZE)):
                    after = tuple(p + (i == axis) for i, p in enumerate(place))
                    if after[axis] < SIZE[axis] and at(mask, place, b) and at(mask, after, b):
                        change = at(x, after, b) - at(x, place, b)
                        wanted = at(target, after, b) - at(target, place, b)
                        steps.append((change - wanted).abs())
                axes.append(torch.stack(steps).mean())
            losses.append(torch.stack(axes).sum())
        return torch.stack(losses)

    torch.testing.assert_close(compute_gradient_l1(pred, target, mask), formula(pred), atol=1e-6, rtol=1e-6)
    found = gradient_of(lambda x: compute_gradient_l1(x, target, mask), pred)
    torch.testing.assert_close(found, gradient_of(formula, pred), atol=1e-6, rtol=1e-6)
    assert float(found[~mask.expand_as(found)].abs().max()) == 0


def test_errors_with_a_scale_are_laplaces_likelihood() -> None:
    pred, target, raw = draw(2, 3, *SIZE), draw(2, 3, *SIZE, seed=1), 2 * draw(2, 3, *SIZE, seed=2)
    mask = draw(2, 1, *SIZE, seed=3) > 0
    scale = (7 * torch.tanh(raw / 7)).exp()
    expected = -torch.distributions.Laplace(pred, scale).log_prob(target) - math.log(2)
    found = compute_laplace_nll((pred - target).abs(), raw, mask)
    for b in range(2):
        torch.testing.assert_close(found[b], expected[b][mask[b].expand_as(expected[b])].mean(), atol=1e-6, rtol=1e-6)
    huge = torch.tensor([1e9, -1e9, 0.0]).reshape(1, 3, 1, 1, 1)
    gradient = gradient_of(lambda x: compute_laplace_nll(torch.full_like(x, 50.0), x, huge[:, :1] > 0), huge)
    assert torch.isfinite(gradient).all()
    best = torch.zeros(
        1, 1, 1, 1, 1, requires_grad=True
    )  # the likelihood is greatest where the scale is the mean error
    optimizer = torch.optim.SGD([best], lr=0.5)
    for _ in range(40):
        optimizer.zero_grad()
        compute_laplace_nll(torch.full_like(best, 0.2), best, best > -99).sum().backward()
        optimizer.step()
    assert math.exp(7 * math.tanh(float(best.detach()) / 7)) == pytest.approx(0.2, rel=1e-3)


def test_a_scalar_is_the_mean_over_the_mask_which_commutes_with_the_head() -> None:
    features, mask = draw(2, 8, *SIZE), draw(2, 1, *SIZE, seed=1) > 0
    head = torch.nn.Conv3d(8, 1, 1)
    truth = torch.tensor([0.3, 0.8])
    pooled = torch.stack([features[b][:, mask[b, 0]].mean(1) for b in range(2)])
    expected = (nnf.linear(pooled, head.weight[:, :, 0, 0, 0], head.bias)[:, 0] - truth).abs()
    torch.testing.assert_close(compute_pooled_l1(head(features), truth, mask), expected, atol=1e-6, rtol=1e-6)


def test_contrast_by_loops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("brainfm_monai.losses.TEMPERATURE", 0.5)
    monkeypatch.setattr("brainfm_monai.losses.LATTICE", 2)
    samples, subjects = 3, 2
    embedding, mask = draw(samples * subjects, 4, 4, 6, 4), draw(samples * subjects, 1, 4, 6, 4, seed=1) > -1
    places = [(x, y, z) for x in (1, 3) for y in (1, 4) for z in (1, 3)]  # a lattice of 2: steps of 2, 3 and 2

    def formula(vectors: Tensor) -> Tensor:
        losses = []
        for first in range(len(vectors)):
            group = [s for s in range(len(vectors)) if s // samples == first // samples]
            counted = [p for p in places if all(at(mask, p, s) for s in group)]
            parts = []
            for second in [s for s in group if s != first]:
                a, b = (nnf.normalize(torch.stack([at(vectors, p, s) for p in counted])) for s in (first, second))
                parts.append(nnf.cross_entropy(a @ b.T / 0.5, torch.arange(len(counted))))
            losses.append(torch.stack(parts).mean())
        return torch.stack(losses)

    def ours(x: Tensor) -> Tensor:
        return compute_info_nce(x, mask, samples)

    torch.testing.assert_close(ours(embedding), formula(embedding), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(gradient_of(ours, embedding), gradient_of(formula, embedding), atol=1e-6, rtol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(ours(embedding), formula(embedding.double()).float(), atol=1e-5, rtol=1e-5)
    nowhere = torch.zeros_like(mask)
    gradient = gradient_of(lambda x: compute_info_nce(x, nowhere, samples), embedding)
    assert float(gradient.abs().max()) == 0


def test_contrast_falls_where_samples_agree_and_is_left_out_for_one_sample() -> None:
    same = draw(1, 16, 16, 16, 16).expand(2, -1, -1, -1, -1)
    everywhere = torch.ones(2, 1, 16, 16, 16, dtype=torch.bool)
    assert float(compute_info_nce(same, everywhere, 2).max()) < 0.6
    assert float(compute_info_nce(draw(2, 16, 16, 16, 16, seed=1), everywhere, 2).min()) > math.log(512)
    layout = TaskLayout(["embedding", "CT"])
    targets = {"CT": torch.zeros_like(everywhere).float(), "visible": everywhere}
    loss = MultiTaskLoss(layout)
    pred = torch.cat([same, targets["CT"]], 1).requires_grad_()
    loss(pred, targets).backward()
    assert set(loss.components) == {"CT"}
    assert pred.grad is not None
    assert float(pred.grad.abs().max()) == 0
    pairs = MultiTaskLoss(layout, samples=2)
    assert float(pairs(pred, targets).detach()) == pytest.approx(float(compute_info_nce(same, everywhere, 2).mean()))
    with pytest.raises(ValueError, match=r"'pred' must hold 2 samples of each subject, found \(1, 17, 16, 16, 16\)"):
        pairs(pred[:1], targets)
    with pytest.raises(ValueError, match="'samples' must be at least 1, found 0"):
        MultiTaskLoss(layout, samples=0)


# -- all tasks together ----------------------------------------------------------------------------------------------------

EVERY = TaskLayout(list(TASKS), "brainfm", uncertainty=["T1w", "distance", "mni"])


def make_all_targets(batch: int, size: tuple[int, int, int] = SIZE) -> dict[str, Tensor]:
    """Targets of all tasks, in a head that does not fill the volume."""
    targets = {}
    for seed, (name, task) in enumerate(TASKS.items()):
        values = draw(batch, max(task.channels, 1), *size, seed=seed)
        targets[name] = {"mask": values > 0, "scalar": values.mean((1, 2, 3, 4)).abs()}.get(task.kind, values)
    del targets["embedding"]
    targets["segmentation"] = draw(batch, 56, *size, seed=50).argmax(1, keepdim=True) * (
        draw(batch, 1, *size, seed=51) > -0.5
    )
    targets["visible"] = draw(batch, 1, *size, seed=52) > -1.5
    targets["valid_T1w"] = draw(batch, 1, *size, seed=53) > -1
    return targets


@pytest.mark.parametrize("name", [name for name in TASKS if name != "embedding"])
def test_an_absent_target_is_as_if_the_sample_were_not_there(name: str) -> None:
    targets, pred = make_all_targets(3), draw(3, EVERY.channels, *SIZE, seed=99)
    loss = MultiTaskLoss(EVERY)
    present = torch.tensor([1.0, 0.0, 1.0])
    here = present > 0
    batch = {**targets, f"available_{name}": present}
    batch[name] = targets[name].clone()
    batch[name][1] = float("nan") if targets[name].is_floating_point() else 1
    pred.requires_grad_()
    loss(pred, batch)
    # Only the loss of this task: the others have all three samples.
    only = MultiTaskLoss(EVERY, dict.fromkeys(set(TASKS) - {name}, 0.0))
    total = only(pred, batch)
    total.backward()
    assert pred.grad is not None
    smaller = pred.detach()[here].requires_grad_()
    expected = only(smaller, {key: value[here] for key, value in targets.items()})
    expected.backward()
    assert smaller.grad is not None
    assert float(total.detach()) == pytest.approx(float(expected.detach()), rel=1e-6)
    torch.testing.assert_close(pred.grad[here], smaller.grad, atol=1e-8, rtol=1e-6)
    assert float(pred.grad[1].abs().max()) == 0
    assert float(smaller.grad.abs().max()) > 0
    assert float(loss.components[name]) == pytest.approx(float(only.components[name]), rel=1e-6)


def test_absent_labels_do_not_empty_the_head_for_the_other_tasks() -> None:
    layout = TaskLayout(["segmentation", "mni"])
    targets, pred = make_all_targets(1), draw(1, layout.channels, *SIZE, seed=5)
    without = {name: targets[name] for name in ("mni", "visible")}
    filled = {
        **without,
        "segmentation": torch.zeros(1, 1, *SIZE, dtype=torch.long),
        "available_segmentation": torch.zeros(1),
    }
    losses = []
    for batch in (without, filled):
        loss = MultiTaskLoss(layout)
        loss(pred, batch)
        losses.append(float(loss.components["mni"]))
    assert losses[0] == losses[1] > 0.1


def test_a_batch_without_any_target_has_a_gradient_of_nothing() -> None:
    pred = draw(1, LAYOUT.channels, *SIZE).requires_grad_()
    total = MultiTaskLoss(LAYOUT)(pred, {"visible": torch.ones(1, 1, *SIZE)})
    total.backward()
    assert pred.grad is not None
    assert float(total.detach()) == float(pred.grad.abs().max()) == 0


def test_images_count_in_the_air_and_not_where_they_were_cut_out() -> None:
    layout = TaskLayout(["segmentation", "T1w"])
    targets = make_all_targets(2)
    targets["segmentation"] = torch.zeros_like(targets["segmentation"])  # air everywhere
    pred = draw(2, layout.channels, *SIZE, seed=5).requires_grad_()
    loss = MultiTaskLoss(layout, {"segmentation": 0.0})
    loss(pred, targets).backward()
    counted = targets["visible"] & targets["valid_T1w"]
    image = pred.detach()[:, layout.slices["T1w"]]
    expected = compute_masked_mean((image - targets["T1w"]).abs(), counted) + compute_gradient_l1(
        image, targets["T1w"], counted
    )
    assert float(loss.components["T1w"]) == pytest.approx(float(expected.mean()), rel=1e-6)
    assert pred.grad is not None
    gradient = pred.grad[:, layout.slices["T1w"]]
    assert float(gradient[~counted].abs().max()) == 0
    assert float(gradient[counted].abs().min()) > 0


def test_an_image_that_is_cut_out_whole_has_no_loss_and_no_nan() -> None:
    targets = {"T1w": torch.full((1, 1, *SIZE), 5.0), "visible": torch.ones(1, 1, *SIZE, dtype=torch.bool)}
    targets["valid_T1w"] = ~targets["visible"]
    pred = draw(1, 2, *SIZE).requires_grad_()
    total = MultiTaskLoss(TaskLayout(["T1w"], uncertainty=["T1w"]))(pred, targets)
    total.backward()
    assert pred.grad is not None
    assert float(total.detach()) == float(pred.grad.abs().max()) == 0


def test_a_scan_without_a_bias_field_teaches_that_there_is_none() -> None:
    layout = TaskLayout(["log_bias_field"])  # such as a CT: its target is a field of zeros, and it counts
    pred = draw(1, 1, *SIZE)
    targets = {"log_bias_field": torch.zeros(1, 1, *SIZE), "visible": torch.ones(1, 1, *SIZE)}
    assert float(MultiTaskLoss(layout)(pred, targets)) == pytest.approx(float(pred.var(correction=0)), rel=1e-5)


def test_a_weight_of_any_task_weighs_its_gradient() -> None:
    targets, pred = make_all_targets(2), draw(2, EVERY.channels, *SIZE, seed=9)
    sizes = {}
    for weight in (1.0, 3.0):
        weights = {name: weight if name in ("lesion", "T1w", "age") else 0.0 for name in TASKS}
        leaf = pred.clone().requires_grad_()
        MultiTaskLoss(EVERY, weights)(leaf, targets).backward()
        assert leaf.grad is not None
        sizes[weight] = {name: float(part.abs().sum()) for name, part in EVERY.split(leaf.grad).items()}
    for name, task in EVERY.tasks.items():
        touched = name.removesuffix("_log_scale") in ("lesion", "T1w", "age")
        assert (sizes[1.0][name] > 0) == touched, task
        assert sizes[3.0][name] == pytest.approx(3 * sizes[1.0][name], rel=1e-5)


def test_a_weight_of_what_is_no_task_is_named() -> None:
    with pytest.raises(ValueError, match=r"'weights' may name .* found \['mni_log_scale'\]"):
        MultiTaskLoss(TaskLayout(["mni"], uncertainty=["mni"]), {"mni_log_scale": 1.0})


def test_the_loss_waits_for_nothing(watch_host: Any) -> None:
    targets, pred = make_all_targets(4), draw(4, EVERY.channels, *SIZE, seed=9).requires_grad_()
    targets |= {f"available_{name}": torch.tensor([1.0, 0, 1, 1]) for name in TASKS if name != "embedding"}
    loss = MultiTaskLoss(EVERY, samples=2)
    with watch_host() as watch:
        loss(pred, targets).backward()
    assert watch.found == []
    assert set(loss.components) == set(TASKS)


# -- several ranks -----------------------------------------------------------------------------------------------------

RANKS = """
import sys
import torch
from torch import distributed
from brainfm_monai.losses import MultiTaskLoss
from brainfm_monai.tasks import TaskLayout

layout = TaskLayout(["segmentation", "distance", "log_bias_field", "mni"])
folder, rank = sys.argv[1], int(sys.argv[2])
given = torch.load(f"{folder}/given.pt")
distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
pred, targets = (given[name] for name in ("pred", "targets"))
pred, targets = pred[rank : rank + 1].clone().requires_grad_(), {name: value[rank : rank + 1] for name, value in targets.items()}
if rank == 1:
    del targets["mni"], targets["available_mni"]
loss = MultiTaskLoss(layout)
total = loss(pred, targets)
total.backward()
if rank == 0:
    with torch.no_grad():
        loss(pred, targets)  # a measurement waits for no other rank
torch.save({"total": total.detach(), "pred": pred.grad}, f"{folder}/{rank}.pt")
distributed.barrier()
distributed.destroy_process_group()  # a thread of gloo that lives when the interpreter ends would abort the process
"""


def test_two_ranks_with_different_targets_make_the_gradient_of_one_batch(tmp_path: Path) -> None:
    targets = make_targets(2)
    targets["available_mni"] = torch.tensor([1.0, 0.0])
    pred = draw(2, LAYOUT.channels, 4, 4, 4).requires_grad_()
    torch.save({"pred": pred.detach(), "targets": targets}, tmp_path / "given.pt")
    (tmp_path / "rank.py").write_text(RANKS)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(tmp_path / "rank.py"), str(tmp_path)]
    running = [subprocess.Popen([*command, str(rank)], env=environment, stderr=subprocess.PIPE) for rank in range(2)]
    try:
        total = MultiTaskLoss(LAYOUT)(pred, targets)
        total.backward()
        errors = [process.communicate(timeout=600)[1].decode() for process in running]
    finally:
        for process in running:  # one whose partner failed would wait for it
            process.kill()
    assert [process.returncode for process in running] == [0, 0], errors
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    # DistributedDataParallel averages the gradients of the weights over ranks.
    averaged = torch.cat([first["pred"], second["pred"]]) / 2
    torch.testing.assert_close(averaged, pred.grad, atol=1e-8, rtol=1e-5)
    assert float((first["total"] + second["total"]) / 2) == pytest.approx(float(total.detach()), rel=1e-6)
