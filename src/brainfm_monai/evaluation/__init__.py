"""Scans under conditions, measures of every task, tables, curves and a page; and two evaluations compared."""

from brainfm_monai.evaluation.cases import LoadReferences, MeasureMaps, make_generated_cases, make_pair_cases
from brainfm_monai.evaluation.conditions import Condition, DegradeScand, GenerateScan, parse_conditions
from brainfm_monai.evaluation.writer import EvaluationWriter, compare_evaluations

__all__ = ["Condition", "DegradeScand", "EvaluationWriter", "GenerateScan", "LoadReferences", "MeasureMaps"]
__all__ += ["compare_evaluations", "make_generated_cases", "make_pair_cases", "parse_conditions"]
