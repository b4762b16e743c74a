"""What MONAI's engines need from us: numbered draws of subjects, batches made on the device, and the step of the training."""

from brainfm_monai.engines.batches import SynthesisPrepareBatch
from brainfm_monai.engines.draws import DrawnSubjects, DrawSampler
from brainfm_monai.engines.nonfinite import NonFiniteStop
from brainfm_monai.engines.optimizers import MuonAdamW
from brainfm_monai.engines.processes import check_shards, start_processes
from brainfm_monai.engines.trainer import MultiTaskTrainer, make_grad_scaler, split_batch

__all__ = [
    "DrawSampler",
    "DrawnSubjects",
    "MultiTaskTrainer",
    "MuonAdamW",
    "NonFiniteStop",
    "SynthesisPrepareBatch",
    "check_shards",
    "make_grad_scaler",
    "split_batch",
    "start_processes",
]
