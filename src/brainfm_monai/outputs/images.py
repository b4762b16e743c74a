"""Images: the contrasts that the network makes of a scan, the bias field, and the scan without it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from brainfm_monai.outputs.result import ScanResult, resample
from brainfm_monai.transforms import read_scan

__all__ = ["LESION_IDS", "insert_lesions", "sharpen", "write_bias_field", "write_synthetic_images"]

LESION_IDS = frozenset({25, 57, 77, 78, 79, 99})  # FreeSurfer ids of lesions and white-matter hypointensities
SHARPEN_SIGMA_MM = 1.0  # of the Gaussian whose difference is added: the width of a voxel
BIAS_STEP = 1e-3  # a tenth of a per cent
FAR_MM = 10  # healthy tissue around a lesion, from which the scan's and the synthetic intensities are related
NAMES = {"CT": "ct", "super_resolution": "desc-superres_image"}  # BIDS suffixes where they are not the task's name


def sharpen(image: np.ndarray, strength: float, sigma_mm: float = SHARPEN_SIGMA_MM) -> np.ndarray:
    """Add the difference from a Gaussian average: image + strength (image - average); 0 changes nothing.

    Args:
        image: shape (H, W, D), voxels of 1 mm.
        strength: factor of the difference, from 0.
        sigma_mm: width of the Gaussian.
    """
    from scipy.ndimage import gaussian_filter  # an optional dependency

    return image if strength == 0 else np.asarray(image + strength * (image - gaussian_filter(image, sigma_mm)))


def insert_lesions(synthetic: np.ndarray, scan: np.ndarray, lesions: np.ndarray, brain: np.ndarray) -> np.ndarray:
    """Put the scan's own lesions into a synthetic image.

    The scan's intensities are taken to those of the synthetic image by the straight line that fits healthy tissue around the
    lesions best (least squares): where the contrast of tissues is turned around, that of the lesion is, too.

    Args:
        synthetic: shape (H, W, D).
        scan: the scan in the same grid.
        lesions: bool, shape (H, W, D).
        brain: bool, shape (H, W, D), where intensities are compared.

    Returns:
        The synthetic image, changed within the lesions alone; unchanged where there are none, or no tissue around.
    """
    from scipy.ndimage import distance_transform_edt  # an optional dependency

    if not lesions.any():
        return synthetic
    around = brain & ~lesions & (distance_transform_edt(~lesions) <= FAR_MM)
    if around.sum() < 2 or np.ptp(scan[around]) == 0:
        return synthetic
    slope, offset = np.polyfit(scan[around].astype(np.float64), synthetic[around].astype(np.float64), 1)
    return np.where(lesions, slope * scan + offset, synthetic).astype(np.float32)


def write_synthetic_images(scan: ScanResult) -> None:
    """Write ``_T1w``, ``_T2w``, ``_FLAIR``, ``_ct`` (HU) and the super-resolved scan, as far as the network has them, at 1 mm."""
    tasks = {name: task for name, task in scan.layout.tasks.items() if task.kind == "image" and name in scan.maps}
    segmentation = scan.maps["segmentation"].cpu().numpy()[0]
    ids = scan.layout.protocol.freesurfer_ids[segmentation]
    affine = scan.network_affine
    lesions = _lesion_mask(scan, ids) if scan.settings.keep_lesions else None
    for name, task in tasks.items():
        image = sharpen(scan.maps[name].cpu().numpy()[0], scan.settings.sharpen)
        if lesions is not None:
            own = resample(scan.image, segmentation.shape, affine).cpu().numpy()[0]
            image = insert_lesions(image, own, lesions, segmentation > 0)
        step = 1.0 if task.output_unit == "HU" else None
        scan.save_image(
            f"desc-synthetic_{NAMES.get(name, name)}" if name != "super_resolution" else NAMES[name],
            image,
            affine,
            step=step,
            Units=task.output_unit,
            Description=f"{name} as the network makes it of the scan, 1 mm",
            LesionsOfTheScan=lesions is not None,
        )


def _lesion_mask(scan: ScanResult, ids: np.ndarray) -> np.ndarray:
    """Where the scan has lesions, in the network's grid: labels of lesions, and the mask that came with the scan."""
    mask = np.isin(ids, sorted(LESION_IDS))
    if scan.lesions:
        given = read_scan(Path(scan.lesions))
        mask |= (
            resample((given > 0).float(), ids.shape, scan.network_affine, mode="nearest", padding_mode="zeros").numpy()[
                0
            ]
            > 0.5
        )
    return mask


def write_bias_field(scan: ScanResult) -> None:
    """Write the bias field, a factor, and the scan divided by it; the field's median in the head is 1.

    The scale of a bias field is free: the network's is that of its training, and of no meaning in a scan.
    """
    field = scan.in_grid("bias_field")[0]
    head = scan.labels > 0
    field = field / (np.median(field[head]) if head.any() else 1.0)
    corrected = scan.image.cpu().numpy()[0] / torch.from_numpy(field).clamp_min(1e-3).numpy()
    scan.save_image(
        "biasfield",
        field,
        step=BIAS_STEP,
        Units="factor",
        Description="the scan is too bright by this factor; median in the head 1",
    )
    scan.save_image(
        "desc-biascorrected_image", corrected, Units="as in the scan", Description="the scan divided by the bias field"
    )
