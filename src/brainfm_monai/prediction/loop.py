"""The scans of a run: the next is read and the last is written while the network computes; or workers of a cluster."""

import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache, partial
from itertools import zip_longest
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from ignite.engine import Engine, Events
from monai.bundle import ConfigParser, create_workflow
from monai.data import Dataset, list_data_collate
from monai.engines import Evaluator
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from brainfm_monai.io import Scan, ScanError, exit_on_error, make_scans, one_line, printable, refuse_if
from brainfm_monai.outputs import ScanWriter

logger = logging.getLogger(__name__)
engine_logger = logging.Logger("engine", logging.CRITICAL)  # ignite logs every run and exception, as is done here
MOST_LINES = 20  # of skipped files in the log; all are in the summary
MOST_LOSSES = 3  # workers that may die of one scan before the scan fails
Outcome = tuple[dict[str, Any], Any]  # a scan of the list, and a future of the folder of its results
_one_at_a_time = Lock()  # a worker of several threads has one network


class ScanDataset(Dataset):
    """Scans, or items with ``image`` (a path), perhaps ``name`` and what else their transform needs, read lazily.

    Every item has a ``name`` that is allowed and occurs once; reading an item with a ``problem`` fails with the reason.
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
    """Batches of one scan each, in order; a thread reads one scan ahead."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield the batches of all scans."""
        return (wait() for _, wait in self.read_ahead(range(len(self.dataset))))

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
    """Numbers, from 0, of those of ``count`` scans that this process does: every n-th from the i-th on for ``"i/n"``.

    torchrun's ``RANK`` and ``WORLD_SIZE`` in the environment divide the shard further. Another text is a ValueError.
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

    Finished scans are skipped, unless ``overwrite``. ``summary.tsv`` has all scans, also those of other shards, see
    :func:`share_of`. SystemExit of one line if there is no scan, if the shard is wrong, or at the end if any failed.
    ``compute`` yields scans by their numbers, with futures of their results.
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
    """Run an evaluator over scans, each as one epoch; three are in memory: the one that is read, this one, the last."""
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


def predict_on_cluster(cluster: str, settings: dict[str, Any]) -> None:
    """Run the inference config over its scans on the workers of a Dask cluster, see :func:`run_list`.

    Every worker loads the network once, and reads and writes files itself: paths, and the working directory, must be
    valid on all machines. Scans of a worker that dies are done by another worker. The ``cluster`` is the address of a
    scheduler, as in ``tcp://host:8786``, or ``local:N`` for N processes of this machine, else there is a ValueError;
    ``settings`` are arguments of :func:`monai.bundle.create_workflow`, with overrides of the config.
    """
    settings, keys = {**settings, "logging_file": False}, ("dataset", "writer", "shard", "overwrite")
    dataset, writer, shard, overwrite = map(_build(json.dumps(settings), str(Path.cwd())).get_parsed_content, keys)
    text = json.dumps({**settings, "scans": []})
    run_list(dataset, writer, shard, overwrite, partial(_compute, cluster, text, dataset))


def _compute(cluster: str, settings: str, dataset: ScanDataset, numbers: Sequence[int]) -> Iterator[Outcome]:
    """Give each scan to a worker; local workers share the cores, and end with the last scan."""
    import dask
    from distributed import Client, as_completed

    local = re.fullmatch(r"local:([1-9]\d*)", cluster)
    rule = "cluster: the address of a scheduler (tcp://host:port) or local:N is needed"
    refuse_if(not local and "://" not in cluster, rule, f"'{cluster}'")
    options: dict[str, Any] = {"distributed.scheduler.allowed-failures": MOST_LOSSES}
    place: dict[str, Any] = {"address": cluster}
    if local:
        threads = str(max(1, torch.get_num_threads() // int(local[1])))
        variables = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        options["distributed.nanny.pre-spawn-environ"] = dict.fromkeys(variables, threads)
        place = {"n_workers": min(int(local[1]), len(numbers)), "threads_per_worker": 1, "memory_limit": 0}
        place["dashboard_address"] = ":0"
    with dask.config.set(options):
        try:
            client = Client(**place)
        except (OSError, TimeoutError) as error:
            raise ValueError(f"cluster: a scheduler must answer at {cluster}, found {error}") from error
        with client:
            count = len(client.scheduler_info(n_workers=-1)["workers"])
            logger.info("%d scans for %d workers; progress: %s", len(numbers), count, client.dashboard_link)
            scans = [dataset.data[number] for number in numbers]
            futures = client.map(predict_one, scans, settings=settings, folder=str(Path.cwd()), pure=False)
            scan_of = {future.key: scan for future, scan in zip(futures, scans, strict=True)}
            for future in as_completed(futures):
                yield scan_of[future.key], future


def predict_one(scan: dict[str, Any], settings: str, folder: str) -> Path:
    """Predict one scan in a worker, and return the folder of its results; ScanError of one line if it fails."""
    with _one_at_a_time:
        parser = _build(settings, folder)
        parser.get_parsed_content("dataset").data = [scan]
        evaluator, writer = map(parser.get_parsed_content, ("evaluator", "writer"))
        ((_, future),) = run_scans(evaluator, writer, [0])
        try:
            return Path(future.result())
        except Exception as error:  # dask sends errors without their causes
            raise ScanError(one_line(error, str(scan["name"]))) from error


@lru_cache(maxsize=1)
def _build(settings: str, folder: str) -> ConfigParser:
    """The parsed config, which a process keeps for its next scan; settings as JSON, paths relative to a folder."""
    os.chdir(folder)
    return create_workflow(workflow_type="inference", **json.loads(settings)).parser


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
            folder = self.writer.write(maps_of(engine), loader.dataset.data[engine.state.iteration - 1])
            logger.info("results are in %s", folder)


def maps_of(engine: Engine) -> dict[str, Any]:
    """Maps of the scan computed last, and the ``original`` scan, which MONAI's evaluator leaves in the batch."""
    batch: Any = engine.state.batch
    output: Any = engine.state.output
    return {**({"original": batch[0]["original"]} if "original" in batch[0] else {}), **output[0]}
