"""Segmentation: the bundle's own task, with weights that training adds, one request at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from fastapi import HTTPException
from filelock import FileLock
from monailabel.tasks.infer.bundle import BundleInferTask

from brainfm_monai.io import ScanError, one_line
from brainfm_monai.networks import prepare_network

__all__ = ["UNUSABLE", "SegmentationTask", "guarded", "list_weights"]

UNUSABLE = 422  # HTTP: the request is understood, its content cannot be used


def list_weights(bundle: str | Path) -> list[str]:
    """Names of the weights in a bundle: those of the newest training first, the shipped weights last."""
    files = sorted(Path(bundle).glob("models/*.pt"), key=lambda path: path.stat().st_mtime, reverse=True)
    return sorted((path.name for path in files), key=lambda name: name == "model.pt")


@contextmanager
def guarded(bundle: str | Path, image: str) -> Iterator[None]:
    """Let one inference run at a time, in all threads and processes of the server, and report errors in one line.

    Batch inference is a process beside the server: two inferences at once would need twice the memory and take twice the time.

    Args:
        bundle: folder of the bundle.
        image: name of the scan in messages.

    Raises:
        HTTPException: with status 422 if the scan cannot be used, 500 if anything else failed.
    """
    lock = (
        Path(tempfile.gettempdir())
        / f"brainfm-monai-{sha256(str(Path(bundle).resolve()).encode()).hexdigest()[:12]}.lock"
    )
    try:
        with FileLock(lock):
            yield
    except HTTPException:
        raise
    except Exception as error:  # transforms, network and writers raise anything; MONAI wraps it
        chain: BaseException | None = error
        while chain is not None and not isinstance(chain, ScanError):
            chain = chain.__cause__
        raise HTTPException(UNUSABLE if chain else 500, one_line(error, image)) from error


class SegmentationTask(BundleInferTask):
    """The segmentation of ``inference.json``.

    Args:
        bundle: folder of the bundle.
        conf: settings of the app; ``structures brain`` leaves the tissues of the head out of the list of structures.
    """

    def __init__(self, bundle: str, conf: dict[str, str]) -> None:
        super().__init__(bundle, conf, load_strict=True)
        protocol = self.bundle_config.get_parsed_content("layout").protocol
        self.structures = {s.name.lower(): s for s in protocol.structures[1:]}
        if conf.get("structures") == "brain":
            # structures of the brain come first in the protocol: their labels stay 1, 2, 3, ...
            self.labels = {name: s.label for name, s in self.structures.items() if protocol.is_brain[s.label]}
            self.displayable_configs = {**self.displayable_configs, "mode": ["brain"]}
            self._config["mode"] = ["brain"]

    def config(self) -> dict[str, Any]:
        """Settings for clients, with the weights that are there now."""
        self._config["model_filename"] = list_weights(self.bundle_path)
        return self._config

    def _get_network(self, device: str, data: dict[str, Any]) -> torch.nn.Module:
        """The network with the weights that a request names.

        Its layout in memory is that of every other run, whichever request was the first to use it: the layout decides
        how sums are rounded, and one request answered twice has one answer.
        """
        return prepare_network(super()._get_network(device, data), torch.device(device))

    def __call__(self, request: dict[str, Any], callbacks: Any = None) -> tuple[Any, dict[str, Any]]:
        """Segment one scan."""
        self.config()
        with guarded(self.bundle_path, Path(str(request.get("image"))).name):
            return super().__call__({"result_dtype": "uint8", **request}, callbacks)
