"""Prepared subjects out of label maps: everything a training needs of an anatomy, written once to disk."""

from __future__ import annotations

import glob
import hashlib
import json
import multiprocessing
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from tqdm import tqdm

from brainfm_monai.anatomy import Protocol
from brainfm_monai.data.distances import PIAL_IDS, compute_hemisphere_distances
from brainfm_monai.data.labels import crop_to_box, find_brain_centre, load_label_map
from brainfm_monai.data.registration import TEMPLATE_NAME, compute_mni_coordinates

__all__ = ["PreparationError", "prepare_label_map", "prepare_label_maps"]

SIDECAR = "subject.json"
FILES = ("generation_labels.nii.gz", "segmentation.nii.gz", "distance.nii.gz", "mni.nii.gz")
SUFFIXES = (".nii.gz", ".nii", ".mgz", ".mgh")
BOX_IDS = (*PIAL_IDS["left"], *PIAL_IDS["right"], 7, 8, 46, 47)
DISTANCE_STEP_MM, DISTANCE_OFFSET_MM = 0.05, -6.4
MNI_STEP_MM, MNI_FACTOR = 0.01, 4


class PreparationError(RuntimeError):
    """Some label maps could not be prepared; the others were."""


def prepare_label_map(
    source: str | Path,
    output_dir: str | Path,
    *,
    generation_protocol: str = "synthseg_generation",
    protocol: str = "synthseg_head",
    spatial_size: Sequence[int] = (192, 224, 224),
) -> Path:
    """Prepare one subject: labels, distances and MNI coordinates on a fixed box of 1 mm voxels in RAS+ order.

    The folder appears whole or not at all; one that is there already is replaced.

    Args:
        source: label map (NIfTI or MGH) with FreeSurfer ids.
        output_dir: folder in which the subject's folder is made; it is named after the file.
        generation_protocol: protocol of the labels that the generator paints: a name or a table file.
        protocol: protocol of the segmentation target: a name or a table file.
        spatial_size: size of the box in voxels, multiples of 4.

    Returns:
        The subject's folder, with ``generation_labels.nii.gz``, ``segmentation.nii.gz``, ``distance.nii.gz`` (mm, negative
        inside; left pial, left white, right pial, right white), ``mni.nii.gz`` (mm, on a grid of 4 mm) and ``subject.json``.

    Raises:
        FileNotFoundError: if the label map or a protocol is missing.
        ValueError: if the label map is not one volume of known ids, or ``spatial_size`` does not fit.
    """
    source, output_dir = Path(source), Path(output_dir)
    size = _check_size(spatial_size)
    ids, affine = load_label_map(source)
    protocols = [Protocol.load(name) for name in (generation_protocol, protocol)]
    for known in protocols:
        known.encode(np.unique(ids), str(source))  # the whole map, not only what the box will keep of it
    box, box_affine = crop_to_box(ids, affine, find_brain_centre(ids, BOX_IDS, str(source)), size)
    generation, segmentation = (known.encode(box) for known in protocols)
    distance = compute_hemisphere_distances(box)
    mni, mni_affine = compute_mni_coordinates(box, box_affine, factor=MNI_FACTOR)
    target = output_dir / _subject_name(source)
    with _whole_folder(target) as folder:
        whole = (
            (generation, box_affine, 1.0, 0.0),
            (segmentation, box_affine, 1.0, 0.0),
            (
                _quantise(distance, np.uint8, DISTANCE_STEP_MM, DISTANCE_OFFSET_MM),
                box_affine,
                DISTANCE_STEP_MM,
                DISTANCE_OFFSET_MM,
            ),
            (_quantise(mni, np.int16, MNI_STEP_MM, 0.0), mni_affine, MNI_STEP_MM, 0.0),
        )
        for name, parts in zip(FILES, whole, strict=True):
            _save(folder / name, *parts)
        record = _describe(source, generation_protocol=generation_protocol, protocol=protocol, spatial_size=size)
        (folder / SIDECAR).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return target


def prepare_label_maps(
    inputs: str | Path | Sequence[str | Path],
    output_dir: str | Path,
    *,
    generation_protocol: str = "synthseg_generation",
    protocol: str = "synthseg_head",
    spatial_size: Sequence[int] = (192, 224, 224),
    jobs: int = 1,
    overwrite: bool = False,
) -> list[Path]:
    """Prepare many subjects in parallel; finished ones are skipped, so that an interrupted run goes on where it was.

    Args:
        inputs: folder of label maps, one file, a glob pattern, or a list of these.
        output_dir: folder for the subjects' folders.
        generation_protocol: see :func:`prepare_label_map`.
        protocol: see :func:`prepare_label_map`.
        spatial_size: see :func:`prepare_label_map`.
        jobs: number of processes; each needs about 3 GB.
        overwrite: prepare finished subjects again.

    Returns:
        The subjects' folders, in the order of the inputs.

    Raises:
        ValueError: if there is no label map, or two would have one subject name.
        PreparationError: at the end, if some label maps failed: one line for each.
    """
    sources = _find_sources(inputs)
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    settings: dict[str, Any] = {
        "generation_protocol": generation_protocol,
        "protocol": protocol,
        "spatial_size": _check_size(spatial_size),
    }
    wanted = {source: _describe(source, **settings) for source in sources if source.is_file()}
    waiting = [s for s in sources if overwrite or s not in wanted or not _is_finished(output_dir / _subject_name(s), wanted[s])]
    outcomes = tqdm(_run(waiting, output_dir, settings, jobs), total=len(waiting), desc="preparing subjects", unit="subject")
    failures = [_one_line(source, error) for source, error in outcomes if error is not None]
    if failures:
        raise PreparationError(f"{len(failures)} of {len(sources)} label maps were not prepared:\n" + "\n".join(sorted(failures)))
    return [output_dir / _subject_name(source) for source in sources]


def _run(
    sources: Sequence[Path], output_dir: Path, settings: dict[str, Any], jobs: int
) -> Iterator[tuple[Path, BaseException | None]]:
    """Prepare the sources, in this process or in several, and give each with its error as it gets done."""
    if jobs <= 1 or len(sources) <= 1:
        for source in sources:
            try:
                prepare_label_map(source, output_dir, **settings)
                yield source, None
            except Exception as error:
                yield source, error
        return
    # Threads of a library do not survive a fork, so the processes start afresh.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(jobs, len(sources)), context, initializer=torch.set_num_threads, initargs=(1,))
    try:
        running = {pool.submit(prepare_label_map, source, output_dir, **settings): source for source in sources}
        for done in as_completed(running):
            yield running[done], done.exception()
    finally:
        pool.shutdown(cancel_futures=True)


def _is_finished(folder: Path, wanted: dict[str, Any]) -> bool:
    """Whether a subject is there, out of the same label map and with the same settings."""
    try:
        found = json.loads((folder / SIDECAR).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    same = all(found.get(key) == value for key, value in wanted.items() if key != "versions")
    return same and all((folder / name).is_file() for name in FILES)


def _check_size(spatial_size: Sequence[int]) -> tuple[int, int, int]:
    size = tuple(int(n) for n in spatial_size)
    if len(size) != 3 or any(n < MNI_FACTOR or n % MNI_FACTOR for n in size):
        raise ValueError(f"prepare: 'spatial_size' must be three positive multiples of {MNI_FACTOR}, got {tuple(spatial_size)}")
    return size[0], size[1], size[2]


def _subject_name(source: Path) -> str:
    suffix = next((s for s in SUFFIXES if source.name.lower().endswith(s)), source.suffix)
    return source.name[: len(source.name) - len(suffix)] if suffix else source.name


def _find_sources(inputs: str | Path | Sequence[str | Path]) -> list[Path]:
    sources: list[Path] = []
    for item in [inputs] if isinstance(inputs, (str, Path)) else inputs:
        path = Path(item)
        if path.is_dir():
            found = sorted(f for f in path.iterdir() if f.name.lower().endswith(SUFFIXES) and not f.name.startswith("."))
        elif path.exists() or not glob.has_magic(str(item)):
            found = [path]
        else:
            found = sorted(Path(f) for f in glob.glob(str(item), recursive=True))  # noqa: PTH207 (Path.glob takes no absolute pattern)
        if not found:
            raise ValueError(f"{item}: label maps ({', '.join(SUFFIXES)}) are needed, found none")
        sources += found
    names = [_subject_name(s) for s in sources]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not sources:
        raise ValueError(f"{inputs}: label maps with different names are needed, found {f'twice: {twice}' if twice else 'none'}")
    return sources


def _one_line(source: Path, error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if str(source) in text else f"{source}: {text}"


@contextmanager
def _whole_folder(target: Path) -> Iterator[Path]:
    """A temporary sibling that takes the place of ``target`` once everything in it is written."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = target.parent / f".{target.name}.part"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
        if target.exists():
            shutil.rmtree(target)
        folder.rename(target)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _quantise(values: np.ndarray, dtype: type[np.integer], step: float, offset: float) -> np.ndarray:
    """Values as integers of a scale; what does not fit saturates."""
    limits = np.iinfo(dtype)
    return np.clip(np.rint((values - offset) / step), limits.min, limits.max).astype(dtype)


def _save(path: Path, whole: np.ndarray, affine: np.ndarray, step: float, offset: float) -> None:
    image = nib.Nifti1Image(whole, affine, dtype=whole.dtype)
    image.header.set_xyzt_units("mm")
    image.header.set_slope_inter(step, offset)
    nib.save(image, path)


def _describe(source: Path, *, generation_protocol: str, protocol: str, spatial_size: Sequence[int]) -> dict[str, Any]:
    packages = ("brainfm-monai", "numpy", "nibabel", "monai", "itk", "itk-elastix", "edt", "nilearn")
    return {
        "source": source.name,
        "sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
        "generation_protocol": Path(generation_protocol).name,
        "protocol": Path(protocol).name,
        "spatial_size": list(spatial_size),
        "spacing_mm": 1.0,
        "axes": "RAS",
        "distance": {"unit": "mm", "channels": ["lp", "lw", "rp", "rw"], "sign": "negative inside", "step": DISTANCE_STEP_MM},
        "mni": {"unit": "mm", "axes": "RAS", "spacing_mm": float(MNI_FACTOR), "template": TEMPLATE_NAME},
        "versions": {name: _version(name) for name in packages},
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except ModuleNotFoundError:
        return None
