"""The training configuration, run whole on tiny generated subjects with a tiny random network."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import monai
import nibabel
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow

from brainfm_monai.anatomy import Protocol
from brainfm_monai.io import find_config

SIZE = (32, 32, 32)
TINY: dict[str, Any] = {
    "spatial_size": [16, 16, 16],
    "features": [8, 16, 32],
    "epoch_length": 2,
    "max_epochs": 1,
    "val_interval": 1,
    "precision": "float32",
    "synthesis#translation_mm": [-4, 4],  # a head of 32 mm stays in view
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
        config_file=[str(find_config(bundle, name)) for name in names],
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


def test_training_changes_the_network_and_goes_on_from_its_checkpoint(
    repository: Path, dataset_dir: Path, tmp_path: Path
) -> None:
    workflow = make_workflow(repository, dataset_dir, tmp_path)
    workflow.initialize()
    network = workflow.parser.get_parsed_content("network")
    before = {name: value.clone() for name, value in network.state_dict().items()}
    workflow.run()
    assert all(
        not torch.equal(before[name], value) for name, value in network.state_dict().items() if name.startswith("head")
    )

    resumed = make_workflow(repository, dataset_dir, tmp_path, max_epochs=2)
    resumed.initialize()
    resumed.run()
    trainer = resumed.parser.get_parsed_content("train#trainer")
    assert trainer.state.epoch == 2
    assert trainer.state.iteration == 4
    assert resumed.parser.get_parsed_content("lr_scheduler").last_epoch == 4


def test_batches_of_subjects_with_different_targets_and_real_scans(
    repository: Path, dataset_dir: Path, tmp_path: Path
) -> None:
    root = tmp_path / "data"
    items = [write_subject(root / f"sub-{i}", 14 + i) for i in range(3)]
    ct = np.full(SIZE, -1000.0, dtype=np.float32)
    ct[6:25, 6:20, 8:20] = 40.0
    nibabel.save(nibabel.Nifti1Image(ct, np.eye(4)), root / "sub-0" / "CT.nii.gz")
    items[0]["CT"] = "sub-0/CT.nii.gz"
    items[0]["generation_protocol"] = items[1]["generation_protocol"] = "synthseg_generation"
    del items[1]["mni"], items[1]["distance"]
    (root / "datalist.json").write_text(json.dumps({"training": items[:2], "validation": items[2:]}), encoding="utf-8")
    overrides: dict[str, Any] = {
        "images": ["CT"],
        "layout#tasks": ["segmentation", "distance", "log_bias_field", "CT", "mni"],
        "panels": 1,
    }
    overrides |= {
        "batch_size": 2,
        "synthesis#translation_mm": [0, 0],
        "precision": "bfloat16",
        "activation_checkpointing": True,
    }
    cosine = {
        "_target_": "monai.optimizers.WarmupCosineSchedule",
        "optimizer": "@optimizer",
        "warmup_steps": 1,
        "t_total": 2,
    }
    overrides["lr_scheduler"] = cosine
    workflow = make_workflow(repository, root, tmp_path, **overrides)
    workflow.initialize()
    (batch,) = [next(iter(workflow.parser.get_parsed_content("train#dataloader")))]
    place = [Path(name).name for name in batch["subject"]].index("sub-0")
    expected = {"CT": [0.0, 0.0], "mni": [0.0, 0.0], "distance": [0.0, 0.0]}
    for values in expected.values():
        values[place] = 1.0
    assert {name: batch[f"available_{name}"].tolist() for name in expected} == expected
    assert (float(batch["CT"][place].min()), float(batch["CT"][place].max())) == (-1000, 40)  # HU, as in the file
    workflow.run()
    output = workflow.parser.get_parsed_content("train#trainer").state.output
    assert {"loss", "segmentation", "distance", "CT", "mni", "learning_rate"} <= set(output["statistics"])
    saved = torch.load(tmp_path / "training_checkpoint_2.pt", weights_only=True)
    assert saved["lr_scheduler"]["last_epoch"] == 2
    assert saved["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0, abs=1e-9)  # the end of the cosine
    metrics = workflow.parser.get_parsed_content("validate#evaluator").state.metrics
    assert {"mean_dice", "distance_mae_mm", "log_bias_error", "mni_error_mm"} == set(
        metrics
    )  # the subject of the validation has no CT
    assert [path.name for path in (tmp_path / "panels").iterdir()] == ["epoch_0001_sub-2.png"]


def test_images_that_are_not_asked_for_stay_unread(repository: Path, tmp_path: Path) -> None:
    items = [
        write_subject(tmp_path / f"sub-{i}", 14 + i) | {"CT": "none.nii.gz", "T1w": "none.nii.gz"} for i in range(2)
    ]
    (tmp_path / "datalist.json").write_text(
        json.dumps({"training": [items[0]] * 3, "validation": items[1:]}), encoding="utf-8"
    )
    workflow = make_workflow(repository, tmp_path, tmp_path / "out", epoch_length=1, panels=0, images=["FLAIR"])
    workflow.initialize()
    workflow.run()
    assert workflow.parser.get_parsed_content("train#trainer").state.iteration == 1
    dataset = workflow.parser.get_parsed_content("train#dataset")
    assert "CT" not in dataset[0]
    assert len(dataset) == 3  # a subject that the list repeats weighs more, and is held once
    assert dataset[0]["generation_labels"].data_ptr() == dataset[2]["generation_labels"].data_ptr()


def test_a_subject_with_a_nan_is_named_left_out_and_ends_the_training(
    repository: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "data"
    items = [write_subject(root / f"sub-{i}", 14 + i) for i in range(3)]
    broken: Any = nibabel.load(root / "sub-1" / "distance.nii.gz")
    values = np.asarray(broken.dataobj).copy()
    values[12:20, 12:20, 12:20] = np.nan
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), root / "sub-1" / "distance.nii.gz")
    (root / "datalist.json").write_text(json.dumps({"training": items[:2], "validation": items[2:]}), encoding="utf-8")
    middle: dict[str, Any] = {"synthesis#translation_mm": [0, 0], "panels": 0, "log_interval": 2}
    workflow = make_workflow(repository, root, tmp_path / "one", epoch_length=4, val_interval=9, **middle)
    workflow.initialize()
    workflow.run()
    lines = [record.getMessage() for record in caplog.records if "not finite" in record.getMessage()]
    text = r"iteration (\d): the loss of distance is not finite: (\S*), seed (\d+); .*"
    found = [match for line in lines if (match := re.fullmatch(text, line))]
    assert len(found) == 2
    assert all(value.isfinite().all() for value in workflow.parser.get_parsed_content("network").state_dict().values())

    subject = workflow.parser.get_parsed_content("train#draws")[int(found[0][1]) - 1]
    assert (Path(subject["subject"]).name, subject["seed"]) == ("sub-1", int(found[0][3]))
    synthesizer = workflow.parser.get_parsed_content("synthesizer")
    batch = {key: value[None] for key, value in subject.items() if isinstance(value, torch.Tensor) and value.ndim == 4}
    assert synthesizer(batch, [subject["seed"]])["distance"].isnan().any()  # the sample again, from what the line says

    only = {"training": items[1:2], "validation": items[2:]}
    (root / "datalist.json").write_text(json.dumps(only), encoding="utf-8")
    stopped = make_workflow(
        repository, root, tmp_path / "two", epoch_length=9, max_nonfinite=3, **{**middle, "log_interval": 1}
    )
    stopped.initialize()
    with pytest.raises(
        SystemExit, match=r"^training: the loss must be finite, found 3 steps in a row up to iteration 3"
    ):
        stopped.run()


def test_coarse_weights_start_the_fine_training(repository: Path, dataset_dir: Path, tmp_path: Path) -> None:
    names = ("train.json", "coarse.json")
    small = {"network_def#backbone#features": [16, 32], "spatial_size": [8, 8, 8]}
    coarse = make_workflow(repository, dataset_dir, tmp_path / "coarse", names, **small)
    coarse.initialize()
    assert coarse.check_properties() == []
    coarse.run()
    weights = torch.load(tmp_path / "coarse" / "model.pt", weights_only=True)

    path = str(tmp_path / "coarse" / "model.pt")
    fine = make_workflow(repository, dataset_dir, tmp_path / "fine", features=[8, 16, 32], weights=path)
    fine.initialize()
    state = fine.parser.get_parsed_content("network").state_dict()
    for name in weights:
        if name.startswith("backbone."):
            assert torch.equal(state[name.replace("backbone.", "backbone.coarse.")], weights[name]), name
    shared = len(weights["head.weight"])  # the fine network predicts images, too
    assert torch.equal(state["head.weight"][:shared, 8:], weights["head.weight"])
    assert not state["head.weight"][:shared, :8].any()


def test_the_lesion_head_alone_is_trained_on_given_weights(repository: Path, dataset_dir: Path, tmp_path: Path) -> None:
    first = make_workflow(repository, dataset_dir, tmp_path / "first")
    first.initialize()
    first.run()
    weights = str(tmp_path / "first" / "model.pt")
    given = torch.load(weights, weights_only=True)
    names, overrides = ("train.json", "finetune.json", "lesion.json"), {"weights": weights, "max_epochs": 1}
    second = make_workflow(repository, dataset_dir, tmp_path / "second", names, **overrides)
    second.initialize()
    assert second.check_properties() == []
    untrained = second.parser.get_parsed_content("network").context.last.weight.detach().clone()
    second.run()
    trained = torch.load(tmp_path / "second" / "model.pt", weights_only=True)
    assert all(torch.equal(trained[key], given[key]) for key in given)
    assert {key.split(".")[0] for key in set(trained) - set(given)} == {"context"}
    assert not torch.equal(trained["context.last.weight"], untrained)


VARIANTS: dict[str, dict[str, Any]] = {
    "paper": {"protocol": "synthseg_head", "epoch_length": 1, "features": [8, 16]},
    "small": {},
    "low_field": {},
    "hemisphere": {},
    "photo": {},
    "muon": {},
    "release": {},
    "swin_unetr": {"spatial_size": [64, 32, 32], "network_def#backbone#feature_size": 12},
}


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_variants_train(variant: str, repository: Path, dataset_dir: Path, tmp_path: Path) -> None:
    overrides = {"epoch_length": 1, "panels": 0, **VARIANTS[variant]}
    workflow = make_workflow(repository, dataset_dir, tmp_path, ("train.json", f"{variant}.json"), **overrides)
    workflow.initialize()
    assert workflow.check_properties() == []
    before = [p.clone() for p in workflow.parser.get_parsed_content("network").parameters()]
    workflow.run()
    trainer = workflow.parser.get_parsed_content("train#trainer")
    assert trainer.state.iteration == 1
    after = workflow.parser.get_parsed_content("network").parameters()
    assert not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_the_variants_draw_what_they_are_for(repository: Path, dataset_dir: Path, tmp_path: Path) -> None:
    def draw(variant: str) -> tuple[dict[str, torch.Tensor], ConfigWorkflow]:
        overrides = {"spatial_size": [32, 32, 32], "synthesis#skull_strip_prob": 1.0, **VARIANTS[variant]}
        workflow = make_workflow(repository, dataset_dir, tmp_path, ("train.json", f"{variant}.json"), **overrides)
        workflow.initialize()
        prepare = workflow.parser.get_parsed_content("train#prepare_batch")
        image, target = prepare(next(iter(workflow.parser.get_parsed_content("train#dataloader"))), "cpu")
        return {"image": image, **target}, workflow

    whole, workflow = draw("low_field")
    structures = workflow.parser.get_parsed_content("layout").protocol.structures
    right = torch.tensor([s.side == "right" for s in structures])
    assert right[whole["segmentation"].long()].any()
    left_alone, _ = draw("hemisphere")
    assert not right[left_alone["segmentation"].long()].any()
    assert (left_alone["distance"][:, 2:] >= 3).all()
    assert (left_alone["distance"][:, :2] < 0).any()

    paper, workflow = draw("paper")
    assert paper["image"].shape[0] == 4  # four scans of a subject, two of them mild, with one segmentation
    assert torch.equal(paper["segmentation"][0], paper["segmentation"][3])
    bias = paper["log_bias_field"].flatten(1).std(1)
    assert bias[:2].max() < 0.05 < bias[2:].max()
    scheduler, optimizer = (workflow.parser.get_parsed_content(key) for key in ("lr_scheduler", "optimizer"))
    first = optimizer.param_groups[0]["lr"]
    optimizer.step()
    for _ in range(2):
        scheduler.step()
    assert first < optimizer.param_groups[0]["lr"] <= 1e-4


def test_subjects_may_be_cached_on_disk(repository: Path, dataset_dir: Path, tmp_path: Path) -> None:
    own: dict[str, Any] = {
        "train#dataset": {
            "_target_": "PersistentDataset",
            "data": "$monai.data.load_decathlon_datalist(@datalist, True, 'training')",
            "transform": "@train#preprocessing",
            "cache_dir": "$@output_dir + '/cache'",
        }
    }
    workflow = make_workflow(repository, dataset_dir, tmp_path, panels=0, **own)
    workflow.initialize()
    workflow.run()
    assert len(list((tmp_path / "cache").glob("*.pt"))) == 2
    assert workflow.parser.get_parsed_content("train#trainer").state.iteration == TINY["epoch_length"]


def test_the_default_network_is_that_of_the_shipped_weights(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "bundles").mkdir()
    (tmp_path / "bundles" / "brain").symlink_to(repository / "bundle")
    with pytest.warns(UserWarning, match="from a source you trust"):
        network: Any = monai.bundle.load(
            "brain", bundle_dir=str(tmp_path / "bundles"), source="monaihosting", device="cpu"
        )
    weights = torch.load(repository / "bundle" / "models" / "model.pt", weights_only=True)
    state = network.state_dict()
    assert {name for name in weights if not name.startswith("context.")} == set(state)  # which inference adds
    assert all(torch.equal(value, weights[name].float()) for name, value in state.items())
    assert network.stride == 2  # it takes scans of 1 mm, as at inference
