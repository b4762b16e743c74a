"""What a scan adds to maps that were predicted on a coarser grid: edges at the resolution of the scan."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from brainfm_monai.networks.residual import NEGATIVE_SLOPE
from brainfm_monai.tasks import TaskLayout

WINDOW = 3  # coarse voxels along each axis, in which a map is regressed on the scan
UNIT = 0.05  # of the learnt values: a step of an optimizer changes a map by less than what is to be added
NOISE = 1e-4  # variance below which neither a scan in [0, 1] nor a map tells anything


class DetailHead(nn.Module):
    """Residual of some maps at the resolution of the scan, out of the coarse maps and the scan.

    The residual of a map is the guided detail, the slope of its regression on the scan times what the scan has beyond
    its coarse voxels, times a factor that is learnt, plus values that are learnt. Of an image, the latter sum up to 0
    in each coarse voxel: they add edges, and leave the brightness to the coarse map. All convolutions run on the coarse
    grid, where the voxels of the scan within a coarse voxel are channels, at a cost ``stride``^3 times smaller. Nothing
    is normalised over the volume. The last convolution starts at 0, so that an untrained head changes no map.

    Args:
        layout: names of the channels of the coarse maps.
        tasks: tasks of the layout whose maps get a residual.
        stride: voxels of the scan per voxel of the coarse maps, along each axis.
        features: channels between the convolutions.

    Attributes:
        channels: indices of the channels that get a residual.

    Raises:
        ValueError: if a task is not in the layout.

    Reference:
        He et al., Guided image filtering, IEEE Transactions on Pattern Analysis and Machine Intelligence 35, 2013;
        Shi et al., Real-time single image and video super-resolution using an efficient sub-pixel convolutional neural
        network, CVPR 2016.
    """

    is_image: Tensor

    def __init__(self, layout: TaskLayout, tasks: Sequence[str], stride: int = 2, features: int = 48) -> None:
        super().__init__()
        if not tasks or not set(tasks) <= set(layout.tasks):
            raise ValueError(f"DetailHead: 'tasks' must be names out of {list(layout.tasks)}, got {list(tasks)}")
        spans = {name: layout.slices[name] for name in tasks}
        self.channels: list[int] = [i for span in spans.values() for i in range(span.start, span.stop)]
        self.stride, self.count, seen = stride, len(self.channels), 2 * stride**3
        is_image = [
            float(layout.tasks[name].kind == "image") for name, s in spans.items() for _ in range(s.start, s.stop)
        ]
        self.register_buffer("is_image", torch.tensor(is_image).reshape(1, -1, 1, 1, 1), persistent=False)
        self.average = nn.AvgPool3d(WINDOW, stride=1, padding=WINDOW // 2, count_include_pad=False)
        self.noise, self.unit = NOISE, UNIT
        self.see = nn.Conv3d(1, seen, kernel_size=stride, stride=stride)
        widths = [2 * self.count + seen, features, features, features]
        self.convs = nn.ModuleList(nn.Conv3d(a, b, kernel_size=3, padding=1) for a, b in pairwise(widths))
        self.activation = nn.LeakyReLU(NEGATIVE_SLOPE)
        self.factor = nn.ConvTranspose3d(features, self.count, kernel_size=stride, stride=stride)
        self.values = nn.ConvTranspose3d(features, self.count, kernel_size=stride, stride=stride, bias=False)
        for layer in (self.factor, self.values):
            nn.init.zeros_(layer.weight)
        assert self.factor.bias is not None
        nn.init.zeros_(self.factor.bias)

    @torch.jit.export
    def extract(self, maps: Tensor, image: Tensor) -> Tensor:
        """What the residual is made of, on the coarse grid: (B, features + len(channels), h, w, d).

        Args:
            maps: those of the head's channels on the coarse grid, (B, len(channels), h, w, d), in float32.
            image: the scan, (B, 1, H, W, D) in [0, 1].
        """
        coarse = nnf.avg_pool3d(image, self.stride)
        of_scan, of_maps = self.average(coarse), self.average(maps)
        covariance = self.average(coarse * maps) - of_scan * of_maps
        variance = (self.average(coarse.square()) - of_scan.square()).clamp_min(0) + self.noise
        spread = (self.average(maps.square()) - of_maps.square()).clamp_min(0) + self.noise
        x = torch.cat([maps, covariance * (variance * spread).rsqrt(), self.see(image).to(maps.dtype)], dim=1)
        for conv in self.convs:
            x = self.activation(conv(x))
        return torch.cat([x, self.average(covariance / variance).to(x.dtype)], dim=1)

    @torch.jit.export
    def show(self, extracted: Tensor, image: Tensor) -> Tensor:
        """Residual on the grid of an image (B, 1, H, W, D), (B, len(channels), H, W, D), out of what was extracted."""
        extracted = extracted.float()
        x, slopes = extracted[:, : -self.count], extracted[:, -self.count :]
        coarse = nnf.avg_pool3d(image, self.stride)
        kernel = self.unit * self.values.weight
        kernel = kernel - self.is_image * kernel.mean((2, 3, 4), keepdim=True)
        values = nnf.conv_transpose3d(x, kernel, stride=self.stride)
        size = list(values.shape[2:])
        guide = nnf.interpolate(torch.cat([slopes, coarse], 1), size=size, mode="trilinear", align_corners=False)
        beyond = image[:, :, : size[0], : size[1], : size[2]] - guide[:, self.count :]
        residual = values + self.factor(x) * guide[:, : self.count] * beyond
        h, w, d = (image.shape[i] - size[i - 2] for i in (2, 3, 4))
        return nnf.pad(residual, [0, d, 0, w, 0, h]) if max(h, w, d) > 0 else residual

    def forward(self, maps: Tensor, image: Tensor) -> Tensor:
        """Residual of the channels on the scan's grid, (B, len(channels), H, W, D); arguments as in :meth:`extract`."""
        return self.show(self.extract(maps, image), image)
