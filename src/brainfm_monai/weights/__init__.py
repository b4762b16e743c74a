"""Reading weights safely, into networks that they fit: whole, or the backbone and the channels of both layouts."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from brainfm_monai.io import refuse_if
from brainfm_monai.networks import MultiTaskNet
from brainfm_monai.tasks import TaskLayout
from brainfm_monai.weights.checkpoint import read_checkpoint
from brainfm_monai.weights.published import import_weights, load_published

__all__ = ["find_tasks", "import_weights", "load_pretrained", "load_published", "load_weights", "read_state_dict"]

logger = logging.getLogger(__name__)


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read a plain state dict, running nothing in it; FileNotFoundError without a file, ValueError if it is none."""
    state, rule = read_checkpoint(path), f"{path}: a plain state dict of tensors is needed"
    refuse_if(not isinstance(state, dict), rule, type(state).__name__)
    refuse_if(not state, rule, "no entries")
    for key, value in state.items():
        refuse_if(not isinstance(value, Tensor), rule, f"'{key}' of type {type(value).__name__}")
        is_dense = value.layout == torch.strided and not value.is_quantized and not value.is_meta
        refuse_if(not is_dense, rule, f"'{key}', which is sparse, quantized or without values")
    return dict(state)


def find_tasks(path: str | Path, tasks: Sequence[str], context: Sequence[str]) -> list[str]:
    """The tasks that a file of weights predicts: those of ``context`` only if the file has a context head.

    A file that is missing or is none of weights is reported where it is loaded.
    """
    try:
        has_context = any(key.startswith("context.") for key in read_state_dict(path))
    except (FileNotFoundError, ValueError):
        return list(tasks)
    return [name for name in tasks if has_context or name not in context]


def load_weights(network: nn.Module, path: str | Path) -> None:
    """Load a plain state dict, ``torch.save(network.state_dict(), path)``, into a network that it fits exactly.

    Errors are those of :func:`read_state_dict`, and ValueError for the first tensor that is missing, unknown or of
    another shape.
    """
    both = state, expected = read_state_dict(path), network.state_dict()
    for key in [*expected, *state]:
        found, needed = (f"'{key}' of shape {tuple(x[key].shape)}" if key in x else f"no '{key}'" for x in both)
        rule = f"{path}: the weights must fit the network"
        refuse_if(found != needed, rule, f"{found} where the network has {needed}")
    network.load_state_dict(state)


def load_pretrained(network: MultiTaskNet, path: str | Path, layout: TaskLayout | None = None) -> list[str]:
    """Load the whole backbone and the head's channels that mean the same in both layouts; others keep their values.

    Returns the names of the head's channels that the weights do not have. Channels of the segmentation are the same if
    their structures have one FreeSurfer id or, failing that, one name; those of other tasks if task and channel have
    the same names. The ``super_resolution`` of published checkpoints, a residual to the input, is left out. A context
    head is taken as it is if its tensors fit. A :class:`~brainfm_monai.networks.TwoScaleUNet` may start from the
    weights of its coarse network, an ``AdditiveUNet``, whose output, each voxel repeated, is its first one.

    The file is a plain state dict of a ``MultiTaskNet`` of that ``layout`` (None: that of the network), or a published
    checkpoint; without a path nothing is done. FileNotFoundError if there is no such file, ValueError if the layout is
    not that of its head, or a tensor of the backbone does not fit.
    """
    if not str(path):
        return []
    given, source, skipped = read_checkpoint(path), layout or network.layout, network.context_tasks
    if not isinstance(given, dict) or not all(isinstance(value, Tensor) for value in given.values()):
        published, _ = load_published(path)
        given, source, skipped = published.state_dict(), published.layout, ("super_resolution", *skipped)
    pairs = _match_channels(path, network.layout, source, given, skipped)
    state = network.state_dict()
    coarse, rule = "backbone.coarse.", f"{path}: the weights must fit the network's backbone"
    # weights without a fine level start the coarse network
    is_new, is_given = (any(key.startswith(coarse) for key in tensors) for tensors in (state, given))
    prefix = coarse if is_new and not is_given else "backbone."
    for key in [key for key in state if key.startswith(prefix)]:
        name = key.replace(prefix, "backbone.")
        found = f"one of {tuple(given[name].shape)}" if name in given else "none"
        is_wrong = name not in given or given[name].shape != state[key].shape
        refuse_if(is_wrong, rule, f"{found} for '{name}' of {tuple(state[key].shape)}")
        state[key] = given[name]
    context = {key: given[key] for key in state if key.startswith("context.") and key in given}
    if all(state[key].shape == value.shape for key, value in context.items()):
        state |= context
    rows, sources = list(pairs), list(pairs.values())
    weight, bias = state["head.weight"].clone(), state["head.bias"].clone()
    weight[rows] = 0  # for the features that a coarse network does not have
    weight[rows, -given["head.weight"].shape[1] :] = given["head.weight"][sources].to(weight)
    bias[rows] = given["head.bias"][sources].to(bias)
    network.load_state_dict({**state, "head.weight": weight, "head.bias": bias})
    new = [name for i, name in enumerate(network.layout.channel_names[: len(bias)]) if i not in pairs]
    listed = ", ".join(new) or "none"
    logger.info("%s: the backbone and %d channels of the head; new channels: %s", path, len(pairs), listed)
    return new


def _match_channels(
    path: str | Path, new: TaskLayout, old: TaskLayout, given: Mapping[str, Tensor], skipped: Sequence[str]
) -> dict[int, int]:
    """Channel of the old layout for every channel of the new one that means the same."""
    tensors = [given.get(f"head.{kind}", torch.empty(0)) for kind in ("weight", "bias")]
    tasks = [name for name in old.tasks if name not in skipped or name == "super_resolution"]
    channels = sum(old.tasks[name].channels for name in tasks)
    rule = f"the head must have the {channels} channels of {tasks} in protocol {old.protocol.name}"
    is_wrong = any(len(tensor) not in (channels, old.channels) for tensor in tensors)
    refuse_if(is_wrong, f"{path}: {rule}", len(tensors[0]) or "no head")
    pairs: dict[int, int] = {}
    for name, task in new.tasks.items():
        if name not in old.tasks or name in skipped:
            continue
        places = {channel: i for i, channel in enumerate(old.tasks[name].channel_names)}
        same = {i: places[channel] for i, channel in enumerate(task.channel_names) if channel in places}
        if task.kind == "labels":  # whose ids come first, but for those that are mere numbers
            ids = {s.freesurfer_id: s.label for s in old.protocol.structures if s.name != f"label-{s.freesurfer_id}"}
            same |= {s.label: ids[s.freesurfer_id] for s in new.protocol.structures if s.freesurfer_id in ids}
        pairs |= {new.slices[name].start + i: old.slices[name].start + j for i, j in same.items()}
    return pairs
