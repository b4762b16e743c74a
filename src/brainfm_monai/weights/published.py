"""The published checkpoints BrainFM and SuperSynth: as networks of this package, and as files of a bundle."""

import json
import logging
import re
from collections.abc import Iterator, Mapping
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

# by format: tasks, segmentation first, and the heads of the file that each is made of, in the order of its channels
HEADS: dict[str, dict[str, tuple[str, ...]]] = {
    "BrainFM": {
        "segmentation": ("segmentation",), "T1w": ("T1",), "T2w": ("T2",), "FLAIR": ("FLAIR",), "CT": ("CT",),
        "log_bias_field": ("bias_field_log",), "distance": ("distance",), "mni": ("registration",),
        "super_resolution": ("high_res_residual",),
    },
    "SuperSynth": {
        "segmentation": ("seg",), "T1w": ("T1",), "T2w": ("T2",), "FLAIR": ("FLAIR",),
        "distance": ("LP", "LW", "RP", "RW"), "mni": ("reg",),
    },
}  # fmt: skip
# by format: words of a tensor's name in the file, and what they are in the backbone
WORDS = {
    "BrainFM": {"SingleConv1": "0", "SingleConv2": "1", "groupnorm": "0", "conv": "1"},
    "SuperSynth": {"SingleConv1": "0", "SingleConv2": "1", "groupnorm": "1", "conv": "0"}
    | {"conv1": "projection", "conv2": "first", "conv3": "second"},
}
TERMS = "you fetched the file, and its terms hold for what is made of it"
# by format: the space of the coordinates, how scans were normalised in the training, and the licence
ORIGIN = {
    "BrainFM": {
        "template_space": "RAS mm of the atlas gca.mgz of the BrainFM repository (FreeSurfer's GCA mean; not MNI152)",
        "input": "minimum and maximum of the scan to 0 and 1",
        "licence": f"of the authors (github.com/jhuldr/BrainFM): {TERMS}",
    },
    "SuperSynth": {
        "template_space": "RAS mm of the symmetric MNI atlas of mri_super_synth",
        "input": "divided by the maximum of the scan",
        "licence": f"FreeSurfer software licence: {TERMS}",
    },
}
KNOWN_LABELS = 56  # channels of a segmentation by the protocol brainfm
HEAD = "head.final_conv_"  # BrainFM's prefix of a head


def load_published(path: str | Path) -> tuple[MultiTaskNet, dict[str, Any]]:
    """Load a published checkpoint; its format, width, levels, heads and labels are read from the file.

    It is a file of BrainFM or SuperSynth, of any floating precision; heads may be missing. The network is in float32 on
    the CPU, in evaluation mode. Its input is a scan of 1 mm in RAS+ order, normalised as ``info["input"]`` says; its
    output is that of the file's heads, without any activation (``super_resolution`` is a residual to the input).
    FileNotFoundError if there is no such file, ValueError if it is of neither format or does not fit together. Returns
    the network, and the content of ``source.json``: where the weights come from, and what their user has to know.
    """
    content = read_checkpoint(path)
    try:
        name, tensors = _recognise(content)
        unit_norm = name == "BrainFM" and next(_settings(content, "unit_feat"), True) is not False
        network, ignored = _assemble(name, tensors, unit_norm)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    if ignored:
        logger.warning("%s: left out, without use here: %s", path, ", ".join(ignored))
    layout, backbone = network.layout, network.backbone
    assert isinstance(backbone, UNet)
    info = {
        "format": name,
        "source": Path(path).name,
        "sha256": hash_file(path),
        "backbone": type(backbone).__name__,
        "features": backbone.features,
        "unit_norm": unit_norm,
        "tasks": tuple(layout.tasks),
        "protocol": layout.protocol.name,
        **ORIGIN[name],
        "epoch": content["epoch"] if isinstance(content.get("epoch"), int) else None,
        "ignored": tuple(ignored),
    }
    return network.eval().requires_grad_(False), info


def _recognise(content: Any) -> tuple[str, Tensors]:
    """Format of a checkpoint by its content, and its tensors by names of BrainFM: ``backbone...`` and heads."""
    if isinstance(content, Mapping):
        if isinstance(content.get("backbone_state_dict"), Mapping):
            tensors = _tensors(content)  # of the network that scores segmentations
            for name, part in content.items():
                if isinstance(part, Mapping) and str(name).endswith("_state_dict"):
                    group = str(name).removesuffix("_state_dict")
                    prefix = group if group == "backbone" else f"{HEAD}{group}"
                    tensors |= {f"{prefix}.{key}": tensor for key, tensor in _tensors(part).items()}
            return "SuperSynth", tensors
        tensors = _tensors(content["model"] if isinstance(content.get("model"), Mapping) else content)
        if any(key.startswith("backbone.encoders.") for key in tensors):
            return "BrainFM", tensors
    keys = ", ".join(str(key) for key in list(content)[:5]) if isinstance(content, Mapping) else ""
    formats = "BrainFM ('model' with 'backbone.encoders...') or SuperSynth ('backbone_state_dict')"
    raise ValueError(f"a checkpoint of {formats} is needed, found {keys or type(content).__name__}")


def _assemble(name: str, tensors: Tensors, unit_norm: bool) -> tuple[MultiTaskNet, list[str]]:
    """Network with the heads of the tasks of which weight and bias of every part are in the file, and unused names."""
    in_channels, features = _widths(tensors)
    heads: dict[str, Tensors] = {}
    for task, parts in HEADS[name].items():
        keys = {kind: [f"{HEAD}{part}.{kind}" for part in parts] for kind in ("weight", "bias")}
        if {*keys["weight"], *keys["bias"]} <= tensors.keys():
            heads[task] = {kind: torch.cat([_float(key, tensors.pop(key)) for key in keys[kind]]) for kind in keys}
            channels, needed = len(heads[task]["bias"]), TASKS[task].channels
            refuse_if(needed and channels != needed, f"the head of {task} needs {needed} channels", channels)
    listed = ", ".join(part for parts in HEADS[name].values() for part in parts)
    refuse_if(not heads, f"at least one head out of {listed} is needed", "none")
    with torch.device("meta"):
        backbone = UNet(in_channels, features, unit_norm) if name == "BrainFM" else ResidualUNet(in_channels, features)
        network = MultiTaskNet(backbone, TaskLayout(list(heads), _protocol(heads)))
    state = {f"head.{kind}": torch.cat([head[kind] for head in heads.values()]) for kind in ("weight", "bias")}
    words, ignored = WORDS[name] | {"basic_module": ""}, []
    for key, tensor in sorted(tensors.items(), key=lambda item: item[0].startswith(HEAD)):
        if key.startswith("backbone.") and "basic_module" in key:
            state[".".join(filter(None, (words.get(word, word) for word in key.split("."))))] = _float(key, tensor)
        else:
            part = key.removeprefix(HEAD).rpartition(".")[0]
            ignored.append(f"head {part}" if key.startswith(HEAD) else key.removeprefix("backbone."))
    network.load_state_dict(state, assign=True)
    return network, list(dict.fromkeys(ignored))


def _tensors(content: Mapping[Any, Any]) -> Tensors:
    """Tensors of a state dict, without the prefix of DistributedDataParallel."""
    named = ((str(key), value.detach()) for key, value in content.items() if isinstance(value, Tensor))
    return {re.sub(r"^(module\.)+", "", key): value for key, value in named}


def _widths(tensors: Tensors) -> tuple[int, tuple[int, ...]]:
    """Channels of the image, and of every level of the backbone."""
    levels: dict[str, list[Tensor]] = {}
    for key in sorted(tensors):
        if key.startswith("backbone.encoders.") and tensors[key].ndim == 5:
            levels.setdefault(key.split(".")[2], []).append(tensors[key])
    refuse_if(len(levels) < 2, "at least two levels of the backbone are needed", len(levels))
    refuse_if("0" not in levels, "kernels of 3 dimensions are needed in backbone.encoders.0", "none")
    return levels["0"][0].shape[1], tuple(len(kernels[-1]) for kernels in levels.values())


def _float(key: str, tensor: Tensor) -> Tensor:
    """A copy in float32: the tensor itself may be a part of the file."""
    is_finite = tensor.is_floating_point() and torch.isfinite(tensor).all()
    refuse_if(not is_finite, "finite weights are needed", f"others in '{key.removeprefix(HEAD)}' of {tensor.dtype}")
    return tensor.to(torch.float32, memory_format=torch.contiguous_format, copy=True)


def _protocol(heads: Mapping[str, Tensors]) -> Protocol:
    """The protocol of that many labels; numbers for names where it is not known."""
    count = len(heads["segmentation"]["bias"]) if "segmentation" in heads else KNOWN_LABELS
    if count == KNOWN_LABELS:
        return Protocol.load("brainfm")
    names = ["Unknown", *(f"label-{i}" for i in range(1, count))]
    structures = (Structure(i, i, name, "none", i, (i, 255 - i, i)) for i, name in enumerate(names))
    return Protocol(f"unnamed_{count}", tuple(structures))


def _settings(content: Any, name: str, depth: int = 8) -> Iterator[Any]:
    """Values that the settings in a checkpoint have under a name, at any depth down to ``depth``."""
    if isinstance(content, Mapping) and depth > 0:
        for key, value in {**content, **getattr(content, "__dict__", {})}.items():
            if key == name:
                yield value
            yield from _settings(value, name, depth - 1)


def import_weights(file: str | Path, output: str | Path) -> str:
    """Turn the published weights of BrainFM or SuperSynth into files that the bundle uses; return what was found.

    The file is yours to fetch, and its licence to accept: brainfm_pretrained.pth of github.com/jhuldr/BrainFM, or
    SuperSynth_August_2025.pth of FreeSurfer's mri_super_synth. Nothing in the file is run. The folder can be moved.

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
    backbone: dict[str, Any] = {"_target_": f"brainfm_monai.networks.{info['backbone']}"}
    backbone |= {"in_channels": network.backbone.in_channels, "features": info["features"]}
    backbone |= {"unit_norm": True} if info["unit_norm"] else {}
    overrides = {
        "weights_dir": str(folder),
        "weights": "$@weights_dir + '/model.pt'",
        "layout#tasks": info["tasks"],
        "layout#protocol": protocol.name if shipped else "$@weights_dir + '/protocol.tsv'",
        "network_def#backbone": backbone,
        "network_def#stride": 1,
        "second_look": False,  # these coordinates were learnt on whole heads
    }
    for name, content in (("source", info), ("overrides", overrides)):
        write_text(folder / f"{name}.json", json.dumps(content, indent=4) + "\n")
    found = f"{info['format']}: {', '.join(info['tasks'])}; licence {info['licence']}"
    return f"{found}; use it with --args_file {output}/overrides.json"
