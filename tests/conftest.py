"""What every test gets: one thread per worker, no display, and the real scans where they are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

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
