"""Handlers that stock MONAI and ignite do not have: statistics, checkpoints that resume, scores, panels."""

from brainfm_monai.handlers.checkpoints import BestWeights, TrainingCheckpoint
from brainfm_monai.handlers.reports import SegmentationDice, TaskErrors, TrainingStatistics, ValidationPanels

__all__ = [
    "BestWeights", "SegmentationDice", "TaskErrors", "TrainingCheckpoint", "TrainingStatistics", "ValidationPanels",
]  # fmt: skip
