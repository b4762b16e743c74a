"""White and pial surfaces of a hemisphere out of its signed distances, vertex by vertex in correspondence."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as nnf
from monai.networks.layers import GaussianFilter
from monai.transforms.utils import generate_spatial_bounding_box
from nibabel.affines import apply_affine
from scipy import sparse
from torch import Tensor

from brainfm_monai.functional.spatial import warp_all
from brainfm_monai.surfaces.crossings import remove_crossings
from brainfm_monai.surfaces.measures import compute_thickness_mm
from brainfm_monai.surfaces.topology import extract_sphere

GRID_MM = 1.1  # of the level from which the white surface is taken: vertices lie about 1 mm apart
RELAXATIONS = 12  # rounds in which vertices spread along the white surface and return to its level
MARGIN = 3  # voxels around a hemisphere
STEPS, STEP = 36, 0.25  # of the growth from white to pial, in units of a fall of the distance to 1/e
STILL_MM = 0.005  # a vertex that moves less in a step has arrived
FASTEST_MM = 1.0  # per unit: distance to the pial surface beyond which a vertex does not move faster
SMOOTHING_MM = 0.7  # standard deviation of the Gaussian of the field whose gradient vertices follow
RIDGE_STEEPNESS = 0.4  # of that field, which is 2 away from ridges: vertices stop there, some tenths of a mm before
CLOSED_MM = 0.5  # a vertex that ends further from the zero of the pial distance saw no boundary: the sulcus is closed


@dataclass(frozen=True)
class Hemisphere:
    """White and pial surface of a hemisphere; vertex i of one belongs to vertex i of the other."""

    white_mm: np.ndarray  # vertices, RAS mm, shape (V, 3), float32
    pial_mm: np.ndarray  # the same of the pial surface
    faces: np.ndarray  # vertex numbers, shape (F, 3), int32, counter-clockwise seen from outside
    thickness_mm: np.ndarray  # see :func:`~brainfm_monai.surfaces.compute_thickness_mm`, shape (V,), float32
    # shape (V,), bool: the distances show no pial boundary, and the pial surface stands halfway between the two banks
    closed: np.ndarray
    crossing_shares: tuple[float, float]  # shares of the triangles that cross another one, white and pial, from 0 to 1


def grow_hemisphere(white: Tensor, pial: Tensor, affine: np.ndarray) -> Hemisphere | None:
    """White surface of a hemisphere, and the pial surface that grows out of it; None where no voxel is inside.

    The white surface is the zero of its distance, cut to the topology of a sphere. The vertices then follow the
    gradient of the sum of both distances until the pial distance is 0. The gradient turns about at the ridge halfway
    between two banks: vertices enter a sulcus that the pial distance closes, and stop just before the ridge. Paths
    along a smooth field do not cross.

    The signed distances to the white and pial surface, (H, W, D), are in mm, negative inside, the pial one nowhere
    larger; the affine leads from the indices of isotropic voxels to RAS mm.
    """
    inside = pial < 0
    if not inside.any() or inside.all():  # the distance changes its sign nowhere: there is no surface
        return None
    ends = generate_spatial_bounding_box(inside[None], margin=MARGIN, allow_smaller=True)
    box, voxel_mm = tuple(map(slice, *ends)), float(abs(np.linalg.det(affine[:3, :3])) ** (1 / 3))
    white, pial = white[box], pial[box]
    size = [max(round((n - 1) * voxel_mm / GRID_MM) + 1, 4) for n in white.shape]
    coarse = nnf.interpolate(white[None, None], size=size, mode="trilinear", align_corners=True)[0, 0]
    if not (coarse < 0).any():
        return None
    index, faces, level = extract_sphere(coarse.numpy())
    step = (np.array(white.shape) - 1) / (np.array(size) - 1)
    edited = torch.from_numpy(level).float() - coarse  # where voxels changed sides
    edited = nnf.interpolate(edited[None, None], size=white.shape, mode="trilinear", align_corners=True)[0, 0]
    grid = np.array(affine, dtype=np.float64)
    grid[:3, 3] += grid[:3, :3] @ [side.start for side in box]
    relaxed = _relax(torch.from_numpy((index * step).T).float(), white + edited, faces, voxel_mm)
    white_mm, white_share = remove_crossings(_place(index * step, grid), _place(relaxed.T.numpy(), grid), faces)
    start = torch.from_numpy(_place(white_mm, np.linalg.inv(grid)).T.copy())
    flowed = _flow(start, white, pial, voxel_mm)
    pial_mm, pial_share = remove_crossings(white_mm, _place(flowed.T.numpy(), grid), faces)
    end = torch.from_numpy(_place(pial_mm, np.linalg.inv(grid)).T.copy())
    closed = (_sample(pial[None, None], end)[0].abs() > CLOSED_MM).numpy()
    if np.linalg.det(grid[:3, :3]) < 0:  # a grid that mirrors space turns the triangles inside out
        faces = faces[:, ::-1]
    faces = np.ascontiguousarray(faces, dtype=np.int32)
    thickness_mm = compute_thickness_mm(white_mm, pial_mm, faces)
    return Hemisphere(white_mm, pial_mm, faces, thickness_mm, closed, (white_share, pial_share))


def _place(vertices: np.ndarray, affine: np.ndarray) -> np.ndarray:
    return apply_affine(affine, vertices).astype(np.float32)


def grow_hemispheres(boundaries: Mapping[str, Tensor], affine: np.ndarray) -> dict[str, Hemisphere]:
    """Both hemispheres, by their letters ``L`` and ``R``; one without a surface is absent.

    The distances ``lp``, ``lw``, ``rp``, ``rw`` are 0 at the boundaries, see
    :func:`brainfm_monai.transforms.find_boundaries`; a hemisphere may be missing.
    """
    sides = [side for side in "lr" if f"{side}w" in boundaries]
    grown = {s.upper(): grow_hemisphere(boundaries[f"{s}w"], boundaries[f"{s}p"], affine) for s in sides}
    return {letter: surface for letter, surface in grown.items() if surface is not None}


def _stack(*fields: Tensor) -> Tensor:
    """Fields (H, W, D) as (1, C, H, W, D), the values of a voxel side by side in memory."""
    return torch.stack(fields, dim=-1).movedim(-1, 0)[None]


def _sample(fields: Tensor, vertices: Tensor) -> Tensor:
    """Values of fields (1, C, H, W, D) at voxel indices (3, V), linearly interpolated: (C, V)."""
    return warp_all([fields], vertices[None, :, :, None, None])[0][0, :, :, 0, 0]


def _relax(vertices: Tensor, level: Tensor, faces: np.ndarray, voxel_mm: float) -> Tensor:
    """Vertices (3, V) spread evenly over the surface, and moved along the gradient to the zero of the level."""
    edges = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])  # each edge once in each direction
    adjacency = sparse.csr_matrix((np.ones(len(edges), np.float32), edges.T), shape=[vertices.shape[1]] * 2)
    neighbours = sparse.diags(1 / np.asarray(adjacency.sum(1)).ravel()).astype(np.float32) @ adjacency
    fields = _stack(level, *torch.gradient(level, spacing=voxel_mm))
    for _ in range(RELAXATIONS):
        step = torch.from_numpy(neighbours @ vertices.T.contiguous().numpy()).T - vertices
        values = _sample(fields, vertices)
        steepness = values[1:].square().sum(0).sqrt()
        normal = values[1:] / steepness.clamp_min(1e-12)
        along = step - (step * normal).sum(0) * normal
        back = (values[0] / steepness.clamp_min(0.5)).clamp(-0.5, 0.5) * normal / voxel_mm
        vertices = vertices + 0.5 * along + 0.1 * (step - along) - 0.5 * back
    return vertices


def _flow(vertices: Tensor, white: Tensor, pial: Tensor, voxel_mm: float) -> Tensor:
    """Vertices (3, V) moved from the white surface to the pial one; see :func:`grow_hemisphere`."""
    smooth = GaussianFilter(3, SMOOTHING_MM / voxel_mm)((white + pial)[None, None])[0, 0]
    fields = _stack(pial, *torch.gradient(smooth, spacing=voxel_mm))
    moving = torch.ones(vertices.shape[1], dtype=torch.bool)
    for _ in range(STEPS):
        values = _sample(fields, vertices)
        steepness = values[1:].square().sum(0).sqrt()
        speed = values[0].clamp(-FASTEST_MM, FASTEST_MM) * (steepness - RIDGE_STEEPNESS).clamp(0, 1)
        step = moving * STEP * speed / steepness.clamp_min(RIDGE_STEEPNESS) / voxel_mm
        vertices = vertices - step * values[1:]
        moving = (step * steepness * voxel_mm).abs() > STILL_MM
    return vertices
