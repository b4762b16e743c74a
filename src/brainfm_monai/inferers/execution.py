"""How inference is run: the memory mode by the size of a scan and the free memory, and batches under autocast."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from monai.inferers import SimpleInferer
from torch import Tensor, nn

from brainfm_monai.networks import MultiTaskNet, UNet, autocast, parse_precision

MEMORY_MODES = ("auto", "full", "low", "windows")
CGROUP = Path("/sys/fs/cgroup")
OUTPUTS = 2.0  # copies of the output that mode "full" and what follows the inferer hold: logits, and one of their kind
FEATURES = 8.0  # copies of the features; 7 by the peak of the published network in docs/performance.md

logger = logging.getLogger(__name__)


class AutocastInferer(SimpleInferer):
    """Run the whole batch under autocast; precision and errors: :func:`~brainfm_monai.networks.parse_precision`."""

    def __init__(self, precision: str | None = None) -> None:
        super().__init__()
        parse_precision(precision, torch.device("cpu"))
        self.precision = precision

    def __call__(self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Map images of shape (B, 1, H, W, D) to the network's output."""
        with autocast(inputs.device, parse_precision(self.precision, inputs.device)):
            return network(inputs, *args, **kwargs)


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken: of the GPU, or of the computer within the limit of the container."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil  # here: a training, which imports this room, does not need the library

    free = int(psutil.virtual_memory().available)
    try:
        limit, used, parts = ((CGROUP / f"memory.{name}").read_text() for name in ("max", "current", "stat"))
    except OSError:  # no container
        return free
    # Files that were read count as used, but the kernel drops the inactive ones when memory is short.
    dropped = dict(line.split() for line in parts.splitlines()).get("inactive_file", 0)
    return free if limit.strip() == "max" else min(free, int(limit) - int(used) + int(dropped))


def choose_memory(image: Tensor, network: object) -> str:
    """Memory mode for an image (1, 1, H, W, D) on its device: ``full`` if the free memory suffices, else another.

    Mode ``full`` is taken to need 4 bytes * voxels * (2 * channels of the output + 8 * features / stride^3); of a
    network that is no :class:`MultiTaskNet`, the widest convolution counts as its features. Mode ``low`` serves
    networks with a stride and the U-Nets of published checkpoints, ``windows`` all other networks.
    """
    if isinstance(network, MultiTaskNet):
        channels, features = network.layout.channels, network.head.in_channels / network.stride**3
        frugal = network.stride > 1 or isinstance(network.backbone, UNet)
    else:
        modules = network.modules() if isinstance(network, nn.Module) else ()
        features = max((float(m.out_channels) for m in modules if isinstance(m, nn.Conv3d)), default=0.0)
        channels, frugal = 0, False
    needed, free = int(4 * image.numel() * (OUTPUTS * channels + FEATURES * features)), free_memory(image.device)
    if needed <= free:
        return "full"
    mode = "low" if frugal else "windows"
    logger.info("%.1f GB of memory are free, mode 'full' needs %.1f GB: mode '%s'", free / 1e9, needed / 1e9, mode)
    return mode
