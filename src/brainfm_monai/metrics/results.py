"""One tidy table for every measure: a row is one value of one scan."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from brainfm_monai.io import ABSENT, write_table

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["MetricRow", "make_table", "read_rows", "read_table", "write_rows"]


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


def write_rows(path: str | Path, rows: Iterable[MetricRow]) -> None:
    """Write rows as a TSV file with one column for each field; an undefined value is ``n/a``."""
    cells = ((*row[:-2], ABSENT if math.isnan(row.value) else f"{row.value:.6g}", row.unit) for row in rows)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_table(Path(path), MetricRow._fields, cells)


def read_rows(path: str | Path) -> list[MetricRow]:
    """Read the rows of :func:`write_rows`.

    Raises:
        ValueError: if the columns are others, or a value is not a number.
    """
    with Path(path).open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t")
        if tuple(reader.fieldnames or ()) != MetricRow._fields:
            raise ValueError(f"{path}: the columns must be {list(MetricRow._fields)}, found {reader.fieldnames}")
        return [_parse(path, reader.line_num, cells) for cells in reader]


def _parse(path: str | Path, line: int, cells: dict[str, str]) -> MetricRow:
    try:
        value = math.nan if cells["value"] == ABSENT else float(cells["value"])
    except (TypeError, ValueError):
        raise ValueError(
            f"{path}, line {line}: 'value' must be a number or {ABSENT}, found {cells['value']!r}"
        ) from None
    return MetricRow(**{**cells, "value": value})  # type: ignore[arg-type]


def make_table(rows: Iterable[MetricRow]) -> pd.DataFrame:
    """Rows as a pandas table with one column for each field."""
    import pandas as pd  # an optional dependency

    return pd.DataFrame(list(rows), columns=list(MetricRow._fields))


def read_table(path: str | Path) -> pd.DataFrame:
    """The file of :func:`write_rows` as a pandas table; raises as :func:`read_rows` does."""
    return make_table(read_rows(path))
