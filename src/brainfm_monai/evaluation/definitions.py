"""What every measure means, and which of them are headlines: the table ``measures.tsv``."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from brainfm_monai.io import read_table

__all__ = ["DEFINITIONS", "HEADLINES", "Headline", "define"]

FITTED = "_fitted"  # end of the name of a measure of images


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


_TABLE = read_table(Path(__file__).with_name("measures.tsv"))
DEFINITIONS = {row["metric"]: row["definition"] for row in reversed(_TABLE)}  # the first of a name counts
HEADLINES = tuple(
    Headline(
        row["headline"].format(task=task),
        task,
        row["metric"],
        row["unit"],
        int(row["digits"]),
        row["better"] == "higher",
    )
    for tasks in dict.fromkeys(row["tasks"] for row in _TABLE)
    for task in tasks.split()
    for row in _TABLE
    if row["tasks"] == tasks and row["headline"]
)


def define(metric: str) -> str:
    """Definition of a metric by its name; empty for an unknown one."""
    if metric.endswith(FITTED):
        image = metric.removesuffix(FITTED)
        return f"{image} after the gain and offset that fit the prediction best to the reference there"
    return DEFINITIONS.get(metric, "")
