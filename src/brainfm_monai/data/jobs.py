"""Subjects made of their files: one, with volumes on one box; and many, in parallel, written whole, finished ones skipped."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import Distribution, version
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.affines import apply_affine

from brainfm_monai.anatomy import Protocol
from brainfm_monai.data import contrasts, labels
from brainfm_monai.data.check import check_subject
from brainfm_monai.data.datalist import PROTOCOLS, make_entry
from brainfm_monai.data.distances import compute_hemisphere_distances, compute_surface_distance, read_surface
from brainfm_monai.data.intensities import cluster_extracerebral, scale_intensities
from brainfm_monai.data.registration import TEMPLATE_NAME, compute_mni_coordinates
from brainfm_monai.data.subjects import (
    MNI_FACTOR,
    Volumes,
    hash_file,
    read_record,
    run_parallel,
    subject_file,
    write_record,
    write_subject,
)
from brainfm_monai.io import write_folder, write_text

logger = logging.getLogger(__name__)

REFUSED = ("left and right", "axes")  # rules of the check whose breach no training survives
FREE = ("versions", "person")  # facts of a record that do not decide whether the subject is made again
PACKAGES = "brainfm-monai numpy nibabel monai itk itk-elastix edt libigl nilearn scikit-learn".split()
SURFACES = ("lh.pial", "lh.white", "rh.pial", "rh.white")  # in the order of the distance's channels
# from the MNI305 space of talairach.xfm to MNI152; the matrix of FreeSurfer's documentation of coordinate systems
MNI305_TO_MNI152 = np.array([
    [0.9975, -0.0073, 0.0176, -0.0429], [0.0146, 1.0009, -0.0024, 1.5496], [-0.0130, -0.0093, 0.9971, 1.1840], [0, 0, 0, 1]
])  # fmt: skip


class PreparationError(ValueError):
    """Some subjects could not be prepared; the others were."""


@dataclass(frozen=True)
class Job:
    """One subject that is to be prepared."""

    name: str  # of the subject and of its folder
    kind: str  # which preparation it is
    files: Mapping[str, Path]  # what it is made of, by role; the first one names the subject in messages
    settings: Mapping[str, Any]  # what is asked for, as it is recorded; a subject that was made otherwise is made again
    options: Mapping[str, Any]  # see make_volumes; what does not belong into the record, as paths of tables

    @property
    def source(self) -> Path:
        """The file or folder that messages name."""
        return next(iter(self.files.values()))

    def describe(self) -> dict[str, Any]:
        """The record of the subject: names and hashes of its files without their folders, settings and units."""
        sources = {role: {"name": path.name, "sha256": hash_file(path)} for role, path in self.files.items()}
        return {
            **{"kind": self.kind, "sources": sources, **self.settings, "spacing_mm": 1.0, "axes": "RAS"},
            "distance": {"unit": "mm", "channels": ["lp", "lw", "rp", "rw"], "sign": "negative inside"},
            "mni": {"unit": "mm", "axes": "RAS", "spacing_mm": float(MNI_FACTOR)},
            "versions": {name: version(name) for name in PACKAGES if any(Distribution.discover(name=name))},
        }


def common_settings(dataset: str, protocol: str, size: Sequence[int] | str) -> dict[str, Any]:
    """The settings that every kind of preparation records.

    Raises:
        ValueError: if ``size``, which a text holds separated by commas, is not three positive multiples of 4.
    """
    box = [int(n) for n in (size.strip("()[] ").split(",") if isinstance(size, str) else size)]
    if len(box) != 3 or any(n < MNI_FACTOR or n % MNI_FACTOR for n in box):
        raise ValueError(f"prepare: 'size' must be three positive multiples of {MNI_FACTOR}, got {tuple(box)}")
    return {"dataset": dataset, "protocol": Path(protocol).name, "spatial_size": box, "template": TEMPLATE_NAME}


def make_subject(job: Job, output_dir: Path) -> list[str]:
    """Make the subject of a job, check it as ``data check`` does, and write its folder, whole or not at all.

    An older folder is replaced. The faults are returned, one line each, and the record of the subject names them.

    Raises:
        ValueError: if left and right are exchanged or the head lies on its side; or what :func:`make_volumes` raises.
    """
    volumes, facts = make_volumes(job.files, job.settings, job.options)
    with write_folder(output_dir / job.name) as folder:
        write_subject(folder, volumes, job.describe() | facts)
        entry = {**make_entry(folder), "subject": job.name, "simulated": []}  # what the package paints needs no check
        entry |= {key: job.options[key] for key in PROTOCOLS if key in job.options}
        findings = check_subject(entry)
        for finding in findings:
            if finding.rule in REFUSED:
                raise ValueError(f"{job.source}: {finding.rule}: {finding.found}")
        faults = [*facts.get("faults", ()), *(f"{finding.rule}: {finding.found}" for finding in findings)]
        if faults:
            write_record(folder, {**read_record(folder), "faults": faults})
    return faults


def run_jobs(
    jobs: Sequence[Job], output: str | Path, *, processes: int = 1, overwrite: bool = False, dry_run: bool = False
) -> list[Path]:
    """Prepare subjects with different names; finished ones are skipped, so that an interrupted run continues where it stopped.

    Args:
        jobs: the subjects.
        output: folder for the subjects' folders, which are returned in the order of the jobs.
        processes: how many are prepared at once.
        overwrite: prepare finished subjects again.
        dry_run: log what would be done, and do nothing.

    Raises:
        ValueError: if two jobs have one name.
        PreparationError: at the end, if some failed: one line for each.
    """
    output_dir, failures = Path(output), []
    twice = sorted(name for name, times in Counter(job.name for job in jobs).items() if times > 1)
    if twice:
        raise ValueError(f"{output_dir}: subjects with different names are needed, found twice: {twice}")
    waiting = [job for job in jobs if overwrite or not is_finished(job, output_dir)]
    folders = [output_dir / job.name for job in jobs]
    for job in jobs if dry_run else ():
        files = ", ".join(f"{role} {path}" for role, path in job.files.items())
        logger.info("%s %s from %s", "would prepare" if job in waiting else "is finished:", job.name, files)
    if dry_run:
        return folders
    for table in {Path(str(job.options.get(key, ""))) for job in waiting for key in PROTOCOLS}:
        if table.is_file():  # a protocol of the user's: who reads the subjects finds it beside them
            write_text(output_dir / table.name, table.read_text(encoding="utf-8"))
    for job, outcome in run_parallel(partial(make_subject, output_dir=output_dir), waiting, processes):
        if isinstance(outcome, BaseException):
            text = " ".join(str(outcome).split()) or type(outcome).__name__
            failures.append(text if str(job.source) in text else f"{job.source}: {text}")
            continue
        for fault in outcome:
            logger.warning("%s: %s", job.name, fault)
    if failures:
        lines = "\n".join(sorted(failures))
        raise PreparationError(f"{len(failures)} of {len(jobs)} subjects were not prepared:\n{lines}")
    return folders


def is_finished(job: Job, output_dir: Path) -> bool:
    """Whether a subject is there, out of the same files and with the same settings; its person is brought up to date."""
    folder = output_dir / job.name
    try:
        record, needed = read_record(folder), job.describe()
    except (OSError, ValueError):
        return False  # a source that cannot be read is reported when the subject is made
    same = all(record.get(key) == value for key, value in needed.items() if key not in FREE)
    finished = same and all(subject_file(folder, key).is_file() for key in record.get("keys", ["mni"]))
    if finished and "person" in needed and record.get("person") != needed["person"]:
        write_record(folder, {**record, "person": needed["person"]})
    return finished


def make_volumes(
    files: Mapping[str, Path], settings: Mapping[str, Any], options: Mapping[str, Any]
) -> tuple[Volumes, dict[str, Any]]:
    """The volumes of a subject: labels, distances, MNI coordinates, and every contrast on the box of the labels.

    The first contrast among the files is the reference, on which the labels lie; the others are registered to it rigidly and
    resampled once. A file of the role ``image`` is a reference whose contrast is recognised.

    Args:
        files: by role: ``labels``; a contrast, ``image``, ``<contrast>_mask``, ``lesion``; ``talairach`` and :data:`SURFACES`.
        settings: ``spatial_size`` of the box in voxels; ``contrast`` of an image, ``lesion_of``, ``simulated`` contrasts.
        options: ``protocol`` of the segmentation; ``ids``, see :func:`read_id_table`; ``generation_protocol`` for label maps
            alone: without it, the generation labels follow the scan and the surfaces, see :func:`make_generation_labels`.

    Returns:
        Values and affine by key, as :func:`write_subject` takes them, and facts for the record, with ``faults``.

    Raises:
        OSError: if the label map or a surface is missing.
        ValueError: if a file is not what its name says, an id is unknown, or labels, surfaces and scans do not fit.
    """
    files, source, protocol = dict(files), str(files["labels"]), Protocol.load(options["protocol"])
    painted = Protocol.load(options["generation_protocol"]) if "generation_protocol" in options else None
    table = labels.read_id_table(options["ids"], options["protocol"]) if options.get("ids") else None
    ids, affine = labels.load_label_map(files["labels"], table)
    ids = labels.fold_ids(ids)
    for known in (painted, protocol) if painted else ():
        known.encode(np.unique(ids), source)  # the whole map, not only what the box will keep of it
    ids, affine = labels.cut_to_brain(ids, affine, settings["spatial_size"], source)
    start = MNI305_TO_MNI152 @ read_talairach(files["talairach"]) if "talairach" in files else None
    has_surfaces = all(name in files for name in SURFACES)
    volume: Any = nib.load(files["labels"]) if has_surfaces else None
    surfaces = [read_surface(files[name], volume) for name in SURFACES] if has_surfaces else []
    parts = [compute_surface_distance(*surface, affine, ids.shape) for surface in surfaces]
    distance = np.stack(parts, axis=-1) if has_surfaces else compute_hemisphere_distances(ids)
    scans: dict[str, contrasts.BoxScan] = {}
    facts: dict[str, Any] = {}
    if painted:
        generation = painted.encode(ids)
        # contrasts are painted when a training reads the subject; an id that a table lacks is reported before the registration
        labels.read_means(generation, painted, settings.get("simulated", []), source)
    else:
        if "image" in files:
            image = files.pop("image")
            files = {settings["contrast"] or contrasts.recognise_contrast(image, ids, affine): image, **files}
        scans = contrasts.gather_scans(files, ids, affine)
        clusters = cluster_extracerebral(scans["T1w"].values, ids > 0) if "T1w" in scans else None
        generation, name = labels.make_generation_labels(ids, distance if has_surfaces else None, clusters)
        facts = {"generation_protocol": name, "distances_from": "surfaces" if has_surfaces else "labels"}
        facts |= {"simulated": labels.find_paintable(generation, name, scans)} if "contrast" in settings else {}
        centre_mm = apply_affine(affine, np.array(ids.shape) / 2)
        moved = {key: contrasts.measure_motion(scan.motion, centre_mm) for key, scan in list(scans.items())[1:]}
        facts |= {"reference": next(iter(scans), None), "registered": moved}
    volumes: Volumes = {
        "generation_labels": (generation, affine),
        "segmentation": (protocol.encode(ids, "segmentation"), affine),
        "distance": (distance, affine),
        "mni": compute_mni_coordinates(ids, affine, factor=MNI_FACTOR, initial=start),
    }
    for key, scan in scans.items():
        volumes[key] = (scan.values if key == "CT" else scale_intensities(scan.values), affine)
        removed = contrasts.find_removed(key, scan, files.get(f"{key}_mask"), ids, affine, volumes["mni"][0])
        volumes |= {f"{key}_defacing_mask": (removed.astype(np.uint8), affine)} if removed.any() else {}
    if "lesion" in files:
        lesion, fault = contrasts.carry_lesion(files, settings.get("lesion_of", ""), scans, affine)
        volumes |= {"lesion": (lesion, affine)} if lesion is not None else {}
        facts |= {"faults": [fault]} if fault else {}
    return volumes, facts


def read_talairach(path: Path) -> np.ndarray:
    """Read the affine of ``talairach.xfm``, from scanner RAS to MNI305 mm; ValueError if it holds no linear transform."""
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        numbers = text.split("Linear_Transform")[1].split("=")[1].split(";")[0].split()
        affine = np.vstack([np.array(numbers, dtype=float).reshape(3, 4), [0, 0, 0, 1]])
        np.linalg.inv(affine)
    except (IndexError, ValueError, np.linalg.LinAlgError):
        raise ValueError(f"{path}: an invertible 'Linear_Transform' of 3 x 4 numbers is needed, found none") from None
    return affine
