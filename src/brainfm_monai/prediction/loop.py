"""One scan after the other: the next is read and the last is written while the network computes."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ignite.engine import Events
from monai.data import Dataset, list_data_collate
from monai.engines import Evaluator, IterationEvents
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from brainfm_monai.io import one_line, scan_stem
from brainfm_monai.outputs import ScanWriter
from brainfm_monai.prediction.shards import share_of

__all__ = ["named", "predict_scans"]

logger = logging.getLogger(__name__)

Scan = Mapping[str, Any]


def predict_scans(
    evaluator: Evaluator, dataset: Dataset, writer: ScanWriter, shard: str | None = None, overwrite: bool = False
) -> None:
    """Run an evaluator over scans and write their files; a scan that fails is reported in one line, and the rest is done.

    Scans that are finished already are skipped. ``summary.tsv`` tells of all scans of the list, also of those of other shards.

    Args:
        evaluator: its postprocessing makes the maps; its handlers may look at them.
        dataset: items with the entries ``image`` (a path) and perhaps ``name``, read lazily by the dataset's transform.
        writer: writes the files.
        shard: see :func:`~brainfm_monai.prediction.share_of`.
        overwrite: do finished scans again.

    Raises:
        SystemExit: if there is no scan, if the shard is wrong, and after the last scan if any failed; the message is one line.
    """
    scans = [named(item) for item in dataset.data]
    if not scans:
        raise SystemExit("input: a scan or a folder of scans is needed, found none: pass --input SCAN_OR_FOLDER")
    try:
        mine = share_of(len(scans), shard)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    waiting = [number for number in mine if overwrite or not writer.is_finished(scans[number])]
    if len(waiting) < len(mine):
        logger.info("%d of %d scans are finished already and are skipped", len(mine) - len(waiting), len(mine))
    evaluator.logger.setLevel(
        logging.CRITICAL
    )  # ignite tells of every run and every exception, which is told here in one line
    failures = _Failures(writer, alone=len(scans) == 1)
    with logging_redirect_tqdm(), tqdm(total=len(waiting), unit="scan") as bar, _stages(evaluator, bar):
        with ThreadPoolExecutor(1, "read") as readers, ThreadPoolExecutor(1, "write") as writers:
            _run(
                evaluator,
                dataset,
                writer,
                [(number, scans[number]) for number in waiting],
                failures,
                (readers, writers),
                bar,
            )
    if len(scans) > 1 or not failures.messages:
        logger.info("all scans: %s", writer.write_summary(scans))
    if failures.messages:
        several = f"{len(failures.messages)} of {len(mine)} scans failed; the others are done"
        raise SystemExit(failures.messages[0] if len(scans) == 1 else several)


def named(scan: Scan) -> dict[str, Any]:
    """The entry of a scan with its name."""
    return {**scan, "name": str(scan.get("name") or scan_stem(scan["image"]))}


class _Failures:
    """Collects, keeps and reports what went wrong; with one scan alone the end of the program tells it."""

    def __init__(self, writer: ScanWriter, alone: bool) -> None:
        self.writer, self.alone = writer, alone
        self.messages: list[str] = []

    @contextmanager
    def caught(self, scan: Scan) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.messages.append(one_line(error, str(scan["name"])))
            logger.debug("%s", self.messages[-1], exc_info=True)
            if not self.alone:
                logger.error("%s", self.messages[-1])
                self.writer.note_failure(scan, self.messages[-1])


def _run(
    evaluator: Evaluator,
    dataset: Dataset,
    writer: ScanWriter,
    scans: Sequence[tuple[int, Scan]],
    failures: _Failures,
    pools: tuple[ThreadPoolExecutor, ThreadPoolExecutor],
    bar: tqdm[Any],
) -> None:
    """Read ahead by one scan, and write behind by one: three scans at most are in memory."""
    readers, writers = pools
    behind: tuple[Scan, Future[Path]] | None = None
    for scan, reading in _read_ahead(dataset, scans, readers):
        bar.set_description_str(str(scan["name"]))
        bar.set_postfix_str("reading")
        before = len(failures.messages)
        with failures.caught(scan):
            evaluator.data_loader = [list_data_collate([reading.result()])]
            evaluator.state.epoch_length = 1
            _run_once(evaluator)
        if len(failures.messages) > before:
            bar.update()
            continue
        _finish(behind, failures, bar)
        items: Any = evaluator.state.output
        behind = (scan, writers.submit(writer.write, items[0], scan))
    _finish(behind, failures, bar)


def _run_once(evaluator: Evaluator) -> None:
    """Run the engine, and raise what it raises.

    An ignite engine out of whose run an exception came does nothing at its next run, and keeps the last output: the next scan
    would get the maps of this one. One that hands the exception to a handler ends its run, and starts anew.
    """
    raised: list[Exception] = []
    with evaluator.add_event_handler(Events.EXCEPTION_RAISED, lambda _, error: raised.append(error)):
        evaluator.run()
    if raised:
        raise raised[0]


def _read_ahead(
    dataset: Dataset, scans: Sequence[tuple[int, Scan]], readers: ThreadPoolExecutor
) -> Iterator[tuple[Scan, Future[Any]]]:
    """Each scan with its reading, which was begun while the one before was computed."""
    ahead = [readers.submit(dataset.__getitem__, number) for number, _ in scans[:1]]
    for position, (_, scan) in enumerate(scans):
        reading = ahead.pop()
        ahead += [readers.submit(dataset.__getitem__, number) for number, _ in scans[position + 1 : position + 2]]
        yield scan, reading


def _finish(behind: tuple[Scan, Future[Path]] | None, failures: _Failures, bar: tqdm[Any]) -> None:
    """Wait until a scan is written."""
    if behind is None:
        return
    scan, written = behind
    bar.set_postfix_str("writing")
    with failures.caught(scan):
        logger.info("%s: results are in %s", scan["name"], written.result())
    bar.update()


@contextmanager
def _stages(evaluator: Evaluator, bar: tqdm[Any]) -> Iterator[None]:
    """Show beside the bar what is being done: a scan takes seconds to minutes."""
    begun = evaluator.add_event_handler(Events.ITERATION_STARTED, lambda: bar.set_postfix_str("network"))
    inferred = evaluator.add_event_handler(IterationEvents.FORWARD_COMPLETED, lambda: bar.set_postfix_str("maps"))
    with begun, inferred:
        yield
