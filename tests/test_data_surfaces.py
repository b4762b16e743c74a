"""Distances to triangle surfaces: against spheres, and against densely sampled triangles."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from nibabel.affines import apply_affine
from scipy.spatial import cKDTree
from skimage.measure import marching_cubes

from brainfm_monai.data.freesurfer import LIMIT_MM, compute_surface_distance, read_surface

SHAPE = (40, 36, 44)
AFFINE = np.array([[0.0, 0.0, 1.0, -20.0], [-1.0, 0.0, 0.0, 17.0], [0.0, 1.0, 0.0, -9.0], [0, 0, 0, 1]])


def make_level_set() -> np.ndarray:
    """Two joined bodies with a dent, positive inside, in voxels of the volume."""
    grid = np.stack(np.meshgrid(*(np.arange(n, dtype=float) for n in SHAPE), indexing="ij"), axis=-1)
    balls = [r - np.linalg.norm(grid - c, axis=-1) for c, r in (((17, 15, 18), 9.0), ((23, 21, 27), 7.0))]
    dent = np.linalg.norm(grid - (11, 12, 15), axis=-1) - 5.0
    return np.asarray(np.minimum(np.maximum(*balls), dent))


def sample_triangles(vertices: np.ndarray, triangles: np.ndarray) -> np.ndarray:
    """Points on a fine barycentric grid of each triangle."""
    weights = np.array([(i, j, 6 - i - j) for i in range(7) for j in range(7 - i)]) / 6
    return np.asarray(np.einsum("kc,tcx->tkx", weights, vertices[triangles]).reshape(-1, 3))


def test_a_sphere_in_a_turned_volume() -> None:
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij"), axis=-1)
    radius = np.linalg.norm(grid - (18.3, 17.1, 21.7), axis=-1)
    vertices, triangles, *_ = marching_cubes(radius, 10.0)
    distance = compute_surface_distance(apply_affine(AFFINE, vertices), triangles, AFFINE, SHAPE)
    truth = np.clip(radius - 10, -LIMIT_MM, LIMIT_MM)
    assert np.abs(distance - truth).max() < 0.05


@pytest.mark.parametrize("flip", [False, True])
def test_any_surface_against_its_own_points(flip: bool) -> None:
    level = make_level_set()
    vertices, triangles, *_ = marching_cubes(level, 0.0)
    world = apply_affine(AFFINE, vertices)
    distance = compute_surface_distance(world, triangles[:, ::-1] if flip else triangles, AFFINE, SHAPE)
    places = apply_affine(AFFINE, np.argwhere(np.ones(SHAPE)))
    unsigned = cKDTree(sample_triangles(world, triangles)).query(places)[0].reshape(SHAPE)
    truth = np.clip(np.where(level > 0, -unsigned, unsigned), -LIMIT_MM, LIMIT_MM)
    assert np.abs(distance - truth)[unsigned > 0.2].max() < 0.05
    assert np.abs(distance - truth).mean() < 0.01


def test_a_surface_that_leaves_the_box_and_one_that_misses_it() -> None:
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in (80, 80, 80)), indexing="ij"), axis=-1)
    radius = np.linalg.norm(grid - 40, axis=-1)
    vertices, triangles, *_ = marching_cubes(radius, 30.0)
    inside = compute_surface_distance(vertices - (30, 30, 30), triangles, np.eye(4), (16, 16, 16))
    assert (inside == -LIMIT_MM).all()
    edge = compute_surface_distance(vertices - (4, 30, 30), triangles, np.eye(4), (16, 16, 16))
    np.testing.assert_allclose(edge, np.clip(radius - 30, -LIMIT_MM, LIMIT_MM)[4:20, 30:46, 30:46], atol=0.05)
    assert (compute_surface_distance(vertices + 200, triangles, np.eye(4), (16, 16, 16)) == LIMIT_MM).all()


def make_volume(centre: tuple[float, float, float]) -> nib.freesurfer.MGHImage:
    affine = np.array([[-1.0, 0, 0, 0], [0, 0, 1.0, 0], [0, -1.0, 0, 0], [0, 0, 0, 1]])
    affine[:3, 3] = np.array(centre) - affine[:3, :3] @ [16, 16, 16]
    return nib.freesurfer.MGHImage(np.zeros((32, 32, 32), dtype=np.uint8), affine)


def test_surface_coordinates_become_those_of_the_scanner(tmp_path: Path) -> None:
    volume = make_volume((5.0, -12.0, 30.0))
    vertices, triangles = np.array([[0.0, 0, 0], [10, 0, 0], [0, 4, 0], [0, 0, 7]]), np.array([[0, 1, 2], [0, 3, 1]])
    nib.freesurfer.write_geometry(tmp_path / "lh.white", vertices, triangles)
    found, faces = read_surface(tmp_path / "lh.white", volume)
    np.testing.assert_allclose(found, vertices + np.array([5, -12, 30]), atol=1e-4)
    np.testing.assert_array_equal(faces, triangles)


def test_surfaces_that_do_not_fit(tmp_path: Path) -> None:
    volume = make_volume((5.0, -12.0, 30.0))
    with pytest.raises(FileNotFoundError, match=r"lh\.white: a FreeSurfer surface is needed, found no such file"):
        read_surface(tmp_path / "lh.white", volume)
    (tmp_path / "lh.white").write_bytes(b"none")
    with pytest.raises(ValueError, match=r"lh\.white: a FreeSurfer surface is needed, found"):
        read_surface(tmp_path / "lh.white", volume)
    info = {"head": np.array([2, 0, 20]), "valid": "1  # volume info valid", "filename": "orig.mgz"}
    info |= {"volume": np.array([32, 32, 32]), "voxelsize": np.ones(3), "xras": np.array([-1.0, 0, 0])}
    info |= {"yras": np.array([0, 0, -1.0]), "zras": np.array([0, 1.0, 0]), "cras": np.array([0.0, 0, 0])}
    nib.freesurfer.write_geometry(tmp_path / "lh.pial", np.eye(3), np.array([[0, 1, 2]]), volume_info=info)
    with pytest.raises(
        ValueError, match=r"lh\.pial: a surface of the volume centred on \[ *5\. -12\. +30\. *\] is needed"
    ):
        read_surface(tmp_path / "lh.pial", volume)
