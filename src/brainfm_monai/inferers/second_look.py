"""A second look at the brain, in a field of view like those of the training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as nnf
from monai.inferers import Inferer
from monai.networks.layers import GaussianFilter
from torch import Tensor, nn

from brainfm_monai.inferers.volume import as_plain, like_input
from brainfm_monai.networks import MultiTaskNet
from brainfm_monai.networks.slabs import slab_features_of_one
from brainfm_monai.tasks import TaskLayout

__all__ = ["SecondLookInferer"]

MINIMUM_BRAIN_MM3 = 1000.0  # that is needed to say where the brain is: a cubic centimetre
TRAINING_SIZE_MM = (144.0, 176.0, 144.0)  # what a scan of train.json shows
RAMP_MM = 8.0  # in which the second look gains its weight, from the faces of the box on: no seam in the maps
STEP_MM = 4.0  # from point to point of the grid on which coordinates are smoothed
MINIMUM_WEIGHT = 1e-6  # of the brain around a point, below which nothing is known there
PLANES = 16  # in which the brain is looked for at a time
COORDINATES = 3


class SecondLookInferer(Inferer):
    """Have another inferer run a network that looks at every head twice: at all of it, and at a box about the brain.

    Where in the head a voxel lies is learnt on scans of one size that show little more than the brain, the network normalises
    over what it sees, and it knows its borders: a neck and a face in the field of view move the MNI coordinates by several mm, a
    box of another size than the training's by half a mm. They are those of the second look. All else is the mean of both looks,
    whose errors are not the same: the head is linear, so that the mean of the features gives it.

    The way to the template is smooth, and what a network says of it is not quite: coordinates are the affine map that fits best
    to the second look in the brain, and what a Gaussian, which counts that brain alone, leaves of the rest. Both go on outside
    the box.

    Args:
        inferer: runs the network, on voxels of 1 mm.
        layout: names of the output channels; without segmentation and MNI coordinates there is one look.
        enabled: whether to look twice.
        size_mm: of the box; where the volume is smaller, the box goes on with zeros.
        sigma_mm: standard deviation of the Gaussian.
    """

    def __init__(
        self,
        inferer: Inferer,
        layout: TaskLayout,
        enabled: bool = True,
        size_mm: Sequence[float] = TRAINING_SIZE_MM,
        sigma_mm: float = 8.0,
    ) -> None:
        super().__init__()
        self.inferer, self.layout = inferer, layout
        self.enabled = enabled and {"segmentation", "mni"} <= set(layout.tasks)
        self.size_mm, self.sigma_mm = tuple(size_mm), sigma_mm

    def __call__(self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Map images of shape (B, 1, H, W, D) in RAS+ order to what the inferer gives; metadata go along.

        Raises:
            ValueError: if the network is none whose features can be averaged.
        """
        if not self.enabled:
            return self.inferer(inputs, network, *args, **kwargs)
        if not isinstance(network, MultiTaskNet):
            raise ValueError(
                f"second_look: a MultiTaskNet is needed, got {type(network).__name__}: set second_look to false"
            )
        twice = MultiTaskNet(
            _TwoLooks(network, self.layout, self.size_mm, self.sigma_mm), network.layout, network.stride
        )
        twice.head = _HeadOfTwoLooks(network.head, self.layout.slices["mni"])  # type: ignore[assignment]
        return like_input(self.inferer(as_plain(inputs), twice.train(network.training), *args, **kwargs), inputs)


class _TwoLooks(nn.Module):
    """A backbone whose features are the mean of two looks; after them stand the MNI coordinates of the second one."""

    def __init__(self, network: MultiTaskNet, layout: TaskLayout, size_mm: Sequence[float], sigma_mm: float) -> None:
        super().__init__()
        self.backbone, self.head, self.layout = network.backbone, network.head, layout
        self.out_channels = network.head.in_channels + COORDINATES
        self.voxel_mm = float(network.stride)
        self.size = tuple(round(mm / self.voxel_mm) for mm in size_mm)
        self.sigma_mm = sigma_mm

    def forward(self, image: Tensor) -> Tensor:
        """Map an image of shape (B, 1, H, W, D) to float32 of shape (B, out_channels, H, W, D)."""
        return torch.cat([self.look(image[i : i + 1], self.backbone) for i in range(len(image))])

    def look(self, image: Tensor, encode: Callable[[Tensor], Tensor]) -> Tensor:
        """The same of one sample, with a function that runs the backbone."""
        shape = (1, self.out_channels, *image.shape[2:])
        output = torch.empty(shape, device=image.device, memory_format=torch.channels_last_3d)
        features, coordinates = output.split([self.out_channels - COORDINATES, COORDINATES], dim=1)
        features.copy_(encode(image))
        if image.is_meta:  # whose memory is estimated: no brain is to be found
            return output
        brain = self._find_brain(features)
        box = _find_box(brain, self.size)
        known = torch.zeros_like(brain)
        known[box] = brain[box]
        if float(known.sum()) * self.voxel_mm**3 < MINIMUM_BRAIN_MM3:
            coordinates.copy_(self.head(features)[:, self.layout.slices["mni"]])
            return output
        seen = image[:, :, *box]
        inside = tuple(slice(n) for n in seen.shape[2:])
        padding = [
            extra for n, m in zip(reversed(self.size), reversed(seen.shape[2:]), strict=True) for extra in (0, n - m)
        ]
        second = encode(nnf.pad(seen, padding).contiguous())[:, :, *inside].float()
        coordinates.zero_()
        coordinates[:, :, *box] = self.head(second)[:, self.layout.slices["mni"]]
        with torch.autocast(image.device.type, enabled=False):
            step = max(round(STEP_MM / self.voxel_mm), 1)
            coordinates[0] = _smooth(coordinates[0], known, self.sigma_mm / self.voxel_mm, step)
        features[:, :, *box].lerp_(second, 0.5 * _ramp(seen.shape[2:], RAMP_MM / self.voxel_mm).to(second))
        return output

    def _find_brain(self, features: Tensor) -> Tensor:
        """Where brain is labelled, (H, W, D)."""
        parts = (self.layout.choose_labels(self.head(part))[0, 0].long() for part in features.split(PLANES, dim=2))
        return torch.as_tensor(self.layout.protocol.is_brain).to(features.device)[torch.cat(list(parts))]


@slab_features_of_one.register
def _(backbone: _TwoLooks, image: Tensor) -> Tensor:
    """In float32, whatever the image's dtype: the coordinates would be lost in bfloat16."""
    return backbone.look(image, lambda x: slab_features_of_one(backbone.backbone, x))


class _HeadOfTwoLooks(nn.Module):
    """The head of a network; MNI coordinates, which it would get from the mean of the features, are taken as they stand there."""

    def __init__(self, head: nn.Module, mni: slice) -> None:
        super().__init__()
        self.head, self.mni = head, mni

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(x[:, :-COORDINATES])
        output[:, self.mni] = x[:, -COORDINATES:].to(output)
        return output


def _find_box(brain: Tensor, box: Sequence[int]) -> tuple[slice, ...]:
    """A box of the size that is asked for, about the middle of the brain, (H, W, D), as far as the volume allows."""
    sides = []
    for axis, (size, whole) in enumerate(zip(box, brain.shape, strict=True)):
        others = [a for a in range(3) if a != axis]
        seen = brain.any(others[1]).any(others[0]).nonzero()
        middle = int(seen[0]) + int(seen[-1]) + 1 if len(seen) else whole
        first = min(max((middle - size) // 2, 0), max(whole - size, 0))
        sides.append(slice(first, min(first + size, whole)))
    return tuple(sides)


def _ramp(size: Sequence[int], width: float) -> Tensor:
    """Weight that rises from near 0 at the faces of a box to 1 in ``width`` voxels, shape ``size``."""
    weight = torch.ones(())
    for n in size:
        place = torch.arange(n) + 0.5
        weight = weight[..., None] * (torch.minimum(place, n - place) / width).clamp_max(1)
    return weight


def _smooth(coordinates: Tensor, known: Tensor, sigma: float, step: int) -> Tensor:
    """Coordinates (3, H, W, D) with what is not affine in them smoothed where they are known, (H, W, D), and continued around.

    Args:
        coordinates: of the template.
        known: mask.
        sigma: of the Gaussian, in voxels.
        step: voxels from point to point of the grid on which they are smoothed.
    """
    index = torch.stack(
        torch.meshgrid(*(torch.arange(n, device=known.device) for n in known.shape), indexing="ij")
    ).float()
    points = torch.cat([index, torch.ones_like(index[:1])])
    # On the host, whose solver takes coordinates that do not fill space; those of a GPU do not.
    fit = torch.linalg.lstsq(points[:, known].T.double().cpu(), coordinates[:, known].T.double().cpu()).solution.T.to(
        points
    )
    straight = torch.einsum("ij,jhwd->ihwd", fit, points)
    weighted = torch.cat([(coordinates - straight) * known, known[None].float()])[None]
    padding = [extra for size in reversed(known.shape) for extra in (0, -size % step)]
    coarse = GaussianFilter(3, sigma / step)(nnf.avg_pool3d(nnf.pad(weighted, padding), step))
    values = coarse[0, :3] / coarse[0, 3:].clamp_min(MINIMUM_WEIGHT)
    rest = nnf.interpolate(values[None], scale_factor=step, mode="trilinear", align_corners=False)[0]
    return straight + rest[:, *(slice(size) for size in known.shape)]
