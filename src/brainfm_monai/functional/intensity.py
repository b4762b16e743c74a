"""Painting of labels, bias field, gamma, noise and normalisation."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["add_noise", "apply_bias_field", "apply_gamma", "normalise_percentiles", "paint_labels"]

QUANTILE_SAMPLES = 2**17  # voxels that are looked at for a percentile: error of the 99.9th below 0.01 % of the voxels


def paint_labels(labels: Tensor, mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
    """Paint a label map with one Gaussian intensity per label.

    Args:
        labels: label indices in [0, L), shape (B, 1, H, W, D), integer.
        mean: mean intensity per label, shape (B, L), arbitrary units.
        std: standard deviation per label, shape (B, L), same units.
        noise: standard normal draw, shape (B, 1, H, W, D).

    Returns:
        Image of shape (B, 1, H, W, D), non-negative.

    Raises:
        ValueError: if ``mean`` and ``std`` differ in shape.

    Reference:
        Billot et al., SynthSeg: segmentation of brain MRI scans of any contrast and resolution, Medical Image Analysis 86, 2023.
    """
    if mean.shape != std.shape:
        raise ValueError(f"paint_labels: 'std' must have the shape of 'mean' {tuple(mean.shape)}, got {tuple(std.shape)}")
    index = labels.flatten(1).long()
    image = torch.gather(std, 1, index).reshape(noise.shape).mul_(noise)
    return image.add_(torch.gather(mean, 1, index).reshape(noise.shape)).clamp_(min=0)


def apply_gamma(image: Tensor, gamma: Tensor) -> Tensor:
    """Raise intensities to a power, keeping 0 and the maximum of every sample.

    Args:
        image: non-negative, shape (B, 1, H, W, D).
        gamma: exponents, shape (B,).

    Returns:
        Image of the same shape and range.
    """
    top = image.amax(dim=(1, 2, 3, 4), keepdim=True).clamp_min(torch.finfo(image.dtype).tiny)
    return top * (image / top) ** gamma.reshape(-1, 1, 1, 1, 1)


def apply_bias_field(image: Tensor, log_bias_field: Tensor) -> Tensor:
    """Multiply an image by the exponential of a log field, both of shape (B, 1, H, W, D)."""
    return image * log_bias_field.exp()


def add_noise(image: Tensor, noise: Tensor, std: Tensor) -> Tensor:
    """Add Gaussian noise and keep intensities non-negative.

    Args:
        image: shape (B, 1, H, W, D).
        noise: standard normal draw of the same shape.
        std: standard deviation, shape (B,), units of the image.

    Returns:
        Image of the same shape.
    """
    return (image + noise * std.reshape(-1, 1, 1, 1, 1)).clamp_min(0)


def normalise_percentiles(image: Tensor, lower: float = 0.0, upper: float = 0.999) -> Tensor:
    """Map two quantiles of every sample to 0 and 1 and clip; a constant image becomes 0.

    The quantiles are taken on a regular subset of at most about :data:`QUANTILE_SAMPLES` voxels.

    Args:
        image: shape (B, C, H, W, D), any units.
        lower: quantile that becomes 0, in [0, 1].
        upper: quantile that becomes 1, in [0, 1].

    Returns:
        Image of the same shape in [0, 1].
    """
    step = max(1, math.ceil((math.prod(image.shape[2:]) / QUANTILE_SAMPLES) ** (1 / 3)))
    seen = image[:, :, ::step, ::step, ::step].flatten(1).float()
    level = torch.tensor([lower, upper], device=image.device)
    low, high = torch.quantile(seen, level, dim=1).to(image.dtype).reshape(2, -1, 1, 1, 1, 1)
    return ((image - low) / (high - low).clamp_min(torch.finfo(image.dtype).tiny)).clamp(0, 1)
