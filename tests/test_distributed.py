"""Two processes with torchrun, against one process with the doubled batch."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigWorkflow
from tests.test_bundle_train import TINY, write_subject
from tests.test_resume import logged

SETTINGS: dict[str, Any] = {
    **TINY,
    "max_epochs": 1,
    "epoch_length": 4,
    "val_interval": 1,
    "warmup_iterations": 1,
    "learning_rate": 0.01,
    "device": "$torch.device('cpu')",
}
STEPS = int(SETTINGS["epoch_length"])
RECORDER = """
from pathlib import Path
import ignite.distributed as idist
from ignite.engine import Events

class RecordSeeds:
    def __init__(self, folder):
        self.file = Path(folder) / f"seeds_{idist.get_rank()}.txt"

    def attach(self, engine):
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine):
        with self.file.open("a") as file:
            print(*engine.state.batch["seed"].tolist(), file=file)
"""
# AdamW divides each gradient by its size, so that the rounding of one near 0 becomes a whole step: SGD shows the gradients.
SGD = {"_target_": "torch.optim.SGD", "params": "$@network.parameters()", "lr": "@learning_rate", "momentum": 0.9}
RELATIVE_TOLERANCE = (
    1e-6  # of all weights together, in the L2 norm; ten times that of what the training has changed of them
)


@pytest.fixture(scope="module")
def dataset_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    items = [
        write_subject(root / f"sub-{i}", 12 + i) for i in range(5)
    ]  # an odd number for validation: parts of two sizes
    (root / "datalist.json").write_text(json.dumps({"training": items[:2], "validation": items[2:]}), encoding="utf-8")
    return root


def run_two(repository: Path, dataset_dir: Path, folder: Path) -> None:
    bundle = repository / "bundle" / "configs"
    folder.mkdir()
    (folder / "recorder.py").write_text(RECORDER, encoding="utf-8")
    record = {"optimizer": SGD, "+train#handlers": [{"_target_": "recorder.RecordSeeds", "folder": str(folder)}]}
    (folder / "record.json").write_text(json.dumps(record), encoding="utf-8")
    configs = [str(bundle / "train.json"), str(bundle / "multi_gpu_train.json"), str(folder / "record.json")]
    overrides = {
        **SETTINGS,
        "dataset_dir": dataset_dir,
        "output_dir": folder,
        "bundle_root": bundle.parent,
        "backend": "gloo",
    }
    options = [part for name, value in overrides.items() for part in (f"--{name}", str(value))]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launch, "-m", "monai.bundle", "run", "--config_file", str(configs), *options]
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stderr


def flat(state: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([value.double().flatten() for value in state.values()])


def test_two_processes_are_one_with_the_doubled_batch(repository: Path, dataset_dir: Path, tmp_path: Path) -> None:
    both, alone = tmp_path / "both", tmp_path / "alone"
    run_two(repository, dataset_dir, both)
    bundle = repository / "bundle"
    overrides = {**SETTINGS, "dataset_dir": str(dataset_dir), "output_dir": str(alone), "bundle_root": str(bundle)}
    one = ConfigWorkflow(
        workflow_type="train",
        config_file=str(bundle / "configs/train.json"),
        logging_file=False,
        batch_size=2,
        **overrides,
        optimizer=SGD,
    )
    one.initialize()
    before = flat(one.parser.get_parsed_content("network").state_dict())
    one.run()

    seeds = [(both / f"seeds_{rank}.txt").read_text(encoding="utf-8").split() for rank in range(2)]
    assert len({*seeds[0], *seeds[1]}) == 2 * STEPS  # no sample is drawn twice, by whomsoever
    draws = one.parser.get_parsed_content("train#draws")
    assert [int(s) for pair in zip(*seeds, strict=True) for s in pair] == [draws[i]["seed"] for i in range(2 * STEPS)]

    name = f"training_checkpoint_{STEPS}.pt"
    states = [torch.load(folder / name, weights_only=True) for folder in (both, alone)]
    assert states[0]["trainer"]["draws"] == states[1]["trainer"]["draws"] == 2 * STEPS
    for part in ("network", "average"):
        assert set(states[0][part]) == set(states[1][part])  # without "module." of the wrapper
    after = [flat(state["network"]) for state in states]
    assert (after[0] - after[1]).norm() < RELATIVE_TOLERANCE * after[1].norm()
    assert (after[0] - after[1]).norm() < 10 * RELATIVE_TOLERANCE * (after[1] - before).norm()
    for curve in (
        "loss",
        "distance",
        "mean_dice",
        "distance_mae_mm",
        "mni_error_mm",
        "log_bias_error",
        "gradient_norm",
    ):
        assert logged(both, curve) == pytest.approx(logged(alone, curve), rel=1e-5), curve
    assert len(list(both.glob("events.out.tfevents*"))) == 1  # one writer
    assert set(torch.load(both / "model.pt", weights_only=True)) == set(states[1]["network"])
