"""A triangle surface with the topology of a sphere out of a level function on a grid.

The grid is read as a Freudenthal triangulation: each cube of eight voxels is cut into six tetrahedra along its main
diagonal, so that a voxel has 14 neighbours, for inside and outside alike, and its neighbours form a triangulated sphere
(the link). A voxel can be added to the inside without a change of topology if its neighbours inside are connected and
not empty, and its neighbours outside are, too. The inside grows from one voxel, in the order of the level, by such
voxels alone (Bazin and Pham, Topology correction of segmented medical images using a fast marching algorithm, 2007): it
stays a ball. Marching tetrahedra then give its boundary, a sphere by construction, without a table of ambiguous cubes.
"""

from functools import lru_cache
from itertools import permutations

import numpy as np
from scipy import ndimage, sparse

CORNERS = np.array(list(np.ndindex(2, 2, 2)))  # of a cube
EDGES = CORNERS[1:]  # the seven directions of edges
NEIGHBOURS = np.concatenate([EDGES, -EDGES])
LEVELS = 32  # groups of voxels of similar level that are added one after the other
CELL = 6.0  # voxels or mm: vertices and triangles are ordered by cells of this size
NUDGE = 0.05  # level, in mm, of voxels that were moved across the surface, and least share of an edge before a vertex


@lru_cache(maxsize=1)
def _simple_configurations() -> np.ndarray:
    """Whether a voxel with the neighbours inside that the 14 bits of the index tell is simple, shape (2^14,), bool."""
    step = NEIGHBOURS[:, None] - NEIGHBOURS[None]
    adjacent = ((step.min(-1) >= 0) & (step.max(-1) <= 1)) | ((step.max(-1) <= 0) & (step.min(-1) >= -1))
    inside = (np.arange(2**14)[:, None] >> np.arange(14)) & 1
    one, two = np.nonzero(np.triu(adjacent, 1))
    case, pair = np.nonzero(inside[:, one] == inside[:, two])
    ends = case * 14 + one[pair], case * 14 + two[pair]
    graph = sparse.csr_matrix((np.ones(len(case), dtype=bool), ends), shape=[inside.size] * 2)
    pieces = np.sort(sparse.csgraph.connected_components(graph, directed=False)[1].reshape(-1, 14))
    return np.asarray(np.count_nonzero(np.diff(pieces), axis=1) == 1)  # one piece inside, and one outside


def grow_ball(level: np.ndarray) -> np.ndarray:
    """The largest ball inside a surface that grows from the deepest voxel in the order of depth.

    The level, (H, W, D), is negative inside. The result, bool, has the voxels that are connected like a ball (one
    piece, no handle, no cavity): of the negative voxels it lacks those that would close a handle, and pieces apart.
    ValueError if no voxel is inside, or the inside reaches the border.
    """
    negative = level < 0
    border = [negative[[0, -1]].any(), negative[:, [0, -1]].any(), negative[:, :, [0, -1]].any()]
    if not negative.any() or any(border):
        needed = "a level with an inside that does not reach the border"
        raise ValueError(f"grow_ball: {needed} is needed, found none or one that does")
    simple = _simple_configurations()
    offsets = NEIGHBOURS @ [level.shape[1] * level.shape[2], level.shape[2], 1]
    flat = level.reshape(-1)
    candidates = np.flatnonzero(negative)
    candidates = candidates[np.argsort(flat[candidates], kind="stable")]
    # Voxels of one parity along all axes are no neighbours: all simple ones among them can be added at once.
    parity = np.stack(np.unravel_index(candidates, level.shape), axis=-1) % 2 @ [1, 2, 4]
    inside, waiting = np.zeros(flat.size, dtype=bool), np.zeros(flat.size, dtype=bool)
    inside[candidates[0]] = True
    waiting[candidates[0] + offsets] = True
    for end in np.linspace(0, len(candidates), LEVELS + 1).astype(int)[1:]:
        reachable, outside = candidates[:end], ~inside[candidates[:end]]
        groups = [reachable[outside & (parity[:end] == i)] for i in range(8)]
        grown = True
        while grown:
            grown = False
            for i, group in enumerate(groups):
                tested = group[waiting[group]]
                waiting[tested] = False
                bits = inside[tested[:, None] + offsets] @ (1 << np.arange(14))
                added = tested[simple[bits]]
                if len(added):
                    inside[added] = True
                    waiting[(added[:, None] + offsets).reshape(-1)] = True
                    waiting[added] = False
                    groups[i], grown = group[~inside[group]], True
    return inside.reshape(level.shape)


@lru_cache(maxsize=1)
def _tetrahedra() -> list[tuple[np.ndarray, list[list[tuple[int, int]]]]]:
    """Corners (4, 3) of each tetrahedron of a cube, and for each of the 16 cases of corners inside its triangles.

    A triangle is three edges, counter-clockwise seen from outside; an edge is two corners, the lower one first.
    """
    table = []
    for order in permutations(range(3)):
        corners = np.concatenate([np.zeros((1, 3), int), np.cumsum(np.eye(3, dtype=int)[list(order)], axis=0)])
        cases = []
        for case in range(16):
            within = [i for i in range(4) if case >> i & 1]
            beyond = [i for i in range(4) if not case >> i & 1]
            ring = [(i, j) for i in within for j in beyond]
            if len(within) == 2:
                ring[2:] = ring[:1:-1]  # the four edges one after the other
            middle = [(corners[i] + corners[j]) / 2 for i, j in ring]
            if ring:
                outwards = corners[beyond].mean(0) - corners[within].mean(0)
                if np.cross(middle[1] - middle[0], middle[2] - middle[0]) @ outwards < 0:
                    ring = ring[::-1]
            edges = [(min(edge), max(edge)) for edge in ring]
            cases.append([edge for k in range(2, len(edges)) for edge in (edges[0], edges[k - 1], edges[k])])
        table.append((corners, cases))
    return table


def extract_sphere(level: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boundary of the ball inside a level (H, W, D), negative inside, in mm, as triangles; see :func:`grow_ball`.

    Returns vertices in voxel indices, (V, 3); triangles, (F, 3), counter-clockwise seen from the side of positive
    levels in a right-handed grid; and the level of which the vertices are the zeros: voxels that the ball lacks or that
    were filled have another sign than before.
    """
    cavities = ndimage.binary_fill_holes(level < 0) & (level >= 0)
    level = np.where(cavities, -NUDGE, level)
    level = np.pad(level, 1, constant_values=float(np.abs(level).max()) + NUDGE)
    ball = grow_ball(level)
    level = np.where(ball, np.minimum(level, -NUDGE), np.maximum(level, NUDGE))
    strides = np.array([level.shape[1] * level.shape[2], level.shape[2], 1])
    inside, flat = ball.reshape(-1), level.reshape(-1)
    counted = ball.view(np.uint8)
    surrounding = sum(counted[x : x - 1 or None, y : y - 1 or None, z : z - 1 or None] for x, y, z in CORNERS)
    cells = np.argwhere((surrounding > 0) & (surrounding < 8)) @ strides
    codes = []
    for corners, cases in _tetrahedra():
        places = cells[:, None] + corners @ strides
        case = inside[places] @ (1 << np.arange(4))
        for number in range(1, 15):
            low, high = np.array(cases[number]).T
            edges = places[case == number][:, low] * 8 + (corners[high] - corners[low]) @ [4, 2, 1]
            codes += [edges[:, k : k + 3] for k in range(0, len(low), 3)]
    # an edge of the grid is one number: its lower voxel, and its direction
    used, faces = _renumber(np.concatenate(codes), 8 * flat.size)
    first, direction = used // 8, EDGES[used % 8 - 1]
    second = first + direction @ strides
    position = (flat[first] / (flat[first] - flat[second])).clip(NUDGE, 1 - NUDGE)
    start = np.stack(np.unravel_index(first, level.shape), axis=-1)
    vertices = start + position[:, None] * direction - 1
    vertices, faces = merge_vertices(vertices, faces, np.where(position < 0.5, first, second))
    # by cells of a coarse grid: what is near in space is near in memory, and searches and samples take less time
    numbers = ((vertices - vertices.min(axis=0)) // CELL).astype(np.int64) @ [1 << 20, 1 << 10, 1]
    order = np.argsort(numbers, kind="stable")
    vertices, faces = vertices[order], np.argsort(order)[faces]
    return vertices, faces[np.argsort(faces[:, 0], kind="stable")], level[1:-1, 1:-1, 1:-1]


def _renumber(numbers: np.ndarray, end: int) -> tuple[np.ndarray, np.ndarray]:
    """Which numbers below an end there are, in order, and the place of each among them: faster than np.unique."""
    place = np.zeros(end, dtype=np.int32)
    place[numbers] = 1
    present = np.flatnonzero(place)
    place[present] = np.arange(len(present), dtype=np.int32)
    return present, place[numbers]


def merge_vertices(vertices: np.ndarray, faces: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A closed surface in which neighbours of one group became one vertex, in their middle; of the same topology.

    Marching tetrahedra give two or three times more triangles than needed, many of them slivers; the vertices around a
    point of the grid become one (Treece, Prager and Gee, Regularised marching tetrahedra, Computers & Graphics 1999).
    Neighbours of a group are merged if they make up a disc (vertices - edges + triangles = 1), which changes no
    topology. Where two edges would then become one, their vertices are left as they were. Of vertices (V, 3) and
    triangles (F, 3), all turned the same way, ``groups`` are the numbers of the groups of the vertices, (V,).
    """
    count = len(vertices)
    alone = np.zeros(count, dtype=bool)
    one, two = faces.reshape(-1), faces[:, [1, 2, 0]].reshape(-1)
    one, two = one[one < two], two[one < two]  # every edge is there twice, once in each direction
    joined = groups[one] == groups[two]
    graph = sparse.csr_matrix((np.ones(joined.sum(), dtype=bool), (one[joined], two[joined])), shape=(count, count))
    pieces, piece = sparse.csgraph.connected_components(graph, directed=False)
    a, b, c = piece[faces].T
    parts = (piece, piece[one[joined]], a[(a == b) & (a == c)])
    characteristic = np.array([1, -1, 1]) @ [np.bincount(part, minlength=pieces) for part in parts]
    first = np.empty(pieces, dtype=np.int64)
    first[piece[::-1]] = np.arange(count)[::-1]  # vertex of each piece
    disc = characteristic[piece] == 1
    while True:
        label = np.where(alone, np.arange(count), np.where(disc, first[piece], count + np.arange(count)))
        kept, label = _renumber(label, 2 * count)
        a, b, c = label[faces].T
        whole = (a != b) & (b != c) & (c != a)
        merged = np.stack([a[whole], b[whole], c[whole]], axis=1)
        edges = merged.astype(np.int64) * len(kept) + merged[:, [1, 2, 0]]
        ordered = np.sort(edges, axis=None)
        twice = ordered[:-1][ordered[1:] == ordered[:-1]]
        if not len(twice):
            break
        alone |= np.isin(label, np.concatenate([twice // len(kept), twice % len(kept)]))
    sizes = np.bincount(label)
    middle = np.stack([np.bincount(label, axis) for axis in vertices.T], axis=1) / sizes[:, None]
    return middle, merged
