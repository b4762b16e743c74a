"""The element type that a device computes fastest in, and networks laid out for it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from monai.inferers import SimpleInferer
from torch import Tensor, nn

__all__ = [
    "AutocastInferer",
    "autocast",
    "choose_precision",
    "fast_bfloat16",
    "parse_precision",
    "prepare_network",
    "reduced_precision",
]

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def fast_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware; elsewhere it is slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")  # torch has no public word for it
    return device.type == "cpu" and any(getattr(torch.cpu, name, bool)() for name in names)


def reduced_precision(device: torch.device) -> torch.dtype:
    """The fastest element type of a device: bfloat16 where it is in hardware, float16 on older GPUs, else float32."""
    if fast_bfloat16(device):
        return torch.bfloat16
    return torch.float16 if device.type == "cuda" else torch.float32


def choose_precision(bfloat16: bool | None, device: torch.device) -> torch.dtype:
    """Element type for a wish: yes, no, or (``None``) what is fastest."""
    if bfloat16 is None:
        return reduced_precision(device)
    return torch.bfloat16 if bfloat16 else torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """Autocast to an element type, which is nothing for float32 and where a device has none."""
    if dtype == torch.float32 or not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def prepare_network(network: nn.Module, device: torch.device, compile: bool = False) -> nn.Module:
    """A network on its device, in evaluation mode, with the channels of a voxel side by side in memory.

    Args:
        network: any network; it is changed in place.
        device: where it will run.
        compile: compile it with ``torch.compile``, which pays for many scans of one size on a GPU.
    """
    network = network.to(device=device, memory_format=torch.channels_last_3d).eval()  # type: ignore[call-overload]
    if compile:
        network.compile()
    return network


def parse_precision(precision: str | None, device: torch.device) -> torch.dtype:
    """Element type by its name.

    Args:
        precision: float32, bfloat16 or float16; ``None``: what :func:`reduced_precision` says.
        device: where the network runs.

    Raises:
        ValueError: if it is none of these.
    """
    if precision is None:
        return reduced_precision(device)
    if precision not in PRECISIONS:
        raise ValueError(f"precision: one of {list(PRECISIONS)} or null is needed, found '{precision}'")
    return PRECISIONS[precision]


class AutocastInferer(SimpleInferer):
    """Give the network the whole batch under autocast, in training and in validation.

    Args:
        precision: see :func:`parse_precision`.

    Raises:
        ValueError: if there is no such precision.
    """

    def __init__(self, precision: str | None = None) -> None:
        super().__init__()
        parse_precision(precision, torch.device("cpu"))
        self.precision = precision

    def __call__(self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Map images of shape (B, 1, H, W, D) to the network's output."""
        with autocast(inputs.device, parse_precision(self.precision, inputs.device)):
            return network(inputs, *args, **kwargs)
