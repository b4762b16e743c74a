"""Losses of all tasks: one formula per function, missing targets masked sample by sample."""

from brainfm_monai.losses.formulas import MultiTaskLoss

__all__ = ["MultiTaskLoss"]
