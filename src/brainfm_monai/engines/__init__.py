"""What MONAI's engines need from us: numbered draws of subjects, batches made on the device, and a training's step."""

from brainfm_monai.engines.optimizers import MuonAdamW, TimeBudget, make_ema_multi_avg_fn, make_warmup_stable_decay
from brainfm_monai.engines.trainer import (
    DrawnSubjects,
    DrawSampler,
    MultiTaskTrainer,
    NonFiniteStop,
    SynthesisPrepareBatch,
    check_shards,
    make_grad_scaler,
    prepare_for_training,
    start_processes,
)

__all__ = [
    "DrawSampler", "DrawnSubjects", "MultiTaskTrainer", "MuonAdamW", "NonFiniteStop", "SynthesisPrepareBatch",
    "TimeBudget", "check_shards", "make_ema_multi_avg_fn", "make_grad_scaler", "make_warmup_stable_decay",
    "prepare_for_training", "start_processes",
]  # fmt: skip
