"""How a network is run: its element type, its layout in memory, and activations computed again instead of kept."""

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from brainfm_monai.networks.multitask import MultiTaskNet
from brainfm_monai.networks.residual import PreactivationBlock
from brainfm_monai.networks.unet import DoubleUnit, ResidualBlock

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def fast_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware; an emulated bfloat16 is slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")  # torch has no public function for it
    return device.type == "cpu" and any(getattr(torch.cpu, name, bool)() for name in names)


def parse_precision(precision: str | None, device: torch.device) -> torch.dtype:
    """Element type by its name, float32, bfloat16 or float16; another name is a ValueError.

    ``None`` is the fastest type of the device: bfloat16 if the hardware has it, float16 on older GPUs, else float32.
    """
    if precision is None:
        other = torch.float16 if device.type == "cuda" else torch.float32
        return torch.bfloat16 if fast_bfloat16(device) else other
    if precision not in PRECISIONS:
        raise ValueError(f"precision: one of {list(PRECISIONS)} or null is needed, found '{precision}'")
    return PRECISIONS[precision]


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Autocast to an element type; no autocast for float32, and on devices that have no autocast."""
    if dtype == torch.float32 or not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def prepare_network(network: nn.Module, device: torch.device, compile: bool = False) -> nn.Module:
    """Move a network to its device in place, in evaluation mode, with the channels of a voxel side by side in memory.

    Compiled is, with ``torch.compile``, what takes the time: the backbone of a :class:`MultiTaskNet`, else the network.
    """
    network = network.to(device=device, memory_format=torch.channels_last_3d).eval()  # type: ignore[call-overload]
    if compile:
        (network.backbone if isinstance(network, MultiTaskNet) else network).compile()
    return network


def checkpoint_activations(network: nn.Module) -> None:
    """Let a network keep only what goes into each level of its U-Nets, and compute the rest again for the gradient.

    The network is changed in place. Names of parameters stay, and so do the numbers. Training takes about a third
    longer, and a fraction of the memory (Chen et al., Training deep nets with sublinear memory cost, arXiv 1604.06174).
    ValueError if the network has no level; SwinUNETR has an argument ``use_checkpoint`` of its own.
    """
    kinds = ResidualBlock | PreactivationBlock | DoubleUnit
    levels: list[nn.Module] = [m for m in network.modules() if isinstance(m, kinds)]
    if not levels:
        name = type(network).__name__
        raise ValueError(f"activation_checkpointing: a network with levels of a U-Net is needed, found {name}")
    for level in levels:
        level.forward = partial(checkpoint, level.forward, use_reentrant=False)
