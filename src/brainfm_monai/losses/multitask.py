"""The loss of a batch: weighted sum of the losses of all tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn

from brainfm_monai.losses.contrastive import compute_info_nce
from brainfm_monai.losses.dense import (
    compute_banded_error,
    compute_centred_mse,
    compute_gradient_l1,
    compute_laplace_nll,
    compute_masked_mean,
    compute_pooled_l1,
    compute_roughness,
)
from brainfm_monai.losses.labels import compute_dice_ce, compute_mask_loss
from brainfm_monai.tasks import TASKS, TaskLayout

__all__ = ["MultiTaskLoss"]

GRADIENT_KINDS = ("image", "coordinates")  # whose edges count, too
SMOOTH_KINDS = ("image", "coordinates", "log_field")


@dataclass(frozen=True)
class _Area:
    """Where losses count, masks of shape (B, 1, H, W, D): in the field of view, and of that in the head."""

    visible: Tensor
    head: Tensor


class MultiTaskLoss(nn.Module):
    """Weighted sum of the task losses, each averaged over the samples that have its target.

    In training on several ranks the average is over those of all ranks: the mean of the ranks' gradients, as
    ``DistributedDataParallel`` makes it, is then the gradient of one large batch, also where a rank lacks a target. For this the
    ranks exchange two numbers per task at each call with gradients, so all of them must call alike.

    Args:
        layout: names the channels of the prediction.
        weights: weight by task name; a task without one has weight 1, and tasks that are not in the layout do not matter.
        gradient_weights: weight of the error of the gradient, relative to the task's, for images and coordinates; images
            without one have weight 1, coordinates 0.
        smoothness_weights: weight of squared second differences of the prediction, relative to the task's; 0 without one.
        samples: scans of each subject in a batch, one after the other; the embedding is learnt from their agreement, and is
            left out where there is one.
        balance: learns weights, by which the given ones are multiplied.

    Raises:
        ValueError: if a weight names an unknown task, or a weight of a part a task that has no such part, or ``samples`` is smaller than 1.
    """

    def __init__(
        self,
        layout: TaskLayout,
        weights: Mapping[str, float] | None = None,
        gradient_weights: Mapping[str, float] | None = None,
        smoothness_weights: Mapping[str, float] | None = None,
        samples: int = 1,
        balance: Callable[[str, Tensor, Tensor, Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        kinds = {name: task.kind for name, task in layout.tasks.items() if task.kind != "log_scale"}
        _check_names("weights", weights, list(TASKS))
        _check_names("gradient_weights", gradient_weights, [name for name in kinds if kinds[name] in GRADIENT_KINDS])
        _check_names("smoothness_weights", smoothness_weights, [name for name in kinds if kinds[name] in SMOOTH_KINDS])
        if samples < 1:
            raise ValueError(f"MultiTaskLoss: 'samples' must be at least 1, got {samples}")
        self.layout, self.kinds, self.samples, self.balance = layout, kinds, samples, balance
        self.weights = dict(weights or {})
        self.gradient_weights = {n: 1.0 for n, kind in kinds.items() if kind == "image"} | dict(gradient_weights or {})
        self.smoothness_weights = dict(smoothness_weights or {})
        self.components: dict[str, Tensor] = {}

    def forward(self, pred: Tensor, target: Mapping[str, Tensor]) -> Tensor:
        """Loss of a batch.

        Args:
            pred: shape (B, layout.channels, H, W, D).
            target: one entry for every task that at least one sample has, (B, channels, H, W, D), or (B,) for a scalar;
                ``visible``, (B, 1, H, W, D), the field of view; optionally ``available_<task>``, (B,), 1 for samples that have
                the target, and ``valid_<task>``, (B, 1, H, W, D), 1 where an image is not defaced.

        Returns:
            Scalar. ``components`` holds the unweighted loss of every task on this rank until the next call.

        Raises:
            ValueError: if an embedding is learnt and the batch does not hold ``samples`` scans of each subject.
        """
        if len(pred) % self.samples:
            raise ValueError(
                f"MultiTaskLoss: 'pred' must hold {self.samples} samples of each subject, got {tuple(pred.shape)}"
            )
        parts = self.layout.split(pred)
        area = self._look(target)
        sums, counts = {}, {}
        for name in self.kinds:
            if name in target or (self.kinds[name] == "embedding" and self.samples > 1):
                losses = self._compute(name, parts, target, area)
                available = target.get(f"available_{name}", torch.ones_like(losses)) > 0
                sums[name] = torch.where(available, losses, 0.0).sum()
                counts[name] = available.sum().to(losses.dtype)
        self.components = {name: loss.detach() / counts[name].clamp_min(1) for name, loss in sums.items()}
        if not sums:
            return pred[:0].sum()
        return self._join(sums, counts, pred.new_zeros((), dtype=torch.float32))

    def _join(self, sums: Mapping[str, Tensor], counts: Mapping[str, Tensor], zero: Tensor) -> Tensor:
        """Weighted sum of the tasks, each divided by the number of samples that have it."""
        here = torch.stack([torch.stack([sums.get(n, zero).detach(), counts.get(n, zero)]) for n in self.kinds])
        everywhere, ranks = _add_over_ranks(here)
        terms = []
        for name, (total, count) in zip(self.kinds, everywhere, strict=True):
            number = count.clamp_min(1)
            loss = sums.get(name, zero) * (ranks / number)
            if self.balance is not None:
                loss = self.balance(name, loss, total / number, (count > 0).to(total.dtype))
            terms.append(self.weights.get(name, 1.0) * loss)
        return torch.stack(terms).sum()

    def _look(self, target: Mapping[str, Tensor]) -> _Area:
        visible = target["visible"].bool()
        if "segmentation" not in target:
            return _Area(visible, visible)
        anatomy = target["segmentation"] > 0
        if "available_segmentation" in target:  # where labels are absent, nobody knows what is head
            anatomy = anatomy | ~_per_sample(target["available_segmentation"], anatomy)
        return _Area(visible, visible & anatomy)

    def _compute(self, name: str, parts: Mapping[str, Tensor], target: Mapping[str, Tensor], area: _Area) -> Tensor:
        """Loss of a task per sample, (B,)."""
        output, kind = parts[name], self.kinds[name]
        if kind == "embedding":
            return compute_info_nce(output, area.head, self.samples)
        truth = target[name]
        if f"available_{name}" in target:  # an absent target may hold anything, and NaN would spread over the gradient
            truth = torch.where(_per_sample(target[f"available_{name}"], truth), truth, truth.new_zeros(()))
        if kind == "labels":
            return compute_dice_ce(output, truth)
        if kind == "mask":
            return compute_mask_loss(output, truth, area.visible)
        if kind == "scalar":
            return compute_pooled_l1(output, truth, area.head)
        if kind == "log_field":
            return self._smooth(name, compute_centred_mse(output, truth, area.head), output, area.head)
        return self._compare(name, parts, truth, self._find_counted(name, target, area))

    def _find_counted(self, name: str, target: Mapping[str, Tensor], area: _Area) -> Tensor:
        """Images and distances are known in the air, too, coordinates in the head; what was cut out of an image is unknown."""
        counted = area.head if self.kinds[name] == "coordinates" else area.visible
        return counted & target[f"valid_{name}"].bool() if f"valid_{name}" in target else counted

    def _compare(self, name: str, parts: Mapping[str, Tensor], truth: Tensor, counted: Tensor) -> Tensor:
        """Absolute error, with its scale where the layout has one, and of the gradient."""
        output, scale = parts[name], self.layout.log_scale_of(name)
        error = (
            compute_banded_error(output, truth) if self.kinds[name] == "distance" else (output.float() - truth).abs()
        )
        loss = (
            compute_masked_mean(error, counted) if scale is None else compute_laplace_nll(error, parts[scale], counted)
        )
        if self.gradient_weights.get(name, 0.0):
            loss = loss + self.gradient_weights[name] * compute_gradient_l1(output, truth, counted)
        return self._smooth(name, loss, output, counted)

    def _smooth(self, name: str, loss: Tensor, output: Tensor, counted: Tensor) -> Tensor:
        weight = self.smoothness_weights.get(name, 0.0)
        return loss + weight * compute_roughness(output, counted) if weight else loss


def _check_names(argument: str, weights: Mapping[str, float] | None, possible: list[str]) -> None:
    unknown = sorted(set(weights or {}) - set(possible))
    if unknown:
        raise ValueError(f"MultiTaskLoss: '{argument}' may name {possible}, got {unknown}")


def _per_sample(available: Tensor, like: Tensor) -> Tensor:
    """Which samples have something, as a mask that fits a tensor of any number of dimensions."""
    return (available > 0).reshape(-1, *[1] * (like.ndim - 1))


def _add_over_ranks(values: Tensor) -> tuple[Tensor, int]:
    """Sum over all ranks, and their number; without gradients, a rank measures for itself."""
    if not (torch.is_grad_enabled() and distributed.is_available() and distributed.is_initialized()):
        return values, 1
    total = values.clone()
    distributed.all_reduce(total)
    return total, distributed.get_world_size()
