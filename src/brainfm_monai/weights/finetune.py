"""Given weights as the start of another training: the backbone as it is, of the head what both layouts have."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor, nn

from brainfm_monai.anatomy import Protocol, Structure
from brainfm_monai.networks import MultiTaskNet
from brainfm_monai.tasks import TaskLayout
from brainfm_monai.weights.plain import read_state_dict
from brainfm_monai.weights.published import load_published

__all__ = ["load_pretrained", "make_pretrained"]

logger = logging.getLogger(__name__)


def make_pretrained(
    backbone: nn.Module,
    layout: TaskLayout,
    weights: str | Path,
    weights_layout: TaskLayout | None = None,
    stride: int = 1,
    freeze_backbone: bool = False,
) -> MultiTaskNet:
    """A multi-task network that starts from given weights: the ``_target_`` of ``network_def`` in ``finetune.json``.

    Args:
        backbone: see :class:`~brainfm_monai.networks.MultiTaskNet`; it must be the one that the weights were trained with.
        layout: channels of the new head; its protocol may be another than that of the weights.
        weights: see :func:`load_pretrained`.
        weights_layout: see :func:`load_pretrained`.
        stride: see :class:`~brainfm_monai.networks.MultiTaskNet`.
        freeze_backbone: train the head alone.

    Raises:
        FileNotFoundError: see :func:`load_pretrained`.
        ValueError: see :func:`load_pretrained`.
    """
    network = MultiTaskNet(backbone, layout, stride, freeze_backbone)
    load_pretrained(network, weights, weights_layout)
    return network


def load_pretrained(network: MultiTaskNet, path: str | Path, layout: TaskLayout | None = None) -> list[str]:
    """Load the whole backbone, and the channels of the head that mean the same in both layouts; others keep their values.

    Channels of the segmentation are the same if their structures have one FreeSurfer id or, failing that, one name; those of
    other tasks if task and channel have the same names. The ``super_resolution`` of published checkpoints, a residual to the
    input, is another thing than ours and is left out.

    Args:
        network: its weights are overwritten.
        path: plain state dict of a ``MultiTaskNet``, or a published checkpoint, see
            :func:`~brainfm_monai.weights.load_published`.
        layout: of the plain state dict, which does not tell it; that of the network if not given. A published checkpoint
            tells its own.

    Returns:
        Names of the head's channels that the weights do not have.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is neither, the layout is not that of its head, or a tensor of the backbone is missing or of
            another shape.
    """
    state, source = _read(path, layout or network.layout)
    new = network.state_dict()
    for key in (key for key in new if key.startswith("backbone.")):
        if key not in state or state[key].shape != new[key].shape:
            found = f"one of {tuple(state[key].shape)}" if key in state else "none"
            raise ValueError(
                f"{path}: the weights must fit the network's backbone, found {found} for '{key}' of {tuple(new[key].shape)}"
            )
        new[key] = state[key]
    pairs = _match_channels(network.layout, source)
    for key in ("head.weight", "head.bias"):
        rows = new[key].clone()
        rows[list(pairs)] = state[key][list(pairs.values())].to(rows)
        new[key] = rows
    network.load_state_dict(new)
    missing = [name for i, name in enumerate(network.layout.channel_names) if i not in pairs]
    logger.info(
        "%s: the backbone and %d channels of the head; new are: %s", path, len(pairs), ", ".join(missing) or "none"
    )
    return missing


def _read(path: str | Path, layout: TaskLayout) -> tuple[dict[str, Tensor], TaskLayout]:
    """State dict of a network of this package and the layout of its head."""
    try:
        state = read_state_dict(path)
    except ValueError as plain:
        try:
            published = load_published(path)
        except ValueError as error:
            reasons = "; ".join(str(e).removeprefix(f"{path}: ") for e in (plain, error))
            raise ValueError(
                f"{path}: weights of this package or a published checkpoint are needed: {reasons}"
            ) from error
        return _without_residual(published.network.state_dict(), published.layout)
    weight, bias = state.get("head.weight"), state.get("head.bias")
    if weight is None or bias is None or len(weight) != layout.channels or len(bias) != layout.channels:
        found = "no head" if weight is None or bias is None else f"{len(weight)}"
        raise ValueError(
            f"{path}: the head must have the {layout.channels} channels of {list(layout.tasks)} in protocol "
            f"{layout.protocol.name}, found {found}"
        )
    return state, layout


def _without_residual(state: dict[str, Tensor], layout: TaskLayout) -> tuple[dict[str, Tensor], TaskLayout]:
    reduced = TaskLayout([name for name in layout.tasks if name != "super_resolution"], layout.protocol)
    parts = [layout.slices[name] for name in reduced.tasks]
    heads = {key: torch.cat([state[key][part] for part in parts]) for key in ("head.weight", "head.bias")}
    return {**state, **heads}, reduced


def _match_channels(new: TaskLayout, old: TaskLayout) -> dict[int, int]:
    """Channel of the old layout for every channel of the new one that is the same."""
    pairs: dict[int, int] = {}
    for name, task in new.tasks.items():
        if name not in old.tasks:
            continue
        if task.kind == "labels":
            same = _match_structures(new.protocol, old.protocol)
        else:
            names = old.tasks[name].channel_names
            same = {i: names.index(channel) for i, channel in enumerate(task.channel_names) if channel in names}
        pairs |= {new.slices[name].start + i: old.slices[name].start + j for i, j in same.items()}
    return pairs


def _match_structures(new: Protocol, old: Protocol) -> dict[int, int]:
    by_id = {s.freesurfer_id: s.label for s in old.structures if not _is_anonymous(s)}
    by_name = {s.name: s.label for s in old.structures}
    found = {s.label: by_id.get(s.freesurfer_id, by_name.get(s.name)) for s in new.structures}
    return {label: other for label, other in found.items() if other is not None}


def _is_anonymous(structure: Structure) -> bool:
    """Whether the id is no FreeSurfer id but a mere number: labels of a published checkpoint without a known protocol."""
    return structure.name == f"label-{structure.freesurfer_id}"
