"""Single pictures of the page: the scan, and one map over it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes

from brainfm_monai.anatomy import Structure
from brainfm_monai.report.page import Page, Plane

__all__ = ["PANELS", "Painter", "Panel", "paint_scan", "paint_segmentation", "unit_colour"]

OVERLAY_OPACITY = {"brain": 0.55, "white_matter": 0.25, "head": 0.22}
WHITE_MATTER_IDS = (2, 41)
GRID_STEP_MM = 20
PIAL_COLOUR, WHITE_COLOUR = "#ff4040", "#ffe040"
RIBBON_COLOURS = ((1.0, 0.25, 0.25, 0.55), (1.0, 1.0, 1.0, 0.25))  # red, green, blue, opacity
TEMPLATE_LEVELS = ((0.35, "#40c0ff"), (0.75, "#ffd040"))  # shares of its maximum: its outline, and its white matter
ENTROPY_TOP = 0.5
AXIS_COLOURS = ("#ff6060", "#60e060", "#60a0ff")


def _show(axes: Axes, page: Page, plane: Plane, picture: np.ndarray, **style: object) -> None:
    axes.imshow(picture, origin="lower", aspect=page.aspect(plane), **style)  # type: ignore[arg-type]


def paint_scan(axes: Axes, page: Page, plane: Plane, index: int) -> None:
    """The scan itself, in grey values set by the brain."""
    picture = page.cut(page.image, plane, index)
    _show(axes, page, plane, picture, cmap="gray", vmin=page.window[0], vmax=page.window[1])


def paint_segmentation(axes: Axes, page: Page, plane: Plane, index: int) -> None:
    """The scan, and the structures over it in the colours of the protocol."""
    paint_scan(axes, page, plane, index)
    protocol = page.protocol
    table = np.array([_overlay_colour(s, protocol.is_brain[s.label]) for s in protocol.structures], dtype=np.float32)
    _show(axes, page, plane, table[page.cut(page.labels, plane, index)], interpolation="nearest")


def _overlay_colour(structure: Structure, brain: bool) -> tuple[float, float, float, float]:
    if structure.label == 0:
        return (0.0, 0.0, 0.0, 0.0)
    kind = "white_matter" if structure.freesurfer_id in WHITE_MATTER_IDS else "brain"
    kind = kind if brain else "head"
    return (*unit_colour(structure), OVERLAY_OPACITY[kind])


def unit_colour(structure: Structure) -> tuple[float, float, float]:
    """Red, green and blue of a structure in [0, 1]."""
    red, green, blue = structure.colour
    return (red / 255, green / 255, blue / 255)


def _paint_bias_field(axes: Axes, page: Page, plane: Plane, index: int) -> None:
    head = page.labels > 0
    field = (
        np.ma.masked_where(~head, page.maps["bias_field"][..., 0]) if head.any() else page.maps["bias_field"][..., 0]
    )
    limit = max(float(np.ma.abs(np.ma.log(field)).max()), 0.05)
    _show(axes, page, plane, page.cut(np.ma.log(field), plane, index), cmap="RdBu_r", vmin=-limit, vmax=limit)
    text = f"x {field.min():.2f} to x {field.max():.2f}"
    box = {"facecolor": "black", "alpha": 0.6, "pad": 2}
    axes.text(0.5, 0.02, text, color="white", fontsize=9, ha="center", va="bottom", bbox=box, transform=axes.transAxes)


def _paint_corrected(axes: Axes, page: Page, plane: Plane, index: int) -> None:
    picture = page.cut(page.image, plane, index) / page.cut(page.maps["bias_field"], plane, index)[..., 0]
    _show(axes, page, plane, picture, cmap="gray", vmin=page.window[0], vmax=page.window[1])


def _paint_surfaces(axes: Axes, page: Page, plane: Plane, index: int) -> None:
    paint_scan(axes, page, plane, index)
    distance = page.cut(page.maps["distance"], plane, index)
    for channel, colour in enumerate((PIAL_COLOUR, WHITE_COLOUR) * 2):  # lp, lw, rp, rw
        _contour(axes, distance[..., channel], [0.0], colour, 0.9)


def _paint_mni(axes: Axes, page: Page, plane: Plane, index: int) -> None:
    paint_scan(axes, page, plane, index)
    outside = page.cut(page.labels, plane, index) == 0
    coordinates = page.cut(page.maps["mni"], plane, index)
    for direction in (plane.horizontal, plane.vertical):
        lines = np.ma.masked_where(outside, coordinates[..., direction])
        levels = np.arange(-200, 201, GRID_STEP_MM)
        _contour(axes, lines, [float(level) for level in levels if level], AXIS_COLOURS[direction], 0.5)
        _contour(axes, lines, [0.0], AXIS_COLOURS[direction], 1.8)


def _contour(axes: Axes, values: np.ndarray, levels: list[float], colour: str, width: float) -> None:
    """Contour lines at those levels that occur: matplotlib warns of a picture without lines."""
    inside = [level for level in levels if values.min() < level < values.max()]
    if inside:
        axes.contour(values, levels=inside, colors=colour, linewidths=width, linestyles="solid")


def _paint_ribbon(axes: Axes, page: Page, plane: Plane, index: int) -> None:
    paint_scan(axes, page, plane, index)
    left_pial, left_white, right_pial, right_white = np.moveaxis(page.cut(page.maps["distance"], plane, index), -1, 0)
    white = (left_white < 0) | (right_white < 0)
    cortex = ((left_pial < 0) | (right_pial < 0)) & ~white
    for mask, colour in ((cortex, RIBBON_COLOURS[0]), (white, RIBBON_COLOURS[1])):
        _show(axes, page, plane, np.where(mask[..., None], colour, 0.0), interpolation="nearest")


def _paint_template(axes: Axes, page: Page, plane: Plane, index: int) -> None:
    _show(axes, page, plane, page.cut(page.maps["template"], plane, index)[..., 0], cmap="gray", vmin=0)


def _paint_template_outline(axes: Axes, page: Page, plane: Plane, index: int) -> None:
    paint_scan(axes, page, plane, index)
    template = page.cut(page.maps["template"], plane, index)[..., 0]
    top = float(page.maps["template"].max())
    for share, colour in TEMPLATE_LEVELS:
        _contour(axes, template, [share * top], colour, 0.8)


def _paint_entropy(axes: Axes, page: Page, plane: Plane, index: int) -> None:
    _show(
        axes, page, plane, page.cut(page.maps["entropy"], plane, index)[..., 0], cmap="magma", vmin=0, vmax=ENTROPY_TOP
    )


def _paint_map(name: str) -> Painter:
    """The grey picture of a synthetic image, its percentiles black and white."""

    def paint(axes: Axes, page: Page, plane: Plane, index: int) -> None:
        low, high = np.percentile(page.maps[name], (0.5, 99.5))
        _show(
            axes,
            page,
            plane,
            page.cut(page.maps[name], plane, index)[..., 0],
            cmap="gray",
            vmin=low,
            vmax=max(high, low + 1e-6),
        )

    return paint


Painter = Callable[[Axes, Page, Plane, int], None]


class Panel(NamedTuple):
    """A picture of the page.

    Attributes:
        section: heading under which it stands.
        title: what it shows.
        map: map without which there is none; empty: always.
        paint: draws one slice.
    """

    section: str
    title: str
    map: str
    paint: Painter


SYNTHETIC = "The scan in other contrasts"
BIAS, CORTEX, TEMPLATE, CERTAINTY = "Bias field", "Cortex", "Way to the template", "Certainty"
PANELS: tuple[Panel, ...] = (
    *(Panel(SYNTHETIC, name, name, _paint_map(name)) for name in ("T1w", "T2w", "FLAIR", "CT", "super_resolution")),
    Panel(CORTEX, "pial (red) and white (yellow) surface", "distance", _paint_surfaces),
    Panel(CORTEX, "ribbon (red) and white matter", "distance", _paint_ribbon),
    Panel(BIAS, "bias field (red: too bright)", "bias_field", _paint_bias_field),
    Panel(BIAS, "scan without it", "bias_field", _paint_corrected),
    Panel(TEMPLATE, "MNI152 laid over the scan", "template", _paint_template),
    Panel(TEMPLATE, "its outlines on the scan", "template", _paint_template_outline),
    Panel(TEMPLATE, f"predicted coordinates, every {GRID_STEP_MM} mm; 0 thick", "mni", _paint_mni),
    Panel(
        CERTAINTY,
        f"entropy of the labels: black certain, white {ENTROPY_TOP:g} of the maximum",
        "entropy",
        _paint_entropy,
    ),
)
