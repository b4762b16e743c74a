"""The picture of a case: the scan, the prediction and the reference over it, in a few slices."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from brainfm_monai.anatomy import Protocol
from brainfm_monai.metrics import EvaluatedStructure

__all__ = ["make_picture"]

SLICES = {2: (0.4, 0.6), 1: (0.5,), 0: (0.35,)}  # axial, coronal, sagittal; shares of the box around the structures
OPACITY = 0.5
QUALITY = 80  # of WebP
LEAST_SHARE = 0.002  # of the structures' voxels that a slice must hold to widen the box


def make_picture(
    image: Tensor, maps: Sequence[Tensor], structures: Sequence[EvaluatedStructure], protocol: Protocol
) -> bytes:
    """A WebP picture with one row for the scan alone and one for each label map over it.

    Args:
        image: the scan, shape (1, H, W, D), in [0, 1], RAS axes. The patient's right is on the left of the picture, in sagittal
            slices anterior; superior or anterior is above.
        maps: label maps of FreeSurfer ids, shape (1, H, W, D); slices are chosen by the last one.
        structures: that are shown, in the colours of the protocol.
        protocol: knows the colours.
    """
    from PIL import Image  # an optional dependency

    grey = image.cpu().numpy()[0].clip(0, 1)
    colours = _colours(structures, protocol)
    ids = [np.clip(one.cpu().numpy()[0].astype(np.int64), 0, len(colours) - 1) for one in maps]
    planes = [_cut(grey, ids, colours, axis, index) for axis, index in _places(ids[-1:], colours, grey.shape)]
    height = max(plane.shape[0] for plane in planes[0] + planes[-1])
    rows = [np.concatenate([_pad(plane[row], height) for plane in planes], axis=1) for row in range(len(maps) + 1)]
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate(rows, axis=0)).save(buffer, format="webp", quality=QUALITY)
    return buffer.getvalue()


def _colours(structures: Sequence[EvaluatedStructure], protocol: Protocol) -> np.ndarray:
    """Colour of every FreeSurfer id, shape (N, 3), uint8; black for those that are not shown, and for the last one."""
    table = np.zeros((max(i for s in structures for i in s.ids) + 2, 3), dtype=np.uint8)
    for structure in structures:
        for ids in (structure.left | structure.middle | structure.unsided, structure.right):
            known = [protocol.label_of_id[i] for i in sorted(ids) if i in protocol.label_of_id]
            table[sorted(ids)] = protocol.structures[known[0]].colour if known else (255, 255, 255)
    return table


def _places(ids: Sequence[np.ndarray], colours: np.ndarray, shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Axis and index of every slice."""
    known = np.any(colours, axis=1)
    shown: np.ndarray = np.asarray(known)[ids[0]] if ids else np.zeros(shape, dtype=bool)
    places = []
    for axis, shares in SLICES.items():
        count = shown.sum(axis=tuple(a for a in range(3) if a != axis))
        occupied = np.flatnonzero(count > LEAST_SHARE * count.sum())
        first, last = (occupied[0], occupied[-1]) if len(occupied) else (0, shape[axis] - 1)
        places += [(axis, round(first + share * (last - first))) for share in shares]
    return places


def _cut(grey: np.ndarray, ids: Sequence[np.ndarray], colours: np.ndarray, axis: int, index: int) -> list[np.ndarray]:
    """A slice of the scan, and of each label map over it, as rows and columns of RGB."""
    plane = np.repeat(grey.take(index, axis=axis)[..., None] * 255, 3, axis=-1)
    over = [colours[one.take(index, axis=axis)] for one in ids]
    shown = [plane, *(np.where(c.any(-1, keepdims=True), (1 - OPACITY) * plane + OPACITY * c, plane) for c in over)]
    return [one[::-1, ::-1].swapaxes(0, 1).astype(np.uint8) for one in shown]


def _pad(plane: np.ndarray, height: int) -> np.ndarray:
    missing = height - plane.shape[0]
    return np.pad(plane, ((missing // 2, missing - missing // 2), (0, 0), (0, 0)))
