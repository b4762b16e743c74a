"""The folder of a scan: it appears when all of its files are whole, and a marker, written last, says so."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from monai.data import MetaTensor
from torch import Tensor

from brainfm_monai.io import fingerprint, write_table
from brainfm_monai.outputs.quality import collect_warnings
from brainfm_monai.outputs.result import RunSettings, ScanResult
from brainfm_monai.tasks import TaskLayout

__all__ = ["FINISHED", "PARTIAL_FOLDER", "ScanWriter", "describe_run"]

logger = logging.getLogger(__name__)

PARTIAL_FOLDER = ".partial"  # where the files of a scan are gathered until all are whole
FAILED_FOLDER = ".failed"  # why scans failed, until they are done
FINISHED = "finished.json"  # the marker: end of its name
NOT_MAPS = ("image", "label", "pred", "soft_volumes")
BIDS_VERSION = "1.10.0"


def describe_run(
    weights: str | Path, layout: TaskLayout, model: str = "BrainFM", depends: Sequence[Any] = (), **choices: Any
) -> RunSettings:
    """Settings of a run, with the hash of its weights and of its configuration.

    Args:
        weights: file of the weights.
        layout: tasks and protocol.
        model: name of the model.
        depends: the objects of the config that results depend on (network, transforms, inferer, ...), as they were built from the
            resolved config; see :func:`~brainfm_monai.io.fingerprint`.
        choices: ``mode``, ``grid``, ``keep_lesions``, ``sharpen``: see :class:`RunSettings`.
    """
    path = Path(weights)
    digest = ""
    if path.is_file():
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    version = metadata.version("brainfm-monai")
    return RunSettings(
        model, version, path.name, digest, layout.protocol.name, configuration=fingerprint(layout, *depends), **choices
    )


class ScanWriter:
    """Writes the files of every scan, and knows which scans are finished.

    The files are gathered in ``output_dir/.partial/<scan>`` and then moved to ``output_dir/<folder of the scan>``, each of them
    whole, with the marker ``<scan>_finished.json`` last. A run that was interrupted, by whatever means, leaves no marker, and the
    scan is done again by the next one.

    Args:
        output_dir: folder of all results.
        layout: tasks and label protocol.
        writers: functions of a :class:`ScanResult` by the names of the outputs, called in order.
        settings: what is used; a scan that was finished with other settings is done again.
    """

    def __init__(
        self,
        output_dir: str | Path,
        layout: TaskLayout,
        writers: Mapping[str, Callable[[ScanResult], object]],
        settings: RunSettings | None = None,
    ) -> None:
        self.output_dir = Path(output_dir)
        self.layout = layout
        self.writers = dict(writers)
        self.settings = settings or RunSettings(protocol=layout.protocol.name)

    def folder_of(self, scan: Mapping[str, Any]) -> Path:
        """Where the files of a scan belong: ``folder`` of its entry, or its name."""
        return self.output_dir / str(scan.get("folder") or scan["name"])

    def read_marker(self, scan: Mapping[str, Any]) -> dict[str, Any] | None:
        """What the marker of a finished scan says; None where there is none."""
        path = self.folder_of(scan) / f"{scan['name']}_{FINISHED}"
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return content

    def is_finished(self, scan: Mapping[str, Any]) -> bool:
        """Whether a scan was done with these settings, has at least these outputs, and its file is the same as then."""
        marker = self.read_marker(scan)
        return (
            marker is not None
            and marker.get("settings") == asdict(self.settings)
            and marker.get("source") == _identify(scan)
            and set(self.writers) <= set(marker.get("outputs", ()))
        )

    def write(self, item: Mapping[str, Any], scan: Mapping[str, Any]) -> Path:
        """Write all files of a scan.

        Args:
            item: maps of the scan after the postprocessing: ``image``, ``pred`` in the scan's grid, the others in the network's.
            scan: its entry in the list of scans.

        Returns:
            The folder of the files.
        """
        begun = time.monotonic()
        partial = self.output_dir / PARTIAL_FOLDER / str(scan["name"])
        shutil.rmtree(partial, ignore_errors=True)  # of an interrupted run
        partial.mkdir(parents=True)
        try:
            result = self._result(item, scan, partial)
            result.warnings.extend(collect_warnings(result))
            for write in self.writers.values():
                write(result)
            for warning in result.warnings:
                logger.warning("%s: %s", result.name, warning)
            self._mark(result, scan, time.monotonic() - begun)
            folder = self._publish(result, scan)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            _remove_if_empty(partial.parent)
        self.forget_failure(scan)
        return folder

    def note_failure(self, scan: Mapping[str, Any], message: str) -> None:
        """Keep the reason why a scan failed, for the table over all scans."""
        note = self._failure_note(scan)
        note.parent.mkdir(parents=True, exist_ok=True)
        note.write_text(message + "\n", encoding="utf-8")

    def forget_failure(self, scan: Mapping[str, Any]) -> None:
        """Remove the note of a scan that failed earlier."""
        self._failure_note(scan).unlink(missing_ok=True)
        _remove_if_empty(self.output_dir / FAILED_FOLDER)

    def read_failure(self, scan: Mapping[str, Any]) -> str:
        """Why a scan failed; empty if it did not."""
        note = self._failure_note(scan)
        return note.read_text(encoding="utf-8").strip() if note.is_file() else ""

    def write_summary(self, scans: Sequence[Mapping[str, Any]]) -> Path:
        """Write ``summary.tsv``: one row per scan with its status, warnings, volumes and other numbers.

        It is made of the markers of all scans, so that of several processes the one that ends last writes the whole table.
        """
        rows = [self._row(scan) for scan in scans]
        columns = list(dict.fromkeys(key for row in rows for key in row))
        self.output_dir.mkdir(parents=True, exist_ok=True)
        path = self.output_dir / "summary.tsv"
        write_table(path, columns, [[row.get(column, "n/a") for column in columns] for row in rows])
        self._describe_dataset()
        return path

    def _row(self, scan: Mapping[str, Any]) -> dict[str, Any]:
        row: dict[str, Any] = {"scan": scan["name"], "image": scan["image"]}
        failure = self.read_failure(scan)
        if failure:
            return row | {"status": "failed", "message": failure}
        marker = self.read_marker(scan)
        if marker is None:
            return row | {"status": "missing", "message": ""}
        return row | {"status": "done", "message": "; ".join(marker["warnings"]), **marker["summary"]}

    def _failure_note(self, scan: Mapping[str, Any]) -> Path:
        return self.output_dir / FAILED_FOLDER / f"{scan['name']}.txt"

    def _result(self, item: Mapping[str, Any], scan: Mapping[str, Any], folder: Path) -> ScanResult:
        image: MetaTensor = item["image"]
        maps = {key: value for key, value in item.items() if isinstance(value, MetaTensor) and key not in NOT_MAPS}
        labels = maps["segmentation"] if self.settings.grid == "1mm" else item["pred"]
        soft = item.get("soft_volumes")
        frame = image.meta.get("frame")
        return ScanResult(
            name=str(scan["name"]),
            source=Path(str(scan["image"])),
            folder=folder,
            layout=self.layout,
            labels=np.asarray(labels[0].cpu(), dtype=np.uint8),
            affine=np.asarray(labels.affine, dtype=np.float64),
            maps=maps,
            soft_volumes_mm3=soft.cpu().numpy() if isinstance(soft, Tensor) else None,
            frame=int(str(frame)) if str(frame).isdigit() else frame,
            window=str(image.meta.get("window") or ""),
            lesions=str(scan.get("lesions") or ""),
            settings=self.settings,
        )

    def _mark(self, result: ScanResult, scan: Mapping[str, Any], seconds: float) -> None:
        files = sorted(file.name for file in result.folder.iterdir())
        content = {
            "outputs": list(self.writers),
            "settings": asdict(self.settings),
            "source": _identify(scan),
            "files": files,
            "warnings": result.warnings,
            "summary": {"warnings": len(result.warnings), **result.summary},
            "seconds_to_write": round(seconds, 1),
        }
        result.path(FINISHED).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def _publish(self, result: ScanResult, scan: Mapping[str, Any]) -> Path:
        final = self.folder_of(scan)
        final.parent.mkdir(parents=True, exist_ok=True)
        marker = result.path(FINISHED)
        if final.exists():
            earlier = self.read_marker(scan)
            (final / marker.name).unlink(missing_ok=True)
            new = [file for file in sorted(result.folder.iterdir()) if file != marker]
            for name in set(earlier["files"] if earlier else ()) - {file.name for file in new}:
                (final / name).unlink(missing_ok=True)
            for file in new:
                file.replace(final / file.name)
            marker.replace(final / marker.name)
        else:
            result.folder.replace(final)
        return final

    def _describe_dataset(self) -> None:
        path = self.output_dir / "dataset_description.json"
        if not path.exists():
            generated = [{"Name": "brainfm-monai", "Version": self.settings.version}]
            content = {
                "Name": "BrainFM maps",
                "BIDSVersion": BIDS_VERSION,
                "DatasetType": "derivative",
                "GeneratedBy": generated,
            }
            path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _identify(scan: Mapping[str, Any]) -> list[Any]:
    """Path and time of change of a scan: what is to be the same for a result to be kept."""
    path = Path(str(scan["image"]))
    changed = path.stat().st_mtime_ns if path.exists() else 0
    return [str(path.resolve()), changed, scan.get("frame"), scan.get("lesions")]


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:  # not there, or another process works in it
        return
