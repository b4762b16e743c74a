"""The cortex: distance maps, ribbon, thickness, and white and pial surfaces in scanner coordinates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import nibabel as nib
import numpy as np

from brainfm_monai.io import write_table
from brainfm_monai.outputs.images import save_map
from brainfm_monai.outputs.result import ScanResult
from brainfm_monai.transforms import MODES

__all__ = ["Surface", "compute_ribbon", "compute_thickness_mm", "extract_surface", "write_distances", "write_surfaces"]

HEMISPHERES = {
    "left": ("L", "l", 2, 3),
    "right": ("R", "r", 41, 42),
}  # BIDS letter, channel letter, ids of white matter and cortex
SURFACES = {"w": "white", "p": "pial"}
DISTANCE_STEP_MM = 0.01
MINIMUM_FACES = 4  # a tetrahedron, the smallest closed surface


@dataclass(frozen=True)
class Surface:
    """A triangle surface.

    Attributes:
        vertices_mm: RAS mm of the scanner, shape (V, 3), float32.
        faces: vertex numbers, shape (F, 3), int32, counter-clockwise seen from outside.
        components: number of connected pieces that were found, of which this is the largest.
    """

    vertices_mm: np.ndarray
    faces: np.ndarray
    components: int

    @property
    def euler_number(self) -> int:
        """Vertices minus edges plus faces: 2 for a sphere, 2 less for each handle, 1 less for each hole in a sheet."""
        edges = np.sort(self.faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2), axis=1)
        return len(self.vertices_mm) - len(np.unique(edges, axis=0)) + len(self.faces)

    @property
    def area_mm2(self) -> float:
        """Sum of the areas of the triangles."""
        a, b, c = (self.vertices_mm[self.faces[:, i]] for i in range(3))
        return float(np.linalg.norm(np.cross(b - a, c - a), axis=1).sum() / 2)


def extract_surface(distance: np.ndarray, affine: np.ndarray) -> Surface | None:
    """Largest connected piece of the surface on which a signed distance is 0.

    Args:
        distance: negative inside, shape (H, W, D).
        affine: its voxel indices to RAS mm, shape (4, 4).

    Returns:
        The surface, closed also where the image ends; None where the distance has no zero.
    """
    from skimage.measure import marching_cubes  # an optional dependency

    inside = distance < 0
    if not inside.any() or inside.all():
        return None
    box = tuple(slice(max(int(i.min()) - 2, 0), int(i.max()) + 3) for i in np.nonzero(inside))
    # what lies beyond the image is outside: the surface is closed there
    part = np.pad(distance[box], 1, constant_values=float(np.abs(distance).max()))
    vertices, faces, _, _ = marching_cubes(part, level=0.0, gradient_direction="descent")
    if len(faces) < MINIMUM_FACES:
        return None
    vertices = vertices - 1 + np.array([axis.start for axis in box])
    piece, count = _pieces(len(vertices), faces)
    largest = np.bincount(piece[faces[:, 0]]).argmax()
    kept = np.flatnonzero(piece == largest)
    number = np.zeros(len(vertices), dtype=np.int32)
    number[kept] = np.arange(len(kept))
    faces = number[faces[piece[faces[:, 0]] == largest]]
    vertices_mm = vertices[kept] @ affine[:3, :3].T + affine[:3, 3]
    # the order of corners is that of voxel indices: a grid that mirrors space turns the triangles inside out
    if np.linalg.det(affine[:3, :3]) < 0:
        faces = faces[:, ::-1]
    return Surface(vertices_mm.astype(np.float32), np.ascontiguousarray(faces, dtype=np.int32), count)


def _pieces(count: int, faces: np.ndarray) -> tuple[np.ndarray, int]:
    """Number of the connected piece that each vertex belongs to, and how many there are."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    links = faces[:, [0, 1, 1, 2]].reshape(-1, 2)
    graph = coo_matrix((np.ones(len(links), dtype=bool), links.T), shape=(count, count))
    pieces, of_vertex = connected_components(graph, directed=False)
    return np.asarray(of_vertex), int(pieces)


def compute_ribbon(distance: dict[str, np.ndarray]) -> np.ndarray:
    """Label the hemispheres as FreeSurfer's ribbon does: 2 and 41 within the white surface, 3 and 42 between it and the pial one.

    Args:
        distance: signed distances ``lp``, ``lw``, ``rp``, ``rw`` of one shape; a hemisphere may be missing.

    Returns:
        uint8 array of that shape. Where both hemispheres claim a voxel, the one that it lies deeper in has it.
    """
    shape = next(iter(distance.values())).shape
    ribbon, depth = np.zeros(shape, dtype=np.uint8), np.zeros(shape, dtype=np.float32)
    for _, letter, white_id, cortex_id in HEMISPHERES.values():
        if letter + "p" in distance:
            pial, white = distance[letter + "p"], distance[letter + "w"]
            nearest = np.minimum(pial, white)
            deeper = nearest < depth
            ribbon[deeper] = np.where(white < 0, white_id, cortex_id)[deeper]
            depth = np.minimum(depth, nearest)
    return ribbon


def compute_thickness_mm(distance: dict[str, np.ndarray], ribbon: np.ndarray) -> np.ndarray:
    """Thickness of the cortex: in each voxel of it the distance to the white plus the distance to the pial surface; else 0.

    Distances end at 3 mm, so that no voxel can show more than 6 mm.
    """
    thickness = np.zeros(ribbon.shape, dtype=np.float32)
    for _, letter, _, cortex_id in HEMISPHERES.values():
        if letter + "p" in distance:
            cortex = ribbon == cortex_id
            thickness[cortex] = (distance[letter + "w"] - distance[letter + "p"])[cortex]
    return thickness.clip(min=0)


def write_distances(scan: ScanResult) -> None:
    """Write the distance maps, the cortical ribbon and the thickness map, in the grid of the files."""
    distance = scan.in_grid("distance")
    names = scan.layout.tasks["distance"].channel_names
    text = "signed distance to the surfaces, negative inside, clipped at 3 mm; l, r: hemisphere, p, w: pial, white"
    save_map(scan, "distance", np.moveaxis(distance, 0, -1), text)
    known = _shown_hemispheres(scan, dict(zip(names, distance, strict=True)))
    ribbon = compute_ribbon(known)
    thickness = compute_thickness_mm(known, ribbon)
    scan.save_image(
        "desc-ribbon_dseg", ribbon, Description="2, 41: left and right white matter; 3, 42: left and right cortex"
    )
    scan.save_image(
        "thickness", thickness, step=DISTANCE_STEP_MM, Units="mm", Description="distance to white + to pial surface"
    )
    cortex = thickness[thickness > 0]
    scan.summary["cortical_thickness_mm"] = round(float(np.median(cortex)), 3) if cortex.size else "n/a"


def write_surfaces(scan: ScanResult) -> None:
    """Write white and pial surfaces as GIFTI, thickness at the vertices of the white ones, and a table of both.

    They are taken from the distances in the network's grid, where these were computed.
    """
    distance = dict(zip(scan.layout.tasks["distance"].channel_names, scan.maps["distance"].cpu().numpy(), strict=True))
    distance = _shown_hemispheres(scan, distance)
    rows = []
    for letter, channel, _, _ in HEMISPHERES.values():
        for kind, name in SURFACES.items():
            surface = (
                extract_surface(distance[channel + kind], scan.network_affine) if channel + kind in distance else None
            )
            if surface is None:
                continue
            thickness = _sample(distance[channel + "w"] - distance[channel + "p"], surface, scan.network_affine)
            _save_surface(scan, f"hemi-{letter}_{name}", surface, thickness if kind == "w" else None)
            numbers = (len(surface.vertices_mm), len(surface.faces), surface.euler_number, surface.components)
            rows.append((letter, name, *numbers, f"{surface.area_mm2:.0f}", f"{np.median(thickness):.3f}"))
            scan.summary[f"euler_number_{letter}_{name}"] = surface.euler_number
    columns = (
        "hemisphere",
        "surface",
        "vertices",
        "faces",
        "euler_number",
        "components_found",
        "area_mm2",
        "median_thickness_mm",
    )
    write_table(scan.path("surfaces.tsv"), columns, rows)


def _shown_hemispheres(scan: ScanResult, distance: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Distances of the hemispheres that the mode leaves in."""
    left_out = MODES[scan.settings.mode].excluded_side[:1]
    return {name: value for name, value in distance.items() if not left_out or not name.startswith(left_out)}


def _sample(volume: np.ndarray, surface: Surface, affine: np.ndarray) -> np.ndarray:
    """Values at the vertices, linearly interpolated."""
    from scipy.ndimage import map_coordinates

    inverse = np.linalg.inv(affine)
    index = surface.vertices_mm @ inverse[:3, :3].T + inverse[:3, 3]
    return np.asarray(map_coordinates(volume, index.T, order=1, mode="nearest"), dtype=np.float32)


def _save_surface(scan: ScanResult, suffix: str, surface: Surface, thickness: np.ndarray | None) -> None:
    scanner: Any = nib.gifti.GiftiCoordSystem("NIFTI_XFORM_SCANNER_ANAT", "NIFTI_XFORM_SCANNER_ANAT", np.eye(4))
    arrays = [
        nib.gifti.GiftiDataArray(surface.vertices_mm, "NIFTI_INTENT_POINTSET", coordsys=scanner),
        nib.gifti.GiftiDataArray(surface.faces, "NIFTI_INTENT_TRIANGLE"),
    ]
    nib.save(nib.GiftiImage(darrays=arrays), scan.path(f"{suffix}.surf.gii"))
    if thickness is not None:
        shape = nib.gifti.GiftiDataArray(thickness, "NIFTI_INTENT_SHAPE")
        nib.save(nib.GiftiImage(darrays=[shape]), scan.path(f"{suffix.split('_')[0]}_thickness.shape.gii"))
    scan.write_sidecar(f"{suffix}.surf", Units="mm, RAS of the scanner", EulerNumber=surface.euler_number)
