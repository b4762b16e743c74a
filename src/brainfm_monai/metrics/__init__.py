"""How well maps agree with what is true: measures of each task, one tidy table of them, and their statistics."""

from brainfm_monai.metrics.scan import Scene, measure_entropy, measure_scan
from brainfm_monai.metrics.segmentation import parse_structures
from brainfm_monai.metrics.tables import HEADLINES, MetricRow, compare, define, read_metrics, summarise, write_frame

__all__ = ["HEADLINES", "MetricRow", "Scene", "compare", "define", "measure_entropy", "measure_scan"]
__all__ += ["parse_structures", "read_metrics", "summarise", "write_frame"]
