"""From anatomy to a scan: contrast, lesions, field, acquisition and noise of one sample."""

from collections.abc import Mapping

import torch
from torch import Tensor

from brainfm_monai.functional import intensity, separable
from brainfm_monai.synthesis.ranges import IMAGES, INTENSITY_TOP, QUARTILES
from brainfm_monai.synthesis.sampling import Appearance

GAMMA_TOP = 300.0  # intensity that a gamma leaves alone (BrainFM)


def paint(
    painted: Tensor, number: int, images: Mapping[str, Tensor], lesions: tuple[Tensor, Tensor] | None, removed: Tensor,
    appearance: Appearance,
) -> Tensor:  # fmt: skip
    """The undegraded image of one sample, (B, 1, H, W, D), in [0, 255] or a little above.

    ``painted`` are the shares of the subject's box and of head in a voxel, then mean and std of each sample. Images are
    in the unit of the files, lesions are own and given ones, and what is ``removed`` is painted as background.
    """
    outside, head = 1 - painted[:, :1], painted[:, 1:2]
    air_mean, air_std = (value[:, 0].reshape(-1, 1, 1, 1, 1) for value in (appearance.mean, appearance.std))
    goal, change = (v.reshape(-1, 1, 1, 1, 1) for v in (appearance.lesion_goal, appearance.lesion_change))
    shares = dict(zip(("synthetic", *IMAGES), appearance.blend[..., None, None, None, None].unbind(1), strict=True))
    mean = painted[:, 2 + 2 * number, None] + outside * air_mean
    std = painted[:, 3 + 2 * number, None] + outside * air_std
    if appearance.cluster_offset.shape[1]:
        # Connected clusters of the head lie between the levels of a smooth field, at the quartiles of its law.
        field = separable.interpolate_lattice(appearance.cluster_field, appearance.cluster_spacing, mean.shape[2:])
        offset, *following = appearance.cluster_offset[:, None, :, None, None, None].unbind(2)
        for level, above in zip(QUARTILES, following, strict=True):
            offset = torch.where(field > level, above, offset)
        mean = (mean + head * offset).clamp_min_(0)
    mean, std = torch.where(removed, air_mean, mean), torch.where(removed, air_std, std)
    # Texture of SynthSeg (Billot et al., Medical Image Analysis 86, 2023), and a convex mixture with the real images
    synthetic = torch.addcmul(mean, std, appearance.paint_noise).clamp_min_(0)
    image = synthetic * shares["synthetic"]
    for name, values in images.items():
        scaled = intensity.apply_window(values, appearance.ct_window) if name == "CT" else values
        image = torch.addcmul(image, scaled, shares[name] * INTENSITY_TOP)
    if images:  # what is removed shows no real image either
        image = torch.where(removed, synthetic * shares["synthetic"], image)
    if lesions is None:
        return image
    # Real images already show the subject's own lesions.
    amount = torch.maximum(lesions[0] * shares["synthetic"], lesions[1])
    return torch.lerp(image, goal.expand_as(image), amount * change)


def acquire(image: Tensor, appearance: Appearance) -> tuple[Tensor, Tensor, Tensor]:
    """Scan, log of the bias field, and image before slices and noise, of a non-negative image (B, 1, H, W, D)."""
    size = image.shape[2:]
    log_bias_field = separable.interpolate_lattice(appearance.bias, appearance.bias_spacing, size)
    image = GAMMA_TOP * (image / GAMMA_TOP) ** appearance.gamma.reshape(-1, 1, 1, 1, 1) * log_bias_field.exp()
    slices, back = [], []
    for i, n in enumerate(size):
        ghost = separable.ghost_operator(appearance.ghost_count[:, i], appearance.ghost_strength[:, i], n)
        slices.append(separable.slice_operator(appearance.spacing[:, i], appearance.sigma[:, i], n) @ ghost)
        back.append(separable.upsampling_operator(appearance.spacing[:, i], n))
    signal = separable.apply_separable(image, slices).abs()
    noisy = intensity.add_noise(signal, appearance.noise, appearance.noise_std, appearance.rician)
    return separable.apply_separable(noisy, back), log_bias_field, image
