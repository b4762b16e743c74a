"""What an evaluation leaves: measures of every case, tables and a page of all; and two evaluations compared."""

import json
import logging
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd

import brainfm_monai
from brainfm_monai.evaluation import tables
from brainfm_monai.evaluation.conditions import SETTINGS, Conditions
from brainfm_monai.io import fingerprint, locked, refuse_if, write_text
from brainfm_monai.metrics.scan import MetricRow
from brainfm_monai.metrics.segmentation import SIDES
from brainfm_monai.outputs import ScanWriter
from brainfm_monai.report import render

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.tsv"
CASES_FOLDER = "cases"  # one JSON file for each case
WORST = 8  # scans that are shown

Case = Mapping[str, Any]


class EvaluationWriter:
    """Writes the measures of every case, and knows which are measured; in the end the tables and the page of all.

    ``cases/<case>.json`` has the measures of a case and a hash of what they depend on: configuration, weights,
    condition, and files with their times of change. ``files`` has the folder and the settings, and writes the files of
    scans as they are; ``dice_structures`` name those of ``dice.tsv``; the page shows the ``definition``, too.
    """

    def __init__(
        self, files: ScanWriter, conditions: Conditions, dice_structures: Iterable[str] = (),
        definition: Mapping[str, Any] | None = None,
    ) -> None:  # fmt: skip
        self.files, self.output_dir, self.conditions = files, files.output_dir, conditions
        self.dice_structures, self.definition = list(dice_structures), dict(definition or {})
        self.note_failure = files.note_failure  # what the loop of scans calls, too

    def is_finished(self, scan: Case) -> bool:
        """Whether a case was measured with the same configuration, weights, condition and files."""
        measured = self._read_measures(scan).get("key") == self._key(scan)
        return measured and (not self._keeps_files(scan) or self.files.is_finished(scan))

    def check_place(self, scan: Case) -> None:
        """Check that the place of the files of a prediction holds no results of another scan."""
        if self._keeps_files(scan):
            self.files.check_place(scan)

    def write(self, item: Mapping[str, Any], scan: Case) -> Path:
        """Write files and measures of a case, whose item :class:`MeasureMaps` has measured; returns their folder."""
        folder = self.files.write(item, scan) if self._keeps_files(scan) else self.output_dir / CASES_FOLDER
        dice = item["dice"].tolist() if "dice" in item else None
        write_text(self._stored(scan), json.dumps({"key": self._key(scan), "rows": item["rows"], "dice": dice}))
        self.note_failure(scan)
        means = [f"mean Dice {row.value:.3f}" for row in item["rows"] if row.metric == "mean_dice"]
        logger.info("%s: %s", scan["name"], ", ".join(means) or "measured")
        return folder

    def write_summary(self, scans: Sequence[Case]) -> Path:
        """Write tables and page of all cases that are measured; the process that ends last has them all."""
        page, conditions, settings = self.output_dir / "evaluation.html", self.conditions, self.files.settings
        with locked(self.output_dir / CASES_FOLDER):
            measured = {scan["name"]: content for scan in scans if (content := self._read_measures(scan))}
            done = [scan for scan in scans if scan["name"] in measured]
            lost = [scan for scan in scans if scan["name"] not in measured]
            failures = {scan["name"]: self.files.read_failure(scan) or "not measured yet" for scan in lost}
            dice = {scan["name"]: measured[scan["name"]]["dice"] for scan in done if not scan["settings"]}
            if any(dice.values()):
                self._write_dice_tables({name: values for name, values in dice.items() if values})
            rows = [row for content in measured.values() for row in content["rows"]]
            table = pd.DataFrame(rows, columns=list(MetricRow._fields)).astype({"value": float})
            summary, headlines = tables.summarise(table), tables.make_headlines(table)
            for name, frame in ((METRICS_FILE, table), ("summary.tsv", summary)):
                tables.write_frame(self.output_dir / name, frame)
            shown = [headline for headline in tables.HEADLINES if headline["title"] in set(headlines["structure"])]
            worst = headlines[headlines["structure"] == shown[0]["title"]] if shown else headlines
            worst = worst.sort_values("value", ascending=bool(shown) and shown[0]["better"] == "higher", kind="stable")
            first = next((name for name in conditions if not conditions[name]), next(iter(conditions)))  # on top
            versions = {name: metadata.version(name) for name in ("monai", "torch")}
            details = {"conditions": conditions, **self.definition, "settings": asdict(settings)}
            write_text(page, render(
                "evaluation.html", title="Evaluation", theme="light", done=done, failures=failures, first=first,
                conditions=conditions, used=settings, shown=shown, settings_table=SETTINGS, worst=worst.head(WORST),
                definitions=tables.DEFINITIONS, metrics=table["metric"].unique(),
                versions={"brainfm-monai": brainfm_monai.__version__, **versions, "Python": platform.python_version()},
                statistics={(row.condition, row.structure): row for row in tables.summarise(headlines).itertuples()},
                measures=summary[(summary["condition"] == first) & (summary["n"] > 0)].groupby("task", sort=False),
                pages={path.parent.name for path in self.output_dir.glob("*/*_report.html")},  # of scans as they are
                details=json.dumps(details, indent=1, default=str),
            ))  # fmt: skip
        return page

    def _write_dice_tables(self, dice: Mapping[str, Any]) -> None:
        """Write ``dice.tsv``, of the Dice of each scan, (S, 3), and ``dice_summary.tsv``, means over the scans."""
        scans = {scan: pd.DataFrame(values, index=self.dice_structures, columns=SIDES) for scan, values in dice.items()}
        table = pd.concat(scans, names=["scan", "structure"])
        tables.write_frame(self.output_dir / "dice.tsv", table.reset_index(), ".4f")
        by_structure = table.groupby("structure", sort=False)
        summary = by_structure.mean().assign(scans=by_structure["both"].count())
        # the mean of each scan over left and right parts and structures without sides, then over the scans
        without_sides = table[["left", "right"]].isna().all(axis=1)
        parts = table.assign(both=table["both"].where(without_sides)).stack().groupby("scan")
        summary.loc["mean"] = [math.nan, math.nan, parts.mean().mean(), len(dice)]
        summary = summary.astype({"scans": int}).reset_index(names="structure")
        tables.write_frame(self.output_dir / "dice_summary.tsv", summary, ".4f")

    def _read_measures(self, scan: Case) -> dict[str, Any]:
        """What is stored of a case; empty where it was not measured."""
        try:
            return json.loads(self._stored(scan).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    def _keeps_files(self, scan: Case) -> bool:
        """Whether the maps are written, too: of scans that are files, as they are."""
        return bool(self.files.writers) and not scan["settings"] and bool(scan.get("image"))

    def _stored(self, scan: Case) -> Path:
        return self.output_dir / CASES_FOLDER / f"{scan['name']}.json"

    def _key(self, scan: Case) -> str:
        """Hash of everything that the measures of a case depend on."""
        changed = {k: Path(v).stat().st_mtime_ns for k, v in scan.items() if isinstance(v, str) and Path(v).is_file()}
        return fingerprint(asdict(self.files.settings), dict(scan), changed)


def compare_evaluations(first: str | Path, second: str | Path, output: str | Path | None = None) -> Path:
    """Compare two evaluations of the same scans by paired statistics; return the path of ``comparison.tsv``.

    It has what :func:`~brainfm_monai.evaluation.tables.compare` finds of the measures that both have. A folder without
    an evaluation is a FileNotFoundError, other scans or conditions are a ValueError.

    Args:
        first: folder of an evaluation.
        second: folder of another one, such as that of other weights.
        output: folder for comparison.tsv; by default the second one's.
    """
    files = [Path(folder, METRICS_FILE) for folder in (first, second)]
    for path in files:
        rule = f"{path}: the folder of a finished evaluation is needed"
        refuse_if(not path.is_file(), rule, "no such file", FileNotFoundError)
    left, right = map(tables.read_metrics, files)
    # two networks may predict different tasks: the measures that both have are compared
    measures = left[tables.MEASURE].drop_duplicates().merge(right[tables.MEASURE].drop_duplicates())
    refuse_if(measures.empty, "compare: a measure that both evaluations have is needed", "none")
    path = Path(second if output is None else output, "comparison.tsv")
    tables.write_frame(path, tables.compare(left.merge(measures), right.merge(measures)))
    return path
