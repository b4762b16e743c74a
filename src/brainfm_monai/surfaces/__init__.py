"""White and pial surfaces as triangles: topology, growth, measures and pictures; numpy, scipy and torch, no files."""

from brainfm_monai.surfaces.crossings import find_crossing_faces, remove_crossings
from brainfm_monai.surfaces.growth import Hemisphere, grow_hemisphere, grow_hemispheres
from brainfm_monai.surfaces.measures import (
    compute_areas_mm2,
    compute_crossing_share,
    compute_distances_mm,
    compute_euler_number,
    compute_mean_curvature,
    compute_thickness_mm,
    compute_volume_mm3,
    draw_contour,
    draw_surface,
)
from brainfm_monai.surfaces.topology import extract_sphere, grow_ball, merge_vertices

__all__ = ["Hemisphere", "compute_areas_mm2", "compute_crossing_share", "compute_distances_mm", "compute_euler_number"]
__all__ += ["compute_mean_curvature", "compute_thickness_mm", "compute_volume_mm3", "draw_contour", "draw_surface"]
__all__ += ["extract_sphere", "grow_ball", "grow_hemisphere", "grow_hemispheres", "merge_vertices"]
__all__ += ["find_crossing_faces", "remove_crossings"]
