"""One scan after the other: the next is read and the last is written while the network computes."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from ignite.engine import Engine, Events
from monai.engines import Evaluator, IterationEvents
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from brainfm_monai.io import one_line, printable
from brainfm_monai.outputs import ScanWriter
from brainfm_monai.prediction.scans import ScanDataset, ScanLoader
from brainfm_monai.prediction.shards import share_of

__all__ = ["WriteScans", "choose_scans", "engine_logger", "finish_run", "predict_scans", "run_scans"]

logger = logging.getLogger(__name__)
engine_logger = logging.getLogger(f"{__name__}.engine")
engine_logger.setLevel(
    logging.CRITICAL
)  # ignite logs every run and every exception, which are reported here in one line
MOST_LINES = 20  # of skipped files in the log; all are in the summary


def predict_scans(evaluator: Evaluator, writer: ScanWriter, shard: str | None = None, overwrite: bool = False) -> None:
    """Run an evaluator over its scans and write their files; a scan that fails is reported in one line, and the rest is done.

    Scans that are finished already are skipped. ``summary.tsv`` has all scans of the list, also those of other shards.

    Args:
        evaluator: its ``data_loader`` is a :class:`ScanLoader`; its postprocessing makes the maps; its handlers may look at them.
        writer: writes the files.
        shard: see :func:`~brainfm_monai.prediction.share_of`.
        overwrite: do finished scans again.

    Raises:
        SystemExit: if there is no scan, if the shard is wrong, and after the last scan if any failed; the message is one line.
    """
    loader: Any = evaluator.data_loader
    dataset: ScanDataset = loader.dataset
    numbers = choose_scans(dataset, writer, shard, overwrite)
    failures = run_scans(evaluator, writer, numbers, keep_notes=len(dataset) > 1)
    finish_run(dataset, writer, failures)


def choose_scans(dataset: ScanDataset, writer: ScanWriter, shard: str | None, overwrite: bool) -> list[int]:
    """Numbers of the scans of this shard that are not finished; what is skipped is logged.

    Raises:
        SystemExit: if there is no scan, or the shard is wrong.
    """
    for entry in dataset.skipped[:MOST_LINES]:
        logger.info("%s: skipped: %s", printable(entry["image"]), entry["skipped"])
    if len(dataset.skipped) > MOST_LINES:
        logger.info("%d more files are skipped, see summary.tsv", len(dataset.skipped) - MOST_LINES)
    if not len(dataset):
        raise SystemExit("input: a scan or a folder of scans is needed, found none: pass --input SCAN_OR_FOLDER")
    try:
        mine = share_of(len(dataset), shard)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    writer.clear()
    numbers = [number for number in mine if overwrite or not writer.is_finished(dataset.data[number])]
    if len(numbers) < len(mine):
        logger.info("%d of %d scans are finished already and are skipped", len(mine) - len(numbers), len(mine))
    return numbers


def finish_run(dataset: ScanDataset, writer: ScanWriter, failures: Sequence[str]) -> None:
    """Write the summary.

    Args:
        dataset: all scans.
        writer: of their files.
        failures: one message for each scan that failed.

    Raises:
        SystemExit: if any failed; the message is one line.
    """
    try:
        if len(dataset) > 1 or not failures:
            logger.info("all scans: %s", writer.write_summary([*dataset.data, *dataset.skipped]))
    except OSError as error:
        raise SystemExit(f"{writer.output_dir}: summary.tsv cannot be written: {error}") from error
    if failures:
        several = f"{len(failures)} of {len(dataset)} scans failed; the others are done"
        raise SystemExit(failures[0] if len(dataset) == 1 else several)


def run_scans(
    evaluator: Evaluator, writer: ScanWriter, numbers: Sequence[int], keep_notes: bool = True, show_bar: bool = True
) -> list[str]:
    """Run an evaluator over some of its scans and write their files.

    Three scans at most are in memory: the next one, this one, and the one that is being written.

    Args:
        evaluator: see :func:`predict_scans`.
        writer: writes the files.
        numbers: of the scans.
        keep_notes: log failures, and keep them for the summary.
        show_bar: show a progress bar.

    Returns:
        One line for each scan that failed.
    """
    loader: Any = evaluator.data_loader
    evaluator.logger = engine_logger
    run = _Run(loader, writer, keep_notes, tqdm(total=len(numbers), unit="scan", disable=not show_bar))
    loader.waiting, loader.report = deque(numbers), run.fail
    with logging_redirect_tqdm(), run.bar, ThreadPoolExecutor(1, "write") as run.pool, run.attached(evaluator):
        while loader.waiting:
            left = len(loader.waiting)
            evaluator.state.epoch_length = None  # until the loader ends
            evaluator.run()  # one epoch; a scan that fails ends it, and the next one goes on after this scan
            if len(loader.waiting) == left:
                raise RuntimeError(f"the evaluator must take scans, found none taken: {' '.join(run.failures[-1:])}")
        run.finish_writing()
    return run.failures


class WriteScans:
    """Handler that writes the files of every scan when a host runs the evaluator itself, without :func:`predict_scans`.

    Args:
        writer: writes the files.
    """

    def __init__(self, writer: ScanWriter) -> None:
        self.writer = writer

    def attach(self, engine: Engine) -> None:
        """Write after every scan of the config's own data loader."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Write the files of the scan that was computed last."""
        loader = getattr(engine, "data_loader", None)
        if isinstance(loader, ScanLoader) and loader.report is None:  # :func:`run_scans` sets it, and writes itself
            folder = self.writer.write(maps_of(engine), loader.dataset.data[loader.current])
            logger.info("results are in %s", folder)


def maps_of(engine: Engine) -> dict[str, Any]:
    """Maps of the scan that was computed last, and the ``original`` scan, which MONAI's evaluator leaves in the batch."""
    batch: Any = engine.state.batch
    output: Any = engine.state.output
    return {**({"original": batch[0]["original"]} if "original" in batch[0] else {}), **output[0]}


class _Run:
    """What the handlers of one run share: the scan that is being written, the bar and the failures."""

    pool: ThreadPoolExecutor

    def __init__(self, loader: ScanLoader, writer: ScanWriter, keep_notes: bool, bar: tqdm[Any]) -> None:
        self.loader, self.writer, self.keep_notes, self.bar = loader, writer, keep_notes, bar
        self.failures: list[str] = []
        self.writing: tuple[int, Future[Path]] | None = None

    @contextmanager
    def attached(self, evaluator: Evaluator) -> Iterator[None]:
        """Handlers of the run, on an evaluator that may have others."""
        reactions: dict[Any, Callable[..., None]] = {
            Events.GET_BATCH_STARTED: lambda _: self.bar.set_postfix_str("reading"),
            Events.ITERATION_STARTED: self._begin,
            IterationEvents.FORWARD_COMPLETED: lambda _: self.bar.set_postfix_str("maps"),
            Events.ITERATION_COMPLETED: self._write,
            Events.EXCEPTION_RAISED: self._catch,
        }
        with ExitStack() as handlers:
            for event, handler in reactions.items():
                handlers.enter_context(evaluator.add_event_handler(event, handler))
            yield

    def fail(self, number: int, error: BaseException) -> None:
        """Report a scan that failed."""
        scan = self.loader.dataset.data[number]
        message = one_line(error, str(scan["name"]))
        self.failures.append(message)
        logger.debug("%s", message, exc_info=error)
        if self.keep_notes:
            logger.error("%s", message)
            with suppress(OSError):  # a full disk takes no notes
                self.writer.note_failure(scan, message)
        self.bar.update()

    def finish_writing(self) -> None:
        """Wait until the scan that is being written is on disk."""
        if self.writing is None:
            return
        (number, future), self.writing = self.writing, None
        self.bar.set_postfix_str("writing")
        try:
            logger.info("%s: results are in %s", self.loader.dataset.data[number]["name"], future.result())
        except Exception as error:
            self.fail(number, error)
        else:
            self.bar.update()

    def _begin(self, engine: Engine) -> None:
        scan = self.loader.dataset.data[self.loader.current]
        self.writer.check_place(scan)
        self.bar.set_description_str(str(scan["name"]))
        self.bar.set_postfix_str("network")

    def _write(self, engine: Engine) -> None:
        self.finish_writing()
        number = self.loader.current
        scan = self.loader.dataset.data[number]
        self.writing = (number, self.pool.submit(self.writer.write, maps_of(engine), scan))

    def _catch(self, engine: Engine, error: BaseException) -> None:
        if not isinstance(error, Exception):
            raise error
        self.fail(self.loader.current, error)
