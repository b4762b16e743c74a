"""The published U-Nets evaluated by chunks of planes: the same features in a third of the memory.

Normalisation, convolution and activation run over chunks of planes. A result overwrites its input where it can, and the
skip with the upsampled coarser features after it, the largest tensor of a U-Net, is put together chunk by chunk.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial, reduce
from typing import cast

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from brainfm_monai.networks.unet import ResidualBlock, UNet

STATISTICS_VOXELS = 2**14  # summed in float32 at a time; the sums of sums are in float64
CHUNK_BYTES = 64 * 2**20  # of a unit's input or output at a time: chosen, far below what is held anyway

Stage = Callable[[Tensor], Tensor]
Parts = Sequence[Tensor]  # input of a unit: a tensor, or a skip and the coarser features that follow it


def plane_ranges(size: int, per_plane: int, limit: int = CHUNK_BYTES) -> Iterator[tuple[int, int]]:
    """Ranges [a, b) of planes that cover ``size`` and hold at most ``limit`` bytes (or voxels), if one plane does."""
    step = max(1, limit // max(1, per_plane))
    return ((a, min(a + step, size)) for a in range(0, size, step))


def encode_by_planes(backbone: UNet, image: Tensor) -> Tensor:
    """``backbone(image)`` up to rounding, without gradient: (B, C, H, W, D) to (B, backbone.out_channels, H, W, D).

    The backbone is in evaluation mode. It is computed in the element type of the image: float32, float16 or bfloat16.
    """
    if len(image) > 1:
        return torch.cat([encode_by_planes(backbone, sample) for sample in image.split(1)])
    skips: list[Tensor] = []
    with torch.no_grad():
        for encoder in backbone.encoders:
            x = nnf.max_pool3d(skips[-1], 2) if skips else image.clone()
            skips.append(_residual_block(encoder, x) if isinstance(encoder, ResidualBlock) else _run([encoder], [x]))
        x = skips.pop()
        for decoder in backbone.decoders:
            x = _run([decoder], [skips.pop(), x])
        if backbone.unit_norm:
            _replace(x, lambda part: nnf.normalize(part.float(), dim=1))
    return x


def _read(parts: Parts, a: int, b: int) -> Tensor:
    """Planes a to b of a unit's input, (1, channels, b - a, W, D); coarser features are those of the nearest voxel."""
    fine = parts[0][:, :, a:b]
    if len(parts) == 1:
        return fine
    nearest = torch.arange(a, b, device=fine.device) * parts[1].shape[2] // parts[0].shape[2]
    coarse = nnf.interpolate(parts[1].index_select(2, nearest), size=fine.shape[2:])
    return torch.cat([fine, coarse], dim=1)


def _replace(x: Tensor, *stages: Stage) -> None:
    """Overwrite chunks of planes by what the stages, if there are any, make of them."""
    for a, b in plane_ranges(x.shape[2], x[:, :, :1].nbytes) if stages else ():
        x[:, :, a:b] = reduce(lambda part, stage: stage(part), stages, x[:, :, a:b])


def _run(units: Iterable[nn.Module], parts: Parts) -> Tensor:
    """Normalisations, convolutions and activations in turn; a result overwrites ``parts[0]`` if it fits there."""
    stages: list[Stage] = []  # what is still to be done with the planes of a part
    for layer in (layer for unit in units for layer in unit.modules()):
        if isinstance(layer, nn.Conv3d):
            parts, stages = [_convolve(layer, parts, stages)], []
        elif isinstance(layer, nn.GroupNorm):
            _replace(parts[0], *stages)
            stages = [_normalisation(layer, parts)]
        elif isinstance(layer, nn.LeakyReLU):  # in place: planes that a normalisation made, or that are overwritten
            stages.append(partial(nnf.leaky_relu_, negative_slope=layer.negative_slope))
    _replace(parts[0], *stages)
    return parts[0]


def _residual_block(block: ResidualBlock, image: Tensor) -> Tensor:
    projection = block.projection
    weight = projection.weight.to(dtype=image.dtype, memory_format=torch.channels_last_3d)
    bias = cast(Tensor, projection.bias).to(image.dtype)
    x = _run([block.first, block.second], [nnf.conv3d(image, weight, bias)])
    for a, b in plane_ranges(x.shape[2], x[:, :, :1].nbytes):  # the projection again costs less than its memory
        part = x[:, :, a:b].add_(nnf.conv3d(image[:, :, a:b], weight, bias))
        nnf.leaky_relu_(part, block.activation.negative_slope)
    return x


def _normalisation(norm: nn.GroupNorm, parts: Parts) -> Stage:
    """Group normalisation of planes by the statistics of the whole sample: batch normalisation in evaluation mode."""
    size, channels, device = parts[0].shape[2:], sum(part.shape[1] for part in parts), parts[0].device
    total = torch.zeros(2, channels, dtype=torch.float64, device=device)  # of values and of squares
    unused = torch.zeros(channels, device=device)  # running statistics
    for a, b in plane_ranges(size[0], size[1] * size[2], STATISTICS_VOXELS):
        # five times as fast as var_mean
        statistics = torch.batch_norm_update_stats(_read(parts, a, b), unused, unused, 0.0)
        mean, variance = (value.double() for value in statistics)
        total += (b - a) / size[0] * torch.stack([mean, variance + mean.square()])
    mean, square = total.reshape(2, norm.num_groups, -1).mean(2)
    repeats = channels // norm.num_groups
    centre, spread = (value.float().repeat_interleave(repeats) for value in (mean, square - mean.square()))
    weight, bias = norm.weight.float(), norm.bias.float()
    return lambda x: nnf.batch_norm(x, centre, spread, weight, bias, training=False, eps=norm.eps)


def _convolve(conv: nn.Conv3d, parts: Parts, stages: Sequence[Stage]) -> Tensor:
    """3x3x3 convolution of planes after the stages; planes beyond the volume are zero.

    The first part is overwritten if its channels suffice: the last plane of a chunk is kept for the next chunk.
    """
    size, first, out = parts[0].shape[2:], _read(parts, 0, 1), parts[0]
    layout = torch.channels_last_3d
    weight = conv.weight.to(dtype=first.dtype, memory_format=layout)
    if out.shape[1] != conv.out_channels:
        shape = (1, conv.out_channels, *size)
        out = torch.empty(shape, dtype=first.dtype, device=first.device, memory_format=layout)
    behind = zero = torch.zeros_like(first, memory_format=layout)
    per_plane = max(first.shape[1], conv.out_channels) * size[1] * size[2] * first.element_size()
    for a, b in plane_ranges(size[0], per_plane):
        x = _read(parts, a, min(b + 1, size[0]))  # from here on the chunk before is free
        x = reduce(lambda part, stage: stage(part), stages, x)
        x = torch.cat([behind, x, zero] if b == size[0] else [behind, x], dim=2)  # planes a - 1 to b
        behind = x[:, :, -2:-1].clone()
        out[:, :, a:b] = nnf.conv3d(x, weight, padding=(0, 1, 1))
    return out
