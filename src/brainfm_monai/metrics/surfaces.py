"""Measures of the surfaces of the cortex: distances, topology, crossings, and thickness from vertex to vertex."""

from __future__ import annotations

import numpy as np

__all__ = ["Mesh", "compare_surfaces", "compare_thickness", "compute_vertex_thickness"]

Mesh = tuple[np.ndarray, np.ndarray]  # vertices in mm, (V, 3), and their numbers in each triangle, (F, 3)

MEDIAL_WALL_MM = 0.1  # below it a reference has no cortex: both of its surfaces are one there


def _find_nearest(points: np.ndarray, mesh: Mesh) -> tuple[np.ndarray, np.ndarray]:
    """Distance of points, (N, 3), to the triangles of a mesh, (N,), and the nearest points on them, (N, 3)."""
    import igl  # an optional dependency

    vertices, faces = (np.ascontiguousarray(a, dtype=t) for a, t in zip(mesh, (np.float64, np.int64), strict=True))
    squared, _, nearest = igl.point_mesh_squared_distance(np.ascontiguousarray(points, np.float64), vertices, faces)
    return np.sqrt(squared), nearest


def compare_surfaces(pred: Mesh, reference: Mesh) -> dict[str, float]:
    """Distances between two surfaces, and what is wrong with the predicted one by itself.

    Args:
        pred: predicted surface.
        reference: true surface of the same space.

    Returns:
        ``to_reference_mean``, ``_median`` and ``_p95`` (95th percentile) of the distances from the vertices of the prediction to the
        triangles of the reference, mm; ``from_reference_*`` of those from the vertices of the reference to the prediction;
        ``euler_number`` of the prediction, 2 for a sphere and 2 less for each handle; ``crossing_share`` of its faces that cross
        another face.
    """
    import igl
    import igl.predicates

    measures = {}
    for name, distance in {
        "to_reference": _find_nearest(pred[0], reference)[0],
        "from_reference": _find_nearest(reference[0], pred)[0],
    }.items():
        measures[f"{name}_mean"] = float(distance.mean())
        measures[f"{name}_median"] = float(np.median(distance))
        measures[f"{name}_p95"] = float(np.percentile(distance, 95))
    vertices, faces = np.ascontiguousarray(pred[0], np.float64), np.ascontiguousarray(pred[1], np.int64)
    measures["euler_number"] = float(igl.euler_characteristic(faces))
    crossing = igl.predicates.find_self_intersections(vertices, faces)[1]
    measures["crossing_share"] = len(np.unique(crossing)) / len(faces)
    return measures


def compute_vertex_thickness(white: Mesh, pial: Mesh) -> np.ndarray:
    """Thickness of the cortex at the vertices of the white surface.

    It is the mean of two distances: from the vertex to the nearest point of the pial surface, and from that point back to the
    nearest one of the white surface.

    Args:
        white: white surface.
        pial: pial surface of the same hemisphere.

    Returns:
        Thickness in mm, shape (V,).

    Reference:
        Fischl and Dale, Measuring the thickness of the human cerebral cortex from magnetic resonance images, PNAS 97, 2000.
    """
    outwards, nearest = _find_nearest(white[0], pial)
    inwards, _ = _find_nearest(nearest, white)
    return np.asarray((outwards + inwards) / 2)


def compare_thickness(pred: tuple[Mesh, Mesh], reference: tuple[Mesh, Mesh]) -> dict[str, float]:
    """Error of the thickness at the vertices of the reference's white surface, without the medial wall.

    Args:
        pred: white and pial surface; the thickness at its vertex nearest to one of the reference is compared.
        reference: white and pial surface; the medial wall is where both are less than 0.1 mm apart.

    Returns:
        ``vertex_thickness`` and ``vertex_thickness_reference``, the means, ``vertex_thickness_bias``, their signed difference,
        ``vertex_thickness_error``, the mean of the magnitudes of the differences, mm; ``vertex_thickness_correlation``, Pearson's
        over the vertices.
    """
    from scipy.spatial import cKDTree

    true = compute_vertex_thickness(*reference)
    nearest = cKDTree(pred[0][0]).query(reference[0][0])[1]
    predicted = compute_vertex_thickness(*pred)[nearest]
    predicted, true = predicted[true > MEDIAL_WALL_MM], true[true > MEDIAL_WALL_MM]
    varies = len(true) > 1 and min(np.ptp(predicted), np.ptp(true)) > 0
    return {
        "vertex_thickness": float(predicted.mean()) if len(true) else np.nan,
        "vertex_thickness_reference": float(true.mean()) if len(true) else np.nan,
        "vertex_thickness_bias": float((predicted - true).mean()) if len(true) else np.nan,
        "vertex_thickness_error": float(np.abs(predicted - true).mean()) if len(true) else np.nan,
        "vertex_thickness_correlation": float(np.corrcoef(predicted, true)[0, 1]) if varies else np.nan,
    }
