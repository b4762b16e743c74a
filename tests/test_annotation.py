"""What a MONAI Label server needs: labels by name, uncertainty, subjects of corrected scans."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

from brainfm_monai.anatomy import Protocol
from brainfm_monai.annotation import (
    _cut_to_labels,
    _next_weights,
    brain_uncertainty,
    choose,
    fine_tune,
    keep_gains,
    match_structures,
    read_label_info,
    train_from_server,
)
from brainfm_monai.io import ScanError
from brainfm_monai.networks import MultiTaskNet, UNet
from brainfm_monai.tasks import TaskLayout

HEAD = Protocol.load("synthseg_head")
# what Slicer sends after the second structure was deleted: the names that are left, renumbered
LEFT = [{"name": "3rd-ventricle", "idx": 1}, {"name": "brain-stem", "idx": 2}, {"name": "left-hippocampus", "idx": 3}]


@pytest.mark.parametrize(
    ("use_click", "displayed", "chosen"),
    [(None, ["a", "b"], "run"), (False, ["a", "b"], "a"), (False, "b", "b"), (True, False, False)],
)
def test_settings_of_a_click_are_those_that_a_client_chose(
    use_click: bool | None, displayed: object, chosen: object
) -> None:
    assert choose(use_click, displayed, "run") == chosen


def test_values_are_matched_by_name_not_by_position() -> None:
    assert match_structures([1, 2, 3], LEFT, HEAD, "a.nii.gz") == {0: 0, 1: 14, 2: 16, 3: 17}
    assert match_structures([3], LEFT, HEAD, "a.nii.gz") == {0: 0, 3: 17}
    spelled = [{"name": "Left Hippocampus", "id": 5}, {"name": "right_hippocampus", "id": 6}]
    assert match_structures([5, 6], spelled, HEAD, "a.nii.gz") == {0: 0, 5: 17, 6: 53}


def test_scribbles_before_the_structures_move_the_count_and_not_the_values() -> None:
    moved = [{**entry, "idx": int(str(entry["idx"])) + 2} for entry in LEFT]
    assert match_structures([1, 2, 3], moved, HEAD, "a.nii.gz") == {0: 0, 1: 14, 2: 16, 3: 17}


def test_without_names_values_are_those_of_the_model() -> None:
    assert match_structures([15, 42], [], HEAD, "a.nii.gz") == {0: 0, 15: 17, 42: 516}


def test_a_name_that_the_model_does_not_know_is_refused_in_one_line() -> None:
    with pytest.raises(ScanError, match=r"^a.nii.gz: segments must have names .*, found 'tumour' \(value 2\)$"):
        match_structures([1, 2], [LEFT[0], {"name": "tumour", "idx": 2}], HEAD, "a.nii.gz")
    assert match_structures([1], [LEFT[0], {"name": "tumour", "idx": 2}], HEAD, "a.nii.gz") == {0: 0, 1: 14}
    with pytest.raises(ScanError, match=r"found a value without a name \(value 9\)$"):
        match_structures([9], LEFT, HEAD, "a.nii.gz")


def test_names_are_found_in_the_record_of_the_server(tmp_path: Path) -> None:
    path = tmp_path / "labels" / "final" / "b.nii.gz"
    final = {"ext": ".nii.gz", "info": {"label_info": LEFT, "name": "b.nii.gz"}}
    objects = {"a": {"labels": {}}, "b": {"labels": {"final": final, "original": {"info": {"name": "b.nii.gz"}}}}}
    (tmp_path / "datastore_v2.json").write_text(json.dumps({"objects": objects}))
    assert read_label_info(path) == LEFT
    assert read_label_info(tmp_path / "labels" / "original" / "b.nii.gz") == []
    assert read_label_info(tmp_path / "c.nii.gz") == []


def test_uncertainty_is_the_entropy_within_the_brain() -> None:
    layout = TaskLayout(["segmentation"], "synthseg_head")
    network = MultiTaskNet(UNet(features=(8, 16)), layout, stride=2).eval()
    bias: Any = network.head.bias
    torch.nn.init.zeros_(network.head.weight)
    torch.nn.init.zeros_(bias)
    image = torch.zeros(1, 1, 40, 36, 44)
    assert brain_uncertainty(network, image) == 1  # nothing is there
    image[:, :, 8:24, 6:30, 10:30] = 0.7
    assert brain_uncertainty(network, image) == 1  # all labels alike: the background wins, no brain
    with torch.no_grad():
        bias[15] = 1e-3
    assert brain_uncertainty(network, image) == pytest.approx(1, abs=1e-3)
    with torch.no_grad():
        bias[15] = 30
    assert brain_uncertainty(network, image) == pytest.approx(0, abs=1e-6)
    with torch.no_grad():
        bias[20] = 30
    assert brain_uncertainty(network, image) == pytest.approx(np.log(2) / np.log(44), abs=1e-6)


def test_each_training_has_weights_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    for name, expected in (("model", 1), ("model_tuned_1", 2), ("model_tuned_9", 10), ("model_tuned_mine", 10)):
        (tmp_path / "models" / f"{name}.pt").touch()
        assert _next_weights(tmp_path).name == f"model_tuned_{expected}.pt"
    assert len(_next_weights(tmp_path).name) > len("model.pt")  # MONAI Label serves the shortest name first


def test_a_training_on_subjects_is_left_alone(tmp_path: Path) -> None:
    for items in ([], [{"generation_labels": "g.nii.gz", "label": "x"}], [{"subject": "a"}]):
        train_from_server(items, tmp_path, None, "cpu", 1)
    with pytest.raises(ValueError, match="training: a corrected scan is needed"):
        fine_tune([], tmp_path)


def test_labels_of_the_brain_alone_cut_the_scan(tmp_path: Path) -> None:
    affine = np.diag([-2.0, 2, 3, 1])
    affine[:3, 3] = [70, -80, -60]
    rng = np.random.default_rng(0)
    values = rng.uniform(50, 100, (60, 70, 40)).astype(np.float32)
    labels = np.zeros(values.shape, np.uint8)
    labels[10:50, 15:60, 5:20] = 3
    image, label = tmp_path / "scan.nii.gz", tmp_path / "label.nii.gz"
    nib.save(nib.Nifti1Image(values, affine), image)
    nib.save(nib.Nifti1Image(labels, affine), label)
    assert _cut_to_labels(str(image), str(label), {0: 0, 3: 17, 4: 511}, HEAD, tmp_path) == str(image)
    path = _cut_to_labels(str(image), str(label), {0: 0, 3: 17}, HEAD, tmp_path)
    cut: Any = nib.load(path)
    assert np.allclose(cut.affine, affine)
    assert np.allclose(np.asarray(cut.dataobj), values * (labels > 0))
    nib.save(nib.Nifti1Image(labels, affine @ np.diag([1, 1, 1.2, 1])), label)
    with pytest.raises(ScanError, match=r"label.nii.gz: labels of the brain alone must have the grid of the scan"):
        _cut_to_labels(str(image), str(label), {0: 0, 3: 17}, HEAD, tmp_path)


def test_structures_that_came_nearer_to_the_correction_get_new_weights_and_no_others() -> None:
    layout = TaskLayout(["segmentation", "distance"], "synthseg_head")
    network = MultiTaskNet(UNet(features=(8, 16)), layout).eval()
    torch.nn.init.zeros_(network.head.weight)
    bias: Any = network.head.bias
    torch.nn.init.zeros_(bias)
    old = {key: value.half() for key, value in network.state_dict().items()}
    with torch.no_grad():
        bias[15], bias[20], bias[-1] = 2.0, 1.0, 3.0
    segmentation = torch.full((1, 32, 32, 32), 15, dtype=torch.uint8)
    segmentation[:, 8:] = 20
    image = {"real_T1w": torch.tensor(0.0), "real_CT": torch.tensor(1.0), "CT": torch.full((1, 16, 16, 16), 40.0)}
    state = keep_gains(network, [{**image, "segmentation": segmentation}], old)
    assert state["head.bias"].nonzero().flatten().tolist() == [15]
    assert state["head.bias"][15] == 2
    assert all(torch.equal(state[key].float(), old[key].float()) for key in old if key != "head.bias")
