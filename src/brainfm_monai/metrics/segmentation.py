"""Structures of a predicted and a reference label map: Dice, volumes, Hausdorff distance; masks of lesions."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from monai.metrics import compute_hausdorff_distance
from monai.transforms import generate_spatial_bounding_box
from torch import Tensor

from brainfm_monai.io import refuse_if

SIDES = ("left", "right", "both")
PARTS = 4  # of a structure: left, right, unsided, middle
ML_PER_MM3 = 1e-3
LESION_THRESHOLD = 0.5  # probability above which a voxel counts as lesion

Ids = Sequence[int | Sequence[int]]  # FreeSurfer ids, and [first, last] ranges of them
Structures = Sequence["EvaluatedStructure"]


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
        spans = {part: [(i, i) if isinstance(i, int) else i for i in ids] for part, ids in entry.items()}
        expanded = {part: frozenset().union(*(range(a, b + 1) for a, b in ends)) for part, ends in spans.items()}
        one = EvaluatedStructure(name, **expanded)
        if bool(one.left) != bool(one.right) or bool(one.middle) == bool(one.left) or (one.middle and one.unsided):
            raise ValueError(f"structure {name}: ids are needed either on 'left' and 'right' or in the 'middle' alone")
        if shared := sorted(one.ids & owner.keys()):
            found = f"{shared[0]} in {owner[shared[0]]}, too"
            raise ValueError(f"structure {name}: an id may stand in one structure, found {found}")
        owner |= dict.fromkeys(one.ids, name)
        structures.append(one)
    return tuple(structures)


def box_around(mask: Tensor, margin: int = 0) -> tuple[slice, slice, slice]:
    """Box around a mask (H, W, D), wider by a margin within the image; the whole image if the mask is empty."""
    start, stop = generate_spatial_bounding_box(mask[None], margin=margin, allow_smaller=True)
    height, width, depth = (slice(a, b or None) for a, b in zip(start, stop, strict=True))
    return height, width, depth


def index_structures(ids: Tensor, structures: Structures, affine: Tensor) -> Tensor:
    """Label map of parts: 4 s + 1 for the left of structure s, 4 s + 2 for the right, 4 s + 4 for one without sides.

    An unsided voxel belongs to the side of the plane on which it lies: halfway between the centroids of all left and
    all right voxels, normal to their line. Without such a plane it belongs to no structure.
    """
    table = torch.zeros(max(i for s in structures for i in s.ids) + 2, dtype=torch.int16, device=ids.device)
    for row, structure in enumerate(structures):
        parts = (structure.left, structure.right, structure.unsided, structure.middle)
        for number, of_part in enumerate(parts, start=PARTS * row + 1):
            table[sorted(of_part)] = number
    index = table[torch.where(ids < 0, 0, ids.round().long().clamp(max=len(table) - 1))]
    voxels = (index % PARTS == 3).nonzero()
    if len(voxels):
        left, right = ((index % PARTS == side).nonzero().double().mean(0) for side in (1, 2))  # NaN without a voxel
        axes, where = affine[:3, :3].to(left), voxels.unbind(1)
        normal = axes.T @ axes @ (left - right)  # in voxel indices
        offset = (voxels.to(left) - (left + right) / 2) @ normal
        sided = index[where] - torch.where(offset > 0, 2, 1)
        index[where] = torch.where(offset.isnan(), 0, sided).to(index.dtype)
    return index


def sum_parts(index: Tensor, structures: Structures, weights: Tensor | None = None) -> Tensor:
    """Voxels, or sums of weights, of left, right and both, (S, 3), float64; NaN for sides that a structure has not."""
    parts = torch.bincount(index.flatten().long(), weights, PARTS * len(structures) + 1)[1:].reshape(-1, PARTS).double()
    sums = torch.stack([parts[:, 0], parts[:, 1], parts.sum(1)], 1).cpu()
    sums[[bool(structure.middle) for structure in structures], :2] = torch.nan
    return sums


def compute_structure_measures(
    prediction: Tensor, reference: Tensor, structures: Structures, affine: Tensor, percentile: float | None = None
) -> dict[str, Tensor]:
    """Dice, volumes and distance of the left, the right and both parts of each structure, (S, 3); NaN for no sides.

    Prediction and reference are FreeSurfer ids of one shape (1, H, W, D), else a ValueError; the affine from voxel
    indices to RAS mm has no shear. ``dice`` and ``volume_error``, (prediction - reference) / reference, are NaN where
    the reference lacks the part; ``volume`` and ``reference_volume`` are in mL; with a percentile there is
    ``hausdorff`` in mm, NaN where one of both lacks the part: the percentile of the distances from one surface to the
    other or back, whichever is larger (Taha and Hanbury, BMC Medical Imaging 15, 2015).
    """
    shapes = tuple(prediction.shape), tuple(reference.shape)
    rule = "structures: prediction and reference must share one shape (1, H, W, D)"
    refuse_if(shapes[0] != shapes[1] or prediction.ndim != 4, rule, "{} and {}".format(*shapes))
    maps = prediction[0], reference[0].to(prediction.device)
    box = box_around((maps[0] != 0) | (maps[1] != 0))  # the table of structures is read for each voxel of it
    indices = pred, truth = [index_structures(ids[box], structures, affine) for ids in maps]
    same_structure = (pred + PARTS - 1) // PARTS == (truth + PARTS - 1) // PARTS
    overlap = sum_parts(pred[pred == truth], structures)
    overlap[:, 2] = sum_parts(pred[same_structure], structures)[:, 2]
    predicted, present = (sum_parts(index, structures) for index in indices)
    known = torch.where(present > 0, present, torch.nan)
    voxel_ml = ML_PER_MM3 * float(torch.linalg.det(affine[:3, :3].double()).abs())
    measures = {"dice": 2 * overlap / (predicted + known), "volume_error": (predicted - known) / known}
    measures |= {"volume": predicted * voxel_ml, "reference_volume": present * voxel_ml}
    if percentile is not None:
        measures["hausdorff"] = torch.full_like(present, torch.nan)
        spacing_mm = affine[:3, :3].double().norm(dim=0).tolist()
        for row, column in ((predicted > 0) & (present > 0)).nonzero().tolist():
            first, last = (PARTS * row + number for number in ((1, 1), (2, 2), (1, PARTS))[column])
            # neighbours are found on the host: MONAI cuts the box around both parts
            parts = [((index >= first) & (index <= last))[None, None].cpu() for index in indices]
            with warnings.catch_warnings():
                # MONAI 1.6 calls a function of its own with an argument that it has deprecated
                warnings.filterwarnings("ignore", message=".*always_return_as_numpy", category=FutureWarning)
                options: dict[str, Any] = {"percentile": percentile, "spacing": spacing_mm, "include_background": True}
                measures["hausdorff"][row, column] = compute_hausdorff_distance(*parts, **options)
    return measures


def compute_lesion_metrics(prediction: Tensor, reference: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """``dice``, ``sensitivity`` and ``precision`` of lesions, voxel by voxel, in a mask; all maps have one shape.

    Above a probability of 0.5 a voxel is lesion. Dice and sensitivity, the share of the reference that is predicted,
    are NaN where the reference has no lesion, precision where none is predicted.
    """
    pred, truth = (prediction > LESION_THRESHOLD) & mask, (reference > LESION_THRESHOLD) & mask
    hit, predicted, present = (one.sum().double() for one in (pred & truth, pred, truth))
    dice = torch.where(present > 0, 2 * hit / (predicted + present), torch.nan)
    return {"dice": dice, "sensitivity": hit / present, "precision": hit / predicted}  # 0 / 0 is NaN
