"""What a training tells while it runs, read from the device once in several iterations."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, cast

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.utils import CommonKeys
from torch import Tensor
from torch.optim import Optimizer

from brainfm_monai.losses import MultiTaskLoss

__all__ = ["TrainingProgress", "TrainingStatistics", "make_task_loss_transform"]

GIB = 2**30
RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # of getrusage, bytes


def make_task_loss_transform(loss_function: MultiTaskLoss) -> Callable[[Any], dict[str, float]]:
    """Output transform for statistics handlers: the total loss and the unweighted loss of every task, as numbers."""

    def transform(output: Mapping[str, Any]) -> dict[str, float]:
        scalars = {"loss": output[CommonKeys.LOSS], **output.get("task_losses", loss_function.components)}
        return {name: float(value.detach()) for name, value in scalars.items()}

    return transform


class TrainingStatistics:
    """Adds ``statistics`` to the output of a trainer, a dictionary of numbers, every few iterations.

    They are ``loss`` and the unweighted loss of every task, means over all processes, ``gradient_norm``, ``learning_rate``,
    ``samples_per_second`` of all processes since the last time, without validation, and ``memory_gib``, the most that this
    process has held: of the GPU, or of the computer where there is none. It stands before the handlers that show them.

    Args:
        loss_function: names the tasks.
        optimizer: knows the learning rate.
        interval: iterations between two; each waits for the device.
    """

    def __init__(self, loss_function: MultiTaskLoss, optimizer: Optimizer, interval: int = 1) -> None:
        self.tasks, self.optimizer, self.interval = list(loss_function.layout.tasks), optimizer, interval
        self._samples, self._since = 0, time.perf_counter()

    def attach(self, engine: Engine) -> None:
        """Attach to a :class:`~brainfm_monai.engines.MultiTaskTrainer`."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._count)
        engine.add_event_handler(Events.ITERATION_COMPLETED(every=self.interval), self)

    def _start(self) -> None:
        self._samples, self._since = 0, time.perf_counter()

    def _count(self, engine: Any) -> None:
        self._samples += engine.state.output["samples"]

    def __call__(self, engine: Any) -> None:
        """Read the numbers of this iteration."""
        output = engine.state.output
        losses, norm, rate = output["task_losses"], output["gradient_norm"], self.optimizer.param_groups[0]["lr"]
        nothing = torch.zeros_like(output[CommonKeys.LOSS])
        values = [output[CommonKeys.LOSS], norm.to(nothing.device), *(losses.get(name, nothing) for name in self.tasks)]
        there = [float(name in losses) for name in self.tasks]
        vector = torch.cat([torch.stack([v.detach().float() for v in values]), nothing.new_tensor([1.0, *there])])
        if idist.get_world_size() > 1:
            vector = cast(Tensor, idist.all_reduce(vector))
        loss, norm_sum, *rest = vector.tolist()
        sums, count, counts = rest[: len(self.tasks)], rest[len(self.tasks)], rest[len(self.tasks) + 1 :]
        statistics = {"loss": loss / count, "gradient_norm": norm_sum / count, "learning_rate": float(rate)}
        statistics |= {n: s / c for n, s, c in zip(self.tasks, sums, counts, strict=True) if c > 0}
        seconds = time.perf_counter() - self._since
        statistics["samples_per_second"] = self._samples * idist.get_world_size() / seconds
        on_gpu = output[CommonKeys.LOSS].is_cuda
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT
        statistics["memory_gib"] = (torch.cuda.max_memory_allocated() if on_gpu else rss) / GIB
        output["statistics"] = statistics
        self._start()


class TrainingProgress:
    """Progress bar of the whole training, with the time that is left and the last statistics.

    Args:
        names: of the statistics that are shown; those of the losses if not given.
    """

    def __init__(self, names: tuple[str, ...] | None = None) -> None:
        self.names = names
        self.bar: Any = None

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer, after :class:`TrainingStatistics`."""
        engine.add_event_handler(Events.ITERATION_STARTED, self._open)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._update)
        engine.add_event_handler(Events.COMPLETED, self._close)
        engine.add_event_handler(Events.TERMINATE, self._close)

    def _open(self, engine: Any) -> None:
        if self.bar is None:  # not before: only now is it known where a resumed training goes on
            from tqdm import tqdm

            total = engine.state.epoch_length * engine.state.max_epochs
            self.bar = tqdm(total=total, initial=engine.state.iteration - 1, unit="step", mininterval=1.0)

    def _update(self, engine: Any) -> None:
        statistics = engine.state.output.get("statistics")
        if statistics is not None:
            hidden = {"gradient_norm", "learning_rate", "samples_per_second", "memory_gib"}
            shown = self.names or [name for name in statistics if name not in hidden]
            self.bar.set_description(f"epoch {engine.state.epoch} of {engine.state.max_epochs}", refresh=False)
            self.bar.set_postfix(
                {name: f"{statistics[name]:.3g}" for name in shown if name in statistics}, refresh=False
            )
        self.bar.update()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None
