"""A view of a surface from one side, coloured by a number at each vertex."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

__all__ = ["draw_surface"]

PIXEL_MM = 0.6
SAMPLES = (
    (1, 1, 1),
    (4, 1, 1),
    (1, 4, 1),
    (1, 1, 4),
    (2, 2, 0),
    (0, 2, 2),
    (2, 0, 2),
)  # places in a triangle, by its corners
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
