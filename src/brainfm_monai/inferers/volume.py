"""Whole volumes, windows, mirror images, and the box around the head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as nnf
from monai.data import MetaTensor
from monai.inferers import Inferer, sliding_window_inference
from monai.transforms import generate_spatial_bounding_box
from torch import Tensor

from brainfm_monai.inferers.precision import autocast, choose_precision
from brainfm_monai.tasks import TaskLayout

__all__ = ["ForegroundInferer", "MirrorInferer", "WholeVolumeInferer", "WindowInferer", "as_plain", "like_input"]

MIRROR_PLANES = 16  # that are averaged at once: two outputs are held, not three


def as_plain(inputs: Tensor) -> Tensor:
    """The tensor without metadata, which TorchScript, compilation and autocast do not need."""
    return inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs


def like_input(output: Tensor, inputs: Tensor) -> Tensor:
    """The output with the metadata of the input, if it has any."""
    if not isinstance(inputs, MetaTensor):
        return output
    tensor = MetaTensor(output).copy_meta_from(inputs)
    tensor.is_batch = inputs.is_batch
    return tensor


def _pad(image: Tensor, multiple: int) -> Tensor:
    """The image with zeros after its end, so that every side is a multiple."""
    padding = [n for size in image.shape[:1:-1] for n in (0, -size % multiple)]
    return nnf.pad(image, padding) if any(padding) else image


class WholeVolumeInferer(Inferer):
    """Give the network the whole volume at once, in a reduced precision where the device is faster in it.

    Args:
        bfloat16: compute in bfloat16; ``None``: in what :func:`~brainfm_monai.inferers.reduced_precision` says.
        multiple: the volume is padded with zeros to a multiple of it, and the output cropped.
    """

    def __init__(self, bfloat16: bool | None = None, multiple: int = 1) -> None:
        super().__init__()
        self.bfloat16, self.multiple = bfloat16, multiple

    def __call__(self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Map images of shape (B, 1, H, W, D) to the network's output; metadata go along."""
        image = as_plain(inputs)
        dtype = choose_precision(self.bfloat16, image.device)
        height, width, depth = image.shape[2:]
        with autocast(image.device, dtype):
            output = network(_pad(image, self.multiple).contiguous(), *args, **kwargs)[:, :, :height, :width, :depth]
        return like_input(output, inputs)


class WindowInferer(Inferer):
    """Run another inferer on overlapping windows, and average them with Gaussian weights: for any network, in bounded memory.

    Group normalisation averages over what the network sees, so that windows do not give exactly what the whole volume gives.

    Args:
        inferer: runs the network on each window.
        roi_size: side of the window, in voxels; along an axis that is shorter, the window is as long as the volume.
        overlap: share of a window that overlaps with the next.
    """

    def __init__(self, inferer: Inferer, roi_size: int | Sequence[int] = 160, overlap: float = 0.5) -> None:
        super().__init__()
        self.inferer, self.roi_size, self.overlap = inferer, roi_size, overlap

    def __call__(self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Map images of shape (B, 1, H, W, D) to (B, C, H, W, D) in float32; metadata go along."""

        def predict(window: Tensor) -> Tensor:
            return self.inferer(window, network, *args, **kwargs).float()

        image = as_plain(inputs)
        wanted = [self.roi_size] * 3 if isinstance(self.roi_size, int) else self.roi_size
        roi_size = [min(n, size) for n, size in zip(wanted, image.shape[2:], strict=True)]
        output = sliding_window_inference(
            image, roi_size, 1, predict, overlap=self.overlap, mode="gaussian", padding_mode="constant"
        )
        assert isinstance(output, Tensor)
        return like_input(output, inputs)


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
        mirrored = self.inferer(inputs.flip(2), network, *args, **kwargs)
        size = straight.shape[2]
        for a in range(0, size, MIRROR_PLANES):
            b = min(a + MIRROR_PLANES, size)
            back = self.layout.mirror(as_plain(mirrored[:, :, size - b : size - a]).float())
            straight[:, :, a:b].add_(back).mul_(0.5)
        return straight


class ForegroundInferer(Inferer):
    """Run another inferer on the box around the head, and fill in what is known of the air around it.

    Group normalisation averages over the volume: a head in a large box of air would not look like those of the training.

    Args:
        inferer: runs the network on the box.
        outside: value of each output channel outside the box; one value may stand for all. Where the inferer returns labels in
            place of the first channels (see :class:`~brainfm_monai.inferers.SlabInferer`), the label outside is 0.
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
        image = as_plain(inputs)
        parts = []
        for sample in image:
            first, last = generate_spatial_bounding_box(
                sample, lambda x: x > self.threshold, margin=self.margin, allow_smaller=True
            )
            box = tuple(
                slice(a, b or None) for a, b in zip(first, last, strict=True)
            )  # no foreground, (0, 0): the whole volume
            part = sample[None, :, *box]
            found = self.inferer(_pad(part, self.multiple), network, *args, **kwargs)
            found = found[:, :, : part.shape[2], : part.shape[3], : part.shape[4]].float()
            parts.append(found if part.shape == sample[None].shape else self._surround(found, box, sample.shape[1:]))
        return like_input(parts[0] if len(parts) == 1 else torch.cat(parts), inputs)

    def _surround(self, found: Tensor, box: tuple[slice, ...], size: Sequence[int]) -> Tensor:
        """The whole volume, with what was found in the box."""
        channels = found.shape[1]
        values = self.outside * channels if len(self.outside) == 1 else self.outside
        if len(values) != channels:  # labels stand in place of the channels of the segmentation
            values = [0.0, *values[len(values) - channels + 1 :]]
        fill = torch.tensor(values, device=found.device).reshape(1, -1, 1, 1, 1)
        output = fill.expand(1, channels, *size).clone()
        output[:, :, *box] = found
        return output
