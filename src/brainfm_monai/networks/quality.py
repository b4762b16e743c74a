"""The network that scores a segmentation, as published with SuperSynth."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from brainfm_monai.anatomy import Protocol

__all__ = ["QUALITY_SCORES", "QualityNet", "score_segmentation"]

BATCH_NORM_EPS = 1e-3  # Keras' default, where the network was trained
BOX = 224  # voxels of 1 mm: the box that the network was trained on
QUALITY_SCORES = (
    "general white matter",
    "general grey matter",
    "general CSF",
    "cerebellum",
    "brainstem",
    "thalamus",
    "putamen+pallidum",
    "hippocampus+amygdala",
)
# Classes 1 to 8 by FreeSurfer id, in the order of the scores; every other id is class 0 (mri_super_synth).
CLASS_IDS: tuple[tuple[int, ...], ...] = (
    (2, 11, 26, 41, 50, 58, 77, 85, *range(819, 871)),
    (3, 42),
    (4, 5, 14, 15, 43, 44),
    (7, 8, 46, 47),
    (16,),
    (10, 49),
    (12, 13, 51, 52),
    (17, 18, 53, 54),
)
CLASSES = len(CLASS_IDS) + 1


class QualityLevel(nn.Module):
    """Two convolutions, a shortcut of one, normalisation, and half the size."""

    def __init__(self, kernels: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.first, self.second, self.shortcut = (_conv_of_shape(shape) for shape in kernels)
        self.norm = nn.BatchNorm3d(kernels[1][0], eps=BATCH_NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W, D) to (B, C', H/2, W/2, D/2)."""
        y = self.second(self.first(x).relu_()).add_(self.shortcut(x).relu_())
        return nnf.max_pool3d(self.norm(y.relu_()), 2)


class QualityNet(nn.Module):
    """Regressor of the Dice that a segmentation would reach, for eight groups of structures.

    Args:
        levels: for each level the shapes of the kernels of its first, second and shortcut convolution.
        final: shapes of the kernels of the last two convolutions.

    Reference:
        Billot et al., Robust machine learning segmentation for large-scale analysis of heterogeneous clinical brain MRI
        datasets, PNAS 120, 2023.
    """

    def __init__(
        self,
        levels: Sequence[Sequence[Sequence[int]]],
        final: Sequence[Sequence[int]],
    ) -> None:
        super().__init__()
        self.levels = nn.ModuleList(QualityLevel(kernels) for kernels in levels)
        self.final = nn.ModuleList(_conv_of_shape(shape) for shape in final)

    def forward(self, classes: Tensor) -> Tensor:
        """Map one-hot classes of shape (B, 9, H, W, D) to eight scores in [0, 1], shape (B, 8)."""
        x = classes
        for level in self.levels:
            x = level(x)
        for conv in self.final:
            x = conv(x).relu_()
        return x.mean(dim=(2, 3, 4))[:, 1:].clamp(0, 1)


def _conv_of_shape(shape: Sequence[int]) -> nn.Conv3d:
    out_channels, in_channels, *kernel = shape
    return nn.Conv3d(in_channels, out_channels, (kernel[0], kernel[1], kernel[2]), padding="same")


@torch.no_grad()
def score_segmentation(network: nn.Module, labels: Tensor, protocol: Protocol, box: int = BOX) -> dict[str, float]:
    """Quality scores of a segmentation.

    Args:
        network: :class:`QualityNet` in evaluation mode.
        labels: label map on a grid of 1 mm in RAS+ order, shape (H, W, D), integer.
        protocol: meaning of the labels.
        box: side of the box around the brain that the network sees, in voxels.

    Returns:
        For each of :data:`QUALITY_SCORES` a score in [0, 1], 1 being best.

    Raises:
        ValueError: if the label map shows none of the classes.
    """
    table = np.zeros(len(protocol), dtype=np.int64)
    for number, ids in enumerate(CLASS_IDS, start=1):
        table[np.isin(protocol.freesurfer_ids, ids)] = number
    classes = torch.from_numpy(table).to(labels.device)[labels.long()]
    inside = classes.nonzero()
    if not len(inside):
        raise ValueError("score_segmentation: 'labels' must show a brain, found none of its structures")
    first, last = inside.amin(0).tolist(), (inside.amax(0) + 1).tolist()
    centred = classes[tuple(slice(a, b) for a, b in zip(first, last, strict=True))]
    for axis in range(3):
        size = centred.shape[axis]
        start = max((size - box) // 2, 0)
        centred = centred.narrow(axis, start, min(size, box))
    before = [(box - n) // 2 for n in centred.shape]
    padding = [n for a, size in zip(before[::-1], centred.shape[::-1], strict=True) for n in (a, box - size - a)]
    one_hot = torch.stack([nnf.pad(centred, padding) == c for c in range(CLASSES)])[None]
    weight = next(network.parameters())
    scores = network(one_hot.to(weight.dtype)).squeeze(0).tolist()
    return dict(zip(QUALITY_SCORES, scores, strict=True))
