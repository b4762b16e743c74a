"""Scans under conditions, measures of every task, tables, curves and a page; and two evaluations compared."""

from brainfm_monai.evaluation.cases import LoadReferences, MeasureMaps, make_generated_cases, make_pair_cases
from brainfm_monai.evaluation.conditions import DegradeScan, GenerateScan, parse_conditions
from brainfm_monai.evaluation.writer import EvaluationWriter, compare_evaluations

__all__ = ["DegradeScan", "EvaluationWriter", "GenerateScan", "LoadReferences", "MeasureMaps", "compare_evaluations"]
__all__ += ["make_generated_cases", "make_pair_cases", "parse_conditions"]
