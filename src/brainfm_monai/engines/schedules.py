"""The learning rate over a training, by its iterations or by the minutes that it may take."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, cast

import ignite.distributed as idist
from ignite.engine import Engine, Events

__all__ = ["TimeBudget", "make_warmup_stable_decay"]

ENDLESS = 10**9  # epochs of a training that its budget ends


class TimeBudget:
    """Ends a training after some minutes of wall-clock time, and says how much of them is used up.

    The clock starts when the object is made, and runs while the training does: time between two sittings does not count. The last
    validation is part of the budget: as much time is kept for it as the longest pause between two iterations took so far.

    Args:
        minutes: of all sittings together; without a number the training ends by its epochs.
    """

    def __init__(self, minutes: float | None = None) -> None:
        self.minutes = minutes
        self.elapsed = self.longest_pause = 0.0  # seconds
        self._since, self._started = time.monotonic(), False

    @property
    def share(self) -> float | None:
        """Share of the budget that is used up, at least 0; None without a budget."""
        return None if self.minutes is None else self.elapsed / max(60 * self.minutes - self.longest_pause, 1e-3)

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        if self.minutes is not None:
            engine.add_event_handler(Events.STARTED, lambda: setattr(engine.state, "max_epochs", ENDLESS))
            engine.add_event_handler(Events.ITERATION_COMPLETED, self._count)

    def _count(self, engine: Engine) -> None:
        pause = time.monotonic() - self._since
        if idist.get_world_size() > 1:  # all processes take the same step and end together
            pause = cast(float, idist.broadcast(pause, src=0))
        self._since += pause
        self.elapsed += pause
        if self._started:  # the first pause is that of the start-up
            self.longest_pause = max(self.longest_pause, pause)
        self._started = True
        # At the end of an epoch a validation follows, after which there may be no time for another.
        at_end = engine.state.iteration % (engine.state.epoch_length or 1) == 0
        coming = self.elapsed + (self.longest_pause if at_end else 0.0)
        if coming >= 60 * (self.minutes or 0.0) - self.longest_pause:
            engine.state.max_epochs = engine.state.epoch
            engine.terminate_epoch()

    def state_dict(self) -> dict[str, float]:
        """Seconds that are used up, and the longest pause between two iterations."""
        return {"elapsed": self.elapsed, "longest_pause": self.longest_pause}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what :meth:`state_dict` gave."""
        self.elapsed += float(state["elapsed"])
        self.longest_pause = float(state["longest_pause"])


def make_warmup_stable_decay(
    warmup: int, total: int, decay_fraction: float = 0.2, budget: TimeBudget | None = None
) -> Callable[[int], float]:
    """Factor of the learning rate, in [0, 1], by the iteration from 0: linear warm-up, constant, linear decay to zero.

    Args:
        warmup: iterations of warm-up.
        total: iterations of the whole training.
        decay_fraction: share of the training in which the rate falls.
        budget: with minutes, they take the place of ``total``.
    """

    def factor(iteration: int) -> float:
        share = None if budget is None else budget.share
        share = iteration / total if share is None else share
        rise, fall = (iteration + 1) / max(warmup, 1), (1 - share) / max(decay_fraction, 1 / total)
        return max(0.0, min(1.0, rise, fall))

    return factor
