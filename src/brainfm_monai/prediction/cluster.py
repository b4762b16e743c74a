"""Thousands of scans on workers of a Dask cluster: each scan is a task; a lost worker's scans are done elsewhere."""

import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from monai.bundle import ConfigParser, ConfigWorkflow
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from brainfm_monai.io import literal, one_line, refuse_if
from brainfm_monai.outputs import ScanWriter
from brainfm_monai.prediction.loop import ScanDataset, choose_scans, finish_run, run_scans

if TYPE_CHECKING:
    from distributed import Client

logger = logging.getLogger(__name__)

MOST_LOSSES = 3  # workers that may die of one scan before the scan fails
# keys of the config that are paths
PATHS = ("bundle_root", "input", "output_dir", "weights", "weights_dir", "dataset_dir", "datalist")
_one_at_a_time = Lock()  # a worker of several threads has one network


def predict_on_cluster(cluster: str, settings: Mapping[str, Any]) -> None:
    """Run the inference config over its scans on the workers of a Dask cluster.

    Every worker loads the network once, and reads and writes files itself: paths must be valid on all machines. Scans
    of a worker that dies are done by another worker. ValueError if the cluster is not of the form below, or cannot be
    reached; SystemExit as by :func:`~brainfm_monai.prediction.predict_scans`.

    Args:
        cluster: address of a scheduler, as in ``tcp://host:8786``, or ``local:N`` for N processes of this machine.
        settings: arguments of MONAI's ConfigWorkflow, with overrides of the config.
    """
    settings, keys = _with_absolute_paths(settings), ("dataset", "writer", "shard", "overwrite")
    dataset, writer, shard, overwrite = map(_build(json.dumps(settings)).get_parsed_content, keys)
    numbers = choose_scans(dataset, writer, shard, overwrite)
    failures = _compute(cluster, json.dumps({**settings, "scans": []}), dataset, writer, numbers) if numbers else []
    writer.clear()
    finish_run(dataset, writer, failures)


def _compute(cluster: str, settings: str, dataset: ScanDataset, writer: ScanWriter, numbers: list[int]) -> list[str]:
    """Give each scan to a worker; one line for each scan that failed."""
    from distributed import as_completed

    failures: list[str] = []
    items = {f"{number}-{dataset.data[number]['name']}": dict(dataset.data[number]) for number in numbers}
    for item in items.values():
        item["image"] = str(Path(item["image"]).absolute())
    bar = tqdm(total=len(numbers), unit="scan")
    with _connect(cluster, len(numbers)) as client, logging_redirect_tqdm(), bar:
        futures = client.map(predict_one, list(items.values()), key=list(items), settings=settings, pure=False)
        for future in as_completed(futures):
            item, error = items[future.key], future.exception()
            message = one_line(error, str(item["name"])) if error is not None else future.result()
            if message:
                failures.append(message)
                logger.error("%s", message)
            if error is not None and len(dataset) > 1:  # the worker could not note it
                writer.note_failure(item, message)
            future.release()
            bar.update()
    return failures


def predict_one(item: dict[str, Any], settings: str) -> str:
    """Predict one scan in a worker; returns why it failed, or nothing."""
    with _one_at_a_time:
        parser = _build(settings)
        parser.get_parsed_content("dataset").data = [item]
        evaluator, writer = map(parser.get_parsed_content, ("evaluator", "writer"))
        return "".join(run_scans(evaluator, writer, [0], show_bar=False))


@lru_cache(maxsize=1)
def _build(settings: str) -> ConfigParser:
    """The parsed config, which a process keeps for its next scan; settings as JSON."""
    workflow = ConfigWorkflow(workflow_type="inference", **json.loads(settings))
    workflow.initialize()
    return workflow.parser


def _with_absolute_paths(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that mean the same in every folder and process; a file of further overrides is read."""
    merged = dict(settings)
    if "args_file" in merged:
        merged = {**json.loads(Path(merged.pop("args_file")).read_text(encoding="utf-8")), **merged}
    for key in PATHS:
        value = merged.get(key, "")
        path = "" if "@" in str(value) else ConfigParser({"path": value}).get_parsed_content("path")
        if isinstance(path, str) and path and (key == "output_dir" or Path(path).exists()):
            merged[key] = literal(str(Path(path).absolute()))
    files = {"config_file": [str(Path(file).absolute()) for file in merged["config_file"]]}
    return {**merged, **files, "meta_file": str(Path(merged["meta_file"]).absolute()), "logging_file": False}


@contextmanager
def _connect(cluster: str, tasks: int) -> Iterator["Client"]:
    """A client of the cluster; local workers share the cores, and end with the block."""
    import dask
    from distributed import Client, LocalCluster

    local = re.fullmatch(r"local:([1-9]\d*)", cluster)
    rule = "cluster: the address of a scheduler (tcp://host:port) or local:N is needed"
    refuse_if(not local and "://" not in cluster, rule, f"'{cluster}'")
    options: dict[str, Any] = {"distributed.scheduler.allowed-failures": MOST_LOSSES}
    if local:
        threads = str(max(1, torch.get_num_threads() // int(local[1])))
        variables = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        options["distributed.nanny.pre-spawn-environ"] = dict.fromkeys(variables, threads)
    with dask.config.set(options):
        workers: Any = None
        try:
            if local:
                count = min(int(local[1]), tasks)
                workers = LocalCluster(count, threads_per_worker=1, memory_limit=0, dashboard_address=":0")
            client = Client(workers or cluster)
        except (OSError, TimeoutError) as error:
            raise ValueError(f"cluster: a scheduler must answer at {cluster}, found {error}") from error
        with client, workers or nullcontext():
            count = len(client.scheduler_info(n_workers=-1)["workers"])
            logger.info("%d scans for %d workers; progress: %s", tasks, count, client.dashboard_link)
            yield client
