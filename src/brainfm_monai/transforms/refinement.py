"""The white surface at the resolution of the scan: where its intensity is halfway between white and grey matter."""

import torch
import torch.nn.functional as nnf
from monai.networks.layers import GaussianFilter
from torch import Tensor

REACH_MM = 5.0  # standard deviation of the Gaussian over which the intensity of a tissue is averaged
POOLED_MM = 3.0  # voxels in which that is done
SLOPE_MM = 1.5  # way over which the intensity goes from one tissue to the other, in a scan of 1 mm
ERROR_MM = 0.8  # of the predicted white surface: of 0.4, 0.6, 0.8 and 1.2 mm the best, see docs/outputs.md
FARTHEST_MM = (1.2, 2.2)  # from the predicted surface: up to the first the scan counts fully, beyond the second not
LEAST_NOISE = 0.005  # of the range of intensities
LEAST_CONTRAST, FULL_CONTRAST = 0.25, 0.75  # of the median, where the scan counts not at all, and fully
ROBUST_STD = 1.4826  # standard deviation of a normal distribution over its median absolute deviation


def measure_white(white: Tensor, pial: Tensor, image: Tensor, voxel_mm: float = 1.0) -> tuple[Tensor, Tensor]:
    """What the scan shows of the white surface; any contrast, as the tissues are taken from the scan.

    The intensity of white and grey matter is averaged over the neighbourhood on either side of the predicted surface.
    The scan's share of white matter then gives a distance of its own. Its weight against the prediction is that of
    inverse variance: the scan counts little where tissues differ little against its noise (CT), and not at all where
    the contrast is another than in most places (ventricles, hippocampus), or outside of the pial surface.

    Args:
        white: predicted signed distance to the white surface in mm, negative inside, shape (H, W, D).
        pial: that to the pial surface.
        image: the scan in the same grid, in [0, 1].
        voxel_mm: size of the isotropic voxels.

    Returns:
        The measured distance in mm, and its weight from 0 to 1, both of shape (H, W, D).
    """
    near = white.abs() < FARTHEST_MM[0]
    inner = (-white - 0.5).clamp(0, 1) * (white > -2.9)  # distances end at -3 mm
    outer = (white - 0.3).clamp(0, 1) * (-pial - 0.3).clamp(0, 1)
    means = _average(torch.stack([inner, inner * image, outer, outer * image]), voxel_mm)
    white_matter, grey_matter = means[1] / means[0].clamp_min(1e-6), means[3] / means[2].clamp_min(1e-6)
    contrast = white_matter - grey_matter
    core = inner > 0.9
    if not near.any() or not core.any():
        return white, torch.zeros_like(white)
    usual = contrast[near].median()
    unit = torch.where(usual == 0, 1, usual)
    noise = (ROBUST_STD * (image[core] - white_matter[core]).abs().median()).clamp_min(LEAST_NOISE)
    relative = contrast / unit
    share = (image - grey_matter) / (relative.clamp_min(LEAST_CONTRAST) * unit)
    measured = ((0.5 - share) * SLOPE_MM).clamp(-1, 1)
    certainty = usual**2 / (usual**2 + (noise * SLOPE_MM / ERROR_MM) ** 2)
    usable = ((relative - LEAST_CONTRAST) / (FULL_CONTRAST - LEAST_CONTRAST)).clamp(0, 1) * (-pial).clamp(0, 1)
    usable *= ((FARTHEST_MM[1] - white.abs()) / (FARTHEST_MM[1] - FARTHEST_MM[0])).clamp(0, 1)
    return measured, certainty * usable


def _average(volumes: Tensor, voxel_mm: float) -> Tensor:
    """Volumes (C, H, W, D) averaged with a Gaussian, in larger voxels."""
    size = volumes.shape[1:]
    pooled = nnf.interpolate(volumes[None], size=[max(round(n * voxel_mm / POOLED_MM), 1) for n in size], mode="area")
    smooth = GaussianFilter(3, REACH_MM / POOLED_MM)(pooled)
    return nnf.interpolate(smooth, size=size, mode="trilinear")[0]
