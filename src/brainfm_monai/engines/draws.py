"""A training is a sequence of draws 0, 1, 2, ...: the number of a draw decides its subject and its seed.

So there is no stream of random numbers to store: a training that resumes at draw n sees what an uninterrupted training would see,
and two processes with one subject each see what one process with two subjects would see.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch.utils.data import Dataset, Sampler

from brainfm_monai.synthesis import LARGEST_SEED

__all__ = ["DrawSampler", "DrawnSubjects", "hash_key"]


def hash_key(*key: int | str) -> int:
    """Deterministic 64-bit hash of a key, the same in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big")


class DrawnSubjects(Dataset[dict[str, Any]]):
    """The subjects in an endless sequence of shuffled passes, each with the ``seed`` of its draw.

    Args:
        data: the subjects, such as a MONAI ``CacheDataset`` of dictionaries.
        seed: of the sequence.

    Raises:
        ValueError: if there are no subjects.
    """

    def __init__(self, data: Sequence[Mapping[str, Any]], seed: int = 0) -> None:
        if not len(data):
            raise ValueError("DrawnSubjects: 'data' must hold at least one subject, got none")
        self.data, self.seed = data, seed
        self._pass: tuple[int, list[int]] = (-1, [])

    def subject_index(self, draw: int) -> int:
        """Index of the subject of a draw: every pass over the subjects takes each of them once."""
        number, position = divmod(draw, len(self.data))
        if self._pass[0] != number:
            order = sorted(range(len(self.data)), key=lambda i: hash_key(self.seed, number, i))
            self._pass = (number, order)
        return self._pass[1][position]

    def __getitem__(self, draw: int) -> dict[str, Any]:
        """The subject of a draw, and ``seed``, in [0, LARGEST_SEED)."""
        return {**self.data[self.subject_index(draw)], "seed": hash_key(self.seed, draw) % LARGEST_SEED}


class DrawSampler(Sampler[list[int]]):
    """Numbers of the draws of this process, batch after batch, without end: a ``batch_sampler`` for :class:`DrawnSubjects`.

    Batch i of all processes together consists of the draws from ``i * processes * batch_size`` on; process r takes the r-th part.

    Args:
        batch_size: subjects of one process in one step.
        rank: of this process.
        processes: number of processes.
    """

    def __init__(self, batch_size: int = 1, rank: int = 0, processes: int = 1) -> None:
        self.batch_size, self.rank, self.processes = batch_size, rank, processes
        self.first = 0  # the draw at which the next iterator starts

    @property
    def step(self) -> int:
        """Draws of all processes in one step."""
        return self.batch_size * self.processes

    def __iter__(self) -> Iterator[list[int]]:
        """Batches of numbers, from ``first`` on."""
        start = self.first + self.rank * self.batch_size
        while True:
            yield list(range(start, start + self.batch_size))
            start += self.step
