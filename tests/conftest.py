"""What every test gets: one thread per worker, no display, and the real scans where they are."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Two workers on two cores: one thread each, here and in every process that a test starts.
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"):
    os.environ[name] = "1"
os.environ["MPLBACKEND"] = "Agg"

torch.set_num_threads(1)

REPOSITORY = Path(__file__).resolve().parents[1]
BUNDLE = REPOSITORY / "bundle"
if not BUNDLE.exists():  # an unpacked sdist, which holds the bundle inside the package alone
    BUNDLE.symlink_to("src/brainfm_monai/bundle", target_is_directory=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the GPU tests, with the reason, where there is no GPU."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def begin_anew(name: str) -> None:
    """Seed the global generators, so that what a file, a fixture or a test draws does not depend on what ran before."""
    seed = crc32(name.encode())
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


@pytest.hookimpl(tryfirst=True)
def pytest_collectstart(collector: pytest.Collector) -> None:
    begin_anew(collector.name)


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[Any]) -> None:
    begin_anew(fixturedef.argname)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    begin_anew(item.name)


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real scans beside the checkout; without it the test is skipped."""
    folder = REPOSITORY.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no folder of real scans at {folder}")
    return folder


class HostWatch(TorchDispatchMode):
    """Collects what would make a host wait for a device, and what draws a number or makes a tensor of the host's."""

    WAITS = (
        "_local_scalar_dense", "lift_fresh", "nonzero", "is_nonzero", "equal", "unique", "masked_select", "bincount",
        "randn", "rand",
    )  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func).split(".")[1]
        if name in self.WAITS or (name == "index" and any(i is not None and i.dtype == torch.bool for i in args[1])):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def watch_host() -> type[HostWatch]:
    """A context in which everything that waits for a device is collected."""
    return HostWatch
