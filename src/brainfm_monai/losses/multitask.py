"""The loss of a batch: weighted sum of the losses of all tasks; and weights that are learnt."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, distributed, nn

from brainfm_monai.losses import formulas
from brainfm_monai.tasks import TASKS, TaskLayout, bound_log_scale

GRADIENT_KINDS = ("image", "coordinates")  # whose edges count, too
SMOOTH_KINDS = ("image", "coordinates", "log_field")
# Factors of loss / scale and of log scale in the likelihood that a loss stands for: cross entropy of a softmax divided
# by the scale s^2 (loss / s^2 + log s), squared error of a normal law (loss / 2 s^2 + log s), and for all others
# absolute error of a Laplace law (loss / b + log b).
LIKELIHOODS = {"labels": (1.0, 0.5), "mask": (1.0, 0.5), "embedding": (1.0, 0.5), "log_field": (0.5, 0.5)}


class MultiTaskLoss(nn.Module):
    """Weighted sum of the task losses, each averaged over the samples that have its target.

    In training on several ranks the average is over those of all ranks: the mean of the ranks' gradients, as
    ``DistributedDataParallel`` makes it, is then the gradient of one large batch, also where a rank lacks a target. For
    this the ranks exchange two numbers per task at each call with gradients, so all of them must call alike.

    Args:
        layout: names the channels of the prediction.
        weights: weight by task name, 1 for a task without one; tasks that are not in the layout do not matter.
        gradient_weights: weight of the error of the gradient, relative to the task's, for images and coordinates;
            images without one have weight 1, coordinates 0.
        smoothness_weights: weight of squared second differences of the prediction, relative to the task's, or 0.
        samples: scans of each subject in a batch, one after the other; the embedding is learnt from their agreement,
            and is left out where there is one.
        balance: learns weights, by which the given ones are multiplied, such as :class:`UncertaintyWeights`.

    Raises:
        ValueError: if a weight names what is no task or has no such part, or ``samples`` is smaller than 1.
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
        images = {name: 1.0 for name, kind in kinds.items() if kind == "image"}
        self.weights = _check_names("weights", weights, list(TASKS))
        edged, smooth = ([n for n, kind in kinds.items() if kind in some] for some in (GRADIENT_KINDS, SMOOTH_KINDS))
        self.gradient_weights = images | _check_names("gradient_weights", gradient_weights, edged)
        self.smoothness_weights = _check_names("smoothness_weights", smoothness_weights, smooth)
        if samples < 1:
            raise ValueError(f"MultiTaskLoss: 'samples' must be at least 1, got {samples}")
        self.layout, self.kinds, self.samples, self.balance = layout, kinds, samples, balance
        self.components: dict[str, Tensor] = {}

    def forward(self, pred: Tensor, target: Mapping[str, Tensor]) -> Tensor:
        """Loss of a batch, a scalar; ``components`` keeps the unweighted loss of every task on this rank.

        Args:
            pred: shape (B, layout.channels, H, W, D).
            target: one entry for every task that at least one sample has, (B, channels, H, W, D), or (B,) for a scalar;
                ``visible``, (B, 1, H, W, D), the field of view; optionally ``available_<task>``, (B,), 1 for samples
                that have the target, and ``valid_<task>``, (B, 1, H, W, D), 1 where an image is not defaced.

        Raises:
            ValueError: if an embedding is learnt and the batch does not hold ``samples`` scans of each subject.
        """
        if len(pred) % self.samples:
            found = tuple(pred.shape)
            raise ValueError(f"MultiTaskLoss: 'pred' must hold {self.samples} samples of each subject, got {found}")
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
        return self._join(sums, counts, pred.new_zeros((), dtype=torch.float32) if sums else pred[:0].sum().float())

    def _join(self, sums: Mapping[str, Tensor], counts: Mapping[str, Tensor], zero: Tensor) -> Tensor:
        """Weighted sum of the tasks, each divided by the number of samples that have it."""
        totals = torch.stack([torch.stack([sums.get(n, zero).detach(), counts.get(n, zero)]) for n in self.kinds])
        ranks = 1
        if torch.is_grad_enabled() and distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(totals)  # without gradients, a rank measures for itself
            ranks = distributed.get_world_size()
        terms = []
        for name, (total, count) in zip(self.kinds, totals, strict=True):
            number = count.clamp_min(1)
            loss = sums.get(name, zero) * (ranks / number)
            if self.balance is not None:
                loss = self.balance(name, loss, total / number, (count > 0).to(total.dtype))
            terms.append(self.weights.get(name, 1.0) * loss)
        return torch.stack(terms).sum()

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
            loss = formulas.compute_centred_mse(output, truth, counted)
        else:
            banded = kind == "distance"
            error = formulas.compute_banded_error(output, truth) if banded else (output.float() - truth).abs()
            loss = formulas.compute_laplace_nll(error, parts.get(f"{name}_log_scale"), counted)
        if self.gradient_weights.get(name, 0.0):
            loss = loss + self.gradient_weights[name] * formulas.compute_gradient_l1(output, truth, counted)
        if self.smoothness_weights.get(name, 0.0):
            loss = loss + self.smoothness_weights[name] * formulas.compute_roughness(output, counted)
        return loss


def _check_names(argument: str, weights: Mapping[str, float] | None, possible: list[str]) -> dict[str, float]:
    if unknown := sorted(set(weights or {}) - set(possible)):
        raise ValueError(f"MultiTaskLoss: '{argument}' may name {possible}, got {unknown}")
    return dict(weights or {})


def _per_sample(available: Tensor, like: Tensor) -> Tensor:
    """Which samples have something, as a mask that fits a tensor of any number of dimensions."""
    return (available > 0).reshape(-1, *[1] * (like.ndim - 1))


class UncertaintyWeights(nn.Module):
    """Learns the weight of each task from the size of its loss: one parameter per task, the log of a scale.

    The parameters belong into the optimizer, without weight decay, and into the checkpoints. Their gradient comes from
    the losses of all ranks, see :class:`MultiTaskLoss`: it is the same on each, so that they stay equal without
    ``DistributedDataParallel``. A task with uncertainty of its own has no parameter: its loss is a likelihood. Kendall,
    Gal and Cipolla, Multi-task learning using uncertainty to weigh losses, CVPR 2018.
    """

    def __init__(self, layout: TaskLayout, device: str | torch.device | None = None) -> None:
        super().__init__()
        kinds = {name: task.kind for name, task in layout.tasks.items() if f"{name}_log_scale" not in layout.tasks}
        self.factors = {name: LIKELIHOODS.get(kind, (1.0, 1.0)) for name, kind in kinds.items() if kind != "log_scale"}
        self.places = {name: i for i, name in enumerate(self.factors)}
        self.log_scale = nn.Parameter(torch.zeros(len(self.places), device=device))

    def forward(self, name: str, loss: Tensor, mean: Tensor, present: Tensor) -> Tensor:
        """Weighted loss of a task, a scalar; the loss itself for a task without a parameter.

        ``loss``, of this rank, has the gradient for the network; the scale learns from ``mean``, that of all ranks;
        ``present`` is 1 if any sample on any rank has the target, else 0. All are scalars.
        """
        if name not in self.places:
            return loss
        of_loss, of_scale = self.factors[name]
        log_scale = bound_log_scale(self.log_scale[self.places[name]])
        weight = of_loss * (-log_scale).exp()
        to_scale = weight * mean
        # The value of to_scale is in the loss already: only its gradient is added here.
        return weight.detach() * loss + present * (to_scale - to_scale.detach() + of_scale * log_scale)
