"""From the maps of a scan to its files: label maps, volumes, images, surfaces, transforms, tables and warnings."""

from __future__ import annotations

from brainfm_monai.outputs.images import (
    write_age,
    write_bias_field,
    write_embedding,
    write_lesions,
    write_synthetic_images,
    write_uncertainty,
)
from brainfm_monai.outputs.quality import collect_warnings, write_quality
from brainfm_monai.outputs.result import TEMPLATE_SPACE, RunSettings, ScanResult, describe_run, resample
from brainfm_monai.outputs.segmentation import (
    compute_totals_mm3,
    compute_volumes_mm3,
    write_label_table,
    write_segmentation,
    write_volumes,
)
from brainfm_monai.outputs.surfaces import grow_surfaces, measure_thickness, write_distances, write_surfaces
from brainfm_monai.outputs.warps import fit_scan_to_template, write_coordinates, write_transforms
from brainfm_monai.outputs.writer import PARTIAL_FOLDER, ScanWriter

__all__ = [
    "PARTIAL_FOLDER",
    "TEMPLATE_SPACE",
    "RunSettings",
    "ScanResult",
    "ScanWriter",
    "collect_warnings",
    "compute_totals_mm3",
    "compute_volumes_mm3",
    "describe_run",
    "fit_scan_to_template",
    "grow_surfaces",
    "measure_thickness",
    "resample",
    "write_age",
    "write_bias_field",
    "write_coordinates",
    "write_distances",
    "write_embedding",
    "write_label_table",
    "write_lesions",
    "write_quality",
    "write_segmentation",
    "write_surfaces",
    "write_synthetic_images",
    "write_transforms",
    "write_uncertainty",
    "write_volumes",
]
