"""The format of a published checkpoint, and its tensors under the names of this package."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from brainfm_monai.anatomy import Protocol, Structure
from brainfm_monai.networks import MultiTaskNet, ResidualUNet, UNet
from brainfm_monai.tasks import TASKS, TaskLayout
from brainfm_monai.weights.checkpoint import Placeholder

__all__ = ["recognise"]

# task -> the heads that it is made of, in the order of its channels
BRAINFM_HEADS = {
    "segmentation": ("segmentation",),
    "T1w": ("T1",),
    "T2w": ("T2",),
    "FLAIR": ("FLAIR",),
    "CT": ("CT",),
    "log_bias_field": ("bias_field_log",),
    "distance": ("distance",),
    "mni": ("registration",),
    "super_resolution": ("high_res_residual",),
}
SUPERSYNTH_HEADS = {
    "segmentation": ("seg",),
    "T1w": ("T1",),
    "T2w": ("T2",),
    "FLAIR": ("FLAIR",),
    "distance": ("LP", "LW", "RP", "RW"),
    "mni": ("reg",),
}
PROTOCOLS = {56: "brainfm"}  # label protocol by the number of channels of the segmentation

# pattern of a tensor's name in the file -> its name in the backbone; a unit's number counts from 1 there and from 0 here
BRAINFM_NAMES = (
    (r"(encoders|decoders)\.(\d+)\.basic_module\.SingleConv([12])\.groupnorm\.(weight|bias)", "{0}.{1}.{unit}.0.{3}"),
    (r"(encoders|decoders)\.(\d+)\.basic_module\.SingleConv([12])\.conv\.(weight)", "{0}.{1}.{unit}.1.{3}"),
)
SUPERSYNTH_NAMES = (
    (r"(encoders)\.(\d+)\.basic_module\.conv(1)\.(weight|bias)", "{0}.{1}.projection.{3}"),
    (r"(encoders)\.(\d+)\.basic_module\.conv(2)\.conv\.(weight)", "{0}.{1}.first.0.{3}"),
    (r"(encoders)\.(\d+)\.basic_module\.conv(2)\.groupnorm\.(weight|bias)", "{0}.{1}.first.1.{3}"),
    (r"(encoders)\.(\d+)\.basic_module\.conv(3)\.conv\.(weight)", "{0}.{1}.second.0.{3}"),
    (r"(encoders)\.(\d+)\.basic_module\.conv(3)\.groupnorm\.(weight|bias)", "{0}.{1}.second.1.{3}"),
    (r"(decoders)\.(\d+)\.basic_module\.SingleConv([12])\.conv\.(weight)", "{0}.{1}.{unit}.0.{3}"),
    (r"(decoders)\.(\d+)\.basic_module\.SingleConv([12])\.groupnorm\.(weight|bias)", "{0}.{1}.{unit}.1.{3}"),
)

Tensors = dict[str, Tensor]


def recognise(content: Any) -> tuple[str, MultiTaskNet, list[str]]:
    """Find the format of a checkpoint by its content, and make the network that its weights fit.

    Args:
        content: result of :func:`~brainfm_monai.weights.checkpoint.read_checkpoint`.

    Returns:
        Format (``BrainFM`` or ``SuperSynth``), network with its weights, and names of the entries that are not used.

    Raises:
        ValueError: if the checkpoint is of neither format, or its tensors do not belong together.
        RuntimeError: if a tensor is missing or of another shape.
    """
    if isinstance(content, Mapping):
        if isinstance(content.get("backbone_state_dict"), Mapping):
            return "SuperSynth", *_supersynth(content)
        tensors = _tensors(content["model"] if isinstance(content.get("model"), Mapping) else content)
        if any(key.startswith("backbone.encoders.") for key in tensors):
            return "BrainFM", *_brainfm(content, tensors)
    keys = ", ".join(str(key) for key in list(content)[:5]) if isinstance(content, Mapping) else ""
    raise ValueError(
        "a checkpoint of BrainFM ('model' with 'backbone.encoders...') or SuperSynth ('backbone_state_dict') is needed, "
        f"found {keys or type(content).__name__}"
    )


def _brainfm(content: Mapping[Any, Any], tensors: Tensors) -> tuple[MultiTaskNet, list[str]]:
    prefix = "head.final_conv_"
    heads: dict[str, Tensors] = {}
    for key in [key for key in tensors if key.startswith(prefix)]:
        name, _, kind = key.removeprefix(prefix).rpartition(".")
        heads.setdefault(name, {})[kind] = tensors[key]
    rest = [key for key in tensors if not key.startswith(("backbone.", prefix))]
    encoders_and_decoders = {k.removeprefix("backbone."): v for k, v in tensors.items() if k.startswith("backbone.")}
    state, ignored = _rename(encoders_and_decoders, BRAINFM_NAMES)
    in_channels, features = _widths(state, "encoders.0.0.1.weight", "encoders.{}.1.1.weight")
    unit_norm = next(_settings(content, "unit_feat"), True) is not False
    with torch.device("meta"):
        backbone = UNet(in_channels, features, unit_norm=unit_norm)
    return _assemble(backbone, state, heads, BRAINFM_HEADS, [*ignored, *rest])


def _supersynth(content: Mapping[Any, Any]) -> tuple[MultiTaskNet, list[str]]:
    suffix = "_state_dict"
    groups = {str(key): _tensors(value) for key, value in content.items() if isinstance(value, Mapping)}
    heads = {key.removesuffix(suffix): value for key, value in groups.items() if key.endswith(suffix)}
    state, ignored = _rename(heads.pop("backbone"), SUPERSYNTH_NAMES)
    in_channels, features = _widths(state, "encoders.0.projection.weight", "encoders.{}.projection.weight")
    with torch.device("meta"):
        backbone = ResidualUNet(in_channels, features)
    rest = list(_tensors(content))  # of the network that scores segmentations
    return _assemble(backbone, state, heads, SUPERSYNTH_HEADS, [*ignored, *rest])


def _assemble(
    backbone: nn.Module,
    state: Tensors,
    groups: Mapping[str, Tensors],
    table: Mapping[str, Sequence[str]],
    ignored: list[str],
) -> tuple[MultiTaskNet, list[str]]:
    """Network with the heads of those tasks of which weight and bias of every part are in the file."""
    heads: dict[str, Tensors] = {}
    used: set[str] = set()
    for task, names in table.items():
        if not all({"weight", "bias"} <= set(groups.get(name, {})) for name in names):
            continue
        used.update(names)
        kinds = ("weight", "bias")
        heads[task] = {
            kind: torch.cat([_float(f"{name}.{kind}", groups[name][kind]) for name in names]) for kind in kinds
        }
        channels, needed = len(heads[task]["bias"]), TASKS[task].channels
        if needed and channels != needed:
            raise ValueError(f"the head of {task} needs {needed} channels, found {channels}")
    if not heads:
        listed = ", ".join(name for names in table.values() for name in names)
        raise ValueError(f"at least one head out of {listed} is needed, found none")
    state = {f"backbone.{key}": _float(key, tensor) for key, tensor in state.items()}
    layout = TaskLayout(list(heads), _protocol(heads))
    with torch.device("meta"):
        network = MultiTaskNet(backbone, layout)
    for kind in ("weight", "bias"):
        state[f"head.{kind}"] = torch.cat([heads[task][kind] for task in layout.tasks])
    network.load_state_dict(state, assign=True)
    return network, [*ignored, *(f"head {name}" for name in groups if name not in used)]


def _tensors(content: Mapping[Any, Any]) -> Tensors:
    """Tensors of a state dict, without the prefix of DistributedDataParallel."""
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    return {re.sub(r"^(module\.)+", "", key): value for key, value in tensors.items()}


def _rename(tensors: Tensors, names: Sequence[tuple[str, str]]) -> tuple[Tensors, list[str]]:
    """Tensors under the backbone's names, and the names that are not the backbone's."""
    renamed, ignored = {}, []
    for key, value in tensors.items():
        matches = ((re.fullmatch(pattern, key), name) for pattern, name in names)
        match, name = next((found for found in matches if found[0]), (None, ""))
        if match is None:
            ignored.append(key)
        else:
            renamed[name.format(*match.groups(), unit=int(match[3]) - 1)] = value
    return renamed, ignored


def _widths(state: Tensors, first: str, pattern: str) -> tuple[int, tuple[int, ...]]:
    """Channels of the image, and of every level of the backbone."""
    kernels = [state[pattern.format(level)] for level in range(len(state)) if pattern.format(level) in state]
    if len(kernels) < 2:
        raise ValueError(f"at least two levels of the backbone are needed, found {len(kernels)}")
    if first not in state or any(kernel.ndim != 5 for kernel in (state[first], *kernels)):
        raise ValueError(f"kernels of 3 dimensions are needed in '{first}' and '{pattern}', found others")
    return state[first].shape[1], tuple(len(kernel) for kernel in kernels)


def _float(key: str, tensor: Tensor) -> Tensor:
    """A copy in float32: the tensor itself may be a part of the file."""
    if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
        raise ValueError(f"finite weights are needed, found others in '{key}' of {tensor.dtype}")
    return tensor.to(torch.float32, memory_format=torch.contiguous_format, copy=True)


def _protocol(heads: Mapping[str, Tensors]) -> Protocol:
    """The protocol of that many labels; numbers for names where it is not known."""
    channels = len(heads["segmentation"]["bias"]) if "segmentation" in heads else next(iter(PROTOCOLS))
    if channels in PROTOCOLS:
        return Protocol.load(PROTOCOLS[channels])
    structures = (
        Structure(i, i, f"label-{i}" if i else "Unknown", "none", i, (i, 255 - i, i)) for i in range(channels)
    )
    return Protocol(f"unnamed_{channels}", tuple(structures))


def _settings(content: Any, name: str, depth: int = 8) -> Iterator[Any]:
    """Values that the settings in a checkpoint have under a name, at any depth down to ``depth``."""
    children = vars(content) if isinstance(content, Placeholder) else content
    if not isinstance(children, Mapping) or depth == 0:
        return
    for key, value in children.items():
        if key == name:
            yield value
        yield from _settings(value, name, depth - 1)
