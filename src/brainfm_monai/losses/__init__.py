"""Losses of all tasks: one formula per function, missing targets masked sample by sample."""

from brainfm_monai.losses.balance import UncertaintyWeights
from brainfm_monai.losses.contrastive import compute_info_nce
from brainfm_monai.losses.dense import (
    compute_banded_error,
    compute_centred_mse,
    compute_gradient_l1,
    compute_laplace_nll,
    compute_masked_mean,
    compute_pooled_l1,
    compute_roughness,
)
from brainfm_monai.losses.labels import compute_dice_ce, compute_mask_loss
from brainfm_monai.losses.multitask import MultiTaskLoss

__all__ = [
    "MultiTaskLoss",
    "UncertaintyWeights",
    "compute_banded_error",
    "compute_centred_mse",
    "compute_dice_ce",
    "compute_gradient_l1",
    "compute_info_nce",
    "compute_laplace_nll",
    "compute_mask_loss",
    "compute_masked_mean",
    "compute_pooled_l1",
    "compute_roughness",
]
