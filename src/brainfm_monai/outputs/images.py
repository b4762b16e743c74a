"""Maps as files: synthetic contrasts, the bias field and the scan without it, lesions, age, embedding, scales of error."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor

from brainfm_monai.io import read_volume, write_table
from brainfm_monai.outputs.result import ScanResult, resample
from brainfm_monai.outputs.segmentation import compute_volumes_mm3

__all__ = [
    "LESION_IDS",
    "insert_lesions",
    "save_map",
    "sharpen",
    "write_age",
    "write_bias_field",
    "write_embedding",
    "write_lesions",
    "write_synthetic_images",
    "write_uncertainty",
]

LESION_IDS = frozenset({25, 57, 77, 78, 79, 99})  # FreeSurfer ids of lesions and white-matter hypointensities
SHARPEN_SIGMA_MM = 1.0  # of the Gaussian whose difference is added: the width of a voxel
SMALLEST_FACTOR = 1e-3  # of a bias field that a scan is divided by
LESION_THRESHOLD = 0.5
FAR_MM = 10  # healthy tissue around a lesion, from which the scan's and the synthetic intensities are related


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
    labels = scan.maps["segmentation"].cpu().numpy()[0]
    lesions = own = None
    if scan.settings.keep_lesions:
        lesions = _lesion_mask(scan, scan.layout.protocol.freesurfer_ids[labels])
        own = resample(scan.image, labels.shape, scan.network_affine).cpu().numpy()[0]
    for entry, task in scan.layout.maps.items():
        if task.kind != "image" or entry not in scan.maps:
            continue
        image = sharpen(scan.maps[entry].cpu().numpy()[0], scan.settings.sharpen)
        if lesions is not None and own is not None:
            image = insert_lesions(image, own, lesions, labels > 0)
        save_map(scan, entry, image, f"{entry} as the network makes it of the scan, 1 mm", scan.network_affine,
              LesionsOfTheScan=lesions is not None)  # fmt: skip


def save_map(
    scan: ScanResult, entry: str, values: np.ndarray, text: str, affine: np.ndarray | None = None, **sidecar: object
) -> None:
    """Write a map, (H, W, D) or (H, W, D, C), under the name, in the unit and in the steps of its row in the table of tasks."""
    task = scan.layout.maps[entry]
    entries = {"Units": task.output_unit, "Description": text, **sidecar}
    if values.ndim > 3:
        entries["Channels"] = list(task.channel_names)
    scan.save_image(task.stem, values, affine, task.step, **entries)


def _lesion_mask(scan: ScanResult, ids: np.ndarray) -> np.ndarray:
    """Where the scan has lesions, in the network's grid: labels of lesions, and the mask that came with the scan."""
    mask = np.isin(ids, sorted(LESION_IDS))
    if scan.lesions:
        given = read_volume(scan.lesions)  # which may be empty
        lesions = MetaTensor(
            torch.from_numpy((given.values > 0).astype(np.float32))[None], torch.from_numpy(given.affine)
        )
        moved = resample(lesions, ids.shape, scan.network_affine, mode="nearest", padding_mode="zeros")
        mask |= moved.numpy()[0] > 0
    return mask


def write_bias_field(scan: ScanResult) -> None:
    """Write the bias field, a factor, and the scan divided by it; the field's median in the head is 1.

    The scale of a bias field is free: the network's is that of its training, and of no meaning in a scan.
    """
    field = scan.in_grid("bias_field")[0]
    head = scan.labels > 0
    field = field / (np.median(field[head]) if head.any() else 1.0)
    corrected = scan.image.cpu().numpy()[0] / field.clip(min=SMALLEST_FACTOR)
    text = "the scan is too bright by this factor; median in the head 1"
    save_map(scan, "bias_field", field, text)
    scan.save_image(
        "desc-biascorrected_image", corrected, Units="as in the scan", Description="the scan divided by the bias field"
    )


def write_lesions(scan: ScanResult) -> None:
    """Write the probability of lesions, the mask where it is above a half, and the volume and place of each lesion."""
    from scipy import ndimage  # an optional dependency

    probability = scan.in_grid("lesion")[0]
    mask = probability > LESION_THRESHOLD
    save_map(scan, "lesion", probability, "probability of a lesion")
    scan.save_image("label-lesion_mask", mask.astype(np.uint8), Description=f"probability above {LESION_THRESHOLD}")
    pieces, count = ndimage.label(mask, np.ones((3, 3, 3)))
    volumes = compute_volumes_mm3(pieces, scan.affine, count + 1)[1:]
    centres = np.reshape(ndimage.center_of_mass(mask, pieces, range(1, count + 1)), (-1, 3))
    rows = [
        (index, f"{volume:.1f}", *(f"{x:.1f}" for x in nib.affines.apply_affine(scan.affine, centre)))
        for index, (volume, centre) in enumerate(zip(volumes, centres, strict=True), 1)
    ]
    write_table(scan.path("lesions.tsv"), ("index", "volume_mm3", "x_mm", "y_mm", "z_mm"), rows)
    scan.summary.update({"lesion_count": count, "lesion_volume_ml": round(float(volumes.sum()) / 1000, 3)})


def write_age(scan: ScanResult) -> None:
    """Write the age, the mean of its map over the head, in years: ``_age.json``, and a column of the summary."""
    head = scan.maps["segmentation"].cpu().numpy() > 0
    ages = scan.maps["age"].cpu().numpy()
    scan.summary["age_years"] = round(float(ages[head].mean() if head.any() else ages.mean()), 1)
    scan.write_sidecar("age", Age=scan.summary["age_years"], Units=scan.layout.maps["age"].output_unit)


def write_embedding(scan: ScanResult) -> None:
    """Write the embedding of every voxel in the network's grid, a vector of length 1: ``_desc-embedding_features``."""
    vectors = np.moveaxis(scan.maps["embedding"].cpu().numpy(), 0, -1)
    text = "vectors of length 1, to be compared by their cosine"
    save_map(scan, "embedding", vectors, text, scan.network_affine)


def write_uncertainty(scan: ScanResult) -> None:
    """Write the scale of the error of every map that has one, in the unit of the map: ``_<file of the map>scale``."""
    for entry, task in scan.layout.maps.items():
        if task.kind == "log_scale" and entry in scan.maps:
            values = np.moveaxis(scan.in_grid(entry), 0, -1)
            text = "scale b of the error by Laplace's law exp(-|error| / b) / 2b, as the network predicts it"
            save_map(scan, entry, values[..., 0] if task.channels == 1 else values, text)
