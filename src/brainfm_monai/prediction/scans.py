"""The scans of a run as MONAI's data set and data loader: each is read while the one before is computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from monai.data import Dataset, list_data_collate

from brainfm_monai.io import Scan, ScanError, make_scans, printable

__all__ = ["ScanDataset", "ScanLoader"]


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
        super().__init__(
            [{**item, **scan.item} for item, scan in zip(items, make_scans(items), strict=True)], transform
        )

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
        waiting: numbers of the scans that are still to come.
        current: number of the scan of the last batch.
        report: called with the number of a scan that cannot be read and the error; the scan is left out. None: raises it.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset
        self.waiting = deque(range(len(dataset)))
        self.current = -1
        self.report: Callable[[int, Exception], None] | None = None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield the batches of the scans that are waiting."""
        with ThreadPoolExecutor(1, "read") as reader:
            ahead = self._read_next(reader)
            while ahead is not None:
                self.current = self.waiting.popleft()
                reading, ahead = ahead, self._read_next(reader)
                try:
                    batch = list_data_collate([reading.result()])
                except Exception as error:
                    if self.report is None:
                        raise
                    self.report(self.current, error)
                    continue
                yield batch

    def _read_next(self, reader: ThreadPoolExecutor) -> Future[Any] | None:
        return reader.submit(self.dataset.__getitem__, self.waiting[0]) if self.waiting else None
