"""Triangles of a surface that cross another of its triangles: found, and taken apart without a change of topology."""

import numpy as np
from igl.predicates import find_intersections, find_self_intersections
from scipy import sparse

ROUNDS = 12  # in which crossings are taken apart
SMOOTHINGS = 2  # of the displacements in a round
HELD_ROUNDS = 3  # rounds before displacements also become shorter, and their neighbourhood wider
SHORTER = 0.8  # factor of a displacement in a later round


def find_crossing_faces(vertices: np.ndarray, faces: np.ndarray, moved: np.ndarray | None = None) -> np.ndarray:
    """Numbers, in order, of the triangles (F, 3) that another triangle of the surface crosses; vertices (V, 3) in mm.

    Triangles with a common vertex or edge cross if they meet elsewhere, too; the predicates of libigl are exact. Where
    only triangles with a ``moved`` vertex, (V,) bool, can cross another one, less is searched.
    """
    if moved is None:
        return np.asarray(np.unique(find_self_intersections(vertices, faces)[1]))
    changed = np.flatnonzero(moved[faces.T].any(axis=0))
    touching = np.zeros(len(vertices), dtype=bool)
    touching[faces[changed]] = True
    common = touching[faces.T].any(axis=0)  # triangles that have a vertex in common with a changed one
    around, apart = np.flatnonzero(common), np.flatnonzero(~common)
    points = vertices.astype(np.float64)
    within = find_self_intersections(points, faces[around])[1]
    between = find_intersections(points, faces[changed], points, faces[apart])[1]
    found = around[within].ravel(), changed[between[:, 0]], apart[between[:, 1]]
    return np.asarray(np.unique(np.concatenate(found)))


def remove_crossings(base: np.ndarray, moved: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, float]:
    """A surface that does not cross itself, out of one that may, and the share of triangles that still cross.

    Where triangles cross, and in the ring of triangles about them, the displacements from the base are averaged over
    the neighbours on the surface; after some rounds the displacements are shortened, too. The surface thereby
    approaches a base that does not cross itself; the rest of the surface stays as it is. (FreeSurfer smooths
    positions in the place of displacements, which shrinks gyri.) Vertices of the base and after the displacement are
    (V, 3), in mm; both have the same triangles (F, 3), a closed surface.
    """
    crossing = find_crossing_faces(moved, faces)
    if not len(crossing):
        return moved, 0.0
    edges = faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2)  # each edge once in each direction
    adjacency = sparse.csr_matrix((np.ones(len(edges), np.float32), edges.T), shape=[len(base)] * 2)
    displacement, vertices = moved - base, moved.copy()
    for number in range(ROUNDS):
        zone = np.zeros(len(base), dtype=bool)
        zone[faces[crossing]] = True
        for _ in range(1 + number // HELD_ROUNDS):
            zone[adjacency[zone].indices] = True
        rows = adjacency[zone]
        rows = sparse.diags(1 / np.diff(rows.indptr)).astype(np.float32) @ rows
        for _ in range(SMOOTHINGS):
            displacement[zone] = rows @ displacement
        if number >= HELD_ROUNDS:
            displacement[zone] *= SHORTER
        vertices[zone] = base[zone] + displacement[zone]
        crossing = find_crossing_faces(vertices, faces, zone)
        if not len(crossing):
            break
    return vertices, len(crossing) / len(faces)
