"""The two published checkpoints of this family, BrainFM and SuperSynth, as networks of this package."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

from brainfm_monai.networks import MultiTaskNet
from brainfm_monai.tasks import TaskLayout
from brainfm_monai.weights.checkpoint import read_checkpoint
from brainfm_monai.weights.recognise import recognise

__all__ = ["Published", "WeightsInfo", "load_published"]

logger = logging.getLogger(__name__)

LICENCES = {
    "BrainFM": "of the authors (github.com/jhuldr/BrainFM): you fetched the file, and its terms hold for what is made of it",
    "SuperSynth": "FreeSurfer software licence: you fetched the file, and its terms hold for what is made of it",
}
TEMPLATES = {
    "BrainFM": "RAS mm of the atlas gca.mgz of the BrainFM repository (FreeSurfer's GCA mean; not MNI152)",
    "SuperSynth": "RAS mm of the symmetric MNI atlas of mri_super_synth",
}
NORMALISATIONS = {
    "BrainFM": "minimum and maximum of the scan to 0 and 1",
    "SuperSynth": "divided by the maximum of the scan",
}


@dataclass(frozen=True)
class WeightsInfo:
    """Where weights come from, and what their user has to know.

    Attributes:
        format: ``BrainFM`` or ``SuperSynth``.
        source: name of the file.
        sha256: SHA-256 of the file.
        backbone: class of the backbone in this package.
        features: channels of every level, finest first.
        unit_norm: whether the features have length 1 at every voxel.
        tasks: tasks with a head in the file.
        protocol: label protocol of the segmentation.
        template_space: space of the coordinates that ``mni`` gives.
        input: normalisation of the scans of the training.
        licence: licence of the weights.
        epoch: epoch of the training, if the file contains it.
        ignored: entries of the file that are not used here.
    """

    format: str
    source: str
    sha256: str
    backbone: str
    features: tuple[int, ...]
    unit_norm: bool
    tasks: tuple[str, ...]
    protocol: str
    template_space: str
    input: str
    licence: str
    epoch: int | None = None
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True)
class Published:
    """Published weights, ready to run.

    Attributes:
        network: network in evaluation mode.
        layout: names of the channels of its output.
        info: where the weights come from.
    """

    network: MultiTaskNet
    layout: TaskLayout
    info: WeightsInfo


def load_published(path: str | Path) -> Published:
    """Load a published checkpoint; its format, width, levels, heads and labels are read from the file.

    Args:
        path: file of BrainFM (``brainfm_pretrained.pth``) or SuperSynth (``SuperSynth_August_2025.pth``). Tensors may have
            any floating precision, keys the prefix ``module.``, and heads may be missing.

    Returns:
        Network in float32 on the CPU. The input is a scan of 1 mm in RAS+ order, normalised as ``info.input`` says; the output
        is that of the file's heads, without any activation (``super_resolution`` is a residual to the input).

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is truncated, asks to call something, is of neither format, or its tensors do not fit together.
    """
    content = read_checkpoint(path)
    try:
        name, network, ignored = recognise(content)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    if ignored:
        logger.warning("%s: left out, without use here: %s", path, ", ".join(ignored))
    backbone, layout = network.backbone, network.layout
    with Path(path).open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    info = WeightsInfo(
        format=name,
        source=Path(path).name,
        sha256=sha256,
        backbone=type(backbone).__name__,
        features=backbone.features,  # type: ignore[arg-type]
        unit_norm=bool(getattr(backbone, "unit_norm", False)),
        tasks=tuple(layout.tasks),
        protocol=layout.protocol.name,
        template_space=TEMPLATES[name],
        input=NORMALISATIONS[name],
        licence=LICENCES[name],
        epoch=content["epoch"] if isinstance(content.get("epoch"), int) else None,
        ignored=tuple(ignored),
    )
    return Published(network.eval().requires_grad_(False), layout, info)
