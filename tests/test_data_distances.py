"""Signed distances out of labels, against shapes whose distance is known."""

from __future__ import annotations

import numpy as np
import pytest

from brainfm_monai.anatomy import Protocol
from brainfm_monai.data.labels import PIAL_IDS, WHITE_IDS, compute_hemisphere_distances, compute_signed_distance

SIZE = (48, 44, 40)
# world x = index - 23.5, so that the midplane is between two voxels
CENTRES = {"left": (12.0, 20.0, 19.0), "right": (36.0, 22.0, 21.0)}
RADII = {"left": (10.0, 6.0), "right": (8.0, 5.0)}


def distance_to_centre(centre: tuple[float, float, float]) -> np.ndarray:
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in SIZE), indexing="ij"), axis=-1)
    return np.asarray(np.linalg.norm(grid - np.array(centre), axis=-1))


def make_hemispheres() -> np.ndarray:
    """A large ball of cortex around white matter on the left, a smaller one on the right."""
    ids = np.zeros(SIZE, dtype=np.int32)
    for side, cortex, white in (("left", 3, 2), ("right", 42, 41)):
        r = distance_to_centre(CENTRES[side])
        ids[r <= RADII[side][0]] = cortex
        ids[r <= RADII[side][1]] = white
    return ids


def test_half_space_is_exact() -> None:
    inside = np.zeros((12, 5, 5), dtype=bool)
    inside[:7] = True
    for spacing in (1.0, 0.7):
        distance = compute_signed_distance(inside, spacing)
        np.testing.assert_allclose(distance[:, 2, 2], (np.arange(12) - 6.5) * spacing, atol=1e-5)


def test_balls_against_the_analytic_distance() -> None:
    distance = compute_hemisphere_distances(make_hemispheres())
    assert distance.shape == (*SIZE, 4)
    for channel, (side, which) in enumerate((("left", 0), ("left", 1), ("right", 0), ("right", 1))):
        truth = distance_to_centre(CENTRES[side]) - RADII[side][which]
        error = distance[..., channel] - truth
        assert np.abs(error).max() < 0.8, (side, which)  # steps of 1 mm voxels on a curved surface
        assert np.abs(error).mean() < 0.4
        assert abs(error[np.abs(truth) < 3].mean()) < 0.2


def test_left_is_where_x_is_negative() -> None:
    distance = compute_hemisphere_distances(make_hemispheres())
    x = np.arange(SIZE[0]) - 23.5
    for channel, sign in enumerate((-1, -1, 1, 1)):
        inside = np.argwhere(distance[..., channel] < 0)
        assert (np.sign(x[inside[:, 0]]) == sign).all()
    # pial encloses white
    assert (distance[..., 0] <= distance[..., 1]).all()
    assert (distance[..., 2] <= distance[..., 3]).all()


def test_deep_structures_are_inside_white_and_the_rest_is_outside() -> None:
    for deep in (4, 10, 13, 17, 18, 28, 136):
        ids = np.full((6, 6, 6), 2, dtype=np.int32)
        ids[2:4, 2:4, 2:4] = deep
        ids[0] = 3
        assert (compute_hemisphere_distances(ids)[1:, ..., 1] < 0).all()
    for other in (7, 8, 14, 16, 24, 515):
        ids = np.full((6, 6, 6), 2, dtype=np.int32)
        ids[2:4, 2:4, 2:4] = other
        distance = compute_hemisphere_distances(ids)
        assert (distance[2:4, 2:4, 2:4, :2] > 0).all()


def test_a_missing_hemisphere_is_infinitely_far() -> None:
    ids = np.full((4, 4, 4), 2, dtype=np.int32)
    distance = compute_hemisphere_distances(ids)
    assert (distance[..., :2] == -np.inf).all()
    assert (distance[..., 2:] == np.inf).all()


@pytest.mark.parametrize("table", [PIAL_IDS, WHITE_IDS])
def test_sides_mirror_each_other_in_the_protocol_table(table: dict[str, tuple[int, ...]]) -> None:
    protocol = Protocol.load("synthseg_generation")
    mirror = {s.freesurfer_id: protocol.structures[s.mirror].freesurfer_id for s in protocol.structures}
    left = {i for i in table["left"] if i in mirror}
    assert {mirror[i] for i in left} == {i for i in table["right"] if i in mirror}
    assert not set(table["left"]) & set(table["right"])
    sides = {s.freesurfer_id: s.side for s in protocol.structures}
    assert {sides[i] for i in left} == {"left"}


def test_non_contiguous_regions_are_measured_right() -> None:
    ids = make_hemispheres()
    turned = np.transpose(ids, (2, 0, 1))
    expected = np.transpose(compute_hemisphere_distances(ids), (2, 0, 1, 3))
    np.testing.assert_allclose(compute_hemisphere_distances(turned), expected, atol=1e-5)
