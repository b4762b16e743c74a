"""Named structures of a predicted and a reference label map: Dice, volumes, Hausdorff distance; and masks of lesions."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from monai.metrics import compute_hausdorff_distance
from torch import Tensor

from brainfm_monai.metrics.structures import SIDES, EvaluatedStructure, box_around, index_structures

__all__ = ["compute_lesion_metrics", "compute_structure_hausdorff", "compute_structure_overlap"]

ML_PER_MM3 = 1e-3
LESION_THRESHOLD = 0.5  # probability above which a voxel counts as lesion


def compute_structure_overlap(
    prediction: Tensor, reference: Tensor, structures: Sequence[EvaluatedStructure], affine: Tensor
) -> dict[str, Tensor]:
    """Dice and volumes of each structure: of its left part, its right part, and both together.

    Args:
        prediction: FreeSurfer ids, shape (1, H, W, D).
        reference: FreeSurfer ids, same shape.
        structures: S structures.
        affine: voxel indices to RAS mm, shape (4, 4).

    Returns:
        Tensors of shape (S, 3), columns left, right, both: ``dice`` and ``volume_error``, (prediction - reference) / reference,
        both NaN where the reference lacks the part; ``volume`` and ``reference_volume`` in mL. The sides of a structure that has
        none are NaN.

    Raises:
        ValueError: if the shapes differ.
    """
    pred, truth = _index_pair(prediction, reference, structures, affine)
    count = len(structures)
    labels = 2 * count + 1
    pairs = (
        torch.bincount((pred.int() * labels + truth).flatten(), minlength=labels**2)
        .reshape(labels, labels)
        .cpu()
        .double()
    )
    matches = pairs[1:, 1:].reshape(count, 2, count, 2)  # voxels by predicted structure and side, and by the true ones
    overlap = torch.cat([torch.einsum("sasa->sa", matches), torch.einsum("sasb->s", matches)[:, None]], dim=1)
    sides = [pairs.sum(axis)[1:].reshape(count, 2) for axis in (1, 0)]
    predicted, present = (torch.cat([size, size.sum(1, keepdim=True)], dim=1) for size in sides)
    voxel_ml = ML_PER_MM3 * float(torch.linalg.det(affine[:3, :3].double()).abs())
    measures = {
        "dice": torch.where(present > 0, 2 * overlap / (predicted + present), torch.nan),
        "volume_error": torch.where(present > 0, (predicted - present) / present, torch.nan),
        "volume": predicted * voxel_ml,
        "reference_volume": present * voxel_ml,
    }
    without_sides = torch.tensor([[bool(s.middle)] * 2 + [False] for s in structures])
    return {name: values.masked_fill(without_sides, torch.nan) for name, values in measures.items()}


def compute_structure_hausdorff(
    prediction: Tensor,
    reference: Tensor,
    structures: Sequence[EvaluatedStructure],
    affine: Tensor,
    percentile: float | None = None,
) -> Tensor:
    """Hausdorff distance between the surfaces of each structure: of its left part, its right part, and both together.

    The surface is the voxels of a part that touch what is not the part. Of the distances from one surface to the other, and of
    those back, the percentile is taken, and the larger of the two counts (MONAI's definition). Each part is cut to the box
    around it first, so that memory depends on the largest structure and not on the image times the structures.

    Args:
        prediction: FreeSurfer ids, shape (1, H, W, D).
        reference: FreeSurfer ids, same shape.
        structures: S structures.
        affine: voxel indices to RAS mm, shape (4, 4), without shear; voxels may be anisotropic.
        percentile: in (0, 100]; the maximum if None.

    Returns:
        Distance in mm, shape (S, 3): left, right, both. It is NaN where one of the two maps lacks the part, because there is
        no surface to be distant from (Dice is 0 where the prediction lacks it), and for the sides of a structure that has none.

    Raises:
        ValueError: if the shapes differ.

    Reference:
        Huttenlocher et al., Comparing images using the Hausdorff distance, IEEE TPAMI 15, 1993; the percentile: Taha and Hanbury,
        Metrics for evaluating 3D medical image segmentation, BMC Medical Imaging 15, 2015.
    """
    pred, truth = _index_pair(prediction, reference, structures, affine)
    spacing_mm = affine[:3, :3].double().norm(dim=0).tolist()
    distances = torch.full((len(structures), len(SIDES)), torch.nan)
    for row, structure in enumerate(structures):
        left, right = 2 * row + 1, 2 * row + 2
        for column, (first, last) in enumerate(((left, left), (right, right), (left, right))):
            masks = [(index >= first) & (index <= last) for index in (pred, truth)]
            if (structure.middle and SIDES[column] != "both") or not all(mask.any() for mask in masks):
                continue
            box = box_around(masks[0] | masks[1])
            pred_part, true_part = (mask[box][None, None].cpu() for mask in masks)  # neighbours are found on the host
            with warnings.catch_warnings():
                # MONAI 1.6 calls a function of its own with an argument that it has deprecated
                warnings.filterwarnings("ignore", message=".*always_return_as_numpy", category=FutureWarning)
                distances[row, column] = compute_hausdorff_distance(
                    pred_part, true_part, include_background=True, percentile=percentile, spacing=spacing_mm
                )
    return distances


def compute_lesion_metrics(prediction: Tensor, reference: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Overlap of lesions, voxel by voxel.

    Args:
        prediction: probability, any shape; a voxel above 0.5 is lesion.
        reference: 0 or 1, same shape.
        mask: where it counts, same shape, bool.

    Returns:
        Numbers: ``dice``, ``sensitivity`` (share of the reference that is predicted) and ``precision`` (share of the prediction
        that is right). Dice and sensitivity are NaN where the reference has no lesion, precision where none is predicted.
    """
    pred, truth = (prediction > LESION_THRESHOLD) & mask, (reference > LESION_THRESHOLD) & mask
    hit, predicted, present = (one.sum().double() for one in (pred & truth, pred, truth))
    return {
        "dice": torch.where(present > 0, 2 * hit / (predicted + present), torch.nan),
        "sensitivity": torch.where(present > 0, hit / present, torch.nan),
        "precision": torch.where(predicted > 0, hit / predicted, torch.nan),
    }


def _index_pair(
    prediction: Tensor, reference: Tensor, structures: Sequence[EvaluatedStructure], affine: Tensor
) -> tuple[Tensor, Tensor]:
    """Both maps as labels of :func:`index_structures`, cut to the box of all structures, shape (h, w, d)."""
    if prediction.shape != reference.shape or prediction.ndim != 4:
        shapes = f"{tuple(prediction.shape)} and {tuple(reference.shape)}"
        raise ValueError(f"structures: prediction and reference must share one shape (1, H, W, D), found {shapes}")
    # first the box of all labels, because the table of structures is read for each voxel
    ids = _cut(prediction[0], reference[0].to(prediction.device))
    return _cut(*(index_structures(one, structures, affine) for one in ids))


def _cut(pred: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """Both label maps in the box around all that is not 0 in one of them."""
    box = box_around((pred != 0) | (truth != 0))
    return pred[box], truth[box]
