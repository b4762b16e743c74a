"""From scans to finished folders: which outputs, which share of the list, scan after scan, or one image in Python."""

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd
import torch
from monai.bundle import ConfigWorkflow
from monai.data import MetaTensor

from brainfm_monai import outputs, report
from brainfm_monai.io import ScanError, bundle_arguments, fingerprint, literal, refuse_if
from brainfm_monai.outputs import cortex, maps, quality, template
from brainfm_monai.outputs.atlas import load_atlas, write_atlas
from brainfm_monai.outputs.result import Writer
from brainfm_monai.prediction import loop
from brainfm_monai.prediction.loop import ScanDataset, ScanLoader, WriteScans, local_device, predict_scans, share_of
from brainfm_monai.tasks import TASKS, TaskLayout

VIEW_HEIGHT = 640  # of a notebook's cell, in pixels
# In the order of their warnings and of the summary's columns; ``Task.outputs`` says which tasks an output needs.
OUTPUTS: dict[str, Writer] = {
    "segmentation": maps.write_segmentation,
    "volumes": maps.write_volumes,
    "contrasts": maps.write_synthetic_images,
    "bias_field": maps.write_bias_field,
    "distance": cortex.write_distances,
    "surfaces": cortex.write_surfaces,
    "mni": template.write_coordinates,
    "transforms": template.write_transforms,
    "lesion": maps.write_lesions,
    "age": maps.write_age,
    "embedding": maps.write_embedding,
    "uncertainty": maps.write_uncertainty,
    "quality": quality.write_quality,
    "view": report.write_view,
    "report": report.write_report,
}


def select_outputs(
    outputs: str | Sequence[str], layout: TaskLayout, atlas: str | Path | None = None
) -> dict[str, Writer]:
    """The functions that write ``"all"`` outputs that the tasks allow, or those of some names, separated by commas.

    For the atlas see :func:`~brainfm_monai.outputs.atlas.load_atlas`. ValueError if there is no such output, or the
    network does not predict what it is made of; ScanError for an unreadable atlas.
    """
    names = [name.strip() for name in outputs.split(",")] if isinstance(outputs, str) else list(outputs)
    possible = [name for name in OUTPUTS if any(name in task.outputs for task in layout.tasks.values())]
    wanted = possible if names == ["all"] else names
    rule, unknown = f"outputs: 'all' or names out of {', '.join(OUTPUTS)} are needed", set(wanted) - set(OUTPUTS)
    refuse_if(unknown or not wanted, rule, ", ".join(sorted(unknown)) or "none")
    for name in wanted:
        needs = " or ".join(task.name for task in TASKS.values() if name in task.outputs) or "scales of error"
        rule, found = f"outputs: '{name}' needs a network that predicts {needs}", f"one for {', '.join(layout.tasks)}"
        refuse_if(name not in possible, rule, found)
    selected = {name: write for name, write in OUTPUTS.items() if name in wanted}
    if not atlas:
        return selected
    regions = load_atlas(atlas)
    # the name holds the content: results of another atlas are not those of this one
    return {**selected, f"atlas {regions.name} {fingerprint(regions)[:12]}": partial(write_atlas, atlas=regions)}


class Prediction(dict[str, Any]):
    """What was predicted for one scan, by name; a notebook shows the scan with its labels.

    In the grid of the scan, or with ``grid="1mm"`` of the network, as MetaTensors of shape (C, H, W, D) with its
    affine: ``segmentation`` (uint8 labels), ``entropy``, every other task of the network by its name, ``bias_field``
    for ``log_bias_field``, and ``boundaries`` of :class:`~brainfm_monai.transforms.FindBoundariesd`. Beside them
    ``volumes_mm3`` (soft) and ``hard_volumes_mm3`` by the name of the structure, ``affine_to_template`` (RAS points,
    shape (4, 4); None without MNI coordinates or brain), ``warnings`` and ``layout``. The attribute ``scan`` is the
    scan with its maps in the network's grid, which the functions of ``outputs`` and ``report`` take.
    """

    def __init__(self, scan: outputs.ScanResult, **entries: Any) -> None:
        super().__init__(entries)
        self.scan = scan

    @property
    def table(self) -> pd.DataFrame:
        """A row for each structure: label, name, FreeSurfer id, side, soft and hard volume in mm^3, expected Dice."""
        structures = self["layout"].protocol.structures[1:]
        rows = [(s.label, s.name, s.freesurfer_id, s.side) for s in structures]
        table = pd.DataFrame(rows, columns=["label", "name", "freesurfer_id", "side"])
        soft, hard = (table["name"].map(self[key]).round(1) for key in ("volumes_mm3", "hard_volumes_mm3"))
        dice = table["label"].map(outputs.expect_dice(self.scan)).round(2)
        return table.assign(soft_mm3=soft, hard_mm3=hard, expected_dice=dice).set_index("label")

    def _repr_html_(self) -> str:
        """The interactive view, if NiiVue is installed, or the scan's page, in a frame; warnings and volumes below."""
        script = report.find_niivue()
        page = report.compose_view(self.scan, script) if script else report.compose_page(self.scan)
        frame = f'<iframe srcdoc="{escape(page)}" style="width:100%;height:{VIEW_HEIGHT}px;border:0"></iframe>'
        warnings = "".join(f"<p><b>Warning:</b> {escape(warning)}</p>" for warning in self["warnings"])
        return f"{frame}{warnings}<details><summary>Volumes</summary>{self.table.to_html()}</details>"


def predict(image: Any, bundle: str | Path = "bundle", **overrides: Any) -> Prediction:
    """Predict every map of one scan: maps, volumes and warnings by name, see :class:`Prediction`.

    ScanError if the scan cannot be used, FileNotFoundError without a bundle, ValueError if settings do not fit.

    Args:
        image: path of a scan (anything that the command takes as one), nibabel image, or MetaTensor (1, H, W, D).
        bundle: folder of the bundle.
        overrides: values of configs/inference.json, as in ``mode="brain"``, ``device=torch.device("cpu")``.
    """
    arguments = bundle_arguments(bundle, ["inference.json"])
    with TemporaryDirectory() as folder:
        path = _as_file(image, Path(folder))
        arguments |= {"logging_file": False, "handlers": []}  # the handler of the config writes files
        arguments |= {"scans": [{"image": literal(str(path)), "name": "scan"}], **overrides}
        workflow = ConfigWorkflow(workflow_type="inference", **arguments)
        try:
            workflow.initialize()
            evaluator, writer = map(workflow.parser.get_parsed_content, ("evaluator", "writer"))
            evaluator.logger, evaluator.state.epoch_length = loop.engine_logger, 1  # else ignite forgets the batch
            evaluator.run()
        except SystemExit as end:  # the config reports wrong weights so
            raise ValueError(str(end)) from end
        except RuntimeError as error:  # MONAI's way of reporting that a transform failed
            raise (error.__cause__ if isinstance(error.__cause__, ScanError) else error) from None
        return _describe(writer.collect(loop.maps_of(evaluator), {"name": "scan", "image": path}, path.parent))


def _as_file(image: Any, folder: Path) -> Path:
    """The scan as a file; an image in memory is written, so that it takes the same way as any other."""
    if isinstance(image, str | Path):
        return Path(image)
    if isinstance(image, MetaTensor):
        values = image.as_tensor().detach().cpu()
        is_wrong, found = values.ndim != 4 or len(values) != 1 or values.is_complex(), tuple(values.shape)
        rule = "image: real numbers of shape (1, H, W, D) are needed"
        refuse_if(is_wrong, rule, f"{values.dtype} of {found}", ScanError)
        image = nib.Nifti1Image(values.float().numpy()[0], np.asarray(image.affine, dtype=np.float64))
    path = folder / "scan.nii"
    nib.save(image, path)
    return path


def _describe(scan: outputs.ScanResult) -> Prediction:
    """The maps of a scan in the grid of its labels, volumes, and what else :func:`predict` returns."""
    affine, hard, matrix = torch.from_numpy(scan.affine), outputs.hard_volumes_mm3(scan), None
    soft = hard if scan.soft_volumes_mm3 is None else scan.soft_volumes_mm3
    names = [s.name for s in scan.layout.protocol.structures[1:]]
    others = {key: one.cpu() for key, one in scan.maps.items() if key != "segmentation"}
    maps = {key: outputs.resample(one, scan.labels.shape, scan.affine) for key, one in others.items()}
    maps["segmentation"] = MetaTensor(torch.from_numpy(scan.labels)[None], affine=affine)
    scan.warnings += outputs.collect_warnings(scan)  # after those of reading
    with suppress(ValueError):  # no brain
        matrix = outputs.fit_scan_to_template(scan).matrix if "mni" in maps else None
    return Prediction(
        scan,
        **maps,
        volumes_mm3=dict(zip(names, soft[1:].tolist(), strict=True)),
        hard_volumes_mm3=dict(zip(names, hard[1:].tolist(), strict=True)),
        affine_to_template=matrix,
        warnings=scan.warnings,
        layout=scan.layout,
    )
