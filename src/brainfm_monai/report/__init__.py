"""The picture page of one scan: what went in, what came out, and the volumes, for a reader who knows brains and not networks."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import nibabel as nib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.transforms import Bbox

from brainfm_monai.outputs import ScanResult, compute_volumes_mm3
from brainfm_monai.report.page import PLANES, Page, Plane
from brainfm_monai.report.panels import PANELS, paint_scan, paint_segmentation, unit_colour

__all__ = ["Page", "draw_report", "write_report"]

SLICES = (0.15, 0.325, 0.5, 0.675, 0.85)  # positions of the small pictures within the brain's box, from inferior, posterior, left
MAIN_SLICE = (0.45, 0.5, 0.32)  # of the large pictures: at the basal ganglia, the thalami and one hemisphere
PAIRED_IDS = ((3, 42), (2, 41), (4, 43), (10, 49), (11, 50), (12, 51), (13, 52), (17, 53), (18, 54), (8, 47), (7, 46))
MIDLINE_IDS = ((14,), (15,), (16,))
PAGE_INCHES = (22.0, 12.4)
DOTS_PER_INCH = 90


def write_report(scan: ScanResult) -> None:
    """Write the page of one scan: ``_report.png``; see :func:`draw_report`."""
    figure = draw_report(scan)
    figure.savefig(scan.path("report.png"), facecolor=figure.get_facecolor())


def draw_report(scan: ScanResult) -> Figure:
    """Draw the page of one scan.

    Small pictures show the scan and the segmentation over it in five slices of three planes; large ones the other maps; a
    table gives volumes, its head the colours. Planes follow the scan's own axes, in true proportions.
    """
    page = Page.of(scan)
    figure = Figure(figsize=PAGE_INCHES, dpi=DOTS_PER_INCH, facecolor="black")
    columns = [(title, paint) for key, title, paint in PANELS if key in page.maps]
    grid = GridSpec(7, 5 + 2 * len(columns), figure, left=0.02, right=0.995, bottom=0.035, top=0.9, hspace=0.04, wspace=0.03)
    for row, plane in enumerate(PLANES):
        first, last = page.box[plane.axis]
        indices = [round(first + f * (last - first)) for f in SLICES]
        for column, index in enumerate(indices):
            paint_scan(_panel(figure, grid[2 * row, column], plane), page, plane, index)
            paint_segmentation(_panel(figure, grid[2 * row + 1, column], plane), page, plane, index)
        main = round(first + MAIN_SLICE[row] * (last - first))
        for column, (title, paint) in enumerate(columns):
            where = grid[2 * row : 2 * row + 2, 5 + 2 * column : 7 + 2 * column]
            axes = _panel(figure, where, plane)
            paint(axes, page, plane, main)
            if row == 0:
                axes.set_title(title, color="white", fontsize=11)
    _write_texts(figure, scan, page)
    _write_table(figure.add_subplot(grid[6, :]), scan)
    return figure


def _panel(figure: Figure, where: object, plane: Plane) -> Axes:
    """Empty axes of true proportions with the letters of the two sides."""
    axes: Axes = figure.add_subplot(where)  # type: ignore[call-overload]
    axes.set_axis_off()
    style: dict[str, Any] = {"color": "white", "fontsize": 9, "va": "top", "transform": axes.transAxes, "zorder": 5}
    axes.text(0.01, 0.98, plane.marks[0], ha="left", **style)
    axes.text(0.99, 0.98, plane.marks[1], ha="right", **style)
    axes.set_label(plane.name)
    return axes


def _write_texts(figure: Figure, scan: ScanResult, page: Page) -> None:
    size = " x ".join(str(n) for n in scan.labels.shape)
    zooms = " x ".join(f"{z:.2f}" for z in nib.affines.voxel_sizes(scan.affine))
    axes = "".join(nib.orientations.aff2axcodes(scan.affine))
    figure.text(0.02, 0.965, scan.name, color="white", fontsize=18, weight="bold")
    figure.text(0.02, 0.94, f"{size} voxels of {zooms} mm, stored as {axes}", color="white", fontsize=12)
    convention = (
        "Radiological convention: the patient's right (R) and in sagittal slices anterior (A) are on the left of the picture."
    )
    figure.text(0.995, 0.965, convention, color="white", fontsize=12, ha="right")
    found = "" if page.has_brain else "NO BRAIN WAS FOUND IN THIS SCAN. "
    figure.text(0.995, 0.94, f"{found}For research; not a medical device.", color="white", fontsize=12, ha="right")
    heading = "scan, and below it the segmentation: colours as in the table, head tissues faint"
    figure.text(0.02, 0.908, heading, color="white", fontsize=11)
    version = metadata.version("brainfm-monai")
    figure.text(0.995, 0.008, f"brainfm-monai {version}", color="gray", fontsize=8, ha="right")


def _write_table(axes: Axes, scan: ScanResult) -> None:
    """Volumes in millilitres: one column per structure, left above right, what has no side in a row of its own."""
    axes.set_axis_off()
    protocol = scan.layout.protocol
    volumes_ml = compute_volumes_mm3(scan.labels, scan.affine, len(protocol)) / 1000
    known = [
        [protocol.label_of_id[i] for i in ids] for ids in PAIRED_IDS + MIDLINE_IDS if all(i in protocol.label_of_id for i in ids)
    ]
    if not known:
        return
    heads = [_table_head(protocol.structures[labels[0]].name) for labels in known]
    numbers = [[f"{volumes_ml[label]:.1f}" for label in labels] for labels in known]
    cells = [
        [column[0] if len(column) == 2 else "" for column in numbers],
        [column[1] if len(column) == 2 else "" for column in numbers],
        [column[0] if len(column) == 1 else "" for column in numbers],
    ]
    colours = [unit_colour(protocol.structures[labels[0]]) for labels in known]
    rows = ["left, mL", "right, mL", "midline, mL"]
    table = axes.table(
        cells, rowLabels=rows, colLabels=heads, colColours=colours, bbox=Bbox.from_bounds(0.05, 0.0, 0.95, 0.8), cellLoc="center"
    )
    table.auto_set_font_size(False)
    for (row, column), cell in table.get_celld().items():
        cell.set_edgecolor("gray")
        cell.set_fontsize(10)
        head = row == 0 and column >= 0
        cell.set_text_props(color="black" if head and sum(colours[column]) > 1.2 else "white")
        if not head:
            cell.set_facecolor("black")


def _table_head(name: str) -> str:
    """Short name of a structure and its other side: ``cerebral cortex`` for ``Left-Cerebral-Cortex``."""
    words = [word for word in name.split("-") if word.lower() not in ("left", "right")]
    return " ".join(words).lower().replace("matter", "m.").replace("cerebellum", "cerebell.")
