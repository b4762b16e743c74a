"""A scan through a network: crop, mirror image, memory modes, precision, windows."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.networks.nets import UNet as MonaiUNet
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from brainfm_monai import inferers, networks
from brainfm_monai.inferers import AutocastInferer, TwoStageInferer, choose_memory, free_memory, two_stage
from brainfm_monai.io import exit_on_error
from brainfm_monai.networks import (
    MultiTaskNet,
    ResidualUNet,
    TwoScaleUNet,
    UNet,
    parse_precision,
    planes,
    prepare_network,
)
from brainfm_monai.networks.execution import fast_bfloat16
from brainfm_monai.tasks import TaskLayout

LAYOUT = TaskLayout(["segmentation", "distance", "log_bias_field", "mni"])
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "two scales at stride 2": (lambda: TwoScaleUNet(1, (8, 16, 24)), 2),
    "U-Net at stride 3": (lambda: UNet(1, (8, 16)), 3),
    "U-Net of unit features": (lambda: UNet(1, (8, 16, 24), unit_norm=True), 1),
    "residual U-Net": (lambda: ResidualUNet(1, (8, 16)), 1),
    "U-Net of MONAI": (lambda: MonaiUNet(3, 1, 8, channels=(8, 16), strides=(2,)), 1),
}
MODES = ("full", "low", "windows")


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


def picture(*shape: int) -> Tensor:
    return torch.rand(1, 1, *shape, generator=torch.Generator().manual_seed(3))


def run(net: Callable[..., Tensor], image: Tensor, mode: str = "full", **options: Any) -> Tensor:
    """One stage, in float32 unless another precision is asked for, on exactly the image."""
    options = {"mirror": False, "second_look": False, "precision": "float32", "multiple": 1, **options}
    with torch.inference_mode():
        return TwoStageInferer(options.pop("layout", LAYOUT), memory=mode, **options)(image, net)


def test_only_wrong_values_and_missing_files_end_in_one_line() -> None:
    def fail(error: Exception) -> None:
        raise error

    assert exit_on_error(lambda a, b: a + b, 1, b=2) == 3
    for error in (ValueError("a.nii: wrong"), FileNotFoundError("a.nii: absent")):
        with pytest.raises(SystemExit, match=r"^a\.nii: (wrong|absent)$"):
            exit_on_error(fail, error)
    with pytest.raises(ZeroDivisionError):
        exit_on_error(fail, ZeroDivisionError())


@pytest.mark.parametrize("mirror", [False, True])
def test_the_context_head_sees_the_whole_volume_in_each_pass(mirror: bool) -> None:
    layout = TaskLayout(["segmentation", "distance", "CT", "lesion"])
    torch.manual_seed(0)
    net = MultiTaskNet(UNet(1, (8, 16)), layout, 2, context=["lesion"]).eval()
    assert net.context is not None
    nn.init.normal_(net.context.last.weight)
    image = picture(24, 28, 32)  # more planes than are decoded at a time
    with torch.no_grad():
        expected = net(image)
        if mirror:
            expected = (expected + layout.mirror(net(image.flip(2)))) / 2
    maps = run(net, image, layout=layout, mirror=mirror)
    torch.testing.assert_close(maps, expected, atol=1e-5, rtol=1e-5)
    assert float(maps[:, layout.slices["lesion"]].std()) > 0.1
    labels = run(net, image, "low", layout=layout, mirror=mirror)
    torch.testing.assert_close(labels[:, 1:], maps[:, -6:], atol=1e-5, rtol=1e-5)


def test_another_network_is_run_as_it_is_on_the_head_alone() -> None:
    values = torch.zeros(2, 1, 12, 14, 16)
    values[0, :, 3:6, 4:9, 5:6] = 1
    values[1, :, 10:, 12:, 14:] = 1
    seen: list[tuple[int, ...]] = []

    def network(x: Tensor) -> Tensor:
        seen.append(tuple(x.shape))
        return torch.cat([x, x + 1], dim=1)

    layout = TaskLayout(["FLAIR", "CT"])  # 0 and -1 in the air
    affine = torch.diag(torch.tensor([2.0, 3, 4, 1]))
    output = run(network, MetaTensor(values, affine=affine), margin=1, multiple=4, layout=layout)
    assert seen == [(1, 1, 8, 8, 4), (1, 1, 4, 4, 4)]
    assert isinstance(output, MetaTensor)
    np.testing.assert_array_equal(output.affine, affine)
    box = torch.zeros(2, 1, 12, 14, 16, dtype=torch.bool)
    box[0, :, 2:7, 3:10, 4:7] = True
    box[1, :, 9:, 11:, 13:] = True
    expected = torch.cat([torch.where(box, values, 0.0), torch.where(box, values + 1, -1.0)], dim=1)
    torch.testing.assert_close(output.as_tensor(), expected)
    dark = run(network, torch.zeros(1, 1, 4, 4, 4), layout=layout)
    assert not isinstance(dark, MetaTensor)
    assert (dark[:, 1] == 1).all()  # nothing above the threshold: the whole volume
    features = run(lambda x: x.expand(-1, 7, -1, -1, -1), values[:1], margin=0, layout=layout)
    assert float(features.sum()) == 7 * 15  # of features, nothing is known in the air


def test_a_mirrored_head_gets_the_mirrored_maps() -> None:
    layout = TaskLayout(["segmentation", "distance", "mni"])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Conv3d(1, layout.channels, 3, padding=1)
    image = torch.rand(1, 1, 6, 7, 8, generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = {"layout": layout, "threshold": -1}
    found, of_mirror = (run(network, x, mirror=True, **options) for x in (image, image.flip(2)))
    alone, back = run(network, image, **options), layout.mirror(run(network, image.flip(2), **options))
    torch.testing.assert_close(layout.mirror(of_mirror), found, atol=1e-5, rtol=0)
    assert float((alone - back).abs().max()) > 0.1  # the network alone does not do so
    torch.testing.assert_close(found, (alone + back) / 2, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_every_memory_mode_gives_the_mean_of_the_network_and_its_mirror_image(name: str, mirror: bool) -> None:
    net, image = trained_like(name), picture(18, 24, 30)
    with torch.inference_mode():
        whole = net(image)
        whole = (whole + LAYOUT.mirror(net(image.flip(2)))) / 2 if mirror else whole
    found = {mode: run(net, image, mode, mirror=mirror) for mode in MODES}
    short = 10 if "unit" in name else 1  # short features magnify rounding
    tolerance: dict[str, Any] = {"atol": 2e-5 * short * float(whole.abs().max()), "rtol": 0}
    torch.testing.assert_close(found["full"], whole, **tolerance)
    torch.testing.assert_close(found["windows"], whole, **tolerance)  # the volume fits into one window
    decided, expected = LAYOUT.split(found["low"]), LAYOUT.split(LAYOUT.choose_labels(whole))
    assert float((decided["segmentation"] == expected["segmentation"]).float().mean()) > 0.999  # ties within rounding
    for task in ("distance", "log_bias_field", "mni"):
        torch.testing.assert_close(decided[task], expected[task], **tolerance)


def test_sides_that_the_stride_does_not_divide_are_padded() -> None:
    net, image = trained_like("U-Net at stride 3"), picture(17, 22, 31)
    with torch.inference_mode():
        expected = net(nn.functional.pad(image, (0, 2, 0, 2, 0, 1)))[:, :, :17, :22, :31]
    torch.testing.assert_close(run(net, image), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("mode", MODES)
def test_bfloat16_agrees_with_float32_in_every_mode(mode: str) -> None:
    net, image = trained_like("two scales at stride 2"), picture(24, 32, 40)
    exact, rounded = (run(net, image, mode, mirror=True, precision=name) for name in ("float32", "bfloat16"))
    assert rounded.dtype == torch.float32
    mni = LAYOUT.split(rounded)["mni"] - LAYOUT.split(exact)["mni"]
    assert 0 < float(mni.abs().mean()) < 0.01
    assert len(LAYOUT.split(rounded)["mni"].unique()) > 1000  # bfloat16 has 128 values between 0.5 and 1


def test_low_memory_chooses_among_the_labels_that_are_allowed() -> None:
    net, image = trained_like("two scales at stride 2"), picture(16, 24, 32)
    allowed = [0, 5, 7, 11]
    found = run(net, image, "low", labels=allowed)[:, 0]
    logits = run(net, image)[:, LAYOUT.slices["segmentation"]]
    expected = torch.tensor(allowed)[logits[:, allowed].argmax(1)]
    assert len(expected.unique()) > 1
    assert torch.equal(found.long(), expected)


def test_labels_are_surrounded_by_background() -> None:
    net, image = trained_like("U-Net of unit features"), torch.zeros(1, 1, 48, 48, 48)
    image[:, :, 4:20, 5:20, 6:22] = 0.5 + 0.5 * picture(16, 15, 16)
    output, logits = (run(net, image, mode, margin=2, multiple=4) for mode in ("low", "full"))
    assert output.shape == (1, LAYOUT.label_channels, 48, 48, 48)
    assert output[0, :, -1, -1, -1].tolist() == [0, 3, 3, 3, 3, 0, 0, 0, 0]
    expected = LAYOUT.choose_labels(logits)
    assert float((output[:, 0] == expected[:, 0]).float().mean()) > 0.999
    assert len(output[:, 0].unique()) > 3
    torch.testing.assert_close(output[:, 1:], expected[:, 1:], atol=1e-3, rtol=0)


def test_windows_are_averaged_by_gaussian_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(two_stage, "ROI_SIZE", 12)
    image, seen = picture(20, 12, 12), []

    def network(x: Tensor) -> Tensor:
        seen.append(tuple(x.shape[2:]))
        return torch.cat([x, torch.full_like(x, float(len(seen)))], dim=1)

    output = run(network, image, "windows", threshold=-1, layout=TaskLayout(["T1w", "T2w"]))
    assert seen == [(12, 12, 12)] * len(seen)
    torch.testing.assert_close(output[:, :1], image)
    window = output[0, 1, :, 6, 6]
    assert (window[1:] >= window[:-1] - 1e-5).all()  # from one window to the next
    assert len(window.unique()) > 4  # gradually


def test_the_memory_mode_follows_from_size_and_free_memory(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    image = torch.zeros(1, 1, 32, 32, 40)
    strided, foreign = trained_like("two scales at stride 2"), trained_like("U-Net of MONAI")
    needed = 4 * image.numel() * (2 * LAYOUT.channels + 8 * 24 // 8)  # 24 features, of every eighth voxel
    with caplog.at_level(logging.INFO):
        for free, expected in ((needed, "full"), (needed - 1, "low")):
            monkeypatch.setattr(inferers.execution, "free_memory", lambda device, free=free: free)
            assert choose_memory(image, strided) == expected
    assert "of memory are free, mode 'full' needs" in caplog.text
    assert choose_memory(image, foreign) == "windows"
    assert choose_memory(image, nn.Conv3d(1, 900, 1)) == "windows"
    assert choose_memory(image, lambda x: x) == "full"
    assert run(strided, image, "auto").shape[1] == LAYOUT.label_channels
    monkeypatch.undo()
    assert free_memory(torch.device("cpu")) > 0


def test_free_memory_is_that_of_the_container(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("2000\n")
    (tmp_path / "memory.stat").write_text("anon 1000\ninactive_file 400\nactive_file 600\n")
    monkeypatch.setattr(inferers.execution, "CGROUP", tmp_path)
    assert free_memory(torch.device("cpu")) == 3400  # what of files is held unused can be taken
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(torch.device("cpu")) > 5000


def test_compilation_compiles_what_inference_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    counter, plain = CompileCounter(), nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self: plain(self, backend=counter, dynamic=True))
    net = MultiTaskNet(UNet(1, (8, 8)), LAYOUT, 2).eval()
    expected = run(net, picture(16, 16, 32))
    torch._dynamo.reset()
    found = run(prepare_network(net, torch.device("cpu"), compile=True), picture(16, 16, 32))
    assert counter.frame_count > 0
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_precision_by_wish_and_by_device(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert parse_precision(None, cpu) == (torch.bfloat16 if fast_bfloat16(cpu) else torch.float32)
    monkeypatch.setattr(networks.execution, "fast_bfloat16", lambda device: False)
    assert parse_precision(None, cpu) == torch.float32
    assert parse_precision(None, torch.device("cuda")) == torch.float16
    net = prepare_network(nn.Sequential(nn.Conv3d(2, 4, 3)).train(), cpu)
    assert not net.training
    assert next(net.parameters()).is_contiguous(memory_format=torch.channels_last_3d)


def test_a_batch_under_autocast() -> None:
    with torch.no_grad():
        assert AutocastInferer("bfloat16")(picture(8, 8, 8), nn.Conv3d(1, 2, 3)).dtype == torch.bfloat16
        assert AutocastInferer("float32")(picture(8, 8, 8), nn.Conv3d(1, 2, 3)).dtype == torch.float32


def test_messages() -> None:
    with pytest.raises(
        ValueError, match=r"memory: one of \['auto', 'full', 'low', 'windows'\] is needed, found 'tiny'"
    ):
        TwoStageInferer(LAYOUT, memory="tiny")
    for make in (AutocastInferer, lambda name: TwoStageInferer(LAYOUT, precision=name)):
        with pytest.raises(ValueError, match=r"precision: one of \['float32', .*\] or null is needed, found 'half'"):
            make("half")
    with pytest.raises(ValueError, match="memory: mode low needs a MultiTaskNet, got Conv3d: take full or windows"):
        run(nn.Conv3d(1, 1, 1), picture(8, 8, 8), "low")
    with pytest.raises(ValueError, match="second_look: a MultiTaskNet is needed, got Conv3d: set second_look to false"):
        run(nn.Conv3d(1, 1, 1), picture(8, 8, 8), second_look=True)


def test_chunks_of_planes_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mode ``low`` never hands more than a few planes to a convolution of a published U-Net."""
    monkeypatch.setattr(planes.plane_ranges, "__defaults__", (2**14,))
    seen: list[int] = []
    plain = nn.functional.conv3d

    def conv3d(x: Tensor, *args: Any, **options: Any) -> Tensor:
        seen.append(x[:, :, :, 0, 0].numel())
        return plain(x, *args, **options)

    net = trained_like("U-Net of unit features")
    monkeypatch.setattr(planes.nnf, "conv3d", conv3d)
    run(net, picture(64, 16, 16), "low")
    assert len(seen) > 50
    assert max(seen) <= 24 * 18  # channels times planes: one and those on both sides, or a volume of 16 planes


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_the_gpu_gives_what_the_cpu_gives(mode: str) -> None:
    for name in ("two scales at stride 2", "U-Net of unit features", "residual U-Net"):
        net, image = trained_like(name), picture(32, 32, 64)
        expected = run(net, image, mode, mirror=True)
        found = run(net.cuda(), image.cuda(), mode, mirror=True).cpu()
        assert float((found - expected).abs().mean()) < 1e-3 * float(expected.abs().max())
