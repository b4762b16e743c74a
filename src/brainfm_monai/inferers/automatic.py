"""How to run a network in the memory that there is, by name or by itself."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import torch
from monai.inferers import Inferer
from torch import Tensor, nn

from brainfm_monai.inferers.memory import free_memory, peak_memory
from brainfm_monai.inferers.precision import choose_precision
from brainfm_monai.inferers.slabs import SlabInferer
from brainfm_monai.inferers.volume import MirrorInferer, WholeVolumeInferer, WindowInferer
from brainfm_monai.networks import MultiTaskNet, has_slabs
from brainfm_monai.tasks import TaskLayout

__all__ = ["MEMORY_MODES", "ScanInferer"]

logger = logging.getLogger(__name__)

ROI_SIZE = 160  # voxels: the size of BrainFM's training
# What convolutions take for themselves, over the tensors that are counted: measured by benchmarks/inference.py, and rounded up.
RESERVE = 1.5


def _whole(layout: TaskLayout, mirror: bool, bfloat16: bool | None) -> Inferer:
    inferer = WholeVolumeInferer(bfloat16)
    return MirrorInferer(inferer, layout) if mirror else inferer


def _slabs(layout: TaskLayout, mirror: bool, bfloat16: bool | None) -> Inferer:
    return SlabInferer(layout, mirror, labels=False, bfloat16=bfloat16)


def _low(layout: TaskLayout, mirror: bool, bfloat16: bool | None) -> Inferer:
    return SlabInferer(layout, mirror, labels=True, bfloat16=bfloat16)


def _windows(layout: TaskLayout, mirror: bool, bfloat16: bool | None) -> Inferer:
    inferer = WindowInferer(WholeVolumeInferer(bfloat16), ROI_SIZE)
    return MirrorInferer(inferer, layout) if mirror else inferer


MEMORY_MODES: dict[str, Callable[[TaskLayout, bool, bool | None], Inferer]] = {
    "whole": _whole,  # the network as it is: any network, most memory
    "slabs": _slabs,  # the same output slab by slab: this package's U-Nets
    "low": _low,  # slab by slab, and labels in place of their logits
    "windows": _windows,  # overlapping windows: any network; near to the others, not the same
}


def preferred_modes(network: Callable[..., Tensor]) -> tuple[str, ...]:
    """Modes that suit a network, fastest first: the first that fits is taken, the last one in any case."""
    if isinstance(network, MultiTaskNet) and network.stride > 1:
        # Slabs save the head's work on the voxels in between, whatever the backbone, which sees few voxels.
        return "slabs", "low"
    if isinstance(network, MultiTaskNet) and has_slabs(network.backbone):
        return "whole", "slabs", "low"  # without a stride, slabs are slower by a quarter
    return "whole", "windows"


class ScanInferer(Inferer):
    """Run a network in one of :data:`MEMORY_MODES`, by name or as the free memory allows.

    Args:
        layout: names of the network's output channels.
        memory: name of a mode; ``"auto"``: the fastest that fits into the free memory, of ``whole``, ``slabs`` and ``low`` for
            the U-Nets of the published checkpoints, of ``slabs`` and ``low`` for networks with a stride, and of ``whole`` and
            ``windows`` for others.
        mirror: average with the left-right mirror image.
        bfloat16: compute in bfloat16; ``None``: in what :func:`~brainfm_monai.inferers.reduced_precision` says.

    Raises:
        ValueError: if there is no such mode.
    """

    def __init__(
        self, layout: TaskLayout, memory: str = "auto", mirror: bool = False, bfloat16: bool | None = None
    ) -> None:
        super().__init__()
        if memory not in {"auto", *MEMORY_MODES}:
            raise ValueError(f"ScanInferer: 'memory' must be one of {['auto', *MEMORY_MODES]}, got '{memory}'")
        self.layout, self.memory, self.mirror, self.bfloat16 = layout, memory, mirror, bfloat16

    def __call__(self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Map images of shape (B, 1, H, W, D) in RAS+ order to what the mode gives; metadata go along."""
        mode = self.choose(inputs, network) if self.memory == "auto" else self.memory
        return MEMORY_MODES[mode](self.layout, self.mirror, self.bfloat16)(inputs, network, *args, **kwargs)

    def choose(self, inputs: Tensor, network: Callable[..., Tensor]) -> str:
        """Name of the mode for images of that size, in the memory that is free now."""
        *modes, last = preferred_modes(network)
        free = free_memory(inputs.device)
        for mode in modes:
            if isinstance(network, nn.Module) and self.estimate(inputs, network, mode) > free:
                logger.info("%.1f GB of memory are free, which is too little for memory mode '%s'", free / 1e9, mode)
                continue
            return mode
        return last

    def estimate(self, inputs: Tensor, network: nn.Module, mode: str) -> int:
        """Bytes that a mode will take at most for images of that size, beyond the network's weights."""
        dtype = choose_precision(self.bfloat16, inputs.device)
        memo = {id(t): _without_data(t) for t in (*network.parameters(), *network.buffers())}
        hollow = copy.deepcopy(network, memo)
        image = torch.empty(inputs.shape, device="meta")
        if mode in {"whole", "windows"}:
            hollow, image = hollow.to(dtype), image.to(dtype)  # autocast knows no device without data
            if isinstance(hollow, MultiTaskNet):
                hollow.head.float()
        inferer = MEMORY_MODES[mode](self.layout, self.mirror, dtype != torch.float32)
        return int(RESERVE * peak_memory(lambda x: inferer(x, hollow), image))


def _without_data(tensor: Tensor) -> Tensor:
    hollow = torch.empty_like(tensor, device="meta")
    return nn.Parameter(hollow, requires_grad=False) if isinstance(tensor, nn.Parameter) else hollow
