"""All networks here are tiny and random."""

import pytest
import torch
import torch.nn.functional as nnf

from brainfm_monai.networks import MultiTaskNet, TwoScaleUNet, UNet
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


def test_stride_sees_block_means_and_the_trained_output_between_them() -> None:
    torch.manual_seed(0)
    coarse = MultiTaskNet(UNet(features=(8, 16)), LAYOUT).eval()
    fine = MultiTaskNet(coarse.backbone, LAYOUT, stride=2).eval()
    fine.load_state_dict(coarse.state_dict())
    image = torch.rand(1, 1, 8, 8, 8)
    blocks = nnf.avg_pool3d(image, 2)
    expected = nnf.interpolate(coarse(blocks), scale_factor=2, mode="trilinear")
    torch.testing.assert_close(fine(image), expected, atol=1e-5, rtol=1e-5)


def test_two_scales_join_the_coarse_features_and_the_detail() -> None:
    torch.manual_seed(0)
    net = TwoScaleUNet(features=(8, 16, 32)).eval()
    image = torch.rand(1, 1, 8, 12, 16)
    output = net(image)
    assert output.shape == (1, net.out_channels, 8, 12, 16)
    context = nnf.interpolate(net.coarse(nnf.avg_pool3d(image, 2)), scale_factor=2, mode="trilinear")
    torch.testing.assert_close(output[:, 8:], context, atol=1e-5, rtol=1e-5)
    state = net.state_dict()
    detail = unit(unit(image, state, "encoder.0"), state, "encoder.1")
    detail = unit(unit(torch.cat([detail, context], 1), state, "decoder.0"), state, "decoder.1")
    torch.testing.assert_close(output[:, :8], detail, atol=1e-4, rtol=1e-4)


def test_messages() -> None:
    with pytest.raises(ValueError, match=r"'features' must name at least two levels, got \(8,\)"):
        UNet(features=(8,))
    with pytest.raises(ValueError, match="'stride' must be at least 1, got 0"):
        MultiTaskNet(UNet(features=(8, 16)), LAYOUT, stride=0)
