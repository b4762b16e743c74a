"""How well maps agree with what is true: measures of each task, one tidy table of them, and their statistics."""

from brainfm_monai.metrics.fields import TemplateTissues, load_template_tissues
from brainfm_monai.metrics.scan import measure_scan
from brainfm_monai.metrics.segmentation import EvaluatedStructure, parse_structures
from brainfm_monai.metrics.tables import (
    HEADLINES,
    Headline,
    MetricRow,
    bootstrap_interval,
    compare,
    define,
    read_metrics,
    summarise,
    write_frame,
)

__all__ = [
    "HEADLINES",
    "EvaluatedStructure",
    "Headline",
    "MetricRow",
    "TemplateTissues",
    "bootstrap_interval",
    "compare",
]
__all__ += [
    "define",
    "load_template_tissues",
    "measure_scan",
    "parse_structures",
    "read_metrics",
    "summarise",
    "write_frame",
]
