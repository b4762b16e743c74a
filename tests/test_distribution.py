"""The sdist and the wheel, each in a place of its own. Marked ``artifact``: ``make test-artifact`` makes the environments.

``WHEEL_PYTHON`` names the interpreter of an environment that holds what the wheel requires, and not the wheel.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import brainfm_monai

PLAIN = ("PYTHONPATH", "VIRTUAL_ENV")  # of this environment, which the others must not see
PARTS_OF_THE_SDIST = ["tests/test_architecture.py", "tests/test_bundle.py", "tests/test_tasks.py", "tests/test_cli.py"]

pytestmark = pytest.mark.artifact


def run(words: list[object], cwd: Path, **names: str) -> str:
    """Run a command where nothing of the project is found but what it is given; what it prints."""
    environment = {key: value for key, value in os.environ.items() if key not in PLAIN} | names
    done = subprocess.run([str(word) for word in words], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{words[:5]}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def distributions(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist of the checkout, and the wheel that is built out of the sdist."""
    folder = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, repository], repository)
    return next(folder.glob("*.tar.gz")), next(folder.glob("*.whl"))


def test_each_holds_the_weights_once(distributions: tuple[Path, Path]) -> None:
    with tarfile.open(distributions[0]) as sdist, zipfile.ZipFile(distributions[1]) as wheel:
        for names in (sdist.getnames(), wheel.namelist()):
            assert sum(name.endswith("model.pt") for name in names) == 1
            assert any(name.endswith("bundle/variants/release.json") for name in names)
            assert any(name.endswith("protocols/synthseg_head.tsv") for name in names)


def test_the_tests_of_the_sdist_pass_beside_it(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    with tarfile.open(distributions[0]) as sdist:
        sdist.extractall(tmp_path, filter="data")
    root = next(tmp_path.iterdir())
    words: list[object] = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        f"--basetemp={tmp_path / 'tests'}",
        *PARTS_OF_THE_SDIST,
    ]
    assert " passed" in run(words, root, PYTHONPATH=str(root / "src"))
    assert (root / "bundle/models/model.pt").samefile(root / "src/brainfm_monai/bundle/models/model.pt")


def test_the_wheel_alone_predicts(distributions: tuple[Path, Path], tmp_path: Path) -> None:
    python = os.environ.get("WHEEL_PYTHON", "")
    assert python, "WHEEL_PYTHON must name an interpreter: run make test-artifact"
    python = str(Path(python).absolute())
    run([python, "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall", distributions[1]], tmp_path)
    command = Path(python).with_name("brainfm-monai")
    assert f"brainfm-monai {brainfm_monai.__version__}" in run([command, "doctor"], tmp_path)
    scan = tmp_path / "head.nii.gz"
    write_head(scan)
    fast = ("--mirror", "False", "--second_look", "False", "--outputs", "segmentation,volumes,report")
    run([command, "predict", scan, tmp_path / "out", *fast], tmp_path)
    labels = nib.load(tmp_path / "out/head/head_dseg.nii.gz")
    assert len(np.unique(np.asarray(labels.dataobj))) > 25  # type: ignore[attr-defined]
    assert (tmp_path / "out/head/head_report.html").is_file()


def write_head(path: Path) -> None:
    """The MNI152 template that nilearn ships, at 2 mm."""
    from nilearn.datasets import load_mni152_template

    image = load_mni152_template(resolution=2)
    nib.save(nib.Nifti1Image(np.round(image.get_fdata() * 1000).astype(np.int16), image.affine), path)
