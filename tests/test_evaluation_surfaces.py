"""Surfaces of an evaluation: spheres and shells whose distances are known, left and right."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from skimage.measure import marching_cubes

from brainfm_monai.evaluation.surfaces import (
    MeasureSurfaces,
    Mesh,
    compare_surfaces,
    compare_thickness,
)
from brainfm_monai.surfaces import Hemisphere, compute_thickness_mm

SIZE = (64, 44, 40)
CENTRES = {"l": (17.0, 21, 20), "r": (46.0, 22, 19)}  # RAS: left is at low indices
AFFINE = torch.tensor([[1.0, 0, 0, -30], [0, 1, 0, -20], [0, 0, 1, 5], [0, 0, 0, 1]], dtype=torch.float64)


def make_distance(centre: tuple[float, ...], radius: float) -> np.ndarray:
    grid = np.stack(np.meshgrid(*(np.arange(n, dtype=np.float64) for n in SIZE), indexing="ij"), -1)
    return np.asarray(np.linalg.norm(grid - np.array(centre), axis=-1) - radius)


def extract_level(distance: np.ndarray) -> Mesh:
    vertices, faces, _, _ = marching_cubes(distance, 0.0)
    return vertices, faces.astype(np.int64)


def make_ball(radius: float, shift_mm: float = 0.0) -> Mesh:
    return extract_level(make_distance((20 + shift_mm, 21, 20), radius))


def test_distances_of_balls_are_those_of_their_radii() -> None:
    measures = compare_surfaces(make_ball(12.5), make_ball(11))
    for name in ("to_reference", "from_reference"):
        for statistic in ("mean", "median", "p95"):
            assert measures[f"{name}_{statistic}"] == pytest.approx(1.5, abs=0.05)
    assert measures["euler_number"] == 2
    assert measures["crossing_share"] == 0


def test_both_directions_differ_where_one_surface_has_less() -> None:
    far = make_ball(4, shift_mm=30)
    both = (
        np.concatenate([make_ball(11)[0], far[0]]),
        np.concatenate([make_ball(11)[1], far[1] + len(make_ball(11)[0])]),
    )
    measures = compare_surfaces(make_ball(11), both)
    assert measures["to_reference_p95"] < 1e-6
    assert measures["from_reference_p95"] > 12
    assert measures["from_reference_median"] < 1e-6
    assert "from_cortex_mean" not in measures
    near = both[0][:, 0] < 35
    assert compare_surfaces(make_ball(11), both, near)["from_cortex_p95"] < 1e-6
    assert compare_surfaces(make_ball(11), both, ~near)["from_cortex_mean"] > 12


def test_a_handle_and_crossings_are_counted() -> None:
    grid = np.stack(np.meshgrid(*(np.arange(n) - n / 2 for n in SIZE), indexing="ij"))
    torus = extract_level(np.hypot(np.hypot(grid[0], grid[1]) - 13, grid[2]) - 4)
    assert compare_surfaces(torus, make_ball(11))["euler_number"] == 0
    vertices, faces = make_ball(8)
    crossing = (
        np.concatenate([vertices, vertices + np.array([9.3, 0.2, 0.1])]),
        np.concatenate([faces, faces + len(vertices)]),
    )
    share = compare_surfaces(crossing, make_ball(8))["crossing_share"]
    assert 0.01 < share < 0.3  # a ring about each of the two


def make_shell(thickness: float, shift_mm: float = 0.0) -> Hemisphere:
    """White and pial surface with the same triangles: a ball of 10 mm, and a larger one that may be moved."""
    (white, faces), centre = make_ball(10), np.array([20, 21, 20])
    pial = (white - centre) * (1 + thickness / 10) + centre + [shift_mm, 0, 0]
    return Hemisphere(white, pial, faces, compute_thickness_mm(white, pial, faces), np.zeros(len(white)), (0.0, 0.0))


def test_thickness_of_a_shell() -> None:
    still, moved = make_shell(2.5), make_shell(3, shift_mm=0.8)  # from 2.2 to 3.8 mm, a cosine of the angle
    found = compare_thickness(moved, still)
    assert found["vertex_thickness_reference"] == pytest.approx(2.5, abs=0.02)
    assert found["vertex_thickness"] == pytest.approx(3, abs=0.05)
    assert found["vertex_thickness_bias"] == pytest.approx(0.5, abs=0.05)
    assert found["vertex_thickness_error"] == pytest.approx(0.53, abs=0.06)
    assert found["vertex_thickness_correlation"] == pytest.approx(0, abs=0.3)
    again = compare_thickness(make_shell(2.5, shift_mm=0.8), moved)
    assert again["vertex_thickness_correlation"] > 0.99
    # a wall, where both surfaces of the reference are one, does not count
    assert math.isnan(compare_thickness(still, make_shell(0))["vertex_thickness_error"])


def make_case(radii: dict[str, float], **entries: Any) -> dict[Any, Any]:
    channels = [make_distance(CENTRES[name[0]], radius) for name, radius in radii.items()]
    distance = MetaTensor(torch.from_numpy(np.stack(channels)).float().clamp(-3, 3), affine=AFFINE)
    return {"scan": "one", "condition": "native", "distance": distance, "rows": ["before"], **entries}


TRUTH = {"lp": 13.0, "lw": 10.5, "rp": 13.0, "rw": 10.5}


def values_of(item: dict[Any, Any]) -> dict[tuple[str, str, str], float]:
    assert item["rows"][0] == "before"
    return {(row.task, row.side, row.metric): row.value for row in item["rows"][1:]}


def test_each_side_is_compared_with_its_own() -> None:
    reference = make_case(TRUTH)["distance"]
    found = values_of(MeasureSurfaces()(make_case({**TRUTH, "lp": 14.0}, target_distance=reference)))
    assert found["surface_pial", "left", "to_reference_mean"] == pytest.approx(1, abs=0.03)
    assert found["surface_pial", "right", "to_reference_mean"] < 0.05  # what is grown has other triangles
    assert found["surface_white", "left", "from_reference_p95"] < 0.1
    assert found["surface_thickness", "left", "vertex_thickness_bias"] == pytest.approx(1, abs=0.05)
    assert found["surface_thickness", "right", "vertex_thickness_bias"] == pytest.approx(0, abs=0.03)
    assert {value for (_, _, metric), value in found.items() if metric == "found"} == {1}


def test_the_wall_of_the_reference_is_left_out_of_the_way_back_from_its_cortex() -> None:
    """The reference's white surface is the pial one in half of the ball, in which it lies 1.5 mm further out."""
    white, wall = (make_distance(CENTRES["l"], radius) for radius in (10.5, 12.0))
    upper = np.arange(SIZE[2]) > CENTRES["l"][2]
    fields = [np.where(upper, wall, make_distance(CENTRES["l"], 13.0)), np.where(upper, wall, white)]
    reference = make_case(TRUTH)["distance"].clone()
    reference[:2] = torch.from_numpy(np.stack(fields)).float().clamp(-3, 3)
    found = values_of(MeasureSurfaces()(make_case(TRUTH, target_distance=reference)))
    assert found["surface_white", "left", "from_reference_mean"] > 0.6
    assert found["surface_white", "left", "from_cortex_mean"] < 0.2
    assert found["surface_white", "right", "from_cortex_mean"] == found["surface_white", "right", "from_reference_mean"]


def test_a_surface_that_is_not_predicted_is_counted() -> None:
    reference = make_case(TRUTH)["distance"]
    found = values_of(MeasureSurfaces()(make_case({**TRUTH, "rp": -9.0, "rw": -9.0}, target_distance=reference)))
    assert found["surface_pial", "right", "found"] == 0
    assert found["surface_white", "left", "found"] == 1
    assert ("surface_thickness", "right", "vertex_thickness_bias") not in found
    assert MeasureSurfaces()(make_case(TRUTH))["rows"] == ["before"]  # without any reference


def test_labels_give_the_surfaces_of_their_faces() -> None:
    ids = np.zeros((1, *SIZE), dtype=np.int64)
    for letter, cortex, white in (("l", 11116, 2), ("r", 2024, 41)):
        ids[0][make_distance(CENTRES[letter], 13) < 0] = cortex
        ids[0][make_distance(CENTRES[letter], 10.5) < 0] = white
    image = MetaTensor(torch.zeros(1, *SIZE), affine=AFFINE)
    labels = MetaTensor(torch.from_numpy(ids), affine=AFFINE)
    found = values_of(MeasureSurfaces()(make_case({**TRUTH, "rw": 9.5}, target_segmentation=labels, image=image)))
    assert found["surface_white", "left", "to_reference_mean"] < 0.4  # the faces of voxels lie about the ball
    assert found["surface_white", "right", "to_reference_mean"] == pytest.approx(1, abs=0.3)
    assert found["surface_thickness", "right", "vertex_thickness_bias"] == pytest.approx(1, abs=0.4)
