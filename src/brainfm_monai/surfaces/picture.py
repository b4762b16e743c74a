"""Pictures of a surface: a view from one side, and the line in which it passes through a slice."""

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

PIXEL_MM = 0.6
# places in a triangle, by its corners
SAMPLES = ((1, 1, 1), (4, 1, 1), (1, 4, 1), (1, 1, 4), (2, 2, 0), (0, 2, 2), (2, 0, 2))
CONTOUR_POINTS = np.linspace(0, 1, 6)[:, None]  # on each piece of a contour, which is at most 1.5 mm long
AMBIENT = 0.35  # share of the light that comes from everywhere
LIGHT = (0.35, 0.45, 0.82)  # to the right, above and towards the viewer


def draw_surface(
    vertices: np.ndarray, faces: np.ndarray, colours: np.ndarray, towards: tuple[float, float, float]
) -> np.ndarray:
    """Draw a surface as seen from far away, superior up.

    Args:
        vertices: RAS mm, shape (V, 3).
        faces: shape (F, 3), counter-clockwise seen from outside.
        colours: red, green and blue of each vertex in [0, 1], shape (V, 3).
        towards: direction from the surface to the viewer, horizontal: (-1, 0, 0) is the view from the left.

    Returns:
        Picture of shape (rows, columns, 4), uint8: red, green, blue and opacity; a pixel is 0.6 mm.
    """
    view = np.array(towards, dtype=np.float64)
    right = np.cross([0.0, 0.0, 1.0], view)  # the viewer's right, superior up
    frame = np.stack([right, [0.0, 0.0, 1.0], view])
    turned = vertices @ frame.T
    corners = turned[faces]
    normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    facing = normal[:, 2] > 0
    corners, normal = corners[facing], normal[facing]
    light = AMBIENT + (1 - AMBIENT) * (normal @ LIGHT / np.linalg.norm(normal, axis=1).clip(1e-9)).clip(0, 1)
    shaded = colours[faces[facing]].mean(axis=1) * light[:, None]
    weights = np.array(SAMPLES) / np.sum(SAMPLES, axis=1, keepdims=True)
    points = np.einsum("sc,fcx->sfx", weights, corners).reshape(-1, 3)
    first = turned.min(axis=0)
    column, row = ((points[:, :2] - first[:2]) / PIXEL_MM).astype(int).T
    size = ((turned.max(axis=0) - first)[:2] / PIXEL_MM).astype(int) + 1
    picture = np.zeros((size[1], size[0], 4), dtype=np.uint8)
    order = np.argsort(points[:, 2], kind="stable")  # the nearest is painted last
    painted = np.tile(shaded, (len(SAMPLES), 1))[order]
    picture[size[1] - 1 - row[order], column[order], :3] = (painted.clip(0, 1) * 255).astype(np.uint8)
    picture[size[1] - 1 - row, column, 3] = 255
    seen = picture[..., 3] > 0
    gaps = ndimage.binary_closing(seen, iterations=2) & ~seen  # pixels that no point of a triangle fell into
    nearest = ndimage.distance_transform_edt(~seen, return_distances=False, return_indices=True)
    picture[gaps] = picture[tuple(nearest[:, gaps])]
    return picture


def draw_contour(
    base: np.ndarray, points_mm: np.ndarray, vertices_mm: np.ndarray, faces: np.ndarray, colour: Sequence[float]
) -> np.ndarray:
    """Draw the line in which a surface passes through a slice.

    Args:
        base: picture of the slice, shape (rows, columns, 3), in [0, 1]; the result has this shape.
        points_mm: RAS mm of its pixels, of the same shape.
        vertices_mm: RAS mm, shape (V, 3).
        faces: shape (F, 3).
        colour: of the line.
    """
    origin = points_mm[0, 0]
    down, right = points_mm[1, 0] - origin, points_mm[0, 1] - origin
    height = (vertices_mm - origin) @ np.cross(down, right)
    edges = faces[:, [[0, 1], [1, 2], [2, 0]]]
    above = height[edges] > 0
    one, two = edges[
        above[..., 0] != above[..., 1]
    ].T  # two edges of each triangle that the slice cuts, one after the other
    share = (height[one] / (height[one] - height[two]))[:, None]
    crossings = (vertices_mm[one] + share * (vertices_mm[two] - vertices_mm[one])).reshape(-1, 2, 1, 3)
    points = (crossings[:, 0] + (crossings[:, 1] - crossings[:, 0]) * CONTOUR_POINTS).reshape(-1, 3) - origin
    place = np.rint(np.linalg.lstsq(np.stack([down, right], axis=1), points.T, rcond=None)[0]).astype(int).T
    place = place[((place >= 0) & (place < base.shape[:2])).all(axis=1)]
    drawn = base.copy()
    drawn[place[:, 0], place[:, 1]] = colour
    return drawn
