"""Signed distances to the white and pial boundaries of the cerebral hemispheres, out of labels or triangle meshes."""

import warnings
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.affines import apply_affine
from scipy import ndimage

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
CENTRE_TOLERANCE_MM = 0.5


def compute_signed_distance(inside: np.ndarray, spacing_mm: float = 1.0) -> np.ndarray:
    """Signed Euclidean distance to the boundary of a region, in mm, float32, negative inside.

    The transform measures from voxel centre to voxel centre across the boundary, and the boundary lies between them:
    half a voxel is taken off on both sides. The region has shape (H, W, D), bool, and isotropic voxels of
    ``spacing_mm``; the distance is +inf everywhere for an empty region, -inf for a full one.
    """
    import edt  # of the extra "prepare": a training on prepared subjects does without it, as in the zip for a model zoo

    region = np.ascontiguousarray(inside, dtype=bool)
    if not region.any() or region.all():
        return np.full(region.shape, -np.inf if region.any() else np.inf, dtype=np.float32)
    within, beyond = (edt.edt(part, anisotropy=(spacing_mm,) * 3, parallel=1) for part in (region, ~region))
    return np.where(region, spacing_mm / 2 - within, beyond - spacing_mm / 2).astype(np.float32)


def compute_hemisphere_distances(ids: np.ndarray, spacing_mm: float = 1.0) -> np.ndarray:
    """Distances in mm, negative inside, to the boundaries of the cerebral cortex in a map of FreeSurfer ids (H, W, D).

    Voxels are isotropic; the result is (H, W, D, 4): left pial, left white, right pial, right white.
    """
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

    The distance is that to the triangles themselves; the sign is that of the winding number, which small holes and
    crossings do not upset. Voxels further away than 7 mm get that distance. Vertices are in mm, shape (V, 3),
    triangles, all turned the same way, (T, 3); the affine takes voxels of about 1 mm to these mm.
    """
    import igl  # a training on prepared subjects does without it, as on the machine of the GPU kit

    # voxels that may lie within the limit of a surface with edges of at most 2 mm; surfaces may leave the box
    margin = int(np.ceil(LIMIT_MM)) + 2
    voxels = np.rint(apply_affine(np.linalg.inv(affine), vertices)).astype(int)
    voxels = voxels[((voxels >= -margin) & (voxels < np.array(shape) + margin)).all(axis=1)] + margin
    padded = np.zeros([n + 2 * margin for n in shape], dtype=bool)
    padded[tuple(voxels.T)] = True
    far = ndimage.distance_transform_edt(~padded) if padded.any() else np.full(padded.shape, np.inf)
    near = (far <= margin)[margin:-margin, margin:-margin, margin:-margin]
    index = np.argwhere(near)
    distance = np.full(shape, LIMIT_MM, dtype=np.float32)
    if len(index):
        points = index @ affine[:3, :3].T + affine[:3, 3]
        squared = igl.point_mesh_squared_distance(points, vertices, triangles)[0]
        distance[near] = np.minimum(np.sqrt(squared), LIMIT_MM)
    # away from the surface the sign changes nowhere inside a connected region: one voxel tells for all of it
    regions, count = ndimage.label(~near)
    firsts = np.unique(regions, return_index=True)[1][1:] if count and near.any() else np.flatnonzero(regions == 1)[:1]
    representatives = np.stack(np.unravel_index(firsts, shape), axis=-1)
    asked = np.concatenate([index, representatives]) @ affine[:3, :3].T + affine[:3, 3]
    inside = np.abs(igl.fast_winding_number(vertices, triangles, asked)) > 0.5
    distance[tuple(index[inside[: len(index)]].T)] *= -1
    distance[np.isin(regions, regions.ravel()[firsts][inside[len(index) :]])] *= -1
    return distance
