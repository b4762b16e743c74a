"""A second look at the brain, in a field of view like those of the training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as nnf
from monai.inferers import Inferer
from monai.networks.layers import GaussianFilter
from torch import Tensor

from brainfm_monai.inferers.volume import as_plain, like_input
from brainfm_monai.tasks import TaskLayout

__all__ = ["SecondLookInferer"]

MINIMUM_BRAIN = 1000  # voxels that are needed to say where the brain is: a cubic centimetre
TRAINING_SIZE = (144, 176, 144)  # voxels: what a scan of train.json shows, 72 x 88 x 72 of 2 mm
RAMP = 8  # voxels in which the second look gains its weight, from the faces of the box on: no seam in the maps
STEP = 4  # voxels from point to point of the grid on which coordinates are smoothed
MINIMUM_WEIGHT = 1e-6  # of the brain around a point, below which nothing is known there


class SecondLookInferer(Inferer):
    """Run another inferer on a head, and again on a box about the brain that it finds there.

    Where in the head a voxel lies is learnt on scans of one size that show little more than the brain, the network normalises
    over what it sees, and it knows its borders: a neck and a face in the field of view move the MNI coordinates by several mm, a
    box of another size than the training's by half a mm. They are those of the second look. Distances, bias field and images
    are the mean of both looks, whose errors are not the same. Labels are those of the first look: the mode of memory that
    decides them slab by slab has no logits to average, and a volume must not depend on the memory that was free.

    The way to the template is smooth, and what a network says of it is not quite: coordinates are the affine map that fits best
    to the second look in the brain, and what a Gaussian, which counts that brain alone, leaves of the rest. Both go on outside
    the box.

    Args:
        inferer: runs the network.
        layout: names of the output channels; without segmentation and MNI coordinates there is one look.
        enabled: whether to look twice.
        size: of the box, in voxels, even numbers; where the volume is smaller, the box goes on with zeros.
        sigma: standard deviation of the Gaussian, in voxels.
    """

    def __init__(
        self,
        inferer: Inferer,
        layout: TaskLayout,
        enabled: bool = True,
        size: Sequence[int] = TRAINING_SIZE,
        sigma: float = 8.0,
    ) -> None:
        super().__init__()
        self.inferer, self.layout = inferer, layout
        self.enabled = enabled and {"segmentation", "mni"} <= set(layout.tasks)
        self.size, self.sigma = tuple(size), sigma
        self.is_brain = torch.as_tensor(layout.protocol.is_brain)

    def __call__(self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Map images of shape (B, 1, H, W, D) in RAS+ order to what the inferer gives; metadata go along."""
        image = as_plain(inputs)
        output = as_plain(self.inferer(image, network, *args, **kwargs))
        if not self.enabled:
            return like_input(output, inputs)
        for i in range(len(image)):
            parts = self.layout.split(output[i : i + 1])
            labels = parts["segmentation"][0]
            labels = labels[0].long() if len(labels) == 1 else labels.argmax(0)
            brain = self.is_brain.to(labels.device)[labels]
            if not brain.any():
                continue
            box = self._box(brain)
            known = torch.zeros_like(brain)
            known[box] = brain[box]
            if int(known.sum()) < MINIMUM_BRAIN:
                continue
            seen = image[i : i + 1, :, *box]
            inside = seen.shape[2:]
            padding = [extra for n, m in zip(reversed(self.size), reversed(inside), strict=True) for extra in (0, n - m)]
            again = self.inferer(nnf.pad(seen, padding).contiguous(), network, *args, **kwargs)
            weight = 0.5 * _ramp(inside, RAMP).to(output)
            for name, second in self.layout.split(as_plain(again)).items():
                first, second = parts[name][0][:, *box], second[0][:, *(slice(n) for n in inside)]  # the first: of the output
                if name == "mni":
                    first.copy_(second)
                elif name != "segmentation":
                    first.lerp_(second.to(first), weight)
            parts["mni"][0].copy_(_smooth(parts["mni"][0], known, self.sigma))
        return like_input(output, inputs)

    def _box(self, brain: Tensor) -> tuple[slice, ...]:
        """A box of the size that is asked for, about the middle of the brain, as far as the volume allows."""
        sides = []
        for axis, (size, whole) in enumerate(zip(self.size, brain.shape, strict=True)):
            others = [a for a in range(3) if a != axis]
            seen = brain.any(others[1]).any(others[0]).nonzero()
            first = (int(seen[0]) + int(seen[-1]) + 1 - size) // 2
            first = min(max(first, 0), max(whole - size, 0)) // 2 * 2  # even: on the grid of a network with stride 2
            sides.append(slice(first, min(first + size, whole)))
        return tuple(sides)


def _ramp(size: Sequence[int], width: int) -> Tensor:
    """Weight that rises from near 0 at the faces of a box to 1 in ``width`` voxels, shape ``size``."""
    weight = torch.ones(())
    for n in size:
        place = torch.arange(n) + 0.5
        weight = weight[..., None] * (torch.minimum(place, n - place) / width).clamp_max(1)
    return weight


def _smooth(coordinates: Tensor, known: Tensor, sigma: float) -> Tensor:
    """Coordinates (3, H, W, D) with what is not affine in them smoothed where they are known, (H, W, D), and continued around."""
    index = torch.stack(torch.meshgrid(*(torch.arange(n, device=known.device) for n in known.shape), indexing="ij")).float()
    points = torch.cat([index, torch.ones_like(index[:1])])
    # On the host, whose solver takes coordinates that do not fill space; those of a GPU do not.
    fit = torch.linalg.lstsq(points[:, known].T.double().cpu(), coordinates[:, known].T.double().cpu()).solution.T.to(points)
    straight = torch.einsum("ij,jhwd->ihwd", fit, points)
    weighted = torch.cat([(coordinates.float() - straight) * known, known[None].float()])[None]
    padding = [extra for size in reversed(known.shape) for extra in (0, -size % STEP)]
    coarse = GaussianFilter(3, sigma / STEP)(nnf.avg_pool3d(nnf.pad(weighted, padding), STEP))
    values = coarse[0, :3] / coarse[0, 3:].clamp_min(MINIMUM_WEIGHT)
    rest = nnf.interpolate(values[None], scale_factor=STEP, mode="trilinear", align_corners=False)[0]
    return straight + rest[:, *(slice(size) for size in known.shape)]
