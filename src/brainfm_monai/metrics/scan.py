"""All measures of one scan: what was predicted against what is true, as rows of the tidy table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from brainfm_monai.anatomy import Protocol
from brainfm_monai.io import ABSENT
from brainfm_monai.metrics import fields, segmentation
from brainfm_monai.metrics.images import compute_image_metrics, fit_intensities, normalise_to_target
from brainfm_monai.metrics.results import MetricRow
from brainfm_monai.metrics.structures import SIDES, EvaluatedStructure, box_around
from brainfm_monai.metrics.template import TemplateTissues, compute_warped_dice, pull_template
from brainfm_monai.tasks import TaskLayout

__all__ = ["measure_scan"]

CT_WINDOW_HU = (0.0, 80.0)  # window of the brain, in which BrainFM reads CT, too
HEMISPHERES = ("left", "right")
SURFACES = ("pial", "white")
IMAGE_UNITS = {"l1": "1", "psnr": "dB", "ssim": "1", "ms_ssim": "1"}

Cells = tuple[str, str, str, float, str]  # structure, side, metric, value, unit


@dataclass(frozen=True)
class _Scene:
    """What the measures of one scan share; tensors of one sample, (1, C, H, W, D)."""

    structures: Sequence[EvaluatedStructure]
    affine: Tensor
    head: Tensor
    brain: Tensor
    ids: Tensor | None
    image: Tensor | None
    template: TemplateTissues | None


def measure_scan(
    pred: Mapping[str, Tensor],
    target: Mapping[str, Tensor],
    layout: TaskLayout,
    structures: Sequence[EvaluatedStructure],
    affine: Tensor,
    *,
    scan: str,
    condition: str = "native",
    reference: Protocol | None = None,
    mask: Tensor | None = None,
    image: Tensor | None = None,
    template: TemplateTissues | None = None,
) -> list[MetricRow]:
    """Measure every task that stands in both dictionaries.

    Args:
        pred: for each task a map of shape (C, H, W, D) in the unit of the files (``Task.output_unit``), but the logarithm of a
            bias field; ``segmentation`` holds labels of the layout's protocol, shape (1, H, W, D), ``lesion`` probabilities,
            ``age`` one number of years.
        target: same shapes and units; optionally ``visible``, the field of view, and ``valid_<task>``, where an image is not
            defaced, both of shape (1, H, W, D).
        layout: tells the kind of each task, and the protocol of the predicted labels.
        structures: structures of the segmentation, see :func:`~brainfm_monai.metrics.parse_structures`.
        affine: voxel indices to RAS mm, shape (4, 4).
        scan: name for the rows.
        condition: name for the rows: how the scan was changed.
        reference: protocol of the labels in ``target["segmentation"]``; None: they are FreeSurfer ids.
        mask: the head, shape (1, H, W, D): where maps are compared; None: where the target's segmentation is not 0, and
            everywhere if there is none.
        image: what the network saw, shape (1, H, W, D), any unit: for the error of the corrected image.
        template: tissues for the Dice of warped labels.

    Returns:
        Rows. What is undefined has the value NaN; the sides of a structure that has none have no row. Coordinates are compared
        within the evaluated structures, where the target has a segmentation; images are in units of the target (see
        :func:`~brainfm_monai.metrics.normalise_to_target`), CT in the window of the brain but for its ``mae``, and ``*_fitted``
        are after the best gain and offset.

    Raises:
        ValueError: if a task has no measure, or shapes differ.
    """
    scene = _set_scene(target, structures, affine, reference, mask, image, template)
    rows: list[MetricRow] = []
    for name, found in pred.items():
        if name not in target:
            continue
        if name not in {*layout.tasks, "age"}:
            raise ValueError(f"measure_scan: 'layout' must have every task but age, got {name!r}")
        kind = name if name == "age" else layout.tasks[name].kind
        if kind not in MEASURES:
            raise ValueError(
                f"measure_scan: there are measures for {sorted(MEASURES)}, got task {name!r} of kind {kind!r}"
            )
        found, wanted = found[None], target[name][None]
        if kind == "labels":
            found, wanted = _to_ids(found, layout.protocol), scene.ids if scene.ids is not None else wanted
        if kind != "age" and found.shape != wanted.shape:
            shapes = f"{tuple(found.shape[1:])} and {tuple(wanted.shape[1:])}"
            raise ValueError(f"measure_scan: {name} must have one shape in 'pred' and 'target', got {shapes}")
        valid = scene.head & target[f"valid_{name}"][None].bool() if f"valid_{name}" in target else scene.head
        cells = _measure_ct(found, wanted, valid) if name == "CT" else MEASURES[kind](found, wanted, valid, scene)
        rows += [MetricRow(scan, condition, name, *cell) for cell in cells]
    return rows


def _set_scene(
    target: Mapping[str, Tensor],
    structures: Sequence[EvaluatedStructure],
    affine: Tensor,
    reference: Protocol | None,
    mask: Tensor | None,
    image: Tensor | None,
    template: TemplateTissues | None,
) -> _Scene:
    labels = target["segmentation"][None] if "segmentation" in target else None
    ids = labels if labels is None or reference is None else _to_ids(labels, reference)
    if mask is not None:
        head = mask[None].bool()
    elif labels is not None:
        head = labels > 0
    else:
        dense = next((one for one in target.values() if one.ndim == 4), torch.ones(1, 1, 1, 1))
        head = torch.ones_like(dense[:1], dtype=torch.bool)[None]
    if "visible" in target:
        head = head & target["visible"][None].bool()
    brain = head
    if ids is not None:
        known = sorted({i for s in structures for i in s.ids})
        brain = head & torch.isin(ids.long(), torch.tensor(known, device=ids.device))
    return _Scene(structures, affine, head, brain, ids, None if image is None else image[None], template)


def _to_ids(labels: Tensor, protocol: Protocol) -> Tensor:
    return torch.as_tensor(protocol.freesurfer_ids, device=labels.device)[labels.long()]


def _measure_labels(found: Tensor, wanted: Tensor, _: Tensor, scene: _Scene) -> list[Cells]:
    arguments = (found, wanted, scene.structures, scene.affine)
    volumes = segmentation.compute_structure_volume_error(*arguments)
    measured = {
        ("dice", "1"): segmentation.compute_structure_dice(*arguments),
        ("hd95", "mm"): segmentation.compute_structure_hd95(*arguments),
        ("volume_error", "1"): volumes.error,
        ("volume", "mL"): volumes.prediction_ml,
        ("reference_volume", "mL"): volumes.reference_ml,
    }
    return [
        (structure.name, side, metric, float(values[0, s, i]), unit)
        for s, structure in enumerate(scene.structures)
        for i, side in enumerate(SIDES)
        if not structure.middle or side == "both"
        for (metric, unit), values in measured.items()
    ]


def _measure_image(found: Tensor, wanted: Tensor, mask: Tensor, _: _Scene) -> list[Cells]:
    found, wanted = normalise_to_target(found, wanted, mask)
    return _compare_images(found, wanted, mask)


def _measure_ct(found: Tensor, wanted: Tensor, mask: Tensor) -> list[Cells]:
    low, high = CT_WINDOW_HU
    error = float((found.float() - wanted)[mask].abs().mean())
    found, wanted = ((one.float().clamp(low, high) - low) / (high - low) for one in (found, wanted))
    return [(ABSENT, ABSENT, "mae", error, "HU"), *_compare_images(found, wanted, mask)]


def _compare_images(found: Tensor, wanted: Tensor, mask: Tensor) -> list[Cells]:
    compared = {"": found, "_fitted": fit_intensities(found, wanted, mask)}
    return [
        (ABSENT, ABSENT, name + suffix, float(value), IMAGE_UNITS[name])
        for suffix, image in compared.items()
        for name, value in compute_image_metrics(image, wanted, mask).items()
    ]


def _measure_log_field(found: Tensor, wanted: Tensor, mask: Tensor, scene: _Scene) -> list[Cells]:
    errors = fields.compute_bias_error(found, wanted, mask, scene.image)
    return [(ABSENT, ABSENT, name, float(value), "1") for name, value in errors.items()]


def _measure_distance(found: Tensor, wanted: Tensor, mask: Tensor, _: _Scene) -> list[Cells]:
    errors = fields.compute_distance_error(found, wanted, mask)[0].reshape(len(HEMISPHERES), len(SURFACES))
    cells: list[Cells] = [
        (surface, side, "distance_error", float(errors[h, s]), "mm")
        for h, side in enumerate(HEMISPHERES)
        for s, surface in enumerate(SURFACES)
    ]
    thickness = fields.compute_thickness_error(found, wanted, mask)
    names = {
        "prediction": "thickness",
        "reference": "reference_thickness",
        "error": "thickness_error",
        "absolute_error": "thickness_absolute_error",
    }
    for name, metric in names.items():
        cells += [("cortex", side, metric, float(thickness[name][0, h]), "mm") for h, side in enumerate(HEMISPHERES)]
    return cells


def _measure_coordinates(found: Tensor, wanted: Tensor, mask: Tensor, scene: _Scene) -> list[Cells]:
    errors = fields.compute_mni_error(found, wanted, scene.brain)
    folds = fields.compute_fold_fraction(found, scene.brain, scene.affine)
    cells: list[Cells] = [("brain", ABSENT, f"error_{name}", float(value), "mm") for name, value in errors.items()]
    cells.append(("brain", ABSENT, "fold_fraction", float(folds), "1"))
    if scene.template is None:
        return cells
    tissues, grid = scene.template.probability, scene.template.affine
    box = box_around(mask[0, 0])
    found, wanted, mask = (one[..., *box] for one in (found, wanted, mask))
    references = {"warped_dice": pull_template(wanted, tissues, grid)}
    if scene.ids is not None:
        ids = scene.ids[..., *box].long()
        of_labels = [torch.isin(ids, torch.tensor(sorted(one), device=ids.device)) for one in scene.template.ids]
        references["warped_dice_labels"] = torch.cat(of_labels, dim=1)
    for metric, reference in references.items():
        dice = compute_warped_dice(found, reference, tissues, grid, mask)[0]
        cells += [
            (name, "both", metric, float(value), "1") for name, value in zip(scene.template.names, dice, strict=True)
        ]
    return cells


def _measure_mask(found: Tensor, wanted: Tensor, mask: Tensor, _: _Scene) -> list[Cells]:
    overlap = segmentation.compute_lesion_metrics(found, wanted, mask)
    return [("lesion", ABSENT, name, float(value), "1") for name, value in overlap.items()]


def _measure_age(found: Tensor, wanted: Tensor, _: Tensor, __: _Scene) -> list[Cells]:
    error = float(found) - float(wanted)
    return [(ABSENT, ABSENT, "error", error, "years"), (ABSENT, ABSENT, "absolute_error", abs(error), "years")]


MEASURES: dict[str, Callable[[Tensor, Tensor, Tensor, _Scene], list[Cells]]] = {
    "labels": _measure_labels,
    "image": _measure_image,
    "log_field": _measure_log_field,
    "distance": _measure_distance,
    "coordinates": _measure_coordinates,
    "mask": _measure_mask,
    "age": _measure_age,
}
