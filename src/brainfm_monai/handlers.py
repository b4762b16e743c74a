"""Handlers that stock MONAI and ignite do not have: progress by task, weight average, checkpoints, Dice of an index map."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint, DiskSaver, ProgressBar
from ignite.metrics import Metric
from monai.utils import CommonKeys
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from brainfm_monai.losses import MultiTaskLoss
from brainfm_monai.tasks import TaskLayout

__all__ = [
    "SegmentationDice",
    "TrainingCheckpoint",
    "TrainingProgress",
    "WeightAverage",
    "make_task_loss_transform",
    "make_warmup_stable_decay",
]


def make_task_loss_transform(loss_function: MultiTaskLoss) -> Callable[[Any], dict[str, float]]:
    """Output transform for statistics handlers: the total loss and the unweighted loss of every task, as numbers."""

    def transform(output: Mapping[str, Any]) -> dict[str, float]:
        scalars = {"loss": output[CommonKeys.LOSS], **loss_function.components}
        return {name: float(value.detach()) for name, value in scalars.items()}

    return transform


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


class TrainingProgress:
    """Progress bar of an epoch with the loss of every task.

    Args:
        loss_function: whose components are shown.
    """

    def __init__(self, loss_function: MultiTaskLoss) -> None:
        self.transform = make_task_loss_transform(loss_function)

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        ProgressBar(persist=True).attach(engine, output_transform=self.transform)


class TrainingCheckpoint:
    """Saves everything at the end of an epoch, whole or not at all, and goes on from the newest file at the start.

    Args:
        save_dir: folder of the checkpoints.
        to_save: objects with ``state_dict`` and ``load_state_dict``, by name; the trainer itself is added.
        interval: epochs between two checkpoints.
        n_saved: number of checkpoints to keep.
    """

    def __init__(self, save_dir: str | Path, to_save: Mapping[str, Any], interval: int = 1, n_saved: int = 2) -> None:
        self.save_dir = Path(save_dir)
        self.to_save = dict(to_save)
        self.interval, self.n_saved = interval, n_saved

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        self.save_dir.mkdir(parents=True, exist_ok=True)
        saver = Checkpoint(
            {"trainer": engine, **self.to_save},
            DiskSaver(str(self.save_dir), create_dir=True, require_empty=False, atomic=True),
            filename_prefix="training",
            n_saved=None,
            global_step_transform=lambda trainer, _: trainer.state.epoch,
        )
        engine.add_event_handler(Events.STARTED, self.resume)
        engine.add_event_handler(Events.EPOCH_COMPLETED(every=self.interval), saver)
        engine.add_event_handler(Events.EPOCH_COMPLETED(every=self.interval), self.remove_old)

    def saved(self) -> list[Path]:
        """The checkpoints of this and of earlier runs, oldest first."""
        return sorted(self.save_dir.glob("training_checkpoint_*.pt"), key=lambda path: int(path.stem.rsplit("_", 1)[1]))

    def remove_old(self) -> None:
        """Keep the newest checkpoints; ignite would forget those of an interrupted run."""
        for path in self.saved()[: -self.n_saved]:
            path.unlink()

    def resume(self, engine: Engine) -> None:
        """Restore the newest checkpoint, keeping the number of epochs that was asked for now."""
        saved = self.saved()
        if not saved:
            return
        max_epochs = engine.state.max_epochs
        state = torch.load(saved[-1], map_location="cpu", weights_only=True)
        Checkpoint.load_objects({"trainer": engine, **self.to_save}, state)
        engine.state.max_epochs = max_epochs


class WeightAverage:
    """Updates an average of the network's weights after every iteration.

    Args:
        average: the averaged model.
        network: the network in training.
    """

    def __init__(self, average: AveragedModel, network: nn.Module) -> None:
        self.average, self.network = average, network

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: self.average.update_parameters(self.network))


class SegmentationDice(Metric):
    """Mean hard Dice over the foreground structures that occur in the reference, over all samples.

    Args:
        layout: names the channels of the prediction.
        output_transform: from the engine's output to (prediction, targets).
    """

    def __init__(self, layout: TaskLayout, output_transform: Callable[[Any], Any] = lambda output: output) -> None:
        self.layout = layout
        super().__init__(output_transform=output_transform)

    def reset(self) -> None:
        """Forget all samples."""
        self.scores: list[Tensor] = []

    def update(self, output: tuple[Tensor, Mapping[str, Tensor]]) -> None:
        """Add a batch: prediction (B, layout.channels, H, W, D) and targets with ``segmentation`` (B, 1, H, W, D)."""
        pred, target = output
        labels = self.layout.split(pred)["segmentation"].argmax(1).flatten(1)
        truth = target["segmentation"].flatten(1)
        count = len(self.layout.protocol)
        for one, reference in zip(labels, truth, strict=True):
            size = torch.bincount(one, minlength=count) + torch.bincount(reference, minlength=count)
            overlap = torch.bincount(reference[one == reference], minlength=count)
            present = torch.bincount(reference, minlength=count) > 0
            present[0] = False
            self.scores.append((2 * overlap[present] / size[present]).mean())

    def compute(self) -> float:
        """Mean over the samples seen."""
        return float(torch.stack(self.scores).mean())
