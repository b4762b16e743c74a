"""Named structures of a predicted and a reference label map: Dice, Hausdorff distance, volumes; and masks of lesions."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch
from monai.metrics import compute_dice, compute_hausdorff_distance
from torch import Tensor

from brainfm_monai.metrics.structures import SIDES, EvaluatedStructure, box_around, index_structures

__all__ = [
    "StructureVolumes",
    "compute_lesion_metrics",
    "compute_mean_dice",
    "compute_structure_dice",
    "compute_structure_hausdorff",
    "compute_structure_hd95",
    "compute_structure_volume_error",
]

ML_PER_MM3 = 1e-3
LESION_THRESHOLD = 0.5  # probability above which a voxel counts as lesion


def compute_structure_dice(
    prediction: Tensor, reference: Tensor, structures: Sequence[EvaluatedStructure], affine: Tensor | None = None
) -> Tensor:
    """Dice of each structure: its left part, its right part, and both together.

    Args:
        prediction: FreeSurfer ids, shape (B, 1, H, W, D).
        reference: FreeSurfer ids, same shape.
        structures: S structures.
        affine: voxel indices to mm, shape (4, 4): tells where the midplane of unsided voxels lies; the identity if None.

    Returns:
        Dice, shape (B, S, 3): left, right, both. It is NaN where the reference has no such structure, and for the sides of
        a structure that has none.

    Raises:
        ValueError: if the shapes differ.
    """
    pred, truth = _index_pair("compute_structure_dice", prediction, reference, structures, affine)
    count = len(structures)
    sides = compute_dice(pred, truth, include_background=False, num_classes=2 * count + 1).reshape(-1, count, 2)
    both = compute_dice((pred + 1) // 2, (truth + 1) // 2, include_background=False, num_classes=count + 1)
    sides[:, [bool(s.middle) for s in structures]] = torch.nan
    return torch.cat([sides, both[..., None]], dim=-1)


def compute_mean_dice(dice: Tensor, structures: Sequence[EvaluatedStructure]) -> float:
    """Mean over the left and right parts, and over the structures that have no sides; what is absent is left out.

    Args:
        dice: shape (S, 3), from :func:`compute_structure_dice`.
        structures: S structures.
    """
    middle = torch.tensor([bool(s.middle) for s in structures])
    return float(torch.cat([dice[:, :2].reshape(-1), dice[middle, 2]]).nanmean())


def compute_structure_hausdorff(
    prediction: Tensor,
    reference: Tensor,
    structures: Sequence[EvaluatedStructure],
    affine: Tensor | None = None,
    percentile: float | None = None,
) -> Tensor:
    """Hausdorff distance between the surfaces of each structure: its left part, its right part, and both together.

    The surface is the voxels of a part that touch what is not the part. Of the distances from one surface to the other, and of
    those back, the percentile is taken, and the larger of the two counts (MONAI's definition). Each part is cut to the box
    around it first, so that memory goes with the largest structure and not with the image times the structures.

    Args:
        prediction: FreeSurfer ids, shape (B, 1, H, W, D).
        reference: FreeSurfer ids, same shape.
        structures: S structures.
        affine: voxel indices to mm, shape (4, 4), without shear: tells the size of voxels, which may be anisotropic, and where
            the midplane of unsided voxels lies; the identity if None.
        percentile: in (0, 100]; the maximum if None.

    Returns:
        Distance in mm, shape (B, S, 3): left, right, both. It is NaN where one of the two maps lacks the part, because there is
        no surface to be distant from (Dice is 0 where the prediction lacks it), and for the sides of a structure that has none.

    Raises:
        ValueError: if the shapes differ.

    Reference:
        Huttenlocher et al., Comparing images using the Hausdorff distance, IEEE TPAMI 15, 1993; the percentile: Taha and Hanbury,
        Metrics for evaluating 3D medical image segmentation, BMC Medical Imaging 15, 2015.
    """
    pred, truth = _index_pair("compute_structure_hausdorff", prediction, reference, structures, affine)
    spacing_mm = [1.0] * 3 if affine is None else affine[:3, :3].double().norm(dim=0).tolist()
    distances = torch.full((len(pred), len(structures), len(SIDES)), torch.nan)
    for b in range(len(pred)):
        for s, structure in enumerate(structures):
            left, right = 2 * s + 1, 2 * s + 2
            for side, labels in enumerate(((left,), (right,), (left, right))):
                if structure.middle and side < 2:
                    continue
                found, wanted = (_is_one_of(one[b, 0], labels) for one in (pred, truth))
                if found.any() and wanted.any():
                    distances[b, s, side] = _measure_hausdorff(found, wanted, spacing_mm, percentile)
    return distances


def _measure_hausdorff(found: Tensor, wanted: Tensor, spacing_mm: Sequence[float], percentile: float | None) -> float:
    """Hausdorff distance of two masks of shape (H, W, D), neither empty, in mm."""
    box = box_around(found | wanted)
    pred, truth = (one[box][None, None].cpu() for one in (found, wanted))  # the search for neighbours runs on the host
    with warnings.catch_warnings():
        # MONAI 1.6 calls a function of its own with an argument that it has deprecated
        warnings.filterwarnings("ignore", message=".*always_return_as_numpy", category=FutureWarning)
        distance = compute_hausdorff_distance(
            pred, truth, include_background=True, percentile=percentile, spacing=list(spacing_mm)
        )
    return float(distance)


def _is_one_of(index: Tensor, labels: Sequence[int]) -> Tensor:
    mask = index == labels[0]
    for label in labels[1:]:
        mask |= index == label
    return mask


def compute_structure_hd95(
    prediction: Tensor, reference: Tensor, structures: Sequence[EvaluatedStructure], affine: Tensor | None = None
) -> Tensor:
    """95th percentile of :func:`compute_structure_hausdorff`, in mm, shape (B, S, 3): left, right, both."""
    return compute_structure_hausdorff(prediction, reference, structures, affine, percentile=95.0)


class StructureVolumes(NamedTuple):
    """Volumes of structures, each of shape (B, S, 3): left, right, both.

    Attributes:
        error: (prediction - reference) / reference, signed; NaN where the reference has no such part.
        prediction_ml: volume in the prediction, mL; 0 where it has no such part.
        reference_ml: volume in the reference, mL; 0 where it has no such part.
    """

    error: Tensor
    prediction_ml: Tensor
    reference_ml: Tensor


def compute_structure_volume_error(
    prediction: Tensor, reference: Tensor, structures: Sequence[EvaluatedStructure], affine: Tensor | None = None
) -> StructureVolumes:
    """Volumes of each structure, its left part, its right part and both together, and the relative error of the predicted ones.

    Args:
        prediction: FreeSurfer ids, shape (B, 1, H, W, D).
        reference: FreeSurfer ids, same shape.
        structures: S structures.
        affine: voxel indices to mm, shape (4, 4): the volume of a voxel is its determinant; the identity if None.

    Returns:
        Error and both volumes; all are NaN for the sides of a structure that has none.

    Raises:
        ValueError: if the shapes differ.
    """
    pair = _index_pair("compute_structure_volume_error", prediction, reference, structures, affine)
    voxel_ml = ML_PER_MM3 * (1.0 if affine is None else abs(float(torch.linalg.det(affine[:3, :3].double()))))
    middle = torch.tensor([bool(s.middle) for s in structures])
    volumes = []
    for index in pair:
        counts = torch.stack([one.flatten().bincount(minlength=2 * len(structures) + 1)[1:] for one in index])
        sides = counts.cpu().double().reshape(len(counts), -1, 2) * voxel_ml
        both = sides.sum(-1, keepdim=True)
        sides[:, middle] = torch.nan
        volumes.append(torch.cat([sides, both], dim=-1))
    found, wanted = volumes
    return StructureVolumes(torch.where(wanted > 0, (found - wanted) / wanted, torch.nan), found, wanted)


def compute_lesion_metrics(
    prediction: Tensor, reference: Tensor, mask: Tensor | None = None, threshold: float = LESION_THRESHOLD
) -> dict[str, Tensor]:
    """Overlap of lesions, voxel by voxel.

    Args:
        prediction: probability, shape (B, 1, H, W, D).
        reference: 0 or 1, same shape.
        mask: where it counts, same shape, bool; everywhere if None.
        threshold: probability above which a voxel is predicted as lesion.

    Returns:
        ``dice``, ``sensitivity`` (share of the reference that is found) and ``precision`` (share of what is found that is right),
        each of shape (B,). Dice and sensitivity are NaN where the reference has no lesion, precision where nothing is found.

    Raises:
        ValueError: if the shapes differ.
    """
    if prediction.shape != reference.shape:
        shapes = f"{tuple(prediction.shape)} and {tuple(reference.shape)}"
        raise ValueError(f"compute_lesion_metrics: 'prediction' and 'reference' must share one shape, got {shapes}")
    found, wanted = (prediction > threshold).flatten(1), (reference > 0.5).flatten(1)
    if mask is not None:
        found, wanted = found & mask.bool().flatten(1), wanted & mask.bool().flatten(1)
    hit, predicted, present = (one.sum(1).double() for one in (found & wanted, found, wanted))
    return {
        "dice": torch.where(present > 0, 2 * hit / (predicted + present), torch.nan),
        "sensitivity": torch.where(present > 0, hit / present, torch.nan),
        "precision": torch.where(predicted > 0, hit / predicted, torch.nan),
    }


def _index_pair(
    name: str, prediction: Tensor, reference: Tensor, structures: Sequence[EvaluatedStructure], affine: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Both maps as labels of :func:`index_structures`, cut to the box that holds all structures, (B, 1, h, w, d)."""
    if prediction.shape != reference.shape or prediction.ndim != 5:
        found = f"{tuple(prediction.shape)} and {tuple(reference.shape)}"
        raise ValueError(f"{name}: 'prediction' and 'reference' must share one shape (B, 1, H, W, D), got {found}")
    place = torch.eye(4, dtype=torch.float64) if affine is None else affine
    # first the box of all labels, because the table of structures is read for each voxel
    box = _box_of_labels(prediction, reference)
    pred, truth = (
        torch.stack([index_structures(one[0], structures, place)[None] for one in ids[..., *box]]).to(torch.int16)
        for ids in (prediction, reference)
    )
    box = _box_of_labels(pred, truth)
    return pred[..., *box], truth[..., *box]


def _box_of_labels(pred: Tensor, truth: Tensor) -> tuple[slice, slice, slice]:
    return box_around(((pred != 0) | (truth != 0)).flatten(0, 1).any(0))
