"""The network slab by slab: little memory, no copy of the mirrored output, and labels without ever holding all their maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as nnf
from monai.inferers import Inferer
from torch import Tensor

from brainfm_monai.inferers.precision import choose_precision
from brainfm_monai.inferers.volume import as_plain, like_input
from brainfm_monai.networks import MultiTaskNet, slab_features
from brainfm_monai.tasks import TaskLayout

__all__ = ["SlabInferer"]

PLANES = 4  # of the head's output at a time: 44 labels of 4 planes of 2 mm are upsampled to 0.1 GB


class SlabInferer(Inferer):
    """Evaluate a :class:`~brainfm_monai.networks.MultiTaskNet` slab by slab.

    The backbone runs as in :func:`~brainfm_monai.networks.slab_features`. The head, in float32, the average with the mirror
    image, the way back to the input's voxels and the choice of a label then run on a few planes at a time.

    Args:
        layout: names of the network's output channels.
        mirror: average with the left-right mirror image, as :class:`~brainfm_monai.inferers.MirrorInferer` does.
        labels: return one channel of labels in place of the logits of the segmentation.
        bfloat16: compute features in bfloat16; ``None``: in what :func:`~brainfm_monai.inferers.reduced_precision` says.
    """

    def __init__(
        self, layout: TaskLayout, mirror: bool = False, labels: bool = False, bfloat16: bool | None = None
    ) -> None:
        super().__init__()
        self.layout, self.mirror, self.labels, self.bfloat16 = layout, mirror, labels, bfloat16

    def __call__(self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Map images of shape (B, 1, H, W, D) in RAS+ order to the network's output in float32; metadata go along.

        Returns:
            Shape (B, layout.channels, H, W, D); with ``labels`` that of :meth:`~brainfm_monai.tasks.TaskLayout.choose_labels`.

        Raises:
            ValueError: if the network is of another kind, or a side is no multiple of its stride.
        """
        if not isinstance(network, MultiTaskNet):
            raise ValueError(
                f"SlabInferer: a MultiTaskNet is needed, got {type(network).__name__}: use another memory mode"
            )
        if any(size % network.stride for size in inputs.shape[2:]):
            raise ValueError(
                f"SlabInferer: sides that are multiples of the network's stride {network.stride} are needed, "
                f"got {tuple(inputs.shape[2:])}"
            )
        image = as_plain(inputs)
        channels = self.layout.label_channels if self.labels else self.layout.channels
        pooled = image if network.stride == 1 else nnf.avg_pool3d(image, network.stride)
        dtype = choose_precision(self.bfloat16, image.device)
        features = slab_features(network.backbone, pooled.to(dtype))
        mirrored = slab_features(network.backbone, pooled.flip(2).to(dtype)) if self.mirror else None
        output = image.new_empty((len(image), channels, *image.shape[2:]), dtype=torch.float32)
        for planes, slab in self._slabs(features, mirrored, network, image.shape[3:]):
            output[:, :, planes] = self.layout.choose_labels(slab) if self.labels else slab
        return like_input(output, inputs)

    def _slabs(
        self, features: Tensor, mirrored: Tensor | None, network: MultiTaskNet, plane: Sequence[int]
    ) -> Iterator[tuple[slice, Tensor]]:
        """Planes of the output, and the output there."""
        stride, size = network.stride, features.shape[2]
        for a in range(0, size, PLANES):
            b = min(a + PLANES, size)
            first, last = (a, b) if stride == 1 else (max(a - 1, 0), min(b + 1, size))  # what interpolation looks at
            slab = network.head(features[:, :, first:last])
            if mirrored is not None:
                back = self.layout.mirror(network.head(mirrored[:, :, size - last : size - first]))
                slab = slab.add_(back).mul_(0.5)
            if stride > 1:
                slab = nnf.interpolate(
                    slab, size=((last - first) * stride, *plane), mode="trilinear", align_corners=False
                )
                slab = slab[:, :, (a - first) * stride : (b - first) * stride]
            yield slice(a * stride, b * stride), slab
