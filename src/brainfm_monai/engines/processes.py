"""Several processes, one for each GPU, started by torchrun."""

from __future__ import annotations

from collections.abc import Sized

import ignite.distributed as idist
import torch

__all__ = ["check_shards", "start_processes"]


def start_processes(backend: str | None = None) -> None:
    """Join the group of processes that torchrun started; nothing is done if this one has joined.

    Args:
        backend: of torch.distributed; nccl where there are GPUs and gloo elsewhere, if not given.
    """
    if idist.backend() is None:
        idist.initialize(backend or ("nccl" if torch.cuda.is_available() else "gloo"))


def check_shards(data: Sized, processes: int, name: str = "validation") -> None:
    """Check that each process gets a part of the data.

    Raises:
        ValueError: if there are fewer items than processes.
    """
    if len(data) < processes:
        raise ValueError(
            f"{name}: each of {processes} processes needs a subject, found {len(data)}: list more or start fewer"
        )
