"""The benchmarks' own parts: what is written for the published generator, how a checkout of it is run, lists of real scans.

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
from nibabel.affines import apply_affine, from_matvec
from scipy.ndimage import gaussian_filter

from brainfm_monai.anatomy import Protocol
from brainfm_monai.data.registration import resample_to_box
from brainfm_monai.evaluation.cases import make_cases
from brainfm_monai.evaluation.conditions import parse_conditions

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


def load_benchmark(repository: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, repository / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reference_synthesis(repository: Path) -> ModuleType:
    return load_benchmark(repository, "reference_synthesis")


@pytest.fixture(scope="module")
def real_contrasts(repository: Path) -> ModuleType:
    return load_benchmark(repository, "real_contrasts")


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


def test_left_and_right_are_exchanged_in_lines_that_the_package_has(repository: Path) -> None:
    mirrors = load_benchmark(repository, "mirrors")
    for injection in mirrors.INJECTIONS:
        text = (repository / mirrors.PACKAGE / injection.file).read_text(encoding="utf-8")
        assert text.count(injection.text) == 1, injection.name
        assert all((repository / name).is_file() for name in injection.tests), injection.name


def test_a_missing_checkout_is_one_clear_line(reference_synthesis: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"a checkout of the published BrainFM repository is needed, it lacks Gen\S+$"
    ):
        reference_synthesis.make_reference_generator(tmp_path, subject(), (8, 8, 8), 0)


def test_volumes_of_several_grids_are_refused(reference_synthesis: ModuleType, checkout: Path) -> None:
    volumes = subject() | {"mni": np.zeros((3, 3, 3, 3))}
    with pytest.raises(ValueError, match=r"must share one grid, got .*'mni': \(3, 3, 3\)"):
        reference_synthesis.make_reference_generator(checkout, volumes, (8, 8, 8), 0)


def test_the_subject_is_written_in_the_encodings_of_the_reference(
    reference_synthesis: ModuleType, tmp_path: Path
) -> None:
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


def test_a_second_generator_finds_the_modules_of_the_first(
    reference_synthesis: ModuleType, checkout: Path, tmp_path: Path
) -> None:
    # TorchScript does not compile a function of a module that is imported twice; the stand-in counts its imports.
    counter = tmp_path / "imports.txt"
    module = checkout / "Generator" / "utils.py"
    count = f"with open({str(counter)!r}, 'a') as file:\n    file.write('x')\n"
    module.write_text(module.read_text(encoding="utf-8") + count, encoding="utf-8")
    for size in (8, 16):
        generate = reference_synthesis.make_reference_generator(checkout, subject(), (size,) * 3, 0)
        assert vars(generate()["input"].generator)["size"] == [size] * 3
    assert counter.read_text(encoding="utf-8") == "x"
    assert not {"utils.misc", "Generator", "Generator.utils"} & set(sys.modules)


def test_reading_is_timed_for_each_call(
    reference_synthesis: ModuleType, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


def write_head(folder: Path) -> np.ndarray:
    """T1, T2 and FLAIR of one head of 60 mm, the T1 in other voxels and moved; the map from RAS mm of the T2 to the T1's."""
    grid = np.stack(np.meshgrid(*(np.arange(40),) * 3, indexing="ij"), axis=-1)
    t1 = np.zeros((40, 40, 40), dtype=np.float32)
    for centre, radii, value in (
        ((20, 20, 20), (13, 15, 12), 50),
        ((16, 23, 22), (6, 4, 5), 90),
        ((26, 14, 17), (4, 6, 3), 20),
    ):
        t1[(((grid - centre) / radii) ** 2).sum(axis=-1) < 1] = value
    t1, affine = gaussian_filter(t1, 0.7), from_matvec(np.diag([2.0, 2.0, 2.0]), (-40, -38, -36))
    angle = np.deg2rad(5)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]])
    motion, other = from_matvec(turn, (2, -3, 1.5)), from_matvec(np.diag([-1.5, 2.0, 3.0]), (42, -40, -42))
    folder.mkdir(parents=True)
    nib.save(
        nib.Nifti1Image(8 * resample_to_box(t1, motion @ affine, other, (56, 40, 28)), other), folder / "T1.nii.gz"
    )
    for name, top in (("T2", 110), ("FLAIR", 130)):
        nib.save(nib.Nifti1Image(np.where(t1 > 1, top - t1, 0), affine), folder / f"{name}.nii.gz")
    return motion


def test_every_scan_gets_the_t1w_in_its_own_space(
    real_contrasts: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        real_contrasts,
        "PEOPLE",
        {"one": {name: f"stroke/{name.removesuffix('w')}.nii.gz" for name in real_contrasts.CONTRASTS}},
    )
    motion = write_head(tmp_path / "somewhere" / "stroke")
    real_contrasts.main(tmp_path, tmp_path / "out")
    pairs = make_cases(tmp_path / "out" / "datalist.json", parse_conditions({"native": {}}), "testing")
    own, *pairs = pairs
    assert [own["name"], *(pair["name"] for pair in pairs)] == ["one_T1w", "one_T2w", "one_FLAIR"]
    assert own["image"] == own["T1w"]
    before = nib.Nifti1Image.from_filename(tmp_path / "somewhere" / "stroke" / "T1.nii.gz")
    head = np.argwhere(before.get_fdata() > 0)
    truth = apply_affine(np.linalg.inv(motion) @ before.affine, head)
    for pair, name in zip(pairs, ("T2", "FLAIR"), strict=True):
        assert Path(pair["image"]).read_bytes() == (tmp_path / "somewhere" / "stroke" / f"{name}.nii.gz").read_bytes()
        after = nib.Nifti1Image.from_filename(pair["T1w"])
        np.testing.assert_array_equal(after.get_fdata(), before.get_fdata())  # the header moved, and nothing else
        assert np.linalg.norm(apply_affine(after.affine, head) - truth, axis=1).mean() < 0.7  # mm; a third of a voxel
    rotation, shift = (float(cell) for cell in capsys.readouterr().out.splitlines()[2].split("|")[2:4])
    assert rotation == pytest.approx(5, abs=1)
    assert shift == pytest.approx(np.linalg.norm([2, -3, 1.5]), abs=1)


def test_a_missing_or_doubtful_scan_is_one_clear_line(real_contrasts: ModuleType, tmp_path: Path) -> None:
    for copy in ("a", "b"):
        (tmp_path / copy / "raw" / "patient04").mkdir(parents=True)
        (tmp_path / copy / "raw" / "patient04" / "study1_T1W.nii.gz").touch()
    with pytest.raises(
        FileNotFoundError, match=r"exactly one file 'raw/patient04/study1_T1W.nii.gz' is needed below it, found 2$"
    ):
        real_contrasts.main(tmp_path, tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"exactly one file 'stroke/T2.nii.gz' is needed below it, found 0$"):
        real_contrasts.find(tmp_path, "stroke/T2.nii.gz")
