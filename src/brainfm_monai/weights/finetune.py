"""Given weights as the start of another training: the backbone, and the channels of the head that both layouts have."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from brainfm_monai.networks import MultiTaskNet
from brainfm_monai.tasks import TaskLayout
from brainfm_monai.weights.plain import read_state_dict
from brainfm_monai.weights.published import load_published

__all__ = ["load_coarse_weights", "load_pretrained", "make_pretrained"]

logger = logging.getLogger(__name__)


def make_pretrained(
    backbone: nn.Module,
    layout: TaskLayout,
    weights: str | Path,
    weights_layout: TaskLayout | None = None,
    stride: int = 1,
    freeze_backbone: bool = False,
    out_channels: int | None = None,
) -> MultiTaskNet:
    """A multi-task network that starts from given weights: the ``_target_`` of ``network_def`` in ``finetune.json``.

    Args:
        backbone: backbone that the weights were trained with.
        layout: channels of the new head; its protocol may differ from that of the weights.
        weights: see :func:`load_pretrained`, as for errors.
        weights_layout: see :func:`load_pretrained`.
        stride: see :class:`~brainfm_monai.networks.MultiTaskNet`.
        freeze_backbone: train the head alone.
        out_channels: see :class:`~brainfm_monai.networks.MultiTaskNet`.
    """
    network = MultiTaskNet(backbone, layout, stride, freeze_backbone, out_channels)
    load_pretrained(network, weights, weights_layout)
    return network


def load_pretrained(network: MultiTaskNet, path: str | Path, layout: TaskLayout | None = None) -> list[str]:
    """Load the whole backbone, and the channels of the head that mean the same in both layouts; others keep their values.

    Channels of the segmentation are the same if their structures have one FreeSurfer id or, failing that, one name; those of
    other tasks if task and channel have the same names. The ``super_resolution`` of published checkpoints, a residual to the
    input, differs from ours and is left out.

    Args:
        network: network whose weights are overwritten.
        path: plain state dict of a ``MultiTaskNet``, or a published checkpoint, see
            :func:`~brainfm_monai.weights.load_published`.
        layout: layout of a plain state dict, which does not contain it; ``None``: that of the network.

    Returns:
        Names of the head's channels that the weights do not have.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is neither, the layout is not that of its head, or a tensor of the backbone is missing or of
            another shape.
    """
    skipped: tuple[str, ...] = ()
    try:
        given, source = read_state_dict(path), layout or network.layout
    except ValueError as plain:
        try:
            published = load_published(path)
        except ValueError as error:
            reasons = "; ".join(str(e).removeprefix(f"{path}: ") for e in (plain, error))
            message = f"{path}: weights of this package or a published checkpoint are needed: {reasons}"
            raise ValueError(message) from error
        given, source, skipped = published.network.state_dict(), published.layout, ("super_resolution",)
    pairs = _match_channels(path, network.layout, source, given, skipped)
    state = network.state_dict()
    _copy_backbone(path, state, given, {key: key for key in state if key.startswith("backbone.")})
    for key in ("head.weight", "head.bias"):
        state[key] = state[key].clone()
        state[key][list(pairs)] = given[key][list(pairs.values())].to(state[key])
    return _finish(path, network, state, pairs)


def load_coarse_weights(network: MultiTaskNet, path: str | Path, layout: TaskLayout | None = None) -> list[str]:
    """Start a two-scale network from a coarse one: its first output is that of the coarse network, each voxel repeated.

    Args:
        network: :class:`~brainfm_monai.networks.MultiTaskNet` over a :class:`~brainfm_monai.networks.TwoScaleUNet`.
        path: plain state dict of the coarse network, a ``MultiTaskNet`` over an ``AdditiveUNet``; empty: nothing is done.
        layout: layout of the coarse network; ``None``: that of the network.

    Returns:
        Names of the head's channels that the coarse network does not have; they keep their values.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: see :func:`load_pretrained`.
    """
    if not str(path):
        return []
    given, state = read_state_dict(path), network.state_dict()
    coarse = [key for key in state if key.startswith("backbone.coarse.")]
    pairs = _match_channels(path, network.layout, layout or network.layout, given)
    _copy_backbone(path, state, given, {key: key.replace("backbone.coarse.", "backbone.") for key in coarse})
    rows, sources = list(pairs), list(pairs.values())
    weight, bias = state["head.weight"].clone(), state["head.bias"].clone()
    weight[rows] = 0
    weight[rows, -given["head.weight"].shape[1] :] = given["head.weight"][sources].to(weight)
    bias[rows] = given["head.bias"][sources].to(bias)
    return _finish(path, network, {**state, "head.weight": weight, "head.bias": bias}, pairs)


def _copy_backbone(
    path: str | Path, state: dict[str, Tensor], given: Mapping[str, Tensor], names: dict[str, str]
) -> None:
    for key, source in names.items():
        if source not in given or given[source].shape != state[key].shape:
            found = f"one of {tuple(given[source].shape)}" if source in given else "none"
            raise ValueError(
                f"{path}: the weights must fit the network's backbone, found {found} for '{source}' of {tuple(state[key].shape)}"
            )
        state[key] = given[source]


def _finish(path: str | Path, network: MultiTaskNet, state: dict[str, Tensor], pairs: dict[int, int]) -> list[str]:
    network.load_state_dict(state)
    missing = [name for i, name in enumerate(network.layout.channel_names) if i not in pairs]
    new = ", ".join(missing) or "none"
    logger.info("%s: the backbone and %d channels of the head; new channels: %s", path, len(pairs), new)
    return missing


def _match_channels(
    path: str | Path, new: TaskLayout, old: TaskLayout, given: Mapping[str, Tensor], skipped: tuple[str, ...] = ()
) -> dict[int, int]:
    """Channel of the old layout for every channel of the new one that means the same."""
    tensors = [given.get(f"head.{kind}", torch.empty(0)) for kind in ("weight", "bias")]
    if any(len(tensor) != old.channels for tensor in tensors):
        found = len(tensors[0]) or "no head"
        raise ValueError(
            f"{path}: the head must have the {old.channels} channels of {list(old.tasks)} in protocol {old.protocol.name}, "
            f"found {found}"
        )
    pairs: dict[int, int] = {}
    for name, task in new.tasks.items():
        if name not in old.tasks or name in skipped:
            continue
        if task.kind == "labels":
            structures = [s for s in old.protocol.structures if s.name != f"label-{s.freesurfer_id}"]  # a mere number
            by_id = {s.freesurfer_id: s.label for s in structures}
            by_name = {s.name: s.label for s in old.protocol.structures}
            same = {s.label: by_id.get(s.freesurfer_id, by_name.get(s.name)) for s in new.protocol.structures}
        else:
            names = {channel: i for i, channel in enumerate(old.tasks[name].channel_names)}
            same = {i: names.get(channel) for i, channel in enumerate(task.channel_names)}
        first, source = new.slices[name].start, old.slices[name].start
        pairs |= {first + i: source + j for i, j in same.items() if j is not None}
    return pairs
