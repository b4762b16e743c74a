"""What an evaluation leaves: the measures of every case as soon as it is done, and tables and a page of all of them."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from brainfm_monai.evaluation.conditions import Condition, find_condition
from brainfm_monai.evaluation.page import Evaluation, write_page
from brainfm_monai.evaluation.processes import is_first_process, wait_for_others
from brainfm_monai.evaluation.tables import MEAN_DICE, write_dice_tables, write_tables
from brainfm_monai.metrics import MetricRow
from brainfm_monai.outputs import RunSettings, ScanResult, ScanWriter
from brainfm_monai.outputs.writer import FAILED_FOLDER
from brainfm_monai.tasks import TaskLayout

__all__ = ["EvaluationWriter"]

logger = logging.getLogger(__name__)

CASES_FOLDER = "cases"  # one JSON file and one picture for each case
PAGE = "evaluation.html"


class EvaluationWriter(ScanWriter):
    """Writes the measures of every case, and knows which cases are measured; in the end the tables and the page of all.

    ``cases/<case>.json`` holds the measures of a case, whole or not at all, and what they depend on: weights, settings, the
    condition, and its files with their times of change. A case that was measured with the same is not measured again.
    The files of the prediction are written as ``predict`` writes them, for scans as they are.

    Args:
        output_dir: folder of all results.
        layout: tasks and label protocol.
        writers: see :class:`~brainfm_monai.outputs.ScanWriter`; none: measures alone.
        conditions: of the cases.
        dice_structures: structures of the tables ``dice.tsv`` and ``dice_summary.tsv``, by name.
        settings: what is used.
        definition: whatever else the measures depend on, by name: structures, laws of the generator.
    """

    def __init__(
        self,
        output_dir: str | Path,
        layout: TaskLayout,
        writers: Mapping[str, Callable[[ScanResult], object]],
        conditions: Sequence[Condition],
        dice_structures: Iterable[str] = (),
        settings: RunSettings | None = None,
        definition: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(output_dir, layout, writers, settings)
        self.conditions, self.dice_structures = tuple(conditions), list(dice_structures)
        self.definition = dict(definition or {})

    def is_finished(self, scan: Mapping[str, Any]) -> bool:
        """Whether a case was measured with the same weights, settings, condition and files."""
        stored = self.read_measures(scan)
        measured = stored is not None and stored.get("key") == self._key(scan)
        return measured and (not self._keeps_files(scan) or super().is_finished(scan))

    def read_measures(self, scan: Mapping[str, Any]) -> dict[str, Any] | None:
        """What is stored of a case; None where it was not measured."""
        try:
            content: dict[str, Any] = json.loads(self._stored(scan).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return content

    def write(self, item: Mapping[str, Any], scan: Mapping[str, Any]) -> Path:
        """Write the measures of a case, after its files.

        Args:
            item: maps after the postprocessing, with what :class:`~brainfm_monai.evaluation.MeasureMaps` adds.
            scan: its entry in the list of cases.

        Returns:
            Where the results are.
        """
        folder = super().write(item, scan) if self._keeps_files(scan) else self.output_dir / CASES_FOLDER
        stored = self._stored(scan)
        stored.parent.mkdir(parents=True, exist_ok=True)
        picture: bytes = item["picture"]
        _write_whole(stored.with_suffix(".webp"), picture)
        dice: Tensor | None = item.get("dice")
        content = {
            "key": self._key(scan),
            "rows": [list(row) for row in item["rows"]],
            "dice": None if dice is None else dice.tolist(),
        }
        _write_whole(stored, json.dumps(content).encode())
        self._forget_failure(scan)
        means = {row.metric: row.value for row in item["rows"] if row.metric == MEAN_DICE}
        logger.info(
            "%s: %s", scan["name"], ", ".join(f"{k.replace('_', ' ')} {v:.3f}" for k, v in means.items()) or "measured"
        )
        return folder

    def write_summary(self, scans: Sequence[Mapping[str, Any]]) -> Path:
        """Write the tables and the page of all cases, when every process has done its share; the first process writes them."""
        wait_for_others()
        if is_first_process():
            self._write_all(scans)
        wait_for_others()
        return self.output_dir / PAGE

    def _write_all(self, scans: Sequence[Mapping[str, Any]]) -> None:
        stored = {str(scan["name"]): self.read_measures(scan) for scan in scans}
        measured = {name: content for name, content in stored.items() if content is not None}
        rows = [MetricRow(*row) for content in measured.values() for row in content["rows"]]
        plain = {c.name for c in self.conditions if not c.settings}
        native = [str(scan["name"]) for scan in scans if scan["condition"] in plain]
        dice = {name: found for name in native if (found := measured.get(name, {}).get("dice")) is not None}
        if dice:
            write_dice_tables(self.output_dir, dice, self.dice_structures)
        summary = write_tables(self.output_dir, rows)
        failures = {
            note.stem: note.read_text(encoding="utf-8").strip()
            for note in self.output_dir.glob(f"{FAILED_FOLDER}/*.txt")
        }
        evaluation = Evaluation(
            output_dir=self.output_dir,
            rows=rows,
            summary=summary,
            conditions=self.conditions,
            cases={
                name: {"scan": str(scan["scan"]), "condition": str(scan["condition"])}
                for scan in scans
                if (name := str(scan["name"])) in measured
            },
            failures={
                str(s["name"]): failures.get(str(s["name"]), "not measured yet")
                for s in scans
                if str(s["name"]) not in measured
            },
            settings=self.settings,
            definition=self.definition,
        )
        write_page(evaluation, self.output_dir / PAGE)

    def _forget_failure(self, scan: Mapping[str, Any]) -> None:
        note = self.output_dir / FAILED_FOLDER / f"{scan['name']}.txt"
        note.unlink(missing_ok=True)
        with suppress(OSError):  # it is not there, or holds other notes
            note.parent.rmdir()

    def _keeps_files(self, scan: Mapping[str, Any]) -> bool:
        """Whether the maps are written, too: of scans that are files, as they are."""
        settings = find_condition(self.conditions, str(scan["condition"])).settings
        return bool(self.writers) and not settings and "image" in scan

    def _stored(self, scan: Mapping[str, Any]) -> Path:
        return self.output_dir / CASES_FOLDER / f"{scan['name']}.json"

    def _key(self, scan: Mapping[str, Any]) -> str:
        """Hash of everything that the measures of a case depend on."""
        condition = find_condition(self.conditions, str(scan["condition"]))
        files = {k: v for k, v in scan.items() if isinstance(v, str | Path) and Path(v).is_file()}
        changed = {k: Path(v).stat().st_mtime_ns for k, v in files.items()}
        depends = [asdict(self.settings), dict(condition.settings), self.definition, dict(scan), changed]
        return hashlib.sha256(json.dumps(depends, sort_keys=True, default=str).encode()).hexdigest()


def _write_whole(path: Path, content: bytes) -> None:
    beside = path.with_name(f".{path.name}.part")
    beside.write_bytes(content)
    beside.replace(path)
