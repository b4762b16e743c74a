"""The structures of an evaluation: which FreeSurfer ids make up each, and on which side a voxel lies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["SIDES", "EvaluatedStructure", "box_around", "index_structures", "parse_structures"]

SIDES = ("left", "right", "both")

Ids = Sequence[int | Sequence[int]]  # FreeSurfer ids, and [first, last] ranges of them


@dataclass(frozen=True)
class EvaluatedStructure:
    """The FreeSurfer ids that make up one evaluated structure.

    Attributes:
        name: name in the tables.
        left: ids on the left.
        right: ids on the right.
        unsided: ids that stand on both sides: each voxel belongs to the side of the midplane that it lies on.
        middle: ids of a structure that has no sides; then there are no others.
    """

    name: str
    left: frozenset[int] = frozenset()
    right: frozenset[int] = frozenset()
    unsided: frozenset[int] = frozenset()
    middle: frozenset[int] = frozenset()

    @property
    def ids(self) -> frozenset[int]:
        """All ids of the structure."""
        return self.left | self.right | self.unsided | self.middle

    def __post_init__(self) -> None:
        if (
            bool(self.left) != bool(self.right)
            or bool(self.middle) == bool(self.left)
            or (self.middle and self.unsided)
        ):
            raise ValueError(
                f"structure {self.name}: ids are needed either on 'left' and 'right' or in the 'middle' alone"
            )


def parse_structures(table: Mapping[str, Mapping[str, Ids]]) -> tuple[EvaluatedStructure, ...]:
    """Read the structures of an evaluation from a table of a bundle config.

    Args:
        table: for each name the FreeSurfer ids ``left`` and ``right``, and ``unsided`` where there are such, or ``middle``;
            ids are numbers and ``[first, last]`` ranges.

    Returns:
        The structures, in the table's order.

    Raises:
        ValueError: if a structure has another entry, no ids, or an id of another structure.
    """
    structures = []
    owner: dict[int, str] = {}
    for name, entry in table.items():
        unknown = set(entry) - {"left", "right", "unsided", "middle"}
        if unknown:
            raise ValueError(
                f"structure {name}: the entries are left, right, unsided and middle, found {sorted(unknown)}"
            )
        structure = EvaluatedStructure(name, **{part: _expand(ids) for part, ids in entry.items()})
        for i in structure.ids:
            if i in owner:
                raise ValueError(f"structure {name}: an id may stand in one structure, found {i} in {owner[i]}, too")
            owner[i] = name
        structures.append(structure)
    return tuple(structures)


def _expand(ids: Ids) -> frozenset[int]:
    ranges = [(i, i) if isinstance(i, int) else (i[0], i[-1]) for i in ids]
    return frozenset(i for first, last in ranges for i in range(first, last + 1))


def index_structures(ids: Tensor, structures: Sequence[EvaluatedStructure], affine: Tensor) -> Tensor:
    """Label map of the sides of structures: 2 s + 1 for the left (or the middle) and 2 s + 2 for the right of structure s.

    Args:
        ids: FreeSurfer ids, shape (H, W, D).
        structures: S structures.
        affine: voxel indices to mm, shape (4, 4).

    Returns:
        int64 tensor of shape (H, W, D), 0 where there is none of the structures.
    """
    largest = max(i for s in structures for i in s.ids)
    table = torch.zeros(largest + 2, dtype=torch.int64)
    unsided_table = torch.zeros_like(table)
    for number, structure in enumerate(structures):
        table[sorted(structure.left | structure.middle)] = 2 * number + 1
        table[sorted(structure.right)] = 2 * number + 2
        unsided_table[sorted(structure.unsided)] = 2 * number + 1
    known = torch.where(ids < 0, 0, ids.round().long().clamp(max=largest + 1))
    index = table.to(ids.device)[known]
    unsided = unsided_table.to(ids.device)[known]
    paired = index.new_tensor([0, *(bool(s.left) for s in structures for _ in "lr")], dtype=torch.bool)[index]
    is_left = (index % 2 == 1) & paired
    is_right = (index % 2 == 0) & paired
    places = unsided.nonzero()
    if len(places) and is_left.any() and is_right.any():
        on_right = ~_lies_left(places, is_left, is_right, affine)
        index[places.unbind(1)] = unsided[places.unbind(1)] + on_right
    return index


def _lies_left(places: Tensor, is_left: Tensor, is_right: Tensor, affine: Tensor) -> Tensor:
    """Whether voxels, shape (N, 3), lie left of the plane halfway between both sides' centroids, normal to their line."""
    left, right = _centroid(is_left), _centroid(is_right)
    axes = affine[:3, :3].to(left)
    normal = axes.T @ axes @ (left - right)
    return (places.to(left) - (left + right) / 2) @ normal > 0


def _centroid(mask: Tensor) -> Tensor:
    """Mean voxel index of a mask of shape (H, W, D), shape (3,), float64."""
    parts = []
    for axis in range(3):
        count = mask.sum(dim=[a for a in range(3) if a != axis]).double()
        parts.append((count * torch.arange(len(count), device=count.device)).sum() / count.sum())
    return torch.stack(parts)


def box_around(mask: Tensor, margin: int = 0) -> tuple[slice, slice, slice]:
    """Box around a mask of shape (H, W, D), wider by a margin as far as the image goes; the whole image if the mask is empty."""
    ends = []
    for axis, size in enumerate(mask.shape):
        index = mask.movedim(axis, 0).flatten(1).any(1).nonzero()
        start, stop = (int(index[0]), int(index[-1]) + 1) if len(index) else (0, size)
        ends.append(slice(max(start - margin, 0), min(stop + margin, size)))
    return ends[0], ends[1], ends[2]
