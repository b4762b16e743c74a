import math

import numpy as np
import pytest
import torch
import torch.nn.functional as nnf

from brainfm_monai.functional import intensity, separable, spatial


def volume(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def smooth_velocity(size: tuple[int, int, int], amplitude: float) -> torch.Tensor:
    """Each component is a sine along the next axis, zero at the border."""
    grid = spatial.identity_grid(size)
    waves = [torch.sin(math.pi * grid[:, i] / (size[i] - 1)) for i in range(3)]
    return amplitude * torch.stack([waves[0] * waves[1], -waves[1] * waves[2], waves[2] * waves[0]], dim=1)


# -- spatial ---------------------------------------------------------------------------------------------------------------


def test_zero_parameters_give_the_identity_affine() -> None:
    matrix = spatial.affine_matrix(torch.zeros(2, 3), torch.zeros(2, 3, 2), torch.ones(2, 3))
    assert torch.equal(matrix, torch.eye(3).expand(2, 3, 3))


def test_affine_matrix_is_the_product_written_in_its_docstring() -> None:
    angle, shear, scaling = torch.tensor([[10.0, -20.0, 30.0]]), volume(1, 3, 2) - 0.5, 0.5 + volume(1, 3, seed=1)
    a, b, c = (math.radians(float(v)) for v in angle[0])
    rx = torch.tensor([[1, 0, 0], [0, math.cos(a), -math.sin(a)], [0, math.sin(a), math.cos(a)]])
    ry = torch.tensor([[math.cos(b), 0, math.sin(b)], [0, 1, 0], [-math.sin(b), 0, math.cos(b)]])
    rz = torch.tensor([[math.cos(c), -math.sin(c), 0], [math.sin(c), math.cos(c), 0], [0, 0, 1]])
    sx, sy, sz = torch.eye(3), torch.eye(3), torch.eye(3)
    sx[0, 1], sx[0, 2] = shear[0, 0]
    sy[1, 0], sy[1, 2] = shear[0, 1]
    sz[2, 0], sz[2, 1] = shear[0, 2]
    expected = torch.diag(scaling[0]) @ sx @ sy @ sz @ rx @ ry @ rz
    torch.testing.assert_close(spatial.affine_matrix(angle, shear, scaling)[0], expected, atol=1e-6, rtol=1e-6)


def test_identity_coordinates_leave_every_voxel_also_the_first_plane() -> None:
    image = volume(1, 2, 5, 6, 7)
    torch.testing.assert_close(spatial.warp(image, spatial.identity_grid((5, 6, 7))), image, atol=1e-5, rtol=0)


def test_quarter_turn_about_the_third_axis_is_rot90() -> None:
    image = volume(1, 1, 7, 7, 5)
    matrix = spatial.affine_matrix(torch.tensor([[0.0, 0.0, 90.0]]), torch.zeros(1, 3, 2), torch.ones(1, 3))
    points = spatial.identity_grid((7, 7, 5))
    grid = spatial.sampling_coordinates(matrix, torch.zeros(1, 3), points, (7, 7, 5), (7, 7, 5), 1)
    torch.testing.assert_close(spatial.warp(image, grid), torch.rot90(image, -1, dims=(2, 3)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_translation_moves_along_its_own_axis(axis: int) -> None:
    image = volume(1, 1, 6, 7, 8)
    translation = torch.zeros(1, 3)
    translation[0, axis] = 2
    size = (6, 7, 8)
    grid = spatial.sampling_coordinates(torch.eye(3)[None], translation, spatial.identity_grid(size), size, size, 1)
    moved = spatial.warp(image, grid)
    kept = image.shape[2 + axis] - 2
    torch.testing.assert_close(moved.narrow(2 + axis, 0, kept), image.narrow(2 + axis, 2, kept), atol=1e-5, rtol=0)


def test_stride_two_looks_at_the_centre_of_each_block() -> None:
    points = spatial.identity_grid((4, 5, 6))
    grid = spatial.sampling_coordinates(torch.eye(3)[None], torch.zeros(1, 3), points, (4, 5, 6), (8, 10, 12), 2)
    assert torch.equal(grid[0, :, 0, 0, 0], torch.full((3,), 0.5))
    assert torch.equal(grid[0, :, 3, 4, 5], torch.tensor([6.5, 8.5, 10.5]))


def test_warp_names_a_wrong_shape() -> None:
    with pytest.raises(ValueError, match=r"'coordinates' must have shape \(B, 3, H, W, D\), got \(1, 2, 4, 4, 4\)"):
        spatial.warp(volume(1, 1, 4, 4, 4), torch.zeros(1, 2, 4, 4, 4))


@pytest.mark.parametrize("padding_mode", ["zeros", "border"])
@pytest.mark.parametrize("channels_last", [False, True])
def test_several_sources_are_sampled_as_each_alone(
    monkeypatch: pytest.MonkeyPatch, padding_mode: str, channels_last: bool
) -> None:
    monkeypatch.setattr(spatial, "SLAB", 100)  # so that the slabs of this small volume have seams and a rest
    sources = [volume(2, channels, 9, 11, 8, seed=channels) for channels in (1, 3)]
    if channels_last:
        sources = [source.to(memory_format=torch.channels_last_3d) for source in sources]
    coordinates = volume(2, 3, 5, 6, 7, seed=5) * 16 - 3  # reaches beyond every border
    for source, found in zip(sources, spatial.warp_all(sources, coordinates, padding_mode=padding_mode), strict=True):
        torch.testing.assert_close(
            found, spatial.warp(source, coordinates, padding_mode=padding_mode), atol=2e-6, rtol=1e-5
        )


def test_sources_of_different_grids_are_named() -> None:
    with pytest.raises(
        ValueError, match=r"'sources' must lie on one grid, got \[\(1, 1, 4, 4, 4\), \(1, 1, 4, 4, 5\)\]"
    ):
        spatial.warp_all([torch.zeros(1, 1, 4, 4, 4), torch.zeros(1, 1, 4, 4, 5)], torch.zeros(1, 3, 2, 2, 2))


def test_neighbours_are_those_of_the_cube() -> None:
    image = volume(2, 1, 5, 6, 7)
    expected = nnf.avg_pool3d(nnf.pad(image, [1] * 6, mode="replicate"), 3, stride=1)
    torch.testing.assert_close(spatial.average_neighbours(image), expected)


def test_gather_nearest_is_nearest_sampling_and_zero_outside() -> None:
    labels = torch.randint(1, 50, (2, 2, 5, 6, 7), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    grid = spatial.identity_grid((5, 6, 7)).expand(2, -1, -1, -1, -1) + 0.4
    found = spatial.gather_nearest(labels, grid)
    assert found.dtype == torch.uint8
    assert torch.equal(found, labels)
    outside = spatial.gather_nearest(labels, grid + torch.tensor([2.0, 0, 0]).reshape(1, 3, 1, 1, 1))
    assert torch.equal(outside[:, :, :3], labels[:, :, 2:])
    assert int(outside[:, :, 3:].max()) == 0


def test_constant_velocity_is_a_translation() -> None:
    velocity = torch.tensor([1.5, -0.5, 0.25]).reshape(1, 3, 1, 1, 1).expand(1, 3, 8, 8, 8)
    torch.testing.assert_close(spatial.integrate_velocity(velocity), velocity, atol=1e-5, rtol=0)


def test_flow_and_its_inverse_cancel_and_do_not_fold() -> None:
    size = (20, 22, 24)
    velocity = smooth_velocity(size, 2.5)
    grid = spatial.identity_grid(size)
    there, back = spatial.integrate_velocity(velocity, 7), spatial.integrate_velocity(-velocity, 7)
    both = back + spatial.warp(there, grid + back, padding_mode="border")
    assert float(there.abs().max()) > 2
    assert float(both.abs().max()) < 0.05
    assert float(spatial.jacobian_determinant(grid + there).min()) > 0


def test_jacobian_of_a_scaling_is_its_volume_factor() -> None:
    factor = torch.tensor([2.0, 0.5, 3.0]).reshape(1, 3, 1, 1, 1)
    determinant = spatial.jacobian_determinant(spatial.identity_grid((5, 6, 7)) * factor)
    torch.testing.assert_close(determinant, torch.full((1, 1, 5, 6, 7), 3.0))


# -- separable -------------------------------------------------------------------------------------------------------------


def test_apply_separable_is_three_matrix_products() -> None:
    image = volume(2, 3, 4, 5, 6)
    operators = [volume(2, 7, 4, seed=1), volume(2, 8, 5, seed=2), volume(2, 9, 6, seed=3)]
    expected = torch.stack(
        [torch.einsum("chwd,xh,yw,zd->cxyz", image[b], *(o[b] for o in operators)) for b in range(2)]
    )
    torch.testing.assert_close(separable.apply_separable(image, operators), expected, atol=1e-4, rtol=1e-5)


def test_a_lattice_is_linear_interpolation_at_its_own_spacing_for_each_sample() -> None:
    points = torch.tensor([2.0, -1.0, 4.0, 0.5, 3.0])
    operator = separable.lattice_operator(torch.tensor([4.0, 2.5]), 11, 5)
    for row, spacing in zip(operator, (4.0, 2.5), strict=True):
        expected = np.interp((np.arange(11) - 5) / spacing, np.arange(5) - 2, points.numpy())
        np.testing.assert_allclose((row @ points).numpy(), expected, atol=1e-6)


def test_a_lattice_means_millimetres_whatever_the_volume() -> None:
    # The same control points in a small and in a large volume: the small one is the middle of the large one.
    points = volume(1, 9)
    small, large = (separable.lattice_operator(torch.tensor([6.0]), n, 9)[0] @ points[0] for n in (21, 41))
    torch.testing.assert_close(large[10:31], small)


@pytest.mark.parametrize(("extent", "spacing"), [(19, 4.0), (20, 4.0), (159, 18.0), (9, 40.0)])
def test_control_points_cover_the_axis_at_the_smallest_spacing(extent: int, spacing: float) -> None:
    (count,) = separable.count_control_points([extent + 1], spacing)
    assert count % 2 == 1
    assert (count - 1) / 2 * spacing >= extent / 2 > ((count - 1) / 2 - 1) * spacing


def test_spreading_is_exact_for_what_is_linear_and_reaches_both_ends() -> None:
    operator = separable.spread_operator(23, 6)[0]
    torch.testing.assert_close(operator @ torch.linspace(-1, 4, 6), torch.linspace(-1, 4, 23), atol=1e-5, rtol=0)


def test_resizing_is_linear_interpolation_from_the_first_to_the_last_voxel() -> None:
    image = volume(2, 3, 5, 6, 7)
    expected = nnf.interpolate(image, size=(9, 4, 7), mode="trilinear", align_corners=True)
    torch.testing.assert_close(separable.resize(image, (9, 4, 7)), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("count", [2, 3, 6])
def test_ghosts_are_weakened_lines_of_k_space(count: int) -> None:
    signal, strength = volume(24), 0.4
    mask = torch.ones(24)
    mask[::count] -= strength
    expected = torch.fft.ifft(torch.fft.fft(signal) * mask).real
    operator = separable.ghost_operator(torch.tensor([float(count)]), torch.tensor([strength]), 24)[0]
    torch.testing.assert_close(operator @ signal, expected, atol=1e-5, rtol=0)


def test_no_ghost_is_the_identity() -> None:
    assert torch.equal(separable.ghost_operator(torch.ones(1), torch.zeros(1), 7)[0], torch.eye(7))


def test_no_resampling_at_spacing_one_and_thin_slices() -> None:
    one, zero = torch.ones(1), torch.zeros(1)
    assert torch.equal(separable.slice_operator(one, zero, 9)[0], torch.eye(9))
    assert torch.equal(separable.upsampling_operator(one, 9)[0], torch.eye(9))


@pytest.mark.parametrize("spacing", [1.0, 1.7, 3.0, 4.2])
@pytest.mark.parametrize("sigma", [0.0, 0.6, 2.0])
def test_operator_rows_sum_to_one_so_that_a_constant_stays(spacing: float, sigma: float) -> None:
    s, g = torch.tensor([spacing]), torch.tensor([sigma])
    down, up = separable.slice_operator(s, g, 24), separable.upsampling_operator(s, 24)
    for operator in (down, up, up @ down):
        torch.testing.assert_close(operator.sum(-1), torch.ones(1, 24))


def test_slices_lie_at_the_centres_of_their_blocks() -> None:
    ramp = torch.arange(24.0)
    slices = separable.slice_operator(torch.tensor([4.0]), torch.zeros(1), 24)[0] @ ramp
    torch.testing.assert_close(slices[:6], torch.tensor([1.5, 5.5, 9.5, 13.5, 17.5, 21.5]))
    back = separable.upsampling_operator(torch.tensor([4.0]), 24)[0] @ slices
    torch.testing.assert_close(back[2:-2], ramp[2:-2])


def test_slice_profile_has_the_width_that_was_asked_for() -> None:
    index = torch.arange(41.0)
    row = separable.slice_operator(torch.ones(1), torch.tensor([2.5]), 41)[0, 20]
    assert math.sqrt(float((row * (index - 20) ** 2).sum())) == pytest.approx(2.5, rel=0.01)


# -- intensity -------------------------------------------------------------------------------------------------------------


def test_painting_looks_up_each_sample_in_its_own_table() -> None:
    labels = torch.randint(0, 5, (2, 1, 3, 4, 6), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    values = volume(2, 5, 3)
    painted = intensity.paint_labels(labels, values)
    assert painted.shape == (2, 3, 3, 4, 6)
    for b, h, w, d in ((0, 0, 0, 0), (0, 2, 3, 5), (1, 1, 2, 3), (1, 2, 0, 5)):
        assert torch.equal(painted[b, :, h, w, d], values[b, int(labels[b, 0, h, w, d])])


def test_a_voxel_holds_the_mean_of_the_labels_at_its_places_each_sample_in_its_own_table() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 5, (2, 1, 6, 8, 7), generator=generator).to(torch.uint8)
    values = volume(2, 5, 3)
    size = (4, 3, 5)
    coordinates = (
        torch.rand(2, 3, *size, generator=generator) * torch.tensor([9.0, 9.0, 9.0]).reshape(1, 3, 1, 1, 1) - 1.5
    )
    offsets = torch.rand(2, 3, 4, generator=generator) * 2 - 1
    painted = intensity.paint_voxels(labels, values, coordinates, offsets)
    assert painted.shape == (2, 3, *size)
    outside = 0
    for b in range(2):
        for voxel in np.ndindex(size):
            expected = torch.zeros(3)
            for n in range(4):
                place = [round(float(coordinates[(b, i, *voxel)] + offsets[b, i, n])) for i in range(3)]
                inside = all(0 <= p < m for p, m in zip(place, labels.shape[2:], strict=True))
                outside += not inside
                expected += values[b, int(labels[(b, 0, *place)])] / 4 if inside else 0
            torch.testing.assert_close(painted[(b, slice(None), *voxel)], expected)
    assert 50 < outside < 400


def test_gaussian_noise_has_its_std_for_each_sample_and_never_goes_below_zero() -> None:
    noise = torch.randn(2, 2, 20, 20, 20, generator=torch.Generator().manual_seed(0))
    std, neither = torch.tensor([1.0, 8.0]), torch.tensor([False, False])
    out = intensity.add_noise(torch.full((2, 1, 20, 20, 20), 100.0), noise, std, neither)
    torch.testing.assert_close(out.std(dim=(1, 2, 3, 4)), std, rtol=0.05, atol=0)
    torch.testing.assert_close(
        intensity.add_noise(out, noise[:, :1], std, neither), intensity.add_noise(out, noise, std, neither)
    )
    assert float(intensity.add_noise(torch.zeros(2, 1, 20, 20, 20), noise, std, neither).min()) == 0


def test_rician_noise_has_the_moments_of_its_law() -> None:
    # Gudbjartsson and Patz: E[M^2] = A^2 + 2 sigma^2, and without signal E[M] = sigma sqrt(pi / 2).
    noise = torch.randn(1, 2, 40, 40, 40, generator=torch.Generator().manual_seed(0))
    std, rician = torch.tensor([6.0]), torch.tensor([True])
    signal = intensity.add_noise(torch.full((1, 1, 40, 40, 40), 10.0), noise, std, rician)
    assert float(signal.square().mean()) == pytest.approx(10**2 + 2 * 6**2, rel=0.02)
    air = intensity.add_noise(torch.zeros(1, 1, 40, 40, 40), noise, std, rician)
    assert float(air.mean()) == pytest.approx(6 * math.sqrt(math.pi / 2), rel=0.01)


def test_a_window_clamps_and_scales_each_sample_by_its_own() -> None:
    values = torch.tensor([-1.0, 0.0, 0.02, 0.04, 0.08, 1.0]).reshape(1, 1, 1, 1, 6).expand(2, -1, -1, -1, -1)
    out = intensity.apply_window(values, torch.tensor([[0.0, 0.08], [0.02, 0.04]]))
    torch.testing.assert_close(out[0].flatten(), torch.tensor([0.0, 0, 0.25, 0.5, 1, 1]))
    torch.testing.assert_close(out[1].flatten(), torch.tensor([0.0, 0, 0, 1, 1, 1]))


def test_percentiles_do_not_follow_one_extreme_voxel_and_a_constant_is_zero() -> None:
    image = volume(2, 1, 32, 32, 32)
    plain = intensity.normalise_percentiles(image)
    spiked = image.clone()
    spiked[:, :, 16, 16, 16] = 1e6
    assert float((intensity.normalise_percentiles(spiked) - plain).abs().flatten(1)[:, : 16 * 32 * 32].max()) < 1e-3
    assert float(plain.min()) == 0
    assert float(plain.max()) == 1
    assert float(intensity.normalise_percentiles(torch.full((1, 1, 4, 4, 4), 7.0)).abs().max()) == 0


def test_normalisation_does_not_depend_on_the_unit_or_on_the_batch() -> None:
    image = volume(2, 1, 12, 12, 12)
    both = intensity.normalise_percentiles(image)
    torch.testing.assert_close(intensity.normalise_percentiles(image[1:] * 4095 + 10), both[1:], atol=1e-4, rtol=0)


# -- lesion ----------------------------------------------------------------------------------------------------------------


def test_curl_of_a_known_potential_and_no_divergence() -> None:
    grid = spatial.identity_grid((9, 10, 11))
    x, y = grid[:, 0] - 4, grid[:, 1] - 4.5
    nothing = torch.zeros_like(x)
    rotation = spatial.compute_curl(torch.stack([nothing, nothing, -(x**2 + y**2) / 2], 1))
    inner = (slice(None), slice(1, -1), slice(1, -1), slice(1, -1))
    torch.testing.assert_close(rotation[:, 0][inner], -y[inner])
    torch.testing.assert_close(rotation[:, 1][inner], x[inner])
    velocity = spatial.compute_curl(volume(1, 3, 9, 10, 11))
    divergence = torch.stack([torch.gradient(velocity[:, i], dim=i + 1)[0] for i in range(3)]).sum(0)
    assert float(velocity.abs().max()) > 0.1
    assert float(divergence[:, 2:-2, 2:-2, 2:-2].abs().max()) < 1e-6


def test_lesions_cover_their_share_of_the_region() -> None:
    field, region = volume(3, 1, 10, 10, 10), volume(3, 1, 10, 10, 10, seed=1) > 0.4
    soft = spatial.make_lesions(field, region, torch.tensor([0.1, 0.5, 0.0]))
    shares = (soft >= 0.5).flatten(1).sum(1) / region.flatten(1).sum(1)
    torch.testing.assert_close(shares, torch.tensor([0.1, 0.5, 0.0]), atol=2e-3, rtol=0)
    assert not spatial.make_lesions(field, torch.zeros_like(region), torch.tensor([0.5] * 3)).any()


def test_lesions_keep_their_volume_in_the_flow() -> None:
    size = (32, 32, 32)
    grid = spatial.identity_grid(size)
    ball = ((grid - torch.tensor([14.0, 16, 17]).reshape(1, 3, 1, 1, 1)).square().sum(1, keepdim=True) < 36).float()
    ball = spatial.average_neighbours(ball)
    velocity = spatial.compute_curl(torch.sin(grid.flip(1) * 0.3))
    carried = spatial.carry(ball, velocity, torch.tensor([3.0]))
    assert float((carried - ball).abs().sum() / ball.sum()) > 0.3
    assert float(carried.sum()) == pytest.approx(float(ball.sum()), rel=0.03)
    torch.testing.assert_close(spatial.carry(ball, velocity, torch.zeros(1)), ball, atol=1e-5, rtol=0)


def test_lesions_start_in_their_region_with_their_share() -> None:
    field = volume(2, 1, 16, 16, 16)
    region = torch.zeros(2, 1, 16, 16, 16, dtype=torch.bool)
    region[:, :, :8] = True
    soft = spatial.make_lesions(field, region, torch.tensor([0.2, 0.0]))
    assert float((soft > 0.5)[0].sum() / region[0].sum()) == pytest.approx(0.2, abs=0.01)
    assert float(soft[~region].max()) == 0
    assert float(soft[1].max()) == 0


def test_a_protocol_of_256_labels_is_painted_from_labels_of_one_byte() -> None:
    labels = torch.full((1, 1, 2, 2, 2), 255, dtype=torch.uint8)
    values = torch.arange(256.0).reshape(1, 256, 1)  # one more than a byte holds means: outside
    coordinates = torch.zeros(1, 3, 1, 1, 2)
    coordinates[..., 1] = 9
    painted = intensity.paint_voxels(labels, values, coordinates, torch.zeros(1, 3, 1))
    assert painted.flatten().tolist() == [255, 0]
