"""What is measured and drawn of triangle surfaces: sizes, thickness, curvature, topology, crossings, views, contours.

A surface is vertices in RAS mm, shape (V, 3), and triangles, shape (F, 3), counter-clockwise seen from outside.
"""

from collections.abc import Sequence

import igl
import numpy as np
from scipy.spatial import cKDTree

from brainfm_monai.surfaces.crossings import find_crossing_faces

PIXEL_MM = 0.6  # of a view
AMBIENT = 0.35  # share of the light that comes from everywhere
LIGHT = (0.35, 0.45, 0.82)  # to the right, above and towards the viewer
LEAF_SIZE = 64  # points of a leaf of the tree of a surface: of 10 to 64 the fastest
CONTOUR_POINTS = np.linspace(0, 1, 6)[:, None]  # on each piece of a contour, which is at most 1.5 mm long


def compute_euler_number(faces: np.ndarray) -> int:
    """Vertices minus edges plus faces: 2 for a sphere, 2 less for each handle, 2 more for each further piece."""
    end = int(faces.max()) + 1
    ends = faces.reshape(-1).astype(np.int64), faces[:, [1, 2, 0]].reshape(-1).astype(np.int64)
    edges = np.sort(np.minimum(*ends) * end + np.maximum(*ends))
    return int(np.count_nonzero(np.bincount(ends[0])) - 1 - np.count_nonzero(np.diff(edges)) + len(faces))


def compute_thickness_mm(white: np.ndarray, pial: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Thickness of the cortex at each vertex, mm, (V,): the mean of the distances from each surface to the other.

    It is FreeSurfer's definition (Fischl and Dale, Measuring the thickness of the human cerebral cortex from magnetic
    resonance images, PNAS 2000). Both surfaces have vertices (V, 3) in correspondence, and the same triangles. The
    distances to the nearest vertex or centre of a triangle are, with edges of 0.7 mm, 0.01 mm too long 2 mm away.
    """
    distances = []
    for points, vertices in ((white, pial), (pial, white)):
        a, b, c = vertices[faces.T]
        targets = np.concatenate([vertices, (a + b + c) / 3])
        tree = cKDTree(targets, LEAF_SIZE, compact_nodes=False, balanced_tree=False)
        distances.append(tree.query(points, workers=-1)[0])
    return (sum(distances) / 2).astype(np.float32)


def compute_areas_mm2(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Area that belongs to each vertex, a third of its triangles, shape (V,); the sum is that of the surface."""
    a, b, c = np.moveaxis(vertices.T[:, faces.T], 1, 0)
    thirds = np.repeat(np.linalg.norm(np.cross(b - a, c - a, axis=0), axis=0) / 6, 3)
    return np.bincount(faces.reshape(-1), thirds, minlength=len(vertices))


def compute_volume_mm3(vertices: np.ndarray, faces: np.ndarray) -> float:
    """Volume inside a closed surface whose triangles are counter-clockwise seen from outside (divergence theorem)."""
    a, b, c = (vertices - vertices.mean(axis=0))[faces.T].astype(np.float64)
    return float(np.einsum("ij,ij->", np.cross(a, b), c) / 6)


def compute_mean_curvature(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """Mean curvature at each vertex in 1/mm, (V,), positive where the surface is convex (1/r on a sphere of radius r).

    The Laplacian of the coordinates with cotangent weights is twice the mean curvature times the inward normal (Meyer,
    Desbrun, Schroeder, Barr, Discrete differential-geometry operators for triangulated 2-manifolds, 2003).
    """
    count, points = len(vertices), vertices.T.astype(np.float64)
    corners = points[:, faces.T]
    normal = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0], axis=0)
    doubled = np.linalg.norm(normal, axis=0)  # areas
    laplacian = np.zeros((3, count))
    for i, j, k in ((0, 1, 2), (1, 2, 0), (2, 0, 1)):
        cotangent = np.einsum("ij,ij->j", corners[:, j] - corners[:, i], corners[:, k] - corners[:, i])
        cotangent = (cotangent / np.maximum(doubled, 1e-6)).clip(-5, 5)  # clipped in slivers
        pull = cotangent / 2 * (corners[:, k] - corners[:, j])
        laplacian += [np.bincount(faces[:, j], one, count) - np.bincount(faces[:, k], one, count) for one in pull]
    normals = np.stack([np.bincount(faces.reshape(-1), np.repeat(axis, 3), count) for axis in normal])
    normals = normals / np.maximum(np.linalg.norm(normals, axis=0), 1e-12)
    area = np.maximum(np.bincount(faces.reshape(-1), np.repeat(doubled / 6, 3), count), 1e-6)
    return (-np.einsum("ij,ij->j", laplacian, normals) / (2 * area)).astype(np.float32)


def compute_crossing_share(vertices: np.ndarray, faces: np.ndarray) -> float:
    """Share, from 0 to 1, of the triangles of a surface that another of its triangles crosses."""
    return len(find_crossing_faces(vertices, faces)) / len(faces)


def draw_surface(vertices: np.ndarray, faces: np.ndarray, colours: np.ndarray, towards: Sequence[float]) -> np.ndarray:
    """Draw a surface as seen from far away, superior up: (rows, columns, 4), uint8, colours and opacity.

    Each vertex has red, green and blue in [0, 1], shape (V, 3). The horizontal direction ``towards`` leads from the
    surface to the viewer: (-1, 0, 0) is the view from the left.
    """
    up = np.array([0.0, 0.0, 1.0])
    turned = vertices.astype(np.float64) @ np.stack([np.cross(up, towards), up, towards]).T  # right, up, to the viewer
    normals = igl.per_vertex_normals(turned, faces.astype(np.int64))
    shaded = colours * (AMBIENT + (1 - AMBIENT) * (normals @ LIGHT).clip(0, 1))[:, None]
    place = (turned - turned.min(axis=0)) / PIXEL_MM
    columns, rows, _ = place.max(axis=0).astype(int) + 1
    drawn = np.concatenate([place, shaded.clip(0, 1) * 255], axis=1).astype(np.float32)
    (x, y), (a, b, c) = drawn[:, :2].T.copy(), faces.T
    one, two = (x[b] - x[a], y[b] - y[a]), (x[c] - x[a], y[c] - y[a])
    facing = one[0] * two[1] > one[1] * two[0]
    (x, y), (u, v), corners = np.array(one)[:, facing], np.array(two)[:, facing], faces[facing]
    steps = np.ceil(np.sqrt(np.max([x * x + y * y, u * u + v * v, (u - x) ** 2 + (v - y) ** 2], axis=0))).astype(int)
    parts = []
    for n in np.unique(steps):  # places less than a pixel apart in triangles of n pixels
        shares = np.array([(i, j, n - i - j) for i in range(n + 1) for j in range(n + 1 - i)]) / n
        parts.append(np.tensordot(shares.astype(np.float32), drawn[corners[steps == n]], (1, 1)).reshape(-1, 6))
    points = np.concatenate(parts)
    # The nearest point of a pixel has the largest number of depth and place: bits of numbers from 0 on rise as they do.
    depths = points[:, 2].copy().view(np.uint32).astype(np.uint64)
    row, column = points[:, 1].astype(int).clip(0, rows - 1), points[:, 0].astype(int).clip(0, columns - 1)
    pixels = (rows - 1 - row) * columns + column
    nearest = np.zeros(rows * columns, dtype=np.uint64)
    np.maximum.at(nearest, pixels, (depths << np.uint64(32)) + np.arange(1, len(points) + 1, dtype=np.uint64))
    seen = np.flatnonzero(nearest)
    picture = np.zeros((rows * columns, 4), dtype=np.uint8)
    picture[seen, :3] = points[(nearest[seen] & np.uint64(0xFFFFFFFF)) - np.uint64(1), 3:]
    picture[seen, 3] = 255
    return picture.reshape(rows, columns, 4)


def draw_contour(
    base: np.ndarray, points_mm: np.ndarray, vertices_mm: np.ndarray, faces: np.ndarray, colour: Sequence[float]
) -> np.ndarray:
    """Draw the line in which a surface passes through a slice: its picture ``base``, with pixels at ``points_mm``.

    Both have the shape (rows, columns, 3), as the result; colours lie in [0, 1], points are RAS mm.
    """
    origin = points_mm[0, 0]
    down, right = points_mm[1, 0] - origin, points_mm[0, 1] - origin
    height = (vertices_mm - origin) @ np.cross(down, right)
    above = height > 0
    a, b, c = above[faces].T
    edges = faces[(a != b) | (b != c)][:, [[0, 1], [1, 2], [2, 0]]]
    one, two = edges[above[edges[..., 0]] != above[edges[..., 1]]].T  # two edges of each triangle, one after the other
    share = (height[one] / (height[one] - height[two]))[:, None]
    crossings = (vertices_mm[one] + share * (vertices_mm[two] - vertices_mm[one])).reshape(-1, 2, 1, 3)
    points = (crossings[:, 0] + (crossings[:, 1] - crossings[:, 0]) * CONTOUR_POINTS).reshape(-1, 3) - origin
    place = np.rint(np.linalg.lstsq(np.stack([down, right], axis=1), points.T, rcond=None)[0]).astype(int).T
    place = place[((place >= 0) & (place < base.shape[:2])).all(axis=1)]
    drawn = base.copy()
    drawn[place[:, 0], place[:, 1]] = colour
    return drawn
