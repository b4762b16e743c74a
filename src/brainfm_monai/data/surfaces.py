"""Signed distances to triangle surfaces in mm, and the surfaces of FreeSurfer in scanner space."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import igl
import nibabel as nib
import numpy as np
from scipy import ndimage

__all__ = ["compute_surface_distance", "read_surface"]

LIMIT_MM = 7.0  # beyond the 6.4 mm at which stored distances saturate
CENTRE_TOLERANCE_MM = 0.5


def read_surface(path: Path, volume: Any) -> tuple[np.ndarray, np.ndarray]:
    """Read a FreeSurfer surface and take its vertices from surface RAS to scanner RAS.

    Surface RAS has its origin in the middle of the conformed volume; scanner RAS is what the affines of volumes speak of.

    Args:
        path: surface file (``lh.white``, ``rh.pial``, ...).
        volume: the subject's conformed volume (``nibabel.freesurfer.MGHImage`` of ``orig.mgz`` or one on its grid).

    Returns:
        Vertices in scanner RAS mm, shape (V, 3), and triangles, shape (T, 3).

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no surface, or was made on another volume.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: a FreeSurfer surface is needed, found no such file")
    try:
        with warnings.catch_warnings():  # older surfaces do not name their volume, of which nibabel warns
            warnings.simplefilter("ignore", UserWarning)
            vertices, triangles, info = nib.freesurfer.read_geometry(path, read_metadata=True)
    except Exception as error:  # numpy and nibabel raise several kinds for a damaged file
        raise ValueError(f"{path}: a FreeSurfer surface is needed, found {' '.join(str(error).split())}") from error
    header = volume.header
    centre = header["Pxyz_c"].astype(float)
    stated = np.asarray(info.get("cras", centre), dtype=float)
    if np.abs(stated - centre).max() > CENTRE_TOLERANCE_MM:
        raise ValueError(
            f"{path}: a surface of the volume centred on {centre.round(1)} is needed, found one of {stated.round(1)}"
        )
    to_scanner = np.asarray(volume.affine) @ np.linalg.inv(header.get_vox2ras_tkr())
    return vertices @ to_scanner[:3, :3].T + to_scanner[:3, 3], np.asarray(triangles, dtype=np.int64)


def compute_surface_distance(
    vertices: np.ndarray,
    triangles: np.ndarray,
    affine: np.ndarray,
    shape: tuple[int, int, int],
    limit_mm: float = LIMIT_MM,
) -> np.ndarray:
    """Signed distance of voxel centres to a closed triangle surface, negative inside.

    The distance is that to the triangles themselves; the sign is that of the winding number, which small holes and crossings do
    not upset. Voxels further away than ``limit_mm`` get that distance.

    Args:
        vertices: in mm, shape (V, 3).
        triangles: shape (T, 3), all turned the same way.
        affine: voxels of about 1 mm to the vertices' mm, shape (4, 4).
        shape: size of the volume.
        limit_mm: largest distance that is told apart.

    Returns:
        Distance in mm, shape (H, W, D), float32.
    """
    near = _near_surface(vertices, affine, shape, limit_mm)
    index = np.argwhere(near)
    distance = np.full(shape, limit_mm, dtype=np.float32)
    if len(index):
        points = index @ affine[:3, :3].T + affine[:3, 3]
        squared = igl.point_mesh_squared_distance(points, vertices, triangles)[0]
        distance[tuple(index.T)] = np.minimum(np.sqrt(squared), limit_mm)
    # away from the surface the sign changes nowhere inside a connected region: one voxel tells for all of it
    regions, count = ndimage.label(~near)
    firsts = np.unique(regions, return_index=True)[1][1:] if count and near.any() else np.flatnonzero(regions == 1)[:1]
    representatives = np.stack(np.unravel_index(firsts, shape), axis=-1)
    asked = np.concatenate([index, representatives]) @ affine[:3, :3].T + affine[:3, 3]
    inside = np.abs(igl.fast_winding_number(vertices, triangles, asked)) > 0.5
    distance[tuple(index[inside[: len(index)]].T)] *= -1
    enclosed = regions.ravel()[firsts][inside[len(index) :]]
    distance[np.isin(regions, enclosed)] *= -1
    return distance


def _near_surface(vertices: np.ndarray, affine: np.ndarray, shape: tuple[int, int, int], limit_mm: float) -> np.ndarray:
    """Voxels that may lie within ``limit_mm`` of a surface with edges of at most 2 mm, shape (H, W, D), bool."""
    to_voxel = np.linalg.inv(affine)
    voxels = np.rint(vertices @ to_voxel[:3, :3].T + to_voxel[:3, 3]).astype(int)
    margin = int(np.ceil(limit_mm)) + 2
    padded = np.zeros([n + 2 * margin for n in shape], dtype=bool)  # surfaces may leave the box
    voxels = voxels[((voxels >= -margin) & (voxels < np.array(shape) + margin)).all(axis=1)] + margin
    padded[tuple(voxels.T)] = True
    far = ndimage.distance_transform_edt(~padded) if padded.any() else np.full(padded.shape, np.inf)
    return np.asarray(far[margin:-margin, margin:-margin, margin:-margin] <= margin)
