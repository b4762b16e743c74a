"""Networks: one backbone, one 1x1x1 convolution for all tasks, one tensor out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from brainfm_monai.tasks import TaskLayout

__all__ = ["MultiTaskNet", "TwoScaleUNet", "UNet"]

GROUPS = 8  # groups of the group normalisation; 1 where a unit's input has fewer channels (BrainFM)
NEGATIVE_SLOPE = 0.01  # LeakyReLU of BrainFM


class ConvUnit(nn.Sequential):
    """GroupNorm, 3x3x3 convolution without bias, LeakyReLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            nn.GroupNorm(GROUPS if in_channels >= GROUPS else 1, in_channels),
            nn.Conv3d(in_channels, out_channels, kernel_size=3, padding=1, bias=False),
            nn.LeakyReLU(NEGATIVE_SLOPE),
        )


class UNet(nn.Module):
    """The 3-D U-Net of BrainFM: image in, feature map of the same size out.

    Args:
        in_channels: channels of the image.
        features: channels of every level, finest first.
        unit_norm: divide the feature vector of every voxel by its length, as the published BrainFM does.

    Raises:
        ValueError: if ``features`` is shorter than two levels.

    Reference:
        BrainFM (arXiv 2509.00549) with 6 levels of 64, 128, ... channels.
    """

    def __init__(
        self, in_channels: int = 1, features: Sequence[int] = (64, 128, 256, 512, 1024, 2048), unit_norm: bool = False
    ) -> None:
        super().__init__()
        if len(features) < 2:
            raise ValueError(f"UNet: 'features' must name at least two levels, got {tuple(features)}")
        self.unit_norm = unit_norm
        self.out_channels = features[0]
        inputs = [in_channels, *features[:-1]]
        self.encoders = nn.ModuleList(
            nn.Sequential(ConvUnit(i, max(o // 2, i)), ConvUnit(max(o // 2, i), o)) for i, o in zip(inputs, features, strict=True)
        )
        self.decoders = nn.ModuleList(
            nn.Sequential(ConvUnit(fine + coarse, fine), ConvUnit(fine, fine))
            for fine, coarse in zip(features[-2::-1], features[:0:-1], strict=True)
        )

    def forward(self, image: Tensor) -> Tensor:
        """Map an image of shape (B, in_channels, H, W, D) to features of shape (B, features[0], H, W, D)."""
        skips: list[Tensor] = []
        x = image
        for level, encoder in enumerate(self.encoders):
            if level > 0:
                x = nnf.max_pool3d(x, 2)
            x = encoder(x)
            skips.append(x)
        for level, decoder in enumerate(self.decoders):
            skip = skips[len(skips) - 2 - level]
            x = decoder(torch.cat([skip, nnf.interpolate(x, size=skip.shape[2:])], dim=1))
        return nnf.normalize(x, dim=1) if self.unit_norm else x


class TwoScaleUNet(nn.Module):
    """A U-Net that sees the image at half the resolution, and one finer level that adds detail to it.

    The coarse network meets the same images as when it was trained alone, so that its weights keep their worth from the first
    step. Its features are interpolated and stand beside those of the fine level in the output.

    Args:
        in_channels: channels of the image.
        features: channels of every level, finest first; the first is the fine level, the others are the coarse U-Net.
    """

    def __init__(self, in_channels: int = 1, features: Sequence[int] = (16, 32, 64, 128, 256)) -> None:
        super().__init__()
        fine = features[0]
        self.out_channels = fine + features[1]
        self.coarse = UNet(in_channels, features[1:])
        self.encoder = nn.Sequential(
            ConvUnit(in_channels, max(fine // 2, in_channels)), ConvUnit(max(fine // 2, in_channels), fine)
        )
        self.decoder = nn.Sequential(ConvUnit(fine + features[1], fine), ConvUnit(fine, fine))

    def forward(self, image: Tensor) -> Tensor:
        """Map an image of shape (B, in_channels, H, W, D) to features of shape (B, features[0] + features[1], H, W, D)."""
        context = self.coarse(nnf.avg_pool3d(image, 2))
        context = nnf.interpolate(context, size=image.shape[2:], mode="trilinear", align_corners=False)
        detail = self.decoder(torch.cat([self.encoder(image), context], dim=1))
        return torch.cat([detail, context], dim=1)


class MultiTaskNet(nn.Module):
    """A backbone and one 1x1x1 convolution whose output channels are named by a task layout.

    Args:
        backbone: module that maps (B, 1, H, W, D) to (B, ``out_channels``, H, W, D) and has the attribute ``out_channels``.
        layout: names of the output channels.
        stride: voxels of the input per voxel of the backbone: the input is averaged over ``stride``^3 voxels, the
            features are interpolated back. A backbone trained at 2 mm serves 1 mm scans with stride 2.

    Raises:
        ValueError: if ``stride`` is smaller than 1.
    """

    def __init__(self, backbone: nn.Module, layout: TaskLayout, stride: int = 1) -> None:
        super().__init__()
        if stride < 1:
            raise ValueError(f"MultiTaskNet: 'stride' must be at least 1, got {stride}")
        self.backbone = backbone
        self.stride = stride
        self.layout = layout
        self.head = nn.Conv3d(int(backbone.out_channels), layout.channels, kernel_size=1)  # type: ignore[arg-type]

    def features(self, image: Tensor) -> Tensor:
        """Feature map of an image of shape (B, 1, H, W, D): shape (B, backbone.out_channels, H, W, D)."""
        if self.stride == 1:
            return self.backbone(image)
        coarse = self.backbone(nnf.avg_pool3d(image, self.stride))
        return nnf.interpolate(coarse, size=image.shape[2:], mode="trilinear", align_corners=False)

    def forward(self, image: Tensor) -> Tensor:
        """Map an image of shape (B, 1, H, W, D), intensities in [0, 1], to (B, layout.channels, H, W, D)."""
        return self.head(self.features(image))
