"""The folder of a scan: it appears when all of its files are whole, and a marker, written last, says so."""

import json
import logging
import os
import platform
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from threadpoolctl import threadpool_limits
from torch import Tensor

from brainfm_monai.io import ABSENT, Scan, hold_beside, locked, printable, read_table, write_table, write_text
from brainfm_monai.outputs.quality import collect_warnings
from brainfm_monai.outputs.result import AHEAD, SHOWN, RunSettings, ScanResult, Writer, as_json
from brainfm_monai.tasks import TaskLayout

logger = logging.getLogger(__name__)

PARTIAL_FOLDER = ".partial"  # where the files of a scan are gathered until all are whole
FAILED_FOLDER = ".failed"  # why scans failed, until they are done
FINISHED = "finished.json"  # the marker: end of its name
UNFINISHED = "unfinished.json"  # there while the files of a scan are moved to their place
WRITTEN_AT_ONCE = 2  # outputs of a scan: each has copies of maps
LONGEST = ("transforms", "view")  # outputs that begin before others: short ones at the end keep both threads busy
NOT_MAPS = ("image", "label", "original", "pred", "soft_volumes")
DATASET = {"Name": "brainfm-monai maps", "BIDSVersion": "1.10.0", "DatasetType": "derivative"}
HOST = re.sub(r"[^A-Za-z0-9]", "_", platform.node())

Entry = Mapping[str, Any]  # of the list of scans


class ScanWriter:
    """Writes the files of every scan, and knows which scans are finished.

    The files are gathered in a folder of their own in ``output_dir/.partial`` and then moved to ``output_dir/<folder of
    the scan>``, each of them whole, with the marker ``<scan>_finished.json`` last. A run that was interrupted, by
    whatever means, leaves no marker that says so, and the scan is done again by the next run. Several processes may
    write to one folder.

    Args:
        output_dir: folder of all results.
        layout: tasks and label protocol.
        writers: functions of a :class:`ScanResult` by the names of the outputs, in the order of warnings and columns.
        settings: what is used; a scan that was finished with other settings is done again.
        overwrite: whether results of another scan, and files of the user's, may be replaced.
    """

    def __init__(
        self, output_dir: str | Path, layout: TaskLayout, writers: Mapping[str, Writer],
        settings: RunSettings | None = None, overwrite: bool = False,
    ) -> None:  # fmt: skip
        self.output_dir, self.layout, self.writers, self.overwrite = Path(output_dir), layout, dict(writers), overwrite
        self.settings = settings or RunSettings(protocol=layout.protocol.name)

    def _marker(self, scan: Entry, ending: str = FINISHED) -> Path:
        return self.output_dir / Scan.of(scan).results / f"{scan['name']}_{ending}"

    def _read_marker(self, scan: Entry, ending: str = FINISHED) -> dict[str, Any]:
        """What the marker of a scan says; empty where there is none."""
        path = self._marker(scan, ending)
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) and isinstance(content.get("source"), dict) else {}

    def is_finished(self, scan: Entry) -> bool:
        """Whether a scan was done with these settings, has at least these outputs, and its file is the same as then."""
        marker, entry = self._read_marker(scan), Scan.of(scan)
        if marker.get("settings") != asdict(self.settings) or not set(self.writers) <= set(marker.get("outputs", ())):
            return False
        source, identity = marker["source"], entry.identify()
        if all(identity[key] == source[key] for key in ("part", "path", "changed_ns")):
            return True
        is_there = identity["part"] == source["part"] and entry.path and Path(entry.path).exists()
        return bool(is_there) and entry.hash_content() == source["sha256"]  # the same content, wherever it lies now

    def check_place(self, scan: Entry) -> None:
        """FileExistsError of one line if results of another scan are in a scan's place, and may not be replaced."""
        marker, entry = self._read_marker(scan) or self._read_marker(scan, UNFINISHED), Scan.of(scan)
        if not marker or self.overwrite:
            return
        source, identity = marker["source"], entry.identify()
        is_part = source["part"] != identity["part"]  # another frame or series
        if is_part or (source["path"] != identity["path"] and source["sha256"] != entry.hash_content()):
            rule = f"{printable(entry.path)}: {self.output_dir / entry.results} must hold results of this scan or none"
            part = " with frame {!r} and series {!r}".format(*source["part"]) if is_part else ""
            choices = "give this one another name or folder, or pass --overwrite to replace them"
            found = f"those of another scan, {printable(str(source['path']))}{part}"
            raise FileExistsError(f"{rule}, found {found}: {choices}")

    def write(self, item: Mapping[str, Any], scan: Entry) -> Path:
        """Write all files of a scan, and return their folder; errors are those of :meth:`check_place`.

        The item has the maps after the postprocessing: ``image``, ``pred`` in the scan's grid, the others in the
        network's. A file of the user's that has the name of a result is a FileExistsError, too.
        """
        try:
            with ExitStack() as held:
                with locked(self.output_dir):  # meanwhile no other process removes what is made and not held yet
                    partial = held.enter_context(hold_beside(self.output_dir / PARTIAL_FOLDER / HOST, folder=True))
                result = self.collect(item, scan, partial)
                _run(self.writers, result)
                for warning in result.warnings:
                    logger.warning("%s: %s", result.name, warning)
                with locked(self.output_dir):
                    folder = self._publish(result, scan)
        finally:
            self._remove_if_empty(PARTIAL_FOLDER)
        self.note_failure(scan)
        return folder

    def collect(self, item: Mapping[str, Any], scan: Entry, folder: Path) -> ScanResult:
        """What is known about a scan, by the item of :meth:`write`, whose files would be written into a folder."""
        meta, soft = item["image"].meta, item.get("soft_volumes")
        maps = {key: value for key, value in item.items() if isinstance(value, MetaTensor) and key not in NOT_MAPS}
        labels = maps["segmentation"] if self.settings.grid == "1mm" else item["pred"]
        modality = str(meta.get("modality") or "")
        return ScanResult(
            str(scan["name"]), Path(printable(scan["image"])), folder, self.layout,
            np.asarray(labels[0].cpu(), dtype=np.uint8), np.asarray(labels.affine, dtype=np.float64), maps,
            soft_volumes_mm3=soft.cpu().numpy() if isinstance(soft, Tensor) else None,
            frame=meta.get("frame"), window=str(meta.get("window") or ""),
            settings=self.settings, original=item.get("original"), normalised=item["image"],
            warnings=[line for line in str(meta.get("warnings") or "").split("\n") if line],
            modality=modality, summary={"modality": modality} if modality else {}, outputs=self.writers.keys(),
        )  # fmt: skip

    def _publish(self, result: ScanResult, scan: Entry) -> Path:
        """Move the files to their place; meanwhile a second marker stands for the first one and names all files."""
        self.check_place(scan)
        entry, new = Scan.of(scan), sorted(file.name for file in result.folder.iterdir())
        source = {**entry.identify(), "sha256": entry.hash_content()}
        finished, unfinished = self._marker(scan), self._marker(scan, UNFINISHED)
        final, markers = finished.parent, [self._read_marker(scan, ending) for ending in (FINISHED, UNFINISHED)]
        earlier = {name for marker in markers for name in marker.get("files", ())}
        for file in () if self.overwrite else sorted({*new} - earlier):
            if os.path.lexists(final / file):
                rule = "no file of this name must be there, found one that is no result"
                raise FileExistsError(f"{final / file}: {rule}")
        if finished.exists():
            finished.replace(unfinished)  # a process that dies leaves one marker, never both
        write_text(unfinished, json.dumps({"source": source, "files": sorted({*earlier, *new})}))
        for file in earlier - set(new):
            (final / file).unlink(missing_ok=True)
        for file in new:
            (result.folder / file).replace(final / file)
        summary = {"warnings": len(result.warnings), **result.summary}
        content = {"outputs": list(self.writers), "settings": asdict(self.settings), "source": source, "files": new}
        write_text(unfinished, as_json({**content, "warnings": result.warnings, "summary": summary}))
        unfinished.replace(finished)
        return final

    def _remove_if_empty(self, name: str) -> None:
        with locked(self.output_dir), suppress(OSError):  # not there, or another process works in it
            (self.output_dir / name).rmdir()

    def _failure_note(self, scan: Entry) -> Path:
        return self.output_dir / FAILED_FOLDER / f"{Scan.of(scan).name}.txt"

    def note_failure(self, scan: Entry, message: str = "") -> None:
        """Keep the reason why a scan failed, for the table over all scans; without one, remove an earlier note."""
        if message:
            write_text(self._failure_note(scan), message + "\n")
        else:
            self._failure_note(scan).unlink(missing_ok=True)
            self._remove_if_empty(FAILED_FOLDER)

    def read_failure(self, scan: Entry) -> str:
        """Why a scan failed; empty if it did not."""
        note = self._failure_note(scan)
        return note.read_text(encoding="utf-8").strip() if note.is_file() else ""

    def write_summary(self, scans: Sequence[Entry]) -> Path:
        """Write ``summary.tsv``: one row per scan with its status, warnings, volumes and other numbers.

        It is made of the markers of all scans, so that of several processes the one that ends last writes the whole
        table. Rows of an earlier table whose results are still there stay; entries with ``skipped`` are listed.
        """
        path, dataset = self.output_dir / "summary.tsv", self.output_dir / "dataset_description.json"
        with locked(self.output_dir):
            rows = [self._row(scan) for scan in scans]
            names = {row["scan"] for row in rows if row["status"] != "skipped"}
            rows += [row for row in self._earlier_rows(path) if row["scan"] not in names]
            columns = list(dict.fromkeys(key for row in rows for key in row))
            write_table(path, columns, [[row.get(column, ABSENT) for column in columns] for row in rows])
            if not dataset.exists():
                generated = [{"Name": "brainfm-monai", "Version": self.settings.version}]
                write_text(dataset, as_json({**DATASET, "GeneratedBy": generated}))
        return path

    def _row(self, scan: Entry) -> dict[str, Any]:
        row: dict[str, Any] = {"scan": scan["name"], "image": printable(scan["image"])}
        if scan.get("skipped"):
            return row | {"status": "skipped", "message": scan["skipped"]}
        failure, marker, folder = self.read_failure(scan), self._read_marker(scan), Scan.of(scan).results
        if failure or not marker:
            return row | {"status": "failed" if failure else "missing", "message": failure, "folder": folder}
        message = "; ".join(marker["warnings"])
        return row | {"status": "done", "message": message, "folder": folder} | marker["summary"]

    def _earlier_rows(self, path: Path) -> list[dict[str, str]]:
        try:
            done = [row for row in read_table(path) if row.get("status") == "done"]
        except (OSError, ValueError):  # none, or a table of something else
            return []
        return [row for row in done if (self.output_dir / row["folder"] / f"{row['scan']}_{FINISHED}").is_file()]


def _run(writers: Mapping[str, Writer], result: ScanResult) -> None:
    """Write the files of all outputs: parts that are begun ahead first, those of :data:`SHOWN` last.

    What is found does not depend on which output ends first: each has warnings and a summary of its own, which are
    joined in the order of the outputs. Of several errors, that of the first output is raised.
    """
    beside: dict[str, Writer] = {"": lambda part: part.warnings.extend(collect_warnings(part))}
    beside |= {name: write for name, write in writers.items() if write not in SHOWN}
    parts = {name: replace(result, summary={}, warnings=[]) for name in beside}
    threads = torch.get_num_threads()
    share = max(threads // WRITTEN_AT_ONCE, 1)  # of the processors: teams of threads in each other's way cost time
    pool = ThreadPoolExecutor(WRITTEN_AT_ONCE, "output", torch.set_num_threads, (share,))
    with threadpool_limits(1, "blas"), pool:  # its threads wait in a loop for the next product: a third of all CPU time
        ahead = [pool.submit(part, result) for write in writers.values() for part in AHEAD.get(write, ())]
        order = sorted(beside, key=lambda name: name not in LONGEST)
        jobs = {name: pool.submit(beside[name], parts[name]) for name in order}
        try:
            for job in [*(jobs[name] for name in beside), *ahead]:
                job.result()
        finally:
            pool.shutdown(cancel_futures=True)  # after an error nothing else begins
            torch.set_num_threads(threads)  # threads that begin later would have the share, too
    for part in parts.values():
        result.summary.update(part.summary)
        result.warnings.extend(part.warnings)
    for write in (write for write in writers.values() if write in SHOWN):
        write(result)
