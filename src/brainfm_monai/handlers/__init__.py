"""Handlers that stock MONAI and ignite do not have: statistics, checkpoints that resume, scores, panels."""

from brainfm_monai.handlers.checkpoints import BestWeights, TrainingCheckpoint
from brainfm_monai.handlers.reports import TrainingStatistics, ValidationPanels, ValidationScores

__all__ = ["BestWeights", "TrainingCheckpoint", "TrainingStatistics", "ValidationPanels", "ValidationScores"]
