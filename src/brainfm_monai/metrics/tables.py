"""The tables of Dice that an evaluation writes."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from torch import Tensor

from brainfm_monai.anatomy import Protocol
from brainfm_monai.io import ABSENT, write_table
from brainfm_monai.metrics.segmentation import compute_mean_dice, compute_structure_dice
from brainfm_monai.metrics.structures import SIDES, Ids, parse_structures
from brainfm_monai.tasks import TaskLayout

__all__ = ["StructureDiceTable"]

logger = logging.getLogger(__name__)


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
        rows = [
            (scan, name, *_cells(row))
            for scan, dice in self.dice.items()
            for name, row in zip(names, dice, strict=True)
        ]
        write_table(self.output_dir / "dice.tsv", ("scan", "structure", *SIDES), rows)
        stacked = torch.stack(list(self.dice.values()))
        mean = sum(compute_mean_dice(dice, self.structures) for dice in stacked) / len(stacked)
        present = (~stacked[..., 2].isnan()).sum(0).tolist()
        summary = [(n, *_cells(row), count) for n, row, count in zip(names, stacked.nanmean(0), present, strict=True)]
        summary.append(("mean", ABSENT, ABSENT, f"{mean:.4f}", len(stacked)))
        write_table(self.output_dir / "dice_summary.tsv", ("structure", *SIDES, "scans"), summary)
        logger.info("mean Dice over %d scans: %.3f; tables in %s", len(stacked), mean, self.output_dir)


def _items(decollated: object) -> list[dict[str, Any]]:
    return list(cast(Iterable[dict[str, Any]], decollated))


def _to_ids(labels: Tensor, protocol: Protocol) -> Tensor:
    return torch.as_tensor(protocol.freesurfer_ids, device=labels.device)[labels.long()]


def _cells(values: Tensor) -> list[str]:
    return [ABSENT if value.isnan() else f"{value:.4f}" for value in values]
