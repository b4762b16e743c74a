"""A backbone and the head that makes a multi-task network of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Self

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from brainfm_monai.tasks import TaskLayout

__all__ = ["FeatureMap", "Head", "MultiTaskNet", "trainable_parameters"]


class Head(nn.Conv3d):
    """1x1x1 convolution in float32, also under autocast.

    MNI coordinates are read to 0.1 mm of 100 mm: the eight bits of a bfloat16 step by 0.4 mm there.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map features of shape (B, in_channels, H, W, D) to (B, out_channels, H, W, D) in the precision of the weights."""
        if torch.jit.is_scripting():  # TorchScript has no autocast of a device that is not known beforehand
            return self._conv_forward(x, self.weight, self.bias)
        if not torch.amp.is_autocast_available(x.device.type):
            return super().forward(x.to(self.weight.dtype))
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


class MultiTaskNet(nn.Module):
    """A backbone and one 1x1x1 convolution whose output channels are named by a task layout.

    Args:
        backbone: module that maps (B, 1, H, W, D) to (B, ``out_channels``, H, W, D) and has the attribute ``out_channels``.
        layout: names of the output channels.
        stride: voxels of the input per voxel of the backbone: the input is averaged over ``stride``^3 voxels, the
            output is interpolated back. A backbone trained at 2 mm serves 1 mm scans with stride 2.
        freeze_backbone: the backbone keeps its weights and stays in evaluation mode, so that neither gradients nor running
            statistics nor dropout change its features; the head alone is trained.

    Raises:
        ValueError: if ``stride`` is smaller than 1.
    """

    def __init__(self, backbone: nn.Module, layout: TaskLayout, stride: int = 1, freeze_backbone: bool = False) -> None:
        super().__init__()
        if stride < 1:
            raise ValueError(f"MultiTaskNet: 'stride' must be at least 1, got {stride}")
        self.backbone = backbone
        self.stride = stride
        self.layout = layout
        self.head = Head(int(backbone.out_channels), layout.channels)  # type: ignore[arg-type]
        self.freeze_backbone = freeze_backbone
        if freeze_backbone:
            backbone.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        """Set the mode of the network; a frozen backbone stays in evaluation mode."""
        super().train(mode)
        if self.freeze_backbone:
            self.backbone.eval()
        return self

    @torch.jit.export
    def features(self, image: Tensor) -> Tensor:
        """Feature map of an image of shape (B, 1, H, W, D): shape (B, backbone.out_channels, H, W, D)."""
        if self.stride == 1:
            return self.backbone(image)
        coarse = self.backbone(nnf.avg_pool3d(image, self.stride))
        return nnf.interpolate(coarse, size=image.shape[2:], mode="trilinear", align_corners=False)

    def forward(self, image: Tensor) -> Tensor:
        """Map an image of shape (B, 1, H, W, D), intensities in [0, 1], to (B, layout.channels, H, W, D)."""
        if self.stride == 1:
            return self.head(self.backbone(image))
        # Head and interpolation are linear and commute; the head costs stride^3 times less this way round.
        coarse = self.head(self.backbone(nnf.avg_pool3d(image, self.stride)))
        return nnf.interpolate(coarse, size=image.shape[2:], mode="trilinear", align_corners=False)


class FeatureMap(nn.Module):
    """The features of a multi-task network, of length 1 at every voxel: what other tasks can be learnt from.

    Args:
        network: its backbone makes the features; its head is not used.
    """

    def __init__(self, network: MultiTaskNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        """Map an image of shape (B, 1, H, W, D) to (B, backbone.out_channels, H, W, D)."""
        return nnf.normalize(self.network.features(image).float(), dim=1)


def trainable_parameters(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """Parameters that an optimizer shall change, each once: those of the modules that are not frozen.

    Args:
        modules: the network; where weights of tasks are learnt, the loss as well.

    Raises:
        ValueError: if there is none.
    """
    parameters = {id(p): p for module in modules for p in module.parameters() if p.requires_grad}
    if not parameters:
        raise ValueError("trainable_parameters: a parameter that is not frozen is needed in 'modules', found none")
    return list(parameters.values())
