"""The loss of a batch: weighted sum of the losses of all tasks."""

from collections.abc import Mapping

import torch
from torch import Tensor, distributed, nn

from brainfm_monai.io import refuse_if
from brainfm_monai.losses import formulas
from brainfm_monai.tasks import TASKS, TaskLayout


class MultiTaskLoss(nn.Module):
    """Weighted sum of the task losses, each averaged over the samples that have its target.

    In training on several ranks the average is over those of all ranks: the mean of the ranks' gradients, as
    ``DistributedDataParallel`` makes it, is then the gradient of one large batch, also where a rank lacks a target. For
    this the ranks exchange a number per task at each call with gradients, so all of them must call alike.

    Args:
        layout: names the channels of the prediction.
        weights: weight by task name, 1 for a task without one; what is no task is a ValueError.
        samples: scans of each subject in a batch, one after the other, at least 1, else a ValueError; the embedding is
            learnt from their agreement, and is left out where there is one.
    """

    def __init__(self, layout: TaskLayout, weights: Mapping[str, float] | None = None, samples: int = 1) -> None:
        super().__init__()
        if unknown := sorted(set(weights or {}) - set(TASKS)):
            raise ValueError(f"MultiTaskLoss: 'weights' may name {list(TASKS)}, got {unknown}")
        refuse_if(samples < 1, "MultiTaskLoss: 'samples' must be at least 1", samples)
        self.layout, self.weights, self.samples = layout, dict(weights or {}), samples
        self.kinds = {name: task.kind for name, task in layout.tasks.items() if task.kind != "log_scale"}
        self.components: dict[str, Tensor] = {}

    def forward(self, pred: Tensor, target: Mapping[str, Tensor]) -> Tensor:
        """Loss of a batch, a scalar; ``components`` keeps the unweighted loss of every task on this rank.

        The prediction is (B, layout.channels, H, W, D); B is a multiple of ``samples``, else a ValueError. Targets have
        one entry for every task that at least one sample has, (B, channels, H, W, D), or (B,) for a scalar;
        ``visible``, (B, 1, H, W, D), the field of view; optionally ``available_<task>``, (B,), 1 for samples that have
        the target, and ``valid_<task>``, (B, 1, H, W, D), 1 where an image is not defaced.
        """
        rule = f"MultiTaskLoss: 'pred' must hold {self.samples} samples of each subject"
        refuse_if(len(pred) % self.samples, rule, tuple(pred.shape))
        parts = self.layout.split(pred)
        visible = head = target["visible"].bool()
        if "segmentation" in target:
            head = visible & (target["segmentation"] > 0)
            if "available_segmentation" in target:  # where labels are absent, nobody knows what is head
                head = torch.where(_per_sample(target["available_segmentation"], head), head, visible)
        sums, counts = {}, {}
        for name, kind in self.kinds.items():
            if name in target or (kind == "embedding" and self.samples > 1):
                losses = self._compute(name, parts, target, visible, head)
                available = target.get(f"available_{name}", torch.ones_like(losses)) > 0
                sums[name] = torch.where(available, losses, 0.0).sum()
                counts[name] = available.sum().to(losses.dtype)
        self.components = {name: loss.detach() / counts[name].clamp_min(1) for name, loss in sums.items()}
        # Without any target, the loss is 0 with a gradient of nothing.
        zero = pred.new_zeros((), dtype=torch.float32) if sums else pred[:0].sum().float()
        total, ranks = torch.stack([counts.get(name, zero.detach()) for name in self.kinds]), 1
        if torch.is_grad_enabled() and distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(total)  # without gradients, a rank measures for itself
            ranks = distributed.get_world_size()
        means = {n: sums.get(n, zero) * (ranks / c.clamp_min(1)) for n, c in zip(self.kinds, total, strict=True)}
        return torch.stack([self.weights.get(name, 1.0) * mean for name, mean in means.items()]).sum()

    def _compute(
        self, name: str, parts: Mapping[str, Tensor], target: Mapping[str, Tensor], visible: Tensor, head: Tensor
    ) -> Tensor:
        """Loss of a task per sample, (B,), where the field of view and the head in it count, masks (B, 1, H, W, D)."""
        output, kind = parts[name], self.kinds[name]
        if kind == "embedding":
            return formulas.compute_info_nce(output, head, self.samples)
        truth = target[name]
        if f"available_{name}" in target:  # an absent target may hold anything, and NaN would spread over the gradient
            truth = torch.where(_per_sample(target[f"available_{name}"], truth), truth, truth.new_zeros(()))
        if kind == "labels":
            return formulas.compute_dice_ce(output, truth)
        if kind == "mask":
            return formulas.compute_mask_loss(output, truth, visible)
        if kind == "scalar":
            return formulas.compute_pooled_l1(output, truth, head)
        # Images and distances are known in the air, too; what was cut out of an image is unknown.
        counted = head if kind in ("coordinates", "log_field") else visible
        if f"valid_{name}" in target:
            counted = counted & target[f"valid_{name}"].bool()
        if kind == "log_field":
            return formulas.compute_centred_mse(output, truth, counted)
        banded = kind == "distance"
        error = formulas.compute_banded_error(output, truth) if banded else (output.float() - truth).abs()
        loss = formulas.compute_laplace_nll(error, parts.get(f"{name}_log_scale"), counted)
        return loss + formulas.compute_gradient_l1(output, truth, counted) if kind == "image" else loss


def _per_sample(available: Tensor, like: Tensor) -> Tensor:
    """Which samples have something, as a mask that fits a tensor of any number of dimensions."""
    return (available > 0).reshape(-1, *[1] * (like.ndim - 1))
