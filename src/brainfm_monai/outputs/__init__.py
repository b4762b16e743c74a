"""From the maps of a scan to its files: label maps, volumes, images, surfaces, transforms, tables and warnings."""

from brainfm_monai.outputs.cortex import grow_surfaces, measure_thickness
from brainfm_monai.outputs.maps import compute_totals_mm3, compute_volumes_mm3
from brainfm_monai.outputs.quality import collect_warnings
from brainfm_monai.outputs.result import TEMPLATE_SPACE, RunSettings, ScanResult, describe_run, once_per_scan, resample
from brainfm_monai.outputs.template import load_template
from brainfm_monai.outputs.warps import fit_scan_to_template
from brainfm_monai.outputs.writer import PARTIAL_FOLDER, ScanWriter

__all__ = ["PARTIAL_FOLDER", "TEMPLATE_SPACE", "RunSettings", "ScanResult", "ScanWriter", "collect_warnings"]
__all__ += ["compute_totals_mm3", "compute_volumes_mm3", "describe_run", "fit_scan_to_template", "grow_surfaces"]
__all__ += ["load_template", "measure_thickness", "once_per_scan", "resample"]
