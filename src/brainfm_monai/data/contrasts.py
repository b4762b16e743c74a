"""Further contrasts of a subject: brought onto the reference scan, scaled, with masks of where they hold no data."""

from __future__ import annotations

import numpy as np
from nibabel.affines import voxel_sizes
from scipy import ndimage

from brainfm_monai.data.elastix import RIGID, register_linear
from brainfm_monai.data.intensities import AIR_HU, find_head, resample_to_box, scale_intensities

__all__ = ["align_scan", "check_hounsfield", "find_removed", "measure_motion", "scale_contrast"]

LOWEST_HU = -1024.0  # scanners fill with less outside of their field of view
MINIMUM_AIR_SHARE = 0.01
HEAD_FLOOR_HU = -300.0
SAME_PLACE_DICE = 0.5
SHELL_MM = (6, 14)  # skull and scalp around the brain
STRIPPED_SHARE, DEFACED_SHARE = 0.9, 0.7  # of a shell or of the face that must be exactly 0
# eyes, nose and cheeks, and the space in front of and below them that defacing tools clear, in MNI152 mm: low and high corner
FACE_MNI_MM = ((-35, 55, -65), (35, 85, -30))
FRONT_MNI_MM = ((-90, 15, -140), (90, 130, 5))


def align_scan(
    fixed: tuple[np.ndarray, np.ndarray], moving: tuple[np.ndarray, np.ndarray], is_ct: bool = False
) -> np.ndarray:
    """Rigid map from the reference's points to those of another contrast, by mutual information.

    It starts where the headers place the scans, unless the heads then hardly overlap: the scans of one session need little,
    and those of different scanners are first laid on each other by their centres of gravity.

    Args:
        fixed: reference scan and its affine to RAS mm.
        moving: other scan and its affine.
        is_ct: whether the other scan is in HU.

    Returns:
        Matrix from RAS mm of the reference to RAS mm of the other scan, shape (4, 4).

    Raises:
        RuntimeError: if elastix fails.
    """
    values, affine = moving
    if is_ct:
        values = np.clip(values, AIR_HU, 200.0) - AIR_HU  # bone would outweigh all soft tissue
    seen = resample_to_box(values, affine, fixed[1], fixed[0].shape)
    heads = [find_head(fixed[0]), find_head(seen)]
    dice = 2 * (heads[0] & heads[1]).sum() / max(1, heads[0].sum() + heads[1].sum())
    return register_linear(fixed, (values, affine), RIGID, from_headers=bool(dice > SAME_PLACE_DICE))


def measure_motion(matrix: np.ndarray, centre_mm: np.ndarray) -> dict[str, float]:
    """Angle in degrees of a rigid map and how far it takes a point, in mm."""
    cosine = np.clip((np.trace(matrix[:3, :3]) - 1) / 2, -1, 1)
    moved = matrix[:3, :3] @ centre_mm + matrix[:3, 3] - centre_mm
    return {
        "rotation_deg": round(float(np.rad2deg(np.arccos(cosine))), 2),
        "shift_mm": round(float(np.linalg.norm(moved)), 2),
    }


def check_hounsfield(values: np.ndarray, source: str) -> np.ndarray:
    """A CT in HU, with what lies below air's range lifted to it.

    Raises:
        ValueError: if hardly a voxel is as dark as air: then the scan is in other units, or has an offset.
    """
    dark = float((values < AIR_HU / 2).mean())
    if dark < MINIMUM_AIR_SHARE:
        raise ValueError(
            f"{source}: a CT in HU with air at about -1000 is needed, found {100 * dark:.2f} % of it below -500"
        )
    return np.maximum(values, LOWEST_HU)


def scale_contrast(contrast: str, values: np.ndarray) -> np.ndarray:
    """Values as they are stored: HU for CT, [0, 1] for magnetic resonance."""
    return values if contrast == "CT" else scale_intensities(values)


def find_removed(
    values: np.ndarray, affine: np.ndarray, seen: np.ndarray, ids: np.ndarray, mni_mm: np.ndarray
) -> np.ndarray:
    """Where a scan on the box of a subject holds no data: outside its field of view, where defaced, or outside the brain.

    Defacing and brain extraction set voxels to exactly 0, which the noise of air rarely is. A scan counts as brain-extracted if
    nine tenths of a shell around the brain are 0, and as defaced if seven tenths of the place of eyes and nose are.

    Args:
        values: scan on the box, before scaling, shape (H, W, D); 0 where the scan does not reach.
        affine: voxels of the box to mm.
        seen: mask of the field of view, same shape, bool.
        ids: FreeSurfer ids, same shape.
        mni_mm: MNI152 coordinates on a grid that divides the box into blocks, shape (H / n, W / n, D / n, 3).

    Returns:
        Mask, shape (H, W, D), bool.
    """
    removed = ~seen
    brain = (ids > 0) & (ids < 500)
    away = ndimage.distance_transform_edt(~brain, sampling=voxel_sizes(affine))
    empty = values == 0
    shell = (away > SHELL_MM[0]) & (away < SHELL_MM[1]) & seen
    if shell.any() and empty[shell].mean() > STRIPPED_SHARE:
        return np.asarray(removed | (empty & ~brain))
    face = _within(mni_mm, FACE_MNI_MM, values.shape) & seen
    if face.any() and empty[face].mean() > DEFACED_SHARE:
        removed = removed | (empty & _within(mni_mm, FRONT_MNI_MM, values.shape) & ~brain)
    return np.asarray(removed)


def _within(mni_mm: np.ndarray, corners: tuple[tuple[int, ...], tuple[int, ...]], shape: tuple[int, ...]) -> np.ndarray:
    """Voxels of the box whose block lies between two corners in MNI152 space."""
    inside = ((mni_mm > corners[0]) & (mni_mm < corners[1])).all(axis=-1)
    for axis in range(3):
        inside = inside.repeat(shape[axis] // inside.shape[axis], axis=axis)
    return np.asarray(inside)
