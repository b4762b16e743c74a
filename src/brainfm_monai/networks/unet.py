"""The U-Nets of the published checkpoints: BrainFM's and the residual one of SuperSynth."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

GROUPS = 8  # groups of the group normalisation; 1 where a unit's input has fewer channels (BrainFM)
NEGATIVE_SLOPE = 0.01  # LeakyReLU of BrainFM, SuperSynth and nnU-Net
RESIDUAL_SLOPE = 0.1  # LeakyReLU after SuperSynth's residual sum


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS if channels >= GROUPS else 1, channels)


def _conv(in_channels: int, out_channels: int) -> nn.Conv3d:
    return nn.Conv3d(in_channels, out_channels, kernel_size=3, padding=1, bias=False)


class ConvUnit(nn.Sequential):
    """3x3x3 convolution without bias after or before a group normalisation, and LeakyReLU."""

    def __init__(self, in_channels: int, out_channels: int, norm_first: bool) -> None:
        conv, norm = _conv(in_channels, out_channels), _group_norm(in_channels if norm_first else out_channels)
        super().__init__(*((norm, conv) if norm_first else (conv, norm)), nn.LeakyReLU(NEGATIVE_SLOPE))


class ResidualBlock(nn.Module):
    """A 1x1x1 projection, and what two 3x3x3 convolutions add to it."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.projection = nn.Conv3d(in_channels, out_channels, kernel_size=1)
        self.first = ConvUnit(out_channels, out_channels, norm_first=False)
        self.second = nn.Sequential(_conv(out_channels, out_channels), _group_norm(out_channels))
        self.activation = nn.LeakyReLU(RESIDUAL_SLOPE)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W, D) to (B, out_channels, H, W, D)."""
        x = self.projection(x)
        return self.activation(self.second(self.first(x)) + x)


class DoubleUnit(nn.Sequential):
    """Two units, one after the other."""

    def __init__(self, in_channels: int, between: int, out_channels: int, norm_first: bool) -> None:
        first = ConvUnit(in_channels, between, norm_first)
        super().__init__(first, ConvUnit(between, out_channels, norm_first))


class UNet(nn.Module):
    """The 3-D U-Net of BrainFM, whose skips are concatenated: image in, feature map of the same size out.

    ``features`` are the channels of every level, finest first. ``unit_norm`` divides the feature vector of every voxel
    by its length, as the published BrainFM does (arXiv 2509.00549). Less than two levels are a ValueError.
    """

    norm_first = True

    @staticmethod
    def encoder(in_channels: int, out_channels: int) -> nn.Module:
        """One level of the way down."""
        return DoubleUnit(in_channels, max(out_channels // 2, in_channels), out_channels, norm_first=True)

    def __init__(
        self, in_channels: int = 1, features: Sequence[int] = (64, 128, 256, 512, 1024, 2048), unit_norm: bool = False
    ) -> None:
        super().__init__()
        if len(features) < 2:
            raise ValueError(f"{type(self).__name__}: 'features' must name at least two levels, got {tuple(features)}")
        self.in_channels, self.out_channels, self.features = in_channels, features[0], tuple(features)
        self.unit_norm = unit_norm
        sizes = zip([in_channels, *features[:-1]], features, strict=True)
        self.encoders = nn.ModuleList(self.encoder(i, o) for i, o in sizes)
        self.decoders = nn.ModuleList(
            DoubleUnit(fine + coarse, fine, fine, self.norm_first)
            for fine, coarse in zip(features[-2::-1], features[:0:-1], strict=True)
        )

    def forward(self, image: Tensor) -> Tensor:
        """Map an image of shape (B, in_channels, H, W, D) to features of shape (B, features[0], H, W, D)."""
        skips: list[Tensor] = []
        x = image
        for level, encoder in enumerate(self.encoders):
            x = encoder(nnf.max_pool3d(x, 2) if level > 0 else x)
            skips.append(x)
        for level, decoder in enumerate(self.decoders):
            skip = skips[len(skips) - 2 - level]
            x = decoder(torch.cat([skip, nnf.interpolate(x, size=skip.shape[2:])], dim=1))
        return nnf.normalize(x, dim=1) if self.unit_norm else x


class ResidualUNet(UNet):
    """The 3-D U-Net of SuperSynth (FreeSurfer 8, mri_super_synth), as :class:`UNet`, with a residual encoder."""

    encoder: Any = ResidualBlock
    norm_first = False

    def __init__(self, in_channels: int = 1, features: Sequence[int] = (64, 128, 256, 512, 1024)) -> None:
        super().__init__(in_channels, features)
