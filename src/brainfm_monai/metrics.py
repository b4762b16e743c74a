"""Dice of named structures between a predicted and a reference label map, and the tables of an evaluation."""

from __future__ import annotations

import csv
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from monai.metrics import compute_dice
from torch import Tensor

from brainfm_monai.anatomy import Protocol
from brainfm_monai.tasks import TaskLayout

__all__ = ["EvaluatedStructure", "StructureDiceTable", "compute_mean_dice", "compute_structure_dice", "parse_structures"]

logger = logging.getLogger(__name__)

PARTS = ("left", "right", "both")
ABSENT = "n/a"  # BIDS' word for a missing value in a table

Ids = Sequence[int | Sequence[int]]  # FreeSurfer ids, and [first, last] ranges of them


@dataclass(frozen=True)
class EvaluatedStructure:
    """The FreeSurfer ids that make up one evaluated structure.

    Attributes:
        name: name in the tables.
        left: ids on the left.
        right: ids on the right.
        unsided: ids that stand on both sides: each voxel belongs to the side of the midplane that it lies on.
        middle: ids of a structure that has no sides; then there are no others.
    """

    name: str
    left: frozenset[int] = frozenset()
    right: frozenset[int] = frozenset()
    unsided: frozenset[int] = frozenset()
    middle: frozenset[int] = frozenset()

    @property
    def ids(self) -> frozenset[int]:
        """All ids of the structure."""
        return self.left | self.right | self.unsided | self.middle

    def __post_init__(self) -> None:
        if bool(self.left) != bool(self.right) or bool(self.middle) == bool(self.left) or (self.middle and self.unsided):
            raise ValueError(f"structure {self.name}: ids are needed either on 'left' and 'right' or in the 'middle' alone")


def parse_structures(table: Mapping[str, Mapping[str, Ids]]) -> tuple[EvaluatedStructure, ...]:
    """Read the structures of an evaluation from a table of a bundle config.

    Args:
        table: for each name the FreeSurfer ids ``left`` and ``right``, and ``unsided`` where there are such, or ``middle``;
            ids are numbers and ``[first, last]`` ranges.

    Returns:
        The structures, in the table's order.

    Raises:
        ValueError: if a structure has another entry, no ids, or an id of another structure.
    """
    structures = []
    owner: dict[int, str] = {}
    for name, entry in table.items():
        unknown = set(entry) - {"left", "right", "unsided", "middle"}
        if unknown:
            raise ValueError(f"structure {name}: the entries are left, right, unsided and middle, found {sorted(unknown)}")
        structure = EvaluatedStructure(name, **{part: _expand(ids) for part, ids in entry.items()})
        for i in structure.ids:
            if i in owner:
                raise ValueError(f"structure {name}: an id may stand in one structure, found {i} in {owner[i]}, too")
            owner[i] = name
        structures.append(structure)
    return tuple(structures)


def _expand(ids: Ids) -> frozenset[int]:
    ranges = [(i, i) if isinstance(i, int) else (i[0], i[-1]) for i in ids]
    return frozenset(i for first, last in ranges for i in range(first, last + 1))


def _index_structures(ids: Tensor, structures: Sequence[EvaluatedStructure], affine: Tensor) -> Tensor:
    """Label map of the sides of structures: 2 s + 1 for the left (or the middle) and 2 s + 2 for the right of structure s.

    Args:
        ids: FreeSurfer ids, shape (H, W, D).
        structures: S structures.
        affine: voxel indices to mm, shape (4, 4).

    Returns:
        int64 tensor of shape (H, W, D), 0 where there is none of the structures.
    """
    largest = max(i for s in structures for i in s.ids)
    table = torch.zeros(largest + 2, dtype=torch.int64)
    unsided_table = torch.zeros_like(table)
    for number, structure in enumerate(structures):
        table[sorted(structure.left | structure.middle)] = 2 * number + 1
        table[sorted(structure.right)] = 2 * number + 2
        unsided_table[sorted(structure.unsided)] = 2 * number + 1
    known = torch.where(ids < 0, 0, ids.round().long().clamp(max=largest + 1))
    index = table.to(ids.device)[known]
    unsided = unsided_table.to(ids.device)[known]
    paired = index.new_tensor([0, *(bool(s.left) for s in structures for _ in "lr")], dtype=torch.bool)[index]
    is_left = (index % 2 == 1) & paired
    is_right = (index % 2 == 0) & paired
    places = unsided.nonzero()
    if len(places) and is_left.any() and is_right.any():
        on_right = ~_lies_left(places, is_left, is_right, affine)
        index[places.unbind(1)] = unsided[places.unbind(1)] + on_right
    return index


def _lies_left(places: Tensor, is_left: Tensor, is_right: Tensor, affine: Tensor) -> Tensor:
    """Whether voxels, shape (N, 3), lie left of the plane halfway between both sides' centroids, normal to their line."""
    left, right = _centroid(is_left), _centroid(is_right)
    axes = affine[:3, :3].to(left)
    normal = axes.T @ axes @ (left - right)
    return (places.to(left) - (left + right) / 2) @ normal > 0


def _centroid(mask: Tensor) -> Tensor:
    """Mean voxel index of a mask of shape (H, W, D), shape (3,), float64."""
    parts = []
    for axis in range(3):
        count = mask.sum(dim=[a for a in range(3) if a != axis]).double()
        parts.append((count * torch.arange(len(count), device=count.device)).sum() / count.sum())
    return torch.stack(parts)


def compute_structure_dice(
    prediction: Tensor, reference: Tensor, structures: Sequence[EvaluatedStructure], affine: Tensor | None = None
) -> Tensor:
    """Dice of each structure: its left part, its right part, and both together.

    Args:
        prediction: FreeSurfer ids, shape (B, 1, H, W, D).
        reference: FreeSurfer ids, same shape.
        structures: S structures.
        affine: voxel indices to mm, shape (4, 4): tells where the midplane of unsided voxels lies; the identity if None.

    Returns:
        Dice, shape (B, S, 3): left, right, both. It is NaN where the reference has no such structure, and for the sides of
        a structure that has none.

    Raises:
        ValueError: if the shapes differ.
    """
    if prediction.shape != reference.shape or prediction.ndim != 5:
        found = f"{tuple(prediction.shape)} and {tuple(reference.shape)}"
        raise ValueError(
            f"compute_structure_dice: 'prediction' and 'reference' must share one shape (B, 1, H, W, D), got {found}"
        )
    place = torch.eye(4, dtype=torch.float64) if affine is None else affine
    pred, truth = (
        torch.stack([_index_structures(one[0], structures, place)[None] for one in ids]) for ids in (prediction, reference)
    )
    count = len(structures)
    sides = compute_dice(pred, truth, include_background=False, num_classes=2 * count + 1).reshape(-1, count, 2)
    both = compute_dice((pred + 1) // 2, (truth + 1) // 2, include_background=False, num_classes=count + 1)
    sides[:, [bool(s.middle) for s in structures]] = torch.nan
    return torch.cat([sides, both[..., None]], dim=-1)


def compute_mean_dice(dice: Tensor, structures: Sequence[EvaluatedStructure]) -> float:
    """Mean over the left and right parts, and over the structures that have no sides; what is absent is left out.

    Args:
        dice: shape (S, 3), from :func:`compute_structure_dice`.
        structures: S structures.
    """
    middle = torch.tensor([bool(s.middle) for s in structures])
    return float(torch.cat([dice[:, :2].reshape(-1), dice[middle, 2]]).nanmean())


class StructureDiceTable:
    """Handler that compares each predicted label map with its reference and writes two tables.

    ``dice.tsv`` has one row per scan and structure, ``dice_summary.tsv`` one per structure: the mean over the scans that have
    it. Both are written again after every scan, so that they are whole whenever a run ends.

    Args:
        structures: table for :func:`parse_structures`.
        layout: its protocol tells the FreeSurfer ids of predicted labels.
        output_dir: folder of the tables.
    """

    def __init__(self, structures: Mapping[str, Mapping[str, Ids]], layout: TaskLayout, output_dir: str | Path) -> None:
        self.structures = parse_structures(structures)
        self.layout = layout
        self.output_dir = Path(output_dir)
        self.dice: dict[str, Tensor] = {}

    def attach(self, engine: Engine) -> None:
        """Compare after every iteration."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Compare ``pred`` and ``label`` of each item, both (1, H, W, D) on one grid."""
        for item, source in zip(_items(engine.state.output), _items(engine.state.batch), strict=True):
            pred: MetaTensor = item["pred"]
            name = str(item["image"].meta["scan_name"])
            ids = _to_ids(pred.as_tensor(), self.layout.protocol)
            reference = item["label"].as_tensor()
            if source.get("label_protocol"):
                reference = _to_ids(reference, Protocol.load(source["label_protocol"]))
            self.dice[name] = compute_structure_dice(ids[None], reference[None], self.structures, pred.affine)[0].cpu()
            logger.info("%s: mean Dice %.3f", name, compute_mean_dice(self.dice[name], self.structures))
        self.write()

    def write(self) -> None:
        """Write both tables and log the mean over all scans."""
        self.output_dir.mkdir(parents=True, exist_ok=True)
        names = [s.name for s in self.structures]
        rows = [(scan, name, *_cells(row)) for scan, dice in self.dice.items() for name, row in zip(names, dice, strict=True)]
        _write_table(self.output_dir / "dice.tsv", ("scan", "structure", *PARTS), rows)
        stacked = torch.stack(list(self.dice.values()))
        mean = sum(compute_mean_dice(dice, self.structures) for dice in stacked) / len(stacked)
        present = (~stacked[..., 2].isnan()).sum(0).tolist()
        summary = [(n, *_cells(row), count) for n, row, count in zip(names, stacked.nanmean(0), present, strict=True)]
        summary.append(("mean", ABSENT, ABSENT, f"{mean:.4f}", len(stacked)))
        _write_table(self.output_dir / "dice_summary.tsv", ("structure", *PARTS, "scans"), summary)
        logger.info("mean Dice over %d scans: %.3f; tables in %s", len(stacked), mean, self.output_dir)


def _items(decollated: object) -> list[dict[str, Any]]:
    return list(cast(Iterable[dict[str, Any]], decollated))


def _to_ids(labels: Tensor, protocol: Protocol) -> Tensor:
    return torch.as_tensor(protocol.freesurfer_ids, device=labels.device)[labels.long()]


def _cells(values: Tensor) -> list[str]:
    return [ABSENT if value.isnan() else f"{value:.4f}" for value in values]


def _write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    beside = path.with_name(f".{path.name}.part")
    with beside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
    beside.replace(path)
