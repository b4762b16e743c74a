"""A prepared subject on disk: its files, their number formats, and the record of what the subject was made of."""

import json
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import nibabel as nib
import numpy as np
import torch
from tqdm import tqdm

from brainfm_monai.io import write_text

T = TypeVar("T")
R = TypeVar("R")
Image = tuple[np.ndarray, np.ndarray]  # values and their affine to RAS mm
Volumes = dict[str, Image]  # by key of STORAGE

SIDECAR = "subject.json"
CONTRASTS = ("T1w", "T2w", "FLAIR", "CT")
SIZE = (192, 224, 224)  # of the box around the brain in voxels of 1 mm
MNI_FACTOR = 4  # voxels of 1 mm per voxel of the coordinate grid, along each axis


class Source(NamedTuple):
    """One subject that is to be prepared."""

    name: str  # of the subject and of its folder
    files: dict[str, Path]  # by role, see make_volumes; the first one is the reference, and messages name it
    facts: dict[str, Any]  # what is recorded: kind, data set, settings; a subject that was made otherwise is made again
    protocols: Mapping[str, str] = {}  # names or table files by key of the record, which has no folders

    @property
    def place(self) -> Path:
        """The file or folder that messages name."""
        return next(iter(self.files.values()))


BYTE = (np.uint8, 1.0, 0.0)
# type, step and offset of the values in a file: value = step * stored + offset; what does not fit saturates
STORAGE: dict[str, tuple[type[np.integer], float, float]] = {
    **dict.fromkeys(("generation_labels", "segmentation"), BYTE),
    "distance": (np.uint8, 0.05, -6.4),  # mm, saturating at -6.4 and 6.35
    "mni": (np.int16, 0.01, 0.0),  # mm
    # 8 bits are what FreeSurfer's conformed scans keep, and a step of 1/255 is below the noise of a scan
    **dict.fromkeys(("T1w", "T2w", "FLAIR"), (np.uint8, 1 / 255, 0.0)),
    "CT": (np.int16, 1.0, 0.0),  # HU
    **dict.fromkeys((*(f"{contrast}_defacing_mask" for contrast in CONTRASTS), "lesion"), BYTE),
}


def run_parallel(work: Callable[[T], R], items: Sequence[T], processes: int) -> Iterator[tuple[T, R | BaseException]]:
    """Do work, a module's function, in processes, with a bar; yield each item, in order, with its result or error."""
    show = partial(tqdm, total=len(items), desc="subjects", unit="subject")
    if processes <= 1 or len(items) <= 1:
        for item in show(items):
            try:
                yield item, work(item)
            except Exception as error:
                yield item, error
        return
    # Threads of a library do not survive a fork, so the processes start afresh.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(processes, len(items)), context, initializer=torch.set_num_threads, initargs=(1,))
    try:
        for item, done in show([(item, pool.submit(work, item)) for item in items]):
            yield item, done.exception() or done.result()
    finally:
        pool.shutdown(cancel_futures=True)


def subject_file(folder: Path, key: str) -> Path:
    """Where a subject keeps one of its volumes."""
    return folder / f"{key}.nii.gz"


def write_subject(folder: Path, volumes: Volumes, record: Mapping[str, Any]) -> None:
    """Write volumes, (H, W, D) or (H, W, D, C), in the unit of their files, and the record of what they are made of."""
    folder.mkdir(parents=True, exist_ok=True)
    for key, (values, affine) in volumes.items():
        (dtype, step, offset), limits = STORAGE[key], np.iinfo(STORAGE[key][0])
        stored = np.clip(np.rint((values - offset) / step), limits.min, limits.max).astype(dtype)
        image = nib.Nifti1Image(stored, affine, dtype=dtype)
        image.header.set_xyzt_units("mm")
        image.header.set_slope_inter(step, offset)
        nib.save(image, subject_file(folder, key))
    write_record(folder, {**record, "keys": sorted(volumes)})


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write the record of a subject."""
    write_text(folder / SIDECAR, json.dumps(record, indent=2) + "\n")


def read_record(folder: Path) -> dict[str, Any]:
    """What a subject's ``subject.json`` says; ValueError if it is missing or is no JSON object."""
    path = folder / SIDECAR
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(record, dict):
            raise ValueError(f"a {type(record).__name__} and no JSON object")
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: the record of a prepared subject is needed, found {error}") from error
    return record


def split_names(names: Sequence[str | Path] | str) -> list[str]:
    """Names out of a list, or out of a text in which commas separate them."""
    parts = names.split(",") if isinstance(names, str) else names
    return [str(part).strip() for part in parts if str(part).strip()]
