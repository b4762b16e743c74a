"""How well maps agree with what is true: measures of each task, one tidy table of them, and their statistics."""

from brainfm_monai.metrics.fields import TemplateTissues, load_template_tissues
from brainfm_monai.metrics.results import HEADLINES, Headline, MetricRow, define, make_table, read_metrics, write_frame
from brainfm_monai.metrics.scan import measure_scan
from brainfm_monai.metrics.segmentation import EvaluatedStructure, compute_structure_overlap, parse_structures
from brainfm_monai.metrics.statistics import bootstrap_interval, compare, summarise

__all__ = [
    "HEADLINES", "EvaluatedStructure", "Headline", "MetricRow", "TemplateTissues", "bootstrap_interval", "compare",
    "compute_structure_overlap", "define", "load_template_tissues", "make_table", "measure_scan", "parse_structures",
    "read_metrics", "summarise", "write_frame",
]  # fmt: skip
