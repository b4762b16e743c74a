"""Handlers that stock MONAI and ignite do not have: statistics, checkpoints that resume, scores, panels."""

from brainfm_monai.handlers.checkpoints import BestWeights, TrainingCheckpoint
from brainfm_monai.handlers.panels import ValidationPanels
from brainfm_monai.handlers.scores import SegmentationDice, TaskErrors
from brainfm_monai.handlers.statistics import TrainingStatistics

__all__ = [
    "BestWeights", "SegmentationDice", "TaskErrors", "TrainingCheckpoint", "TrainingStatistics", "ValidationPanels",
]  # fmt: skip
