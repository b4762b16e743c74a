"""The cases of an evaluation, every scan under every condition: their list, references and measures."""

import zlib
from collections.abc import Hashable, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Transform
from torch import Tensor

from brainfm_monai.anatomy import Protocol
from brainfm_monai.data.contrasts import read_scan, scale_contrast
from brainfm_monai.data.datalist import read_datalist
from brainfm_monai.data.registration import resample_to_box
from brainfm_monai.evaluation.conditions import TARGET, Conditions, check_for_real_scans, to_freesurfer_ids
from brainfm_monai.io import find_repeated, read_maps, refuse_if, scan_stem
from brainfm_monai.metrics.scan import Scene, measure_entropy, measure_scan
from brainfm_monai.metrics.segmentation import compute_structure_measures, parse_structures
from brainfm_monai.outputs import resample
from brainfm_monai.synthesis.ranges import CONTRASTS
from brainfm_monai.tasks import TASKS, TaskLayout

WITHOUT_REFERENCE = ("segmentation", "super_resolution", "embedding")
# what an item may have beside its scan: entry of the list and task that it is the reference of
REFERENCES = {"label": "segmentation", **{name: name for name in TASKS if name not in WITHOUT_REFERENCE}}
GRIDS = {"scan": "pred", "network": "segmentation"}  # in which labels are compared, with the entry of the prediction
HEAD = "head"  # entry of the mask of the head
MAGNITUDES = [name for name in CONTRASTS if name != "CT"]  # scans without a unit
FOREGROUND = 0.05  # of the scan's range: above it is head, where no label map says what is


def make_cases(
    datalist: str | Path, conditions: Conditions, section: str, seed: int = 0, scans_per_subject: int = 0
) -> list[dict[str, Any]]:
    """Scans under every condition, a scan with the same draw under each: real ones, or so many of each subject.

    The list of real scans is JSON, ``{section: [{"image": path, "label": path}, ...]}`` with paths relative to its
    folder. An item may have a ``name``, a ``label_protocol`` where its label map does not hold FreeSurfer ids, and,
    beside the label map or in its place, other :data:`REFERENCES` in the same space and in grids of their own: ``CT``
    in HU, ``log_bias_field``, ``distance`` (mm; left pial, left white, right pial, right white), ``mni`` (mm), ``age``.
    Generated scans, of a list of ``brainfm-monai data list``, differ in head and look. Seeds follow from the names.

    Returns the items, once for every condition, with ``scan``, ``condition``, ``settings``, ``seed`` and ``name``. A
    missing list or file is a FileNotFoundError; a wrong list, two cases of one name, or a condition that real scans
    cannot have are a ValueError.
    """
    found, cases = "no such file: pass --datalist FILE", list[dict[str, Any]]()
    refuse_if(not Path(datalist).is_file(), f"{datalist}: a datalist (JSON) is needed", found, FileNotFoundError)
    if not scans_per_subject:
        check_for_real_scans(conditions)
    for item in read_datalist(datalist, section):
        if scans_per_subject:
            rule = f"{datalist}: every subject needs 'generation_labels' and 'segmentation'"
            refuse_if(not {"generation_labels", "segmentation"}.issubset(item), rule, sorted(item))
            scans = [f"{item['subject']}_{number:02}" for number in range(1, scans_per_subject + 1)]
        else:
            references = item.keys() & REFERENCES
            rule = f"{datalist}: every item needs 'image' and 'label' or another reference"
            refuse_if("image" not in item or not references, rule, sorted(item))
            for path in [item[key] for key in ("image", *sorted(references - {"age"}))]:
                refuse_if(not Path(path).is_file(), f"{path}: named in {datalist}", "no such file", FileNotFoundError)
            scans = [str(item.get("name") or scan_stem(item["image"]))]
        for scan, (condition, settings) in product(scans, conditions.items()):
            case = {"scan": scan, "seed": seed + zlib.crc32(scan.encode()), "settings": dict(settings)}
            cases.append(item | case | {"name": f"{scan}_{condition}" if settings else scan, "condition": condition})
    repeated = find_repeated(case["name"] for case in cases)
    rule = f"{datalist}: items whose names, with those of the conditions, differ are needed"
    refuse_if(repeated or not cases, rule, f"twice: {repeated}" if repeated else "none")
    return cases


class LoadReferences(Transform):
    """Read the references of a real scan into entries ``target_<task>``, shape (C, H, W, D).

    A label map becomes FreeSurfer ids, by its ``label_protocol`` where it has one. T1w, T2w and FLAIR are resampled
    once to the grid of ``image`` (RAS axes, 1 mm), the others stay in their own; ``target_valid_<task>`` is 1 where
    they reach. Without a label map, ``head`` is the mask of the head, of the scan before a condition changes it.
    """

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Replace the paths."""
        d = dict(data)
        for key in [key for key in REFERENCES if key in d]:
            task, value = REFERENCES[key], d.pop(key)
            if task in MAGNITUDES:
                grid: MetaTensor = d["image"]
                values, own = read_scan(Path(value))
                box: Any = np.asarray(grid.affine, dtype=np.float64), tuple(grid.shape[1:])
                moved, seen = (resample_to_box(one, own, *box) for one in (values, np.ones_like(values)))
                for name, one in ((task, moved), (f"valid_{task}", seen > 0.5)):
                    d[TARGET + name] = MetaTensor(torch.from_numpy(one)[None].float(), affine=grid.affine)
            elif TASKS[task].kind == "scalar":
                d[TARGET + task] = torch.tensor([float(value)])
            else:
                volume = read_maps(value)
                maps, affine = torch.from_numpy(volume.values.astype(np.float32)), torch.from_numpy(volume.affine)
                d[TARGET + task] = MetaTensor(maps, affine=affine)
                d[f"{TARGET}valid_{task}"] = MetaTensor(torch.ones_like(maps[:1]), affine=affine)
        labels = d.get(f"{TARGET}segmentation")
        if labels is None:
            d[HEAD] = d["image"] > FOREGROUND
        elif d.get("label_protocol"):
            ids = to_freesurfer_ids(labels, Protocol.load(str(d["label_protocol"])))
            d[f"{TARGET}segmentation"] = MetaTensor(ids, affine=labels.affine)
        return d


class MeasureMaps(Transform):
    """Measure every task of a layout that has a prediction and a reference; the last step of the postprocessing.

    It adds ``rows`` (the measures) and ``dice`` (of the structures of ``dice.tsv``). Labels are compared in the scan's
    grid, or, by ``comparison_grid``, in the network's, as other maps are. For the tables of structures see
    :func:`~brainfm_monai.metrics.segmentation.parse_structures`. Another grid or a wrong table is a ValueError.
    """

    def __init__(
        self, layout: TaskLayout, structures: Mapping[str, Any], dice_structures: Mapping[str, Any] | None = None,
        comparison_grid: str = "scan",
    ) -> None:  # fmt: skip
        rule = f"comparison_grid: one of {', '.join(GRIDS)} is needed"
        refuse_if(comparison_grid not in GRIDS, rule, f"'{comparison_grid}'")
        self.layout, self.compared_entry = layout, GRIDS[comparison_grid]
        self.structures, self.dice_structures = parse_structures(structures), parse_structures(dice_structures or {})

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Add the measures of one case, whose maps are those of :class:`~brainfm_monai.transforms.SplitTasksd`."""
        d, protocol = dict(data), self.layout.protocol
        image: MetaTensor = d["image"]
        targets = {str(key).removeprefix(TARGET): d[key] for key in d if str(key).startswith(TARGET)}
        maps = {name: d[task.entry].as_tensor() for name, task in self.layout.tasks.items() if task.entry in d}
        labels = maps.pop("segmentation", None)
        ids = None if labels is None else to_freesurfer_ids(labels, protocol)
        scene = Scene(self.structures, image.affine, str(d["scan"]), str(d["condition"]), labels=ids)
        d["rows"] = []
        if ids is not None and "segmentation" in targets:
            compared: MetaTensor = d[self.compared_entry]
            pair = to_freesurfer_ids(compared, protocol), _match(targets["segmentation"], compared, "nearest")
            pred, true = ({"segmentation": one} for one in pair)
            d["rows"] = measure_scan(pred, true, replace(scene, affine=compared.affine))
            if "entropy" in d:
                d["rows"] += measure_entropy(ids, d["entropy"].as_tensor(), scene)
            if self.dice_structures:
                d["dice"] = compute_structure_measures(*pair, self.dice_structures, compared.affine)["dice"]
        head = None if "segmentation" in targets else _match(d[HEAD], image, "nearest") > 0
        scene = replace(scene, image=image.as_tensor(), mask=head)
        d["rows"] += measure_scan(maps, _move_to_grid(targets, image, ids), scene)
        return d


def _match(source: MetaTensor, grid: MetaTensor, mode: str) -> Tensor:
    return resample(source.to(grid.device), grid.shape[1:], np.asarray(grid.affine), mode, "zeros").as_tensor()


def _move_to_grid(targets: Mapping[str, MetaTensor], grid: MetaTensor, ids: Tensor | None) -> dict[str, Tensor]:
    """References in the network's grid and in the units of the maps; ``ids`` are the predicted labels."""
    dense: dict[str, Tensor] = {}
    for name, target in targets.items():
        is_exact = name not in TASKS or TASKS[name].kind in ("labels", "mask")  # as visible and valid_<task> are
        dense[name] = target if target.ndim == 1 else _match(target, grid, "nearest" if is_exact else "bilinear")
    if "log_bias_field" in dense:
        dense["log_bias_field"] = dense["log_bias_field"].exp()
    ids = dense.get("segmentation", ids)
    known = None if ids is None else ids[0].cpu().numpy()
    for name in [name for name in MAGNITUDES if name in dense]:  # to the training's unit
        scaled = scale_contrast(dense[name][0].cpu().numpy(), name, known)
        dense[name] = torch.from_numpy(scaled)[None].to(grid.device)
    return dense
