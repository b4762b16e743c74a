"""Which published format a checkpoint has, and its tensors under the names of this package."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from brainfm_monai.anatomy import Protocol, Structure
from brainfm_monai.networks import ResidualUNet, UNet
from brainfm_monai.tasks import TASKS
from brainfm_monai.weights.checkpoint import LazyTensor, Placeholder

__all__ = ["Recognised", "recognise"]

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
Heads = dict[str, dict[str, Tensor]]


@dataclass(frozen=True)
class Recognised:
    """A published checkpoint under the names of this package.

    Attributes:
        format: ``BrainFM`` or ``SuperSynth``.
        backbone: state dict of the backbone.
        make_backbone: makes the backbone that the state dict fits.
        features: channels of every level, finest first.
        unit_norm: whether the features have length 1 at every voxel.
        heads: weight and bias of the head of each task.
        protocol: label protocol of the segmentation.
        epoch: epoch of the training, if the file tells.
        ignored: entries that have no place here.
    """

    format: str
    backbone: dict[str, Tensor]
    make_backbone: Callable[[], nn.Module]
    features: tuple[int, ...]
    unit_norm: bool
    heads: Heads
    protocol: Protocol
    epoch: int | None
    ignored: tuple[str, ...]


def recognise(content: Any) -> Recognised:
    """Tell the format of a checkpoint by what is in it.

    Args:
        content: what :func:`~brainfm_monai.weights.checkpoint.open_checkpoint` gives.

    Raises:
        ValueError: if it is of neither format, or its tensors do not belong together.
    """
    if isinstance(content, Mapping):
        if isinstance(content.get("backbone_state_dict"), Mapping):
            return _supersynth(content)
        model = content["model"] if isinstance(content.get("model"), Mapping) else content
        if any(isinstance(key, str) and _plain(key).startswith("backbone.encoders.") for key in model):
            return _brainfm(content, model)
    found = (
        ", ".join(str(key) for key in list(content)[:5])
        if isinstance(content, Mapping) and content
        else type(content).__name__
    )
    raise ValueError(
        "a checkpoint of BrainFM ('model' with 'backbone.encoders...') or SuperSynth ('backbone_state_dict') is needed, "
        f"found {found}"
    )


def _brainfm(content: Mapping[Any, Any], model: Mapping[Any, Any]) -> Recognised:
    tensors = {_plain(str(key)): value for key, value in model.items() if isinstance(value, LazyTensor)}
    backbone, ignored = _rename(
        {k.removeprefix("backbone."): v for k, v in tensors.items() if k.startswith("backbone.")}, BRAINFM_NAMES
    )
    features = _features(backbone, "encoders.{}.1.1.weight")
    in_channels = _shape(backbone, "encoders.0.0.1.weight")[1]
    head = "head.final_conv_"
    groups: dict[str, dict[str, LazyTensor]] = {}
    for key, value in tensors.items():
        if key.startswith(head):
            name, _, kind = key.removeprefix(head).rpartition(".")
            groups.setdefault(name, {})[kind] = value
        elif not key.startswith("backbone."):
            ignored.append(key)
    heads, left = _heads(groups, BRAINFM_HEADS)
    unit_norm = next(_settings(content, "unit_feat"), True) is not False
    return Recognised(
        "BrainFM",
        _load(backbone),
        lambda: UNet(in_channels, features, unit_norm=unit_norm),
        features,
        unit_norm,
        heads,
        _protocol(heads),
        _epoch(content),
        tuple(ignored + left),
    )


def _supersynth(content: Mapping[Any, Any]) -> Recognised:
    groups: dict[str, dict[str, LazyTensor]] = {}
    for key, value in content.items():
        if str(key).endswith("_state_dict") and isinstance(value, Mapping):
            tensors = {_plain(str(k)): v for k, v in value.items() if isinstance(v, LazyTensor)}
            groups[str(key).removesuffix("_state_dict")] = tensors
    backbone, ignored = _rename(groups.pop("backbone"), SUPERSYNTH_NAMES)
    features = _features(backbone, "encoders.{}.projection.weight")
    in_channels = _shape(backbone, "encoders.0.projection.weight")[1]
    heads, left = _heads(groups, SUPERSYNTH_HEADS)
    bare = {_plain(str(key)): value for key, value in content.items() if isinstance(value, LazyTensor)}
    return Recognised(
        "SuperSynth",
        _load(backbone),
        lambda: ResidualUNet(in_channels, features),
        features,
        False,
        heads,
        _protocol(heads),
        _epoch(content),
        (*ignored, *left, *bare),
    )


def _plain(key: str) -> str:
    while key.startswith("module."):  # of DistributedDataParallel
        key = key.removeprefix("module.")
    return key


def _rename(
    tensors: Mapping[str, LazyTensor], names: tuple[tuple[str, str], ...]
) -> tuple[dict[str, LazyTensor], list[str]]:
    """Tensors under the backbone's names, and the names that have no place in it."""
    renamed, ignored = {}, []
    for key, value in tensors.items():
        for pattern, name in names:
            if match := re.fullmatch(pattern, key):
                renamed[name.format(*match.groups(), unit=int(match[3]) - 1)] = value
                break
        else:
            ignored.append(key)
    return renamed, ignored


def _shape(tensors: Mapping[str, LazyTensor], key: str) -> tuple[int, ...]:
    if key not in tensors or len(tensors[key].shape) != 5:
        raise ValueError(f"a kernel of 3 dimensions is needed for '{key}' of the backbone, found none")
    return tensors[key].shape


def _features(tensors: Mapping[str, LazyTensor], pattern: str) -> tuple[int, ...]:
    features: list[int] = []
    while pattern.format(len(features)) in tensors:
        features.append(_shape(tensors, pattern.format(len(features)))[0])
    if len(features) < 2:
        raise ValueError(f"at least two levels of the backbone are needed, found {len(features)}")
    return tuple(features)


def _load(tensors: Mapping[str, LazyTensor]) -> dict[str, Tensor]:
    return {key: _float(key, tensor) for key, tensor in tensors.items()}


def _float(key: str, lazy: LazyTensor) -> Tensor:
    tensor = lazy.load()
    if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
        raise ValueError(f"finite weights are needed, found others in '{key}' of {tensor.dtype}")
    return tensor.to(torch.float32).contiguous()


def _heads(
    groups: Mapping[str, Mapping[str, LazyTensor]], table: Mapping[str, tuple[str, ...]]
) -> tuple[Heads, list[str]]:
    """Weight and bias of the head of each task, and the heads that make none."""
    heads: Heads = {}
    used: set[str] = set()
    for task, names in table.items():
        if not all({"weight", "bias"} <= set(groups.get(name, {})) for name in names):
            continue
        used.update(names)
        heads[task] = {
            kind: torch.cat([_float(f"{name}.{kind}", groups[name][kind]) for name in names])
            for kind in ("weight", "bias")
        }
        channels, wanted = len(heads[task]["bias"]), TASKS[task].channels
        if wanted and channels != wanted:
            raise ValueError(f"the head of {task} needs {wanted} channels, found {channels}")
    if not heads:
        raise ValueError(
            f"at least one head out of {', '.join(n for names in table.values() for n in names)} is needed, found none"
        )
    return heads, [f"head {name}" for name in groups if name not in used]


def _protocol(heads: Heads) -> Protocol:
    """The protocol of that many labels; numbers for names where it is not known."""
    channels = len(heads["segmentation"]["bias"]) if "segmentation" in heads else next(iter(PROTOCOLS))
    if channels in PROTOCOLS:
        return Protocol.load(PROTOCOLS[channels])
    structures = (
        Structure(i, i, f"label-{i}" if i else "Unknown", "none", i, (i, 255 - i, i)) for i in range(channels)
    )
    return Protocol(f"unnamed_{channels}", tuple(structures))


def _epoch(content: Mapping[Any, Any]) -> int | None:
    epoch = content.get("epoch")
    return epoch if isinstance(epoch, int) else None


def _settings(content: Any, name: str, depth: int = 8) -> Iterator[Any]:
    """Values that the settings in a checkpoint have under a name, at any depth down to ``depth``."""
    children = vars(content) if isinstance(content, Placeholder) else content
    if not isinstance(children, Mapping) or depth == 0:
        return
    for key, value in children.items():
        if key == name:
            yield value
        yield from _settings(value, name, depth - 1)
