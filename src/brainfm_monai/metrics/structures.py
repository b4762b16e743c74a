"""The structures of an evaluation: which FreeSurfer ids make up each, and on which side a voxel lies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from monai.transforms import generate_spatial_bounding_box
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

    An unsided voxel belongs to the side of the plane on which it lies: the plane halfway between the centroids of everything
    left and everything right, normal to their line.

    Args:
        ids: FreeSurfer ids, shape (H, W, D).
        structures: S structures.
        affine: voxel indices to mm, shape (4, 4).

    Returns:
        int16 tensor of shape (H, W, D), 0 where there is none of the structures.
    """
    tables = torch.zeros(3, max(i for s in structures for i in s.ids) + 2, dtype=torch.int16, device=ids.device)
    for number, structure in enumerate(structures):
        tables[0, sorted(structure.left | structure.middle)] = 2 * number + 1
        tables[0, sorted(structure.right)] = 2 * number + 2
        tables[1, sorted(structure.unsided)] = 2 * number + 1
        tables[2, sorted(structure.left)], tables[2, sorted(structure.right)] = 1, 2
    in_table = torch.where(ids < 0, 0, ids.round().long().clamp(max=tables.shape[1] - 1))
    index, unsided, side = (table[in_table] for table in tables)
    voxels = unsided.nonzero()
    if len(voxels) and all((side == number).any() for number in (1, 2)):
        left, right = (_centroid(side == number) for number in (1, 2))
        axes = affine[:3, :3].to(left)
        normal = axes.T @ axes @ (left - right)  # in voxel indices
        on_right = (voxels.to(left) - (left + right) / 2) @ normal <= 0
        index[voxels.unbind(1)] = unsided[voxels.unbind(1)] + on_right
    return index


def _centroid(mask: Tensor) -> Tensor:
    """Mean voxel index of a mask of shape (H, W, D), shape (3,), float64."""
    counts = [mask.sum(dim=[a for a in range(3) if a != axis]).double() for axis in range(3)]
    return torch.stack([(n * torch.arange(len(n), device=n.device)).sum() / n.sum() for n in counts])


def box_around(mask: Tensor, margin: int = 0) -> tuple[slice, slice, slice]:
    """Box around a mask of shape (H, W, D), wider by a margin within the image; the whole image if the mask is empty."""
    start, stop = generate_spatial_bounding_box(mask[None], margin=margin, allow_smaller=True)
    height, width, depth = (slice(a, b or None) for a, b in zip(start, stop, strict=True))
    return height, width, depth
