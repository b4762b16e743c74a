"""A training that is killed at the worst moments and started again, against one that was left alone."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigWorkflow
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tests.test_bundle_train import TINY, write_subject

SETTINGS: dict[str, Any] = {
    **TINY,
    "max_epochs": 3,
    "epoch_length": 3,
    "val_interval": 2,
    "max_gradient_norm": 1.0,
    "batch_size": 2,
    "accumulation": 2,
    "warmup_iterations": 2,
    "panels": 0,
}
# A handler that ends its own process as `kill -9` does, at a moment that is known.
KILLER = """
import os, signal
import torch
from ignite.engine import Events

class KillAt:
    def __init__(self, iteration=None, save=None):
        self.iteration, self.saves = iteration, save

    def attach(self, engine):
        engine.add_event_handler(Events.ITERATION_COMPLETED, self.step)
        write = torch.save

        def save(content, path):
            if self.saves is None or "optimizer" not in content:
                return write(content, path)
            self.saves -= 1
            if self.saves == 0:
                path.write_bytes(b"half a checkpoint")
                os.kill(os.getpid(), signal.SIGKILL)
            return write(content, path)

        torch.save = save

    def step(self, engine):
        if engine.state.iteration == self.iteration:
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def dataset_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    items = [write_subject(root / f"sub-{i}", 13 + i) for i in range(4)]
    del items[1]["mni"]
    (root / "datalist.json").write_text(json.dumps({"training": items[:3], "validation": items[3:]}), encoding="utf-8")
    return root


def start(repository: Path, dataset_dir: Path, folder: Path, killer: dict[str, int]) -> int:
    """Run the bundle's command in a process of its own, with a handler that ends it; its exit status."""
    bundle = repository / "bundle"
    folder.mkdir(exist_ok=True)
    (folder / "killer.py").write_text(KILLER, encoding="utf-8")
    handlers = [{"_target_": "killer.KillAt", **killer}]
    (folder / "kill.json").write_text(json.dumps({"+train#handlers": handlers}), encoding="utf-8")
    configs = [str(bundle / "configs" / "train.json"), str(folder / "kill.json")]
    overrides = {**SETTINGS, "dataset_dir": dataset_dir, "output_dir": folder, "bundle_root": bundle}
    options = [part for name, value in overrides.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(configs), *options]
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


def logged(folder: Path, name: str) -> dict[int, float]:
    """The numbers of a curve by iteration, the last ones where a part was done again."""
    events = EventAccumulator(str(folder)).Reload()
    return {event.step: event.value for event in sorted(events.Scalars(name), key=lambda event: event.wall_time)}


def test_a_killed_training_gives_the_losses_and_weights_of_one_left_alone(
    repository: Path, dataset_dir: Path, tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    bundle = repository / "bundle"
    overrides = {**SETTINGS, "dataset_dir": str(dataset_dir), "output_dir": str(whole), "bundle_root": str(bundle)}
    alone = ConfigWorkflow(
        workflow_type="train", config_file=str(bundle / "configs" / "train.json"), logging_file=False, **overrides
    )
    alone.initialize()
    alone.run()

    assert (
        start(repository, dataset_dir, parts, {"iteration": 5}) == -signal.SIGKILL
    )  # in the middle of the second epoch
    assert [path.name for path in parts.glob("*.pt")] == ["training_checkpoint_3.pt"]
    assert (
        start(repository, dataset_dir, parts, {"save": 1}) == -signal.SIGKILL
    )  # while it writes the checkpoint of the second
    (half,) = parts.glob(".*.partial.training_checkpoint_6.pt")
    assert half.read_bytes() == b"half a checkpoint"
    best_before = torch.load(parts / "model.pt", weights_only=True)
    assert start(repository, dataset_dir, parts, {}) == 0

    for name in ("loss", "segmentation", "distance", "mni", "log_bias_field", "gradient_norm", "learning_rate"):
        expected = logged(whole, name)
        assert list(expected) == list(range(1, 10))
        assert logged(parts, name) == expected, name
    newest = [torch.load(folder / "training_checkpoint_9.pt", weights_only=True) for folder in (whole, parts)]
    for part in ("network", "average"):
        for key, value in newest[0][part].items():
            assert torch.equal(newest[1][part][key], value), (part, key)
    assert newest[0]["trainer"] == newest[1]["trainer"]
    assert newest[0]["trainer"]["draws"] == 18
    assert newest[0]["best_weights"] == newest[1]["best_weights"]
    assert math.isfinite(newest[0]["best_weights"]["best_metric"])
    weights = torch.load(parts / "model.pt", weights_only=True)
    assert {"head.weight", "head.bias"} <= set(weights)
    assert all(
        torch.equal(value, best_before[key]) for key, value in weights.items()
    )  # of the one validation, done twice
