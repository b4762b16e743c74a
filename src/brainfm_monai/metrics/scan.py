"""All measures of one scan: what was predicted against what is true, as rows of the tidy table."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import torch
from torch import Tensor

from brainfm_monai.io import ABSENT, ScanError
from brainfm_monai.metrics import fields, segmentation
from brainfm_monai.metrics.fields import compute_image_metrics, compute_ssim, normalise_to_target
from brainfm_monai.metrics.segmentation import SIDES, EvaluatedStructure
from brainfm_monai.metrics.tables import MetricRow, unit_of
from brainfm_monai.tasks import BRAIN_WINDOW_HU, TASKS

ALL = "all"  # structure of a mean over structures

Values = dict[tuple[str, str, str], float]  # by structure, side and metric


@dataclass(frozen=True)
class Scene:
    """What the measures of one scan share; volumes have the shape (1, H, W, D)."""

    structures: Sequence[EvaluatedStructure]
    affine: Tensor  # voxel indices to RAS mm, shape (4, 4)
    scan: str  # name for the rows
    condition: str = "native"  # how the scan was changed
    mask: Tensor | None = None  # the head; None: where the target's segmentation is not 0, and everywhere without one
    labels: Tensor | None = None  # FreeSurfer ids that say what is brain where the target has no segmentation
    image: Tensor | None = None  # what the network saw, in [0, 1]: the baseline of images
    ids: Tensor | None = None  # the target's segmentation, set by measure_scan

    def is_evaluated(self, ids: Tensor) -> Tensor:
        """Where FreeSurfer ids are those of the structures."""
        evaluated = sorted({i for s in self.structures for i in s.ids})
        return torch.isin(ids.long(), torch.tensor(evaluated, device=ids.device))


def measure_scan(pred: Mapping[str, Tensor], target: Mapping[str, Tensor], scene: Scene) -> list[MetricRow]:
    """Measure every task that is in both dictionaries, as ``measures.tsv`` defines it.

    Predictions are maps, (C, H, W, D), in the unit of the files: FreeSurfer ids for ``segmentation``, a factor for
    ``log_bias_field``, probabilities for ``lesion``, one number of years for ``age``. Targets have the same shapes and
    units, and optionally ``visible``, the field of view, and ``valid_<task>``, where a target is known. What is
    undefined is NaN, or has no row. A task without a measure, or shapes that differ, are a ScanError.
    """
    ids, head = target.get("segmentation"), scene.mask
    if head is None:
        maps = [one for one in target.values() if one.ndim == 4] or [torch.ones(1, 1, 1, 1)]
        head = torch.ones_like(maps[0][:1], dtype=torch.bool) if ids is None else ids > 0
    head = head.bool() & target["visible"].bool() if "visible" in target else head.bool()
    scene = replace(scene, mask=head, labels=scene.labels if ids is None else ids, ids=ids)
    rows: list[MetricRow] = []
    for name in [name for name in pred if name in target]:
        kind = TASKS[name].kind
        if kind not in MEASURES:
            rule = f"there are measures for {sorted(MEASURES)}"
            raise ScanError(f"{scene.scan}: {rule}, found task {name!r} of kind {kind!r}")
        if pred[name].shape != target[name].shape:
            shapes = f"{tuple(pred[name].shape)} and {tuple(target[name].shape)}"
            raise ScanError(f"{scene.scan}: {name} must have one shape in prediction and reference, found {shapes}")
        valid = head & target[f"valid_{name}"].bool() if f"valid_{name}" in target else head
        measure = _measure_ct if name == "CT" else MEASURES[kind]
        values = measure(pred[name][None], target[name][None], valid[None], scene)
        rows += [MetricRow(scene.scan, scene.condition, name, *key, x, unit_of(key[-1])) for key, x in values.items()]
    return rows


def measure_entropy(labels: Tensor, entropy: Tensor, scene: Scene) -> list[MetricRow]:
    """Rows of the mean entropy of each structure, of a prediction (FreeSurfer ids) on the grid of the scene."""
    values = segmentation.compute_structure_entropy(labels, entropy, scene.structures, scene.affine)
    return [
        MetricRow(scene.scan, scene.condition, "segmentation", structure.name, side, "entropy", x, unit_of("entropy"))
        for structure, row in zip(scene.structures, values.tolist(), strict=True)
        for side, x in zip(SIDES, row, strict=True)
        if not structure.middle or side == "both"
    ]


def _name(values: Mapping[str, Tensor], structure: str = ABSENT) -> Values:
    """Numbers without a side."""
    return {(structure, ABSENT, metric): float(x) for metric, x in values.items()}


def _measure_labels(pred: Tensor, target: Tensor, _: Tensor, scene: Scene) -> Values:
    """Measures of the structures, and mean Dice: of left and right parts, and of both sides as one."""
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


def _measure_image(pred: Tensor, target: Tensor, mask: Tensor, scene: Scene) -> Values:
    """In units of the target; and in the brain beside two baselines that must be beaten."""
    measures = _name(compute_image_metrics(*normalise_to_target(pred, target, mask), mask))
    if scene.labels is None or scene.image is None:
        return measures
    index = scene.labels[None].long().clamp_min(0)
    weights = (None, target[mask].double())
    count, total = (torch.bincount(index[mask], x, minlength=int(index.max()) + 1) for x in weights)
    # the target's mean in each label: what one knows of a contrast who knows the anatomy alone
    images = {"": pred, "_input": scene.image[None], "_painted": (total / count.clamp_min(1)).float()[index]}
    brain = mask & scene.is_evaluated(scene.labels)
    for name, image in images.items():
        scaled, reference = normalise_to_target(image, target, brain)
        psnr = -10 * (scaled - reference)[brain].square().mean().log10()
        measures |= _name({f"psnr_brain{name}": psnr, f"ssim_brain{name}": compute_ssim(scaled, reference, brain)})
    return measures


def _measure_ct(pred: Tensor, target: Tensor, mask: Tensor, _: Scene) -> Values:
    low, high = BRAIN_WINDOW_HU
    error = (pred.float() - target)[mask].abs().mean()
    pred, target = ((one.float().clamp(low, high) - low) / (high - low) for one in (pred, target))
    return _name({"mae": error} | compute_image_metrics(pred, target, mask))


def _measure_distance(pred: Tensor, target: Tensor, mask: Tensor, _: Scene) -> Values:
    error = fields.compute_distance_mae(pred, target, mask)[0].tolist()
    channels = [(surface, side) for side in ("left", "right") for surface in ("pial", "white")]  # lp, lw, rp, rw
    return {(*channel, "distance_error"): x for channel, x in zip(channels, error, strict=True)}


def _measure_coordinates(pred: Tensor, target: Tensor, mask: Tensor, scene: Scene) -> Values:
    assert scene.mask is not None
    brain = (scene.mask if scene.ids is None else scene.mask & scene.is_evaluated(scene.ids))[None]
    folds = fields.compute_fold_fraction(pred, brain, scene.affine)
    return _name(fields.compute_mni_error(pred, target, brain) | {"fold_fraction": folds}, "brain")


def _measure_number(pred: Tensor, target: Tensor, _: Tensor, __: Scene) -> Values:
    error = pred.float().mean() - target.float().mean()
    return _name({"error": error, "absolute_error": error.abs()})


MEASURES: dict[str, Callable[[Tensor, Tensor, Tensor, Scene], Values]] = {
    "labels": _measure_labels,
    "image": _measure_image,
    "log_field": lambda pred, target, mask, _: _name({"normalised_l2": fields.compute_bias_error(pred, target, mask)}),
    "distance": _measure_distance,
    "coordinates": _measure_coordinates,
    "mask": lambda pred, target, mask, _: _name(segmentation.compute_lesion_metrics(pred, target, mask), "lesion"),
    "scalar": _measure_number,
}
