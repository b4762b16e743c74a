"""Inference over whole scans: crop, encode, look at the brain a second time, decode."""

from brainfm_monai.inferers.execution import MEMORY_MODES, AutocastInferer, choose_memory, free_memory
from brainfm_monai.inferers.orientation import OrientationInferer
from brainfm_monai.inferers.two_stage import TwoStageInferer

__all__ = ["MEMORY_MODES", "AutocastInferer", "OrientationInferer", "TwoStageInferer", "choose_memory", "free_memory"]
