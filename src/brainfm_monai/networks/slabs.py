"""The U-Nets evaluated slab by slab: the same features, without the copies that hold most of the memory.

Normalisation, convolution and activation of a unit run over slabs of planes, so that of each unit only what goes in and what
comes out is ever held whole. Statistics of a group are gathered over the whole volume first. What a decoder takes in (the skip
and the upsampled coarser features) is put together slab by slab as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import singledispatch
from typing import cast

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from brainfm_monai.networks.unet import ConvUnit, NormedConv, ResidualBlock, ResidualUNet, UNet

__all__ = ["has_slabs", "plane_ranges", "slab_features"]

STATISTICS_VOXELS = 2**14  # that are summed in float32, one after the other, before sums go on in float64
SLAB_BYTES = 64 * 2**20  # of a unit's input or output at a time: chosen, far below what is held anyway


@dataclass(frozen=True)
class Source:
    """What goes into a unit: planes [a, b) of one sample at a time.

    Attributes:
        read: gives planes a to b, shape (1, channels, b - a, W, D).
        statistics: gives mean and variance of every channel, shape (channels,) each, float32.
        size: H, W, D.
        channels: number of channels.
        dtype: element type of the planes.
    """

    read: Callable[[int, int], Tensor]
    statistics: Callable[[], tuple[Tensor, Tensor]]
    size: tuple[int, int, int]
    channels: int
    dtype: torch.dtype


def plane_ranges(size: int, bytes_per_plane: int, limit: int = SLAB_BYTES) -> Iterator[tuple[int, int]]:
    """Ranges [a, b) of planes that cover ``size`` and hold at most ``limit`` bytes each, if one plane does."""
    step = max(1, limit // max(1, bytes_per_plane))
    return ((a, min(a + step, size)) for a in range(0, size, step))


def has_slabs(backbone: nn.Module) -> bool:
    """Whether :func:`slab_features` knows how to evaluate the backbone slab by slab."""
    return slab_features_of_one.dispatch(type(backbone)) is not slab_features_of_one.dispatch(object)


def slab_features(backbone: nn.Module, image: Tensor) -> Tensor:
    """Features of a backbone, computed in the precision of the image and in little memory.

    Args:
        backbone: one of this package's U-Nets; any other is called as it is.
        image: shape (B, C, H, W, D), float32, float16 or bfloat16.

    Returns:
        What ``backbone(image)`` gives, up to rounding: shape (B, backbone.out_channels, H, W, D), of the image's dtype.
    """
    parts = [slab_features_of_one(backbone, image[i : i + 1]) for i in range(len(image))]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@singledispatch
def slab_features_of_one(backbone: nn.Module, image: Tensor) -> Tensor:
    """Features of one sample; the general case calls the backbone."""
    if image.dtype == torch.float32 or not torch.amp.is_autocast_available(image.device.type):  # as on the meta device
        features: Tensor = backbone(image.float())
    else:
        with torch.autocast(image.device.type, dtype=image.dtype):
            features = backbone(image)
    return features.to(image.dtype)


@slab_features_of_one.register
def _(backbone: UNet, image: Tensor) -> Tensor:
    skips = [_encode(backbone.encoders[0], _whole(image))]
    for encoder in list(backbone.encoders)[1:]:
        skips.append(_encode(encoder, _whole(nnf.max_pool3d(skips[-1], 2))))
    x = skips.pop()
    for decoder in backbone.decoders:
        x = _encode(decoder, _joined(skips.pop(), x))
    return _unit_length_(x) if backbone.unit_norm else x


@slab_features_of_one.register
def _(backbone: ResidualUNet, image: Tensor) -> Tensor:
    skips = [_residual_block(backbone.encoders[0], image)]
    for encoder in list(backbone.encoders)[1:]:
        skips.append(_residual_block(encoder, nnf.max_pool3d(skips[-1], 2)))
    x = skips.pop()
    for decoder in backbone.decoders:
        x = _encode(decoder, _joined(skips.pop(), x))
    return x


def _whole(x: Tensor) -> Source:
    return Source(lambda a, b: x[:, :, a:b], lambda: _channel_statistics(x), _size(x), x.shape[1], x.dtype)


def _joined(fine: Tensor, coarse: Tensor) -> Source:
    """The skip and, after it, the coarser features brought to its size by the nearest voxel."""
    size = _size(fine)
    planes = torch.arange(coarse.shape[2], dtype=torch.float32, device=fine.device)[None, None]
    nearest = nnf.interpolate(planes, size=size[0])[0, 0].long()  # the rule of the network's own interpolation

    def read(a: int, b: int) -> Tensor:
        part = coarse.index_select(2, nearest[a:b])
        return torch.cat([fine[:, :, a:b], nnf.interpolate(part, size=(b - a, *size[1:]))], dim=1)

    def statistics() -> tuple[Tensor, Tensor]:
        repeats = {n // m if n % m == 0 else 0 for n, m in zip(size, coarse.shape[2:], strict=True)}
        if 0 in repeats:  # voxels are not repeated equally often
            upsampled = nnf.interpolate(coarse, size=size)
            parts = [_channel_statistics(fine), _channel_statistics(upsampled)]
        else:
            parts = [_channel_statistics(fine), _channel_statistics(coarse)]
        mean, variance = (torch.cat(both) for both in zip(*parts, strict=True))
        return mean, variance

    return Source(read, statistics, size, fine.shape[1] + coarse.shape[1], fine.dtype)


def _size(x: Tensor) -> tuple[int, int, int]:
    return x.shape[2], x.shape[3], x.shape[4]


def _channel_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of every channel in float32, gathered over short runs of planes: within them, and between them."""
    means, variances, weights = [], [], []
    for a, b in plane_ranges(x.shape[2], x.shape[3] * x.shape[4], STATISTICS_VOXELS):
        mean, variance = _moments(x[:, :, a:b])
        means.append(mean)
        variances.append(variance)
        weights.append((b - a) / x.shape[2])
    weight = torch.tensor(weights, dtype=torch.float64, device=x.device)[:, None]
    within, between = torch.stack(variances).double(), torch.stack(means).double()
    mean = (between * weight).sum(0)
    return mean.float(), ((within + (between - mean).square()) * weight).sum(0).float()


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    if x.device.type != "cpu":
        variance, mean = torch.var_mean(x.float(), dim=(0, 2, 3, 4), correction=0)
        return mean, variance
    nothing = torch.zeros(x.shape[1])  # running statistics, of which nothing is kept
    mean, variance = torch.batch_norm_update_stats(x, nothing, nothing, 0.0)  # a fifth of the time of var_mean
    return mean, variance


def _group_statistics(norm: nn.GroupNorm, source: Source) -> tuple[Tensor, Tensor]:
    """Mean and variance that a group normalisation uses, repeated for every channel."""
    mean, variance = (values.reshape(norm.num_groups, -1) for values in source.statistics())
    centre = mean.mean(1, keepdim=True)
    spread = (variance + (mean - centre).square()).mean(1, keepdim=True)
    return centre.expand_as(mean).reshape(-1), spread.expand_as(mean).reshape(-1)


def _normalise(x: Tensor, norm: nn.GroupNorm, mean: Tensor, variance: Tensor) -> Tensor:
    """Group normalisation by statistics that are known, which is batch normalisation in evaluation."""
    return nnf.batch_norm(x, mean, variance, norm.weight.float(), norm.bias.float(), training=False, eps=norm.eps)


def _encode(units: nn.Module, source: Source) -> Tensor:
    """Two units, one after the other."""
    first, second = units.children()
    x = _unit(first, source)
    del source  # and with it the skip, which nobody else holds
    return _unit(second, _whole(x))


@singledispatch
def _unit(unit: nn.Module, source: Source) -> Tensor:
    raise TypeError(f"slab_features: a unit of normalisation and convolution is needed, got {type(unit).__name__}")


@_unit.register
def _(unit: ConvUnit, source: Source) -> Tensor:
    norm, conv, activation = cast(tuple[nn.GroupNorm, nn.Conv3d, nn.LeakyReLU], tuple(unit))
    mean, variance = _group_statistics(norm, source)
    return _convolve(conv, source, lambda x: _normalise(x, norm, mean, variance), activation.negative_slope)


@_unit.register
def _(unit: NormedConv, source: Source) -> Tensor:
    conv, norm, activation = cast(tuple[nn.Conv3d, nn.GroupNorm, nn.LeakyReLU], tuple(unit))
    x = _convolve(conv, source)
    mean, variance = _group_statistics(norm, _whole(x))
    for a, b in _planes(x):
        x[:, :, a:b] = nnf.leaky_relu_(_normalise(x[:, :, a:b], norm, mean, variance), activation.negative_slope)
    return x


def _residual_block(block: nn.Module, image: Tensor) -> Tensor:
    assert isinstance(block, ResidualBlock)
    weight, bias = _weight(block.projection, image.dtype), _bias(block.projection, image.dtype)
    x = _unit(block.first, _whole(nnf.conv3d(image, weight, bias)))
    conv, norm = cast(tuple[nn.Conv3d, nn.GroupNorm], tuple(block.second))
    x = _convolve(conv, _whole(x))
    mean, variance = _group_statistics(norm, _whole(x))
    for a, b in _planes(x):
        part = _normalise(x[:, :, a:b], norm, mean, variance)
        part += nnf.conv3d(image[:, :, a:b], weight, bias)  # once more, which is cheaper than to hold it
        x[:, :, a:b] = nnf.leaky_relu_(part, block.activation.negative_slope)
    return x


def _convolve(
    conv: nn.Conv3d, source: Source, prepare: Callable[[Tensor], Tensor] | None = None, slope: float | None = None
) -> Tensor:
    """3x3x3 convolution of prepared planes, and LeakyReLU if a slope is given; planes beyond the volume are zero."""
    weight, size = _weight(conv, source.dtype), source.size[0]

    def planes(a: int, b: int, padding: tuple[int, int, int]) -> Tensor:
        x = source.read(max(a - 1, 0), min(b + 1, size))
        x = prepare(x) if prepare else x
        if not padding[0] and (a == 0 or b == size):
            x = nnf.pad(x, (0, 0, 0, 0, int(a == 0), int(b == size)))
        y = nnf.conv3d(x, weight, padding=padding)
        return y if slope is None else nnf.leaky_relu_(y, slope)

    bytes_per_plane = max(source.channels, conv.out_channels) * source.size[1] * source.size[2] * source.dtype.itemsize
    ranges = list(plane_ranges(size, bytes_per_plane))
    if len(ranges) == 1:
        return planes(0, size, (1, 1, 1))
    output = torch.empty(
        (1, conv.out_channels, *source.size),
        dtype=source.dtype,
        device=weight.device,
        memory_format=torch.channels_last_3d,
    )
    for a, b in ranges:
        output[:, :, a:b] = planes(a, b, (0, 1, 1))
    return output


def _weight(conv: nn.Conv3d, dtype: torch.dtype) -> Tensor:
    return conv.weight.to(dtype=dtype, memory_format=torch.channels_last_3d)


def _bias(conv: nn.Conv3d, dtype: torch.dtype) -> Tensor | None:
    return None if conv.bias is None else conv.bias.to(dtype)


def _planes(x: Tensor) -> Iterator[tuple[int, int]]:
    return plane_ranges(x.shape[2], x[:, :, :1].numel() * x.element_size())


def _unit_length_(x: Tensor) -> Tensor:
    for a, b in _planes(x):
        x[:, :, a:b] = nnf.normalize(x[:, :, a:b].float(), dim=1)
    return x
