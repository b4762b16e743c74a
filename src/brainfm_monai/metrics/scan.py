"""All measures of one scan: what was predicted against what is true, as rows of the tidy table."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

from brainfm_monai.io import ABSENT, ScanError, read_table, refuse_if
from brainfm_monai.metrics import fields, segmentation
from brainfm_monai.metrics.fields import compute_image_metrics, normalise_to_target
from brainfm_monai.metrics.segmentation import SIDES
from brainfm_monai.tasks import BRAIN_WINDOW_HU, TASKS

MEASURES = read_table(Path(__file__).with_name("measures.tsv"))
UNITS = {row["metric"]: row["unit"] or "1" for row in MEASURES}

Values = dict[tuple[str, str, str], float]  # by structure, side and metric


class MetricRow(NamedTuple):
    """One value of one scan."""

    scan: str
    condition: str  # how the scan was changed before it was predicted, ``native`` if it was not
    task: str
    structure: str  # structure, tissue or surface that was measured, ``n/a`` where there is none
    side: str  # ``left``, ``right`` or ``both``, ``n/a`` where the task has no sides
    metric: str
    value: float  # NaN where it is undefined
    unit: str  # ``1`` for a pure number


def make_rows(scan: str, condition: str, task: str, values: Values) -> list[MetricRow]:
    """Rows of one task of a scan."""
    return [MetricRow(scan, condition, task, *key, value, UNITS[key[-1]]) for key, value in values.items()]


@dataclass(frozen=True)
class Scene:
    """What the measures of one scan share; volumes have the shape (1, H, W, D)."""

    structures: segmentation.Structures
    affine: Tensor  # voxel indices to RAS mm, shape (4, 4)
    scan: str  # name for the rows
    condition: str = "native"  # how the scan was changed
    mask: Tensor | None = None  # the head; None: where the target's segmentation is not 0, and everywhere without one
    labels: Tensor | None = None  # FreeSurfer ids that say what is brain where the target has no segmentation
    image: Tensor | None = None  # what the network saw, in [0, 1]: the baseline of images
    ids: Tensor | None = None  # the target's segmentation, set by measure_scan

    def is_evaluated(self, ids: Tensor) -> Tensor:
        """Where FreeSurfer ids are those of the structures."""
        return torch.isin(ids.long(), torch.tensor([i for s in self.structures for i in s.ids], device=ids.device))


def measure_scan(pred: Mapping[str, Tensor], target: Mapping[str, Tensor], scene: Scene) -> list[MetricRow]:
    """Measure every task that is in both dictionaries, as ``measures.tsv`` defines it.

    Maps, (C, H, W, D), have the unit of the files, ``segmentation`` FreeSurfer ids and ``age`` one number. Targets may
    have ``visible``, the field of view, and ``valid_<task>``, where a target is known. What is undefined is NaN, or has
    no row. A task without a measure, or shapes that differ, are a ScanError.
    """
    ids, head = target.get("segmentation"), scene.mask
    if head is None:
        maps = [one for one in target.values() if one.ndim == 4] or [torch.ones(1, 1, 1, 1)]
        head = torch.ones_like(maps[0][:1], dtype=torch.bool) if ids is None else ids > 0
    head = head.bool() & target["visible"].bool() if "visible" in target else head.bool()
    scene = replace(scene, mask=head, labels=scene.labels if ids is None else ids, ids=ids)
    rows: list[MetricRow] = []
    for name in [name for name in pred if name in target]:
        rule = f"{scene.scan}: {name} must have one shape in prediction and reference"
        found = f"{tuple(pred[name].shape)} and {tuple(target[name].shape)}"
        refuse_if(pred[name].shape != target[name].shape, rule, found, ScanError)
        valid = head & target[f"valid_{name}"].bool() if f"valid_{name}" in target else head
        values = _measure(name, pred[name][None], target[name][None], valid[None], scene)
        rows += make_rows(scene.scan, scene.condition, name, values)
    return rows


def _measure(name: str, pred: Tensor, target: Tensor, mask: Tensor, scene: Scene) -> Values:
    """Measures of one task, whose target is known in the mask."""
    match TASKS[name].kind:
        case "labels":
            return _measure_labels(pred, target, scene)
        case "image" if name == "CT":
            low, high = BRAIN_WINDOW_HU
            error = (pred.float() - target)[mask].abs().mean()
            pred, target = ((one.float().clamp(low, high) - low) / (high - low) for one in (pred, target))
            return _name({"mae": error} | compute_image_metrics(pred, target, mask))
        case "image":
            return _measure_image(pred, target, mask, scene)
        case "log_field":
            return _name({"normalised_l2": fields.compute_bias_error(pred, target, mask)})
        case "distance":
            errors = fields.compute_distance_mae(pred, target, mask)[0].tolist()
            channels = [("pial", "left"), ("white", "left"), ("pial", "right"), ("white", "right")]  # lp, lw, rp, rw
            return {(*channel, "distance_error"): error for channel, error in zip(channels, errors, strict=True)}
        case "coordinates":
            assert scene.mask is not None
            brain = scene.mask if scene.ids is None else scene.mask & scene.is_evaluated(scene.ids)
            return _name(fields.compute_mni_error(pred, target, brain[None]), "brain")
        case "mask":
            return _name(segmentation.compute_lesion_metrics(pred, target, mask), "lesion")
        case "scalar":
            error = pred.float().mean() - target.float().mean()
            return _name({"error": error, "absolute_error": error.abs()})
    found = f"task {name!r} of kind {TASKS[name].kind!r}"
    raise ScanError(f"{scene.scan}: there are measures for the tasks of measures.tsv, found {found}")


def measure_entropy(labels: Tensor, entropy: Tensor, scene: Scene) -> list[MetricRow]:
    """Rows of the mean entropy of each structure, of a prediction (FreeSurfer ids), both (1, H, W, D)."""
    index = segmentation.index_structures(labels[0], scene.structures, scene.affine)
    total, count = (segmentation.sum_parts(index, scene.structures, x) for x in (entropy.flatten().double(), None))
    return make_rows(scene.scan, scene.condition, "segmentation", _name_parts({"entropy": total / count}, scene))


def _name_parts(measures: Mapping[str, Tensor], scene: Scene) -> Values:
    """Numbers of the parts of the structures, out of (S, 3); the sides of a structure that has none are left out."""
    return {
        (structure.name, side, metric): float(values[row, column])
        for row, structure in enumerate(scene.structures)
        for column, side in enumerate(SIDES)
        if not structure.middle or side == "both"
        for metric, values in measures.items()
    }


def _name(values: Mapping[str, Tensor], structure: str = ABSENT) -> Values:
    """Numbers without a side."""
    return {(structure, ABSENT, metric): float(x) for metric, x in values.items()}


def _measure_labels(pred: Tensor, target: Tensor, scene: Scene) -> Values:
    """Measures of the structures, and mean Dice: of left and right parts, and of both sides as one."""
    measures = segmentation.compute_structure_measures(pred[0], target[0], scene.structures, scene.affine, 95.0)
    measures["hd95"] = measures.pop("hausdorff")
    dice, middle = measures["dice"], [bool(structure.middle) for structure in scene.structures]
    parts = {"mean_dice": torch.cat([dice[:, :2].flatten(), dice[middle, 2]]), "mean_dice_merged": dice[:, 2]}
    present = {metric: of_metric[~of_metric.isnan()].tolist() for metric, of_metric in parts.items()}
    means = {("all", "both", metric): fmean(of_metric) for metric, of_metric in present.items() if of_metric}
    return _name_parts(measures, scene) | means


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
        in_brain = compute_image_metrics(*normalise_to_target(image, target, brain), brain)
        measures |= _name({f"{metric}_brain{name}": in_brain[metric] for metric in ("psnr", "ssim")})
    return measures
