"""One whole volume through a network, and errors in one line."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from torch import nn

from brainfm_monai.inferers import ForegroundInferer, MirrorInferer, WholeVolumeInferer, exit_on_error, fast_bfloat16
from brainfm_monai.tasks import TaskLayout


@pytest.fixture
def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv3d(1, 8, 3, padding=1), nn.LeakyReLU(), nn.Conv3d(8, 5, 1)).eval()


def test_whole_volume_is_the_network_itself_with_the_metadata_of_the_scan(network: nn.Module) -> None:
    values = torch.linspace(0, 1, 6 * 8 * 10).reshape(1, 1, 6, 8, 10)
    affine = torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0]))
    image = MetaTensor(values, affine=affine)
    with torch.no_grad():
        output = WholeVolumeInferer(bfloat16=False)(image, network)
        assert isinstance(output, MetaTensor)
        torch.testing.assert_close(output.as_tensor(), network(values))
        np.testing.assert_array_equal(output.affine, affine)
        plain = WholeVolumeInferer(bfloat16=False)(values, network)
    assert not isinstance(plain, MetaTensor)


def test_bfloat16_is_near_float32_and_used_where_it_is_fast(network: nn.Module) -> None:
    values = torch.linspace(0, 1, 6 * 8 * 10).reshape(1, 1, 6, 8, 10)
    with torch.no_grad():
        exact = network(values)
        rounded = WholeVolumeInferer(bfloat16=True)(values, network)
        default = WholeVolumeInferer()(values, network)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, rtol=0, atol=0.02)
    assert default.dtype == (torch.bfloat16 if fast_bfloat16(torch.device("cpu")) else torch.float32)


def test_only_wrong_values_and_missing_files_end_in_one_line() -> None:
    def fail(error: Exception) -> None:
        raise error

    assert exit_on_error(lambda a, b: a + b, 1, b=2) == 3
    for error in (ValueError("a.nii: wrong"), FileNotFoundError("a.nii: absent")):
        with pytest.raises(SystemExit, match=r"^a\.nii: (wrong|absent)$"):
            exit_on_error(fail, error)
    with pytest.raises(ZeroDivisionError):
        exit_on_error(fail, ZeroDivisionError())


def test_the_air_around_the_head_is_neither_computed_nor_left_undefined() -> None:
    values = torch.zeros(2, 1, 12, 14, 16)
    values[0, :, 3:6, 4:9, 5:6] = 1
    values[1, :, 10:, 12:, 14:] = 1
    seen: list[tuple[int, ...]] = []

    def network(x: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(x.shape))
        return torch.cat([x, x + 1], dim=1)

    inferer = ForegroundInferer(WholeVolumeInferer(bfloat16=False), outside=[7.0, 9.0], margin=1, multiple=4)
    output = inferer(MetaTensor(values, affine=torch.eye(4)), network)
    assert seen == [(1, 1, 8, 8, 4), (1, 1, 4, 4, 4)]
    assert isinstance(output, MetaTensor)
    box = torch.zeros(2, 1, 12, 14, 16, dtype=torch.bool)
    box[0, :, 2:7, 3:10, 4:7] = True
    box[1, :, 9:, 11:, 13:] = True
    expected = torch.cat([torch.where(box, values, 7.0), torch.where(box, values + 1, 9.0)], dim=1)
    torch.testing.assert_close(output.as_tensor(), expected)
    assert float(inferer(torch.zeros(1, 1, 4, 4, 4), network).max()) == 1  # nothing above the threshold: the whole volume


def test_a_mirrored_head_gets_the_mirrored_maps() -> None:
    layout = TaskLayout(["segmentation", "distance", "mni"])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Conv3d(1, layout.channels, 3, padding=1)
    image = torch.rand(1, 1, 6, 7, 8, generator=torch.Generator().manual_seed(0))
    inferer = MirrorInferer(WholeVolumeInferer(bfloat16=False), layout)
    with torch.no_grad():
        found, of_mirror, alone = inferer(image, network), inferer(image.flip(2), network), network(image)
    torch.testing.assert_close(layout.mirror(of_mirror), found, atol=1e-5, rtol=0)
    assert float((alone - layout.mirror(network(image.flip(2)).detach())).abs().max()) > 0.1  # the network alone does not do so
    torch.testing.assert_close(found * 2 - alone, layout.mirror(network(image.flip(2)).detach()), atol=1e-5, rtol=0)
