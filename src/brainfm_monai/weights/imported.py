"""Published weights as files of a bundle: a plain state dict, and the overrides with which ``inference.json`` uses it."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path

import torch

from brainfm_monai.anatomy import COLUMNS, Protocol
from brainfm_monai.io import write_table, write_text, write_whole
from brainfm_monai.weights.published import Published, load_published

__all__ = ["import_weights"]

logger = logging.getLogger(__name__)


def import_weights(path: str | Path, output: str | Path, half: bool = False) -> Published:
    """Turn a published checkpoint into files that this package and any plain ``torch.load`` can use.

    The folder ``output`` then contains ``model.pt`` (plain state dict), ``overrides.json`` (for ``inference.json``, whose key
    ``weights_dir`` names the folder), ``source.json`` (format, SHA-256, template space, licence), and ``protocol.tsv`` if the
    labels have no protocol of the package.

    Args:
        path: see :func:`~brainfm_monai.weights.load_published`, as for errors.
        output: folder, made if it is missing.
        half: write float16, half the size; networks load it as float32.

    Returns:
        The weights, ready to run.
    """
    published = load_published(path)
    folder, info, protocol = Path(output).absolute(), published.info, published.layout.protocol
    with write_whole(folder / "model.pt") as partial:
        state = published.network.state_dict()
        torch.save({key: tensor.half() if half else tensor for key, tensor in state.items()}, partial)
    shipped = protocol.name in Protocol.names()
    if not shipped:
        rows = [
            (s.label, s.freesurfer_id, s.name, s.side, s.mirror, *s.colour, " ".join(map(str, s.includes)))
            for s in protocol.structures
        ]
        write_table(folder / "protocol.tsv", COLUMNS, rows)
    backbone = {
        "_target_": f"brainfm_monai.networks.{info.backbone}",
        "in_channels": published.network.backbone.in_channels,
        "features": list(info.features),
        **({"unit_norm": True} if info.unit_norm else {}),
    }
    overrides = {
        "weights_dir": str(folder),
        "weights": "$@weights_dir + '/model.pt'",
        "layout#tasks": list(info.tasks),
        "layout#protocol": protocol.name if shipped else "$@weights_dir + '/protocol.tsv'",
        "network_def#backbone": backbone,
        "network_def#stride": 1,
        "second_look": False,  # these coordinates were learnt on whole heads
    }
    for name, content in {"source": asdict(info), "overrides": overrides}.items():
        write_text(folder / f"{name}.json", json.dumps(content, indent=4) + "\n")
    logger.info("%s weights with %s: %s", info.format, ", ".join(info.tasks), folder)
    return published
