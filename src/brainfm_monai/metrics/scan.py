"""All measures of one scan: what was predicted against what is true, as rows of the tidy table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch
from torch import Tensor

from brainfm_monai.io import ABSENT, ScanError
from brainfm_monai.metrics import fields, segmentation
from brainfm_monai.metrics.images import compute_image_metrics, compute_ssim, fit_intensities, normalise_to_target
from brainfm_monai.metrics.segmentation import SIDES, EvaluatedStructure, box_around
from brainfm_monai.metrics.tables import FITTED, MetricRow, unit_of
from brainfm_monai.tasks import TASKS

CT_WINDOW_HU = (0.0, 80.0)  # window of the brain, in which BrainFM reads CT, too
HEMISPHERES = ("left", "right")
ALL = "all"  # structure of a mean over structures

Values = dict[tuple[str, str, str], float]  # by structure, side and metric


@dataclass(frozen=True)
class _Scene:
    """What the measures of one scan share; tensors have the shape (1, C, H, W, D)."""

    structures: Sequence[EvaluatedStructure]
    affine: Tensor
    brain: Tensor
    ids: Tensor | None
    labels: Tensor | None
    image: Tensor | None
    template: fields.TemplateTissues | None


def measure_scan(
    pred: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
    structures: Sequence[EvaluatedStructure],
    affine: Tensor,
    *,
    scan: str,
    condition: str = "native",
    mask: Tensor | None = None,
    labels: Tensor | None = None,
    image: Tensor | None = None,
    template: fields.TemplateTissues | None = None,
) -> list[MetricRow]:
    """Measure every task that is in both dictionaries, as ``measures.tsv`` defines it; volumes are (C, H, W, D).

    What is undefined has the value NaN; the sides of a structure that has none have no row, and neither has a mean over nothing.

    Args:
        pred: for each task a map in the unit of the files: FreeSurfer ids for ``segmentation``, a factor for ``log_bias_field``,
            probabilities for ``lesion``, one number of years for ``age``.
        target: same shapes and units; optionally ``visible``, the field of view, and ``valid_<task>``, where a target is known.
        structures: structures of the segmentation.
        affine: voxel indices to RAS mm, shape (4, 4).
        scan: name for the rows.
        condition: name for the rows: how the scan was changed.
        mask: the head, where maps are compared; None: where the target's segmentation is not 0, and everywhere without one.
        labels: FreeSurfer ids that say what is brain where the target has no segmentation.
        image: what the network saw, in [0, 1]: for the error of the corrected image, and as the baseline of images.
        template: tissues for the Dice of warped labels.

    Raises:
        ScanError: if a task has no measure, or shapes differ.
    """
    ids = target["segmentation"][None] if "segmentation" in target else None
    if mask is not None:
        head = mask[None].bool()
    elif ids is not None:
        head = ids > 0
    else:
        maps = [one for one in target.values() if one.ndim == 4] or [torch.ones(1, 1, 1, 1)]
        head = torch.ones_like(maps[0][None, :1], dtype=torch.bool)
    if "visible" in target:
        head = head & target["visible"][None].bool()
    labels = ids if ids is not None or labels is None else labels[None]
    brain = head if ids is None else head & _is_evaluated(ids, structures)
    scene = _Scene(structures, affine, brain, ids, labels, None if image is None else image[None], template)
    rows: list[MetricRow] = []
    for name in [name for name in pred if name in target]:
        kind = TASKS[name].kind
        if kind not in MEASURES:
            raise ScanError(f"{scan}: there are measures for {sorted(MEASURES)}, found task {name!r} of kind {kind!r}")
        if pred[name].shape != target[name].shape:
            shapes = f"{tuple(pred[name].shape)} and {tuple(target[name].shape)}"
            raise ScanError(f"{scan}: {name} must have one shape in prediction and reference, found {shapes}")
        valid = head & target[f"valid_{name}"][None].bool() if f"valid_{name}" in target else head
        values = (_measure_ct if name == "CT" else MEASURES[kind])(pred[name][None], target[name][None], valid, scene)
        rows += [MetricRow(scan, condition, name, *key, x, unit_of(key[-1])) for key, x in values.items()]
    return rows


def _is_one_of(ids: Tensor, members: Iterable[int]) -> Tensor:
    return torch.isin(ids.long(), torch.tensor(sorted(members), device=ids.device))


def _is_evaluated(ids: Tensor, structures: Sequence[EvaluatedStructure]) -> Tensor:
    return _is_one_of(ids, {i for s in structures for i in s.ids})


def _name(values: Mapping[str, Tensor], structure: str = ABSENT) -> Values:
    """Numbers without a side."""
    return {(structure, ABSENT, metric): float(x) for metric, x in values.items()}


def _measure_labels(pred: Tensor, target: Tensor, _: Tensor, scene: _Scene) -> Values:
    """Measures of the structures, and mean Dice: of all parts and structures without sides, and with both sides as one."""
    arguments = (pred[0], target[0], scene.structures, scene.affine)
    measures = segmentation.compute_structure_measures(*arguments, percentile=95.0)
    measures["hd95"] = measures.pop("hausdorff")
    values = {
        (structure.name, side, metric): float(of_metric[row, column])
        for row, structure in enumerate(scene.structures)
        for column, side in enumerate(SIDES)
        if not structure.middle or side == "both"
        for metric, of_metric in measures.items()
    }
    dice, middle = measures["dice"], torch.tensor([bool(s.middle) for s in scene.structures])
    parts = {"mean_dice": torch.cat([dice[~middle, :2].flatten(), dice[middle, 2]]), "mean_dice_merged": dice[:, 2]}
    present = {metric: of_metric[~of_metric.isnan()].tolist() for metric, of_metric in parts.items()}
    return values | {(ALL, "both", metric): fmean(of_metric) for metric, of_metric in present.items() if of_metric}


def _measure_image(pred: Tensor, target: Tensor, mask: Tensor, scene: _Scene) -> Values:
    """In units of the target, as it is and after the best fit; and in the brain beside two baselines that must be beaten."""
    measures = _compare_images(*normalise_to_target(pred, target, mask), mask)
    if scene.labels is None or scene.image is None:
        return measures
    brain = mask & _is_evaluated(scene.labels, scene.structures)
    images = {"": pred, "_input": scene.image, "_painted": _paint_means(target, scene.labels, mask)}
    for name, image in images.items():
        scaled, reference = normalise_to_target(image, target, brain)
        psnr = -10 * (scaled - reference)[brain].square().mean().log10()
        measures |= _name({f"psnr_brain{name}": psnr, f"ssim_brain{name}": compute_ssim(scaled, reference, brain)})
    return measures


def _paint_means(target: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """An image of the target's mean in each label: what one knows of a contrast who knows the anatomy alone."""
    index = labels.long().clamp_min(0)
    weights = (None, target[mask].double())
    count, total = (torch.bincount(index[mask], one, minlength=int(index.max()) + 1) for one in weights)
    return (total / count.clamp_min(1)).float()[index]


def _measure_ct(pred: Tensor, target: Tensor, mask: Tensor, _: _Scene) -> Values:
    low, high = CT_WINDOW_HU
    error = (pred.float() - target)[mask].abs().mean()
    pred, target = ((one.float().clamp(low, high) - low) / (high - low) for one in (pred, target))
    return _name({"mae": error}) | _compare_images(pred, target, mask)


def _compare_images(pred: Tensor, target: Tensor, mask: Tensor) -> Values:
    fitted = compute_image_metrics(fit_intensities(pred, target, mask), target, mask)
    measures = compute_image_metrics(pred, target, mask)
    return _name(measures | {f"{name}{FITTED}": value for name, value in fitted.items()})


def _measure_distance(pred: Tensor, target: Tensor, mask: Tensor, _: _Scene) -> Values:
    error = fields.compute_distance_mae(pred, target, mask)[0].tolist()
    channels = [(surface, side) for side in HEMISPHERES for surface in ("pial", "white")]  # lp, lw, rp, rw
    values = {(*channel, "distance_error"): x for channel, x in zip(channels, error, strict=True)}
    for metric, of_sides in fields.compute_thickness_error(pred, target, mask).items():
        values |= {("cortex", side, metric): x for side, x in zip(HEMISPHERES, of_sides[0].tolist(), strict=True)}
    return values


def _measure_coordinates(pred: Tensor, target: Tensor, mask: Tensor, scene: _Scene) -> Values:
    folds = fields.compute_fold_fraction(pred, scene.brain, scene.affine)
    values = _name(fields.compute_mni_error(pred, target, scene.brain) | {"fold_fraction": folds}, "brain")
    if scene.template is None:
        return values
    box = box_around(mask[0, 0])
    pred, target, mask = (one[..., *box] for one in (pred, target, mask))
    references = {"warped_dice": fields.pull_template(target, scene.template)}
    if scene.ids is not None:
        tissues = [_is_one_of(scene.ids[..., *box], of_tissue) for of_tissue in scene.template.ids]
        references["warped_dice_labels"] = torch.cat(tissues, dim=1)
    for metric, reference in references.items():
        dice = fields.compute_warped_dice(pred, reference, scene.template, mask)[0].tolist()
        values |= {(name, "both", metric): x for name, x in zip(scene.template.names, dice, strict=True)}
    return values


def _measure_number(pred: Tensor, target: Tensor, _: Tensor, __: _Scene) -> Values:
    error = pred.float().mean() - target.float().mean()
    return _name({"error": error, "absolute_error": error.abs()})


MEASURES: dict[str, Callable[[Tensor, Tensor, Tensor, _Scene], Values]] = {
    "labels": _measure_labels,
    "image": _measure_image,
    "log_field": lambda pred, true, mask, scene: _name(fields.compute_bias_error(pred, true, mask, scene.image)),
    "distance": _measure_distance,
    "coordinates": _measure_coordinates,
    "mask": lambda pred, target, mask, _: _name(segmentation.compute_lesion_metrics(pred, target, mask), "lesion"),
    "scalar": _measure_number,
}
