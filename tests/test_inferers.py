"""One whole volume through a network, and errors in one line."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from torch import nn

from brainfm_monai.inferers import (
    MEMORY_MODES,
    ForegroundInferer,
    MirrorInferer,
    ScanInferer,
    SlabInferer,
    WholeVolumeInferer,
    WindowInferer,
    automatic,
    fast_bfloat16,
    free_memory,
    peak_memory,
    prepare_network,
    reduced_precision,
)
from brainfm_monai.io import exit_on_error
from brainfm_monai.networks import MultiTaskNet, ResidualUNet, TwoScaleUNet, UNet, library_backbone, slabs
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
    assert (
        float(inferer(torch.zeros(1, 1, 4, 4, 4), network).max()) == 1
    )  # nothing above the threshold: the whole volume


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
    assert (
        float((alone - layout.mirror(network(image.flip(2)).detach())).abs().max()) > 0.1
    )  # the network alone does not do so
    torch.testing.assert_close(found * 2 - alone, layout.mirror(network(image.flip(2)).detach()), atol=1e-5, rtol=0)


LAYOUT = TaskLayout(["segmentation", "distance", "log_bias_field", "mni"])
NETWORKS = {
    "two scales at stride 2": (lambda: TwoScaleUNet(1, (8, 16, 24)), 2),
    "U-Net at stride 3": (lambda: UNet(1, (8, 16)), 3),
    "U-Net of unit features": (lambda: UNet(1, (8, 16, 24), unit_norm=True), 1),
    "residual U-Net": (lambda: ResidualUNet(1, (8, 16)), 1),
}


def trained_like(name: str) -> MultiTaskNet:
    """A random network; its normalisations have biases, as after training."""
    make, stride = NETWORKS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = MultiTaskNet(make(), LAYOUT, stride).eval()
        for module in net.modules():
            if isinstance(module, nn.GroupNorm):
                nn.init.uniform_(module.bias, 0.1, 0.5)
    return net


def picture(*shape: int) -> torch.Tensor:
    return torch.rand(1, 1, *shape, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_memory_mode_gives_the_same(name: str, mirror: bool) -> None:
    net, image = trained_like(name), picture(18, 24, 30)
    found = {}
    with torch.inference_mode():
        for mode in MEMORY_MODES:
            found[mode] = ScanInferer(LAYOUT, mode, mirror, bfloat16=False)(image, net)
    whole = found["whole"]
    scale = (
        10 * float(whole.abs().max()) if "unit" in name else float(whole.abs().max())
    )  # short features magnify rounding
    torch.testing.assert_close(found["slabs"], whole, atol=2e-5 * scale, rtol=0)
    decided, expected = LAYOUT.split(found["low"]), LAYOUT.split(LAYOUT.choose_labels(whole))
    assert float((decided["segmentation"] == expected["segmentation"]).float().mean()) > 0.999  # ties within rounding
    for task in ("distance", "log_bias_field", "mni"):
        torch.testing.assert_close(decided[task], expected[task], atol=2e-5 * scale, rtol=0)
    torch.testing.assert_close(found["windows"], whole, atol=2e-5 * scale, rtol=0)  # the volume fits into one window


@pytest.mark.parametrize("mode", MEMORY_MODES)
def test_bfloat16_agrees_with_float32_in_every_mode(mode: str) -> None:
    net, image = trained_like("two scales at stride 2"), picture(24, 32, 40)
    with torch.inference_mode():
        exact = ScanInferer(LAYOUT, mode, True, bfloat16=False)(image, net)
        rounded = ScanInferer(LAYOUT, mode, True, bfloat16=True)(image, net)
    assert rounded.dtype == torch.float32
    mni = LAYOUT.split(rounded)["mni"] - LAYOUT.split(exact)["mni"]
    assert float(mni.abs().mean()) < 0.01
    assert (
        len(LAYOUT.split(rounded)["mni"].unique()) > 1000
    )  # no steps of bfloat16, which has 128 values between 0.5 and 1


def test_low_memory_never_holds_all_label_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        slabs.plane_ranges, "__defaults__", (2**22,)
    )  # slabs as small as the network, which has 8 features
    net = trained_like("U-Net of unit features")
    size = (128, 128, 128)
    inferer = ScanInferer(LAYOUT)
    logits = len(LAYOUT.protocol) * 128**3 * 4
    modes = ("whole", "slabs", "low")
    peak = {mode: inferer.estimate(torch.empty(1, 1, *size), net, mode) / automatic.RESERVE for mode in modes}
    assert peak["low"] < logits < peak["slabs"] < peak["whole"]


def test_the_mode_is_chosen_by_the_memory_that_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slabs.plane_ranges, "__defaults__", (2**22,))
    net, image = trained_like("U-Net of unit features"), picture(24, 32, 36)
    other = MultiTaskNet(library_backbone("UNet", 8, channels=(8, 16), strides=(2,)), LAYOUT).eval()
    strided = trained_like("two scales at stride 2")
    inferer = ScanInferer(LAYOUT, bfloat16=False)
    large = torch.empty(1, 1, 128, 128, 128)
    sizes = {mode: inferer.estimate(large, net, mode) for mode in ("whole", "slabs", "low")}
    assert sizes["whole"] > sizes["slabs"] > sizes["low"]
    assert all(p.device.type == "cpu" for p in net.parameters())
    for free, expected in (
        (sizes["whole"] + 1, "whole"),
        (sizes["whole"] - 1, "slabs"),
        (sizes["slabs"] - 1, "low"),
        (0, "low"),
    ):
        monkeypatch.setattr(automatic, "free_memory", lambda device, free=free: free)
        assert inferer.choose(large, net) == expected
    assert inferer.choose(large, other) == "windows"
    assert inferer.choose(large, strided) == "low"
    with torch.inference_mode():
        assert inferer(image, net).shape[1] == LAYOUT.label_channels
    monkeypatch.undo()
    assert free_memory(torch.device("cpu")) > 0


def test_peak_memory_counts_what_is_held_at_once() -> None:
    image = torch.empty(1, 1, 10, 10, 10, device="meta")  # 4000 bytes

    def function(x: torch.Tensor) -> torch.Tensor:
        y = x + 1
        z = y * 2
        del y
        return torch.cat([z, z.view(-1).view_as(z), z + 1])  # z, z + 1, and three

    assert peak_memory(function, image) == 5 * 4000


def test_windows_are_averaged_by_gaussian_weights() -> None:
    image = picture(20, 12, 12)
    seen = []

    def network(x: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(x.shape[2:]))
        return torch.cat([x, torch.full_like(x, float(len(seen)))], dim=1)

    output = WindowInferer(WholeVolumeInferer(bfloat16=False), roi_size=12, overlap=0.5)(MetaTensor(image), network)
    assert isinstance(output, MetaTensor)
    assert seen == [(12, 12, 12)] * len(seen)
    torch.testing.assert_close(output.as_tensor()[:, :1], image)
    window = output.as_tensor()[0, 1, :, 6, 6]
    assert (window[1:] >= window[:-1] - 1e-5).all()  # from one window to the next
    assert len(window.unique()) > 4  # gradually


def test_the_volume_is_padded_to_a_multiple_and_the_output_cropped() -> None:
    seen = []

    def network(x: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(x.shape[2:]))
        return x

    image = picture(9, 16, 10)
    torch.testing.assert_close(WholeVolumeInferer(bfloat16=False, multiple=8)(image, network), image)
    assert seen == [(16, 16, 16)]


def test_labels_are_surrounded_by_background() -> None:
    net, image = trained_like("U-Net of unit features"), torch.zeros(1, 1, 48, 48, 48)
    image[:, :, 4:20, 5:20, 6:22] = 0.5 + 0.5 * picture(16, 15, 16)
    inferer = ForegroundInferer(ScanInferer(LAYOUT, "low", bfloat16=False), LAYOUT.outside_values, margin=2, multiple=4)
    with torch.inference_mode():
        output = inferer(MetaTensor(image), net)
        logits = ForegroundInferer(
            ScanInferer(LAYOUT, "whole", bfloat16=False), LAYOUT.outside_values, margin=2, multiple=4
        )(image, net)
    assert output.shape == (1, LAYOUT.label_channels, 48, 48, 48)
    assert output[0, :, -1, -1, -1].tolist() == [0, 3, 3, 3, 3, 0, 0, 0, 0]
    expected = LAYOUT.choose_labels(logits)
    assert float((output[:, 0] == expected[:, 0]).float().mean()) > 0.999
    assert len(output[:, 0].unique()) > 3
    torch.testing.assert_close(torch.Tensor(output)[:, 1:], expected[:, 1:], atol=1e-3, rtol=0)


def test_precision_by_wish_and_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert reduced_precision(cpu) == (torch.bfloat16 if fast_bfloat16(cpu) else torch.float32)
    monkeypatch.setattr("brainfm_monai.inferers.precision.fast_bfloat16", lambda device: False)
    assert reduced_precision(cpu) == torch.float32
    assert reduced_precision(torch.device("cuda")) == torch.float16
    net = prepare_network(nn.Sequential(nn.Conv3d(2, 4, 3)).train(), cpu)
    assert not net.training
    assert next(net.parameters()).is_contiguous(memory_format=torch.channels_last_3d)


def test_messages() -> None:
    with pytest.raises(
        ValueError, match=r"'memory' must be one of \['auto', 'whole', 'slabs', 'low', 'windows'\], got 'tiny'"
    ):
        ScanInferer(LAYOUT, "tiny")
    with pytest.raises(ValueError, match="a MultiTaskNet is needed, got Conv3d: use another memory mode"):
        SlabInferer(LAYOUT)(picture(8, 8, 8), nn.Conv3d(1, 1, 1))
    with pytest.raises(
        ValueError, match=r"sides that are multiples of the network's stride 2 are needed, got \(8, 9, 8\)"
    ):
        SlabInferer(LAYOUT)(picture(8, 9, 8), trained_like("two scales at stride 2"))


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MEMORY_MODES)
def test_the_gpu_gives_what_the_cpu_gives(mode: str) -> None:
    net, image = trained_like("two scales at stride 2"), picture(32, 32, 64)
    with torch.inference_mode():
        expected = ScanInferer(LAYOUT, mode, True, bfloat16=False)(image, net)
        found = ScanInferer(LAYOUT, mode, True, bfloat16=False)(image.cuda(), net.cuda()).cpu()
    assert float((found - expected).abs().mean()) < 1e-3 * float(expected.abs().max())
