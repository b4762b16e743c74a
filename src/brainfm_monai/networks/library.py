"""MONAI's networks as backbones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from monai.networks.nets import DynUNet, SegResNet, SwinUNETR
from monai.networks.nets import UNet as MonaiUNet
from torch import nn

__all__ = ["LIBRARY", "library_backbone"]


def _swin_unetr(out_channels: int, feature_size: int = 24, **options: Any) -> nn.Module:
    network = SwinUNETR(in_channels=1, out_channels=out_channels, feature_size=feature_size, **options)
    if feature_size != out_channels:
        return network
    network.out = nn.Identity()  # type: ignore[assignment]  # its last convolution is 1x1x1, as the head is: one of them is enough
    return network


def _unet(
    out_channels: int, channels: Sequence[int] = (32, 64, 128, 256), strides: Sequence[int] = (2, 2, 2), **options: Any
) -> nn.Module:
    return MonaiUNet(
        spatial_dims=3, in_channels=1, out_channels=out_channels, channels=channels, strides=strides, **options
    )


def _dyn_unet(
    out_channels: int,
    kernel_size: Sequence[int] = (3, 3, 3, 3),
    strides: Sequence[int] = (1, 2, 2, 2),
    norm_name: Any = ("group", {"num_groups": 8}),
    **options: Any,
) -> nn.Module:
    return DynUNet(
        spatial_dims=3,
        in_channels=1,
        out_channels=out_channels,
        kernel_size=kernel_size,
        strides=strides,
        upsample_kernel_size=list(strides)[1:],
        norm_name=norm_name,
        **options,
    )


def _seg_res_net(out_channels: int, **options: Any) -> nn.Module:
    return SegResNet(spatial_dims=3, in_channels=1, out_channels=out_channels, **options)


LIBRARY: dict[str, Callable[..., nn.Module]] = {
    "SwinUNETR": _swin_unetr,  # sizes divisible by 32; needs einops
    "UNet": _unet,
    "DynUNet": _dyn_unet,
    "SegResNet": _seg_res_net,
}


def library_backbone(name: str, out_channels: int = 24, **options: Any) -> nn.Module:
    """One of MONAI's networks as a backbone for :class:`~brainfm_monai.networks.MultiTaskNet`.

    Args:
        name: a name out of :data:`LIBRARY`.
        out_channels: number of features it gives; 24 is SwinUNETR's own width, whose last convolution is then left out.
        options: further arguments of MONAI's class, as in ``feature_size=48`` or ``channels=[16, 32, 64]``.

    Returns:
        Module that maps (B, 1, H, W, D) to (B, out_channels, H, W, D) and has the attribute ``out_channels``.

    Raises:
        ValueError: if there is no such name.
    """
    if name not in LIBRARY:
        raise ValueError(f"library_backbone: 'name' must be one of {list(LIBRARY)}, got '{name}'")
    backbone = LIBRARY[name](out_channels=out_channels, **options)
    backbone.out_channels = out_channels  # type: ignore[assignment]
    return backbone
