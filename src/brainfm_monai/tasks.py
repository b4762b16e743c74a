"""The table of maps: every task of the network, its channels, units and files; and the layout of one output tensor."""

import csv
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from importlib import resources
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from brainfm_monai.anatomy import Protocol

BRAIN_WINDOW_HU = (0.0, 80.0)  # of a CT, as the network gets it and as it is drawn (BrainFM)
MAX_DISTANCE_MM = 3.0  # distances are learnt within this band (BrainFM: max_surf_distance)
# Units, channel orders and mirror rules are those of BrainFM (arXiv 2509.00549). Targets of T1w, T2w and FLAIR are
# scaled by white matter, see brainfm_monai.data.contrasts.scale_contrast. A logit of 20 is certain to eight digits.
TABLE = resources.files("brainfm_monai") / "tasks.tsv"
EMBEDDING_CHANNELS = 16  # of the embedding, unless the layout says otherwise
LOG_SCALE_LIMIT = 7.0  # scales lie between e^-7 and e^7 units: 0.1 mm of MNI coordinates, a thousandth of an intensity


def bound_log_scale(value: Tensor) -> Tensor:
    """Log of a scale of error, float32, out of a network's output: bounded to +-7, smoothly, with a gradient."""
    return LOG_SCALE_LIMIT * torch.tanh(value.float() / LOG_SCALE_LIMIT)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "exp": torch.exp,
    "sigmoid": torch.sigmoid,
    "clip_distance": lambda x: x.clamp(-MAX_DISTANCE_MM, MAX_DISTANCE_MM),
    "exp_of_bounded": lambda x: bound_log_scale(x).exp(),
    "unit_vector": lambda x: torch.nn.functional.normalize(x, dim=0),
}


@dataclass(frozen=True)
class Task:
    """One thing that the network predicts, and everything about the map that is made of it.

    The kind is ``labels``, ``mask``, ``image``, ``log_field``, ``distance``, ``coordinates``, ``scalar``, ``embedding``
    or ``log_scale``: it decides the loss and the metric. A scalar is the mean of its channel over the head: a 1x1x1
    convolution and a mean commute, so that one output tensor serves numbers, too.
    """

    name: str  # also the key of the target in a batch
    kind: str
    channel_names: tuple[str, ...] = ()  # empty for segmentation and embedding, where the layout gives them
    unit: str = "intensity in [0, 1]"  # of the network's output and of the target
    output_unit: str = ""  # of the map in memory and in files; the unit of the network if empty
    activation: str = "identity"  # name out of ACTIVATIONS: what is done to the network's output first
    scale: float = 1.0  # factor after the activation, from the network's unit to output_unit
    entry: str = ""  # key of the map in the items of the inference; the name if empty
    mirror_order: tuple[int, ...] = ()  # channel order after a left-right mirror; empty for the identity
    mirror_sign: tuple[int, ...] = ()  # sign of each channel after a left-right mirror; empty for +1
    outside: float = 0.0  # network's output in the air around the head (of a segmentation: of its background)
    interpolation: str = "bilinear"  # how the map is brought to another grid
    stem: str = ""  # end of the name of the map's file; empty where the map has no file of its own
    step: float | None = None  # quantisation step of the file in output_unit; None: as fine as 16 bits allow
    outputs: tuple[str, ...] = ()  # groups of files (--outputs) that are made of the map
    picture: str = ""  # key of the painters of page, training pictures and previews; empty: not drawn

    def __post_init__(self) -> None:
        object.__setattr__(self, "output_unit", self.output_unit or self.unit)
        object.__setattr__(self, "entry", self.entry or self.name)

    @property
    def channels(self) -> int:
        """Number of output channels; 0 where the layout decides."""
        return len(self.channel_names)

    def to_map(self, output: Tensor) -> Tensor:
        """The map in ``output_unit`` out of the network's output, shape (C, ...), float32."""
        return ACTIVATIONS[self.activation](output.float()) * self.scale

    def mirror(self, values: Tensor) -> Tensor:
        """The channels (B, C, H, W, D) of the mirrored head, whose grid has been flipped or will be."""
        order, sign = self.mirror_order or range(self.channels), self.mirror_sign or (1,) * self.channels
        return torch.stack([values[:, i] * factor for i, factor in zip(order, sign, strict=True)], 1)

    def target_to_map(self, target: Tensor) -> Tensor:
        """The map that a target of the training stands for: labels and masks as they are, others in ``output_unit``."""
        return target if self.kind in ("labels", "mask") else self.to_map(target)


def _read_tasks() -> dict[str, Task]:
    """The rows of the table; blanks separate the entries of a cell that has several, an empty cell is the default."""
    readers: dict[Any, Callable[[str], Any]] = {str: str, float: float, float | None: float}
    readers |= {tuple[str, ...]: lambda cell: tuple(cell.split())}
    readers |= {tuple[int, ...]: lambda cell: tuple(int(word) for word in cell.split())}
    read = {field.name: readers[field.type] for field in fields(Task)}
    table = csv.DictReader(TABLE.read_text(encoding="utf-8").splitlines(), delimiter="\t")
    tasks = (Task(**{name: read[name](cell) for name, cell in row.items() if cell}) for row in table)
    return {task.name: task for task in tasks}


TASKS: dict[str, Task] = _read_tasks()
SCALED_KINDS = ("image", "distance", "coordinates")  # whose error is absolute, and can have a scale


def _make_log_scale(task: Task) -> Task:
    """The row of the scale of a task's error: it has the channels and the unit of the task, and no sign."""
    return Task(
        f"{task.name}_log_scale", "log_scale", tuple(f"{channel}_log_scale" for channel in task.channel_names),
        f"log of {task.unit}", task.output_unit, "exp_of_bounded", task.scale, f"{task.entry}_scale",
        task.mirror_order, outside=0.0 if task.kind == "coordinates" else -LOG_SCALE_LIMIT, stem=f"{task.stem}scale",
        outputs=("uncertainty",), picture="scale",
    )  # fmt: skip


LOG_SCALES: dict[str, Task] = {name: _make_log_scale(task) for name, task in TASKS.items() if task.kind in SCALED_KINDS}


class TaskLayout:
    """Names the channels of the network's one output tensor, segmentation first.

    Args:
        tasks: different names out of :data:`TASKS`, else it is a ValueError; the segmentation is moved to the front.
        protocol: label protocol of the segmentation: its name, a table file or a :class:`Protocol`.
        uncertainty: tasks of images, distances or coordinates whose scale of error is predicted, too. Each brings a
            task ``<task>_log_scale`` after all others, with a channel for each of its own; see :func:`bound_log_scale`.
        embedding_channels: channels of the task ``embedding``.
    """

    def __init__(
        self, tasks: Sequence[str], protocol: str | Path | Protocol = "synthseg_head",
        uncertainty: Sequence[str] = (), embedding_channels: int = EMBEDDING_CHANNELS,
    ) -> None:  # fmt: skip
        if not set(tasks) <= set(TASKS) or len(set(tasks)) != len(tasks) or not tasks:
            raise ValueError(f"TaskLayout: 'tasks' must be different names out of {list(TASKS)}, got {list(tasks)}")
        self.protocol = protocol if isinstance(protocol, Protocol) else Protocol.load(protocol)
        possible = [name for name in tasks if name in LOG_SCALES]
        if len(set(uncertainty) & set(possible)) != len(uncertainty):
            rule = f"'uncertainty' must be different names out of {possible}"
            raise ValueError(f"TaskLayout: {rule}, got {list(uncertainty)}")
        names = sorted(tasks, key=lambda name: name != "segmentation")
        labels = tuple(structure.name for structure in self.protocol.structures)
        segmentation = {"channel_names": labels, "mirror_order": tuple(self.protocol.mirror_permutation)}
        embedding = {"channel_names": tuple(f"embedding_{i}" for i in range(embedding_channels))}
        channels: dict[str, dict[str, Any]] = {"segmentation": segmentation, "embedding": embedding}
        rows = [replace(TASKS[name], **channels.get(name, {})) for name in names] + [LOG_SCALES[n] for n in uncertainty]
        self.tasks: dict[str, Task] = {task.name: task for task in rows}
        self.maps: dict[str, Task] = {task.entry: task for task in rows}
        ends = list(accumulate((task.channels for task in rows), initial=0))
        self.slices = {task.name: slice(*pair) for task, pair in zip(rows, pairwise(ends), strict=True)}
        self.channels = ends[-1]
        # channels of an output whose segmentation has been decided: one of labels, then the other tasks
        self.label_channels = self.channels - len(labels) + 1 if "segmentation" in names else self.channels
        self.channel_names = [name for task in rows for name in task.channel_names]
        # of every channel in the air around a head: certain background, far from any surface, no bias, -1000 HU; MNI
        # coordinates are not defined there: they are 0 with a scale of error of one unit, elsewhere the least
        self.outside_values = [t.outside * (t.kind != "labels" or i == 0) for t in rows for i in range(t.channels)]

    def split(self, output: Tensor) -> dict[str, Tensor]:
        """Views of the output (B, C, H, W, D) by task, each of shape (B, channels of the task, H, W, D).

        C is ``channels``, or ``label_channels`` where the segmentation has been decided; else it is a ValueError.
        """
        sizes = {name: task.channels for name, task in self.tasks.items()}
        if output.shape[1] == self.label_channels and "segmentation" in sizes:
            sizes["segmentation"] = 1
        if output.shape[1] != sum(sizes.values()):
            rule = f"'output' must have {self.channels} channels for {list(self.tasks)}"
            raise ValueError(f"TaskLayout.split: {rule}, got {tuple(output.shape)}")
        # One split, not a slice for each task: its gradient is one concatenation, not a zero-filled volume per task.
        return dict(zip(self.tasks, output.split(list(sizes.values()), dim=1), strict=True))

    def choose_labels(self, output: Tensor) -> Tensor:
        """Put the label of the largest logit in place of logits: (B, C, H, W, D) to (B, label_channels, H, W, D)."""
        if "segmentation" not in self.tasks:
            return output
        logits = self.slices["segmentation"]
        labels = output[:, logits].argmax(dim=1, keepdim=True).to(output.dtype)
        return torch.cat([labels, output[:, logits.stop :]], dim=1)

    def mirror(self, output: Tensor) -> Tensor:
        """The output (B, C, H, W, D) of the mirrored head: flipped left-right (axis H) by the rule of every task."""
        return torch.cat([task.mirror(output[:, self.slices[name]]) for name, task in self.tasks.items()], 1).flip(2)
