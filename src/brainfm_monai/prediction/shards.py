"""Many machines: which share of a list one process works on, and on which device."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

import torch

__all__ = ["local_device", "share_of"]


def share_of(count: int, shard: str | None = None, environment: Mapping[str, str] | None = None) -> list[int]:
    """Which of ``count`` scans this process works on.

    Args:
        count: number of scans.
        shard: ``"i/n"``, i from 1 to n: every n-th scan from the i-th on; None: all.
        environment: of the process; torchrun's ``RANK`` and ``WORLD_SIZE`` divide the shard further.

    Returns:
        Their numbers, from 0. The shares of all processes hold every scan once.

    Raises:
        ValueError: if the shard is not of that form.
    """
    variables = os.environ if environment is None else environment
    numbers = list(range(count))
    if shard is not None:
        match = re.fullmatch(r"(\d+)/(\d+)", str(shard).strip())
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise ValueError(f"shard: i/n with i from 1 to n is needed, found '{shard}'")
        numbers = numbers[int(match[1]) - 1 :: int(match[2])]
    return numbers[int(variables.get("RANK", 0)) :: int(variables.get("WORLD_SIZE", 1))]


def local_device() -> torch.device:
    """The GPU of this process (torchrun's ``LOCAL_RANK``, else the first), or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
