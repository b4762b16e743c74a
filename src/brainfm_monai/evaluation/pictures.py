"""The picture of a case: the scan, the prediction and the reference over it, in a few slices."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from brainfm_monai.anatomy import Protocol
from brainfm_monai.metrics import EvaluatedStructure
from brainfm_monai.slices import Cell, blend, compose, cut_slices, encode, shade

__all__ = ["draw_case"]

POSITIONS = {"axial": (0.4, 0.6), "coronal": (0.5,), "sagittal": (0.35,)}  # shares of the box around the structures
OPACITY = 0.5


def draw_case(
    image: Tensor,
    maps: Sequence[Tensor],
    affine: np.ndarray,
    structures: Sequence[EvaluatedStructure],
    protocol: Protocol,
) -> bytes:
    """A WebP picture with one row for the scan alone and one for each label map over it.

    Args:
        image: the scan, shape (1, H, W, D), in [0, 1].
        maps: label maps of FreeSurfer ids, shape (1, H, W, D); slices are chosen by the last one.
        affine: voxel indices of all to RAS mm, shape (4, 4).
        structures: that are shown, in the colours of the protocol; white where the protocol has no such structure.
        protocol: knows the colours.
    """
    colours = np.zeros((max(i for s in structures for i in s.ids) + 2, 4))  # the last one is that of all higher ids
    for structure in structures:
        for ids in map(sorted, (structure.left | structure.middle | structure.unsided, structure.right)):
            labels = [protocol.label_of_id[i] for i in ids if i in protocol.label_of_id]
            colours[ids, :3] = np.array(protocol.structures[labels[0]].colour) / 255 if labels else 1.0
            colours[ids, 3] = OPACITY
    clipped = [one.long().clamp(0, len(colours) - 1) for one in maps]
    shown = colours[clipped[-1][0].cpu().numpy(), 3] > 0 if maps else image[0].cpu().numpy() > 0
    slices = cut_slices(shown, affine, POSITIONS)
    plain = [shade(one.read(image, affine)[..., 0]) for one in slices]
    rows = [[Cell(picture, one.plane.marks) for picture, one in zip(plain, slices, strict=True)]]
    for label_map in clipped:
        over = [colours[one.read(label_map, affine, nearest=True)[..., 0]] for one in slices]
        rows.append([Cell(blend(picture, colour)) for picture, colour in zip(plain, over, strict=True)])
    return encode(compose(rows))
