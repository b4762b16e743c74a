"""One tidy table for every measure: a row is one value of one scan."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from brainfm_monai.io import ABSENT, read_table, write_table

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["MetricRow", "make_table", "read_metrics", "write_frame"]


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


def make_table(rows: Iterable[MetricRow]) -> pd.DataFrame:
    """Rows as a pandas table with one column for each field."""
    import pandas as pd  # an optional dependency

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
