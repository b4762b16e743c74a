"""What a training shows: statistics while it runs, scores and pictures of a validation."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import ignite.distributed as idist
import numpy as np
import torch
from ignite.engine import Engine, Events
from ignite.handlers import ProgressBar
from ignite.metrics import Metric
from ignite.metrics.metric import reinit__is_reduced, sync_all_reduce
from monai.handlers import from_engine
from monai.metrics import compute_dice
from monai.utils import CommonKeys
from torch import Tensor
from torch.optim import Optimizer

from brainfm_monai.io import write_whole
from brainfm_monai.losses import MultiTaskLoss
from brainfm_monai.metrics import fields
from brainfm_monai.slices import Cell, compose, cut_slices, encode, paint, shade
from brainfm_monai.tasks import Task, TaskLayout

SCORES = {"segmentation": "mean_dice", "distance": "distance_mae_mm", "mni": "mni_error_mm"}
SCORES["log_bias_field"] = "log_bias_error"
SMALLEST_PANEL = 144  # pixels of the longest side: captions have room
VOXELS = np.eye(4)  # affine of a batch: RAS axes


@dataclass(eq=False)
class TrainingStatistics:
    """Adds a dictionary ``statistics`` to a trainer's output every few iterations, and shows a progress bar.

    They are ``loss`` and the unweighted loss of every task, means over all processes, ``gradient_norm``,
    ``learning_rate``, and ``samples_per_second`` of all processes. Each reading waits for the device.
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

    ``mean_dice`` is the hard Dice over the foreground structures of the reference. ``distance_mae_mm``,
    ``mni_error_mm`` and ``log_bias_error`` are those of the evaluation; ``<image>_mae`` is the mean absolute error in
    the head, in the unit of the files. A task of another kind has none.
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
    """Input, prediction and target of every task in three planes through the middle, RGB (rows, columns, 3), uint8.

    The image is (1, H, W, D), in [0, 1], the prediction (layout.channels, H, W, D), targets are (C, H, W, D), or absent
    by ``available_<task>``.
    """
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
