"""Thousands of scans on the workers of a Dask cluster: each scan is a task, and a lost worker's scans are done elsewhere."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from monai.bundle import ConfigParser, ConfigWorkflow
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from brainfm_monai.io import fingerprint, literal, one_line
from brainfm_monai.outputs import ScanWriter
from brainfm_monai.prediction.loop import choose_scans, finish_run, run_scans
from brainfm_monai.prediction.scans import ScanDataset

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["predict_on_cluster"]

logger = logging.getLogger(__name__)

MOST_LOSSES = 3  # workers that may die of one scan before the scan fails
PATHS = (
    "bundle_root",
    "input",
    "output_dir",
    "weights",
    "weights_dir",
    "dataset_dir",
    "datalist",
)  # keys of the config
_one_at_a_time = Lock()  # a worker of several threads has one network
_parsers: dict[str, ConfigParser] = {}  # of this process, by the fingerprint of the settings


def predict_on_cluster(cluster: str, settings: Mapping[str, Any]) -> None:
    """Run the inference config over its scans on the workers of a Dask cluster.

    Every worker loads the network once, and reads and writes files itself: paths must be valid on all machines. Scans that are
    finished are skipped; those of a worker that dies are done by another worker.

    Args:
        cluster: address of a scheduler, as in ``tcp://host:8786``, or ``local:N`` for N processes of this machine.
        settings: arguments of MONAI's ConfigWorkflow, with overrides of the config.

    Raises:
        SystemExit: see :func:`~brainfm_monai.prediction.predict_scans`.
        ValueError: if the cluster is not of that form, or cannot be reached.
    """
    settings = _with_absolute_paths(settings)
    parser = _build(settings)
    dataset: ScanDataset = parser.get_parsed_content("dataset")
    writer: ScanWriter = parser.get_parsed_content("writer")
    shard, overwrite = (parser.get_parsed_content(key) for key in ("shard", "overwrite"))
    numbers = choose_scans(dataset, writer, shard, overwrite)
    failures = _compute(cluster, {**settings, "scans": []}, dataset, writer, numbers) if numbers else []
    writer.clear()
    finish_run(dataset, writer, failures)


def _compute(
    cluster: str, settings: dict[str, Any], dataset: ScanDataset, writer: ScanWriter, numbers: list[int]
) -> list[str]:
    """Give each scan to a worker; one line for each scan that failed."""
    from distributed import as_completed

    failures: list[str] = []
    with _connected(cluster, len(numbers)) as client, logging_redirect_tqdm():
        items = {f"{number}-{dataset.data[number]['name']}": _absolute(dataset.data[number]) for number in numbers}
        futures = client.map(predict_one, list(items.values()), key=list(items), settings=settings, pure=False)
        with tqdm(total=len(numbers), unit="scan") as bar:
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


def predict_one(item: dict[str, Any], settings: dict[str, Any]) -> str:
    """Predict one scan in a worker; returns why it failed, or nothing."""
    with _one_at_a_time:
        key = fingerprint(settings)
        if key not in _parsers:
            _parsers.clear()
            _parsers[key] = _build(settings)
        parser = _parsers[key]
        evaluator = parser.get_parsed_content("evaluator")
        dataset: ScanDataset = parser.get_parsed_content("dataset")
        dataset.data = [item]
        return "".join(run_scans(evaluator, parser.get_parsed_content("writer"), [0], show_bar=False))


def _build(settings: Mapping[str, Any]) -> ConfigParser:
    workflow = ConfigWorkflow(workflow_type="inference", **settings)
    workflow.initialize()
    parser: ConfigParser = workflow.parser
    return parser


def _absolute(item: dict[str, Any]) -> dict[str, Any]:
    return {**item, **{key: str(Path(item[key]).absolute()) for key in ("image", "lesions") if item.get(key)}}


def _with_absolute_paths(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that mean the same in every folder and process; a file of further overrides is read."""
    merged = dict(settings)
    if "args_file" in merged:
        merged = {**json.loads(Path(merged.pop("args_file")).read_text(encoding="utf-8")), **merged}
    for key, value in merged.items():
        path = (
            ConfigParser({"path": value}).get_parsed_content("path") if key in PATHS and "@" not in str(value) else None
        )
        if isinstance(path, str) and path and (key == "output_dir" or Path(path).exists()):
            merged[key] = literal(str(Path(path).absolute()))
    merged["config_file"] = [str(Path(file).absolute()) for file in merged["config_file"]]
    merged["meta_file"] = str(Path(merged["meta_file"]).absolute())
    return {**merged, "logging_file": False}


@contextmanager
def _connected(cluster: str, tasks: int) -> Iterator[Client]:
    """A client of the cluster; local workers share the cores, and end with the block."""
    try:
        import dask
        from distributed import Client, LocalCluster
    except ImportError as error:
        raise ValueError("cluster: the extra 'cluster' is needed: pip install 'brainfm-monai[cluster]'") from error
    local = re.fullmatch(r"local:([1-9]\d*)", cluster)
    if not local and "://" not in cluster:
        raise ValueError(
            f"cluster: the address of a scheduler (tcp://host:port) or local:N is needed, found '{cluster}'"
        )
    threads = str(max(1, torch.get_num_threads() // int(local[1]))) if local else ""
    environment = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), threads)
    with dask.config.set(
        {
            "distributed.scheduler.allowed-failures": MOST_LOSSES,
            **({"distributed.nanny.pre-spawn-environ": environment} if local else {}),
        }
    ):
        local_cluster = None
        try:
            if local:
                workers = min(int(local[1]), tasks)
                local_cluster = LocalCluster(workers, threads_per_worker=1, memory_limit=0, dashboard_address=":0")
            client = Client(local_cluster or cluster)
        except (OSError, TimeoutError) as error:
            raise ValueError(f"cluster: a scheduler must answer at {cluster}, found {error}") from error
        with client, local_cluster or nullcontext():
            count = len(client.scheduler_info(n_workers=-1)["workers"])
            logger.info("%d scans for %d workers; progress: %s", tasks, count, client.dashboard_link)
            yield client
