"""The published U-Nets evaluated by chunks of planes: the same features in a third of the memory.

Normalisation, convolution and activation run over chunks of planes. A unit overwrites its input where it can, and the skip with
the upsampled coarser features after it, the largest tensor of a U-Net, is put together chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from brainfm_monai.networks.unet import ConvUnit, ResidualBlock, ResidualUNet, UNet

__all__ = ["encode_by_planes", "plane_ranges"]

STATISTICS_VOXELS = 2**14  # summed in float32 at a time; the sums of sums are in float64
CHUNK_BYTES = 64 * 2**20  # of a unit's input or output at a time: chosen, far below what is held anyway

Stage = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Source:
    """Input of a unit.

    Attributes:
        read: returns the planes from a to b of one sample, shape (1, channels, b - a, W, D).
        size: H, W, D.
        channels: number of channels.
    """

    read: Callable[[int, int], Tensor]
    size: tuple[int, int, int]
    channels: int


def plane_ranges(size: int, per_plane: int, limit: int = CHUNK_BYTES) -> Iterator[tuple[int, int]]:
    """Ranges [a, b) of planes that cover ``size`` and hold at most ``limit`` bytes (or voxels), if one plane does."""
    step = max(1, limit // max(1, per_plane))
    return ((a, min(a + step, size)) for a in range(0, size, step))


def encode_by_planes(backbone: UNet | ResidualUNet, image: Tensor) -> Tensor:
    """Features of a published U-Net, computed in the element type of the image.

    Args:
        backbone: network in evaluation mode; no gradient is recorded.
        image: shape (B, C, H, W, D), float32, float16 or bfloat16.

    Returns:
        ``backbone(image)`` up to rounding: shape (B, backbone.out_channels, H, W, D), of the image's element type.
    """
    if len(image) > 1:
        return torch.cat([encode_by_planes(backbone, sample) for sample in image.split(1)])
    skips: list[Tensor] = []
    with torch.no_grad():
        for encoder in backbone.encoders:
            x = nnf.max_pool3d(skips[-1], 2) if skips else image
            skips.append(
                _residual_block(encoder, x) if isinstance(encoder, ResidualBlock) else _units(encoder, _all(x))
            )
        x = skips.pop()
        for decoder in backbone.decoders:
            skip = skips.pop()
            x = _units(decoder, _joined(skip, x), skip)
        if isinstance(backbone, UNet) and backbone.unit_norm:
            _apply(lambda part: nnf.normalize(part.float(), dim=1), x)
    return x


def _all(x: Tensor) -> _Source:
    return _Source(lambda a, b: x[:, :, a:b], (x.shape[2], x.shape[3], x.shape[4]), x.shape[1])


def _joined(fine: Tensor, coarse: Tensor) -> _Source:
    """The skip and, after the skip, the coarser features interpolated to its size by the nearest voxel."""
    size = (fine.shape[2], fine.shape[3], fine.shape[4])
    planes = torch.arange(coarse.shape[2], dtype=torch.float32, device=fine.device)[None, None]
    nearest = nnf.interpolate(planes, size=size[0])[0, 0].long()  # the rule of the network's own interpolation

    def read(a: int, b: int) -> Tensor:
        part = nnf.interpolate(coarse.index_select(2, nearest[a:b]), size=(b - a, *size[1:]))
        return torch.cat([fine[:, :, a:b], part], dim=1)

    return _Source(read, size, fine.shape[1] + coarse.shape[1])


def _units(units: nn.Module, source: _Source, out: Tensor | None = None) -> Tensor:
    """Two units, one after the other; the result of the first is written to ``out``, which the source may read."""
    first, second = units.children()
    x = _unit(first, source, out)
    return _unit(second, _all(x), x if _convolution(second).out_channels == x.shape[1] else None)


def _convolution(unit: nn.Module) -> nn.Conv3d:
    return next(child for child in unit.children() if isinstance(child, nn.Conv3d))


def _unit(unit: nn.Module, source: _Source, out: Tensor | None) -> Tensor:
    slope = cast(nn.LeakyReLU, list(unit.children())[-1]).negative_slope
    conv = _convolution(unit)
    norm = next(child for child in unit.children() if isinstance(child, nn.GroupNorm))
    if isinstance(unit, ConvUnit):  # normalisation first
        return _convolve(conv, source, out, _normalisation(norm, source), lambda x: nnf.leaky_relu_(x, slope))
    x = _convolve(conv, source, out)
    normalise = _normalisation(norm, _all(x))
    return _apply(lambda part: nnf.leaky_relu_(normalise(part), slope), x)


def _residual_block(block: ResidualBlock, image: Tensor) -> Tensor:
    weight, bias = _weight(block.projection, image), cast(Tensor, block.projection.bias).to(image.dtype)
    x = nnf.conv3d(image, weight, bias)
    x = _unit(block.first, _all(x), x)
    conv, norm = cast(tuple[nn.Conv3d, nn.GroupNorm], tuple(block.second))
    x = _convolve(conv, _all(x), x)
    normalise, slope = _normalisation(norm, _all(x)), block.activation.negative_slope
    for a, b in _chunks(x):  # the projection once more, which costs less than its memory
        part = normalise(x[:, :, a:b]).add_(nnf.conv3d(image[:, :, a:b], weight, bias))
        x[:, :, a:b] = nnf.leaky_relu_(part, slope)
    return x


def _normalisation(norm: nn.GroupNorm, source: _Source) -> Stage:
    """Group normalisation of planes by the statistics of the whole sample: batch normalisation in evaluation mode."""
    total = torch.zeros(2, source.channels, dtype=torch.float64, device=norm.weight.device)  # of values and of squares
    for a, b in plane_ranges(source.size[0], source.size[1] * source.size[2], STATISTICS_VOXELS):
        unused = torch.zeros(source.channels, device=norm.weight.device)  # running statistics
        statistics = torch.batch_norm_update_stats(
            source.read(a, b), unused, unused, 0.0
        )  # 5 times as fast as var_mean
        mean, variance = (value.double() for value in statistics)
        total += (b - a) / source.size[0] * torch.stack([mean, variance + mean.square()])
    mean, square = total.reshape(2, norm.num_groups, -1).mean(2)
    repeats = source.channels // norm.num_groups
    centre, spread = (v.float().repeat_interleave(repeats) for v in (mean, square - mean.square()))
    weight, bias = norm.weight.float(), norm.bias.float()
    return lambda x: nnf.batch_norm(x, centre, spread, weight, bias, training=False, eps=norm.eps)


def _convolve(
    conv: nn.Conv3d, source: _Source, out: Tensor | None, before: Stage | None = None, after: Stage | None = None
) -> Tensor:
    """3x3x3 convolution of planes after the stage ``before``; planes beyond the volume are zero.

    The result is written to ``out``. The source may read the same memory: planes are read before they are overwritten, and the
    last plane of a chunk is kept for the next chunk.
    """
    size, first = source.size, source.read(0, 1)
    weight = _weight(conv, first)
    zero = first.new_zeros(first.shape).contiguous(memory_format=torch.channels_last_3d)
    if out is None:
        shape, layout = (1, conv.out_channels, *size), torch.channels_last_3d
        out = torch.empty(shape, dtype=first.dtype, device=first.device, memory_format=layout)
    behind = zero
    per_plane = max(source.channels, conv.out_channels) * size[1] * size[2] * first.element_size()
    for a, b in plane_ranges(size[0], per_plane):
        x = source.read(a, min(b + 1, size[0]))
        x = before(x) if before else x
        x = torch.cat([behind, x, zero] if b == size[0] else [behind, x], dim=2)  # planes a - 1 to b
        behind = x[:, :, -2:-1].clone()
        y = nnf.conv3d(x, weight, padding=(0, 1, 1))
        out[:, :, a:b] = after(y) if after else y
    return out


def _weight(conv: nn.Conv3d, like: Tensor) -> Tensor:
    return conv.weight.to(dtype=like.dtype, memory_format=torch.channels_last_3d)


def _apply(stage: Stage, x: Tensor) -> Tensor:
    """Overwrite a tensor by a stage that looks at one plane at a time."""
    for a, b in _chunks(x):
        x[:, :, a:b] = stage(x[:, :, a:b])
    return x


def _chunks(x: Tensor) -> Iterator[tuple[int, int]]:
    return plane_ranges(x.shape[2], x[:, :, :1].numel() * x.element_size())
