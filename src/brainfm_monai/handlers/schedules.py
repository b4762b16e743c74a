"""Factors of the learning rate."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["make_warmup_stable_decay"]


def make_warmup_stable_decay(warmup: int, total: int, decay_fraction: float = 0.2) -> Callable[[int], float]:
    """Factor of the learning rate: linear warm-up, constant, linear decay to zero over the last part.

    Args:
        warmup: iterations of warm-up.
        total: iterations of the whole training.
        decay_fraction: share of the training in which the rate falls.

    Returns:
        Function from the iteration, counted from 0, to a factor in [0, 1].
    """

    def factor(iteration: int) -> float:
        rise = (iteration + 1) / max(warmup, 1)
        fall = (total - iteration) / max(decay_fraction * total, 1)
        return max(0.0, min(1.0, rise, fall))

    return factor
