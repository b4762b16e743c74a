"""The figures of the page: slices of three planes, with the sides marked, as pictures that a page can hold."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from brainfm_monai.report.page import PLANES, Page, Plane
from brainfm_monai.report.panels import PANELS, Painter, Panel, paint_scan, paint_segmentation

__all__ = ["draw_panels", "draw_segmentation", "encode_figure", "sections"]

SLICES = (0.1, 0.25, 0.4, 0.5, 0.62, 0.75, 0.9)  # positions within the brain's box, from inferior, posterior, left
PANEL_SLICES = {
    "axial": (0.35, 0.5, 0.68),
    "coronal": (0.5,),
    "sagittal": (0.32,),
}  # nuclei, ventricles, vertex; thalami; one side
CELL_INCHES = 2.2
DOTS_PER_INCH = 80
QUALITY = 88  # of WebP


def draw_segmentation(page: Page) -> Figure:
    """The scan in several slices of three planes, and below each the segmentation over it."""
    rows: list[tuple[str, Painter, Plane]] = []
    for plane in PLANES:
        rows += [(plane.name, paint_scan, plane), ("", paint_segmentation, plane)]
    return _draw(page, rows, [SLICES] * len(rows))


def draw_panels(page: Page, panels: Sequence[Panel]) -> Figure:
    """One row for each panel: axial slices, a coronal and a sagittal one."""
    columns = [(plane, share) for plane in PLANES for share in PANEL_SLICES[plane.name]]
    figure = _black_figure(len(columns), len(panels))
    for row, panel in enumerate(panels):
        for column, (plane, share) in enumerate(columns):
            axes = _cell(figure, len(panels), len(columns), row, column, plane)
            panel.paint(axes, page, plane, _index(page, plane, share))
        _label(figure, row, len(panels), panel.title)
    return figure


def sections(page: Page) -> Iterator[tuple[str, list[Panel]]]:
    """Headings of the page, each with those of its panels whose maps are there."""
    for heading in dict.fromkeys(panel.section for panel in PANELS):
        panels = [panel for panel in PANELS if panel.section == heading and panel.map in page.maps]
        if panels:
            yield heading, panels


def encode_figure(figure: Figure) -> str:
    """The figure as a ``data:`` address."""
    buffer = io.BytesIO()
    settings: dict[str, Any] = {
        "format": "webp",
        "facecolor": figure.get_facecolor(),
        "pil_kwargs": {"quality": QUALITY},
    }
    figure.savefig(buffer, **settings)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _draw(page: Page, rows: Sequence[tuple[str, Painter, Plane]], slices: Sequence[Sequence[float]]) -> Figure:
    columns = max(len(shares) for shares in slices)
    figure = _black_figure(columns, len(rows))
    for row, ((title, paint, plane), shares) in enumerate(zip(rows, slices, strict=True)):
        for column, share in enumerate(shares):
            axes = _cell(figure, len(rows), columns, row, column, plane)
            paint(axes, page, plane, _index(page, plane, share))
        _label(figure, row, len(rows), title)
    return figure


def _black_figure(columns: int, rows: int) -> Figure:
    return Figure(figsize=(CELL_INCHES * columns, CELL_INCHES * rows), dpi=DOTS_PER_INCH, facecolor="black")


def _cell(figure: Figure, rows: int, columns: int, row: int, column: int, plane: Plane) -> Axes:
    """Empty axes of true proportions with the letters of the two sides."""
    axes: Axes = figure.add_axes(
        (column / columns, 1 - (row + 1) / rows, 0.995 / columns, 0.99 / rows), label=plane.name
    )
    axes.set_axis_off()
    style: dict[str, Any] = {"color": "white", "fontsize": 8, "va": "top", "transform": axes.transAxes, "zorder": 5}
    axes.text(0.01, 0.98, plane.marks[0], ha="left", **style)
    axes.text(0.99, 0.98, plane.marks[1], ha="right", **style)
    return axes


def _index(page: Page, plane: Plane, share: float) -> int:
    first, last = page.box[plane.axis]
    return round(first + share * (last - first))


def _label(figure: Figure, row: int, rows: int, title: str) -> None:
    box = {"facecolor": "black", "alpha": 0.6, "pad": 2, "edgecolor": "none"}
    place = (0.004, 1 - (row + 1) / rows + 0.03 / rows)
    figure.text(*place, title, color="white", fontsize=9, ha="left", va="bottom", bbox=box if title else None)
