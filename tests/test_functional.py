import math

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
    grid = spatial.sampling_coordinates(matrix, torch.zeros(1, 3, 7, 7, 5), torch.zeros(1, 3), (7, 7, 5), 1)
    torch.testing.assert_close(spatial.warp(image, grid), torch.rot90(image, -1, dims=(2, 3)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_translation_moves_along_its_own_axis(axis: int) -> None:
    image = volume(1, 1, 6, 7, 8)
    translation = torch.zeros(1, 3)
    translation[0, axis] = 2
    grid = spatial.sampling_coordinates(torch.eye(3)[None], torch.zeros(1, 3, 6, 7, 8), translation, (6, 7, 8), 1)
    moved = spatial.warp(image, grid)
    kept = image.shape[2 + axis] - 2
    torch.testing.assert_close(moved.narrow(2 + axis, 0, kept), image.narrow(2 + axis, 2, kept), atol=1e-5, rtol=0)


def test_stride_two_looks_at_the_centre_of_each_block() -> None:
    grid = spatial.sampling_coordinates(torch.eye(3)[None], torch.zeros(1, 3, 4, 5, 6), torch.zeros(1, 3), (8, 10, 12), 2)
    assert torch.equal(grid[0, :, 0, 0, 0], torch.full((3,), 0.5))
    assert torch.equal(grid[0, :, 3, 4, 5], torch.tensor([6.5, 8.5, 10.5]))


def test_warp_names_a_wrong_shape() -> None:
    with pytest.raises(ValueError, match=r"'coordinates' must have shape \(B, 3, H, W, D\), got \(1, 2, 4, 4, 4\)"):
        spatial.warp(volume(1, 1, 4, 4, 4), torch.zeros(1, 2, 4, 4, 4))


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
    expected = torch.stack([torch.einsum("chwd,xh,yw,zd->cxyz", image[b], *(o[b] for o in operators)) for b in range(2)])
    torch.testing.assert_close(separable.apply_separable(image, operators), expected, atol=1e-4, rtol=1e-5)


def test_apply_separable_names_an_operator_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"operator 1 must have 5 columns, got \(1, 5, 4\)"):
        separable.apply_separable(volume(1, 1, 4, 5, 6), [torch.eye(4)[None], torch.zeros(1, 5, 4), torch.eye(6)[None]])


def test_control_points_are_linear_interpolation_for_each_sample_apart() -> None:
    points = volume(2, 1, 6, 6, 6)
    counts = torch.tensor([4.0, 6.0])
    operator = separable.control_point_operator(counts, 11, 6)
    field = separable.apply_separable(points, [operator] * 3)
    for sample, count in enumerate((4, 6)):
        used = points[sample : sample + 1, :, :count, :count, :count]
        expected = nnf.interpolate(used, size=(11, 11, 11), mode="trilinear", align_corners=True)
        torch.testing.assert_close(field[sample : sample + 1], expected, atol=1e-5, rtol=0)


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


def test_painting_gives_each_label_its_mean_and_spread() -> None:
    labels = torch.tensor([0, 1, 2]).repeat_interleave(4000).reshape(1, 1, 3, 40, 100)
    noise = torch.randn(1, 1, 3, 40, 100, generator=torch.Generator().manual_seed(0))
    image = intensity.paint_labels(labels, torch.tensor([[50.0, 100, 200]]), torch.tensor([[1.0, 5, 10]]), noise)
    for label, (mean, std) in enumerate(((50, 1), (100, 5), (200, 10))):
        assert float(image[0, 0, label].mean()) == pytest.approx(mean, abs=5 * std / math.sqrt(4000))
        assert float(image[0, 0, label].std()) == pytest.approx(std, rel=0.1)


def test_painting_names_tables_of_different_shape() -> None:
    with pytest.raises(ValueError, match=r"'std' must have the shape of 'mean' \(1, 3\), got \(1, 2\)"):
        intensity.paint_labels(torch.zeros(1, 1, 2, 2, 2), torch.zeros(1, 3), torch.zeros(1, 2), torch.zeros(1, 1, 2, 2, 2))


def test_gamma_keeps_zero_and_the_maximum_and_follows_the_power() -> None:
    image = volume(2, 1, 4, 4, 4) * 300
    image[:, :, 0, 0, 0] = 0
    out = intensity.apply_gamma(image, torch.tensor([1.0, 2.0]))
    torch.testing.assert_close(out[0], image[0])
    torch.testing.assert_close(out[1], image[1] ** 2 / image[1].max())


def test_noise_has_its_std_for_each_sample_and_never_goes_below_zero() -> None:
    noise = torch.randn(2, 1, 20, 20, 20, generator=torch.Generator().manual_seed(0))
    out = intensity.add_noise(torch.full_like(noise, 100.0), noise, torch.tensor([1.0, 8.0]))
    torch.testing.assert_close(out.std(dim=(1, 2, 3, 4)), torch.tensor([1.0, 8.0]), rtol=0.05, atol=0)
    assert float(intensity.add_noise(torch.zeros_like(noise), noise, torch.tensor([1.0, 8.0])).min()) == 0


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
