"""One tidy table for every measure, a row is one value of one scan; and what the measures mean, by ``measures.tsv``."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from brainfm_monai.io import ABSENT, read_table, write_table

if TYPE_CHECKING:
    import pandas as pd

FITTED = "_fitted"  # end of the name of a measure of images


class MetricRow(NamedTuple):
    """One value.

    Attributes:
        scan: name of the scan.
        condition: how it was changed before it was predicted, ``native`` if it was not.
        task: task of the layout.
        structure: structure, tissue or surface that was measured, ``n/a`` where there is none.
        side: ``left``, ``right`` or ``both``, ``n/a`` where the task has no sides.
        metric: what was measured.
        value: NaN where it is undefined.
        unit: unit of the value, ``1`` for a pure number.
    """

    scan: str
    condition: str
    task: str
    structure: str
    side: str
    metric: str
    value: float
    unit: str


class Headline(NamedTuple):
    """A number at the top of the page, and a row of curves: the mean of a metric over its structures and sides.

    Attributes:
        title: what the page calls it.
        task: of the rows.
        metric: of the rows.
        unit: shown behind values; empty for pure numbers.
        digits: after the point.
        higher_is_better: which way is good.
    """

    title: str
    task: str
    metric: str
    unit: str
    digits: int
    higher_is_better: bool

    @property
    def label(self) -> str:
        """The title with the unit."""
        return f"{self.title}, {self.unit}" if self.unit else self.title

    def format(self, value: float, sign: str = "") -> str:
        """A value with the headline's digits."""
        return f"{value:{sign}.{self.digits}f}"


_MEASURES = read_table(Path(__file__).with_name("measures.tsv"))
_BY_METRIC = {row["metric"]: row for row in reversed(_MEASURES)}  # the first of a name counts
HEADLINES = tuple(
    Headline(title.format(task=task), task, row["metric"], row["unit"], int(row["digits"]), row["better"] == "higher")
    for tasks in dict.fromkeys(row["tasks"] for row in _MEASURES)
    for task in tasks.split()
    for row in _MEASURES
    if row["tasks"] == tasks and (title := row["headline"])
)


def define(metric: str) -> str:
    """Definition of a metric by its name; empty for an unknown one."""
    if metric.endswith(FITTED):
        image = metric.removesuffix(FITTED)
        return f"{image} after the gain and offset that fit the prediction best to the reference there"
    return _BY_METRIC[metric]["definition"] if metric in _BY_METRIC else ""


def unit_of(metric: str) -> str:
    """Unit of a metric of ``measures.tsv``, ``1`` for a pure number."""
    return _BY_METRIC[metric.removesuffix(FITTED)]["unit"] or "1"


def make_table(rows: Iterable[MetricRow]) -> pd.DataFrame:
    """Rows as a pandas table with one column for each field."""
    import pandas as pd  # slow to import

    return pd.DataFrame(list(rows), columns=list(MetricRow._fields))


def write_frame(path: str | Path, table: pd.DataFrame, digits: str = ".6g") -> None:
    """Write a pandas table as a TSV file; an undefined number is ``n/a``, the other ones have these digits."""
    rows = [
        [(ABSENT if math.isnan(cell) else format(cell, digits)) if isinstance(cell, float) else cell for cell in row]
        for row in table.itertuples(index=False)
    ]
    write_table(path, list(table.columns), rows)


def read_metrics(path: str | Path) -> pd.DataFrame:
    """Read a table of :class:`MetricRow` from a TSV file.

    Raises:
        ValueError: if the columns are others, or a value is not a number.
    """
    import pandas as pd

    table = pd.DataFrame(read_table(path))
    if tuple(table.columns) != MetricRow._fields:
        raise ValueError(f"{path}: the columns must be {list(MetricRow._fields)}, found {list(table.columns)}")
    value = pd.to_numeric(table["value"], errors="coerce")
    wrong = table["value"][value.isna() & (table["value"] != ABSENT)]
    if len(wrong):
        raise ValueError(f"{path}: 'value' must be a number or {ABSENT}, found {wrong.iloc[0]!r}")
    return table.assign(value=value.astype(float))
