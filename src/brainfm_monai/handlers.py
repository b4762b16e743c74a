"""What ignite's and MONAI's handlers cannot do yet: exact resume, best weights, statistics, scores, pictures."""

import logging
import math
import pickle
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from ignite.handlers import Checkpoint, ProgressBar
from ignite.metrics import Metric
from ignite.metrics.metric import reinit__is_reduced, sync_all_reduce
from monai.handlers import from_engine
from monai.metrics import compute_dice
from monai.utils import CommonKeys
from torch import Tensor, nn
from torch.optim import Optimizer

from brainfm_monai.io import first_line, refuse_if, write_whole
from brainfm_monai.losses import MultiTaskLoss
from brainfm_monai.metrics import fields
from brainfm_monai.slices import Cell, compose, cut_slices, encode, paint, shade
from brainfm_monai.tasks import Task, TaskLayout

logger = logging.getLogger(__name__)

SCORES = {"segmentation": "mean_dice", "distance": "distance_mae_mm", "mni": "mni_error_mm"}
SCORES["log_bias_field"] = "log_bias_error"
SMALLEST_PANEL = 144  # pixels of the longest side: captions have room
VOXELS = np.eye(4)  # affine of a batch: RAS axes


@dataclass(eq=False)
class TrainingCheckpoint:
    """Saves everything at the end of an epoch, whole or not at all, and resumes from the newest whole one at the start.

    That includes torch's random generators, for networks with dropout. Several processes must share the folder.
    """

    save_dir: str | Path  # folder of the checkpoints, training_checkpoint_<iteration>.pt
    to_save: Mapping[str, Any]  # objects with state_dict and load_state_dict, by name; the trainer itself is added
    iterations: int | None = None  # between two further checkpoints, for long epochs; None: no further ones
    n_saved: int = 2  # number of checkpoints to keep

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer, after the handlers whose work belongs in the checkpoint."""
        engine.add_event_handler(Events.STARTED, self.resume)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self.save)
        if every := self.iterations:  # the end of an epoch is saved after its validation
            within = Events.ITERATION_COMPLETED(lambda e, n: n % every == 0 and n % e.state.epoch_length > 0)
            engine.add_event_handler(within, self.save)

    def saved(self) -> list[Path]:
        """The checkpoints of this and of earlier runs, oldest first."""
        paths = Path(self.save_dir).glob("training_checkpoint_*.pt")
        return sorted(paths, key=lambda path: int(path.stem.rsplit("_", 1)[1]))

    def save(self, engine: Any) -> None:
        """Write a checkpoint, and remove the oldest."""
        if idist.get_rank() > 0:
            return
        content = {name: item.state_dict() for name, item in {"trainer": engine, **self.to_save}.items()}
        content["random"] = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_initialized():
            content["random"]["cuda"] = torch.cuda.get_rng_state()
        folder = Path(self.save_dir)
        with write_whole(folder / f"training_checkpoint_{engine.state.iteration}.pt") as partial:
            torch.save(content, partial)
        killed = folder.glob(".*.partial.training_checkpoint_*.pt")  # left by a process, of another iteration
        for path in [*self.saved()[: -self.n_saved], *killed]:
            path.unlink()

    def resume(self, engine: Any) -> None:
        """Restore the newest whole checkpoint, but for the number of epochs; ValueError if none is whole or fits."""
        path = str(idist.broadcast(self._find_whole() if idist.get_rank() == 0 else "", src=0))
        if not path:
            return
        max_epochs, content = engine.state.max_epochs, torch.load(path, map_location="cpu", weights_only=True)
        try:
            Checkpoint.load_objects({"trainer": engine, **self.to_save}, content)
        except (ValueError, RuntimeError, KeyError) as error:
            rule = f"{path}: a checkpoint of this training is needed"
            raise ValueError(f"{rule}, found another: {first_line(error)}") from error
        engine.state.max_epochs = max_epochs
        # The data loaders' iterators, which are made after the start, draw a number each.
        first = Events.ITERATION_STARTED(once=engine.state.iteration + 1)
        engine.add_event_handler(first, _restore_random, content.get("random", {}))
        logger.info("resumes at iteration %d from %s", engine.state.iteration, path)

    def _find_whole(self) -> str:
        """Path of the newest checkpoint that can be read, empty without any checkpoint."""
        saved = self.saved()
        for path in reversed(saved):
            try:
                torch.load(path, map_location="cpu", weights_only=True)
                return str(path)
            except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:
                logger.warning("%s: not a whole checkpoint, the one before is taken: %s", path, first_line(error))
        found = "none: remove them to begin anew"
        refuse_if(saved, f"{self.save_dir}: one whole checkpoint is needed to resume", found)
        return ""


def _restore_random(states: Mapping[str, Tensor]) -> None:
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(states["cuda"])


@dataclass(eq=False)
class BestWeights:
    """Writes the weights that did best in validation, also over several sittings of a training."""

    network: nn.Module  # whose state dict is written, plain
    path: str | Path  # of the file

    def attach(self, engine: Any) -> None:
        """Attach to a MONAI evaluator with a key metric, which compares, and whose best metric checkpoints keep."""
        self.evaluator = engine
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        """Write the weights if this validation was the best."""
        if engine.state.best_metric_epoch == engine.state.epoch and idist.get_rank() == 0:
            with write_whole(self.path) as partial:
                torch.save(self.network.state_dict(), partial)

    def state_dict(self) -> dict[str, float | int]:
        """The best metric and its epoch."""
        state = self.evaluator.state
        return {"best_metric": float(state.best_metric), "best_metric_epoch": int(state.best_metric_epoch)}

    def load_state_dict(self, state: Mapping[str, float | int]) -> None:
        """Continue from what :meth:`state_dict` gave."""
        vars(self.evaluator.state).update(state)


@dataclass(eq=False)
class TrainingStatistics:
    """Adds a dictionary ``statistics`` to a trainer's output every few iterations, and shows a progress bar.

    They are losses and ``gradient_norm``, means over all processes, ``learning_rate``, and ``samples_per_second`` of
    all processes. Each reading waits for the device.
    """

    loss_function: MultiTaskLoss
    optimizer: Optimizer
    interval: int = 1
    latest: dict[str, float] = field(default_factory=dict, init=False)

    def attach(self, engine: Engine) -> None:
        """Attach to a :class:`~brainfm_monai.engines.MultiTaskTrainer`."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED(every=self.interval), self)
        if idist.get_rank() == 0:
            shown = {"loss", *self.loss_function.layout.tasks}
            bar = ProgressBar(persist=True)
            bar.attach(engine, output_transform=lambda _: {n: v for n, v in self.latest.items() if n in shown})

    def _start(self, engine: Any) -> None:
        self._first, self._since = engine.state.iteration, time.perf_counter()

    def __call__(self, engine: Any) -> None:
        """Read the numbers of this iteration."""
        output, names = engine.state.output, ["loss", "gradient_norm", *self.loss_function.layout.tasks]
        values = {"loss": output[CommonKeys.LOSS], "gradient_norm": output["gradient_norm"], **output["task_losses"]}
        device = output[CommonKeys.LOSS].device
        # a value and its weight for each name: a task that no sample of this process has does not count
        rows = [(values.get(name, torch.zeros(())), torch.tensor(float(name in values))) for name in names]
        pairs = torch.stack([torch.stack([x.detach().float().to(device) for x in row]) for row in rows])
        if idist.get_world_size() > 1:
            pairs = cast(Tensor, idist.all_reduce(pairs))
        means = {name: value / count for name, (value, count) in zip(names, pairs.tolist(), strict=True) if count}
        means["learning_rate"] = float(self.optimizer.param_groups[0]["lr"])
        samples = (engine.state.iteration - self._first) * output["samples"] * idist.get_world_size()
        means["samples_per_second"] = samples / (time.perf_counter() - self._since)
        self.latest = output["statistics"] = means
        self._start(engine)


class ValidationScores(Metric):
    """Scores of the tasks, each a mean over the samples of all processes that have the target.

    ``mean_dice`` is the hard Dice over the foreground structures of the reference, ``<image>_mae`` the mean absolute
    error in the head, in the unit of the files. The others are those of the evaluation.
    """

    def __init__(self, layout: TaskLayout) -> None:
        names = SCORES | {name: f"{name}_mae" for name, task in layout.tasks.items() if task.kind == "image"}
        self.layout, self.names = layout, {name: names[name] for name in layout.tasks if name in names}
        super().__init__(output_transform=from_engine(["pred", "label"]), metrics_result_mode="flatten")

    @reinit__is_reduced
    def reset(self) -> None:
        """Forget all samples."""
        self.total = torch.zeros(2, len(self.names), dtype=torch.float64)  # sums of the scores, and their numbers

    @reinit__is_reduced
    def update(self, output: tuple[Tensor, Mapping[str, Tensor]]) -> None:
        """Add a batch: prediction (B, layout.channels, H, W, D), and the targets of the loss."""
        parts, target = self.layout.split(output[0]), output[1]
        for number, task in enumerate(self.names):
            if task not in target:
                continue
            scores, available = self._score(task, parts[task], target), target.get(f"available_{task}")
            counted = scores.isfinite() if available is None else scores.isfinite() & (available.to(scores.device) > 0)
            self.total[:, number] += torch.stack([torch.where(counted, scores, 0.0).sum(), counted.sum()]).cpu()

    def _score(self, task: str, pred: Tensor, target: Mapping[str, Tensor]) -> Tensor:
        """Score of every sample, (B,); not finite where there is none."""
        if task == "segmentation":
            labels, count = pred.argmax(1, keepdim=True), len(self.layout.protocol)
            return compute_dice(labels, target[task], include_background=False, num_classes=count).nanmean(1)
        visible = target["visible"]
        head = visible & (target["segmentation"] > 0) if "segmentation" in target else visible
        pred, true = (self.layout.tasks[task].to_map(values) for values in (pred, target[task]))
        if task == "distance":
            return fields.compute_distance_mae(pred, true, visible).nanmean(1)
        if task == "mni":
            return fields.compute_mni_error(pred, true, head)["error_mean"]
        if task == "log_bias_field":
            return fields.compute_bias_error(pred, true, head)
        inside = head & target[f"valid_{task}"] if f"valid_{task}" in target else head
        return fields.compute_mean_inside((pred - true).abs(), inside)[:, 0]

    @sync_all_reduce("total")
    def compute(self) -> dict[str, float]:
        """Means over the samples seen, by name; scores that none of them has are left out, but for a Dice of NaN."""
        none = {"mean_dice": math.nan} if "segmentation" in self.names else {}
        scores = zip(self.names.values(), *self.total.tolist(), strict=True)
        return none | {name: total / count for name, total, count in scores if count}


@dataclass(eq=False)
class ValidationPanels:
    """Draws the first subjects of every validation, into the folder ``panels`` of the run and into TensorBoard."""

    layout: TaskLayout
    output_dir: str | Path  # of the run
    summary_writer: Any = None  # of TensorBoard
    count: int = 2  # subjects

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator of batches of one."""
        engine.add_event_handler(Events.ITERATION_COMPLETED(before=self.count + 1), self)

    def __call__(self, engine: Any) -> None:
        """Draw the first sample of a batch."""
        output, epoch = engine.state.output, engine.state.epoch
        target = {name: value[0] for name, value in output[CommonKeys.LABEL].items()}
        picture = compose_panel(output[CommonKeys.IMAGE][0], output[CommonKeys.PRED][0], target, self.layout)
        name = Path(str(engine.state.batch.get("subject", [f"subject_{engine.state.iteration}"])[0])).name
        with write_whole(Path(self.output_dir) / "panels" / f"epoch_{epoch:04d}_{name}.png") as partial:
            partial.write_bytes(encode(picture, "png"))
        if self.summary_writer is not None:
            self.summary_writer.add_image(f"validation/{name}", picture, epoch, dataformats="HWC")


def compose_panel(image: Tensor, pred: Tensor, target: Mapping[str, Tensor], layout: TaskLayout) -> np.ndarray:
    """Image, prediction and targets of a sample, (C, H, W, D), in three planes through the middle, RGB, uint8."""
    columns: list[tuple[str, Task, Tensor]] = []
    for name, output in layout.split(pred[None]).items():
        task = layout.tasks[name]
        if not task.picture:
            continue
        values = output[0].argmax(0, keepdim=True) if task.kind == "labels" else task.to_map(output[0])
        columns.append((name, task, values))
        if name in target and float(target.get(f"available_{name}", 1)) > 0:
            columns.append((f"{name} (true)", task, task.target_to_map(target[name])))
    shape = tuple(image.shape[1:])
    rows = []
    for number, cut in enumerate(cut_slices(np.ones(shape), VOXELS, pixel_mm=min(1.0, max(shape) / SMALLEST_PANEL))):
        base = shade(cut.read(image, VOXELS)[..., 0])
        rows.append([Cell(base, cut.plane.marks, "" if number else "input")])
        for title, task, values in columns:
            read = cut.read(values, VOXELS, nearest=task.kind == "labels")
            drawn = paint(task, read, base, layout.protocol, cut.plane)
            rows[-1].append(Cell(drawn, caption="" if number else title))
    return compose(rows)
