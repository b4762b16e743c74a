"""Pictures of a validation: input, prediction and target of every task, in three planes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ignite.engine import Engine, Events
from monai.utils import CommonKeys
from torch import Tensor

from brainfm_monai.io import write_whole
from brainfm_monai.slices import Cell, compose, cut_slices, encode, paint, shade
from brainfm_monai.tasks import Task, TaskLayout

SMALLEST_PANEL = 144  # pixels of the longest side: captions have room
MIDDLE = {"axial": (0.5,), "coronal": (0.5,), "sagittal": (0.5,)}
VOXELS = np.eye(4)  # affine of a batch: RAS axes


class ValidationPanels:
    """Draws the first subjects of every validation, into the folder of the run and into TensorBoard.

    A row is a plane through the middle: axial, coronal, sagittal, in the radiological convention. Columns are the input
    and, for every task, prediction and target, drawn as the table of tasks says. Files go into ``panels`` in the
    folder.
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

    Args:
        image: shape (1, H, W, D), in [0, 1].
        pred: shape (layout.channels, H, W, D).
        target: by task (C, H, W, D); ``available_<task>`` where 0 takes the target out.
        layout: names the channels.
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
    cuts = cut_slices(np.ones(shape), VOXELS, MIDDLE, pixel_mm=min(1.0, max(shape) / SMALLEST_PANEL))
    rows = []
    for number, cut in enumerate(cuts):
        base = shade(cut.read(image, VOXELS)[..., 0])
        row = [Cell(base, cut.plane.marks, "" if number else "input")]
        for title, task, values in columns:
            read = cut.read(values, VOXELS, nearest=task.kind == "labels")
            row.append(Cell(paint(task, read, base, layout.protocol, cut.plane), caption="" if number else title))
        rows.append(row)
    return compose(rows)
