"""How well maps agree with what is true: measures of each task, one tidy table of them, and their statistics."""

from brainfm_monai.metrics.fields import (
    compute_bias_error,
    compute_distance_mae,
    compute_fold_fraction,
    compute_mean_inside,
    compute_mni_error,
    compute_thickness_error,
)
from brainfm_monai.metrics.images import (
    compute_image_metrics,
    compute_ms_ssim,
    compute_ssim,
    fit_intensities,
    normalise_to_target,
)
from brainfm_monai.metrics.results import MetricRow, make_table, read_metrics, write_frame
from brainfm_monai.metrics.scan import measure_scan
from brainfm_monai.metrics.segmentation import (
    compute_lesion_metrics,
    compute_structure_hausdorff,
    compute_structure_overlap,
)
from brainfm_monai.metrics.statistics import adjust_holm, bootstrap_interval, compare, compute_signed_rank, summarise
from brainfm_monai.metrics.structures import EvaluatedStructure, parse_structures
from brainfm_monai.metrics.template import TemplateTissues, compute_warped_dice, load_template_tissues, pull_template

__all__ = [
    "EvaluatedStructure",
    "MetricRow",
    "TemplateTissues",
    "adjust_holm",
    "bootstrap_interval",
    "compare",
    "compute_bias_error",
    "compute_distance_mae",
    "compute_fold_fraction",
    "compute_image_metrics",
    "compute_lesion_metrics",
    "compute_mean_inside",
    "compute_mni_error",
    "compute_ms_ssim",
    "compute_signed_rank",
    "compute_ssim",
    "compute_structure_hausdorff",
    "compute_structure_overlap",
    "compute_thickness_error",
    "compute_warped_dice",
    "fit_intensities",
    "load_template_tissues",
    "make_table",
    "measure_scan",
    "normalise_to_target",
    "parse_structures",
    "pull_template",
    "read_metrics",
    "summarise",
    "write_frame",
]
