"""Handlers that stock MONAI and ignite do not have: statistics, checkpoints that resume, weight average, scores, panels."""

from brainfm_monai.handlers.averages import WeightAverage, make_ema_multi_avg_fn
from brainfm_monai.handlers.checkpoints import BestWeights, TrainingCheckpoint
from brainfm_monai.handlers.panels import ValidationPanels
from brainfm_monai.handlers.schedules import make_warmup_stable_decay
from brainfm_monai.handlers.scores import SegmentationDice, TaskErrors
from brainfm_monai.handlers.statistics import TrainingProgress, TrainingStatistics, make_task_loss_transform

__all__ = [
    "BestWeights",
    "SegmentationDice",
    "TaskErrors",
    "TrainingCheckpoint",
    "TrainingProgress",
    "TrainingStatistics",
    "ValidationPanels",
    "WeightAverage",
    "make_ema_multi_avg_fn",
    "make_task_loss_transform",
    "make_warmup_stable_decay",
]
