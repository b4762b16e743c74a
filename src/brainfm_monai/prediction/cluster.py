"""Thousands of scans on workers of a Dask cluster: each scan is a task; a lost worker's scans are done elsewhere."""

import json
import logging
import os
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache, partial
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from monai.bundle import ConfigParser, create_workflow

from brainfm_monai.io import ScanError, one_line, refuse_if
from brainfm_monai.prediction.loop import Outcome, ScanDataset, run_list, run_scans

logger = logging.getLogger(__name__)

MOST_LOSSES = 3  # workers that may die of one scan before the scan fails
_one_at_a_time = Lock()  # a worker of several threads has one network


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
