"""The published checkpoints BrainFM and SuperSynth: as networks of this package, and as files of a bundle."""

import json
import logging
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from brainfm_monai.anatomy import COLUMNS, Protocol, Structure
from brainfm_monai.io import hash_file, refuse_if, write_table, write_text, write_whole
from brainfm_monai.networks import MultiTaskNet, ResidualUNet, UNet
from brainfm_monai.tasks import TASKS, TaskLayout
from brainfm_monai.weights.checkpoint import read_checkpoint

logger = logging.getLogger(__name__)

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class _Format:
    """A published format; ``template_space``, ``input`` and ``licence`` as in :class:`WeightsInfo`."""

    heads: dict[str, tuple[str, ...]]  # the heads of the file that a task is made of, in the order of its channels
    words: dict[str, str]  # words of a tensor's name in the file, and what they are in the backbone
    image_kernel: str  # name of the kernel that sees the image
    level_kernel: str  # name of the kernel whose outputs are the channels of a level
    template_space: str
    input: str
    licence: str


FORMATS = {
    "BrainFM": _Format(
        {
            "segmentation": ("segmentation",), "T1w": ("T1",), "T2w": ("T2",), "FLAIR": ("FLAIR",), "CT": ("CT",),
            "log_bias_field": ("bias_field_log",), "distance": ("distance",), "mni": ("registration",),
            "super_resolution": ("high_res_residual",),
        },
        {"SingleConv1": "0", "SingleConv2": "1", "groupnorm": "0", "conv": "1"},
        "encoders.0.0.1.weight", "encoders.{}.1.1.weight",
        "RAS mm of the atlas gca.mgz of the BrainFM repository (FreeSurfer's GCA mean; not MNI152)",
        "minimum and maximum of the scan to 0 and 1",
        "of the authors (github.com/jhuldr/BrainFM): you fetched the file, and its terms hold for what is made of it",
    ),
    "SuperSynth": _Format(
        {
            "segmentation": ("seg",), "T1w": ("T1",), "T2w": ("T2",), "FLAIR": ("FLAIR",),
            "distance": ("LP", "LW", "RP", "RW"), "mni": ("reg",),
        },
        {
            "conv1": "projection", "conv2": "first", "conv3": "second", "SingleConv1": "0", "SingleConv2": "1",
            "conv": "0", "groupnorm": "1",
        },
        "encoders.0.projection.weight", "encoders.{}.projection.weight",
        "RAS mm of the symmetric MNI atlas of mri_super_synth", "divided by the maximum of the scan",
        "FreeSurfer software licence: you fetched the file, and its terms hold for what is made of it",
    ),
}  # fmt: skip
PROTOCOLS = {56: "brainfm"}  # label protocol by the number of channels of the segmentation
HEAD = "head.final_conv_"  # BrainFM's prefix of a head


@dataclass(frozen=True)
class WeightsInfo:
    """Where weights come from, and what their user has to know: the content of ``source.json``."""

    format: str  # BrainFM or SuperSynth
    source: str  # name of the file
    sha256: str  # of the file
    backbone: str  # class in this package
    features: tuple[int, ...]  # channels of every level, finest first
    unit_norm: bool  # whether the features have length 1 at every voxel
    tasks: tuple[str, ...]  # with a head in the file
    protocol: str  # label protocol of the segmentation
    template_space: str  # of the coordinates that ``mni`` gives
    input: str  # normalisation of the scans of the training
    licence: str
    epoch: int | None = None  # of the training, if the file contains it
    ignored: tuple[str, ...] = ()  # entries of the file that are not used here


def load_published(path: str | Path) -> tuple[MultiTaskNet, WeightsInfo]:
    """Load a published checkpoint; its format, width, levels, heads and labels are read from the file.

    It is a file of BrainFM or SuperSynth, of any floating precision; heads may be missing. The network is in float32 on
    the CPU, in evaluation mode. Its input is a scan of 1 mm in RAS+ order, normalised as ``info.input`` says; its
    output is that of the file's heads, without any activation (``super_resolution`` is a residual to the input).
    FileNotFoundError if there is no such file, ValueError if it is of neither format or does not fit together.
    """
    content = read_checkpoint(path)
    try:
        name, network, ignored = _recognise(content)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    if ignored:
        logger.warning("%s: left out, without use here: %s", path, ", ".join(ignored))
    layout, backbone, kind = network.layout, network.backbone, FORMATS[name]
    assert isinstance(backbone, UNet)
    epoch = content["epoch"] if isinstance(content.get("epoch"), int) else None
    info = WeightsInfo(
        name, Path(path).name, hash_file(path), type(backbone).__name__, backbone.features, backbone.unit_norm,
        tuple(layout.tasks), layout.protocol.name, kind.template_space, kind.input, kind.licence, epoch, tuple(ignored),
    )  # fmt: skip
    return network.eval().requires_grad_(False), info


def _recognise(content: Any) -> tuple[str, MultiTaskNet, list[str]]:
    """Format of a checkpoint by its content, the network that its weights fit, and names of unused entries."""
    groups: dict[str, Tensors] = defaultdict(dict)  # tensors of the backbone and of every head
    if isinstance(content, Mapping):
        if isinstance(content.get("backbone_state_dict"), Mapping):
            for key, value in content.items():
                if isinstance(value, Mapping) and str(key).endswith("_state_dict"):
                    groups[str(key).removesuffix("_state_dict")] = _tensors(value)
            rest = list(_tensors(content))  # of the network that scores segmentations
            return "SuperSynth", *_assemble("SuperSynth", groups, rest, False)
        tensors, rest = _tensors(content["model"] if isinstance(content.get("model"), Mapping) else content), []
        if any(key.startswith("backbone.encoders.") for key in tensors):
            for key, tensor in tensors.items():
                name, _, kind = key.removeprefix(HEAD).rpartition(".")
                if key.startswith("backbone."):
                    groups["backbone"][key.removeprefix("backbone.")] = tensor
                elif key.startswith(HEAD):
                    groups[name][kind] = tensor
                else:
                    rest.append(key)
            unit_norm = next(_settings(content, "unit_feat"), True) is not False
            return "BrainFM", *_assemble("BrainFM", groups, rest, unit_norm)
    keys = ", ".join(str(key) for key in list(content)[:5]) if isinstance(content, Mapping) else ""
    formats = "BrainFM ('model' with 'backbone.encoders...') or SuperSynth ('backbone_state_dict')"
    raise ValueError(f"a checkpoint of {formats} is needed, found {keys or type(content).__name__}")


def _assemble(
    name: str, groups: dict[str, Tensors], rest: list[str], unit_norm: bool
) -> tuple[MultiTaskNet, list[str]]:
    """Network with the heads of the tasks of which weight and bias of every part are in the file, and unused names."""
    kind, kinds = FORMATS[name], ("weight", "bias")
    state: Tensors = {}
    ignored: list[str] = []
    for key, tensor in groups.pop("backbone").items():
        if "basic_module" in key:
            state[".".join(kind.words.get(word, word) for word in key.split(".") if word != "basic_module")] = tensor
        else:
            ignored.append(key)
    in_channels, features = _widths(state, kind)
    heads: dict[str, Tensors] = {}
    for task, parts in kind.heads.items():
        if not all({*kinds} <= set(groups.get(part, {})) for part in parts):
            continue
        heads[task] = {k: torch.cat([_float(f"{part}.{k}", groups[part][k]) for part in parts]) for k in kinds}
        channels, needed = len(heads[task]["bias"]), TASKS[task].channels
        refuse_if(needed and channels != needed, f"the head of {task} needs {needed} channels", channels)
    listed = ", ".join(part for parts in kind.heads.values() for part in parts)
    refuse_if(not heads, f"at least one head out of {listed} is needed", "none")
    with torch.device("meta"):
        backbone = UNet(in_channels, features, unit_norm) if name == "BrainFM" else ResidualUNet(in_channels, features)
        network = MultiTaskNet(backbone, TaskLayout(list(heads), _protocol(heads)))
    state = {f"backbone.{key}": _float(key, tensor) for key, tensor in state.items()}
    state |= {f"head.{k}": torch.cat([heads[task][k] for task in network.layout.tasks]) for k in kinds}
    network.load_state_dict(state, assign=True)
    used = {part for task in heads for part in kind.heads[task]}
    return network, [*ignored, *rest, *(f"head {part}" for part in groups if part not in used)]


def _tensors(content: Mapping[Any, Any]) -> Tensors:
    """Tensors of a state dict, without the prefix of DistributedDataParallel."""
    tensors = {str(key): value.detach() for key, value in content.items() if isinstance(value, Tensor)}
    return {re.sub(r"^(module\.)+", "", key): value for key, value in tensors.items()}


def _widths(state: Tensors, kind: _Format) -> tuple[int, tuple[int, ...]]:
    """Channels of the image, and of every level of the backbone."""
    first, names = kind.image_kernel, [kind.level_kernel.format(level) for level in range(len(state))]
    kernels = [state[name] for name in names if name in state]
    refuse_if(len(kernels) < 2, "at least two levels of the backbone are needed", len(kernels))
    is_wrong = first not in state or any(kernel.ndim != 5 for kernel in (state[first], *kernels))
    refuse_if(is_wrong, f"kernels of 3 dimensions are needed in '{first}' and '{kind.level_kernel}'", "others")
    return state[first].shape[1], tuple(len(kernel) for kernel in kernels)


def _float(key: str, tensor: Tensor) -> Tensor:
    """A copy in float32: the tensor itself may be a part of the file."""
    is_finite = tensor.is_floating_point() and torch.isfinite(tensor).all()
    refuse_if(not is_finite, "finite weights are needed", f"others in '{key}' of {tensor.dtype}")
    return tensor.to(torch.float32, memory_format=torch.contiguous_format, copy=True)


def _protocol(heads: Mapping[str, Tensors]) -> Protocol:
    """The protocol of that many labels; numbers for names where it is not known."""
    count = len(heads["segmentation"]["bias"]) if "segmentation" in heads else next(iter(PROTOCOLS))
    if count in PROTOCOLS:
        return Protocol.load(PROTOCOLS[count])
    names = ["Unknown", *(f"label-{i}" for i in range(1, count))]
    structures = (Structure(i, i, name, "none", i, (i, 255 - i, i)) for i, name in enumerate(names))
    return Protocol(f"unnamed_{count}", tuple(structures))


def _settings(content: Any, name: str, depth: int = 8) -> Iterator[Any]:
    """Values that the settings in a checkpoint have under a name, at any depth down to ``depth``."""
    if not isinstance(content, Mapping) or depth == 0:
        return
    for key, value in {**content, **getattr(content, "__dict__", {})}.items():
        if key == name:
            yield value
        yield from _settings(value, name, depth - 1)


def import_weights(file: str | Path, output: str | Path) -> str:
    """Turn the published weights of BrainFM or SuperSynth into files that the bundle uses; return what was found.

    The file is yours to fetch, and its licence to accept: brainfm_pretrained.pth of github.com/jhuldr/BrainFM, or
    SuperSynth_August_2025.pth of FreeSurfer's mri_super_synth. Nothing in the file is run. The folder can be moved. Use
    it by

        brainfm-monai predict SCAN OUT --args_file OUTPUT/overrides.json

    Args:
        file: the published checkpoint.
        output: folder for model.pt (a plain state dict), overrides.json (for inference.json), source.json (format,
            SHA-256, template space, licence), and protocol.tsv if the labels have no protocol of the package.
    """
    network, info = load_published(file)
    folder, protocol = Path(output).absolute(), network.layout.protocol
    with write_whole(folder / "model.pt") as partial:
        torch.save(network.state_dict(), partial)
    shipped = protocol.name in Protocol.names()
    if not shipped:
        cells = ((s.label, s.freesurfer_id, s.name, s.side, s.mirror, *s.colour) for s in protocol.structures)
        write_table(folder / "protocol.tsv", COLUMNS, [(*row, "") for row in cells])
    backbone: dict[str, Any] = {"_target_": f"brainfm_monai.networks.{info.backbone}"}
    backbone |= {"in_channels": network.backbone.in_channels, "features": list(info.features)}
    backbone |= {"unit_norm": True} if info.unit_norm else {}
    overrides = {
        "weights_dir": str(folder),
        "weights": "$@weights_dir + '/model.pt'",
        "layout#tasks": list(info.tasks),
        "layout#protocol": protocol.name if shipped else "$@weights_dir + '/protocol.tsv'",
        "network_def#backbone": backbone,
        "network_def#stride": 1,
        "second_look": False,  # these coordinates were learnt on whole heads
    }
    for name, content in (("source", asdict(info)), ("overrides", overrides)):
        write_text(folder / f"{name}.json", json.dumps(content, indent=4) + "\n")
    use = f"use it with --args_file {output}/overrides.json"
    return f"{info.format}: {', '.join(info.tasks)}; licence {info.licence}; {use}"
