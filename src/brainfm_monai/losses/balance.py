"""Weights of tasks that are learnt."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from brainfm_monai.tasks import TaskLayout, bound_log_scale

__all__ = ["UncertaintyWeights"]

# Factors of loss / scale and of log scale in the likelihood that a loss stands for: cross entropy of a softmax divided by the
# scale s^2 (loss / s^2 + log s), squared error of a normal law (loss / 2 s^2 + log s), and for all others absolute error of a
# Laplace law (loss / b + log b).
LIKELIHOODS = {"labels": (1.0, 0.5), "mask": (1.0, 0.5), "embedding": (1.0, 0.5), "log_field": (0.5, 0.5)}


class UncertaintyWeights(nn.Module):
    """Learns the weight of each task from the size of its loss: one parameter per task, the log of a scale.

    The parameters belong into the optimizer, without weight decay, and into the checkpoints. Their gradient comes from the losses
    of all ranks, see :class:`~brainfm_monai.losses.MultiTaskLoss`: it is the same on each, so that they stay equal without
    ``DistributedDataParallel``.

    Args:
        layout: its tasks get a parameter each. A task with uncertainty of its own has none: its loss is a likelihood already.
        device: of the parameters: that of the network, so that no step waits for a copy.

    Reference:
        Kendall, Gal and Cipolla, Multi-task learning using uncertainty to weigh losses, CVPR 2018.
    """

    def __init__(self, layout: TaskLayout, device: str | torch.device | None = None) -> None:
        super().__init__()
        tasks = [
            task
            for task in layout.tasks.values()
            if task.kind != "log_scale" and layout.log_scale_of(task.name) is None
        ]
        self.factors = {task.name: LIKELIHOODS.get(task.kind, (1.0, 1.0)) for task in tasks}
        self.places = {task.name: i for i, task in enumerate(tasks)}
        self.log_scale = nn.Parameter(torch.zeros(len(tasks), device=device))

    def forward(self, name: str, loss: Tensor, mean: Tensor, present: Tensor) -> Tensor:
        """Weighted loss of a task.

        Args:
            name: of the task.
            loss: its loss on this rank, whose gradient is for the network, a scalar.
            mean: its loss on all ranks, without gradient, a scalar; the scale learns from it.
            present: 1 if any sample on any rank has the target, else 0, a scalar.

        Returns:
            Scalar; the loss itself for a task without a parameter.
        """
        if name not in self.places:
            return loss
        of_loss, of_scale = self.factors[name]
        log_scale = bound_log_scale(self.log_scale[self.places[name]])
        weight = of_loss * (-log_scale).exp()
        to_scale = weight * mean
        # The value of to_scale is in the loss already: it stands here for its gradient alone.
        return weight.detach() * loss + present * (to_scale - to_scale.detach() + of_scale * log_scale)
