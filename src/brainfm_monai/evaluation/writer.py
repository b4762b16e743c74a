"""What an evaluation leaves: the measures of every case as soon as it is done, and tables and a page of all of them."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import ignite.distributed as idist

from brainfm_monai.evaluation.conditions import Condition
from brainfm_monai.evaluation.pages import compose_page
from brainfm_monai.evaluation.tables import MEAN_DICE, write_dice_tables, write_tables
from brainfm_monai.io import fingerprint, write_text, write_whole
from brainfm_monai.metrics import MetricRow, make_table
from brainfm_monai.outputs import ScanWriter

logger = logging.getLogger(__name__)

CASES_FOLDER = "cases"  # one JSON file and one picture for each case
PAGE = "evaluation.html"
LONGEST_WAIT = timedelta(days=7)  # shares of a list end at very different times

Case = Mapping[str, Any]


class EvaluationWriter:
    """Writes the measures of every case, and knows which cases are measured; in the end the tables and the page of all.

    ``cases/<case>.json`` contains the measures of a case and a hash of what they depend on: the resolved configuration, the
    weights, the condition, and the files with their times of change. A case that was measured with the same is skipped.

    Args:
        files: writes the files of the prediction as ``predict`` does, for scans as they are; it has the folder and the settings.
        conditions: of the cases.
        dice_structures: structures of the tables ``dice.tsv`` and ``dice_summary.tsv``, by name.
        definition: whatever else the page should say about the measures, by name: structures, laws of the generator.
    """

    def __init__(
        self,
        files: ScanWriter,
        conditions: Sequence[Condition],
        dice_structures: Iterable[str] = (),
        definition: Mapping[str, Any] | None = None,
    ) -> None:
        self.files, self.output_dir, self.definition = files, files.output_dir, dict(definition or {})
        self.conditions, self.dice_structures = tuple(conditions), list(dice_structures)
        # see the same methods of ScanWriter
        self.clear, self.note_failure = files.clear, files.note_failure

    def is_finished(self, scan: Case) -> bool:
        """Whether a case was measured with the same configuration, weights, condition and files."""
        measured = self._read_measures(scan).get("key") == self._key(scan)
        return measured and (not self._keeps_files(scan) or self.files.is_finished(scan))

    def check_place(self, scan: Case) -> None:
        """Check that the place of the files of a prediction holds no results of another scan."""
        if self._keeps_files(scan):
            self.files.check_place(scan)

    def write(self, item: Mapping[str, Any], scan: Case) -> Path:
        """Write the measures of a case, after its files.

        Args:
            item: maps after the postprocessing, with what :class:`~brainfm_monai.evaluation.MeasureMaps` adds.
            scan: its entry in the list of cases.

        Returns:
            Where the results are.
        """
        folder = self.files.write(item, scan) if self._keeps_files(scan) else self.output_dir / CASES_FOLDER
        with write_whole(self._stored(scan).with_suffix(".webp")) as partial:
            partial.write_bytes(item["picture"])
        dice = item["dice"].tolist() if "dice" in item else None
        write_text(self._stored(scan), json.dumps({"key": self._key(scan), "rows": item["rows"], "dice": dice}))
        self.files.forget_failure(scan)
        means = [f"mean Dice {row.value:.3f}" for row in item["rows"] if row.metric == MEAN_DICE]
        logger.info("%s: %s", scan["name"], ", ".join(means) or "measured")
        return folder

    def write_summary(self, scans: Sequence[Case]) -> Path:
        """Write the tables and the page of all cases, when every process has done its share; the first process writes them."""
        if int(os.environ.get("WORLD_SIZE", 1)) > 1 and idist.get_world_size() == 1:
            # the results of the shares are in files: the processes do nothing but wait, and gloo serves every device
            idist.initialize("gloo", timeout=LONGEST_WAIT)
        idist.barrier()
        if idist.get_rank() == 0:
            self._write_all(scans)
        idist.barrier()
        return self.output_dir / PAGE

    def _write_all(self, scans: Sequence[Case]) -> None:
        measured = {str(scan["name"]): content for scan in scans if (content := self._read_measures(scan))}
        done = [scan for scan in scans if scan["name"] in measured]
        native = [str(scan["name"]) for scan in done if not scan["settings"]]
        if dice := {name: measured[name]["dice"] for name in native if measured[name]["dice"]}:
            write_dice_tables(self.output_dir, dice, self.dice_structures)
        table = make_table(MetricRow(*row) for content in measured.values() for row in content["rows"])
        page = compose_page(
            self.output_dir,
            table,
            write_tables(self.output_dir, table),
            self.conditions,
            {(str(scan["scan"]), str(scan["condition"])): str(scan["name"]) for scan in done},
            {s["name"]: self.files.read_failure(s) or "not measured yet" for s in scans if s["name"] not in measured},
            self.files.settings,
            self.definition,
        )
        write_text(self.output_dir / PAGE, page)

    def _read_measures(self, scan: Case) -> dict[str, Any]:
        """What is stored of a case; empty where it was not measured."""
        try:
            content: dict[str, Any] = json.loads(self._stored(scan).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return content

    def _keeps_files(self, scan: Case) -> bool:
        """Whether the maps are written, too: of scans that are files, as they are."""
        return bool(self.files.writers) and not scan["settings"] and bool(scan.get("image"))

    def _stored(self, scan: Case) -> Path:
        return self.output_dir / CASES_FOLDER / f"{scan['name']}.json"

    def _key(self, scan: Case) -> str:
        """Hash of everything that the measures of a case depend on."""
        files = {k: Path(v) for k, v in scan.items() if isinstance(v, str) and Path(v).is_file()}
        changed = {key: path.stat().st_mtime_ns for key, path in files.items()}
        return fingerprint(asdict(self.files.settings), dict(scan), changed)
