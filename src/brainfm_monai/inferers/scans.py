"""One scan after the other, and errors in one line."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from ignite.engine import Events
from monai.data import Dataset, list_data_collate
from monai.engines import Evaluator, IterationEvents
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from brainfm_monai.transforms import ScanError, scan_stem

__all__ = ["exit_on_error", "predict_scans"]

logger = logging.getLogger(__name__)
T = TypeVar("T")


def predict_scans(evaluator: Evaluator, dataset: Dataset) -> None:
    """Run an evaluator over scans, one at a time: a scan that fails is reported in one line, and the rest is done.

    Args:
        evaluator: its postprocessing and handlers write the results.
        dataset: items with the entries ``image`` (a path) and perhaps ``name``, read lazily by the dataset's transform.

    Raises:
        SystemExit: if there is no scan, and after the last scan if any failed; the message is one line.
    """
    if not len(dataset):
        raise SystemExit("input: a scan or a folder of scans is needed, found none: pass --input SCAN_OR_FOLDER")
    names = [str(item.get("name") or scan_stem(item["image"])) for item in dataset.data]
    failures: list[str] = []
    evaluator.logger.setLevel(logging.CRITICAL)  # ignite tells of every run and every exception, which is told here in one line
    with logging_redirect_tqdm(), tqdm(names, unit="scan") as bar, _stages(evaluator, bar):
        for index, name in enumerate(bar):
            bar.set_description_str(name)
            bar.set_postfix_str("reading")
            try:
                evaluator.data_loader = [list_data_collate([dataset[index]])]
                evaluator.state.epoch_length = 1
                evaluator.run()
            except Exception as error:
                failures.append(_one_line(error, name))
                logger.debug("%s", failures[-1], exc_info=True)
                if len(names) > 1:
                    logger.error("%s", failures[-1])
    if failures:
        raise SystemExit(failures[0] if len(names) == 1 else f"{len(failures)} of {len(names)} scans failed; the others are done")


@contextmanager
def _stages(evaluator: Evaluator, bar: tqdm[str]) -> Iterator[None]:
    """Show beside the bar what is being done: a scan takes seconds to minutes."""
    begun = evaluator.add_event_handler(Events.ITERATION_STARTED, lambda: bar.set_postfix_str("network"))
    inferred = evaluator.add_event_handler(IterationEvents.FORWARD_COMPLETED, lambda: bar.set_postfix_str("maps and page"))
    with begun, inferred:
        yield


def _one_line(error: BaseException, name: str) -> str:
    """The message of the first cause, if it is ours; else the name of the scan and the cause's first line."""
    while error.__cause__ is not None and not isinstance(error, ScanError):
        error = error.__cause__
    if isinstance(error, ScanError):
        return str(error)
    lines: Sequence[str] = str(error).strip().splitlines()
    return f"{name}: {type(error).__name__}{': ' + lines[0] if lines else ''}"


def exit_on_error(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call a function; a wrong value or a missing file ends the program with the message alone, in one line, and status 1.

    Raises:
        SystemExit: where the function raises ``ValueError`` or ``OSError``.
    """
    try:
        return function(*args, **kwargs)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error
