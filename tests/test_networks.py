"""All networks here are tiny and random."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as nnf
from monai.bundle import ConfigParser
from monai.networks.nets import UNet as MonaiUNet
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from brainfm_monai.networks import (
    AdditiveUNet,
    ContextHead,
    FeatureMap,
    MultiTaskNet,
    ResidualUNet,
    TwoScaleUNet,
    UNet,
    encode_by_planes,
    planes,
    trainable_parameters,
)
from brainfm_monai.networks.multitask import PRIOR
from brainfm_monai.networks.residual import SampleNorm
from brainfm_monai.tasks import TaskLayout

LAYOUT = TaskLayout(["segmentation", "distance", "log_bias_field", "mni"])


def unit(x: torch.Tensor, state: dict[str, torch.Tensor], prefix: str) -> torch.Tensor:
    groups = 8 if x.shape[1] >= 8 else 1
    x = nnf.group_norm(x, groups, state[f"{prefix}.0.weight"], state[f"{prefix}.0.bias"])
    return nnf.leaky_relu(nnf.conv3d(x, state[f"{prefix}.1.weight"], padding=1), 0.01)


def test_unet_is_the_network_of_the_paper_written_out() -> None:
    torch.manual_seed(0)
    net = UNet(features=(8, 16, 32), unit_norm=True)
    state = {name: torch.randn_like(value) * 0.3 for name, value in net.state_dict().items()}
    net.load_state_dict(state)
    image = torch.rand(1, 1, 9, 10, 12)
    a = unit(unit(image, state, "encoders.0.0"), state, "encoders.0.1")
    b = unit(unit(nnf.max_pool3d(a, 2), state, "encoders.1.0"), state, "encoders.1.1")
    c = unit(unit(nnf.max_pool3d(b, 2), state, "encoders.2.0"), state, "encoders.2.1")
    d = torch.cat([b, nnf.interpolate(c, size=b.shape[2:])], 1)
    d = unit(unit(d, state, "decoders.0.0"), state, "decoders.0.1")
    e = torch.cat([a, nnf.interpolate(d, size=a.shape[2:])], 1)
    e = unit(unit(e, state, "decoders.1.0"), state, "decoders.1.1")
    expected = e / e.norm(dim=1, keepdim=True).clamp_min(1e-12)
    torch.testing.assert_close(net(image), expected, atol=1e-5, rtol=1e-5)


def test_published_widths_give_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in UNet().parameters()) == 264_063_138
        assert sum(p.numel() for p in UNet(features=(64, 128, 256, 512, 1024)).parameters()) == 65_869_986


def test_one_tensor_with_the_channels_of_the_layout() -> None:
    net = MultiTaskNet(UNet(features=(8, 16)), LAYOUT, stride=2).eval()
    image = torch.rand(1, 1, 8, 12, 16)
    output = net(image)
    assert output.shape == (1, LAYOUT.channels, 8, 12, 16)
    assert net.features(image).shape == (1, 8, 8, 12, 16)
    assert net.encode(image).shape == (1, 8, 4, 6, 8)
    torch.testing.assert_close(net.decode(net.encode(image), image), output)


def test_a_context_head_makes_the_maps_of_its_tasks_and_no_other() -> None:
    torch.manual_seed(0)
    layout, image = TaskLayout(["segmentation", "distance", "CT", "lesion"]), torch.rand(1, 1, 8, 12, 16)
    net = MultiTaskNet(UNet(features=(8, 16)), layout, stride=2, context=["lesion"]).eval()
    before = net(image).detach()
    assert float(before[:, layout.slices["lesion"]].mean()) == pytest.approx(PRIOR, abs=0.5)
    assert net.context is not None
    nn.init.normal_(net.context.last.weight)
    changed = (net(image) != before).flatten(2).any(2)[0]
    names = [name for name, moved in zip(layout.channel_names, changed.tolist(), strict=True) if moved]
    assert names == ["lesion"]
    assert MultiTaskNet(UNet(features=(8, 16)), LAYOUT, context=["lesion"]).context is None
    with pytest.raises(ValueError, match=r"'context' must name the last tasks of \['segmentation', .*\], got \['CT'\]"):
        MultiTaskNet(UNet(features=(8, 16)), layout, context=["CT"])


def test_a_context_head_sees_seven_voxels_to_each_side() -> None:
    torch.manual_seed(0)
    head = ContextHead(3, TaskLayout(["lesion"]), ["lesion"], width=4)
    features, image = torch.rand(1, 3, 24, 24, 24), torch.rand(1, 1, 24, 24, 24)
    changed = image.clone()
    changed[0, 0, 12, 9, 14] += 10
    with torch.no_grad():
        moved = (head(features, image) != head(features, changed))[0, 0].nonzero()
    assert moved.min(0).values.tolist() == [5, 2, 7]
    assert moved.max(0).values.tolist() == [19, 16, 21]


def test_stride_sees_block_means_and_the_trained_output_between_them() -> None:
    torch.manual_seed(0)
    coarse = MultiTaskNet(UNet(features=(8, 16)), LAYOUT).eval()
    fine = MultiTaskNet(coarse.backbone, LAYOUT, stride=2).eval()
    fine.load_state_dict(coarse.state_dict())
    image = torch.rand(1, 1, 8, 8, 8)
    blocks = nnf.avg_pool3d(image, 2)
    expected = nnf.interpolate(coarse(blocks), scale_factor=2, mode="trilinear")
    torch.testing.assert_close(fine(image), expected, atol=1e-5, rtol=1e-5)


def test_a_sample_alone_is_normalised_as_in_a_batch() -> None:
    torch.manual_seed(0)
    norm = SampleNorm(4)
    torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    torch.nn.init.uniform_(norm.bias, -1, 1)
    batch = torch.rand(3, 4, 5, 6, 7) * torch.tensor([1.0, 5.0, 0.1, 2.0]).reshape(1, 4, 1, 1, 1)
    expected = nnf.instance_norm(batch, weight=norm.weight, bias=norm.bias)
    torch.testing.assert_close(norm(batch), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(torch.cat([norm(one[None]) for one in batch]), expected, atol=1e-5, rtol=1e-5)


def preactivated(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    """A block written out."""
    y = x
    for i in (1, 2):
        y = nnf.instance_norm(y, weight=state[f"{name}.norm{i}.weight"], bias=state[f"{name}.norm{i}.bias"])
        y = nnf.conv3d(torch.where(y > 0, y, 0.01 * y), state[f"{name}.conv{i}.weight"], padding=1)
    return x + y


def test_additive_unet_adds_skips() -> None:
    torch.manual_seed(0)
    net = AdditiveUNet(1, (4, 6)).eval()
    image, state = torch.rand(1, 1, 6, 8, 10), net.state_dict()
    fine = preactivated(nnf.conv3d(image, state["stem.weight"], state["stem.bias"], padding=1), state, "encoders.0.0")
    x = nnf.conv3d(fine, state["down.0.weight"], state["down.0.bias"], stride=2)
    for i in range(2):
        x = preactivated(x, state, f"bottom.{i}")
    x = fine + nnf.conv_transpose3d(x, state["up.0.weight"], state["up.0.bias"], stride=2)
    x = nnf.instance_norm(preactivated(x, state, "decoders.0.0"), weight=state["norm.weight"], bias=state["norm.bias"])
    torch.testing.assert_close(net(image), torch.where(x > 0, x, 0.01 * x), atol=1e-4, rtol=1e-4)
    assert net(torch.rand(2, 1, 7, 9, 11)).shape == (2, 4, 7, 9, 11)  # planes that a pooling loses come back


def test_two_scales_put_the_coarse_features_beside_the_detail() -> None:
    torch.manual_seed(0)
    net = TwoScaleUNet(features=(8, 16, 32)).eval()
    image = torch.rand(1, 1, 8, 12, 16)
    context = net.coarse(nnf.avg_pool3d(image, 2))
    output = net(image)
    assert output.shape == (1, net.out_channels, 8, 12, 16)
    torch.testing.assert_close(output[:, 8:], nnf.interpolate(context, scale_factor=2), atol=1e-5, rtol=1e-5)
    other = net(image + 0.1 * (torch.arange(8).reshape(8, 1, 1) % 2 - 0.5))  # detail that the coarse network cannot see
    torch.testing.assert_close(other[:, 8:], output[:, 8:], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(other[:, :8], output[:, :8], atol=1e-2)
    torch.nn.init.ones_(net.down.weight)
    assert not torch.allclose(
        net(image)[:, 8:], output[:, 8:], atol=1e-2
    )  # after training the fine level tells it of it
    assert net(torch.rand(1, 1, 9, 11, 13)).shape[2:] == (9, 11, 13)


def test_messages() -> None:
    with pytest.raises(ValueError, match=r"AdditiveUNet: 'features' must name at least two levels, got \(8,\)"):
        AdditiveUNet(features=(8,))
    with pytest.raises(ValueError, match=r"'features' must name at least two levels, got \(8,\)"):
        UNet(features=(8,))
    with pytest.raises(ValueError, match="'stride' must be at least 1, got 0"):
        MultiTaskNet(UNet(features=(8, 16)), LAYOUT, stride=0)


def test_the_residual_unet_has_supersynths_number_of_parameters_per_block() -> None:
    with torch.device("meta"):
        net = ResidualUNet(1, (64, 128))
    block = (
        1 * 64 + 64 + 2 * (64 * 64 * 27 + 2 * 64)
    )  # projection with bias, two convolutions, two group normalisations
    assert sum(p.numel() for p in net.encoders[0].parameters()) == block
    decoder = (64 + 128) * 64 * 27 + 64 * 64 * 27 + 2 * 2 * 64
    assert sum(p.numel() for p in net.decoders[0].parameters()) == decoder


def test_the_head_computes_in_float32_under_autocast() -> None:
    torch.manual_seed(0)
    net = MultiTaskNet(UNet(features=(8, 16)), LAYOUT).eval()
    image = torch.rand(1, 1, 8, 8, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        output, features = net(image), net.features(image)
    assert features.dtype == torch.bfloat16
    assert output.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(output, net.head(features.float()), rtol=0, atol=0)


def test_the_feature_map_has_length_one_and_the_direction_of_the_features() -> None:
    torch.manual_seed(0)
    net = MultiTaskNet(UNet(features=(8, 16)), LAYOUT, stride=2).eval()
    image = torch.rand(1, 1, 8, 12, 16)
    with torch.no_grad():
        found, features = FeatureMap(net)(image), net.features(image)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(1, 8, 12, 16), atol=1e-5, rtol=0)
    torch.testing.assert_close(found * features.norm(dim=1, keepdim=True), features, atol=1e-5, rtol=1e-5)


BACKBONES: dict[str, Callable[[], UNet | ResidualUNet]] = {
    "UNet": lambda: UNet(1, (8, 16, 24)),
    "UNet of length one": lambda: UNet(1, (8, 16, 24), unit_norm=True),
    "ResidualUNet": lambda: ResidualUNet(1, (8, 16, 24)),
}


@pytest.mark.parametrize("limit", [planes.CHUNK_BYTES, 40_000])
@pytest.mark.parametrize("name", BACKBONES)
def test_chunks_of_planes_give_the_same_features(name: str, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planes.plane_ranges, "__defaults__", (limit,))
    torch.manual_seed(0)
    backbone = BACKBONES[name]().eval()
    for module in backbone.modules():
        if isinstance(module, torch.nn.GroupNorm):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.bias, 0.1, 0.5)
    for shape in ((2, 1, 16, 20, 24), (1, 1, 17, 22, 19)):
        image = torch.rand(shape) * 5 - 1
        before = image.clone()
        with torch.no_grad():
            exact = copy.deepcopy(backbone).double()(image.double())
            expected = backbone(image)
            found = encode_by_planes(backbone, image)
            rounded = encode_by_planes(backbone, image.bfloat16())
        error, largest = (found - exact).abs(), float(exact.abs().max())
        assert float(error.mean()) < 1e-5 * float(exact.abs().mean())
        # A feature vector that is near 0 before it is divided by its length magnifies rounding, in the plain network too.
        assert float(error.max()) < (1e-2 if "length" in name else 2e-5) * largest
        assert rounded.dtype == torch.bfloat16
        assert float((rounded.float() - expected).abs().mean() / expected.abs().mean()) < 0.05
        assert torch.equal(image, before)


@pytest.mark.parametrize("name", BACKBONES)
def test_activations_of_chunks_of_planes_take_no_memory(name: str) -> None:
    seen: set[str] = set()

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            seen.add(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with Record():
        encode_by_planes(BACKBONES[name]().eval(), torch.rand(1, 1, 16, 20, 24))
    assert {"leaky_relu", "leaky_relu_"} & seen == {"leaky_relu_"}


BACKBONE_OPTIONS: dict[str, dict[str, Any]] = {
    "SwinUNETR": {"in_channels": 1, "feature_size": 12, "out_channels": 12},
    "UNet": {"spatial_dims": 3, "in_channels": 1, "channels": (8, 16), "strides": (2,), "out_channels": 8},
    "SegResNet": {"init_filters": 8, "out_channels": 8},
}


@pytest.mark.parametrize("name", BACKBONE_OPTIONS)
def test_monais_networks_are_backbones(name: str) -> None:
    options = BACKBONE_OPTIONS[name]
    config: dict[str, Any] = {
        "_target_": "brainfm_monai.networks.MultiTaskNet",
        "backbone": {"_target_": name, **options},
    }
    config |= {"layout": LAYOUT, "out_channels": options["out_channels"]}
    net = ConfigParser({"network": config}).get_parsed_content("network").eval()
    image = torch.rand(1, 1, 32, 32, 64)
    with torch.no_grad():
        assert net.features(image).shape == (1, options["out_channels"], 32, 32, 64)
        assert net(image).shape == (1, LAYOUT.channels, 32, 32, 64)
    if name != "UNet":  # MONAI's UNet tells the number by itself
        with pytest.raises(ValueError, match=f"MultiTaskNet: pass 'out_channels', which {name} does not have"):
            MultiTaskNet(net.backbone, LAYOUT)


def test_a_frozen_backbone_stays_as_it_is_in_training() -> None:
    torch.manual_seed(0)
    backbone = MonaiUNet(3, 1, 8, (8, 16), (2,), norm="batch", dropout=0.5)
    net = MultiTaskNet(backbone, LAYOUT, freeze_backbone=True)
    before = {name: value.clone() for name, value in net.backbone.state_dict().items()}
    optimizer = torch.optim.AdamW(trainable_parameters([net]), lr=0.1, weight_decay=0.1)
    assert not net.eval().head.training
    assert net.train().head.training
    assert not any(module.training for module in net.backbone.modules())
    head, image = net.head.weight.detach().clone(), torch.rand(1, 1, 8, 8, 8)
    features = net.features(image)
    net(image).square().mean().backward()
    optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in net.backbone.state_dict().items())
    assert torch.equal(net.features(image), features)
    assert not torch.equal(head, net.head.weight)
    free = MultiTaskNet(MonaiUNet(3, 1, 8, (8, 16), (2,)), LAYOUT).eval().train()
    assert all(module.training for module in free.modules())


def test_an_optimizer_gets_what_is_not_frozen_once() -> None:
    first, second = torch.nn.Linear(2, 3), torch.nn.Linear(3, 4)
    second.bias.requires_grad_(False)
    found = trainable_parameters([first, second, first])
    assert [id(p) for p in found] == [id(p) for p in (first.weight, first.bias, second.weight)]
    with pytest.raises(ValueError, match=r"a parameter that is not frozen is needed in 'modules', found none"):
        trainable_parameters([first.requires_grad_(False)])


@pytest.mark.gpu
def test_chunks_of_planes_agree_on_the_gpu() -> None:
    torch.manual_seed(0)
    backbone = UNet(1, (8, 16, 24)).eval().cuda()
    image = torch.rand(1, 1, 32, 48, 40, device="cuda")
    with torch.no_grad():
        torch.testing.assert_close(encode_by_planes(backbone, image), backbone(image), atol=1e-3, rtol=1e-3)
