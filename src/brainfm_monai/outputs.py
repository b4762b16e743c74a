"""From the maps of a scan to its files: label maps, tables, and the folder that appears when all of them are whole."""

from __future__ import annotations

import csv
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from ignite.engine import Engine, Events
from monai.data import MetaTensor
from torch import Tensor

from brainfm_monai.anatomy import Protocol
from brainfm_monai.tasks import TaskLayout

__all__ = [
    "PARTIAL_FOLDER",
    "ScanResult",
    "ScanWriter",
    "compute_volumes_mm3",
    "name_by_scan",
    "write_freesurfer_segmentation",
    "write_label_table",
    "write_volumes",
]

logger = logging.getLogger(__name__)

PARTIAL_FOLDER = ".partial"  # where the files of a scan are gathered until all are whole


@dataclass(frozen=True)
class ScanResult:
    """Everything that is known about one scan after the network, in the scan's own grid.

    Attributes:
        name: name of the scan, with which its files begin.
        source: path of the scan.
        folder: where to write.
        layout: tasks and label protocol.
        maps: map of every task, shape (C, H, W, D); ``pred`` is the label map, integer.
        affine: voxel indices to RAS mm, shape (4, 4).
    """

    name: str
    source: Path
    folder: Path
    layout: TaskLayout
    maps: Mapping[str, Tensor]
    affine: np.ndarray

    def path(self, suffix: str) -> Path:
        """Path of the file that ends in ``suffix``."""
        return self.folder / f"{self.name}_{suffix}"

    @property
    def labels(self) -> np.ndarray:
        """Label map, shape (H, W, D), uint8."""
        return np.asarray(self.maps["pred"][0].cpu(), dtype=np.uint8)


def name_by_scan(meta: Mapping[str, Any], _saver: object) -> dict[str, str]:
    """Name the files of :class:`monai.transforms.SaveImage` after the scan's name instead of its path.

    SaveImage drops what it takes for a file's extension; one is added so that a name with a dot in it stays whole.
    """
    return {"subject": f"{meta['scan_name']}.nii.gz"}


def compute_volumes_mm3(labels: np.ndarray, affine: np.ndarray, count: int) -> np.ndarray:
    """Volume of every label: its number of voxels times the volume of a voxel.

    Args:
        labels: label map, any shape, integer in [0, count).
        affine: voxel indices to mm, shape (4, 4).
        count: number of labels.

    Returns:
        Volumes in mm^3, shape (count,).
    """
    voxel_mm3 = abs(np.linalg.det(affine[:3, :3]))
    return np.asarray(np.bincount(labels.reshape(-1), minlength=count) * voxel_mm3)


def write_label_table(scan: ScanResult) -> None:
    """Write the names, ids and colours of the labels: ``_dseg.tsv``, with the columns of a BIDS look-up table."""
    structures = scan.layout.protocol.structures
    rows = [(s.label, s.name, s.freesurfer_id, s.side, "#{:02x}{:02x}{:02x}".format(*s.colour)) for s in structures]
    _write_table(scan.path("dseg.tsv"), ("index", "name", "freesurfer_id", "side", "color"), rows)


def write_volumes(scan: ScanResult) -> None:
    """Write the volume in mm^3 of every structure but the background: ``_volumes.tsv``."""
    protocol: Protocol = scan.layout.protocol
    volumes = compute_volumes_mm3(scan.labels, scan.affine, len(protocol))
    rows = [(s.label, s.name, s.freesurfer_id, s.side, f"{volumes[s.label]:.1f}") for s in protocol.structures[1:]]
    _write_table(scan.path("volumes.tsv"), ("index", "name", "freesurfer_id", "side", "volume_mm3"), rows)


def write_freesurfer_segmentation(scan: ScanResult) -> None:
    """Write the label map with FreeSurfer's ids instead of the protocol's labels: ``_desc-freesurfer_dseg.nii.gz``."""
    ids = scan.layout.protocol.freesurfer_ids.astype(np.int16)[scan.labels]
    nib.save(nib.Nifti1Image(ids, scan.affine), scan.path("desc-freesurfer_dseg.nii.gz"))


def _write_table(path: Path, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)


class ScanWriter:
    """Handler that completes the folder of every scan and makes it appear at once.

    The postprocessing saves its images into ``output_dir/.partial/<scan>``. After the iteration the writers add their
    files there, and then the folder becomes ``output_dir/<scan>``; where that exists, each file replaces the one of the same
    name. If anything fails on the way, the partial folder is removed and nothing appears.

    Args:
        output_dir: folder of all results.
        layout: tasks and label protocol.
        writers: functions of a :class:`ScanResult`, called in order.
    """

    def __init__(self, output_dir: str | Path, layout: TaskLayout, writers: Sequence[Callable[[ScanResult], None]]) -> None:
        self.output_dir = Path(output_dir)
        self.layout = layout
        self.writers = tuple(writers)
        self._names: list[str] = []

    def attach(self, engine: Engine) -> None:
        """Clear away what an interrupted run left, write after each iteration, remove what a failed one left."""
        engine.add_event_handler(Events.ITERATION_STARTED, self._begin)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)
        engine.add_event_handler(Events.EXCEPTION_RAISED, self._give_up)

    def __call__(self, engine: Engine) -> None:
        """Write and publish the scans of one iteration."""
        items: Any = engine.state.output
        for item in items:
            scan = self._result(item)
            scan.folder.mkdir(parents=True, exist_ok=True)
            for write in self.writers:
                write(scan)
            logger.info("%s: results are in %s", scan.name, self._publish(scan))

    def discard(self) -> None:
        """Remove the partial folders of the scans in the batch."""
        for name in self._names:
            shutil.rmtree(self.output_dir / PARTIAL_FOLDER / name, ignore_errors=True)
        self._remove_if_empty()

    def _begin(self, engine: Engine) -> None:
        batch: Any = engine.state.batch
        self._names = [str(name) for name in batch["image"].meta["scan_name"]]
        self.discard()

    def _give_up(self, _engine: Engine, error: BaseException) -> None:
        self.discard()
        raise error

    def _result(self, item: Mapping[str, Any]) -> ScanResult:
        image: MetaTensor = item["image"]
        name = str(image.meta["scan_name"])
        maps = {key: value for key, value in item.items() if isinstance(value, Tensor) and key not in ("image", "label")}
        affine = np.asarray(item["pred"].affine, dtype=np.float64)
        folder = self.output_dir / PARTIAL_FOLDER / name
        return ScanResult(name, Path(str(image.meta["filename_or_obj"])), folder, self.layout, maps, affine)

    def _publish(self, scan: ScanResult) -> Path:
        final = self.output_dir / scan.name
        if final.exists():
            for file in sorted(scan.folder.iterdir()):
                file.replace(final / file.name)
            scan.folder.rmdir()
        else:
            scan.folder.replace(final)
        self._remove_if_empty()
        return final

    def _remove_if_empty(self) -> None:
        partial = self.output_dir / PARTIAL_FOLDER
        if partial.is_dir() and not any(partial.iterdir()):
            partial.rmdir()
