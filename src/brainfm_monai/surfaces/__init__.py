"""White and pial surfaces as triangles: topology, growth, measures and pictures; numpy, scipy and torch, no files."""

from brainfm_monai.surfaces.growth import Hemisphere, grow_hemispheres

from brainfm_monai.surfaces.measures import (  # isort: skip
    compute_areas_mm2, compute_crossing_share, compute_euler_number, compute_mean_curvature, compute_thickness_mm,
    compute_volume_mm3, draw_contour, draw_surface,
)  # fmt: skip
