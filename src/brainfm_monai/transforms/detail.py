"""Synthetic contrasts at the resolution of the scan."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as nnf
from monai.config import KeysCollection
from monai.transforms import MapTransform
from monai.utils import convert_to_tensor
from torch import Tensor, nn

WINDOW = 5  # voxels of the network in which both images are compared: large enough for a gyrus and its sulcus
LEAST_VARIANCE = 1e-4  # of intensities in [0, 1]: a hundredth of the range is noise


class RestoreDetaild(MapTransform):
    """Give synthetic contrasts the detail of the scan that they were made of, where it shows the same edges.

    A network whose voxels are larger than the scan's, by ``stride``, draws blurred contrasts: see
    :func:`restore_detail`. Images are in [0, 1], (1, H, W, D), and may be missing; ``labels`` is the key of the label
    map in their grid: what is not 0 is the head.
    """

    def __init__(self, keys: KeysCollection, labels: str = "segmentation", stride: int = 2) -> None:
        super().__init__(keys, allow_missing_keys=True)
        self.labels, self.stride = labels, stride

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Change the images in place; ``image`` is the scan in their grid, in [0, 1]."""
        d = dict(data)
        images = [d[key].as_tensor() for key in self.key_iterator(d)] if self.stride > 1 else []
        if images:
            device = images[0].device
            scan, labels = (convert_to_tensor(d[k], track_meta=False).to(device) for k in ("image", self.labels))
            restore_detail(images, scan.float(), labels > 0, self.stride)
        return d


def restore_detail(images: Sequence[Tensor], scan: Tensor, head: Tensor, stride: int) -> None:
    """Give images (1, H, W, D) the fine structure of the scan of the same shape, by regression in each neighbourhood.

    Within :data:`WINDOW` of the network's voxels, in the head, a straight line turns the scan into the image, as in the
    guided filter (He, Sun, Tang, IEEE TPAMI 35, 2013). Its slope turns what the scan shows beyond the network's voxels
    into what the image lacks, and counts as much as the line explains of the image's variance, R^2: all where the image
    is the scan's own contrast, nothing where both differ or the scan is noise. The image's departure from the line at
    the network's own voxels is taken back by R^4, as far as it is the blur of the network. Nothing is negative.
    """
    pool, mean = nn.AvgPool3d(stride, ceil_mode=True, count_include_pad=False), nn.AvgPool3d(WINDOW, 1, WINDOW // 2)
    coarse, weight = pool(scan), pool(head.to(scan))
    count = mean(weight).clamp_min(1e-3)

    def average(volume: Tensor) -> Tensor:
        return mean(volume * weight) / count

    def spread(volumes: Tensor) -> Tensor:
        """Volumes (C, h, w, d) in the finer voxels, linearly interpolated: (C, H, W, D)."""
        fine = nnf.interpolate(volumes[None], scale_factor=stride, mode="trilinear")[0]
        return fine[(slice(None), *map(slice, scan.shape[1:]))]

    seen = average(coarse)
    variance = (average(coarse * coarse) - seen * seen).clamp_min(0) + LEAST_VARIANCE
    beyond = scan - spread(coarse)
    for image in images:
        drawn = pool(image)
        level = average(drawn)
        varied = (average(drawn * drawn) - level * level).clamp_min(0) + LEAST_VARIANCE
        shared = average(coarse * drawn) - seen * level
        slope, explained = shared / variance, (shared * shared / (variance * varied)).clamp(0, 1)
        departure = drawn - level - slope * (coarse - seen)
        changes = spread(torch.cat([slope * explained, explained * explained * departure]))
        image.copy_((image + changes[:1] * beyond - changes[1:]).clamp_min(0))
