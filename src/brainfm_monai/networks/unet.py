"""The U-Nets of the published checkpoints: BrainFM's and the residual one of SuperSynth."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

__all__ = ["ConvUnit", "NormedConv", "ResidualBlock", "ResidualUNet", "UNet"]

GROUPS = 8  # groups of the group normalisation; 1 where a unit's input has fewer channels (BrainFM)
NEGATIVE_SLOPE = 0.01  # LeakyReLU of BrainFM and SuperSynth
RESIDUAL_SLOPE = 0.1  # LeakyReLU after SuperSynth's residual sum


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS if channels >= GROUPS else 1, channels)


class ConvUnit(nn.Sequential):
    """GroupNorm, 3x3x3 convolution without bias, LeakyReLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            _group_norm(in_channels),
            nn.Conv3d(in_channels, out_channels, kernel_size=3, padding=1, bias=False),
            nn.LeakyReLU(NEGATIVE_SLOPE),
        )


class NormedConv(nn.Sequential):
    """3x3x3 convolution without bias, GroupNorm, LeakyReLU."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            nn.Conv3d(in_channels, out_channels, kernel_size=3, padding=1, bias=False),
            _group_norm(out_channels),
            nn.LeakyReLU(NEGATIVE_SLOPE),
        )


class ResidualBlock(nn.Module):
    """A 1x1x1 projection, and what two 3x3x3 convolutions add to it."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.projection = nn.Conv3d(in_channels, out_channels, kernel_size=1)
        self.first = NormedConv(out_channels, out_channels)
        self.second = nn.Sequential(
            nn.Conv3d(out_channels, out_channels, kernel_size=3, padding=1, bias=False), _group_norm(out_channels)
        )
        self.activation = nn.LeakyReLU(RESIDUAL_SLOPE)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, in_channels, H, W, D) to (B, out_channels, H, W, D)."""
        x = self.projection(x)
        return self.activation(self.second(self.first(x)) + x)


def _check_levels(name: str, features: Sequence[int]) -> None:
    if len(features) < 2:
        raise ValueError(f"{name}: 'features' must name at least two levels, got {tuple(features)}")


class _Levels(nn.Module):
    """What the U-Nets share: a method and not a function, because TorchScript hands no list of modules to a function."""

    def __init__(self, encoders: Iterable[nn.Module], decoders: Iterable[nn.Module]) -> None:
        super().__init__()
        self.encoders, self.decoders = nn.ModuleList(encoders), nn.ModuleList(decoders)

    def down_and_up(self, image: Tensor) -> Tensor:
        """Pool by 2 between encoders; interpolate to the skip's size and put behind it for decoders."""
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
        return x


class UNet(_Levels):
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
        _check_levels("UNet", features)
        inputs = [in_channels, *features[:-1]]
        super().__init__(
            (
                nn.Sequential(ConvUnit(i, max(o // 2, i)), ConvUnit(max(o // 2, i), o))
                for i, o in zip(inputs, features, strict=True)
            ),
            (
                nn.Sequential(ConvUnit(fine + coarse, fine), ConvUnit(fine, fine))
                for fine, coarse in zip(features[-2::-1], features[:0:-1], strict=True)
            ),
        )
        self.unit_norm = unit_norm
        self.in_channels = in_channels
        self.out_channels = features[0]
        self.features = tuple(features)

    def forward(self, image: Tensor) -> Tensor:
        """Map an image of shape (B, in_channels, H, W, D) to features of shape (B, features[0], H, W, D)."""
        x = self.down_and_up(image)
        return nnf.normalize(x, dim=1) if self.unit_norm else x


class ResidualUNet(_Levels):
    """The 3-D U-Net of SuperSynth, with a residual encoder: image in, feature map of the same size out.

    Args:
        in_channels: channels of the image.
        features: channels of every level, finest first.

    Raises:
        ValueError: if ``features`` is shorter than two levels.

    Reference:
        FreeSurfer 8, mri_super_synth, with 5 levels.
    """

    def __init__(self, in_channels: int = 1, features: Sequence[int] = (64, 128, 256, 512, 1024)) -> None:
        _check_levels("ResidualUNet", features)
        super().__init__(
            (ResidualBlock(i, o) for i, o in zip([in_channels, *features[:-1]], features, strict=True)),
            (
                nn.Sequential(NormedConv(fine + coarse, fine), NormedConv(fine, fine))
                for fine, coarse in zip(features[-2::-1], features[:0:-1], strict=True)
            ),
        )
        self.in_channels = in_channels
        self.out_channels = features[0]
        self.features = tuple(features)

    def forward(self, image: Tensor) -> Tensor:
        """Map an image of shape (B, in_channels, H, W, D) to features of shape (B, features[0], H, W, D)."""
        return self.down_and_up(image)
