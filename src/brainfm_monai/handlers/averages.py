"""The average of the weights over the last iterations, which validates and is published."""

from __future__ import annotations

from collections.abc import Callable

import torch
from ignite.engine import Engine, Events
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

__all__ = ["WeightAverage", "make_ema_multi_avg_fn"]

Weights = tuple[Tensor, ...] | list[Tensor]


def make_ema_multi_avg_fn(decay: float) -> Callable[[Weights, Weights, Tensor | int], None]:
    """Exponential average whose first steps forget faster, so that the random weights of the start do not stay in it.

    Step n takes the smaller of ``decay`` and (1 + n) / (10 + n), the law of TensorFlow's ExponentialMovingAverage.

    Args:
        decay: share of the average that stays, in [0, 1].

    Returns:
        ``multi_avg_fn`` of :class:`torch.optim.swa_utils.AveragedModel`.

    Raises:
        ValueError: if ``decay`` is not in [0, 1].
    """
    if not 0 <= decay <= 1:
        raise ValueError(f"make_ema_multi_avg_fn: 'decay' must be in [0, 1], got {decay}")

    @torch.no_grad()
    def update(averaged: Weights, current: Weights, number: Tensor | int) -> None:
        share = 1 - torch.as_tensor((1 + number) / (10 + number)).clamp(max=decay)
        for average, value in zip(averaged, current, strict=True):
            average.lerp_(value, share.to(average.dtype))

    return update


class WeightAverage:
    """Updates an average of the network's weights after every iteration.

    Args:
        average: the averaged model.
        network: the network in training, not the one that is wrapped for several processes.
    """

    def __init__(self, average: AveragedModel, network: nn.Module) -> None:
        self.average, self.network = average, network

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: self.average.update_parameters(self.network))
