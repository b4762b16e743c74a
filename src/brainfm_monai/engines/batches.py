"""A training is a sequence of draws 0, 1, 2, ...: the number of a draw decides its subject and seed, and so its scan.

So there is no stream of random numbers to store: a training that resumes at draw n sees what an uninterrupted training
would see, and two processes with one subject each see what one process with two subjects would see.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import count
from typing import Any

import torch
from monai.engines import PrepareBatch
from monai.utils import convert_to_tensor
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from brainfm_monai.io import refuse_if
from brainfm_monai.synthesis import FLAGS, LARGEST_SEED, SUBJECT_KEYS, Synthesizer


def hash_key(*key: int | str) -> int:
    """Deterministic 64-bit hash of a key, the same in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big")


@lru_cache(maxsize=2)
def _shuffle(subjects: int, seed: int, number: int) -> list[int]:
    """Order of the subjects in a pass over them."""
    return sorted(range(subjects), key=lambda i: hash_key(seed, number, i))


@dataclass(eq=False)
class DrawnSubjects(Dataset[dict[str, Any]]):
    """The subjects in an endless sequence of shuffled passes, each with the ``seed`` of its draw."""

    data: Sequence[Mapping[str, Any]]  # such as a MONAI CacheDataset of dictionaries; none are a ValueError
    seed: int = 0  # of the sequence

    def __post_init__(self) -> None:
        refuse_if(not len(self.data), "DrawnSubjects: 'data' must hold at least one subject", "none")

    def __getitem__(self, draw: int) -> dict[str, Any]:
        """The subject of a draw, and ``seed``, in [0, LARGEST_SEED); every pass over the subjects takes each once."""
        number, position = divmod(draw, len(self.data))
        subject = self.data[_shuffle(len(self.data), self.seed, number)[position]]
        return {**subject, "seed": hash_key(self.seed, draw) % LARGEST_SEED}


@dataclass(eq=False)
class DrawSampler(Sampler[list[int]]):
    """Numbers of this process's draws, batch after batch, without end: a ``batch_sampler`` for :class:`DrawnSubjects`.

    Batch i of all processes together consists of the draws from ``i * step`` on; process r takes the r-th part.
    """

    batch_size: int = 1  # subjects of one process in one step
    rank: int = 0  # of this process
    processes: int = 1
    first: int = field(default=0, init=False)  # the draw at which the next iterator starts

    @property
    def step(self) -> int:
        """Draws of all processes in one step."""
        return self.batch_size * self.processes

    def __iter__(self) -> Iterator[list[int]]:
        """Batches of numbers, from ``first`` on."""
        for start in count(self.first + self.rank * self.batch_size, self.step):
            yield list(range(start, start + self.batch_size))


@dataclass(eq=False)
class SynthesisPrepareBatch(PrepareBatch):
    """Turns a batch of cached subjects into generated scans and their targets, on the engine's device."""

    synthesizer: Synthesizer  # makes scans and targets
    fixed: bool = False  # take the hash of the name in any case

    def seeds(self, batch: Mapping[str, Any]) -> list[int]:
        """The entry ``seed``, or without it, as in a validation, a hash of the subject's name: always the same scan."""
        if "seed" in batch and not self.fixed:
            return [int(seed) for seed in batch["seed"]]
        return [hash_key(str(name)) % LARGEST_SEED for name in batch["subject"]]

    def __call__(
        self, batchdata: dict[str, Any], device: str | torch.device | None = None, non_blocking: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """The images, (B S, 1, H, W, D) in [0, 1], and the targets; two generation protocols are a ValueError."""
        plain = {key: convert_to_tensor(batchdata[key], track_meta=False) for key in SUBJECT_KEYS if key in batchdata}
        subject = {key: value.to(device=device, non_blocking=non_blocking) for key, value in plain.items()}
        # Flags decide what is drawn, and numbers are drawn on the host: flags stay there.
        subject |= {key: torch.as_tensor(value).cpu() for key, value in batchdata.items() if key.startswith(FLAGS)}
        protocols = sorted(set(batchdata.get("generation_protocol", [])))
        refuse_if(len(protocols) > 1, "SynthesisPrepareBatch: a batch needs one 'generation_protocol'", protocols)
        targets = self.synthesizer(subject, self.seeds(batchdata), *protocols)
        image = targets.pop("image")
        return image, {key: value.to(image.device, non_blocking=True) for key, value in targets.items()}
