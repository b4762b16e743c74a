"""The surfaces on the page: contours on slices of the scan, and each hemisphere from both sides, coloured by thickness."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from brainfm_monai.outputs import ScanResult, grow_surfaces, measure_thickness
from brainfm_monai.slices import Cell, Slice, heat

if TYPE_CHECKING:
    from brainfm_monai.surfaces import Hemisphere

__all__ = ["draw_contour", "draw_surface_cells", "surface_caption"]

WHITE_COLOUR, PIAL_COLOUR = (1.0, 0.9, 0.2), (1.0, 0.25, 0.25)
POINTS = np.linspace(0, 1, 6)  # drawn on each piece of a contour, which is at most 1.5 mm long
THICKEST_MM = 5.0  # white in the views
LEFT, RIGHT = (-1.0, 0.0, 0.0), (1.0, 0.0, 0.0)  # directions towards the viewer
VIEWS = {
    "L": (("left hemisphere, from the left", LEFT, "AP"), ("left hemisphere, medial side", RIGHT, "PA")),
    "R": (("right hemisphere, from the right", RIGHT, "PA"), ("right hemisphere, medial side", LEFT, "AP")),
}


def draw_contour(
    picture: np.ndarray, cut: Slice, vertices_mm: np.ndarray, faces: np.ndarray, colour: Sequence[float]
) -> np.ndarray:
    """Draw the line in which a surface passes through a slice.

    Args:
        picture: of the slice, shape (rows, columns, 3), in [0, 1].
        cut: the slice.
        vertices_mm: RAS mm, shape (V, 3).
        faces: shape (F, 3).
        colour: of the line.

    Returns:
        A picture of the same shape.
    """
    origin = cut.points_mm[0, 0]
    down, right = cut.points_mm[1, 0] - origin, cut.points_mm[0, 1] - origin
    normal = np.cross(down, right)
    height = (vertices_mm - origin) @ normal
    above = height[faces] > 0
    crossed = faces[above.any(axis=1) & ~above.all(axis=1)]
    drawn = picture.copy()
    if not len(crossed):
        return drawn
    ends = []
    for number in range(3):  # the corner that is alone on its side, and its edges to the two others
        one, two, three = (crossed[:, (number + k) % 3] for k in range(3))
        alone = ((height[one] > 0) != (height[two] > 0)) & ((height[one] > 0) != (height[three] > 0))
        pair = []
        for opposite in (two[alone], three[alone]):
            share = height[one[alone]] / (height[one[alone]] - height[opposite])
            pair.append(vertices_mm[one[alone]] + share[:, None] * (vertices_mm[opposite] - vertices_mm[one[alone]]))
        ends.append(np.stack(pair))
    start, end = np.concatenate(ends, axis=1)
    points = (start[:, None] + (end - start)[:, None] * POINTS[:, None]).reshape(-1, 3) - origin
    place = np.rint(np.linalg.lstsq(np.stack([down, right], axis=1), points.T, rcond=None)[0]).astype(int).T
    place = place[((place >= 0) & (place < picture.shape[:2])).all(axis=1)]
    drawn[place[:, 0], place[:, 1]] = colour
    return drawn


def draw_surface_cells(
    scan: ScanResult, slices: Sequence[Slice], draw_scan: Callable[[Slice], np.ndarray]
) -> list[list[Cell]]:
    """Rows of the page: contours of both surfaces on slices, then both hemispheres from both sides."""
    hemispheres = grow_surfaces(scan)
    contours = []
    for number, cut in enumerate(slices):
        picture = draw_scan(cut)
        for surface in hemispheres.values():
            picture = draw_contour(picture, cut, surface.white_mm, surface.faces, WHITE_COLOUR)
            picture = draw_contour(picture, cut, surface.pial_mm, surface.faces, PIAL_COLOUR)
        contours.append(Cell(picture, cut.plane.marks, "" if number else "pial (red) and white (yellow) surface"))
    return [contours, *_view_rows(hemispheres, measure_thickness(scan))]


def _view_rows(hemispheres: Mapping[str, Hemisphere], thickness: Mapping[str, np.ndarray]) -> list[list[Cell]]:
    from brainfm_monai.surfaces import draw_surface  # needs scipy

    cells = []
    for letter, surface in hemispheres.items():
        colours = heat(thickness[letter][:, None], THICKEST_MM)[:, 0]
        for title, towards, marks in VIEWS[letter]:
            picture = draw_surface(surface.pial_mm, surface.faces, colours, towards)
            cells.append(Cell(picture[..., :3] / 255, marks, title))
    return [cells] if cells else []


def surface_caption(scan: ScanResult) -> str:
    """What the pictures show, and the quality of the surfaces."""
    words = [f"the pial surface is coloured by thickness: black 0, white {THICKEST_MM:g} mm"]
    for letter in grow_surfaces(scan):
        numbers = {
            name: scan.summary.get(f"{name}_{letter}_pial", "n/a") for name in ("euler_number", "crossing_share")
        }
        closed = float(grow_surfaces(scan)[letter].closed.mean())
        words.append(
            f"{letter}: Euler number {numbers['euler_number']}, share of crossing triangles {numbers['crossing_share']}, "
            f"of vertices in closed sulci {closed:.2f}"
        )
    return "; ".join(words)
