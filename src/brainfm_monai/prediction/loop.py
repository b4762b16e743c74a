"""The scans of a run, one after the other: the next is read and the last is written while the network computes."""

import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import zip_longest
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.data import Dataset, list_data_collate
from monai.engines import Evaluator
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from brainfm_monai.io import Scan, ScanError, exit_on_error, make_scans, one_line, printable, refuse_if
from brainfm_monai.outputs import ScanWriter

logger = logging.getLogger(__name__)
engine_logger = logging.getLogger(f"{__name__}.engine")
engine_logger.setLevel(logging.CRITICAL)  # ignite logs every run and exception, which are reported here in one line
MOST_LINES = 20  # of skipped files in the log; all are in the summary
Outcome = tuple[dict[str, Any], Any]  # a scan of the list, and a future of the folder of its results


class ScanDataset(Dataset):
    """Scans, or items with ``image`` (a path), perhaps ``name`` and what else their transform needs, read lazily.

    Every item has a ``name`` that is allowed and occurs once; where that of the list is not, or the scan cannot be read
    for another known reason, reading the item fails with the reason.
    """

    def __init__(self, data: Sequence[Scan | Mapping[Any, Any]], transform: Callable[..., Any] | None = None) -> None:
        items = [entry.item if isinstance(entry, Scan) else dict(entry) for entry in data]
        scans = [scan.item for scan in make_scans(items)]  # first those that are not skipped
        wanted = [item | {"folder": ""} for item in items if not item.get("skipped")]  # may be no folder
        self.skipped = scans[len(wanted) :]
        super().__init__([{**item, **scan} for item, scan in zip(wanted, scans, strict=False)], transform)

    def _transform(self, index: int) -> Any:
        if problem := self.data[index].get("problem"):
            raise ScanError(f"{printable(self.data[index]['image'])}: {problem}")
        return super()._transform(index)


class ScanLoader(Iterable[dict[str, Any]]):
    """Batches of one scan each, in order; a thread reads one scan ahead. ``current`` numbers the last batch's scan."""

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
        return list_data_collate([self.dataset[number]])


def share_of(count: int, shard: str | None = None) -> list[int]:
    """Numbers, from 0, of those of ``count`` scans that this process does; all processes together do every scan once.

    ``shard`` is ``"i/n"``, i from 1 to n: every n-th scan from the i-th on; None: all; another text is a ValueError.
    torchrun's ``RANK`` and ``WORLD_SIZE`` in the environment divide the shard further.
    """
    numbers = list(range(count))
    if shard is not None:
        part, count = map(int, match.groups() if (match := re.fullmatch(r"(\d+)/(\d+)", str(shard))) else (0, 0))
        refuse_if(not 1 <= part <= count, "shard: i/n with i from 1 to n is needed", f"'{shard}'")
        numbers = numbers[part - 1 :: count]
    return numbers[int(os.environ.get("RANK", 0)) :: int(os.environ.get("WORLD_SIZE", 1))]


def local_device() -> torch.device:
    """The GPU of this process (torchrun's ``LOCAL_RANK``, else the first), or the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())


def predict_scans(evaluator: Evaluator, writer: ScanWriter, shard: str | None = None, overwrite: bool = False) -> None:
    """Run an evaluator over the scans of its :class:`ScanLoader` and write their files, see :func:`run_list`."""
    loader: Any = evaluator.data_loader
    run_list(loader.dataset, writer, shard, overwrite, partial(run_scans, evaluator, writer))


def run_list(
    dataset: ScanDataset, writer: ScanWriter, shard: str | None, overwrite: bool,
    compute: Callable[[Sequence[int]], Iterable[Outcome]],
) -> None:  # fmt: skip
    """Compute the scans of a list; a failing scan is reported in one line, the rest is done.

    Scans that are finished already are skipped, unless ``overwrite``. ``summary.tsv`` has all scans of the list, also
    those of other shards, see :func:`share_of`. SystemExit of one line if there is no scan, if the shard is wrong, and
    after the last scan if any failed. ``compute`` yields scans by their numbers, with futures of their results.
    """
    numbers, failures = choose_scans(dataset, writer, shard, overwrite), list[str]()
    with logging_redirect_tqdm(), tqdm(total=len(numbers), unit="scan") as bar:
        for scan, future in compute(numbers) if numbers else ():
            try:
                logger.info("%s: results are in %s", scan["name"], future.result())
            except Exception as error:
                failures.append(one_line(error, str(scan["name"])))
                logger.debug("%s", failures[-1], exc_info=error)
                if len(dataset) > 1:
                    logger.error("%s", failures[-1])
                    with suppress(OSError):  # a full disk takes no notes
                        writer.note_failure(scan, failures[-1])
            bar.update()
    writer.clear()  # what processes that were killed left
    try:
        if len(dataset) > 1 or not failures:
            logger.info("all scans: %s", writer.write_summary([*dataset.data, *dataset.skipped]))
    except OSError as error:
        raise SystemExit(f"{writer.output_dir}: summary.tsv cannot be written: {error}") from error
    if failures:
        several = f"{len(failures)} of {len(dataset)} scans failed; the others are done"
        raise SystemExit(failures[0] if len(dataset) == 1 else several)


def choose_scans(dataset: ScanDataset, writer: ScanWriter, shard: str | None, overwrite: bool) -> list[int]:
    """Numbers of this shard's unfinished scans; the rest is logged. SystemExit for no scan at all, or a wrong shard."""
    for entry in dataset.skipped[:MOST_LINES]:
        logger.info("%s: skipped: %s", printable(entry["image"]), entry["skipped"])
    if len(dataset.skipped) > MOST_LINES:
        logger.info("%d more files are skipped, see summary.tsv", len(dataset.skipped) - MOST_LINES)
    if not len(dataset):
        raise SystemExit("input: a scan or a folder of scans is needed, found none: pass --input SCAN_OR_FOLDER")
    mine = exit_on_error(share_of, len(dataset), shard)
    numbers = [number for number in mine if overwrite or not writer.is_finished(dataset.data[number])]
    for number in set(mine) - set(numbers):
        writer.note_failure(dataset.data[number])  # of a run when its file was another one
    if len(numbers) < len(mine):
        logger.info("%d of %d scans are finished already and are skipped", len(mine) - len(numbers), len(mine))
    return numbers


def run_scans(evaluator: Evaluator, writer: ScanWriter, numbers: Sequence[int]) -> Iterator[Outcome]:
    """Run an evaluator over some of its scans, each as one epoch; yields each scan, and a future of its folder.

    Three scans at most are in memory: the next one, this one, and the one that is being written.
    """
    loader: Any = evaluator.data_loader
    evaluator.logger, evaluator.interrupt_resume_enabled = engine_logger, False  # else no run can follow an exception
    writing: list[Outcome] = []
    try:
        with ThreadPoolExecutor(1, "write") as pool:
            for number, wait in loader.read_ahead(numbers):
                scan = loader.dataset.data[number]
                try:
                    evaluator.data_loader, evaluator.state.epoch_length, evaluator.state.output = [wait()], 1, None
                    writer.check_place(scan)
                    evaluator.run()
                    future = pool.submit(writer.write, maps_of(evaluator), scan)
                except Exception as error:
                    logger.debug("%s", scan["name"], exc_info=error)
                    future = Future()
                    future.set_exception(ScanError(one_line(error, str(scan["name"]))))  # the error itself holds memory
                yield from writing
                writing = [(scan, future)]
            yield from writing
    finally:  # a worker runs again with the same evaluator, whatever ended this run
        evaluator.data_loader, evaluator.state.epoch_length = loader, None


class WriteScans:
    """Handler that writes every scan's files when a host runs the evaluator itself, without :func:`predict_scans`."""

    def __init__(self, writer: ScanWriter) -> None:
        self.writer = writer

    def attach(self, engine: Engine) -> None:
        """Write after every scan of the config's own data loader."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Write the files of the scan that was computed last."""
        loader = getattr(engine, "data_loader", None)
        if isinstance(loader, ScanLoader):  # :func:`run_scans` puts a batch in its place, and writes itself
            folder = self.writer.write(maps_of(engine), loader.dataset.data[loader.current])
            logger.info("results are in %s", folder)


def maps_of(engine: Engine) -> dict[str, Any]:
    """Maps of the scan computed last, and the ``original`` scan, which MONAI's evaluator leaves in the batch."""
    batch: Any = engine.state.batch
    output: Any = engine.state.output
    return {**({"original": batch[0]["original"]} if "original" in batch[0] else {}), **output[0]}
