"""How much memory there is, and how much a network will take."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["free_memory", "peak_memory"]

CGROUP = Path("/sys/fs/cgroup")


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken: of the GPU, or of the computer within the limit of the container."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    import psutil  # here, because training takes inferers of this room and never asks

    free = int(psutil.virtual_memory().available)
    try:
        limit, used = ((CGROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
    except OSError:  # no such limits here
        return free
    return free if limit == "max" else min(free, int(limit) - int(used))


class _Ledger(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, until each is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._enter(tensor.untyped_storage())
        return result

    def _enter(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return

        def leave(_: Any) -> None:
            self.live -= size
            del self._seen[key]

        self._seen[key] = weakref.ref(storage, leave)
        self.live += size
        self.peak = max(self.peak, self.live)


def peak_memory(function: Callable[[Tensor], Any], image: Tensor) -> int:
    """Bytes that a function will hold at most while it works on an image, found without computing or taking any.

    What the operations need for themselves, such as reordered kernels, is not counted.

    Args:
        function: maps the image to whatever it gives; its parameters, too, must be on the ``meta`` device.
        image: shape (B, 1, H, W, D), on the ``meta`` device.
    """
    with torch.no_grad(), _Ledger() as ledger:
        function(image)
    return ledger.peak
