"""Running the network over whole scans."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.nn.functional as nnf
from monai.data import MetaTensor
from monai.inferers import Inferer
from monai.transforms import generate_spatial_bounding_box
from torch import Tensor

from brainfm_monai.tasks import TaskLayout

__all__ = ["ForegroundInferer", "MirrorInferer", "WholeVolumeInferer", "exit_on_error", "fast_bfloat16"]

T = TypeVar("T")


def fast_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware; elsewhere it is slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")  # torch has no public word for it
    return device.type == "cpu" and any(getattr(torch.cpu, name, bool)() for name in names)


class WholeVolumeInferer(Inferer):
    """Give the network the whole volume at once, in bfloat16 where the processor has it.

    Args:
        bfloat16: compute in bfloat16; ``None``: where :func:`fast_bfloat16` says so.
    """

    def __init__(self, bfloat16: bool | None = None) -> None:
        super().__init__()
        self.bfloat16 = bfloat16

    def __call__(self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Map images of shape (B, 1, H, W, D) to the network's output; metadata go along."""
        image = inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs
        enabled = fast_bfloat16(image.device) if self.bfloat16 is None else self.bfloat16
        with torch.autocast(image.device.type, dtype=torch.bfloat16, enabled=enabled):
            output = network(image.contiguous(), *args, **kwargs)
        if not isinstance(inputs, MetaTensor):
            return output
        tensor = MetaTensor(output).copy_meta_from(inputs)
        tensor.is_batch = inputs.is_batch
        return tensor


class MirrorInferer(Inferer):
    """Mean of what another inferer finds in a head and in its left-right mirror image, mirrored back by the rules of the tasks.

    Args:
        inferer: runs the network, twice for each call.
        layout: knows how each task mirrors.
    """

    def __init__(self, inferer: Inferer, layout: TaskLayout) -> None:
        super().__init__()
        self.inferer, self.layout = inferer, layout

    def __call__(self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Map images of shape (B, 1, H, W, D) in RAS+ order to (B, layout.channels, H, W, D) in float32."""
        straight = self.inferer(inputs, network, *args, **kwargs).float()
        mirrored = self.inferer(inputs.flip(2), network, *args, **kwargs).float()
        return straight.add_(self.layout.mirror(mirrored)).mul_(0.5)


class ForegroundInferer(Inferer):
    """Run another inferer on the box around the head, and fill in what is known of the air around it.

    Group normalisation averages over the volume: a head in a large box of air would not look like those of the training.

    Args:
        inferer: runs the network on the box.
        outside: value of each output channel outside the box.
        threshold: voxels above it are head or noise; the box holds all of them. Images lie in [0, 1].
        margin: voxels that the box is larger on each side.
        multiple: the box is padded with zeros to a multiple of it, which the network's poolings need.
    """

    def __init__(
        self, inferer: Inferer, outside: Sequence[float], threshold: float = 0.05, margin: int = 4, multiple: int = 32
    ) -> None:
        super().__init__()
        self.inferer, self.outside = inferer, list(outside)
        self.threshold, self.margin, self.multiple = threshold, margin, multiple

    def __call__(self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Map images of shape (B, 1, H, W, D) to (B, channels, H, W, D) in float32; metadata go along."""
        image = inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs
        fill = torch.tensor(self.outside, device=image.device).reshape(1, -1, 1, 1, 1)
        output = fill.repeat(len(image), 1, *image.shape[2:])
        for sample in range(len(image)):
            first, last = generate_spatial_bounding_box(
                image[sample], lambda x: x > self.threshold, margin=self.margin, allow_smaller=True
            )
            box = tuple(slice(a, b or None) for a, b in zip(first, last, strict=True))  # no foreground, (0, 0): the whole volume
            part = image[sample : sample + 1, :, *box]
            padding = [n for size in part.shape[:1:-1] for n in (0, -size % self.multiple)]
            found = self.inferer(nnf.pad(part, padding), network, *args, **kwargs)
            output[sample : sample + 1, :, *box] = found[:, :, : part.shape[2], : part.shape[3], : part.shape[4]].float()
        if not isinstance(inputs, MetaTensor):
            return output
        tensor = MetaTensor(output).copy_meta_from(inputs)
        tensor.is_batch = inputs.is_batch
        return tensor


def exit_on_error(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call a function; a wrong value or a missing file ends the program with the message alone, in one line, and status 1.

    Raises:
        SystemExit: where the function raises ``ValueError`` or ``OSError``.
    """
    try:
        return function(*args, **kwargs)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error
