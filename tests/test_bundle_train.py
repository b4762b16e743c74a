"""The training configuration, run whole on tiny generated subjects with a tiny random network."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow

from brainfm_monai.anatomy import Protocol

SIZE = (32, 32, 32)
TINY: dict[str, Any] = {
    "spatial_size": [16, 16, 16],
    "features": [8, 16, 32],
    "epoch_length": 2,
    "max_epochs": 1,
    "val_interval": 1,
    "precision": "float32",
    "mni_size": [8, 8, 8],
}


def write_subject(folder: Path, size: int) -> dict[str, str]:
    """A head in the prepared layout: skin, two hemispheres of different size, distances and coordinates that fit."""
    ids = np.zeros(SIZE, dtype=np.int32)
    ids[2:30, 2:30, 2:30] = 511
    ids[6:15, 6 : 6 + size, 6:24] = 3
    ids[17:25, 6:20, 8:20] = 41
    x = np.indices(SIZE)[0] - 15.5
    affine = np.eye(4)
    folder.mkdir(parents=True)
    arrays = {
        "generation_labels": Protocol.load("synthseg_generation").encode(ids),
        "segmentation": Protocol.load("synthseg_head").encode(ids),
        "distance": np.stack([x, x + 1, -x, 1 - x], axis=-1).clip(-6.4, 6.35).astype(np.float32),
        "mni": np.moveaxis(np.indices((8, 8, 8)) * 4.0 - 14, 0, -1).astype(np.float32),
    }
    for name, array in arrays.items():
        nibabel.save(nibabel.Nifti1Image(array, affine), folder / f"{name}.nii.gz")
    return {"subject": folder.name, **{name: f"{folder.name}/{name}.nii.gz" for name in arrays}}


@pytest.fixture(scope="module")
def dataset_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    items = [write_subject(root / f"sub-{i}", 14 + i) for i in range(3)]
    del items[1]["mni"]  # a subject without one of the targets is an ordinary subject
    (root / "datalist.json").write_text(json.dumps({"training": items[:2], "validation": items[2:]}), encoding="utf-8")
    return root


def make_workflow(
    repository: Path, dataset_dir: Path, output_dir: Path, names: Sequence[str] = ("train.json",), **overrides: Any
) -> ConfigWorkflow:
    bundle = repository / "bundle"
    return ConfigWorkflow(
        workflow_type="train",
        config_file=[str(bundle / "configs" / name) for name in names],
        meta_file=str(bundle / "configs" / "metadata.json"),
        logging_file=False,
        bundle_root=str(bundle),
        dataset_dir=str(dataset_dir),
        output_dir=str(output_dir),
        device="$torch.device('cpu')",
        **{**TINY, **overrides},
    )


def test_every_required_property_is_there(repository: Path, dataset_dir: Path, tmp_path: Path) -> None:
    workflow = make_workflow(repository, dataset_dir, tmp_path)
    workflow.initialize()
    assert workflow.check_properties() == []
    config = json.loads((repository / "bundle" / "configs" / "train.json").read_text(encoding="utf-8"))
    assert isinstance(config["train"]["handlers"], list)


def test_training_by_the_bundle_command_leaves_weights_logs_and_a_checkpoint(
    repository: Path, dataset_dir: Path, tmp_path: Path
) -> None:
    overrides = {**TINY, "dataset_dir": dataset_dir, "output_dir": tmp_path, "bundle_root": repository / "bundle"}
    options = [part for name, value in overrides.items() for part in (f"--{name}", str(value))]
    command = [
        sys.executable,
        "-m",
        "monai.bundle",
        "run",
        "--config_file",
        str(repository / "bundle/configs/train.json"),
        *options,
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "mean_dice" in done.stdout + done.stderr
    names = {path.name for path in tmp_path.iterdir()}
    assert {"model.pt", "training_checkpoint_2.pt"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    weights = torch.load(tmp_path / "model.pt", weights_only=True)
    assert {"head.weight", "head.bias"} <= set(weights)


def test_training_changes_the_network_and_goes_on_from_its_checkpoint(
    repository: Path, dataset_dir: Path, tmp_path: Path
) -> None:
    workflow = make_workflow(repository, dataset_dir, tmp_path)
    workflow.initialize()
    network = workflow.parser.get_parsed_content("network")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    workflow.run()
    assert all(not torch.equal(before[name], value) for name, value in network.state_dict().items() if name.startswith("head"))

    resumed = make_workflow(repository, dataset_dir, tmp_path, max_epochs=2)
    resumed.initialize()
    resumed.run()
    trainer = resumed.parser.get_parsed_content("train#trainer")
    assert trainer.state.epoch == 2
    assert trainer.state.iteration == 4
    assert resumed.parser.get_parsed_content("lr_scheduler").last_epoch == 4


def test_coarse_weights_start_the_fine_training(repository: Path, dataset_dir: Path, tmp_path: Path) -> None:
    names = ("train.json", "coarse.json")
    small = {"network_def#backbone#features": [16, 32], "spatial_size": [8, 8, 8]}
    coarse = make_workflow(repository, dataset_dir, tmp_path / "coarse", names, **small)
    coarse.initialize()
    assert coarse.check_properties() == []
    coarse.run()
    weights = torch.load(tmp_path / "coarse" / "model.pt", weights_only=True)

    coarse_weights = str(tmp_path / "coarse" / "model.pt")
    fine = make_workflow(repository, dataset_dir, tmp_path / "fine", features=[8, 16, 32], coarse_weights=coarse_weights)
    fine.initialize()
    state = fine.parser.get_parsed_content("network").state_dict()
    for name in weights:
        if name.startswith("backbone."):
            assert torch.equal(state[name.replace("backbone.", "backbone.coarse.")], weights[name]), name
    assert torch.equal(state["head.weight"][:, 8:], weights["head.weight"])
