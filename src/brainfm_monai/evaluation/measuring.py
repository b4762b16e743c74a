"""From the maps and the references of a case to its measures and its picture."""

from __future__ import annotations

import io
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import LoadImage, Transform
from torch import Tensor

from brainfm_monai.anatomy import Protocol
from brainfm_monai.data.pairs import REFERENCES
from brainfm_monai.evaluation.degradations import TARGET
from brainfm_monai.evaluation.tables import mean_dice_rows
from brainfm_monai.metrics import (
    EvaluatedStructure,
    MetricRow,
    TemplateTissues,
    compute_structure_dice,
    measure_scan,
    parse_structures,
)
from brainfm_monai.metrics.structures import index_structures
from brainfm_monai.outputs import resample
from brainfm_monai.tasks import TaskLayout

__all__ = ["GRIDS", "LoadReferences", "MeasureMaps"]

GRIDS = ("scan", "network")
FOREGROUND = 0.05  # of the scan's range: above it is head, where no reference tells what is
SLICES = {2: (0.4, 0.6), 1: (0.5,), 0: (0.35,)}  # axial, coronal, sagittal; shares of the reference's box
OPACITY = 0.5


class LoadReferences(Transform):
    """Read the references of a real scan into entries ``target_<task>``, shape (C, H, W, D), each in its own grid.

    A label map becomes FreeSurfer ids, by its ``label_protocol`` where it has one.
    """

    def __init__(self) -> None:
        self.read = LoadImage(reader="NibabelReader", ensure_channel_first=True, image_only=True)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Replace the paths."""
        d = dict(data)
        for key, task in REFERENCES.items():
            if key in d:
                d[TARGET + task] = self.read(d.pop(key))
        protocol = d.get("label_protocol")
        if protocol and f"{TARGET}segmentation" in d:
            labels: MetaTensor = d[f"{TARGET}segmentation"]
            ids = torch.as_tensor(Protocol.load(str(protocol)).freesurfer_ids)[labels.as_tensor().long()]
            d[f"{TARGET}segmentation"] = MetaTensor(ids, affine=labels.affine)
        return d


class MeasureMaps(Transform):
    """Measure every task that has a prediction and a reference; the last step of the postprocessing.

    It adds ``rows`` (the measures), ``dice`` (of the structures of ``dice.tsv``) and ``picture`` (WebP). Labels are compared
    in the scan's grid, to which the prediction was brought, or in the network's; other maps in the network's.

    Args:
        layout: names of the tasks.
        structures: table of the structures that are measured, see :func:`~brainfm_monai.metrics.parse_structures`.
        dice_structures: table of the structures of ``dice.tsv``; None: without.
        comparison_grid: grid in which labels are compared: ``scan`` or ``network``.
        template: tissues for the Dice of warped labels; None: without.

    Raises:
        ValueError: if there is no such grid, or a table of structures is wrong.
    """

    def __init__(
        self,
        layout: TaskLayout,
        structures: Mapping[str, Any],
        dice_structures: Mapping[str, Any] | None = None,
        comparison_grid: str = "scan",
        template: TemplateTissues | None = None,
    ) -> None:
        if comparison_grid not in GRIDS:
            raise ValueError(f"comparison_grid: one of {', '.join(GRIDS)} is needed, found '{comparison_grid}'")
        self.layout, self.grid, self.template = layout, comparison_grid, template
        self.structures = parse_structures(structures)
        self.dice_structures = None if dice_structures is None else parse_structures(dice_structures)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Add the measures of one case, whose maps are those of :class:`~brainfm_monai.transforms.SplitTasksd`."""
        d = dict(data)
        names = {"scan": str(d["scan"]), "condition": str(d["condition"])}
        targets = {str(key).removeprefix(TARGET): d[key] for key in d if str(key).startswith(TARGET)}
        image: MetaTensor = d["image"]
        found = {name: _map_of(name, d) for name in self.layout.tasks if name != "segmentation"}
        there = {name: value for name, value in found.items() if value is not None}
        rows: list[MetricRow] = []
        reference = targets.get("segmentation")
        if reference is not None and "segmentation" in self.layout.tasks:
            labels: MetaTensor = d["pred"] if self.grid == "scan" else d["segmentation"]
            wanted = _match(reference, labels, "nearest")
            rows += mean_dice_rows(self._measure({"segmentation": labels}, {"segmentation": wanted}, labels, names))
            if self.dice_structures is not None:
                ids = torch.as_tensor(self.layout.protocol.freesurfer_ids, device=labels.device)[labels.as_tensor().long()]
                arguments = (ids[None], wanted[None], self.dice_structures, labels.affine)
                d["dice"] = compute_structure_dice(*arguments)[0].cpu()
        dense = _dense_targets(targets, there, image)
        foreground = None if reference is not None else image.as_tensor() > FOREGROUND
        rows += self._measure(there, dense, image, names, mask=foreground, image=image.as_tensor(), template=self.template)
        d["rows"] = rows
        shown = d.get("segmentation")
        d["picture"] = _picture(image, shown, dense.get("segmentation"), self.structures, self.layout.protocol)
        return d

    def _measure(
        self, found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], grid: MetaTensor, names: Mapping[str, str], **more: Any
    ) -> list[MetricRow]:
        plain = {name: _plain(value) for name, value in found.items()}
        truth = {name: _plain(value) for name, value in wanted.items()}
        return measure_scan(plain, truth, self.layout, self.structures, grid.affine, **names, **more)


def _map_of(name: str, data: Mapping[Hashable, Any]) -> Tensor | None:
    """The map of a task in the unit in which it is measured: a field as its logarithm."""
    if name.startswith("log_") and name.removeprefix("log_") in data:
        logarithm: Tensor = data[name.removeprefix("log_")].log()
        return logarithm
    value: Tensor | None = data.get(name)
    return value


def _plain(values: Tensor) -> Tensor:
    return values.as_tensor() if isinstance(values, MetaTensor) else values


def _match(source: MetaTensor, grid: MetaTensor, mode: str) -> Tensor:
    moved = resample(source.to(grid.device), grid.shape[1:], np.asarray(grid.affine), mode, "zeros")
    return moved.as_tensor()


def _dense_targets(targets: Mapping[str, MetaTensor], found: Mapping[str, Tensor], grid: MetaTensor) -> dict[str, Tensor]:
    """References in the network's grid, those that are measured there, each with where it has values."""
    labels_alike = ("segmentation", "visible", "lesion")
    dense: dict[str, Tensor] = {}
    for name, value in targets.items():
        if name not in found and name not in ("segmentation", "visible") and not name.startswith("valid_"):
            continue
        mode = "nearest" if name in labels_alike or name.startswith("valid_") else "bilinear"
        dense[name] = _match(value, grid, mode)
        if name in found:
            inside = _match(MetaTensor(torch.ones_like(_plain(value)[:1]), affine=value.affine), grid, "nearest") > 0
            given = targets.get(f"valid_{name}")
            dense[f"valid_{name}"] = inside if given is None else inside & (_match(given, grid, "nearest") > 0)
    return dense


def _picture(
    image: MetaTensor,
    found: MetaTensor | None,
    wanted: Tensor | None,
    structures: Sequence[EvaluatedStructure],
    protocol: Protocol,
) -> bytes:
    """The scan, the prediction over it and the reference over it, side by side in rows of planes, as WebP.

    The patient's right is on the left of a picture, anterior or superior above.
    """
    from PIL import Image  # an optional dependency

    grey = _plain(image).cpu().numpy()[0].clip(0, 1)
    indices = [np.zeros(grey.shape, dtype=np.int64)] * 2
    if found is not None:
        ids = torch.as_tensor(protocol.freesurfer_ids)[_plain(found)[0].cpu().long()]
        indices[0] = index_structures(ids, structures, image.affine).numpy()
    if wanted is not None:
        indices[1] = index_structures(wanted[0].cpu(), structures, image.affine).numpy()
    shown = [None, *(index for index, there in zip(indices, (found, wanted), strict=True) if there is not None)]
    head = indices[1] if indices[1].any() else indices[0]
    colours = _colours(structures, protocol)
    planes = []
    for axis, shares in SLICES.items():
        occupied = np.flatnonzero(head.any(axis=tuple(a for a in range(3) if a != axis)))
        first, last = (occupied[0], occupied[-1]) if len(occupied) else (0, grey.shape[axis] - 1)
        planes += [
            [_slice(grey, over, colours, axis, round(first + share * (last - first))) for over in shown] for share in shares
        ]
    height = max(plane.shape[0] for row in planes for plane in row)
    columns = [np.concatenate([_pad(row[i], height) for row in planes], axis=1) for i in range(len(shown))]
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate(columns, axis=0)).save(buffer, format="webp", quality=80)
    return buffer.getvalue()


def _colours(structures: Sequence[EvaluatedStructure], protocol: Protocol) -> np.ndarray:
    """Colour of every index of :func:`index_structures`, shape (2 S + 1, 3)."""
    table = np.zeros((2 * len(structures) + 1, 3), dtype=np.float32)
    for number, structure in enumerate(structures):
        for place, ids in ((2 * number + 1, structure.left | structure.middle), (2 * number + 2, structure.right)):
            known = [protocol.label_of_id[i] for i in sorted(ids) if i in protocol.label_of_id]
            table[place] = protocol.structures[known[0]].colour if known else (255, 255, 255)
    return table


def _slice(grey: np.ndarray, over: np.ndarray | None, colours: np.ndarray, axis: int, index: int) -> np.ndarray:
    """A slice as rows and columns of RGB: right (or anterior) on the left, superior (or anterior) above."""
    plane = np.repeat(grey.take(index, axis=axis)[..., None] * 255, 3, axis=-1)
    if over is not None:
        labels = over.take(index, axis=axis)
        plane = np.where(labels[..., None] > 0, (1 - OPACITY) * plane + OPACITY * colours[labels], plane)
    return plane[::-1, ::-1].swapaxes(0, 1).astype(np.uint8)


def _pad(plane: np.ndarray, height: int) -> np.ndarray:
    missing = height - plane.shape[0]
    return np.pad(plane, ((missing // 2, missing - missing // 2), (0, 0), (0, 0)))
