"""The evaluation configuration over the inference configuration, with a network that reads labels from intensities."""

from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigWorkflow
from torch import Tensor, nn

from brainfm_monai.anatomy import Protocol
from brainfm_monai.evaluation.tables import read_metrics
from brainfm_monai.io import find_config
from brainfm_monai.metrics.scan import MetricRow
from brainfm_monai.networks import MultiTaskNet, TwoScaleUNet
from brainfm_monai.tasks import TaskLayout

LAYOUT = TaskLayout(["segmentation", "distance", "log_bias_field", "mni"], "synthseg_head")
# intensity of each structure that the network knows, by FreeSurfer id
LEVELS = {0: 0.0, 3: 0.2, 42: 0.4, 2: 0.6, 41: 0.8, 16: 1.0}
LIA = np.array([[-1.0, 0, 0, 11], [0, 0, 1, -7], [0, -1, 0, 20], [0, 0, 0, 1]])
Evaluate = Callable[..., None]
STRUCTURES: tuple[str, ...] = (
    "cerebral_cortex",
    "cerebral_white_matter",
    "lateral_ventricle",
    "thalamus",
    "caudate",
    "putamen",
    "pallidum",
)
STRUCTURES += ("hippocampus", "amygdala", "cerebellum", "brainstem")  # of dice.tsv


class LevelReader(nn.Module):
    """The structure whose level is nearest."""

    level: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("level", torch.full((44,), 9.0))
        for freesurfer_id, level in LEVELS.items():
            self.level[LAYOUT.protocol.label_of_id[freesurfer_id]] = level

    def forward(self, image: Tensor) -> Tensor:
        output = torch.zeros(1, LAYOUT.channels, *image.shape[2:])
        output[:, :44] = -((image - self.level.reshape(1, -1, 1, 1, 1)) ** 2)
        return output


class Copier(nn.Module):
    """The T1w that it predicts is the scan times a gain."""

    gain: Tensor
    layout = TaskLayout(["segmentation", "T1w"], "synthseg_head")

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("gain", torch.tensor(gain))

    def forward(self, image: Tensor) -> Tensor:
        output = torch.zeros(1, self.layout.channels, *image.shape[2:])
        output[:, self.layout.slices["T1w"]] = self.gain * image
        return output

    def as_model(self, folder: Path) -> dict[str, Any]:
        """Values of the configs for this network."""
        torch.save(self.state_dict(), folder / "copier.pt")
        return {"network_def": self, "weights": str(folder / "copier.pt"), "layout#tasks": list(self.layout.tasks)}


def make_ids() -> np.ndarray:
    """A head of 24 x 20 x 16 voxels in LIA axes: left is at high indices of the first axis."""
    ids = np.zeros((24, 20, 16), dtype=np.int32)
    ids[13:21, 3:17, 2:14], ids[3:11, 3:17, 2:14] = 3, 42
    ids[14:18, 6:14, 5:11], ids[6:10, 6:14, 5:11] = 2, 41
    ids[11:13, 8:12, 4:8] = 16
    return ids


def write_pair(folder: Path, name: str, reference: np.ndarray, affine: np.ndarray = LIA) -> dict[str, str]:
    image = np.vectorize(LEVELS.get)(make_ids()).astype(np.float32)
    folder.mkdir(exist_ok=True)
    nib.save(nib.Nifti1Image(image * 1000, LIA), folder / f"{name}.nii.gz")
    nib.save(nib.Nifti1Image(reference.astype(np.int32), affine), folder / f"{name}_seg.nii.gz")
    return {"image": f"{name}.nii.gz", "label": f"{name}_seg.nii.gz"}


def write_list(folder: Path, *items: dict[str, str]) -> Path:
    path = folder / "datalist.json"
    path.write_text(json.dumps({"testing": items}), encoding="utf-8")
    return path


@pytest.fixture
def evaluate(repository: Path, tmp_path: Path) -> Evaluate:
    """Run inference.json and evaluate.json in this process."""
    configs = repository / "bundle" / "configs"
    torch.save(LevelReader().state_dict(), tmp_path / "levels.pt")

    def run(datalist: Path, output_dir: Path, **overrides: Any) -> None:
        values: dict[str, Any] = {
            "datalist": str(datalist),
            "output_dir": str(output_dir),
            "bundle_root": str(repository / "bundle"),
            "layout#tasks": list(LAYOUT.tasks),
        }
        values |= {
            "network_def": LevelReader(),
            "weights": str(tmp_path / "levels.pt"),
            "device": "$torch.device('cpu')",
        }
        # This network knows sides without seeing them, and so has no use for a mirror image.
        values |= {"mirror": False, "second_look": False, "precision": "float32"}
        values |= {"outputs": "segmentation"}
        values |= {} if "configs" in overrides else {"conditions": {"native": {}}}
        names = ["inference.json", "evaluate.json", *overrides.pop("configs", [])]
        files = [str(find_config(repository / "bundle", name)) for name in names]
        workflow = ConfigWorkflow(
            workflow_type="inference",
            config_file=files,
            meta_file=str(configs / "metadata.json"),
            logging_file=False,
            **values | overrides,
        )
        workflow.initialize()
        assert workflow.check_properties() == []
        workflow.run()

    return run


def read_dice(path: Path) -> dict[tuple[str, str], tuple[str, str, str]]:
    with path.open(encoding="utf-8") as file:
        rows = csv.DictReader(file, delimiter="\t")
        return {(row["scan"], row["structure"]): (row["left"], row["right"], row["both"]) for row in rows}


def read_summary(path: Path) -> dict[tuple[str, str, str, str], dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    return {(row["condition"], row["metric"], row["structure"], row["side"]): row for row in rows}


def test_dice_of_known_differences(tmp_path: Path, evaluate: Evaluate) -> None:
    parcels = make_ids()
    parcels[parcels == 3] = 11105
    parcels[14, 6:14, 5:11], parcels[9, 6:14, 5:11] = 77, 77  # 48 of 192 voxels on either side
    half = make_ids()
    half[3:7][half[3:7] == 42] = 0
    half[half == 16] = 0
    items = [write_pair(tmp_path / "in", "parcels", parcels), write_pair(tmp_path / "in", "half", half)]
    evaluate(write_list(tmp_path / "in", *items), tmp_path / "out")

    dice = read_dice(tmp_path / "out" / "dice.tsv")
    assert dice["parcels", "cerebral_cortex"] == ("1.0000", "1.0000", "1.0000")
    assert dice["parcels", "cerebral_white_matter"] == ("1.0000", "1.0000", "1.0000")
    assert dice["parcels", "brainstem"] == ("n/a", "n/a", "1.0000")
    assert dice["half", "brainstem"] == ("n/a", "n/a", "n/a")
    truth, predicted = (half == 42).sum(), (make_ids() == 42).sum()
    assert truth < predicted
    assert dice["half", "cerebral_cortex"][:2] == ("1.0000", f"{2 * truth / (truth + predicted):.4f}")
    assert dice["half", "thalamus"] == ("n/a", "n/a", "n/a")
    summary = (tmp_path / "out" / "dice_summary.tsv").read_text(encoding="utf-8").splitlines()
    assert summary[0] == "structure\tleft\tright\tboth\tscans"
    assert summary[-1].split("\t")[0::4] == ["mean", "2"]
    assert (tmp_path / "out" / "half" / "half_dseg.nii.gz").is_file()


def test_a_reference_on_another_grid_is_taken_to_the_scans(tmp_path: Path, evaluate: Evaluate) -> None:
    ids, affine = make_ids(), LIA.copy()
    turned = np.pad(
        ids[::-1].transpose(0, 2, 1), ((4, 2), (1, 3), (0, 5))
    )  # axes right, anterior, inferior, a larger field of view
    matrix = np.array([[-1.0, 0, 0, 23 + 4], [0, 0, 1, 0], [0, 1, 0, -1], [0, 0, 0, 1]])
    item = write_pair(tmp_path / "in", "scan", turned, affine @ matrix)
    evaluate(write_list(tmp_path / "in", item), tmp_path / "out")
    dice = read_dice(tmp_path / "out" / "dice.tsv")
    for structure in ("cerebral_cortex", "cerebral_white_matter"):
        assert dice["scan", structure] == ("1.0000", "1.0000", "1.0000")
    assert dice["scan", "brainstem"][2] == "1.0000"


def test_a_reference_in_a_named_protocol(tmp_path: Path, evaluate: Evaluate) -> None:
    item = write_pair(tmp_path / "in", "scan", LAYOUT.protocol.encode(make_ids()))
    item |= {"label_protocol": "synthseg_head", "name": "someone"}
    evaluate(write_list(tmp_path / "in", item), tmp_path / "out")
    assert read_dice(tmp_path / "out" / "dice.tsv")["someone", "cerebral_cortex"] == ("1.0000", "1.0000", "1.0000")


def read_rows(path: Path) -> list[MetricRow]:
    return [MetricRow(*row) for row in read_metrics(path).itertuples(index=False)]


def read_rows_of(folder: Path, metric: str) -> dict[tuple[str, str, str, str], float]:
    """Values of a metric by scan, condition, structure and side."""
    rows = read_rows(folder / "metrics.tsv")
    return {(r.scan, r.condition, r.structure, r.side): r.value for r in rows if r.metric == metric}


def test_thirteen_structures_beside_the_eleven(tmp_path: Path, evaluate: Evaluate) -> None:
    item = write_pair(tmp_path / "in", "scan", make_ids())
    evaluate(write_list(tmp_path / "in", item), tmp_path / "out", outputs="bias_field")
    # a file that is made of the scan itself, and not of its maps alone
    assert list((tmp_path / "out" / "scan").glob("scan_desc-*.nii.gz")), sorted((tmp_path / "out" / "scan").iterdir())
    dice = read_rows_of(tmp_path / "out", "dice")
    structures = list(dict.fromkeys(structure for _, _, structure, _ in dice))
    assert len(structures) == 13
    assert {"cerebellar_cortex", "cerebellar_white_matter", "accumbens", "lateral_ventricle"} <= set(structures)
    assert dice["scan", "native", "cerebral_cortex", "left"] == 1
    assert math.isnan(dice["scan", "native", "accumbens", "left"])
    assert read_rows_of(tmp_path / "out", "mean_dice")["scan", "native", "all", "both"] == 1
    assert read_rows_of(tmp_path / "out", "hd95")["scan", "native", "brainstem", "both"] == 0
    entropy = read_rows_of(tmp_path / "out", "entropy")
    assert entropy.keys() == dice.keys()
    level = LevelReader().level
    logits = -((level - level[LAYOUT.protocol.label_of_id[3]]) ** 2)  # of a voxel of the left cortex
    expected = torch.distributions.Categorical(logits=logits).entropy() / math.log(len(level))
    assert entropy["scan", "native", "cerebral_cortex", "left"] == pytest.approx(float(expected), rel=0.02)


def test_further_references_are_measured_where_they_are(tmp_path: Path, evaluate: Evaluate) -> None:
    folder = tmp_path / "in"
    item = write_pair(folder, "scan", make_ids())
    distance = np.full((24, 20, 16, 4), 1.5, dtype=np.float32)  # the network of these tests says 0 everywhere
    nib.save(nib.Nifti1Image(distance, LIA), folder / "distance.nii.gz")
    coordinates = np.full((24, 20, 16, 3), 4.0, dtype=np.float32)
    nib.save(nib.Nifti1Image(coordinates, LIA), folder / "mni.nii.gz")
    only = {"image": item["image"], "name": "unlabelled", "distance": "distance.nii.gz"}
    wrong = item | {
        "name": "wrong",
        "distance": "mni.nii.gz",
    }  # three maps in place of four: found only when it is measured
    with pytest.raises(SystemExit, match="1 of 3 scans failed; the others are done"):
        evaluate(
            write_list(folder, wrong, item | {"distance": "distance.nii.gz", "mni": "mni.nii.gz"}, only),
            tmp_path / "out",
        )
    page = (tmp_path / "out" / "evaluation.html").read_text(encoding="utf-8")
    assert "wrong: distance must have one shape" in page
    errors = read_rows_of(tmp_path / "out", "distance_error")
    for scan in ("scan", "unlabelled"):
        assert errors[scan, "native", "pial", "left"] == pytest.approx(1.5, abs=1e-5)
    error = read_rows_of(tmp_path / "out", "error_mean")["scan", "native", "brain", "n/a"]
    assert error == pytest.approx(4 * math.sqrt(3), abs=1e-4)
    assert not {key for key in read_rows_of(tmp_path / "out", "dice") if key[0] == "unlabelled"}
    assert "normalised_l2" not in {row.metric for row in read_rows(tmp_path / "out" / "metrics.tsv")}


def test_surfaces_are_measured_on_request(tmp_path: Path, evaluate: Evaluate) -> None:
    item = write_pair(tmp_path / "in", "scan", make_ids())
    settings: dict[str, Any] = {"configs": ["evaluate_surfaces.json"], "conditions": {"native": {}}}
    evaluate(write_list(tmp_path / "in", item), tmp_path / "out", **settings)
    found = read_rows_of(tmp_path / "out", "found")
    assert set(found) == {("scan", "native", "cortex", side) for side in ("left", "right")}
    assert read_rows_of(tmp_path / "out", "mean_dice")["scan", "native", "all", "both"] == 1


def test_a_scan_is_a_reference_in_any_unit_and_where_it_reaches(tmp_path: Path, evaluate: Evaluate) -> None:
    folder = tmp_path / "in"
    image = write_pair(folder, "scan", make_ids())["image"]
    values = np.vectorize(LEVELS.get)(make_ids()).astype(np.float32)
    turned = LIA @ np.array([[-1.0, 0, 0, 23], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    half = LIA @ np.array([[1.0, 0, 0, 9], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    references = {
        "in_the_unit": (values, LIA),
        "of_a_scanner": (1664 * values[::-1], turned),
        "in_part": (7 * values[9:], half),
    }
    references["other"] = (values**2, LIA)
    for name, (reference, affine) in references.items():
        nib.save(nib.Nifti1Image(reference, affine), folder / f"{name}.nii.gz")
    items = [{"image": image, "name": name, "T1w": f"{name}.nii.gz"} for name in references]
    evaluate(write_list(folder, *items), tmp_path / "out", **Copier().as_model(tmp_path))
    for name in ("in_the_unit", "of_a_scanner", "in_part"):
        assert read_rows_of(tmp_path / "out", "l1")[name, "native", "n/a", "n/a"] == pytest.approx(0, abs=1e-5), name
        assert read_rows_of(tmp_path / "out", "psnr")[name, "native", "n/a", "n/a"] > 80, name
    inside = values[values > 0]
    assert read_rows_of(tmp_path / "out", "l1")["other", "native", "n/a", "n/a"] == pytest.approx(
        float((inside - inside**2).mean()) / (1 - 0.04), rel=1e-3
    )


def test_the_head_is_that_of_the_scan_as_it_is(tmp_path: Path, evaluate: Evaluate) -> None:
    values = np.vectorize(LEVELS.get)(make_ids()).astype(np.float32)
    values[::2][values[::2] == 0] = 0.01  # air with some noise in it
    nib.save(nib.Nifti1Image(values, LIA), tmp_path / "scan.nii.gz")
    datalist = write_list(tmp_path, {"image": "scan.nii.gz", "T1w": "scan.nii.gz"})
    conditions = {"native": {}, "noisy": {"noise_percent": 40}}
    evaluate(datalist, tmp_path / "out", conditions=conditions, **Copier(gain=0.0).as_model(tmp_path))
    l1 = read_rows_of(tmp_path / "out", "l1")
    # A network that says 0 everywhere is as wrong as the reference is bright within the head: noise does not make it head.
    inside = values[values > 0.05]
    assert l1["scan", "native", "n/a", "n/a"] == pytest.approx(float(inside.mean()) / (1 - 0.2), rel=1e-3)
    assert l1["scan", "noisy", "n/a", "n/a"] == l1["scan", "native", "n/a", "n/a"]


def test_conditions_a_bad_scan_and_going_on(tmp_path: Path, evaluate: Evaluate) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    items = [write_pair(folder, name, make_ids()) for name in ("one", "bad", "two")]
    (folder / "bad_seg.nii.gz").write_bytes(b"no label map")
    conditions = {"native": {}, "noise": {"noise_percent": {"sweep": [20]}}, "biased": {"bias_log_std": 0.3}}
    with pytest.raises(SystemExit, match="3 of 9 scans failed; the others are done"):
        evaluate(write_list(folder, *items), out, conditions=conditions)
    page = (out / "evaluation.html").read_text(encoding="utf-8")
    assert "3 cases not measured" in page
    assert "bad_noise-20: " in page
    dice = read_rows_of(out, "mean_dice")
    assert set(dice) == {(n, c, "all", "both") for n in ("one", "two") for c in ("native", "noise-20", "biased")}
    assert dice["one", "native", "all", "both"] == 1 > dice["one", "noise-20", "all", "both"]
    assert set(read_dice(out / "dice.tsv")) == {(n, s) for n in ("one", "two") for s in STRUCTURES}  # scans as they are
    assert {row.condition for row in read_rows(out / "metrics.tsv") if row.task == "log_bias_field"} == {"biased"}
    summary = read_summary(out / "summary.tsv")
    assert summary["noise-20", "mean_dice", "all", "both"]["n"] == "2"
    assert ", mm</th>" in page  # a headline with its unit heads the table of conditions
    for text in ("SHA-256", "<h2>Conditions</h2>", "Look at the worst first", "noise_percent", "Dice, sides merged"):
        assert text in page

    # Mended, it goes on: what is measured stays, a case that was lost or comes from a file that changed is done again.
    stored = {path.name: path.stat().st_mtime_ns for path in (out / "cases").glob("*.json")}
    assert len(stored) == 6
    write_pair(folder, "bad", make_ids())
    (out / "cases" / "two_biased.json").unlink()
    evaluate(write_list(folder, *items), out, conditions=conditions)
    after = {path.name: path.stat().st_mtime_ns for path in (out / "cases").glob("*.json")}
    assert len(after) == 9
    assert {name for name, changed in stored.items() if after[name] != changed} == {"two_biased.json"}
    assert len(read_rows_of(out, "mean_dice")) == 9
    assert "not measured" not in (out / "evaluation.html").read_text(encoding="utf-8")
    assert not list(out.rglob("*.part"))


def test_other_weights_are_measured_again(tmp_path: Path, evaluate: Evaluate) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    datalist = write_list(folder, write_pair(folder, "scan", make_ids()))
    evaluate(datalist, out)
    other = LevelReader()
    other.level[LAYOUT.protocol.label_of_id[16]] = 9.0  # it knows no brainstem any more
    torch.save(other.state_dict(), tmp_path / "other.pt")
    before = read_rows_of(out, "dice")["scan", "native", "brainstem", "both"]
    evaluate(datalist, out, weights=str(tmp_path / "other.pt"))
    assert before == 1
    assert read_rows_of(out, "dice")["scan", "native", "brainstem", "both"] == 0


def test_measures_are_valid_for_the_configuration_that_made_them(tmp_path: Path, evaluate: Evaluate) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    datalist = write_list(folder, write_pair(folder, "scan", make_ids()))

    def when_measured(**settings: Any) -> int:
        # of this condition there are no files of the prediction, which would be done again by a rule of their own
        evaluate(datalist, out, **{"conditions": {"noisy": {"noise_percent": 1}}, **settings})
        return (out / "cases" / "scan_noisy.json").stat().st_mtime_ns

    first = when_measured()
    further = {"noisy": {"noise_percent": 1}, "native": {}}
    assert when_measured(device="$torch.device('cpu')", conditions=further) == first
    for change in ({"preprocessing#transforms#3#upper": 0.9}, {"comparison_grid": "network"}, {"seed": 1}):
        again = when_measured(**change)
        assert again != first, change
        first = again
    # what a transform does to the intensities is seen: half of them are clipped, and become the brainstem's level
    before = read_rows_of(out, "mean_dice")["scan", "noisy", "all", "both"]
    when_measured(**{"preprocessing#transforms#3#upper": 0.5})
    assert read_rows_of(out, "mean_dice")["scan", "noisy", "all", "both"] < before - 0.1


def test_the_protocol_crops_and_compares_in_the_networks_grid(tmp_path: Path, evaluate: Evaluate) -> None:
    folder = tmp_path / "in"
    datalist = write_list(folder, write_pair(folder, "scan", make_ids()))
    evaluate(datalist, tmp_path / "out", configs=["evaluate_protocol.json"], roi_size=[14, 14, 18])
    dice = read_rows_of(tmp_path / "out", "dice")
    names = {"1-1-1", "1-1-1_bias", "1.5-1.5-5", "1.5-1.5-5_bias"}
    assert {condition for _, condition, _, _ in dice} == names
    assert dice["scan", "1-1-1", "cerebral_cortex", "left"] == 1  # what lies outside the crop does not count
    assert dice["scan", "1.5-1.5-5", "cerebral_cortex", "left"] < 1
    volume = read_rows_of(tmp_path / "out", "reference_volume")["scan", "1-1-1", "cerebral_cortex", "both"]
    assert volume < np.isin(make_ids(), (3, 42)).sum() / 1000


def write_subject(folder: Path, name: str) -> dict[str, str]:
    """A prepared subject: a box of cortex with white matter in it, 2 mm within the pial surface everywhere."""
    labels = make_ids()[:, ::-1].transpose(0, 2, 1)[::-1]  # RAS
    volumes: dict[str, np.ndarray] = {
        "generation_labels": Protocol.load("synthseg_generation").encode(labels),
        "segmentation": LAYOUT.protocol.encode(labels),
        "distance": np.full((*labels.shape, 4), -2.0, dtype=np.float32),
        "mni": np.full((*labels.shape, 3), 30.0, dtype=np.float32),
    }
    entry = {"subject": name}
    for key, volume in volumes.items():
        entry[key] = f"{name}_{key}.nii.gz"
        nib.save(nib.Nifti1Image(volume, np.eye(4)), folder / entry[key])
    return entry


def test_generated_scans_with_known_truth(tmp_path: Path, evaluate: Evaluate) -> None:
    datalist, out = tmp_path / "datalist.json", tmp_path / "out"
    subjects = [write_subject(tmp_path, name) for name in ("a", "b")]
    datalist.write_text(json.dumps({"training": subjects[:1], "validation": subjects}), encoding="utf-8")
    conditions = {"native": {}, "biased": {"bias_log_std": 0.4}}
    still = {f"synthesis#{key}": [0, 0] for key in ("rotation_deg", "shear", "translation_mm", "velocity_std_mm")}
    settings = {
        "spatial_size": [24, 16, 20],
        "scans_per_subject": 1,
        "conditions": conditions,
        "synthesis#scaling": [1, 1],
    }
    # the distances of these subjects are 0 nowhere: there are no surfaces to compare
    evaluate(datalist, out, configs=["evaluate_generated.json", "evaluate_surfaces.json"], **settings, **still)
    rows = read_rows(out / "metrics.tsv")
    assert {(r.scan, r.condition) for r in rows} == {(f"{s}_01", c) for s in "ab" for c in conditions}
    assert {r.task for r in rows} == {"segmentation", "distance", "log_bias_field", "mni"}
    # The network says 0 for everything but labels: the truth is the error.
    for value in read_rows_of(out, "distance_error").values():
        assert value == pytest.approx(2, abs=1e-3)
    assert read_rows_of(out, "error_mean")["a_01", "native", "brain", "n/a"] == pytest.approx(
        30 * math.sqrt(3), rel=1e-3
    )
    bias = read_rows_of(out, "normalised_l2")
    assert bias["a_01", "native", "n/a", "n/a"] < 1e-3 < 0.005 < bias["a_01", "biased", "n/a", "n/a"]
    volume = read_rows_of(out, "reference_volume")
    assert volume["a_01", "native", "cerebral_cortex", "both"] == np.isin(make_ids(), (3, 42)).sum() / 1000
    assert not (out / "dice.tsv").exists()
    with pytest.raises(
        SystemExit, match="a JSON datalist with the sections testing is needed, found the sections training, validation"
    ):
        evaluate(datalist, out, configs=["evaluate_generated.json"], section="testing", **settings)


def test_two_processes_give_the_tables_of_one(tmp_path: Path, repository: Path) -> None:
    """With a network of a few random weights, which is far too small to predict anything."""
    items = [write_pair(tmp_path / "in", name, make_ids()) for name in ("one", "two", "three")]
    datalist = write_list(tmp_path / "in", *items)
    network = {
        "_target_": "brainfm_monai.networks.MultiTaskNet",
        "backbone": {"_target_": "brainfm_monai.networks.TwoScaleUNet", "in_channels": 1, "features": [8, 8, 16]},
        "layout": "@layout",
        "stride": 2,
    }
    tiny: dict[str, Any] = {
        "network_def": network,
        "layout#tasks": list(LAYOUT.tasks),
        "mirror": False,
        "memory": "full",
        "precision": "float32",
    }
    tiny |= {"outputs": "segmentation", "conditions": {"native": {}, "noisy": {"noise_percent": 5}}}
    (tmp_path / "tiny.json").write_text(json.dumps(tiny), encoding="utf-8")
    torch.manual_seed(0)
    backbone = TwoScaleUNet(1, [8, 8, 16])
    torch.save(MultiTaskNet(backbone, LAYOUT, stride=2).state_dict(), tmp_path / "tiny.pt")
    configs = [repository / "bundle" / "configs" / name for name in ("inference.json", "evaluate.json")]
    values = {
        "config_file": [str(path) for path in (*configs, tmp_path / "tiny.json")],
        "bundle_root": str(repository / "bundle"), "weights": str(tmp_path / "tiny.pt"), "datalist": str(datalist),
    }  # fmt: skip
    alone: dict[str, Any] = {**values, "output_dir": str(tmp_path / "alone"), "device": "$torch.device('cpu')"}
    workflow = ConfigWorkflow(
        alone.pop("config_file"),
        str(configs[0].with_name("metadata.json")),
        workflow_type="inference",
        logging_file=False,
        **alone,
    )
    workflow.initialize()
    workflow.run()
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "monai.bundle",
        "run",
    ]
    options = [f"--{key}={value}" for key, value in {**values, "output_dir": str(tmp_path / "shared")}.items()]
    command = [*torchrun, *options, "--device=$torch.device('cpu')"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("metrics.tsv", "summary.tsv", "dice.tsv", "dice_summary.tsv"):
        assert (tmp_path / "shared" / name).read_bytes() == (tmp_path / "alone" / name).read_bytes(), name
    page = (tmp_path / "shared" / "evaluation.html").read_text(encoding="utf-8")
    assert "3 scans, 2 conditions, 6 cases measured." in page
    assert "not measured" not in page


def test_a_bad_list_ends_the_run_with_one_line(tmp_path: Path, evaluate: Evaluate) -> None:
    folder = tmp_path / "in"
    item = write_pair(folder, "scan", make_ids())
    wrong = {
        r"none\.json: a datalist \(JSON\) is needed, found no such file: pass --datalist FILE": folder / "none.json",
        r"gone\.nii\.gz: named in .*datalist\.json, found no such file": write_list(
            folder, item | {"image": "gone.nii.gz"}
        ),
    }
    for message, datalist in wrong.items():
        with pytest.raises(SystemExit, match=message):
            evaluate(datalist, tmp_path / "out")
    for message, items in {
        r"every item needs 'image' and 'label' or another reference, found \['image'\]": [{"image": item["image"]}],
        r"items whose names, .*, differ are needed, found twice: \['scan'\]": [item, item],
    }.items():
        with pytest.raises(SystemExit, match=message):
            evaluate(write_list(folder, *items), tmp_path / "out")
    (folder / "datalist.json").write_text("{", encoding="utf-8")
    with pytest.raises(
        SystemExit, match=r"datalist\.json: a JSON datalist with the sections testing is needed, found "
    ):
        evaluate(folder / "datalist.json", tmp_path / "out")
    assert not (tmp_path / "out").exists()
