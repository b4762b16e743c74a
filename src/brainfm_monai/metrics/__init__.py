"""How well maps agree with what is true: measures of each task, all of one scan as rows of one tidy table."""

from brainfm_monai.metrics.scan import MEASURES, MetricRow, Scene, make_rows, measure_entropy, measure_scan
from brainfm_monai.metrics.segmentation import parse_structures

__all__ = ["MEASURES", "MetricRow", "Scene", "make_rows", "measure_entropy", "measure_scan", "parse_structures"]
