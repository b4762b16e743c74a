"""Tab-separated tables, as BIDS has them."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from brainfm_monai.io.files import write_whole

__all__ = ["ABSENT", "read_table", "write_table"]

FORMULA = ("=", "+", "-", "@", "\t", "\r")  # how a cell begins that spreadsheets compute
ABSENT = "n/a"  # BIDS' word for a missing value in a table


def read_table(path: str | Path) -> list[dict[str, str]]:
    """Read a TSV file with a header line.

    Args:
        path: UTF-8 file, with or without a byte-order mark.

    Returns:
        One dictionary per row; all cells are strings, exactly as :func:`write_table` was given them.

    Raises:
        ValueError: if the file is not UTF-8 text, or a row has another number of cells than the header.
    """
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            lines = [row for row in csv.reader(file, delimiter="\t") if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: a tab-separated table in UTF-8 is needed, found {error}") from error
    columns, rows = (lines[0], lines[1:]) if lines else ([], [])
    for number, row in enumerate(rows, 2):
        if len(row) != len(columns):
            raise ValueError(f"{path}: line {number} must have {len(columns)} cells, found {len(row)}")
    return [{column: _unprotect(cell) for column, cell in zip(columns, row, strict=True)} for row in rows]


def write_table(path: str | Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a TSV file with a header line; the file appears whole or not at all.

    Texts that a spreadsheet would take for a formula begin with an apostrophe in the file; numbers do not.

    Args:
        path: file to write.
        columns: names of the columns.
        rows: one sequence of cells per row, in the order of the columns.
    """
    with write_whole(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([_protect(cell) for cell in row] for row in rows)


def _protect(cell: object) -> object:
    """Begin a text that a spreadsheet would compute with an apostrophe, which spreadsheets do not show."""
    return f"'{cell}" if isinstance(cell, str) and _is_formula(cell) else cell


def _unprotect(cell: str) -> str:
    return cell[1:] if cell.startswith("'") and _is_formula(cell) else cell


def _is_formula(cell: str) -> bool:
    text = cell.lstrip("'")
    if not text.startswith(FORMULA):
        return False
    try:
        float(text)
    except ValueError:
        return True
    return False
