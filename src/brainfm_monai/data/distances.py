"""Signed distances to the white and pial boundaries of the cerebral hemispheres, out of labels or triangle meshes."""

import warnings
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.affines import apply_affine
from scipy.spatial import cKDTree

from brainfm_monai.io import refuse_if

# What FreeSurfer's white surface encloses: white matter, ventricles, deep grey matter, lesions, vessels in them, and
# the patches of SynthSeg's maps. Its surface passes around hippocampus and amygdala without following them, so both
# count as inside, too. Midline structures (third ventricle), brainstem and cerebellum belong to no hemisphere.
WHITE_IDS: dict[str, tuple[int, ...]] = {
    "left": (2, 4, 5, 10, 11, 12, 13, 17, 18, 25, 26, 28, 30, 31, 78, 136, 137),
    "right": (41, 43, 44, 49, 50, 51, 52, 53, 54, 57, 58, 60, 62, 63, 79, 163, 164),
}
PIAL_IDS: dict[str, tuple[int, ...]] = {"left": (*WHITE_IDS["left"], 3), "right": (*WHITE_IDS["right"], 42)}
LIMIT_MM = 7.0  # beyond the 6.4 mm at which stored distances saturate
EDGE_MM = 2.0  # of triangles: a point within the limit of one is near one of its corners
CENTRE_TOLERANCE_MM = 0.5


def compute_signed_distance(inside: np.ndarray, spacing_mm: float = 1.0) -> np.ndarray:
    """Signed Euclidean distance to the boundary of a region (H, W, D), bool, in mm, float32, negative inside.

    The transform measures from voxel centre to voxel centre across the boundary, and the boundary lies between them:
    half a voxel, isotropic, of ``spacing_mm``, is taken off on both sides. It is +inf everywhere for an empty region,
    -inf for a full one.
    """
    import edt  # of the extra "prepare": a training on prepared subjects does without it, as in the zip for a model zoo

    region = np.ascontiguousarray(inside, dtype=bool)
    if not region.any() or region.all():
        return np.full(region.shape, -np.inf if region.any() else np.inf, dtype=np.float32)
    within, beyond = (edt.edt(part, anisotropy=(spacing_mm,) * 3, parallel=1) for part in (region, ~region))
    return np.where(region, spacing_mm / 2 - within, beyond - spacing_mm / 2).astype(np.float32)


def compute_hemisphere_distances(ids: np.ndarray, spacing_mm: float = 1.0) -> np.ndarray:
    """Distances in mm, (H, W, D, 4), to left pial, left white, right pial, right white in a map of FreeSurfer ids."""
    regions = [table[side] for side in ("left", "right") for table in (PIAL_IDS, WHITE_IDS)]
    return np.stack([compute_signed_distance(np.isin(ids, region), spacing_mm) for region in regions], axis=-1)


def read_surface(path: Path, volume: Any) -> tuple[np.ndarray, np.ndarray]:
    """Read a FreeSurfer surface: vertices in scanner RAS mm, shape (V, 3), and triangles, shape (T, 3).

    The file is in surface RAS, whose origin is the middle of the subject's conformed ``volume`` (an ``MGHImage``).
    FileNotFoundError if there is no such file, ValueError if it is no surface, or was made on another volume.
    """
    refuse_if(not path.is_file(), f"{path}: a FreeSurfer surface is needed", "no such file", FileNotFoundError)
    try:
        with warnings.catch_warnings():  # older surfaces do not name their volume, of which nibabel warns
            warnings.simplefilter("ignore", UserWarning)
            vertices, triangles, info = nib.freesurfer.read_geometry(path, read_metadata=True)
    except Exception as error:  # numpy and nibabel raise several kinds for a damaged file
        raise ValueError(f"{path}: a FreeSurfer surface is needed, found {' '.join(str(error).split())}") from error
    centre = volume.header["Pxyz_c"].astype(float)
    stated = np.asarray(info.get("cras", centre), dtype=float)
    rule = f"{path}: a surface of the volume centred on {centre.round(1)} is needed"
    refuse_if(np.abs(stated - centre).max() > CENTRE_TOLERANCE_MM, rule, f"one of {stated.round(1)}")
    to_scanner = np.asarray(volume.affine) @ np.linalg.inv(volume.header.get_vox2ras_tkr())
    return vertices @ to_scanner[:3, :3].T + to_scanner[:3, 3], np.asarray(triangles, dtype=np.int64)


def compute_surface_distance(
    vertices: np.ndarray, triangles: np.ndarray, affine: np.ndarray, shape: tuple[int, int, int]
) -> np.ndarray:
    """Signed distance in mm of voxel centres to a closed triangle surface, shape (H, W, D), float32, negative inside.

    The distance is that to the triangles, whose edges have at most 2 mm, up to 7 mm; the sign is that of the winding
    number, which small holes and crossings do not upset. Vertices are in mm, shape (V, 3), triangles, all turned the
    same way, (T, 3); the affine takes voxels to these mm.
    """
    import igl  # a training on prepared subjects does without it, as on the machine of the GPU kit

    points = apply_affine(affine, np.indices(shape).reshape(3, -1).T)
    near = np.isfinite(cKDTree(vertices).query(points, distance_upper_bound=LIMIT_MM + EDGE_MM)[0])
    distance = np.full(len(points), LIMIT_MM, dtype=np.float32)
    squared = igl.point_mesh_squared_distance(points[near], vertices, triangles)[0]
    distance[near] = np.minimum(np.sqrt(squared), LIMIT_MM)
    distance[np.abs(igl.fast_winding_number(vertices, triangles, points)) > 0.5] *= -1
    return distance.reshape(shape)
