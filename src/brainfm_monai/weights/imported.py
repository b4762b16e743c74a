"""Published weights as files of a bundle: a plain state dict, and the overrides that make ``inference.json`` use it."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from brainfm_monai.anatomy import COLUMNS, Protocol
from brainfm_monai.weights.published import Published, load_published

__all__ = ["import_weights"]

logger = logging.getLogger(__name__)


def import_weights(path: str | Path, output: str | Path, half: bool = False) -> Published:
    """Turn a published checkpoint into files that this package and any plain ``torch.load`` can use.

    In the folder ``output`` appear ``model.pt`` (plain state dict), ``overrides.json`` (what ``inference.json`` needs to use it),
    ``source.json`` (where it comes from: format, SHA-256, template space, licence), and
    ``protocol.tsv`` where the labels have no protocol of the package.

    Args:
        path: see :func:`~brainfm_monai.weights.load_published`.
        output: folder, made if it is missing.
        half: write float16, half the size; networks load it as float32.

    Returns:
        The weights, ready to run.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: see :func:`~brainfm_monai.weights.load_published`.
    """
    published = load_published(path)
    folder = Path(output).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    _save(folder / "model.pt", published.network.state_dict(), half)
    protocol = published.layout.protocol
    shipped = protocol.name in Protocol.names()
    if not shipped:
        _write(folder / "protocol.tsv", _table(protocol))
    _write(folder / "source.json", json.dumps(asdict(published.info), indent=4) + "\n")
    overrides = _overrides(published, folder, protocol.name if shipped else str(folder / "protocol.tsv"))
    _write(folder / "overrides.json", json.dumps(overrides, indent=4) + "\n")
    logger.info("%s weights with %s: %s", published.info.format, ", ".join(published.info.tasks), folder)
    return published


def _overrides(published: Published, folder: Path, protocol: str) -> dict[str, Any]:
    info = published.info
    backbone: dict[str, Any] = {
        "_target_": f"brainfm_monai.networks.{info.backbone}",
        "in_channels": published.network.backbone.in_channels,
        "features": list(info.features),
    }
    if info.unit_norm:
        backbone["unit_norm"] = True
    return {
        "weights": str(folder / "model.pt"),
        "layout#tasks": list(info.tasks),
        "layout#protocol": protocol,
        "network_def#backbone": backbone,
        "network_def#stride": 1,
        "second_look": False,  # their coordinates were learnt on whole heads
    }


def _save(path: Path, state: dict[str, Tensor], half: bool) -> None:
    partial = path.with_name(f".{path.name}.partial")
    torch.save({key: tensor.half() if half else tensor for key, tensor in state.items()}, partial)
    partial.replace(path)


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _table(protocol: Protocol) -> str:
    rows: list[tuple[str, ...]] = [COLUMNS]
    for s in protocol.structures:
        includes = " ".join(str(i) for i in s.includes)
        rows.append((str(s.label), str(s.freesurfer_id), s.name, s.side, str(s.mirror), *map(str, s.colour), includes))
    return "".join("\t".join(row) + "\n" for row in rows)
