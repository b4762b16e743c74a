"""Formulas from predictions, targets and masks (B, C, H, W, D) to losses per sample, (B,), and the loss of a batch."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, distributed, nn
from torch.autograd.function import once_differentiable

from brainfm_monai.io import refuse_if
from brainfm_monai.tasks import MAX_DISTANCE_MM, TASKS, TaskLayout, bound_log_scale

TEMPERATURE = 0.1  # the best of SimCLR's for vectors of length 1 (Chen et al., ICML 2020, table 5)
LATTICE = 8  # points along each axis, at most: 512 places to distinguish, whatever the size of the volume


class _DiceCrossEntropy(torch.autograd.Function):
    """Both losses and their gradient written out: beside the logits, one volume of their size exists, not five."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, index: Tensor) -> Tensor:
        """Loss per sample, (B,), of logits (B, L, N) in float32 and labels (B, 1, N) in int64."""
        batch, classes, voxels = logits.shape
        normaliser = logits.logsumexp(1, keepdim=True)
        log_true = logits.gather(1, index) - normaliser
        predicted = (logits - normaliser).exp_().square_().sum(2)
        zeros = logits.new_zeros(batch, classes)
        truth = zeros.scatter_add(1, index[:, 0], torch.ones_like(log_true[:, 0]))
        overlap = zeros.scatter_add(1, index[:, 0], log_true[:, 0].exp())
        size = (truth + predicted).clamp_min(1.0)
        present = (truth > 0) & (torch.arange(classes, device=truth.device) > 0)
        weight = present / present.sum(1, keepdim=True).clamp_min(1)
        ctx.save_for_backward(logits, normaliser, index, overlap, size, weight)
        return ((1 - 2 * overlap / size) * weight).sum(1) - log_true.sum((1, 2)) / voxels

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Gradient of the logits, from those of the probabilities p by p (g - sum p g)."""
        logits, normaliser, index, overlap, size, weight = ctx.saved_tensors
        weight = weight * gradient[:, None]
        of_overlap, of_square = -2 * weight / size, 2 * weight * overlap / size.square()
        entropy = gradient[:, None] / logits.shape[2]
        probability = (logits - normaliser).exp_()
        mean = at_truth = probability.gather(1, index)[:, 0] * of_overlap.gather(1, index[:, 0])
        for label in range(logits.shape[1]):  # a class at a time, and below in place: no second volume is needed
            mean = torch.addcmul(mean, probability[:, label].square(), of_square[:, label, None], value=2)
        for label in range(logits.shape[1]):
            of_class = torch.addcmul(entropy - mean, probability[:, label], of_square[:, label, None], value=2)
            probability[:, label].mul_(of_class)
        return probability.scatter_add_(1, index, (at_truth - entropy)[:, None]), None


def compute_dice_ce(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy plus soft Dice over the foreground classes that are present, without a one-hot volume, in float32.

    Labels are (B, 1, H, W, D), integers. The sizes of the Dice are sums of squares, ``2 sum(p t) / (sum(p^2) +
    sum(t))`` (Milletari et al., V-Net, 3DV 2016). Where a voxel is uncertain, the best p is then near the probability,
    as it is for the cross entropy; with plain sums thin structures come out too large.
    """
    return _DiceCrossEntropy.apply(logits.float().flatten(2), labels.flatten(2).long())


def compute_mask_loss(logits: Tensor, truth: Tensor, mask: Tensor) -> Tensor:
    """Binary cross entropy plus, where the true mask is not empty, one minus its soft Dice, per sample (B,).

    Dice of an empty mask would drive all probabilities below one voxel in sum, where the gradient of Dice vanishes: a
    network that saw healthy scans in half of its steps never learnt a lesion. Dice adds 1 above and below.
    """
    logits, truth = logits.float(), truth.float()
    cross_entropy = compute_masked_mean(nnf.binary_cross_entropy_with_logits(logits, truth, reduction="none"), mask)
    pred, truth = (logits.sigmoid() * mask).flatten(1), (truth * mask).flatten(1)
    dice = (2 * (pred * truth).sum(1) + 1) / (pred.sum(1) + truth.sum(1) + 1)
    return cross_entropy + torch.where(truth.sum(1) > 0, 1 - dice, 0.0)


def compute_masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the voxels of a mask (B, 1, H, W, D) and all channels; 0 where the mask is empty."""
    counted = mask.bool()
    total = torch.where(counted, values, 0.0).sum((1, 2, 3, 4))
    return total / (counted.sum((1, 2, 3, 4)) * values.shape[1]).clamp_min(1)


def compute_gradient_l1(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Absolute error of forward differences of voxels that both count, summed over the axes (gradient of BrainFM)."""
    error, counted = pred.float() - target, mask.bool()  # the difference of the errors is the error of the differences
    steps = []
    for axis in (2, 3, 4):
        both = counted.narrow(axis, 1, mask.shape[axis] - 1) & counted.narrow(axis, 0, mask.shape[axis] - 1)
        steps.append(compute_masked_mean(error.diff(dim=axis).abs(), both))
    return torch.stack(steps).sum(0)


def compute_banded_error(pred: Tensor, target: Tensor) -> Tensor:
    """Absolute error of signed distances in mm at each voxel; beyond +-3 mm only the side matters, with a gradient."""
    pred = pred.float()
    error = (pred - target).abs()
    error = torch.where(target >= MAX_DISTANCE_MM, (MAX_DISTANCE_MM - pred).clamp_min(0), error)
    return torch.where(target <= -MAX_DISTANCE_MM, (pred + MAX_DISTANCE_MM).clamp_min(0), error)


def compute_laplace_nll(error: Tensor, log_scale: Tensor | None, mask: Tensor) -> Tensor:
    """Mean negative log likelihood of absolute errors under a Laplace law of predicted scale b: ``error / b + log b``.

    The constant log 2 is left out; the loss may be negative. ``log_scale`` is what the network gives for log b, see
    :func:`~brainfm_monai.tasks.bound_log_scale`, None for b = 1. (Kendall and Gal, What uncertainties do we need in
    Bayesian deep learning for computer vision?, NeurIPS 2017.)
    """
    if log_scale is None:
        return compute_masked_mean(error, mask)
    log_scale = bound_log_scale(log_scale)
    return compute_masked_mean(torch.addcmul(log_scale, error, (-log_scale).exp()), mask)


def compute_centred_mse(pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Mean squared error of two log fields up to a constant: a scan does not determine its overall gain."""
    difference = pred.float() - target
    offset = compute_masked_mean(difference, mask).reshape(-1, 1, 1, 1, 1)
    return compute_masked_mean((difference - offset).square(), mask)


def compute_pooled_l1(values: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Absolute error of the mean of a map (B, 1, H, W, D) inside a mask; the target is (B,), in the unit of the map."""
    return (compute_masked_mean(values.float(), mask) - target.reshape(-1)).abs()


def compute_info_nce(embedding: Tensor, mask: Tensor, samples: int) -> Tensor:
    """InfoNCE between the scans of one subject, whose geometry is the same: a voxel is found again in another scan.

    A voxel's embedding is compared with those of all places of a fixed lattice in another scan; the right one is that
    of the same place. The loss is the mean cross entropy over the other samples of a subject, which lie one after the
    other. A place counts where all masks count it. (van den Oord et al., arXiv 1807.03748; Chen et al., ICML 2020.)
    """
    steps = [max(1, size // LATTICE) for size in embedding.shape[2:]]
    places: Any = (..., *(slice(step // 2, step // 2 + step * (LATTICE - 1) + 1, step) for step in steps))
    vectors = nnf.normalize(embedding[places].float().flatten(2), dim=1).unflatten(0, (-1, samples))
    counted = mask[places].bool().flatten(1).unflatten(0, (-1, samples)).all(1)  # (B, P)
    with torch.autocast(embedding.device.type, enabled=False):  # at this temperature the eight bits of bfloat16 show
        similarity = torch.einsum("bscp,btcq->bstpq", vectors, vectors) / TEMPERATURE
    similarity = similarity.masked_fill(~counted[:, None, None, None], torch.finfo(torch.float32).min / 2)
    correct = similarity.log_softmax(-1).diagonal(dim1=-2, dim2=-1)  # (B, S, S, P)
    others = ~torch.eye(samples, dtype=torch.bool, device=embedding.device)[None, :, :, None]
    total = torch.where(counted[:, None, None] & others, -correct, 0.0).sum((2, 3))
    return (total / (counted.sum(1) * (samples - 1)).clamp_min(1)[:, None]).flatten()


class MultiTaskLoss(nn.Module):
    """Weighted sum of the task losses, each averaged over the samples that have its target.

    In training on several ranks the average is over those of all ranks: the mean of the ranks' gradients, as
    ``DistributedDataParallel`` makes it, is then the gradient of one large batch, also where a rank lacks a target. For
    this the ranks exchange a number per task at each call with gradients, so all of them must call alike.

    ``weights`` are those of tasks by name, 1 for the others. ``samples``, at least 1, are the scans of each subject in
    a batch, one after the other: the embedding is learnt from their agreement, and is left out where there is one.
    """

    def __init__(self, layout: TaskLayout, weights: Mapping[str, float] | None = None, samples: int = 1) -> None:
        super().__init__()
        unknown = sorted(set(weights or {}) - set(TASKS))
        refuse_if(unknown, f"MultiTaskLoss: 'weights' may name {list(TASKS)}", unknown)
        refuse_if(samples < 1, "MultiTaskLoss: 'samples' must be at least 1", samples)
        self.layout, self.weights, self.samples = layout, dict(weights or {}), samples
        self.kinds = {name: task.kind for name, task in layout.tasks.items() if task.kind != "log_scale"}
        self.components: dict[str, Tensor] = {}

    def forward(self, pred: Tensor, target: Mapping[str, Tensor]) -> Tensor:
        """Loss of a batch, a scalar; ``components`` keeps the unweighted loss of every task on this rank.

        The prediction is (B, layout.channels, H, W, D), and so are targets, of every task that at least one sample has,
        or (B,) for a scalar. ``visible`` is the field of view, ``valid_<task>`` where an image is not defaced, both
        (B, 1, H, W, D); ``available_<task>``, (B,), is 1 for samples that have the target.
        """
        rule = f"MultiTaskLoss: 'pred' must hold {self.samples} samples of each subject"
        refuse_if(len(pred) % self.samples, rule, tuple(pred.shape))
        parts = self.layout.split(pred)
        visible = head = target["visible"].bool()
        if "segmentation" in target:  # where labels are absent, nobody knows what is head
            head = visible & ((target["segmentation"] > 0) | ~_available("segmentation", target, head))
        sums, counts = {}, {}
        for name, kind in self.kinds.items():
            if name in target or (kind == "embedding" and self.samples > 1):
                losses = self._compute(name, parts, target, visible, head)
                available = _available(name, target, losses)
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
            return compute_info_nce(output, head, self.samples)
        truth = target[name]
        if f"available_{name}" in target:  # an absent target may hold anything, and NaN would spread over the gradient
            truth = torch.where(_available(name, target, truth), truth, truth.new_zeros(()))
        if kind == "labels":
            return compute_dice_ce(output, truth)
        if kind == "mask":
            return compute_mask_loss(output, truth, visible)
        if kind == "scalar":
            return compute_pooled_l1(output, truth, head)
        # Images and distances are known in the air, too; what was cut out of an image is unknown.
        counted = head if kind in ("coordinates", "log_field") else visible
        if f"valid_{name}" in target:
            counted = counted & target[f"valid_{name}"].bool()
        if kind == "log_field":
            return compute_centred_mse(output, truth, counted)
        error = compute_banded_error(output, truth) if kind == "distance" else (output.float() - truth).abs()
        loss = compute_laplace_nll(error, parts.get(f"{name}_log_scale"), counted)
        return loss + compute_gradient_l1(output, truth, counted) if kind == "image" else loss


def _available(name: str, target: Mapping[str, Tensor], like: Tensor) -> Tensor:
    """Which samples have a target, as a mask that fits a tensor of any number of dimensions."""
    available = target.get(f"available_{name}", torch.ones(len(like), device=like.device))
    return (available > 0).reshape(-1, *[1] * (like.ndim - 1))
