"""Structures of a predicted and a reference label map: Dice, volumes, Hausdorff distance; masks of lesions."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from monai.metrics import compute_hausdorff_distance
from monai.transforms import generate_spatial_bounding_box
from torch import Tensor

SIDES = ("left", "right", "both")
ML_PER_MM3 = 1e-3
LESION_THRESHOLD = 0.5  # probability above which a voxel counts as lesion

Ids = Sequence[int | Sequence[int]]  # FreeSurfer ids, and [first, last] ranges of them


@dataclass(frozen=True)
class EvaluatedStructure:
    """The FreeSurfer ids that make up one evaluated structure."""

    name: str
    left: frozenset[int] = frozenset()
    right: frozenset[int] = frozenset()
    unsided: frozenset[int] = frozenset()  # of both sides: a voxel belongs to the side of the midplane on which it lies
    middle: frozenset[int] = frozenset()  # of a structure without sides; then there are no others

    @property
    def ids(self) -> frozenset[int]:
        """All ids of the structure."""
        return self.left | self.right | self.unsided | self.middle


Structures = Sequence[EvaluatedStructure]


def parse_structures(table: Mapping[str, Mapping[str, Ids]]) -> tuple[EvaluatedStructure, ...]:
    """Read the structures of an evaluation from a table of a bundle config.

    For each name it has the FreeSurfer ids ``left`` and ``right``, and ``unsided`` where there are such, or ``middle``;
    ids are numbers and ``[first, last]`` ranges. Other entries, no ids, or ids of another structure are a ValueError.
    """
    structures: list[EvaluatedStructure] = []
    owner: dict[int, str] = {}
    for name, entry in table.items():
        if unknown := sorted(set(entry) - {"left", "right", "unsided", "middle"}):
            raise ValueError(f"structure {name}: the entries are left, right, unsided and middle, found {unknown}")
        one = EvaluatedStructure(name, **{part: _expand(ids) for part, ids in entry.items()})
        if bool(one.left) != bool(one.right) or bool(one.middle) == bool(one.left) or (one.middle and one.unsided):
            raise ValueError(f"structure {name}: ids are needed either on 'left' and 'right' or in the 'middle' alone")
        if shared := sorted(one.ids & owner.keys()):
            found = f"{shared[0]} in {owner[shared[0]]}, too"
            raise ValueError(f"structure {name}: an id may stand in one structure, found {found}")
        owner |= dict.fromkeys(one.ids, name)
        structures.append(one)
    return tuple(structures)


def _expand(ids: Ids) -> frozenset[int]:
    return frozenset().union(*(range(i, i + 1) if isinstance(i, int) else range(i[0], i[-1] + 1) for i in ids))


def box_around(mask: Tensor, margin: int = 0) -> tuple[slice, slice, slice]:
    """Box around a mask (H, W, D), wider by a margin within the image; the whole image if the mask is empty."""
    start, stop = generate_spatial_bounding_box(mask[None], margin=margin, allow_smaller=True)
    height, width, depth = (slice(a, b or None) for a, b in zip(start, stop, strict=True))
    return height, width, depth


def _index_structures(ids: Tensor, structures: Structures, affine: Tensor) -> Tensor:
    """Label map of structure sides: 2 s + 1 for the left or the middle, 2 s + 2 for the right of structure s.

    An unsided voxel belongs to the side of the plane on which it lies: halfway between the centroids of all left and
    all right voxels, normal to their line.
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
        left, right = ((side == number).nonzero().double().mean(0) for number in (1, 2))
        axes = affine[:3, :3].to(left)
        normal = axes.T @ axes @ (left - right)  # in voxel indices
        on_right = (voxels.to(left) - (left + right) / 2) @ normal <= 0
        index[voxels.unbind(1)] = unsided[voxels.unbind(1)] + on_right
    return index


def _cut(pred: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    box = box_around((pred != 0) | (truth != 0))
    return pred[box], truth[box]


def compute_structure_measures(
    prediction: Tensor, reference: Tensor, structures: Structures, affine: Tensor, percentile: float | None = None
) -> dict[str, Tensor]:
    """Dice, volumes and distance of each structure: of its left part, its right part, and both together.

    Prediction and reference are FreeSurfer ids of one shape (1, H, W, D), else a ValueError; the affine from voxel
    indices to RAS mm has no shear. The results have the shape (S, 3), columns left, right, both: ``dice`` and
    ``volume_error``, (prediction - reference) / reference, both NaN where the reference lacks the part; ``volume`` and
    ``reference_volume`` in mL; with a percentile ``hausdorff`` in mm, NaN where one of both lacks the part. The sides
    of a structure that has none are NaN. Of the distances from the surface of one part to that of the other, and of
    those back, the percentile is taken, and the larger counts (Taha and Hanbury, BMC Medical Imaging 15, 2015).
    """
    if prediction.shape != reference.shape or prediction.ndim != 4:
        shapes = f"{tuple(prediction.shape)} and {tuple(reference.shape)}"
        raise ValueError(f"structures: prediction and reference must share one shape (1, H, W, D), found {shapes}")
    # first the box of all labels, because the table of structures is read for each voxel
    ids = _cut(prediction[0], reference[0].to(prediction.device))
    pred, truth = _cut(*(_index_structures(one, structures, affine) for one in ids))
    spacing_mm = affine[:3, :3].double().norm(dim=0).tolist()
    voxel_ml = ML_PER_MM3 * float(torch.linalg.det(affine[:3, :3].double()).abs())
    names = ("dice", "volume_error", "volume", "reference_volume", "hausdorff")
    measures = {name: torch.full((len(structures), len(SIDES)), torch.nan, dtype=torch.float64) for name in names}
    for row, structure in enumerate(structures):
        left, right = 2 * row + 1, 2 * row + 2
        for column, (first, last) in enumerate(((left, left), (right, right), (left, right))):
            if structure.middle and SIDES[column] != "both":
                continue
            parts = [(index >= first) & (index <= last) for index in (pred, truth)]
            predicted, present, overlap = (int(mask.sum()) for mask in (*parts, parts[0] & parts[1]))
            values = {"volume": predicted * voxel_ml, "reference_volume": present * voxel_ml}
            if present:
                values["dice"] = 2 * overlap / (predicted + present)
                values["volume_error"] = (predicted - present) / present
            if present and predicted and percentile is not None:
                # neighbours are found on the host, in the box around a part: memory depends on the largest structure
                one, two = (mask[None, None].cpu() for mask in _cut(*parts))
                with warnings.catch_warnings():
                    # MONAI 1.6 calls a function of its own with an argument that it has deprecated
                    warnings.filterwarnings("ignore", message=".*always_return_as_numpy", category=FutureWarning)
                    distance = compute_hausdorff_distance(one, two, True, percentile=percentile, spacing=spacing_mm)
                values["hausdorff"] = float(distance)
            for name, value in values.items():
                measures[name][row, column] = value
    return measures


def compute_structure_entropy(labels: Tensor, entropy: Tensor, structures: Structures, affine: Tensor) -> Tensor:
    """Mean entropy of the voxels of each predicted structure: of its left part, its right part, and both together.

    Labels are FreeSurfer ids, the entropy is relative to its maximum, both (1, H, W, D); the affine takes voxel indices
    to RAS mm. The result is (S, 3), NaN for what has no voxel; the sides of a structure without sides are NaN.
    """
    index = _index_structures(labels[0], structures, affine).long()
    count, total = (
        torch.bincount(index.flatten(), weights, 2 * len(structures) + 1)[1:].reshape(-1, 2).double()
        for weights in (None, entropy[0].flatten().double())
    )
    count, total = (torch.cat([parts, parts.sum(1, keepdim=True)], 1) for parts in (count, total))
    for row, structure in enumerate(structures):
        count[row, :2] *= not structure.middle
    return torch.where(count > 0, total / count.clamp_min(1), torch.nan).cpu()


def compute_lesion_metrics(prediction: Tensor, reference: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """``dice``, ``sensitivity`` and ``precision`` of lesions, voxel by voxel.

    The prediction is a probability, above 0.5 a voxel is lesion; the reference is 0 or 1; the mask is bool; all have
    one shape. Dice and sensitivity, the share of the reference that is predicted, are NaN where the reference has no
    lesion in the mask, precision where none is predicted.
    """
    pred, truth = (prediction > LESION_THRESHOLD) & mask, (reference > LESION_THRESHOLD) & mask
    hit, predicted, present = (one.sum().double() for one in (pred & truth, pred, truth))
    return {
        "dice": torch.where(present > 0, 2 * hit / (predicted + present), torch.nan),
        "sensitivity": hit / present,  # 0 / 0 is NaN
        "precision": hit / predicted,
    }
