"""Signed distances to the white and pial boundaries of the cerebral hemispheres, out of a label map."""

from __future__ import annotations

import edt
import numpy as np

__all__ = ["PIAL_IDS", "WHITE_IDS", "compute_hemisphere_distances", "compute_signed_distance"]

# What FreeSurfer's white surface encloses: white matter, ventricles, deep grey matter, lesions, vessels in them, and the patches
# of SynthSeg's maps. Its surface passes around hippocampus and amygdala without following them, so both count as inside, too.
# Midline structures (third ventricle), brainstem and cerebellum belong to no hemisphere.
WHITE_IDS: dict[str, tuple[int, ...]] = {
    "left": (2, 4, 5, 10, 11, 12, 13, 17, 18, 25, 26, 28, 30, 31, 78, 136, 137),
    "right": (41, 43, 44, 49, 50, 51, 52, 53, 54, 57, 58, 60, 62, 63, 79, 163, 164),
}
PIAL_IDS: dict[str, tuple[int, ...]] = {"left": (*WHITE_IDS["left"], 3), "right": (*WHITE_IDS["right"], 42)}


def compute_signed_distance(inside: np.ndarray, spacing_mm: float = 1.0) -> np.ndarray:
    """Signed Euclidean distance to the boundary of a region, negative inside.

    The transform measures from voxel centre to voxel centre across the boundary, and the boundary lies between them: half a voxel
    is taken off on both sides, so that the zero crossing is on the faces of the voxels.

    Args:
        inside: the region, shape (H, W, D), bool, isotropic voxels.
        spacing_mm: size of the voxels.

    Returns:
        Distance in mm, shape (H, W, D), float32; +inf everywhere for an empty region, -inf for a full one.
    """
    region = np.ascontiguousarray(inside, dtype=bool)
    if not region.any() or region.all():
        return np.full(region.shape, -np.inf if region.any() else np.inf, dtype=np.float32)
    within = edt.edt(region, anisotropy=(spacing_mm,) * 3, parallel=1)
    beyond = edt.edt(~region, anisotropy=(spacing_mm,) * 3, parallel=1)
    return np.where(region, spacing_mm / 2 - within, beyond - spacing_mm / 2).astype(np.float32)


def compute_hemisphere_distances(ids: np.ndarray, spacing_mm: float = 1.0) -> np.ndarray:
    """Signed distances to the four boundaries of the cerebral cortex.

    Args:
        ids: map of FreeSurfer ids, shape (H, W, D), isotropic voxels.
        spacing_mm: size of the voxels.

    Returns:
        Distances in mm, negative inside, shape (H, W, D, 4): left pial, left white, right pial, right white.
    """
    regions = [table[side] for side in ("left", "right") for table in (PIAL_IDS, WHITE_IDS)]
    return np.stack([compute_signed_distance(np.isin(ids, region), spacing_mm) for region in regions], axis=-1)
