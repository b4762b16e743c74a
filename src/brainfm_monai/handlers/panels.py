"""Pictures of a validation: input, prediction and target of every task, in three planes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from ignite.engine import Engine, Events
from monai.utils import CommonKeys
from torch import Tensor

from brainfm_monai.anatomy import Protocol
from brainfm_monai.tasks import MAX_DISTANCE_MM, Task, TaskLayout

__all__ = ["ValidationPanels", "compose_panel"]

TITLE_HEIGHT = 14  # pixels
SMALLEST_PANEL = 96  # pixels; smaller planes are enlarged by whole numbers
LARGEST_LOG_BIAS = 1.0  # that is shown white or black
FIELD_OF_MNI_MM = 100.0  # coordinates of +-100 mm are shown as 0 and 255 of a colour


class ValidationPanels:
    """Draws the first subjects of every validation, into the folder of the run and into TensorBoard.

    A row is a plane through the middle: axial, coronal, sagittal, with the left of the head on the left. Columns are the input
    and, for every task, prediction and target. Distances are those to the nearest pial surface, red inside and blue outside;
    coordinates are colours.

    Args:
        layout: names the channels of the prediction.
        output_dir: folder; pictures go into ``panels`` there.
        summary_writer: of TensorBoard; nothing is written there without.
        count: subjects that are drawn.
    """

    def __init__(self, layout: TaskLayout, output_dir: str | Path, summary_writer: Any = None, count: int = 2) -> None:
        self.layout, self.folder, self.writer, self.count = layout, Path(output_dir) / "panels", summary_writer, count

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Any) -> None:
        """Draw the first sample of a batch, if it is one of the first batches."""
        number = engine.state.iteration
        if number > self.count:
            return
        from PIL import Image

        output = engine.state.output
        picture = compose_panel(
            output[CommonKeys.IMAGE][0], output[CommonKeys.PRED][0], _first(output[CommonKeys.LABEL]), self.layout
        )
        name = Path(str(engine.state.batch.get("subject", [f"subject_{number}"])[0])).name
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"epoch_{engine.state.epoch:04d}_{name}.png"
        beside = path.with_name(f".{path.name}.part")
        Image.fromarray(picture).save(beside, format="png")
        beside.replace(path)
        if self.writer is not None:
            self.writer.add_image(f"validation/{name}", picture, engine.state.epoch, dataformats="HWC")


def _first(targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value[0] for name, value in targets.items()}


def compose_panel(image: Tensor, pred: Tensor, target: Mapping[str, Tensor], layout: TaskLayout) -> np.ndarray:
    """One picture of a sample.

    Args:
        image: shape (1, H, W, D), in [0, 1].
        pred: shape (layout.channels, H, W, D).
        target: by task (C, H, W, D); ``available_<task>`` where 0 takes the target out.
        layout: names the channels.

    Returns:
        RGB, shape (rows, columns, 3), uint8.
    """
    grey = _planes(image[:1].float(), lambda x: np.repeat(x[0, ..., None], 3, axis=-1))
    columns = {"input": grey}
    for name, output in layout.split(pred[None]).items():
        task = layout.tasks[name]
        paint = _painter(task, layout.protocol)
        found = output[0].argmax(0, keepdim=True) if task.kind == "labels" else output[0].float()
        columns[name] = _planes(found.sigmoid() if task.kind == "mask" else found, paint)
        if name in target and task.kind != "scalar" and float(target.get(f"available_{name}", 1)) > 0:
            columns[f"{name} (true)"] = _planes(target[name].float(), paint)
    scale = max(1, -(-SMALLEST_PANEL // max(max(plane.shape[:2]) for plane in grey)))
    height = [max(c[row].shape[0] for c in columns.values()) for row in range(3)]
    width = max(plane.shape[1] for plane in grey)
    stacks = [np.concatenate([_pad(p, h, width) for p, h in zip(c, height, strict=True)]) for c in columns.values()]
    picture = (np.concatenate(stacks, axis=1).clip(0, 1) * 255).round().astype(np.uint8)
    picture = picture.repeat(scale, 0).repeat(scale, 1)
    return np.concatenate([_write_titles(list(columns), picture.shape[1]), picture])


def _planes(volume: Tensor, paint: Callable[[np.ndarray], np.ndarray]) -> list[np.ndarray]:
    """The axial, coronal and sagittal plane through the middle, each (rows, columns, 3), the top of the head up."""
    planes = []
    for axis in (2, 1, 0):
        plane = volume.select(axis + 1, volume.shape[axis + 1] // 2)
        planes.append(paint(plane.transpose(1, 2).flip(1).cpu().numpy()))
    return planes


def _pad(plane: np.ndarray, height: int, width: int) -> np.ndarray:
    missing = (height - plane.shape[0], width - plane.shape[1])
    return np.pad(plane, [*((n // 2, n - n // 2) for n in missing), (0, 0)])


def _painter(task: Task, protocol: Protocol) -> Callable[[np.ndarray], np.ndarray]:
    """From the channels of a plane, (C, rows, columns), to colours in [0, 1]."""
    colours = np.array([s.colour for s in protocol.structures], dtype=np.float32) / 255

    def signed(values: np.ndarray, largest: float) -> np.ndarray:
        x = (values / largest).clip(-1, 1)
        return np.stack([1 - x.clip(0), 1 - np.abs(x), 1 + x.clip(max=0)], axis=-1)

    painters: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "labels": lambda x: colours[x[0].astype(int)],
        "distance": lambda x: signed(np.minimum(x[0], x[2]), MAX_DISTANCE_MM),
        "log_field": lambda x: signed(x[0], LARGEST_LOG_BIAS),
        "coordinates": lambda x: np.moveaxis(x, 0, -1) * task.scale / (2 * FIELD_OF_MNI_MM) + 0.5,
    }
    return painters.get(task.kind, lambda x: np.repeat(x[0, ..., None], 3, axis=-1))


def _write_titles(names: list[str], width: int) -> np.ndarray:
    from PIL import Image, ImageDraw

    strip = Image.new("RGB", (width, TITLE_HEIGHT))
    draw = ImageDraw.Draw(strip)
    for number, name in enumerate(names):
        draw.text((number * width // len(names) + 2, 1), name, fill=(255, 255, 255))
    return np.asarray(strip)
