"""Several processes of torchrun on one evaluation: who they are, and waiting for each other."""

from __future__ import annotations

import os
from datetime import timedelta

import torch.distributed as dist

__all__ = ["is_first_process", "wait_for_others"]

LONGEST_WAIT = timedelta(days=7)  # shares of a list end at very different times


def is_first_process() -> bool:
    """Whether this is the process that writes what is made of all shares; one process alone is."""
    return int(os.environ.get("RANK", 0)) == 0


def wait_for_others() -> None:
    """Return when every process of torchrun has called this; at once where there is one process alone.

    The results of the shares lie in files, so nothing but the waiting goes between processes, and gloo serves every device.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) < 2:
        return
    if dist.is_available() and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=LONGEST_WAIT)
    dist.monitored_barrier(timeout=LONGEST_WAIT) if dist.get_backend() == "gloo" else dist.barrier()
