"""Painting of labels, bias field, gamma, noise and normalisation."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as nnf
from torch import Tensor

FWHM_PER_SIGMA = 2.3548  # of a Gaussian
NEGLIGIBLE_WIDTH = 0.1  # of the new voxel size: below it smoothing changes nothing that can be seen
QUANTILE_SAMPLES = 2**17  # voxels that are looked at for a percentile: error of the 99.9th below 0.01 % of the voxels


def paint_labels(labels: Tensor, values: Tensor) -> Tensor:
    """Give labels (B, 1, H, W, D) in [0, L) their C values (B, L, C): (B, C, H, W, D), channels last in memory."""
    first = torch.arange(len(labels), device=labels.device, dtype=torch.int32).reshape(-1, 1, 1, 1) * values.shape[1]
    return nnf.embedding(first + labels[:, 0], values.flatten(0, 1)).movedim(-1, 1)


def paint_voxels(labels: Tensor, values: Tensor, coordinates: Tensor, offsets: Tensor) -> Tensor:
    """Give voxels the mean of the values of the labels that they hold: partial volumes, without painting the whole map.

    Labels and values are those of :func:`paint_labels`, with 0 outside. Voxels have their centres at ``coordinates``,
    (B, 3, H, W, D), in voxels of the labels; the nearest labels at N ``offsets`` from it, (B, 3, N), count alike.
    """
    batch, outside = len(labels), values.shape[1]
    table = nnf.pad(values, (0, 0, 0, 1)).flatten(0, 1)
    first = torch.arange(batch, device=labels.device, dtype=torch.int32)[:, None] * (outside + 1)
    centres, of_map = coordinates.flatten(2), labels.flatten(1)
    held = torch.empty(*centres[:, 0].shape, offsets.shape[2], device=labels.device, dtype=torch.int32)
    for n in range(offsets.shape[2]):
        index = torch.zeros_like(centres[:, 0], dtype=torch.int32)
        inside = torch.ones_like(index, dtype=torch.bool)
        for axis, count in enumerate(labels.shape[2:]):
            index_along = (centres[:, axis] + offsets[:, axis, n, None]).round_().int()
            inside &= (index_along >= 0) & (index_along < count)
            index = index.mul_(count).add_(index_along.clamp_(0, count - 1))
        held[..., n] = torch.where(inside, of_map.gather(1, index.long()).int(), outside) + first
    means = nnf.embedding_bag(held.flatten(0, 1), table, mode="mean")
    return means.reshape(batch, *coordinates.shape[2:], -1).movedim(-1, 1)


def add_noise(image: Tensor, noise: Tensor, std: Tensor, rician: Tensor) -> Tensor:
    """Add noise of a standard deviation (B,) to an image (B, 1, H, W, D), and clip it at 0.

    Where ``rician`` (B,) is true, this is the magnitude of a complex signal (Gudbjartsson and Patz, Magnetic Resonance
    in Medicine 34, 1995), of standard normal ``noise`` in both parts, (B, 2, H, W, D); elsewhere one part is enough.
    """
    std = std.reshape(-1, 1, 1, 1, 1)
    signal = torch.addcmul(image, noise[:, :1], std)
    if noise.shape[1] == 1:
        return signal.clamp_min_(0)
    return torch.where(rician.reshape(-1, 1, 1, 1, 1), torch.hypot(signal, noise[:, 1:] * std), signal.clamp_min(0))


def antialias(volume: Tensor, spacing_mm: Sequence[float], target_mm: Sequence[float]) -> Tensor:
    """Smooth a floating volume (..., H, W, D) along the axes that are to be sampled more coarsely, edges repeated.

    The Gaussian's width squared is the difference of the squared voxel sizes: an old box becomes about a new one.
    """
    for axis, (spacing, target) in enumerate(zip(spacing_mm, target_mm, strict=True), volume.ndim - 3):
        width_mm = math.sqrt(max(target**2 - spacing**2, 0.0))
        if width_mm <= NEGLIGIBLE_WIDTH * target:
            continue
        sigma = width_mm / FWHM_PER_SIGMA / spacing
        radius = math.ceil(4 * sigma)
        weights = [math.exp(-0.5 * (offset / sigma) ** 2) for offset in range(-radius, radius + 1)]
        size = volume.shape[axis]
        index = torch.arange(-radius, size + radius, device=volume.device).clamp(0, size - 1)
        continued = volume.index_select(axis, index)
        volume = torch.zeros_like(volume)
        for offset, weight in enumerate(weights):
            volume.add_(continued.narrow(axis, offset, size), alpha=weight / sum(weights))
    return volume


def apply_window(values: Tensor, window: Tensor) -> Tensor:
    """Clamp values (B, C, H, W, D) to a window, low and higher end (B, 2) in their unit, and map it to [0, 1]."""
    low, high = (window[:, i].reshape(-1, 1, 1, 1, 1) for i in range(2))
    return ((values - low) / (high - low)).clamp_(0, 1)


def normalise_percentiles(image: Tensor, lower: float = 0.0, upper: float = 0.999) -> Tensor:
    """Map two quantiles, in [0, 1], of every sample (B, C, H, W, D) to 0 and 1 and clip; a constant image becomes 0."""
    step = max(1, math.ceil((math.prod(image.shape[2:]) / QUANTILE_SAMPLES) ** (1 / 3)))
    seen = image[:, :, ::step, ::step, ::step].flatten(1).float()
    # kthvalue and not quantile: the rank is a number of the host, so that nothing waits for a device
    ranks = [1 + round(level * (seen.shape[1] - 1)) for level in (lower, upper)]
    low, high = (seen.kthvalue(rank, dim=1).values.to(image.dtype).reshape(-1, 1, 1, 1, 1) for rank in ranks)
    return ((image - low) / (high - low).clamp_min(torch.finfo(image.dtype).tiny)).clamp(0, 1)
