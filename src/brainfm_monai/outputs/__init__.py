"""From the maps of a scan to its files: label maps, volumes, images, surfaces, transforms, tables and warnings."""

from brainfm_monai.outputs.cortex import find_boundaries, grow_surfaces
from brainfm_monai.outputs.maps import compute_totals_mm3, compute_volumes_mm3, expect_dice, hard_volumes_mm3
from brainfm_monai.outputs.quality import collect_warnings
from brainfm_monai.outputs.result import RunSettings, ScanResult, begun_ahead, describe_run, once_per_scan, resample
from brainfm_monai.outputs.template import fit_scan_to_template
from brainfm_monai.outputs.writer import ScanWriter
