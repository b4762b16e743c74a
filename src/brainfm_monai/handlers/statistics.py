"""What a training reports while it runs, read from the device once in several iterations."""

import sys
import time
from typing import Any, cast

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from ignite.handlers import ProgressBar
from monai.utils import CommonKeys
from torch import Tensor
from torch.optim import Optimizer

from brainfm_monai.losses import MultiTaskLoss

GIB = 2**30
RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # of getrusage, bytes


class TrainingStatistics:
    """Adds a dictionary ``statistics`` to a trainer's output every few iterations, and shows a progress bar.

    They are ``loss`` and the unweighted loss of every task, means over all processes, ``gradient_norm``,
    ``learning_rate``, ``samples_per_second`` of all processes since the last time, without validation, and
    ``memory_gib``, the most that this process has held: of the GPU, or of the computer where there is none (not on
    Windows). Handlers that log them come after it. Each reading, after ``interval`` iterations, waits for the device.
    """

    def __init__(self, loss_function: MultiTaskLoss, optimizer: Optimizer, interval: int = 1) -> None:
        self.tasks, self.optimizer, self.interval = list(loss_function.layout.tasks), optimizer, interval
        self.latest: dict[str, float] = {}
        self._start()

    def attach(self, engine: Engine) -> None:
        """Attach to a :class:`~brainfm_monai.engines.MultiTaskTrainer`."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._count)
        engine.add_event_handler(Events.ITERATION_COMPLETED(every=self.interval), self)
        if idist.get_rank() == 0:
            shown = ("loss", *self.tasks)
            bar = ProgressBar(persist=True)
            bar.attach(engine, output_transform=lambda _: {n: self.latest[n] for n in shown if n in self.latest})

    def _start(self) -> None:
        self._samples, self._since = 0, time.perf_counter()

    def _count(self, engine: Any) -> None:
        self._samples += engine.state.output["samples"]

    def __call__(self, engine: Any) -> None:
        """Read the numbers of this iteration."""
        output, names = engine.state.output, ["loss", "gradient_norm", *self.tasks]
        values = {"loss": output[CommonKeys.LOSS], "gradient_norm": output["gradient_norm"], **output["task_losses"]}
        device = output[CommonKeys.LOSS].device
        # a value and its weight for each name: a task that no sample of this process has does not count
        rows = [(values.get(name, torch.zeros(())), torch.tensor(float(name in values))) for name in names]
        pairs = torch.stack([torch.stack([x.detach().float().to(device) for x in row]) for row in rows])
        if idist.get_world_size() > 1:
            pairs = cast(Tensor, idist.all_reduce(pairs))
        means = {name: value / count for name, (value, count) in zip(names, pairs.tolist(), strict=True) if count}
        means["learning_rate"] = float(self.optimizer.param_groups[0]["lr"])
        seconds = time.perf_counter() - self._since
        means["samples_per_second"] = self._samples * idist.get_world_size() / seconds
        self.latest = output["statistics"] = means | _measure_memory(device)
        self._start()


def _measure_memory(device: torch.device) -> dict[str, float]:
    if device.type == "cuda":
        return {"memory_gib": torch.cuda.max_memory_allocated() / GIB}
    try:
        import resource
    except ImportError:  # Windows
        return {}
    return {"memory_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT / GIB}
