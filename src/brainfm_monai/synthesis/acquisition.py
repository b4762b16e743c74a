"""From anatomy to a scan: contrast, field, acquisition and noise of one sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from brainfm_monai.functional import intensity, separable
from brainfm_monai.synthesis.ranges import AppearanceParams
from brainfm_monai.tasks import TASKS

__all__ = ["IMAGES", "INTENSITY_TOP", "acquire", "blend_inputs", "cluster_head", "smooth_field"]

# Real contrasts, in the order of the blend after the synthetic image, with the value of air in the unit of the files.
IMAGES = {name: TASKS[name].outside * TASKS[name].scale for name in ("T1w", "T2w", "FLAIR", "CT")}
INTENSITY_TOP = 255.0  # painted intensities lie in [0, 255]; real images are brought to the same scale
QUARTILES = (-0.674, 0.0, 0.674)  # of the standard normal law


def cluster_head(mean: Tensor, head: Tensor, appearance: AppearanceParams) -> Tensor:
    """Divide the head into connected clusters with means of their own.

    Args:
        mean: painted means, (B, 1, H, W, D).
        head: share of head in a voxel, same shape.
        appearance: the draw; clusters lie between the levels of a smooth field, at the quartiles of its law.

    Returns:
        Means of the same shape.
    """
    field = smooth_field(appearance.cluster_field, appearance.cluster_spacing, mean.shape[2:])
    offsets = appearance.cluster_offset.reshape(len(mean), -1, 1, 1, 1).unbind(1)
    offset = offsets[0][:, None]
    for level, following in zip(QUARTILES, offsets[1:], strict=True):
        offset = torch.where(field > level, following[:, None], offset)
    return (mean + head * offset).clamp_min_(0)


def smooth_field(points: Tensor, spacing: Tensor, size: Sequence[int]) -> Tensor:
    """Control points at a physical distance to a field, (B, C, P, Q, R) to (B, C, H, W, D)."""
    operators = [separable.lattice_operator(spacing[:, i], n, points.shape[2 + i]) for i, n in enumerate(size)]
    return separable.apply_separable(points, operators)


def blend_inputs(painted: Tensor, images: Mapping[str, Tensor], appearance: AppearanceParams) -> Tensor:
    """Convex mixture of the synthetic image and the real images, all on one scale.

    Args:
        painted: (B, 1, H, W, D), in [0, 255] or a little above.
        images: real images in the unit of the files, at the same place as ``painted``.
        appearance: the draw; its blend is one-hot but for mixtures.

    Returns:
        Image of the same shape.
    """
    weights = appearance.blend.reshape(len(painted), -1, 1, 1, 1, 1).unbind(1)
    out = painted * weights[0]
    for name, image in images.items():
        scaled = intensity.apply_window(image, appearance.ct_window) if name == "CT" else image
        out = torch.addcmul(out, scaled, weights[1 + list(IMAGES).index(name)] * INTENSITY_TOP)
    return out


def acquire(image: Tensor, appearance: AppearanceParams) -> tuple[Tensor, Tensor, Tensor]:
    """Gamma, bias field, slices with their profile and ghosts, noise, and interpolation back to the voxels.

    Args:
        image: non-negative, (B, 1, H, W, D).
        appearance: the draw.

    Returns:
        The scan on the same grid, the log of the bias field, and the image before slices and noise.
    """
    size = image.shape[2:]
    log_bias_field = smooth_field(appearance.bias, appearance.bias_spacing, size)
    image = intensity.apply_gamma(image, appearance.gamma) * log_bias_field.exp()
    slices, back = [], []
    for i, n in enumerate(size):
        ghost = separable.ghost_operator(appearance.ghost_count[:, i], appearance.ghost_strength[:, i], n)
        slices.append(separable.slice_operator(appearance.spacing[:, i], appearance.sigma[:, i], n) @ ghost)
        back.append(separable.upsampling_operator(appearance.spacing[:, i], n))
    signal = separable.apply_separable(image, slices).abs()
    noisy = intensity.add_noise(signal, appearance.noise, appearance.noise_std, appearance.rician)
    return separable.apply_separable(noisy, back), log_bias_field, image
