"""What a training shows: statistics while it runs, scores and pictures of a validation."""

import time
from collections.abc import Mapping
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

SCORES = {"distance": "distance_mae_mm", "mni": "mni_error_mm", "log_bias_field": "log_bias_error"}
SMALLEST_PANEL = 144  # pixels of the longest side: captions have room
VOXELS = np.eye(4)  # affine of a batch: RAS axes


class TrainingStatistics:
    """Adds a dictionary ``statistics`` to a trainer's output every few iterations, and shows a progress bar.

    They are ``loss`` and the unweighted loss of every task, means over all processes, ``gradient_norm``,
    ``learning_rate``, and ``samples_per_second`` of all processes. Each reading waits for the device.
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
        self.latest = output["statistics"] = means
        self._start()


class TaskErrors(Metric):
    """Errors of the tasks beside the segmentation, each a mean over the samples of all processes that have the target.

    ``distance_mae_mm``, ``mni_error_mm`` and ``log_bias_error`` are those of the evaluation; ``<image>_mae`` is the
    mean absolute error in the head, in the unit of the files. A task of another kind has none.
    """

    mode: Any = "flatten"  # of ignite: how a dictionary of results enters the metrics of the engine

    def __init__(self, layout: TaskLayout) -> None:
        self.layout, self.names = layout, self._name_scores(layout)
        super().__init__(output_transform=from_engine(["pred", "label"]), metrics_result_mode=self.mode)

    def _name_scores(self, layout: TaskLayout) -> dict[str, str]:
        """Name of the score of every task that has one."""
        names = SCORES | {name: f"{name}_mae" for name, task in layout.tasks.items() if task.kind == "image"}
        return {name: names[name] for name in layout.tasks if name in names}

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
    def compute(self) -> Any:
        """Means over the samples seen, by name; tasks that none of them has are left out."""
        sums, counts = self.total.tolist()
        return {name: s / n for name, s, n in zip(self.names.values(), sums, counts, strict=True) if n}


class SegmentationDice(TaskErrors):
    """Mean hard Dice over the foreground structures of the reference, over all processes' samples that show any."""

    mode = "both"

    def _name_scores(self, layout: TaskLayout) -> dict[str, str]:
        return {"segmentation": "mean_dice"}

    def _score(self, task: str, pred: Tensor, target: Mapping[str, Tensor]) -> Tensor:
        labels, count = pred.argmax(1, keepdim=True), len(self.layout.protocol)
        return compute_dice(labels, target[task], include_background=False, num_classes=count).nanmean(1)

    def compute(self) -> float:
        """Mean over the samples seen; NaN without any."""
        return float(super().compute().get("mean_dice", float("nan")))


class ValidationPanels:
    """Draws the first subjects of every validation, into the folder of the run and into TensorBoard.

    A row is a plane through the middle: axial, coronal, sagittal. Columns are the input and, for every task, prediction
    and target. Files go into ``panels``.
    """

    def __init__(self, layout: TaskLayout, output_dir: str | Path, summary_writer: Any = None, count: int = 2) -> None:
        self.layout, self.folder, self.writer, self.count = layout, Path(output_dir) / "panels", summary_writer, count

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        """Draw the first sample of a batch, if it is one of the first batches."""
        number, output = engine.state.iteration, engine.state.output
        if number > self.count:
            return
        target = {name: value[0] for name, value in output[CommonKeys.LABEL].items()}
        picture = compose_panel(output[CommonKeys.IMAGE][0], output[CommonKeys.PRED][0], target, self.layout)
        name = Path(str(engine.state.batch.get("subject", [f"subject_{number}"])[0])).name
        with write_whole(self.folder / f"epoch_{engine.state.epoch:04d}_{name}.png") as partial:
            partial.write_bytes(encode(picture, "png"))
        if self.writer is not None:
            self.writer.add_image(f"validation/{name}", picture, engine.state.epoch, dataformats="HWC")


def compose_panel(image: Tensor, pred: Tensor, target: Mapping[str, Tensor], layout: TaskLayout) -> np.ndarray:
    """One picture of a sample, RGB of shape (rows, columns, 3), uint8.

    The image is (1, H, W, D), in [0, 1], the prediction (layout.channels, H, W, D), and the targets by task are (C, H,
    W, D); ``available_<task>`` of 0 takes a target out.
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
    cuts = cut_slices(np.ones(shape), VOXELS, pixel_mm=min(1.0, max(shape) / SMALLEST_PANEL))
    rows = []
    for number, cut in enumerate(cuts):
        base = shade(cut.read(image, VOXELS)[..., 0])
        row = [Cell(base, cut.plane.marks, "" if number else "input")]
        for title, task, values in columns:
            read = cut.read(values, VOXELS, nearest=task.kind == "labels")
            row.append(Cell(paint(task, read, base, layout.protocol, cut.plane), caption="" if number else title))
        rows.append(row)
    return compose(rows)
