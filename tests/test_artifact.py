"""The zip for a model zoo, used as a stranger uses it: with the packages of metadata.json, and nothing of ours installed.

Marked ``artifact``: ``make test-artifact`` makes the environment and names its interpreter in ``ARTIFACT_PYTHON``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch

NAME = "brain_multitask"
SIZE = (32, 32, 32)
FAST = ("--mirror", "False", "--second_look", "False", "--precision", "float32", "--outputs", "segmentation,volumes")

LOAD = f"""
import sys, torch
from monai.bundle import load
stored = torch.load(sys.argv[1] + "/{NAME}/models/model.pt", weights_only=True)
without_lesions = [key for key in stored if not key.startswith("context.")]
for options, keys in (({{}}, without_lesions), ({{"workflow_type": "inference"}}, list(stored))):
    found = load("{NAME}", bundle_dir=sys.argv[1], **options).state_dict()
    assert set(found) == set(keys), options
    assert all(torch.equal(found[key].float(), stored[key].float()) for key in keys), options
try:
    import brainfm_monai
except ModuleNotFoundError:
    raise SystemExit("the package must come out of the bundle")
assert brainfm_monai.__file__.startswith(sys.argv[1]), brainfm_monai.__file__
"""
UNIT_TEST = """
import json, sys
from monai.bundle import ConfigWorkflow
root = sys.argv[1]
files = {"meta_file": f"{root}/configs/metadata.json", "logging_file": f"{root}/configs/logging.conf"}
for name, values in json.loads(sys.argv[2]).items():
    workflow = ConfigWorkflow(config_file=f"{root}/configs/{name}.json", bundle_root=root, **files, **values)
    workflow.initialize()
    assert workflow.check_properties() == [], name
    workflow.run()
    workflow.finalize()
"""


def build(repository: Path, output: Path) -> Path:
    command = [sys.executable, str(repository / "packaging/make_bundle.py"), "--output", str(output)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return Path(done.stdout.strip())


def test_two_builds_give_the_same_bytes_and_every_config_finds_the_package(repository: Path, tmp_path: Path) -> None:
    one, two = build(repository, tmp_path / "one"), build(repository, tmp_path / "two")
    assert one.read_bytes() == two.read_bytes()
    version = json.loads((repository / "bundle/configs/metadata.json").read_text())["version"]
    assert one.name == f"{NAME}_v{version}.zip"
    with zipfile.ZipFile(one) as archive:
        names = archive.namelist()
        assert all(name.startswith(f"{NAME}/") for name in names)
        present = {
            f"{NAME}/{name}" for name in ("LICENSE", "models/model.pt", "docs/README.md", "docs/data_license.txt")
        }
        assert present | {f"{NAME}/brainfm_monai/__init__.py"} <= set(names)
        assert not any("variants" in name or "/bundle/" in name for name in names)
        for name in ("inference", "train", "evaluate", "features", "finetune", "label_train", "multi_gpu_train"):
            text = archive.read(f"{NAME}/configs/{name}.json").decode()
            assert "$brainfm_monai" not in text
            assert "$import brainfm_monai" not in text
            config = json.loads(text)
            assert config["package"]["name"] == "brainfm_monai"
            _assert_components_require_the_package(config, name)


def _assert_components_require_the_package(value: Any, where: str) -> None:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    if isinstance(value, dict) and str(value.get("_target_", "")).startswith("brainfm_monai."):
        assert "@package" in value["_requires_"], where
    for key, item in items:
        _assert_components_require_the_package(item, f"{where}#{key}")


@pytest.fixture(scope="module")
def python() -> str:
    """Interpreter of an environment that has the packages of metadata.json, and not ours."""
    path = os.environ.get("ARTIFACT_PYTHON", "")
    assert path, "ARTIFACT_PYTHON must name an interpreter: run make test-artifact"
    return str(Path(path).absolute())


def run(python: str, *words: object, cwd: Path) -> str:
    """Run the interpreter where nothing of the project is found; what it says."""
    names = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run([python, *map(str, words)], cwd=cwd, env=names, capture_output=True, text=True)
    assert done.returncode == 0, f"{words[:4]}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def address(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The zip at an address of a server on this machine."""
    path = build(repository, tmp_path_factory.mktemp("dist"))
    handler = partial(SimpleHTTPRequestHandler, directory=str(path.parent))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/{path.name}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def bundle(python: str, address: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle as MONAI downloads it."""
    folder = tmp_path_factory.mktemp("user")
    run(python, "-m", "monai.bundle", "download", "--name", NAME, "--url", address, "--bundle_dir", folder, cwd=folder)
    return folder / NAME


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The MNI152 T1 at 2 mm, stored from left to right."""
    from nilearn.datasets import load_mni152_template

    image = load_mni152_template(resolution=2)
    path = tmp_path_factory.mktemp("scan") / "t1.nii.gz"
    values = np.round(image.get_fdata() * 1000).astype(np.int16)[::-1]
    flip = np.diag([-1.0, 1, 1, 1])
    flip[0, 3] = values.shape[0] - 1
    nib.save(nib.Nifti1Image(values, image.affine @ flip), path)
    return path


@pytest.fixture(scope="module")
def labels(python: str, bundle: Path, scan: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Label map of the scan, computed out of the bundle from another folder."""
    out = tmp_path_factory.mktemp("elsewhere")
    config = ("--config_file", bundle / "configs/inference.json")
    run(python, "-m", "monai.bundle", "run", *config, "--input", scan, "--output_dir", out, *FAST, cwd=out)
    return out / "t1/t1_dseg.nii.gz"


@pytest.fixture(scope="module")
def datalist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two prepared subjects, one of them for validation."""
    folder = tmp_path_factory.mktemp("subjects")
    items = [_write_subject(folder / f"sub-{number}", 14 + number) for number in range(2)]
    (folder / "datalist.json").write_text(json.dumps({"training": items[:1], "validation": items[1:]}))
    return folder / "datalist.json"


@pytest.mark.artifact
def test_inference_from_elsewhere_gives_the_labels_of_the_project(
    repository: Path, scan: Path, labels: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "brainfm_monai", "predict", str(scan), str(tmp_path / "out")]
    subprocess.run([*command, "--bundle", str(repository / "bundle"), *FAST], check=True, capture_output=True)
    found, wanted = (nib.load(path) for path in (labels, tmp_path / "out/t1/t1_dseg.nii.gz"))
    np.testing.assert_allclose(found.affine, wanted.affine)  # type: ignore[attr-defined]
    values = [np.asarray(image.dataobj) for image in (found, wanted)]  # type: ignore[attr-defined]
    assert len(np.unique(values[0])) > 25
    assert (values[0] != values[1]).mean() < 1e-4


@pytest.mark.artifact
def test_load_gives_the_trained_network_in_both_forms(python: str, bundle: Path, tmp_path: Path) -> None:
    run(python, "-c", LOAD, bundle.parent, cwd=tmp_path)


@pytest.mark.artifact
def test_the_checks_of_the_zoo_pass(python: str, bundle: Path, datalist: Path, scan: Path, tmp_path: Path) -> None:
    meta, config = bundle / "configs/metadata.json", bundle / "configs/inference.json"
    content = json.loads(meta.read_text())  # test_bundle.py holds it against the schema
    shapes = ("verify_net_in_out", "network_def", "--meta_file", meta, "--config_file", config, "--bundle_root", bundle)
    run(python, "-m", "monai.bundle", *shapes, "--device", "cpu", cwd=bundle)
    # the form of the zoo's unit tests: configs with overrides are made, checked and run
    fast = {"mirror": False, "second_look": False, "outputs": ["segmentation"]}
    inference: dict[str, Any] = {
        "workflow_type": "inference",
        "input": str(scan),
        "output_dir": str(tmp_path / "labels"),
        **fast,
    }
    train: dict[str, Any] = {
        "workflow_type": "train",
        "datalist": str(datalist),
        "output_dir": str(tmp_path / "training"),
    }
    train |= {"spatial_size": [32, 32, 32], "epoch_length": 1, "max_epochs": 1, "val_interval": 1}
    run(python, "-c", UNIT_TEST, bundle, json.dumps({"inference": inference, "train": train}), cwd=tmp_path)
    assert (tmp_path / "labels/t1/t1_dseg.nii.gz").is_file()
    assert (tmp_path / "training/model.pt").is_file()
    for key in ("required_packages_version", "eval_metrics", "data_source", "authors", "intended_use"):
        assert content[key], key


@pytest.mark.artifact
def test_torchscript_equals_the_network(python: str, bundle: Path, tmp_path: Path) -> None:
    files = ("--ckpt_file", "models/model.pt", "--meta_file", "configs/metadata.json")
    words = ("ckpt_export", "network_def", "--filepath", tmp_path / "model.ts", *files)
    run(python, "-m", "monai.bundle", *words, "--config_file", "configs/inference.json", cwd=bundle)
    scripted = torch.jit.load(tmp_path / "model.ts")
    from monai.bundle import ConfigParser

    parser = ConfigParser()
    parser.read_config(str(Path(__file__).parents[1] / "bundle/configs/inference.json"))
    network = parser.get_parsed_content("network_def").eval()
    network.load_state_dict(torch.load(bundle / "models/model.pt", weights_only=True))
    for size in ((64, 64, 64), (64, 32, 96)):
        image = torch.rand(1, 1, *size)
        with torch.no_grad():
            torch.testing.assert_close(scripted(image), network(image), rtol=1e-4, atol=1e-4)


@pytest.mark.artifact
def test_evaluation_compares_with_a_reference(
    python: str, bundle: Path, scan: Path, labels: Path, tmp_path: Path
) -> None:
    reference = labels.with_name("t1_desc-freesurfer_dseg.nii.gz")
    pairs = tmp_path / "pairs.json"
    pairs.write_text(json.dumps({"testing": [{"image": str(scan), "label": str(reference)}]}))
    configs = f"['{bundle / 'configs/inference.json'}','{bundle / 'configs/evaluate.json'}']"
    words = ("--config_file", configs, "--datalist", pairs, "--output_dir", tmp_path / "out", *FAST[:6])
    run(python, "-m", "monai.bundle", "run", *words, cwd=tmp_path)
    rows = [line.split("\t") for line in (tmp_path / "out/dice_summary.tsv").read_text().splitlines()]
    assert float(rows[-1][rows[0].index("merged") if "merged" in rows[0] else 3]) > 0.999


@pytest.mark.artifact
def test_fine_tuning_starts_from_the_weights_and_changes_them(
    python: str, bundle: Path, datalist: Path, tmp_path: Path
) -> None:
    configs = f"['{bundle / 'configs/train.json'}','{bundle / 'configs/finetune.json'}']"
    data = ("--datalist", datalist, "--output_dir", tmp_path / "tuned")
    small = ("--spatial_size", "[32,32,32]", "--epoch_length", 3, "--max_epochs", 1, "--val_interval", 1)
    run(python, "-m", "monai.bundle", "run", "--config_file", configs, *data, *small, cwd=tmp_path)
    before, after = (
        torch.load(path, weights_only=True) for path in (bundle / "models/model.pt", tmp_path / "tuned/model.pt")
    )
    assert {key for key in before if not key.startswith("context.")} == set(after)  # lesions are learnt last
    changes = torch.stack([(before[key].float() - after[key].float()).abs().max() for key in after])
    assert changes.max() > 0
    assert changes.median() < 0.1  # the weights of the start, a few small steps later


def _write_subject(folder: Path, size: int) -> dict[str, str]:
    """A head in the prepared layout: skin, two hemispheres of different size, distances and coordinates that fit."""
    from brainfm_monai.anatomy import Protocol

    ids = np.zeros((96, 96, 96), dtype=np.int32)
    ids[6:90, 6:90, 6:90] = 511
    ids[18:45, 18 : 18 + 3 * size, 18:72] = 3
    ids[51:75, 18:60, 24:60] = 41
    x = np.indices(ids.shape)[0] - 47.5
    folder.mkdir(parents=True)
    arrays = {
        "generation_labels": Protocol.load("synthseg_generation").encode(ids),
        "segmentation": Protocol.load("synthseg_head").encode(ids),
        "distance": np.stack([x, x + 1, -x, 1 - x], axis=-1).clip(-6.4, 6.35).astype(np.float32),
        "mni": np.moveaxis(np.indices((24, 24, 24)) * 4.0 - 46, 0, -1).astype(np.float32),
    }
    for name, array in arrays.items():
        nib.save(nib.Nifti1Image(array, np.eye(4)), folder / f"{name}.nii.gz")
    return {"subject": folder.name, **{name: str(folder / f"{name}.nii.gz") for name in arrays}}
