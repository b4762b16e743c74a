"""The picture page of one scan: what went in, what came out, and the volumes, for a reader who knows brains and not networks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import nibabel as nib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.transforms import Bbox

from brainfm_monai.anatomy import Protocol, Structure
from brainfm_monai.outputs import ScanResult, compute_volumes_mm3

__all__ = ["Page", "draw_report", "write_report"]

# Planes by the axis they are cut across; first horizontal, then vertical axis; marks left, right of the picture.
PLANES = (("axial", 2, (0, 1), "RL"), ("coronal", 1, (0, 2), "RL"), ("sagittal", 0, (1, 2), "AP"))
SLICES = (0.15, 0.325, 0.5, 0.675, 0.85)  # positions of the small pictures within the brain's box, from inferior, posterior, left
MAIN_SLICE = (0.45, 0.5, 0.32)  # of the large pictures: at the basal ganglia, the thalami and one hemisphere
OVERLAY_OPACITY = {"brain": 0.55, "white_matter": 0.25, "head": 0.22}
WINDOW_PERCENTILES = (0.5, 99.5)  # of the intensities within the brain, so that skin fat or bone does not darken it
GRID_STEP_MM = 20
PIAL_COLOUR, WHITE_COLOUR = "#ff4040", "#ffe040"
AXIS_COLOURS = ("#ff6060", "#60e060", "#60a0ff")
BRAIN_MAXIMUM_ID = 99  # FreeSurfer's ids of the brain end below; 5xx are head tissues
WHITE_MATTER_IDS = (2, 41)
CEREBELLUM_IDS = ((8, 47), (7, 46))
TABLE_IDS = (
    (3, 42),
    (2, 41),
    (4, 43),
    (10, 49),
    (11, 50),
    (12, 51),
    (13, 52),
    (17, 53),
    (18, 54),
    (8, 47),
    (7, 46),
    (14,),
    (15,),
    (16,),
)
BOX_QUANTILES = (0.002, 0.998)  # of the cerebrum's and cerebellum's voxels along an axis: a stray voxel does not widen the box
MARGIN_MM = 22.0  # shown around the box: skull and scalp, not the neck
PAGE_INCHES = (22.0, 12.4)
DOTS_PER_INCH = 90


@dataclass(frozen=True)
class Page:
    """The arrays of a scan turned to the closest RAS axes, without resampling.

    They are cut to the brain and a margin around it.

    Attributes:
        image: the scan, shape (H, W, D).
        labels: label map, shape (H, W, D).
        maps: other maps, each of shape (H, W, D, C).
        zooms_mm: voxel size along each axis.
        protocol: names and colours of the labels.
        window: intensities shown black and white.
        box: first and last index of the brain along each axis; of the whole image where there is none.
    """

    image: np.ndarray
    labels: np.ndarray
    maps: dict[str, np.ndarray]
    zooms_mm: np.ndarray
    protocol: Protocol
    window: tuple[float, float]
    box: list[tuple[int, int]]

    @classmethod
    def of(cls, scan: ScanResult) -> Page:
        """Read the scan, and turn and cut it and its maps."""
        turn = nib.orientations.io_orientation(scan.affine)
        zooms = nib.affines.voxel_sizes(scan.affine @ nib.orientations.inv_ornt_aff(turn, scan.labels.shape))
        labels = nib.orientations.apply_orientation(scan.labels, turn)
        protocol = scan.layout.protocol
        box = _brain_box(labels, protocol)
        margin = [round(MARGIN_MM / zoom) for zoom in zooms]
        window = tuple(slice(max(first - m, 0), last + 1 + m) for (first, last), m in zip(box, margin, strict=True))
        labels = labels[window]

        def turned(volume: np.ndarray) -> np.ndarray:
            return np.asarray(nib.orientations.apply_orientation(volume, turn)[window])

        stored = np.asarray(nib.load(scan.source).get_fdata(dtype=np.float32))  # type: ignore[attr-defined]
        image = np.nan_to_num(turned(stored.reshape(scan.labels.shape)), posinf=0, neginf=0)
        maps = {name: turned(np.moveaxis(np.asarray(value.cpu()), 0, -1)) for name, value in scan.maps.items() if name != "pred"}
        box = [(first - cut.start, last - cut.start) for (first, last), cut in zip(box, window, strict=True)]
        return cls(image, labels, maps, zooms, protocol, _grey_window(image, labels, protocol), box)

    def cut(self, volume: np.ndarray, axis: int, index: int) -> np.ndarray:
        """A slice as rows and columns of a picture with origin below, right or anterior on the picture's left."""
        return np.swapaxes(volume.take(index, axis=axis)[::-1], 0, 1)


def _brain_box(labels: np.ndarray, protocol: Protocol) -> list[tuple[int, int]]:
    """First and last index along each axis of cerebrum and cerebellum, which are the brain's structures with a side."""
    sided = [s.label for s in protocol.structures if s.side != "none" and s.freesurfer_id <= BRAIN_MAXIMUM_ID]
    brain = np.isin(labels, sided)
    box = []
    for axis in range(3):
        count = np.cumsum(brain.sum(axis=tuple(a for a in range(3) if a != axis)))
        if not count[-1]:
            return [(0, n - 1) for n in labels.shape]
        first, last = np.searchsorted(count, np.array(BOX_QUANTILES) * count[-1])
        box.append((int(first), int(last)))
    return box


def _grey_window(image: np.ndarray, labels: np.ndarray, protocol: Protocol) -> tuple[float, float]:
    brain = np.isin(labels, protocol.labels_where(maximum_id=BRAIN_MAXIMUM_ID))
    low, high = np.percentile(image[brain] if brain.any() else image, WINDOW_PERCENTILES)
    margin = 0.1 * (high - low)
    return float(low - margin), float(high + margin)


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
    for row, (_, axis, _, _) in enumerate(PLANES):
        first, last = page.box[axis]
        indices = [round(first + f * (last - first)) for f in SLICES]
        for column, index in enumerate(indices):
            _paint_scan(_panel(figure, grid[2 * row, column], page, row), page, row, index)
            _paint_segmentation(_panel(figure, grid[2 * row + 1, column], page, row), page, row, index)
        main = round(first + MAIN_SLICE[row] * (last - first))
        for column, (title, paint) in enumerate(columns):
            where = grid[2 * row : 2 * row + 2, 5 + 2 * column : 7 + 2 * column]
            axes = _panel(figure, where, page, row)
            paint(axes, page, row, main)
            if row == 0:
                axes.set_title(title, color="white", fontsize=11)
    _write_texts(figure, scan, page)
    _write_table(figure.add_subplot(grid[6, :]), scan)
    return figure


def _panel(figure: Figure, where: object, page: Page, row: int) -> Axes:
    """Empty axes of true proportions with the letters of the two sides."""
    axes: Axes = figure.add_subplot(where)  # type: ignore[call-overload]
    axes.set_axis_off()
    name, _, _, marks = PLANES[row]
    style: dict[str, Any] = {"color": "white", "fontsize": 9, "va": "top", "transform": axes.transAxes, "zorder": 5}
    axes.text(0.01, 0.98, marks[0], ha="left", **style)
    axes.text(0.99, 0.98, marks[1], ha="right", **style)
    axes.set_label(name)
    return axes


def _show(axes: Axes, page: Page, row: int, picture: np.ndarray, **style: object) -> None:
    horizontal, vertical = PLANES[row][2]
    aspect = float(page.zooms_mm[vertical] / page.zooms_mm[horizontal])
    axes.imshow(picture, origin="lower", aspect=aspect, **style)  # type: ignore[arg-type]


def _paint_scan(axes: Axes, page: Page, row: int, index: int) -> None:
    picture = page.cut(page.image, PLANES[row][1], index)
    _show(axes, page, row, picture, cmap="gray", vmin=page.window[0], vmax=page.window[1])


def _paint_segmentation(axes: Axes, page: Page, row: int, index: int) -> None:
    _paint_scan(axes, page, row, index)
    table = np.array([_overlay_colour(s) for s in page.protocol.structures], dtype=np.float32)
    _show(axes, page, row, table[page.cut(page.labels, PLANES[row][1], index)], interpolation="nearest")


def _overlay_colour(structure: Structure) -> tuple[float, float, float, float]:
    if structure.label == 0:
        return (0.0, 0.0, 0.0, 0.0)
    kind = "white_matter" if structure.freesurfer_id in WHITE_MATTER_IDS else "brain"
    kind = kind if structure.freesurfer_id <= BRAIN_MAXIMUM_ID else "head"
    return (*_unit_colour(structure), OVERLAY_OPACITY[kind])


def _unit_colour(structure: Structure) -> tuple[float, float, float]:
    red, green, blue = structure.colour
    return (red / 255, green / 255, blue / 255)


def _paint_bias_field(axes: Axes, page: Page, row: int, index: int) -> None:
    axis = PLANES[row][1]
    head = page.labels > 0
    field = np.ma.masked_where(~head, page.maps["bias_field"][..., 0]) if head.any() else page.maps["bias_field"][..., 0]
    limit = max(float(np.ma.abs(np.ma.log(field)).max()), 0.05)
    _show(axes, page, row, page.cut(np.ma.log(field), axis, index), cmap="RdBu_r", vmin=-limit, vmax=limit)
    text = f"x {field.min():.2f} to x {field.max():.2f}"
    box = {"facecolor": "black", "alpha": 0.6, "pad": 2}
    axes.text(0.5, 0.02, text, color="white", fontsize=9, ha="center", va="bottom", bbox=box, transform=axes.transAxes)


def _paint_corrected(axes: Axes, page: Page, row: int, index: int) -> None:
    axis = PLANES[row][1]
    picture = page.cut(page.image, axis, index) / page.cut(page.maps["bias_field"], axis, index)[..., 0]
    _show(axes, page, row, picture, cmap="gray", vmin=page.window[0], vmax=page.window[1])


def _paint_surfaces(axes: Axes, page: Page, row: int, index: int) -> None:
    _paint_scan(axes, page, row, index)
    distance = page.cut(page.maps["distance"], PLANES[row][1], index)
    for channel, colour in enumerate((PIAL_COLOUR, WHITE_COLOUR) * 2):  # lp, lw, rp, rw
        _contour(axes, distance[..., channel], [0.0], colour, 0.9)


def _paint_mni(axes: Axes, page: Page, row: int, index: int) -> None:
    _paint_scan(axes, page, row, index)
    _, axis, shown, _ = PLANES[row]
    outside = page.cut(page.labels, axis, index) == 0
    coordinates = page.cut(page.maps["mni"], axis, index)
    for direction in shown:
        lines = np.ma.masked_where(outside, coordinates[..., direction])
        levels = np.arange(-200, 201, GRID_STEP_MM)
        _contour(axes, lines, [float(level) for level in levels if level], AXIS_COLOURS[direction], 0.5)
        _contour(axes, lines, [0.0], AXIS_COLOURS[direction], 1.8)


def _contour(axes: Axes, values: np.ndarray, levels: list[float], colour: str, width: float) -> None:
    """Contour lines at those levels that occur: matplotlib warns of a picture without lines."""
    inside = [level for level in levels if values.min() < level < values.max()]
    if inside:
        axes.contour(values, levels=inside, colors=colour, linewidths=width, linestyles="solid")


Painter = Callable[[Axes, Page, int, int], None]
PANELS: tuple[tuple[str, str, Painter], ...] = (
    ("bias_field", "bias field (red: brighter than it should be)", _paint_bias_field),
    ("bias_field", "scan without the bias field", _paint_corrected),
    ("distance", "pial (red) and white (yellow) surfaces", _paint_surfaces),
    ("mni", f"MNI152 coordinates, every {GRID_STEP_MM} mm; 0 thick", _paint_mni),
)


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
    found = "" if page.labels.any() else "NO BRAIN WAS FOUND IN THIS SCAN. "
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
    known = [[protocol.label_of_id[i] for i in ids] for ids in TABLE_IDS if all(i in protocol.label_of_id for i in ids)]
    if not known:
        return
    heads = [_table_head(protocol.structures[labels[0]].name) for labels in known]
    numbers = [[f"{volumes_ml[label]:.1f}" for label in labels] for labels in known]
    cells = [
        [column[0] if len(column) == 2 else "" for column in numbers],
        [column[1] if len(column) == 2 else "" for column in numbers],
        [column[0] if len(column) == 1 else "" for column in numbers],
    ]
    colours = [_unit_colour(protocol.structures[labels[0]]) for labels in known]
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
