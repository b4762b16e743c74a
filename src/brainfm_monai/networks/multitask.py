"""A backbone and the heads that make a multi-task network of it: a linear one, and one that sees the neighbourhood."""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from brainfm_monai.networks.unet import NEGATIVE_SLOPE
from brainfm_monai.tasks import TaskLayout

DILATIONS = (1, 2, 4)  # of the context head: a voxel sees 7 voxels to each side, 14 mm at 2 mm
PRIOR = -4.0  # logit of a mask before training: a mask covers 2 % of a scan


class Head(nn.Conv3d):
    """1x1x1 convolution in float32, also under autocast.

    MNI coordinates are read to 0.1 mm of 100 mm: the eight bits of a bfloat16 step by 0.4 mm there.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """Map features (B, in_channels, H, W, D) to (B, out_channels, H, W, D) in the precision of the weights."""
        if torch.jit.is_scripting():  # TorchScript has no autocast of a device that is not known beforehand
            return self._conv_forward(x, self.weight, self.bias)
        if not torch.amp.is_autocast_available(x.device.type):
            return super().forward(x.to(self.weight.dtype))
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.to(self.weight.dtype))


class ContextHead(nn.Module):
    """Maps of some tasks of a layout on the backbone's grid, out of the backbone's ``features`` and the image.

    A 1x1x1 convolution narrows the features to ``width`` channels, and dilated 3x3x3 convolutions with skips look at
    the neighbourhood (Yu and Koltun, ICLR 2016). So a task that a linear head cannot solve (lesions: bright spots that
    are neither sulci nor ventricles) is learnt on a frozen backbone. Nothing is normalised over the volume.
    """

    def __init__(self, features: int, layout: TaskLayout, tasks: Sequence[str], width: int = 24) -> None:
        super().__init__()
        self.narrow = nn.Conv3d(features, width, kernel_size=1)
        self.see = nn.Conv3d(1, width, kernel_size=1, bias=False)
        self.convs = nn.ModuleList(nn.Conv3d(width, width, 3, padding=d, dilation=d) for d in DILATIONS)
        self.activation = nn.LeakyReLU(NEGATIVE_SLOPE)
        rows = [layout.tasks[name] for name in tasks]
        priors = [PRIOR if task.kind == "mask" else 0.0 for task in rows for _ in range(task.channels)]
        self.last = nn.Conv3d(width, len(priors), kernel_size=1)
        assert self.last.bias is not None
        self.last.bias.data.copy_(torch.tensor(priors))

    def forward(self, features: Tensor, image: Tensor) -> Tensor:
        """Map features (B, C, h, w, d) and the image on their grid, (B, 1, h, w, d), to (B, channels, h, w, d)."""
        x = self.activation(self.narrow(features) + self.see(image))
        for conv in self.convs:
            x = x + self.activation(conv(x))
        return self.last(x).float()


class MultiTaskNet(nn.Module):
    """A backbone and one 1x1x1 convolution whose output channels are named by a task layout.

    Args:
        backbone: module that maps (B, 1, H, W, D) to (B, ``out_channels``, H, W, D).
        stride: voxels of the input per voxel of the backbone: the input is averaged over ``stride``^3 voxels, the
            output is interpolated back. A backbone trained at 2 mm serves 1 mm scans with stride 2.
        freeze_backbone: the backbone keeps its weights and stays in evaluation mode, so that neither gradients nor
            running statistics nor dropout change its features; the head alone is trained.
        out_channels: channels of the backbone's output, for a backbone without the attribute ``out_channels``.
        context: tasks whose maps a :class:`ContextHead` makes in the place of the convolution. Those of the layout must
            be its last ones, else it is a ValueError.
    """

    def __init__(
        self, backbone: nn.Module, layout: TaskLayout, stride: int = 1, freeze_backbone: bool = False,
        out_channels: int | None = None, context: Sequence[str] = (),
    ) -> None:  # fmt: skip
        super().__init__()
        if stride < 1:
            raise ValueError(f"MultiTaskNet: 'stride' must be at least 1, got {stride}")
        features = getattr(backbone, "out_channels", None) if out_channels is None else out_channels
        if not isinstance(features, int):
            raise ValueError(f"MultiTaskNet: pass 'out_channels', which {type(backbone).__name__} does not have")
        self.backbone, self.stride, self.layout = backbone, stride, layout
        names = tuple(layout.tasks)
        self.context_tasks = tuple(name for name in names if name in context)
        if self.context_tasks != names[len(names) - len(self.context_tasks) :]:
            raise ValueError(f"MultiTaskNet: 'context' must name the last tasks of {list(names)}, got {list(context)}")
        self.context = ContextHead(features, layout, self.context_tasks) if self.context_tasks else None
        self.head = Head(features, layout.channels - (0 if self.context is None else self.context.last.out_channels))
        self.freeze_backbone = freeze_backbone
        if freeze_backbone:
            backbone.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "MultiTaskNet":
        """Set the mode of the network; a frozen backbone stays in evaluation mode."""
        super().train(mode)
        if self.freeze_backbone:
            self.backbone.eval()
        return self

    @torch.jit.export
    def pool(self, image: Tensor) -> Tensor:
        """Mean of every ``stride``^3 voxels: the image on the backbone's grid."""
        return image if self.stride == 1 else nnf.avg_pool3d(image, self.stride)

    @torch.jit.export
    def encode(self, image: Tensor) -> Tensor:
        """Map images (B, 1, H, W, D) in [0, 1] to the backbone's features, (B, head.in_channels, H / stride, ...)."""
        return self.backbone(self.pool(image))

    @torch.jit.export
    def upsample(self, maps: Tensor, size: list[int]) -> Tensor:
        """Maps or features of the backbone's grid, interpolated to the image's grid of that size."""
        return maps if self.stride == 1 else nnf.interpolate(maps, size=size, mode="trilinear", align_corners=False)

    @torch.jit.export
    def decode(self, features: Tensor, image: Tensor) -> Tensor:
        """Map features (B, head.in_channels, h, w, d) and their image to all maps, (B, layout.channels, H, W, D)."""
        # Head and interpolation are linear and commute; in this order the head costs stride^3 times less.
        coarse = self.head(features)
        context = self.context
        if context is not None:
            coarse = torch.cat([coarse, context(features, self.pool(image))], dim=1)
        return self.upsample(coarse, list(image.shape[2:]))

    @torch.jit.export
    def features(self, image: Tensor) -> Tensor:
        """Features of an image on the image's grid: (B, 1, H, W, D) to (B, head.in_channels, H, W, D)."""
        return self.upsample(self.encode(image), list(image.shape[2:]))

    def forward(self, image: Tensor) -> Tensor:
        """Map an image of shape (B, 1, H, W, D), intensities in [0, 1], to (B, layout.channels, H, W, D)."""
        return self.decode(self.encode(image), image)


class FeatureMap(nn.Module):
    """The features of a multi-task network, of length 1 at every voxel: what other tasks can be learnt from."""

    def __init__(self, network: MultiTaskNet) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        """Map an image of shape (B, 1, H, W, D) to (B, head.in_channels, H, W, D)."""
        return nnf.normalize(self.network.features(image).float(), dim=1)


def trainable_parameters(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """Parameters of modules (network, loss) that are not frozen, each once; ValueError if there is none."""
    parameters = {id(p): p for module in modules for p in module.parameters() if p.requires_grad}
    if not parameters:
        raise ValueError("trainable_parameters: a parameter that is not frozen is needed in 'modules', found none")
    return list(parameters.values())
