"""From anatomy to a scan: contrast, lesions, field, acquisition and noise of one sample."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from brainfm_monai.functional import intensity, separable
from brainfm_monai.synthesis.contrasts import CONTRASTS
from brainfm_monai.synthesis.ranges import AppearanceParams
from brainfm_monai.tasks import TASKS

# Real contrasts, in the order of the blend after the synthetic image, with the value of air in the unit of the files.
IMAGES = {name: TASKS[name].outside * TASKS[name].scale for name in CONTRASTS}
INTENSITY_TOP = 255.0  # painted intensities lie in [0, 255]; real images are brought to the same scale
QUARTILES = (-0.674, 0.0, 0.674)  # of the standard normal law


def cluster_head(mean: Tensor, head: Tensor, appearance: AppearanceParams) -> Tensor:
    """Divide the head into connected clusters with means of their own.

    Clusters lie between the levels of a smooth field, at the quartiles of its law. ``mean`` are the painted means,
    ``head`` is the share of head in a voxel, both (B, 1, H, W, D).
    """
    field = separable.interpolate_lattice(appearance.cluster_field, appearance.cluster_spacing, mean.shape[2:])
    offset, *following = appearance.cluster_offset[:, None, :, None, None, None].unbind(2)
    for level, above in zip(QUARTILES, following, strict=True):
        offset = torch.where(field > level, above, offset)
    return (mean + head * offset).clamp_min_(0)


def blend_inputs(painted: Tensor, images: Mapping[str, Tensor], appearance: AppearanceParams) -> Tensor:
    """Convex mixture of the synthetic image and the real images, all on one scale; one-hot but for mixtures.

    ``painted`` is (B, 1, H, W, D), in [0, 255] or a little above; the images are in the unit of the files.
    """
    weights = dict(zip(("synthetic", *IMAGES), appearance.blend[..., None, None, None, None].unbind(1), strict=True))
    out = painted * weights["synthetic"]
    for name, image in images.items():
        scaled = intensity.apply_window(image, appearance.ct_window) if name == "CT" else image
        out = torch.addcmul(out, scaled, weights[name] * INTENSITY_TOP)
    return out


def paint_lesions(image: Tensor, lesions: tuple[Tensor, Tensor] | None, appearance: AppearanceParams) -> Tensor:
    """Make lesions, own and given ones, brighter or darker; real images already show the subject's own.

    ``image``, in [0, 255] or a little above, and lesions are (B, 1, H, W, D).
    """
    if lesions is None:
        return image
    looks = (appearance.lesion_goal, appearance.lesion_change, appearance.blend[:, 0])
    goal, change, synthetic = (value.reshape(-1, 1, 1, 1, 1) for value in looks)
    amount = torch.maximum(lesions[0] * synthetic, lesions[1])
    return torch.lerp(image, goal.expand_as(image), amount * change)


def acquire(image: Tensor, appearance: AppearanceParams) -> tuple[Tensor, Tensor, Tensor]:
    """Gamma, bias field, slices with their profile and ghosts, noise, and interpolation back to the voxels.

    Args:
        image: non-negative, (B, 1, H, W, D).
        appearance: the draw.

    Returns:
        The scan on the same grid, the log of the bias field, and the image before slices and noise.
    """
    size = image.shape[2:]
    log_bias_field = separable.interpolate_lattice(appearance.bias, appearance.bias_spacing, size)
    image = intensity.apply_gamma(image, appearance.gamma) * log_bias_field.exp()
    slices, back = [], []
    for i, n in enumerate(size):
        ghost = separable.ghost_operator(appearance.ghost_count[:, i], appearance.ghost_strength[:, i], n)
        slices.append(separable.slice_operator(appearance.spacing[:, i], appearance.sigma[:, i], n) @ ghost)
        back.append(separable.upsampling_operator(appearance.spacing[:, i], n))
    signal = separable.apply_separable(image, slices).abs()
    noisy = intensity.add_noise(signal, appearance.noise, appearance.noise_std, appearance.rician)
    return separable.apply_separable(noisy, back), log_bias_field, image
