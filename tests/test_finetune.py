"""Trainings that start from given weights, and the overrides of train.json for them and for lesions, on tiny subjects."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow
from torch import Tensor

from brainfm_monai.anatomy import COLUMNS, Protocol, Structure
from brainfm_monai.io import find_config
from brainfm_monai.networks import MultiTaskNet, UNet
from brainfm_monai.tasks import TaskLayout
from brainfm_monai.weights import load_pretrained

FEATURES = (8, 16)
OLD = TaskLayout(["segmentation", "distance", "log_bias_field", "mni"])


def save(path: Path, layout: TaskLayout = OLD, features: Sequence[int] = FEATURES) -> dict[str, Tensor]:
    """Weights in which no two tensors are alike."""
    torch.manual_seed(1)
    state = MultiTaskNet(UNet(features=features), layout).state_dict()
    state = {key: torch.randn_like(value) for key, value in state.items()}
    torch.save(state, path)
    return state


def structure(label: int, freesurfer_id: int, name: str) -> Structure:
    return Structure(label, freesurfer_id, name, "none", label, (0, 0, label))


# a protocol of somebody's own: one structure by its id, one by its name alone, two that are new
OWN = Protocol(
    "own",
    (
        structure(0, 0, "background"),
        structure(1, 99, "Lesion"),
        structure(2, 53, "hippocampus_r"),
        structure(3, 1511, "skin"),
        structure(4, 4000, "tumour"),
    ),
)


def test_channels_that_both_layouts_have_are_copied_and_the_others_start_fresh(tmp_path: Path) -> None:
    state = save(tmp_path / "old.pt")
    layout = TaskLayout(["mni", "segmentation", "T1w"], OWN, uncertainty=["mni"])
    torch.manual_seed(0)
    network = MultiTaskNet(UNet(features=FEATURES), layout)
    fresh = network.head.weight.detach().clone()
    missing = load_pretrained(network, tmp_path / "old.pt", OLD)
    assert missing == ["Lesion", "tumour", "T1w", "x_log_scale", "y_log_scale", "z_log_scale"]
    found = network.state_dict()
    for key in (key for key in found if key.startswith("backbone.")):
        assert torch.equal(found[key], state[key])
    new = network.head.weight
    label = {s.name: s.label for s in OLD.protocol.structures}
    sources = {0: 0, 2: label["Right-Hippocampus"], 3: label["skin"]}
    sources |= {5 + i: OLD.slices["mni"].start + i for i in range(3)}
    for row, source in sources.items():
        assert torch.equal(new[row], state["head.weight"][source])
        assert torch.equal(found["head.bias"][row], state["head.bias"][source])
    for row in set(range(layout.channels)) - set(sources):
        assert torch.equal(new[row], fresh[row])


def test_weights_of_the_same_layout_are_loaded_whole(tmp_path: Path) -> None:
    state = save(tmp_path / "old.pt")
    network = MultiTaskNet(UNet(features=FEATURES), OLD, stride=2)
    assert load_pretrained(network, tmp_path / "old.pt") == []
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


@pytest.mark.parametrize("classes", [56, 5])
def test_a_published_checkpoint_tells_its_own_layout(tmp_path: Path, classes: int) -> None:
    torch.manual_seed(2)
    ours = MultiTaskNet(UNet(features=FEATURES), TaskLayout(["CT"])).backbone.state_dict()
    units = {"0": "SingleConv1", "1": "SingleConv2"}
    model: dict[str, Tensor] = {}
    for key, value in ours.items():
        side, level, unit, part, kind = key.split(".")
        name = f"backbone.{side}.{level}.basic_module.{units[unit]}.{'groupnorm' if part == '0' else 'conv'}.{kind}"
        model[name] = torch.randn_like(value)
    for head, channels in {"segmentation": classes, "T1": 1, "high_res_residual": 1}.items():
        model[f"head.final_conv_{head}.weight"] = torch.randn(channels, FEATURES[0], 1, 1, 1)
        model[f"head.final_conv_{head}.bias"] = torch.randn(channels)
    torch.save({"model": model, "args": argparse.Namespace(unit_feat=True)}, tmp_path / "published.pth")
    layout = TaskLayout(["segmentation", "T1w", "super_resolution"], "synthseg_brain")
    network = MultiTaskNet(UNet(features=FEATURES, unit_norm=True), layout)
    missing = load_pretrained(network, tmp_path / "published.pth")
    bias = network.state_dict()["head.bias"]
    assert torch.equal(bias[layout.slices["T1w"]], model["head.final_conv_T1.bias"])
    assert torch.equal(bias[0], model["head.final_conv_segmentation.bias"][0])
    assert "super_resolution" in missing  # a residual there, an image here
    if classes == 56:  # protocol brainfm: everything but the ventral diencephalon
        assert missing == ["Left-VentralDC", "Right-VentralDC", "super_resolution"]
        right = Protocol.load("brainfm").label_of_id[53], Protocol.load("synthseg_brain").label_of_id[53]
        assert torch.equal(bias[right[1]], model["head.final_conv_segmentation.bias"][right[0]])
    else:  # numbers for names: label 2 there is no white matter
        assert len(missing) == len(layout.protocol)


def test_what_does_not_fit_is_told_in_one_line(tmp_path: Path) -> None:
    network = MultiTaskNet(UNet(features=FEATURES), OLD)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    wide, other, text, absent = (tmp_path / name for name in ("wide.pt", "other.pt", "notes.txt", "absent.pt"))
    save(wide, features=(16, 32))
    torch.save({"layer.weight": torch.zeros(3)}, other)
    text.write_text("not weights\n")
    headless = {key: value for key, value in before.items() if key.startswith("head")}
    torch.save(headless, tmp_path / "head.pt")
    cases: list[tuple[Path, TaskLayout | None, type[Exception], str]] = [
        (absent, None, FileNotFoundError, "a file of weights is needed, found no such file"),
        (text, None, ValueError, "a whole torch checkpoint is needed, and it cannot be read as one: "),
        (other, None, ValueError, r"the head must have the 52 channels of .* in protocol synthseg_head, found no head"),
        (
            wide,
            TaskLayout(["CT"]),
            ValueError,
            r"the head must have the 1 channels of \['CT'\] in protocol .*, found 52",
        ),
        (wide, None, ValueError, r"must fit the network's backbone, found one of \(8, 1, 3, 3, 3\) for 'backbone\.enc"),
        (
            tmp_path / "head.pt",
            None,
            ValueError,
            r"must fit the network's backbone, found none for 'backbone\.encoders",
        ),
    ]
    for path, layout, kind, message in cases:
        with pytest.raises(kind, match=f"^{path}: .*{message}") as caught:
            load_pretrained(network, path, layout)
        assert "\n" not in str(caught.value)
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


# -- configurations --------------------------------------------------------------------------------------------------------

SIDE = 32
TINY: dict[str, Any] = {
    "spatial_size": [16, 16, 16],
    "scan_mm": 1.0,
    "network_def#backbone": {"_target_": "brainfm_monai.networks.UNet", "features": list(FEATURES)},
    "epoch_length": 2,
    "max_epochs": 1,
    "warmup_iterations": 1,
    "val_interval": 1,
    "precision": "float32",
}


@pytest.fixture(scope="module")
def dataset_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two subjects: skin around a brain of two hemispheres."""
    root = tmp_path_factory.mktemp("data")
    ids = np.zeros((SIDE,) * 3, dtype=np.int32)
    ids[4:28, 4:28, 4:28] = 511
    ids[8:16, 8:24, 8:24] = 3
    ids[16:24, 8:24, 8:24] = 42
    x = np.indices(ids.shape)[0] - 15.5
    arrays = {
        "generation_labels": Protocol.load("synthseg_generation").encode(ids),
        "segmentation": Protocol.load("synthseg_head").encode(ids),
        "distance": np.stack([x, x + 1, -x, 1 - x], axis=-1).clip(-6.4, 6.35).astype(np.float32),
        "mni": np.moveaxis(np.indices((8, 8, 8)) * 4.0 - 14, 0, -1).astype(np.float32),
    }
    for name, array in arrays.items():
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), root / f"{name}.nii.gz")
    files = {name: f"{name}.nii.gz" for name in arrays}
    items = [{"subject": f"sub-{i}", "age": 30.0 + i, **files} for i in range(2)]
    (root / "datalist.json").write_text(json.dumps({"training": items[:1], "validation": items[1:]}), encoding="utf-8")
    return root


def make_workflow(
    repository: Path, dataset_dir: Path, output_dir: Path, names: Sequence[str], **overrides: Any
) -> ConfigWorkflow:
    bundle = repository / "bundle"
    if "finetune.json" in names and "weights_layout" not in overrides:  # the tests' weights are of OLD
        overrides = {"weights_layout#tasks": list(OLD.tasks), "layout#tasks": list(OLD.tasks), **overrides}
    workflow = ConfigWorkflow(
        workflow_type="train",
        config_file=[str(find_config(bundle, name)) for name in ("train.json", *names)],
        meta_file=str(bundle / "configs" / "metadata.json"),
        logging_file=False,
        bundle_root=str(bundle),
        dataset_dir=str(dataset_dir),
        output_dir=str(output_dir),
        device="$torch.device('cpu')",
        **{**TINY, **overrides},
    )
    workflow.initialize()
    assert workflow.check_properties() == []
    return workflow


def write_protocol(path: Path, protocol: Protocol) -> Path:
    rows = [(s.label, s.freesurfer_id, s.name, s.side, s.mirror, *s.colour, "") for s in protocol.structures]
    path.write_text("\n".join("\t".join(map(str, row)) for row in [COLUMNS, *rows]) + "\n")
    return path


@pytest.mark.parametrize("freeze", [False, True])
def test_fine_tuning_changes_what_is_not_frozen_and_nothing_else(
    repository: Path, dataset_dir: Path, tmp_path: Path, freeze: bool
) -> None:
    state = save(tmp_path / "old.pt")
    overrides: dict[str, Any] = {"weights": str(tmp_path / "old.pt"), "freeze_backbone": freeze}
    workflow = make_workflow(repository, dataset_dir, tmp_path / "out", ["finetune.json"], **overrides)
    network = workflow.parser.get_parsed_content("network")
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    optimizer = workflow.parser.get_parsed_content("optimizer")
    given = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert given == {id(p) for name, p in network.named_parameters() if not freeze or name.startswith("head.")}
    workflow.run()
    for key, value in network.state_dict().items():
        assert torch.equal(value, state[key]) == (freeze and key.startswith("backbone.")), key


def test_a_new_head_for_a_new_protocol_on_frozen_features(repository: Path, dataset_dir: Path, tmp_path: Path) -> None:
    state = save(tmp_path / "old.pt")
    table = [(0, "Unknown"), (3, "Left-Cerebral-Cortex"), (42, "Right-Cerebral-Cortex"), (4000, "tumour")]
    protocol = Protocol("new", tuple(structure(i, number, name) for i, (number, name) in enumerate(table)))
    overrides: dict[str, Any] = {
        "weights": str(tmp_path / "old.pt"),
        "freeze_backbone": True,
        "protocol": str(write_protocol(tmp_path / "new.tsv", protocol)),
        "layout#tasks": ["segmentation"],
        "loss#weights": {},
    }
    workflow = make_workflow(repository, dataset_dir, tmp_path / "out", ["finetune.json"], **overrides)
    network = workflow.parser.get_parsed_content("network")
    assert network.head.weight.shape[0] == 4
    for row, freesurfer_id in enumerate((0, 3, 42)):
        assert torch.equal(network.head.weight[row], state["head.weight"][OLD.protocol.label_of_id[freesurfer_id]])
    assert not (network.head.weight[3] == state["head.weight"][:, :]).flatten(1).all(1).any()
    assert [n for n, p in network.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]


def test_a_wrong_file_ends_the_training_before_it_begins(repository: Path, dataset_dir: Path, tmp_path: Path) -> None:
    save(tmp_path / "wide.pt", features=(16, 32))
    with pytest.raises(SystemExit) as caught:
        make_workflow(repository, dataset_dir, tmp_path / "out", ["finetune.json"], weights=str(tmp_path / "wide.pt"))
    reason = str(caught.value)
    assert "wide.pt: the weights must fit the network's backbone, found one of (8, 1, 3, 3, 3)" in reason
    assert "\n" not in reason


def test_lesions_are_painted_and_learnt(repository: Path, dataset_dir: Path, tmp_path: Path) -> None:
    save(tmp_path / "old.pt")
    large = {"synthesis#lesion_coverage": [0.2, 0.2], "synthesis#translation_mm": [0, 0], "synthesis#lesion_prob": 0.5}
    overrides: dict[str, Any] = {"weights": str(tmp_path / "old.pt"), "weights_layout": OLD, **large}
    workflow = make_workflow(repository, dataset_dir, tmp_path, ["finetune.json", "lesion.json"], **overrides)
    network = workflow.parser.get_parsed_content("network")
    before = network.context.last.weight.detach().clone()
    batch = next(iter(workflow.parser.get_parsed_content("train#dataloader")))
    subject = {key: torch.as_tensor(batch[key]) for key in ("generation_labels", "segmentation", "mni")}
    synthesizer = workflow.parser.get_parsed_content("synthesizer")
    shares = [float(synthesizer(subject, [seed])["lesion"].float().mean()) for seed in range(16)]
    assert 3 <= sum(share > 0.01 for share in shares) <= 13  # half of them
    assert sum(share == 0 for share in shares) >= 3
    assert max(shares) < 0.5
    workflow.run()
    loss = workflow.parser.get_parsed_content("loss")
    assert float(loss.components["lesion"]) > 0
    assert loss.weights["lesion"] == 1
    assert not torch.equal(before, network.context.last.weight.detach())


def test_all_the_optional_terms_train_together(repository: Path, dataset_dir: Path, tmp_path: Path) -> None:
    tasks = ["segmentation", "distance", "log_bias_field", "mni", "super_resolution", "age", "embedding"]
    overrides: dict[str, Any] = {
        "layout#tasks": tasks,
        "scalars": ["age"],
        "layout#uncertainty": ["mni", "super_resolution"],
        "synthesizer#samples": 2,
        "synthesis#scaling": [1, 1],
        "loss#samples": 2,
    }
    workflow = make_workflow(repository, dataset_dir, tmp_path, [], **overrides)
    workflow.run()
    loss = workflow.parser.get_parsed_content("loss")
    assert set(loss.components) == set(tasks)
    assert all(torch.isfinite(value) for value in loss.components.values())
