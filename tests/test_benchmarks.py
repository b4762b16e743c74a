"""The benchmarks' own parts: what is written for the published generator, and how a checkout of it is run.

The checkout here is a stand-in of a few lines with the reference's module names; timing the real one is the benchmark's job.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import nibabel as nib
import numpy as np
import pytest

from brainfm_monai.anatomy import Protocol

SIZE = (6, 5, 4)
DATASETS = """
from pathlib import Path
from utils.misc import viewVolume  # the real one imports half a dozen packages that it does not need
from . import utils
class Dataset:
    def __init__(self, config, device):
        self.config, self.device = config, device
        self.path = (Path(config.split_root) / "train.txt").read_text().strip()
    def __getitem__(self, index):
        image = utils.nib.load(self.path)
        target = {n: image.get_fdata() for n in "T1 T2 FLAIR CT segmentation distance registration".split()}
        return 1, "Benchmark", "synth", target, [{"input": self.config, "bias_field_log": image.shape}]
"""


@pytest.fixture(scope="module")
def reference_synthesis(repository: Path) -> ModuleType:
    path = repository / "benchmarks" / "reference_synthesis.py"
    spec = importlib.util.spec_from_file_location("reference_synthesis", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    files = {
        "Generator/datasets.py": DATASETS,
        "Generator/utils.py": "import nibabel as nib\n",
        "Generator/__init__.py": "from .datasets import Dataset\ndataset_options = {'brain_id': Dataset}\n",
        "utils/__init__.py": "",
        "utils/misc.py": "raise ImportError('must not be needed')\n",
        "cfgs/generator/default.yaml": f"generator: {{size: [8, 8, 8], max_shear: 0.2, noise_std_max: 15}}\n"
        f"label_list_segmentation_brainseg_with_extracerebral: {list(range(100, 156))}\n",
        "cfgs/generator/train/brain_id.yaml": "dataset_option: brain_id\ngenerator: {noise_std_max: 1.}\n",
    }
    for name, text in files.items():
        (tmp_path / "checkout" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "checkout" / name).write_text(text, encoding="utf-8")
    return tmp_path / "checkout"


def subject() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {
        "generation_labels": generator.integers(0, 54, SIZE, dtype=np.uint8),
        "segmentation": generator.integers(0, 44, SIZE, dtype=np.uint8),
        "distance": generator.uniform(-9, 9, (*SIZE, 4)).astype(np.float32),
        "mni": generator.uniform(-90, 90, (*SIZE, 3)).astype(np.float32),
        **{name: generator.uniform(-100, 900, SIZE).astype(np.float32) for name in ("T1w", "T2w", "FLAIR", "CT")},
    }


def test_a_missing_checkout_is_one_clear_line(reference_synthesis: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"a checkout of the published BrainFM repository is needed, it lacks Gen\S+$"):
        reference_synthesis.make_reference_generator(tmp_path, subject(), (8, 8, 8), 0)


def test_volumes_of_several_grids_are_refused(reference_synthesis: ModuleType, checkout: Path) -> None:
    volumes = subject() | {"mni": np.zeros((3, 3, 3, 3))}
    with pytest.raises(ValueError, match=r"must share one grid, got .*'mni': \(3, 3, 3\)"):
        reference_synthesis.make_reference_generator(checkout, volumes, (8, 8, 8), 0)


def test_the_subject_is_written_in_the_encodings_of_the_reference(reference_synthesis: ModuleType, tmp_path: Path) -> None:
    volumes = subject()
    reference_synthesis.write_subject(tmp_path, volumes, list(range(100, 156)))
    listed = Path((tmp_path / "train.txt").read_text(encoding="utf-8").strip())

    def read(name: str) -> np.ndarray:
        return nib.Nifti1Image.from_filename(f"{str(listed).removesuffix('T1w.nii')}{name}.nii").get_fdata()

    for channel, surface in enumerate(("lp", "lw", "rp", "rw")):
        expected = volumes["distance"][..., channel].clip(-6.4, 6.35)
        np.testing.assert_allclose((read(f"{surface}_dist_map") - 128) / 20, expected, atol=0.02501)
    for channel, axis in enumerate("xyz"):
        np.testing.assert_allclose(read(f"mni_reg.{axis}") / 100, volumes["mni"][..., channel], atol=0.00501)
    np.testing.assert_array_equal(read("CT"), volumes["CT"])

    painted, labels = read("generation_labels"), volumes["generation_labels"]
    structures = Protocol.load("synthseg_generation").structures
    code = {s.name: set(painted[labels == s.label]) for s in structures if (labels == s.label).any()}
    assert code["Right-Cerebral-Cortex"] == code["Left-Cerebral-Cortex"] == {3}
    assert code["CSF"] == {24}
    of_tissue = [next(iter(code[s.name])) for s in structures if s.name in code and s.label <= s.mirror]
    assert len(set(of_tissue)) == len(of_tissue), "two tissues must not share a code"
    assert max(of_tissue) < 100, "from 100 on, the reference reads codes of partial volume"
    assert not {1, 77} & set(of_tissue)

    target, labels = read("brainseg_with_extracerebral"), volumes["segmentation"]
    channel_of_name = {s.name: s.label for s in Protocol.load("brainfm").structures}
    for structure in Protocol.load("synthseg_head").structures:
        expected_id = 100 + channel_of_name.get(structure.name, 0)
        assert set(target[labels == structure.label]) <= {expected_id}, structure.name
    assert {"Left-VentralDC", "Right-VentralDC"} == {s.name for s in Protocol.load("synthseg_head").structures} - set(
        channel_of_name
    )


def test_a_checkout_runs_apart_from_the_modules_of_the_same_names(
    reference_synthesis: ModuleType, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = ModuleType("utils")
    monkeypatch.setitem(sys.modules, "utils", ours)
    path = list(sys.path)
    generate = reference_synthesis.make_reference_generator(checkout, subject(), (16, 24, 32), 0)
    assert sys.path == path
    assert sys.modules["utils"] is ours
    assert not {"utils.misc", "Generator", "Generator.utils"} & set(sys.modules)

    sample = generate()
    assert sample["bias_field_log"] == SIZE
    np.testing.assert_array_equal(sample["T1"], subject()["T1w"])
    config = sample["input"]
    assert vars(config.generator) == {"size": [16, 24, 32], "max_shear": 0.2, "noise_std_max": 1.0}
    assert vars(config.modality_probs.Benchmark)["synth"] == 1


def test_reading_is_timed_for_each_call(reference_synthesis: ModuleType, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate = reference_synthesis.make_reference_generator(checkout, subject(), (8, 8, 8), 0)
    ticks = iter(range(1000))
    monkeypatch.setattr(reference_synthesis.time, "perf_counter", lambda: next(ticks))
    for _ in range(2):
        generate()
        assert generate.read_seconds == 8, "one opening and seven decodings, a tick each; the next call counts anew"


def test_the_folder_goes_with_the_generator(reference_synthesis: ModuleType, checkout: Path) -> None:
    generate = reference_synthesis.make_reference_generator(checkout, subject(), (8, 8, 8), 0)
    folder = Path(generate()["input"].data_root)
    assert (folder / "train.txt").is_file()
    del generate
    assert not folder.exists()
