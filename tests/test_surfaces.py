"""Triangle surfaces: topology, growth from white to pial, and measures, on shapes whose answers are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from igl.predicates import find_intersections, find_self_intersections
from scipy import ndimage

from brainfm_monai.slices import Slice, cut_slices
from brainfm_monai.surfaces import (
    compute_areas_mm2,
    compute_crossing_share,
    compute_euler_number,
    compute_mean_curvature,
    compute_thickness_mm,
    compute_volume_mm3,
    draw_contour,
    draw_surface,
    grow_hemispheres,
)
from brainfm_monai.surfaces.crossings import remove_crossings
from brainfm_monai.surfaces.growth import grow_hemisphere
from brainfm_monai.surfaces.topology import extract_sphere, grow_ball, merge_vertices
from brainfm_monai.transforms import find_boundaries
from brainfm_monai.transforms.cortex import measure_white


def offsets(size: int = 40) -> np.ndarray:
    """Place of each voxel relative to the middle of a cube, in voxels."""
    return np.stack(np.meshgrid(*[np.arange(size)] * 3, indexing="ij"), axis=-1) - (size - 1) / 2


def ball(radius: float, size: int = 40) -> np.ndarray:
    return np.asarray(np.linalg.norm(offsets(size), axis=-1) - radius)


def distance_of(inside: np.ndarray, voxel_mm: float) -> torch.Tensor:
    """Signed distance to the faces of the voxels of a region, in mm, negative inside."""
    out, within = ndimage.distance_transform_edt(~inside), ndimage.distance_transform_edt(inside)
    return torch.from_numpy((np.where(inside, 0.5 - within, out - 0.5) * voxel_mm).clip(-3, 3)).float()


def edge_counts(faces: np.ndarray) -> set[int]:
    edges = np.sort(faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), axis=1)
    return set(np.unique(edges, axis=0, return_counts=True)[1].tolist())


def test_a_ball_gives_a_sphere_at_the_zero_of_the_level() -> None:
    vertices, faces, _ = extract_sphere(ball(10.2))
    assert np.abs(np.linalg.norm(vertices - 19.5, axis=1) - 10.2).max() < 0.06
    assert compute_euler_number(faces) == 2
    assert compute_volume_mm3(vertices, faces) == pytest.approx(4 / 3 * np.pi * 10.2**3, rel=0.01)  # turned outwards
    assert compute_areas_mm2(vertices, faces).sum() == pytest.approx(4 * np.pi * 10.2**2, rel=0.01)


def test_handles_bridges_cavities_and_pieces_leave_a_sphere() -> None:
    place = offsets()
    ring = np.hypot(np.hypot(place[..., 0], place[..., 1]) - 11, place[..., 2]) - 4
    cavity = np.maximum(ball(14), -ball(4))
    pieces = np.minimum(np.linalg.norm(place - [-8, 0, 0], axis=-1) - 6, np.linalg.norm(place - [9, 0, 0], axis=-1) - 4)
    two_blocks = (
        np.maximum(np.abs(place) - [14, 14, 14], 0).sum(-1)
        - 0.5
        + 4 * (np.abs(place[..., 0]) < 3) * (place[..., 2] > -9)
    )
    bridge = np.where(
        (np.abs(place[..., 1]) < 1) & (np.abs(place[..., 2] - 5) < 1) & (two_blocks > 0) & (ball(14) < 0),
        -0.2,
        two_blocks,
    )
    for level in (ring, cavity, pieces, bridge):
        _, faces, _ = extract_sphere(level)
        assert compute_euler_number(faces) == 2
        assert edge_counts(faces) == {2}  # closed, and no edge of three triangles
    filled = extract_sphere(cavity)
    assert compute_volume_mm3(filled[0], filled[1]) == pytest.approx(4 / 3 * np.pi * 14**3, rel=0.01)
    assert grow_ball(pieces).sum() == pytest.approx(4 / 3 * np.pi * 6**3, rel=0.05)  # the larger piece
    assert (bridge < 0)[20, 20, 24]
    assert not grow_ball(np.pad(bridge, 1, constant_values=3.0))[20:22, 20:22, 24:27].all()  # the bridge is cut


def test_noise_of_any_topology_leaves_a_sphere() -> None:
    noise = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(28, 30, 32)), 1.2)
    noise = np.pad(noise[1:-1, 1:-1, 1:-1], 1, constant_values=1.0)
    _, faces, _ = extract_sphere(noise)
    assert len(faces) > 10_000
    assert compute_euler_number(faces) == 2
    assert edge_counts(faces) == {2}


def test_a_level_without_an_inside_or_with_one_at_the_border_is_refused() -> None:
    for level in (np.ones((5, 5, 5)), np.full((5, 5, 5), -1.0)):
        with pytest.raises(ValueError, match="grow_ball: a level with an inside that does not reach the border"):
            grow_ball(level)


@pytest.mark.parametrize("mirrored", [False, True])
def test_two_spheres_have_the_thickness_between_them_in_an_oblique_grid(mirrored: bool) -> None:
    angle = np.deg2rad(25)
    affine = np.eye(4)
    affine[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    affine[:3, 3] = [3, -20, 7]
    if mirrored:
        affine[:3, 0] *= -1
    white, pial = (torch.from_numpy(ball(r, 46).clip(-3, 3)).float() for r in (12.0, 14.5))
    found = grow_hemisphere(white, pial, affine)
    assert found is not None
    centre = affine[:3, :3] @ np.full(3, 22.5) + affine[:3, 3]
    assert np.abs(np.linalg.norm(found.white_mm - centre, axis=1) - 12.0).max() < 0.1
    assert np.abs(np.linalg.norm(found.pial_mm - centre, axis=1) - 14.5).max() < 0.1
    thickness = compute_thickness_mm(found.white_mm, found.pial_mm, found.faces)
    assert np.abs(thickness - 2.5).max() < 0.15
    for vertices, radius in ((found.white_mm, 12.0), (found.pial_mm, 14.5)):
        assert compute_volume_mm3(vertices, found.faces) == pytest.approx(4 / 3 * np.pi * radius**3, rel=0.02)
        assert np.median(compute_mean_curvature(vertices, found.faces)) == pytest.approx(1 / radius, rel=0.03)
        assert compute_crossing_share(vertices, found.faces) == 0
    assert not found.closed.any()


def test_the_pial_surface_enters_a_sulcus_that_the_distance_closes() -> None:
    """Two walls of white matter on a floor, 5 mm apart: the cortex of both, 2.5 mm each, fills the gap."""
    voxel_mm = 0.5
    x, y, z = np.moveaxis(offsets(72) * voxel_mm, -1, 0)
    block = (np.abs(x) < 9.5) & (np.abs(y) < 9) & (np.abs(z) < 10)
    inside = block & ~((np.abs(x) < 2.5) & (z > -6))
    white = distance_of(inside, voxel_mm)
    pial = distance_of(ndimage.distance_transform_edt(~inside) * voxel_mm <= 2.5, voxel_mm)
    affine = np.diag([voxel_mm] * 3 + [1.0])
    found = grow_hemisphere(white, pial, affine)
    assert found is not None
    middle = (np.array(white.shape) - 1) / 2 * voxel_mm
    start, end = found.white_mm - middle, found.pial_mm - middle
    banks = (
        (np.abs(np.abs(start[:, 0]) - 2.5) < 0.3) & (np.abs(start[:, 1]) < 6) & (start[:, 2] > -3) & (start[:, 2] < 6)
    )
    assert banks.sum() > 150
    left = banks & (start[:, 0] < 0)
    assert (end[left, 0] < 0.1).all()  # no bank crosses the middle
    assert (end[banks & ~left, 0] > -0.1).all()
    assert np.abs(end[banks, 0]).max() < 0.9
    thickness = compute_thickness_mm(found.white_mm, found.pial_mm, found.faces)
    assert np.median(thickness[banks]) == pytest.approx(2.5, abs=0.5)
    outer = (np.abs(start[:, 0]) > 9) & (np.abs(start[:, 1]) < 6) & (np.abs(start[:, 2]) < 6)
    assert np.median(thickness[outer]) == pytest.approx(2.5, abs=0.1)
    assert compute_crossing_share(found.pial_mm, found.faces) < 0.005
    assert compute_euler_number(found.faces) == 2


def test_hemispheres_do_not_enter_each_other() -> None:
    """Two balls whose distances overlap by 2 mm (pial) and 1.2 mm (white) share the plane between them."""
    place = offsets(64)
    left, right = (np.linalg.norm(place - [side, 0, 0], axis=-1) for side in (-10.0, 10.0))
    fields = {
        side: torch.from_numpy(np.stack([r - 10.6, r - 11.0]).clip(-3, 3)).float()
        for side, r in (("l", left), ("r", right))
    }
    distance = {f"{side}{kind}": field[i] for side, field in fields.items() for i, kind in enumerate("wp")}
    both = grow_hemispheres(find_boundaries(distance, 1.0, (0.2, -0.25)).distance, np.eye(4))
    for kind in ("white_mm", "pial_mm"):
        meshes = [a for one in both.values() for a in (getattr(one, kind).astype(float), one.faces.astype(np.int64))]
        assert not find_intersections(*meshes)[0]
    found = grow_hemispheres(find_boundaries(distance).distance, np.eye(4)).get("L")
    alone = grow_hemisphere(fields["l"][0], fields["l"][1], np.eye(4))
    assert found is not None
    assert alone is not None
    assert found.pial_mm[:, 0].max() - 31.5 < 0.1
    assert alone.pial_mm[:, 0].max() - 31.5 > 0.8
    assert grow_hemisphere(torch.ones(6, 6, 6), torch.ones(6, 6, 6), np.eye(4)) is None


def test_crossings_and_euler_numbers_are_counted() -> None:
    vertices, faces, _ = extract_sphere(ball(8))
    assert compute_crossing_share(vertices, faces) == 0
    both, twice = (
        np.concatenate([vertices, vertices + np.array([9.13, 0.21, 0.37])]),
        np.concatenate([faces, faces + len(vertices)]),
    )
    share = compute_crossing_share(both, twice)
    assert 0.005 < share < 0.2
    assert compute_euler_number(twice) == 4
    spike = vertices.copy()
    top = vertices[:, 2].argmax()
    spike[top] = [19.5, 20.2, 19.5 - 12]  # through the opposite side
    assert 3 <= compute_crossing_share(spike, faces) * len(faces) <= 60
    for factor, thickness in ((0.0, 8), (11 / 8, 3)):
        other = 19.5 + factor * (vertices - 19.5)
        assert compute_thickness_mm(vertices, other, faces) == pytest.approx(thickness, abs=0.1)


def test_every_crossing_is_found_in_any_order_of_the_triangles() -> None:
    vertices, faces, _ = extract_sphere(ball(12))
    rough = vertices + np.random.default_rng(0).normal(scale=0.3, size=vertices.shape)
    crossing = len(np.unique(find_self_intersections(rough, faces.astype(np.int64))[1]))
    assert crossing > 100
    for order in (slice(None), slice(None, None, -1), np.random.default_rng(0).permutation(len(faces))):
        assert compute_crossing_share(rough.astype(np.float32), faces[order]) == crossing / len(faces)


def test_displacements_that_cross_are_taken_back_and_others_stay() -> None:
    """A ball grows by 3 mm; a spike and a slab pass through its opposite side, and a patch is crumpled."""
    base, faces, _ = extract_sphere(ball(12))
    outwards = (base - 19.5) / np.linalg.norm(base - 19.5, axis=1, keepdims=True)
    grown = (base + 3 * outwards).astype(np.float32)
    kept, share = remove_crossings(base, grown, faces)
    assert share == 0
    np.testing.assert_array_equal(kept, grown)
    wrong = grown.copy()
    wrong[base[:, 2].argmax()] = [19.5, 20.2, 2.5]
    patch = outwards[:, 0] > 0.95
    wrong[patch] += np.random.default_rng(0).normal(scale=1.2, size=(patch.sum(), 3))
    slab = outwards[:, 1] < -0.95
    wrong[slab] -= 32 * outwards[slab]  # comes out of the other side of the ball
    assert compute_crossing_share(wrong, faces) > 0.02
    mended, share = remove_crossings(base, wrong, faces)
    assert share == compute_crossing_share(mended, faces) == 0
    assert compute_volume_mm3(mended, faces) > 0.9 * compute_volume_mm3(grown, faces)
    far = outwards[:, 0] < -0.6
    assert far.sum() > 200
    np.testing.assert_array_equal(mended[far], grown[far])


def test_surfaces_of_ragged_distances_do_not_cross_themselves() -> None:
    """A white surface full of dents and bumps; without the guard 3.5 % of the pial surface's triangles cross another."""
    noise = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=(48, 48, 48)), 1)
    fields = [ball(14, 48) + 1.5 * noise / noise.std(), ball(16.5, 48)]
    white, pial = (torch.from_numpy(field.clip(-3, 3)).float() for field in fields)
    affine = np.array([[0.0, 0, 0.9, 3], [0, -0.9, 0, 40], [0.9, 0, 0, -7], [0, 0, 0, 1]])
    found = grow_hemisphere(white, pial, affine)
    assert found is not None
    shares = [compute_crossing_share(vertices, found.faces) for vertices in (found.white_mm, found.pial_mm)]
    assert list(found.crossing_shares) == shares
    assert max(shares) < 0.002


def test_a_picture_shows_the_side_that_faces_the_viewer() -> None:
    """From the left, anterior is on the picture's left and superior at its top; from the right, the other way round."""
    vertices, faces, _ = extract_sphere(ball(12))
    place = vertices - 19.5
    colours = np.zeros((len(vertices), 3))
    colours[place[:, 1] > 6, 0] = 1.0  # anterior: red
    colours[place[:, 2] > 6, 1] = 1.0  # superior: green
    colours[place[:, 0] > 0, 2] = 1.0  # right half: blue
    for towards, red_is_left, blue in (((-1.0, 0.0, 0.0), True, False), ((1.0, 0.0, 0.0), False, True)):
        picture = draw_surface(place, faces, colours, towards)
        seen = picture[..., 3] > 0
        assert 0.7 < seen.mean() < 0.85  # a disc in its square: pi / 4
        columns = np.nonzero(picture[..., 0] > 60)[1]
        assert (columns.mean() < picture.shape[1] / 2) == red_is_left
        assert np.nonzero(picture[..., 1] > 60)[0].mean() < picture.shape[0] / 2
        assert ((picture[..., 2] > 60).sum() > seen.sum() / 2) == blue


def test_a_contour_is_the_line_in_which_a_surface_passes_through_a_slice() -> None:
    vertices, faces, _ = extract_sphere(ball(12))
    place = vertices - 19.5
    mask = ball(12) < 0
    affine = np.eye(4)
    affine[:3, 3] = -19.5
    for cut in cut_slices(mask, affine, {"axial": (0.5,), "sagittal": (0.75,)}, pixel_mm=0.5):
        picture = draw_contour(np.zeros((*cut.points_mm.shape[:2], 3)), cut.points_mm, place, faces, (1.0, 0.5, 0.0))
        drawn = picture[..., 0] == 1
        radius = np.linalg.norm(cut.points_mm[drawn], axis=-1)
        assert np.abs(radius - 12).max() < 0.6
        height = np.abs(cut.points_mm[0, 0, cut.plane.axis])
        assert drawn.sum() > 0.8 * 2 * np.pi * np.sqrt(12**2 - height**2) / 0.5 / np.sqrt(2)
    outside = Slice(cut.plane, cut.points_mm + 40)
    assert not draw_contour(np.zeros((*cut.points_mm.shape[:2], 3)), outside.points_mm, place, faces, (1, 1, 1)).any()


def test_a_folded_sheet_has_its_thickness_everywhere() -> None:
    """Cortex of 2.5 mm on white matter with a sine for a top: open sulci 20 mm from crown to crown, 5 mm deep."""
    voxel_mm = 0.75
    x, y, z = np.moveaxis(offsets(64) * voxel_mm, -1, 0)
    inside = (z < 2.5 * np.sin(2 * np.pi * x / 20)) & (z > -15) & (np.abs(x) < 16) & (np.abs(y) < 12)
    rough = ndimage.distance_transform_edt(~inside) - ndimage.distance_transform_edt(inside)
    white = ndimage.gaussian_filter((rough - 0.5 * np.sign(rough)) * voxel_mm, 0.7)  # without the steps of voxels
    fields = [torch.from_numpy((white - depth).clip(-3, 3)).float() for depth in (0, 2.5)]
    found = grow_hemisphere(fields[0], fields[1], np.diag([voxel_mm] * 3 + [1.0]))
    assert found is not None
    thickness = compute_thickness_mm(found.white_mm, found.pial_mm, found.faces)
    place = found.white_mm - 63 / 2 * voxel_mm
    top = (np.abs(place[:, :2]) < 8).all(axis=1) & (place[:, 2] > -5)
    crowns, floors = top & (place[:, 2] > 1.7), top & (place[:, 2] < -1.7)
    assert min(crowns.sum(), floors.sum()) > 40
    for part in (top, crowns, floors):
        assert thickness[part].mean() == pytest.approx(2.5, abs=0.15)
    assert np.abs(thickness[top] - 2.5).mean() < 0.2
    assert compute_euler_number(found.faces) == 2
    assert compute_crossing_share(found.white_mm, found.faces) == 0


def make_scan(grey: float, radius: float = 14.0, size: int = 48) -> torch.Tensor:
    """White matter of brightness 0.5 in a ball, about it grey matter; the brightness of a voxel is that of its parts."""
    share = (radius - ball(radius=0, size=size) + 0.5).clip(0, 1)
    return torch.from_numpy(share * 0.5 + (1 - share) * grey).float()


def refine_white(white: torch.Tensor, pial: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
    measured, weight = measure_white(white, pial, image)
    return torch.lerp(white, measured, weight)


@pytest.mark.parametrize("grey", [0.3, 0.7])
def test_the_scan_moves_the_white_surface_to_where_its_tissues_meet(grey: float) -> None:
    """The predicted surface is 0.8 mm too deep on one side and 0.8 mm too far out on the other, in both contrasts."""
    place = offsets(48)
    wrong = torch.from_numpy(ball(14.0, 48) + 0.8 * np.sign(place[..., 0])).float()
    pial = torch.from_numpy(ball(17.5, 48)).float()
    image = make_scan(grey)
    refined = refine_white(wrong.clamp(-3, 3), pial.clamp(-3, 3), image)
    near = torch.from_numpy(np.abs(ball(14.0, 48)) < 0.5)
    truth = torch.from_numpy(ball(14.0, 48)).float()
    assert (wrong - truth)[near].abs().mean() > 0.7
    assert (refined - truth)[near].abs().mean() < 0.3
    far = wrong.abs() > 2.3
    assert torch.equal(refined[far], wrong.clamp(-3, 3)[far])
    distance = {"rw": wrong.clamp(-3, 3), "rp": pial.clamp(-3, 3)}
    found = grow_hemispheres(find_boundaries(distance, image=image).distance, np.eye(4))["R"]
    assert np.abs(np.linalg.norm(found.white_mm - 23.5, axis=1) - 14).mean() < 0.25


def test_a_scan_without_contrast_or_full_of_noise_moves_little() -> None:
    white, pial = (torch.from_numpy(ball(radius, 48).clip(-3, 3)).float() for radius in (14.0, 16.5))
    assert (refine_white(white, pial, torch.full_like(white, 0.4)) - white).abs().max() < 1e-4
    noise = torch.from_numpy(np.random.default_rng(0).normal(size=white.shape)).float()
    for strength, most_mm in ((0.01, 0.35), (0.5, 0.05)):  # the tissues are 0.2 apart
        moved = (refine_white(white, pial, make_scan(0.3) + strength * noise) - white).abs()
        assert moved[white.abs() < 1].mean() < most_mm
    # cerebrospinal fluid that is as bright as white matter, outside of the pial surface, is not taken for it
    image = torch.where(pial > 0, 0.5, make_scan(0.3))
    assert (refine_white(white, pial, image)[pial > -1] > 1).all()


def test_merged_vertices_keep_the_topology_and_the_place() -> None:
    vertices, faces, _ = extract_sphere(ball(12))
    whole, triangles = merge_vertices(vertices, faces, np.arange(len(vertices)))
    np.testing.assert_array_equal(whole, vertices)
    np.testing.assert_array_equal(triangles, faces)
    coarse, triangles = merge_vertices(vertices, faces, np.rint(vertices / 2).astype(int) @ [1, 100, 10_000])
    assert len(coarse) < 0.6 * len(vertices)
    assert compute_euler_number(triangles) == 2
    assert edge_counts(triangles) == {2}
    assert compute_volume_mm3(coarse, triangles) == pytest.approx(4 / 3 * np.pi * 12**3, rel=0.03)
    # a group that is a ring about the ball is no disc, and one that is the whole ball would leave nothing
    for groups in (np.abs(vertices[:, 2] - 19.5) < 3, np.ones(len(vertices), dtype=bool)):
        kept, _ = merge_vertices(vertices, faces, np.where(groups, 0, np.arange(len(vertices)) + 1))
        assert len(kept) == len(vertices)
