"""The published BrainFM generator, run from a checkout of its repository: what ``synthesis.py --reference`` compares with.

    git clone https://github.com/jhuldr/BrainFM      (checked at commit f1731a1)
    generate = make_reference_generator(Path("BrainFM"), subject, (128, 128, 128), seed=0)
    sample = generate()          # one synthetic image with all its targets
    generate.read_seconds        # the share of that call spent in reading NIfTI files, to be subtracted

The reference reads its subjects from files at every item and runs on the global random generators. So the subject is written
once into a temporary folder, in the reference's encodings, and the time of each call splits into reading and the rest.
Its ranges and options are those of its own training configuration, read from the checkout. Needs PyYAML (the extra ``dev``).
"""

from __future__ import annotations

import contextlib
import importlib
import io
import random
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, TypeVar

import nibabel as nib
import numpy as np
import torch
import yaml

from brainfm_monai.anatomy import Protocol

PACKAGES = ("Generator", "ShapeID", "utils")  # the checkout's top-level packages
CONFIGS = ("cfgs/generator/default.yaml", "cfgs/generator/train/brain_id.yaml")  # the second overrides the first
PREFIX = "Benchmark.subject."  # of every file of a subject: the data set's name up to the first dot, then the subject's
DATASET = PREFIX.split(".")[0]
GENERATION_PROTOCOL, PROTOCOL, REFERENCE_PROTOCOL = "synthseg_generation", "synthseg_head", "brainfm"
SEGMENTATION_IDS = (
    "label_list_segmentation_brainseg_with_extracerebral"  # the reference's id of each of its 56 channels
)
FIRST_CODE = 100  # generation labels from here on are codes of partial volume
RESERVED_IDS = (1, 77)  # lesion, the first tissue of those codes; white-matter lesion, painted as white matter
DISTANCE_SCALE, DISTANCE_OFFSET = 20, 128  # stored = mm * 20 + 128, eight bits
COORDINATE_SCALE = 100  # stored = mm * 100, sixteen bits
DISTANCES = ("lp", "lw", "rp", "rw")
MODALITIES = ("T1w", "T2w", "FLAIR", "CT")
TARGETS = ("T1", "T2", "FLAIR", "CT", "segmentation", "distance", "registration")

T = TypeVar("T")

_imported: dict[Path, dict[str, ModuleType]] = {}  # modules of each checkout, which left sys.modules


class ReferenceGenerator:
    """Makes one sample per call and remembers how long its reading took.

    Attributes:
        read_seconds: time in nibabel (opening, and decoding to float64) during the last call.
        commit: short hash of the checkout, "unknown" outside git.
    """

    def __init__(self, dataset: Any, reader: _TimedReader, folder: Path, commit: str) -> None:
        self._dataset, self._reader = dataset, reader
        self.read_seconds, self.commit = 0.0, commit
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)

    def __call__(self) -> dict[str, torch.Tensor]:
        """One sample: ``input``, ``bias_field_log`` and the targets, each of shape (C, H, W, D), float32."""
        self._reader.seconds = 0.0
        *_, target, samples = self._dataset[0]
        self.read_seconds = self._reader.seconds
        return {**{name: target[name] for name in TARGETS}, **samples[0]}


def make_reference_generator(
    checkout: Path, subject: Mapping[str, np.ndarray], spatial_size: tuple[int, int, int], seed: int
) -> ReferenceGenerator:
    """The reference's generator on the CPU: synthetic input, all targets, one sample per item, its published ranges.

    It draws from numpy's and torch's global generators, which are seeded here.

    Args:
        checkout: work tree of the published repository.
        subject: volumes of one 1 mm grid in RAS order: ``generation_labels`` (H, W, D) of the protocol
            ``synthseg_generation``; ``segmentation`` (H, W, D) of the protocol ``synthseg_head``; ``distance``
            (H, W, D, 4) in mm, in the order lp, lw, rp, rw; ``mni`` (H, W, D, 3) in mm; ``T1w``, ``T2w``, ``FLAIR``
            (H, W, D) in any unit and ``CT`` (H, W, D) in HU.
        spatial_size: size of the sample in voxels of 1 mm.
        seed: seed of the global generators.

    Raises:
        FileNotFoundError: if there is no such checkout.
        ValueError: if the subject's volumes do not share one grid.
    """
    missing = [name for name in ("Generator/datasets.py", *CONFIGS) if not (checkout / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{checkout}: a checkout of the published BrainFM repository is needed, it lacks {missing[0]}"
        )
    shapes = {name: volume.shape[:3] for name, volume in subject.items()}
    if len(set(shapes.values())) != 1:
        raise ValueError(f"make_reference_generator: the subject's volumes must share one grid, got {shapes}")
    config = _read_config(checkout)
    folder = Path(tempfile.mkdtemp(prefix="reference_synthesis_"))
    write_subject(folder, subject, config[SEGMENTATION_IDS])
    config |= {
        "data_root": str(folder),
        "split_root": str(folder),
        "modality_probs": {DATASET: {"T1": 0.0, "T2": 0.0, "FLAIR": 0.0, "CT": 0.0, "synth": 1.0}},  # cumulative
    }
    config["generator"] |= {"size": list(spatial_size)}
    reader = _TimedReader()
    with _importing_from(checkout), contextlib.redirect_stdout(io.StringIO()):  # it prints what it found
        package = importlib.import_module("Generator")
        # All its reading goes through this module's name for nibabel.
        importlib.import_module("Generator.utils").__dict__["nib"] = reader
        dataset = package.dataset_options[config["dataset_option"]](_namespace(config), device="cpu")
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  the reference draws from the global generator
    torch.manual_seed(seed)
    return ReferenceGenerator(dataset, reader, folder, _commit(checkout))


def write_subject(folder: Path, subject: Mapping[str, np.ndarray], segmentation_ids: list[int]) -> None:
    """Write a subject as the uncompressed NIfTI siblings that the reference reads, and its list of subjects.

    Args:
        folder: where to.
        subject: as in :func:`make_reference_generator`.
        segmentation_ids: the reference's id of each of its 56 channels.
    """
    distance = np.clip(np.rint(subject["distance"] * DISTANCE_SCALE + DISTANCE_OFFSET), 0, 255).astype(np.uint8)
    mni = np.rint(subject["mni"] * COORDINATE_SCALE).astype(np.int16)
    volumes = {
        "generation_labels": _generation_codes()[subject["generation_labels"]],
        "brainseg_with_extracerebral": _segmentation_codes(segmentation_ids)[subject["segmentation"]],
        **{f"{surface}_dist_map": distance[..., channel] for channel, surface in enumerate(DISTANCES)},
        **{f"mni_reg.{axis}": mni[..., channel] for channel, axis in enumerate("xyz")},
        **{modality: subject[modality].astype(np.float32) for modality in MODALITIES},
    }
    for name, volume in volumes.items():
        nib.save(nib.Nifti1Image(volume, np.eye(4)), folder / f"{PREFIX}{name}.nii")
    (folder / "train.txt").write_text(f"{folder / PREFIX}T1w.nii\n", encoding="utf-8")


def _generation_codes() -> np.ndarray:
    """Id below 100 for every label, shape (L,): both sides share one, and head structures take ids that are free."""
    structures = Protocol.load(GENERATION_PROTOCOL).structures
    one_side = [structures[min(s.label, s.mirror)].freesurfer_id for s in structures]
    free = iter(i for i in range(FIRST_CODE) if i not in {*one_side, *RESERVED_IDS})
    code_of_id = {i: i if i < FIRST_CODE else next(free) for i in dict.fromkeys(one_side)}
    return np.array([code_of_id[i] for i in one_side], dtype=np.uint8)


def _segmentation_codes(segmentation_ids: list[int]) -> np.ndarray:
    """The reference's id for every label, shape (L,); background for the structures it has not (ventral DC)."""
    channel_of_name = {s.name: s.label for s in Protocol.load(REFERENCE_PROTOCOL).structures}
    channels = [channel_of_name.get(s.name, 0) for s in Protocol.load(PROTOCOL).structures]
    return np.array(segmentation_ids, dtype=np.uint8)[channels]


def _read_config(checkout: Path) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for name in CONFIGS:
        for key, value in yaml.safe_load((checkout / name).read_text(encoding="utf-8")).items():
            both_are_sections = isinstance(value, dict) and isinstance(merged.get(key), dict)
            merged[key] = merged[key] | value if both_are_sections else value
    return merged


def _namespace(value: Any) -> Any:
    """Nested dictionaries as nested namespaces, which is how the reference wants its configuration."""
    return SimpleNamespace(**{k: _namespace(v) for k, v in value.items()}) if isinstance(value, dict) else value


@contextlib.contextmanager
def _importing_from(checkout: Path) -> Iterator[None]:
    """The checkout's packages can be imported inside, and have left ``sys.path`` and ``sys.modules`` afterwards.

    They are imported once: TorchScript refuses to compile the functions of a second copy of a module.
    """

    def take_out() -> dict[str, ModuleType]:
        return {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in PACKAGES}

    path, displaced = list(sys.path), take_out()
    sys.path.insert(0, str(checkout))
    # The generator imports one name from utils.misc and never uses it, but that module imports SimpleITK, torchvision,
    # visdom, simplejson, iopath and pytz; so an empty module stands in its place.
    stand_in = ModuleType("utils.misc")
    stand_in.__dict__["viewVolume"] = None
    sys.modules.update(_imported.get(checkout.resolve(), {"utils.misc": stand_in}))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # torch.cuda.amp.custom_fwd in its copy of interpol
            yield
    finally:
        _imported[checkout.resolve()] = take_out()
        sys.modules.update(displaced)
        sys.path[:] = path


class _TimedReader:
    """Stands in for nibabel in the reference's modules and adds up the seconds spent in it."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def load(self, path: str) -> _TimedImage:
        return _TimedImage(self.timed(lambda: nib.Nifti1Image.from_filename(path)), self)

    def timed(self, read: Callable[[], T]) -> T:
        start = time.perf_counter()
        try:
            return read()
        finally:
            self.seconds += time.perf_counter() - start


class _TimedImage:
    """What the reference asks of an image: shape, affine, and its values as float64."""

    def __init__(self, image: nib.Nifti1Image, reader: _TimedReader) -> None:
        self.shape, self.affine = image.shape, image.affine
        self._image, self._reader = image, reader

    def get_fdata(self) -> np.ndarray:
        return self._reader.timed(self._image.get_fdata)


def _commit(checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
