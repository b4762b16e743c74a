"""Residual U-Nets with additive skips and instance normalisation: what a CPU trains and runs fast in bfloat16."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from brainfm_monai.networks.unet import NEGATIVE_SLOPE


class SampleNorm(nn.InstanceNorm3d):
    """Instance normalisation with scale and shift, which is batch normalisation where a batch is one sample.

    torch computes the second several times faster on a CPU where the channels of a voxel lie side by side.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise every channel of every sample of (B, C, H, W, D)."""
        if not torch.jit.is_scripting():  # the size of the batch is looked at last, because a traced graph is for any
            if not torch.jit.is_tracing() and not torch.compiler.is_exporting() and len(x) == 1:
                return nnf.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)
        return nnf.instance_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)


class PreactivationBlock(nn.Module):
    """What two rounds of normalisation, LeakyReLU and 3x3x3 convolution add to their input (He et al., ECCV 2016)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = SampleNorm(channels), SampleNorm(channels)
        self.conv1 = nn.Conv3d(channels, channels, kernel_size=3, padding=1, bias=False)
        self.conv2 = nn.Conv3d(channels, channels, kernel_size=3, padding=1, bias=False)
        self.activation = nn.LeakyReLU(NEGATIVE_SLOPE)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, channels, H, W, D) to the same shape."""
        y = self.activation(self.norm1(x))  # one name for all, so that at most three tensors of this size are alive
        y = self.conv1(y)
        y = self.norm2(y)
        y = self.activation(y)
        y = self.conv2(y)
        return x + y


def _blocks(channels: int, count: int) -> nn.Sequential:
    return nn.Sequential(*(PreactivationBlock(channels) for _ in range(count)))


def _to_size(x: Tensor, like: Tensor) -> Tensor:
    """Repeat the last planes where a pooling lost an odd one."""
    h, w, d = like.shape[2] - x.shape[2], like.shape[3] - x.shape[3], like.shape[4] - x.shape[4]
    if not torch.jit.is_scripting():
        if torch.compiler.is_exporting():  # to a graph of sizes that are not known yet
            return nnf.pad(x, [0, d, 0, w, 0, h], mode="replicate")
    return nnf.pad(x, [0, d, 0, w, 0, h], mode="replicate") if max(h, w, d) > 0 else x


class AdditiveUNet(nn.Module):
    """A residual U-Net whose skips are added: image in, feature map of the same size out.

    Every level has two blocks on the way down and one on the way up, the finest level has one on the way down.
    ``features`` are the channels of every level, finest first; multiples of 16 suit the vector units of CPUs. Less than
    two levels are a ValueError. Skips are those of Myronenko (BrainLes 2018), normalisation and LeakyReLU those of
    nnU-Net (Isensee et al., Nature Methods 18, 2021).
    """

    def __init__(self, in_channels: int = 1, features: Sequence[int] = (64, 128, 256)) -> None:
        super().__init__()
        if len(features) < 2:
            raise ValueError(f"AdditiveUNet: 'features' must name at least two levels, got {tuple(features)}")
        steps = list(pairwise(features))
        self.in_channels, self.out_channels = in_channels, features[0]
        self.stem = nn.Conv3d(in_channels, features[0], kernel_size=3, padding=1)
        self.encoders = nn.ModuleList(_blocks(f, 2 if i else 1) for i, f in enumerate(features[:-1]))
        self.down = nn.ModuleList(nn.Conv3d(fine, coarse, kernel_size=2, stride=2) for fine, coarse in steps)
        self.bottom = _blocks(features[-1], 2)
        self.up = nn.ModuleList(nn.ConvTranspose3d(coarse, fine, 2, stride=2) for fine, coarse in steps[::-1])
        self.decoders = nn.ModuleList(_blocks(f, 1) for f in features[-2::-1])
        self.norm = SampleNorm(features[0])
        self.activation = nn.LeakyReLU(NEGATIVE_SLOPE)

    def forward(self, image: Tensor, more: Tensor | None = None) -> Tensor:
        """Map an image (B, in_channels, H, W, D), plus features of the finest level, to (B, features[0], H, W, D)."""
        x = self.stem(image)
        if more is not None:
            x = x + more
        skips: list[Tensor] = []
        for encoder, down in zip(self.encoders, self.down):  # noqa: B905  # TorchScript knows no strict zip
            x = encoder(x)
            skips.append(x)
            x = down(x)
        x = self.bottom(x)
        for level, (up, decoder) in enumerate(zip(self.up, self.decoders)):  # noqa: B905
            skip = skips[len(skips) - 1 - level]
            x = decoder(skip + _to_size(up(x), skip))
        return self.activation(self.norm(x))


class TwoScaleUNet(nn.Module):
    """An :class:`AdditiveUNet` that sees the image at half the resolution, and one finer level around it.

    The coarse network meets the same images as when it was trained alone, and its features stand, upsampled, beside
    those of the fine level in the output: a head that was trained on them keeps its worth from the first step. Without
    it, small structures are lost at the start, and do not come back. What the coarse network gets from the fine level
    starts at 0. ``features`` are the channels of the fine level, then of those of the coarse network.
    """

    def __init__(self, in_channels: int = 1, features: Sequence[int] = (32, 64, 128, 256)) -> None:
        super().__init__()
        fine, narrow, coarse = features[0], max(features[0] // 2, 1), features[1]
        self.in_channels, self.out_channels, self.fine = in_channels, fine + coarse, fine
        self.coarse = AdditiveUNet(in_channels, features[1:])
        first, last = (nn.Conv3d(*pair, kernel_size=3, padding=1) for pair in ((in_channels, narrow), (narrow, fine)))
        self.encoder = nn.Sequential(first, SampleNorm(narrow), nn.LeakyReLU(NEGATIVE_SLOPE), last)
        self.down = nn.Conv3d(fine, coarse, kernel_size=2, stride=2, bias=False)
        nn.init.zeros_(self.down.weight)
        self.up = nn.ConvTranspose3d(coarse, fine + coarse, kernel_size=2, stride=2)
        with torch.no_grad():  # the part that stands in the output begins as a repetition of the coarse voxels
            self.up.weight[:, fine:] = torch.eye(coarse).reshape(coarse, coarse, 1, 1, 1)
            assert self.up.bias is not None
            nn.init.zeros_(self.up.bias[fine:])
        self.decoder = _blocks(fine, 2)
        self.norm = SampleNorm(fine)
        self.activation = nn.LeakyReLU(NEGATIVE_SLOPE)

    def forward(self, image: Tensor) -> Tensor:
        """Map an image (B, in_channels, H, W, D) to features (B, features[0] + features[1], H, W, D)."""
        detail = self.encoder(image)
        context = self.coarse(nnf.avg_pool3d(image, 2), self.down(detail))
        context = _to_size(self.up(context), detail)
        detail = detail + context[:, : self.fine]
        for block in self.decoder:  # not the Sequential, whose caller would keep the input of the first block
            detail = block(detail)
        detail = self.norm(detail)
        detail = self.activation(detail)
        if not torch.jit.is_scripting():
            inference = not torch.is_grad_enabled() and not torch.compiler.is_exporting()
            is_alike = (detail.dtype, detail.stride(1)) == (context.dtype, context.stride(1))
            if inference and is_alike:  # a copy of the largest tensor less
                context[:, : self.fine] = detail
                return context
        return torch.cat([detail, context[:, self.fine :]], dim=1)
