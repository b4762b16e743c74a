"""The task table, and the layout of all tasks in one output tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from brainfm_monai.anatomy import Protocol

__all__ = ["MAX_DISTANCE_MM", "TASKS", "Task", "TaskLayout", "bound_log_scale"]

MAX_DISTANCE_MM = 3.0  # distances are learnt within this band (BrainFM: max_surf_distance)
AIR = {"CT": -1.0}  # value of air in the unit of the task, where it is not 0
CERTAIN_LOGIT = 20.0  # a probability of 1 to eight digits
EMBEDDING_CHANNELS = 16  # of the embedding, unless the layout says otherwise
LOG_SCALE_SUFFIX = "_log_scale"  # of the task that holds the log of another one's scale of error
LOG_SCALE_LIMIT = 7.0  # scales lie between e^-7 and e^7 units: 0.1 mm of MNI coordinates, a thousandth of an intensity
SCALED_KINDS = ("image", "distance", "coordinates")  # whose error is absolute, and can have a scale


@dataclass(frozen=True)
class Task:
    """One thing the network predicts.

    Attributes:
        name: name of the task, and key of its target in a batch.
        channels: number of output channels; 0 for the segmentation, whose protocol decides.
        kind: ``labels``, ``mask``, ``image``, ``log_field``, ``distance``, ``coordinates``, ``scalar``, ``embedding`` or
            ``log_scale``: it decides loss, metric and output. A scalar is the mean of its channel over the head: a 1x1x1
            convolution and a mean commute, so that one output tensor serves numbers, too.
        unit: unit of the network's output.
        scale: factor from the network's output to ``output_unit``.
        output_unit: unit of the files a user gets.
        channel_names: names of the channels, empty where the protocol gives them.
        mirror_order: channel order after a left-right mirror, empty for the identity.
        mirror_sign: sign of each channel after a left-right mirror, empty for +1.
    """

    name: str
    channels: int
    kind: str
    unit: str
    scale: float
    output_unit: str
    channel_names: tuple[str, ...]
    mirror_order: tuple[int, ...] = ()
    mirror_sign: tuple[int, ...] = ()


# Units, channel orders and mirror rules: BrainFM (arXiv 2509.00549); distances are lp, lw, rp, rw there.
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("segmentation", 0, "labels", "logit", 1.0, "label", ()),
        Task("T1w", 1, "image", "intensity in [0, 1]", 1.0, "intensity in [0, 1]", ("T1w",)),
        Task("T2w", 1, "image", "intensity in [0, 1]", 1.0, "intensity in [0, 1]", ("T2w",)),
        Task("FLAIR", 1, "image", "intensity in [0, 1]", 1.0, "intensity in [0, 1]", ("FLAIR",)),
        Task("CT", 1, "image", "1000 HU", 1000.0, "HU", ("CT",)),
        Task("log_bias_field", 1, "log_field", "log of a factor", 1.0, "log of a factor", ("log_bias_field",)),
        Task("distance", 4, "distance", "mm", 1.0, "mm", ("lp", "lw", "rp", "rw"), mirror_order=(2, 3, 0, 1)),
        Task("mni", 3, "coordinates", "100 mm", 100.0, "mm", ("x", "y", "z"), mirror_sign=(-1, 1, 1)),
        Task("lesion", 1, "mask", "logit", 1.0, "probability", ("lesion",)),
        Task("super_resolution", 1, "image", "intensity in [0, 1]", 1.0, "intensity in [0, 1]", ("super_resolution",)),
        Task("age", 1, "scalar", "100 years", 100.0, "years", ("age",)),
        Task("embedding", 0, "embedding", "direction", 1.0, "direction", ()),
    )
}


def bound_log_scale(value: Tensor) -> Tensor:
    """Log of a scale of error out of a network's output, within +-7; the bound is smooth, so that no gradient is lost at it.

    Args:
        value: any shape.

    Returns:
        Tensor of the same shape, in float32.
    """
    return LOG_SCALE_LIMIT * torch.tanh(value.float() / LOG_SCALE_LIMIT)


class TaskLayout:
    """Names the channels of the network's one output tensor, segmentation first.

    Args:
        tasks: names out of :data:`TASKS`, in the order wanted; the segmentation is moved to the front.
        protocol: label protocol of the segmentation: its name, a table file or a :class:`Protocol`.
        uncertainty: tasks of images, distances or coordinates whose scale of error is predicted, too. Each brings a task
            ``<task>_log_scale`` after all others, with one channel for each channel of its own; see :func:`bound_log_scale`.
        embedding_channels: channels of the task ``embedding``.

    Raises:
        ValueError: if a task is unknown or named twice, or has no scale of error.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        protocol: str | Path | Protocol = "synthseg_head",
        uncertainty: Sequence[str] = (),
        embedding_channels: int = EMBEDDING_CHANNELS,
    ) -> None:
        unknown = [name for name in tasks if name not in TASKS]
        if unknown or len(set(tasks)) != len(tasks) or not tasks:
            raise ValueError(f"TaskLayout: 'tasks' must be different names out of {list(TASKS)}, got {list(tasks)}")
        self.protocol = protocol if isinstance(protocol, Protocol) else Protocol.load(protocol)
        possible = [name for name in tasks if TASKS[name].kind in SCALED_KINDS]
        if len(set(uncertainty) & set(possible)) != len(uncertainty):
            raise ValueError(
                f"TaskLayout: 'uncertainty' must be different names out of {possible}, got {list(uncertainty)}"
            )
        self.embedding_channels = embedding_channels
        names = sorted(tasks, key=lambda name: name != "segmentation")
        self.tasks: dict[str, Task] = {name: self._resolve(TASKS[name]) for name in names}
        scales = [_make_log_scale(TASKS[name]) for name in uncertainty]
        self.tasks |= {task.name: task for task in scales}
        self.slices: dict[str, slice] = {}
        start = 0
        for name, task in self.tasks.items():
            self.slices[name] = slice(start, start + task.channels)
            start += task.channels
        self.channels = start

    def _resolve(self, task: Task) -> Task:
        if task.kind == "embedding":
            names = tuple(f"{task.name}_{i}" for i in range(self.embedding_channels))
            return replace(task, channels=len(names), channel_names=names)
        if task.kind != "labels":
            return task
        names = tuple(s.name for s in self.protocol.structures)
        return replace(
            task, channels=len(names), channel_names=names, mirror_order=tuple(self.protocol.mirror_permutation)
        )

    def log_scale_of(self, name: str) -> str | None:
        """Name of the task with the log of a task's scale of error, if there is one."""
        scale = f"{name}{LOG_SCALE_SUFFIX}"
        return scale if scale in self.tasks else None

    @property
    def channel_names(self) -> list[str]:
        """Name of every channel of the output tensor."""
        return [name for task in self.tasks.values() for name in task.channel_names]

    @property
    def outside_values(self) -> list[float]:
        """Value of every channel in the air around a head: background for certain, far from any surface, no bias, -1000 HU.

        MNI coordinates are not defined there and are 0, with a scale of error of one unit; elsewhere that scale is the least.
        """
        constant = {"mask": -CERTAIN_LOGIT, "distance": MAX_DISTANCE_MM, "log_scale": -LOG_SCALE_LIMIT}
        values = []
        for task in self.tasks.values():
            undefined = TASKS.get(task.name.removesuffix(LOG_SCALE_SUFFIX), task).kind == "coordinates"
            per_channel = 0.0 if undefined else constant.get(task.kind, AIR.get(task.name, 0.0))
            values += [CERTAIN_LOGIT if task.kind == "labels" and i == 0 else per_channel for i in range(task.channels)]
        return values

    def split(self, output: Tensor) -> dict[str, Tensor]:
        """Views of the output tensor by task.

        Args:
            output: shape (B, C, H, W, D) with C the layout's channels, or ``label_channels`` of them where the segmentation
                has been decided.

        Returns:
            For each task a view of shape (B, channels of the task, H, W, D); a decided segmentation has one channel.

        Raises:
            ValueError: if the number of channels differs from the layout's.
        """
        sizes = {name: task.channels for name, task in self.tasks.items()}
        if output.shape[1] == self.label_channels and "segmentation" in sizes:
            sizes["segmentation"] = 1
        if output.shape[1] != sum(sizes.values()):
            raise ValueError(
                f"TaskLayout.split: 'output' must have {self.channels} channels for {list(self.tasks)}, got {tuple(output.shape)}"
            )
        # One split, not a slice for each task: its gradient is one concatenation instead of a zero-filled volume per task.
        parts = output.split(list(sizes.values()), dim=1)
        return dict(zip(self.tasks, parts, strict=True))

    @property
    def label_channels(self) -> int:
        """Channels of an output whose segmentation has been decided: one of labels, then the other tasks."""
        labels = self.tasks.get("segmentation")
        return self.channels if labels is None else self.channels - labels.channels + 1

    def choose_labels(self, output: Tensor) -> Tensor:
        """Decide the segmentation of the output tensor: the label of the largest logit in place of all logits.

        Args:
            output: shape (B, C, H, W, D) with C the layout's channels.

        Returns:
            Tensor of shape (B, label_channels, H, W, D): labels, then the other tasks as they were.
        """
        if "segmentation" not in self.tasks:
            return output
        logits = self.slices["segmentation"]
        labels = output[:, logits].argmax(dim=1, keepdim=True).to(output.dtype)
        return torch.cat([labels, output[:, logits.stop :]], dim=1)

    def mirror(self, output: Tensor) -> Tensor:
        """The output of the mirrored head: left-right flip (axis H) with the mirror rule of every task.

        Args:
            output: shape (B, C, H, W, D) with C the layout's channels, RAS+ axes.

        Returns:
            Tensor of the same shape; mirroring twice is the identity.
        """
        order, sign = [], []
        for name, task in self.tasks.items():
            start = self.slices[name].start
            order += [start + i for i in (task.mirror_order or range(task.channels))]
            sign += list(task.mirror_sign or (1,) * task.channels)
        factor = torch.tensor(sign, dtype=output.dtype, device=output.device).reshape(1, -1, 1, 1, 1)
        return output[:, order].flip(2) * factor


def _make_log_scale(task: Task) -> Task:
    names = tuple(f"{channel}{LOG_SCALE_SUFFIX}" for channel in task.channel_names)
    unit = f"log of {task.unit}"
    return replace(
        task, name=f"{task.name}{LOG_SCALE_SUFFIX}", kind="log_scale", unit=unit, channel_names=names, mirror_sign=()
    )
