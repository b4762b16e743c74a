import math

import pytest
import torch

from brainfm_monai.losses import (
    MultiTaskLoss,
    compute_centred_mse,
    compute_dice_ce,
    compute_distance_l1,
    compute_mask_loss,
    compute_masked_l1,
)
from brainfm_monai.tasks import TaskLayout

LAYOUT = TaskLayout(["segmentation", "distance", "log_bias_field", "mni"])


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
                sums[c][1] += prob[c]
                sums[c][2] += c == true
        present = [c for c in range(1, 5) if sums[c][2] > 0]
        dice = sum(1 - 2 * sums[c][0] / (sums[c][1] + sums[c][2]) for c in present) / len(present)
        assert float(found[sample]) == pytest.approx(cross_entropy + dice, abs=1e-5)


def test_distance_counts_inside_the_band_and_the_side_beyond_it() -> None:
    target = torch.tensor([1.0, 3.5, -4.0, 3.5, -4.0]).reshape(1, 1, 5, 1, 1)
    pred = torch.tensor([2.0, 6.0, -9.0, 1.0, 0.0]).reshape(1, 1, 5, 1, 1).requires_grad_()
    mask = torch.ones(1, 1, 5, 1, 1, dtype=torch.bool)
    loss = compute_distance_l1(pred, target, mask)
    assert float(loss.detach()) == pytest.approx((1 + 0 + 0 + 2 + 3) / 5)
    loss.sum().backward()
    assert pred.grad is not None
    # An error far outside the band still pulls back: the reference clamps the prediction and loses this gradient.
    assert pred.grad.flatten().tolist() == pytest.approx([0.2, 0, 0, -0.2, 0.2])
    far = torch.full((1, 1, 1, 1, 1), 50.0, requires_grad=True)
    compute_distance_l1(far, torch.full((1, 1, 1, 1, 1), 0.5), mask[:, :, :1]).sum().backward()
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
    assert float(compute_masked_l1(torch.full((1, 3, 2, 2, 2), 2.0), torch.zeros(1, 3, 2, 2, 2), mask)) == 2.0


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
    assert float(total) == pytest.approx(float(2 * loss.components["segmentation"] + 3 * loss.components["mni"]), rel=1e-5)
    with pytest.raises(ValueError, match=r"'weights' may name .* got \['T1w'\]"):
        MultiTaskLoss(LAYOUT, {"T1w": 1.0})


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


def test_a_defaced_part_of_an_image_does_not_count() -> None:
    layout = TaskLayout(["T1w"])
    truth, valid = torch.zeros(1, 1, 4, 4, 4), torch.ones(1, 1, 4, 4, 4, dtype=torch.bool)
    valid[:, :, :2] = False
    pred = torch.zeros(1, 1, 4, 4, 4)
    pred[:, :, :2] = 5
    pred[:, :, 2:] = 0.25
    target = {"T1w": truth, "visible": torch.ones_like(valid), "valid_T1w": valid}
    assert float(MultiTaskLoss(layout)(pred, target)) == pytest.approx(0.25)
