"""Ten subjects by heart: every task of the training configuration can be learnt, in a short run of a tiny random network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow
from monai.utils import CommonKeys

from brainfm_monai.anatomy import Protocol

SIZE = 16
# Loss of each task after the run; at the start each is at least twice what it is at the end.
LIMITS = {
    "segmentation": 1.0,  # cross entropy + 1 - Dice
    "distance": 0.3,  # mm
    "log_bias_field": 0.005,
    "mni": 0.08,  # 100 mm
    "T1w": 0.25,  # L1 and L1 of the gradient, intensity in [0, 1]; CT in 1000 HU
    "T2w": 0.2,
    "FLAIR": 0.2,
    "CT": 0.25,
    "lesion": 0.5,  # cross entropy + 1 - Dice
    "super_resolution": 0.3,
}
IMAGES = ("T1w", "T2w", "FLAIR", "CT")
# Intensity of skin, left and right cortex in each image; CT in HU.
LEVELS = {"T1w": (0.9, 0.5, 0.6), "T2w": (0.3, 0.7, 0.8), "FLAIR": (0.4, 0.9, 0.7), "CT": (-50.0, 35.0, 45.0)}


def write_subject(folder: Path, number: int) -> dict[str, str]:
    """A head whose two hemispheres differ from those of every other subject, with all four images."""
    rng = np.random.default_rng(number)
    grid = np.indices((SIZE,) * 3) - (SIZE - 1) / 2
    ids = np.where((grid**2).sum(0) < 7.5**2, 511, 0)
    distances = []
    for freesurfer_id, side in ((3, -1), (42, 1)):
        centre = np.array([3.2 * side, *rng.uniform(-2, 2, 2)]).reshape(3, 1, 1, 1)
        distance = np.sqrt(((grid - centre) ** 2).sum(0)) - rng.uniform(2, 3.2)
        ids[distance < 0] = freesurfer_id
        distances += [distance, distance + 1]
    folder.mkdir(parents=True)
    arrays = {
        "generation_labels": Protocol.load("synthseg_generation").encode(ids),
        "segmentation": Protocol.load("synthseg_head").encode(ids),
        "distance": np.stack(distances, axis=-1).clip(-6.4, 6.35).astype(np.float32),
        "mni": np.moveaxis(grid * 4, 0, -1).astype(np.float32),
    }
    for name, levels in LEVELS.items():
        air = -1000.0 if name == "CT" else 0.0
        arrays[name] = np.select([ids == 511, ids == 3, ids == 42], levels, air).astype(np.float32)
    for name, array in arrays.items():
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), folder / f"{name}.nii.gz")
    return {"subject": folder.name, **{name: f"{folder.name}/{name}.nii.gz" for name in arrays}}


def make_workflow(repository: Path, dataset_dir: Path, output_dir: Path, **overrides: Any) -> ConfigWorkflow:
    configs = repository / "bundle" / "configs"
    return ConfigWorkflow(
        workflow_type="train",
        config_file=str(configs / "train.json"),
        meta_file=str(configs / "metadata.json"),
        logging_file=False,
        bundle_root=str(repository / "bundle"),
        dataset_dir=str(dataset_dir),
        output_dir=str(output_dir),
        device="$torch.device('cpu')",
        **overrides,
    )


@pytest.fixture
def dataset_dir(tmp_path: Path) -> Path:
    items = [write_subject(tmp_path / "data" / f"sub-{number:02}", number) for number in range(10)]
    datalist = {"training": items, "validation": items[:1]}
    (tmp_path / "data" / "datalist.json").write_text(json.dumps(datalist), encoding="utf-8")
    return tmp_path / "data"


def test_ten_subjects_are_learnt_by_heart(repository: Path, dataset_dir: Path, tmp_path: Path) -> None:
    workflow = make_workflow(
        repository,
        dataset_dir,
        tmp_path / "out",
        **{
            "layout#tasks": list(LIMITS),
            "images": list(IMAGES),
            "scan_mm": 1.0,
            "spatial_size": [SIZE] * 3,
            "network_def#backbone": {"_target_": "brainfm_monai.networks.UNet", "features": [16, 32]},
            "precision": "float32",
            "batch_size": 5,
            "epoch_length": 2,
            "max_epochs": 80,
            "val_interval": 80,
            "learning_rate": 0.01,
            "warmup_iterations": 5,
            "max_gradient_norm": 1.0,
            "panels": 0,
            "train#prepare_batch#fixed": True,  # the same scan of a subject whenever it comes
            "loss#weights": {},
            "synthesis": {
                "_target_": "brainfm_monai.synthesis.SynthesisRanges",
                "rotation_deg": [-5, 5],
                "shear": [0, 0],
                "scaling": [0.95, 1.05],
                "translation_mm": [-1, 1],
                "velocity_std_mm": [0, 0.5],
                "contrast_prior_prob": 1.0,
                "contrast_priors": ["T1w"],
                "contrast_inversion_prob": 0,
                "head_cluster_prob": 0,
                "mixup_prob": 0,
                "input_weights": [1, 0, 0, 0, 0],
                "noise_std": [0, 2],
                "std": [0, 1],
                "resolution_weights": [1, 0, 0, 0],
                "skull_strip_prob": 0,
                "head_removal_prob": 0,
                "deface_prob": 0,
                "field_of_view_prob": 0,
                "lesion_prob": 1.0,
                "lesion_coverage": [0.3, 0.3],
                "lesion_flow_mm": [0, 1],
            },
        },
    )
    workflow.initialize()
    trainer = workflow.parser.get_parsed_content("train#trainer")
    loss = workflow.parser.get_parsed_content("loss")
    network = workflow.parser.get_parsed_content("network")
    prepare = workflow.parser.get_parsed_content("train#prepare_batch")
    batch = next(iter(workflow.parser.get_parsed_content("train#dataloader")))
    image, target = prepare(batch, "cpu")

    def measure() -> dict[str, float]:
        with torch.no_grad():
            loss(network(image), target)
        return {name: float(value) for name, value in loss.components.items()}

    before = measure()
    workflow.run()
    after = measure()
    assert trainer.state.iteration == 160
    assert set(after) == set(LIMITS)
    for name, limit in LIMITS.items():
        assert after[name] < limit, (
            f"{name}: {before[name]:.3f} at the start, {after[name]:.3f} at the end, {limit} is the limit"
        )
        assert before[name] > 2 * after[name], name
    assert CommonKeys.LOSS in trainer.state.output
