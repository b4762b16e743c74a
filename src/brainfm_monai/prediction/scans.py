"""The scans of a run: MONAI's data set and data loader of them, and which of them this process does, on which device."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from typing import Any

import torch
from monai.data import Dataset, list_data_collate

from brainfm_monai.io import Scan, ScanError, make_scans, printable


class ScanDataset(Dataset):
    """Items of scans, read lazily by a transform.

    Every item has a ``name`` that is allowed and occurs once; where that of the list is not, or the scan cannot be read for
    another known reason, reading the item fails with the reason.

    Args:
        data: scans, or items with ``image`` (a path) and perhaps ``name`` and whatever else the transform needs.
        transform: reads an item.
    """

    def __init__(self, data: Sequence[Scan | Mapping[Any, Any]], transform: Callable[..., Any] | None = None) -> None:
        items = [entry.item if isinstance(entry, Scan) else dict(entry) for entry in data]
        self.skipped = [item for item in items if item.get("skipped")]
        items = [item for item in items if not item.get("skipped")]
        scans = [scan.item for scan in make_scans(items)]
        rest = [{key: value for key, value in item.items() if key != "folder"} for item in items]  # may be no folder
        super().__init__([{**item, **scan} for item, scan in zip(rest, scans, strict=True)], transform)

    def _transform(self, index: int) -> Any:
        item = self.data[index]
        if item.get("problem"):
            raise ScanError(f"{printable(item['image'])}: {item['problem']}")
        return super()._transform(index)


class ScanLoader(Iterable[dict[str, Any]]):
    """Batches of one scan each, in order; a thread reads one scan ahead.

    Args:
        dataset: the scans.

    Attributes:
        current: number of the scan of the last batch.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset, self.current = dataset, -1

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield the batches of all scans."""
        for number, wait in self.read_ahead(range(len(self.dataset))):
            self.current = number
            yield wait()

    def read_ahead(self, numbers: Sequence[int]) -> Iterator[tuple[int, Callable[[], dict[str, Any]]]]:
        """Yield the number of each scan, and a function that waits for its batch; meanwhile the next scan is read."""
        with ThreadPoolExecutor(1, "read") as reader:
            ahead = [reader.submit(self._read, number) for number in numbers[:1]]
            for number, following in zip_longest(numbers, numbers[1:]):
                if following is not None:
                    ahead.append(reader.submit(self._read, following))
                yield number, ahead.pop(0).result

    def _read(self, number: int) -> dict[str, Any]:
        batch: dict[str, Any] = list_data_collate([self.dataset[number]])
        return batch


def share_of(count: int, shard: str | None = None) -> list[int]:
    """Which of ``count`` scans this process works on.

    Args:
        count: number of scans.
        shard: ``"i/n"``, i from 1 to n: every n-th scan from the i-th on; None: all. torchrun's ``RANK`` and ``WORLD_SIZE`` in
            the environment divide the shard further.

    Returns:
        Their numbers, from 0. The shares of all processes hold every scan once.

    Raises:
        ValueError: if the shard is not of that form.
    """
    numbers = list(range(count))
    if shard is not None:
        match = re.fullmatch(r"(\d+)/(\d+)", str(shard).strip())
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise ValueError(f"shard: i/n with i from 1 to n is needed, found '{shard}'")
        numbers = numbers[int(match[1]) - 1 :: int(match[2])]
    return numbers[int(os.environ.get("RANK", 0)) :: int(os.environ.get("WORLD_SIZE", 1))]


def local_device() -> torch.device:
    """The GPU of this process (torchrun's ``LOCAL_RANK``, else the first), or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
