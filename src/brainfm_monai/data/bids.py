"""Prepared subjects out of a BIDS folder: scans of several contrasts, with labels from derivatives or from the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from brainfm_monai.data.contrasts import align_scan, check_hounsfield, find_removed, measure_motion, scale_contrast
from brainfm_monai.data.distances import compute_hemisphere_distances
from brainfm_monai.data.freesurfer import BRAIN_PROTOCOL, Anatomy, describe_anatomy, find_files, read_anatomy
from brainfm_monai.data.intensities import AIR_HU, cluster_extracerebral, read_scan, resample_to_box
from brainfm_monai.data.jobs import Job, run_jobs
from brainfm_monai.data.labels import fold_ids, load_label_map
from brainfm_monai.data.prepare import cut_to_brain
from brainfm_monai.data.registration import TEMPLATE_NAME
from brainfm_monai.data.selftraining import predict_labels, predicted_file
from brainfm_monai.data.subjects import check_size, write_subject

__all__ = ["Session", "find_sessions", "prepare_bids"]

SUFFIXES: dict[str, tuple[str, ...]] = {"T1w": ("T1w",), "T2w": ("T2w",), "FLAIR": ("FLAIR",), "CT": ("CT", "ct")}
# Label maps with FreeSurfer ids in derivatives: fMRIPrep's two, and those of SynthSeg. A bare _dseg may hold any ids.
LABEL_PATTERNS = ("*_desc-aparcaseg_dseg.nii.gz", "*_desc-aseg_dseg.nii.gz", "*synthseg*.nii.gz", "*synthseg*.mgz")
LESION_PATTERNS = ("*_label-lesion_mask.nii.gz", "*_label-lesion_roi.nii.gz")
PREDICTIONS = ".predicted"


@dataclass(frozen=True)
class Session:
    """One visit of one person.

    Attributes:
        name: ``sub-01`` or ``sub-01_ses-1``.
        person: ``sub-01``.
        scans: file of each contrast; the first one is the reference.
        masks: defacing masks that the folder holds, by contrast.
        labels: files of the labels by role, see :func:`brainfm_monai.data.freesurfer.find_files`; empty where there are none.
        lesion: mask of lesions on the reference scan, if there is one.
    """

    name: str
    person: str
    scans: dict[str, Path]
    masks: dict[str, Path] = field(default_factory=dict)
    labels: dict[str, Path] = field(default_factory=dict)
    lesion: Path | None = None


def find_sessions(root: str | Path) -> list[Session]:
    """List the visits in a BIDS folder that have a scan of a known contrast, with the labels that derivatives have of them.

    Where a visit has several scans of one contrast, the first by name is taken.

    Raises:
        FileNotFoundError: if there is none.
    """
    root = Path(root)
    sessions = []
    for person in sorted(f for f in root.glob("sub-*") if f.is_dir()):
        for visit in sorted(f for f in person.glob("ses-*") if f.is_dir()) or [person]:
            name = person.name if visit == person else f"{person.name}_{visit.name}"
            scans = {key: _first(visit, [f"*_{s}.nii*" for s in suffixes]) for key, suffixes in SUFFIXES.items()}
            masks = {key: _first(visit, [f"*_mod-{key}*_defacemask.nii*"]) for key in SUFFIXES}
            found = {key: path for key, path in scans.items() if path}
            if found:
                labels = _find_labels(root / "derivatives", name)
                lesion = _first(visit, LESION_PATTERNS) or _derived(root / "derivatives", name, LESION_PATTERNS)
                sessions.append(
                    Session(name, person.name, found, {k: p for k, p in masks.items() if p}, labels, lesion)
                )
    if not sessions:
        raise FileNotFoundError(
            f"{root}: a BIDS folder with sub-*/.../*_T1w, _T2w, _FLAIR or _CT scans is needed, found none"
        )
    return sessions


def prepare_bids(
    root: str | Path,
    output_dir: str | Path,
    *,
    bundle: str | Path = "bundle",
    protocol: str = BRAIN_PROTOCOL,
    spatial_size: Sequence[int] = (192, 224, 224),
    dataset: str = "",
    jobs: int = 1,
    overwrite: bool = False,
    dry_run: bool = False,
) -> list[Path]:
    """Prepare the visits of a BIDS folder; finished ones are skipped.

    Labels come from ``derivatives`` (FreeSurfer, FastSurfer, fMRIPrep, SynthSeg); a visit without any is labelled by the
    bundle's model from its reference scan, and its record says ``"labels_from": "model"``. The first contrast of T1w, T2w,
    FLAIR and CT is the reference; the others are registered to it rigidly and resampled once.

    Args:
        root: BIDS folder.
        output_dir: folder for the subjects' folders.
        bundle: folder of the bundle, for visits without labels.
        protocol: protocol of the segmentation target: a name or a table file.
        spatial_size: size of the box in voxels of 1 mm, multiples of 4.
        dataset: name of the set in counts and lists; the folder's name where it is empty.
        jobs: number of processes; each needs about 4 GB.
        overwrite: prepare finished subjects again.
        dry_run: tell what would be done, and do nothing.

    Returns:
        The subjects' folders, in the order of their names.

    Raises:
        FileNotFoundError: if there is no scan, or labels are missing and there is no bundle.
        PreparationError: at the end, if some visits failed: one line for each.
    """
    size = list(check_size(spatial_size))
    sessions, predictions = find_sessions(root), Path(output_dir) / PREDICTIONS
    if not dry_run:
        predict_labels({s.name: next(iter(s.scans.values())) for s in sessions if not s.labels}, predictions, bundle)
    work = []
    for session in sessions:
        settings: dict[str, Any] = {
            "dataset": dataset or Path(root).resolve().name,
            "person": session.person,
            "labels_from": "derivatives" if session.labels else "model",
            "protocol": Path(protocol).name,
            "spatial_size": size,
            "template": TEMPLATE_NAME,
        }
        labels = session.labels or {"labels": predicted_file(predictions, session.name)}
        labels = {
            role: path for role, path in labels.items() if role != "T1w"
        }  # the raw scan, not FreeSurfer's copy of it
        masks = {f"{key}_mask": path for key, path in session.masks.items()}
        masks |= {"lesion": session.lesion} if session.lesion else {}
        work.append(
            Job(session.name, "bids", session.scans | labels | masks, settings, make_from_bids, {"protocol": protocol})
        )
    return run_jobs(work, output_dir, processes=jobs, overwrite=overwrite, dry_run=dry_run)


def make_from_bids(job: Job, target: Path) -> None:
    """Write the subject of one visit: anatomy, and every contrast on its box."""
    anatomy = _read_anatomy(job.files, job.settings["spatial_size"])
    contrasts = [key for key in SUFFIXES if key in job.files]
    scans, seen, motion = _gather_scans(job.files, contrasts, anatomy)
    clusters = cluster_extracerebral(scans["T1w"], anatomy.ids > 0) if "T1w" in scans else None
    volumes, facts = describe_anatomy(anatomy, job.options["protocol"], clusters)
    mni_mm = volumes["mni"][0]
    for key in contrasts:
        volumes[key] = (scale_contrast(key, scans[key]), anatomy.affine)
        if f"{key}_mask" in job.files:
            given = resample_to_box(
                *read_scan(job.files[f"{key}_mask"]), motion[key] @ anatomy.affine, anatomy.ids.shape
            )
            removed = ~seen[key] | (given > 0.5)
        else:
            scan = scans[key] - AIR_HU if key == "CT" else scans[key]
            removed = find_removed(scan, anatomy.affine, seen[key], anatomy.ids, mni_mm)
        if removed.any():
            volumes[f"{key}_defacing_mask"] = (removed.astype(np.uint8), anatomy.affine)
    if "lesion" in job.files:
        lesion = resample_to_box(*read_scan(job.files["lesion"]), anatomy.affine, anatomy.ids.shape)
        volumes["lesion"] = ((lesion > 0.5).astype(np.uint8), anatomy.affine)
    centre_mm = (anatomy.affine @ [*(np.array(anatomy.ids.shape) / 2), 1])[:3]
    moved = {key: measure_motion(matrix, centre_mm) for key, matrix in motion.items() if key != contrasts[0]}
    facts |= {"reference": contrasts[0], "registered": moved}
    write_subject(target, volumes, job.describe() | facts)


def _read_anatomy(files: Mapping[str, Path], spatial_size: Sequence[int]) -> Anatomy:
    """Anatomy out of FreeSurfer's files, or out of a label map alone."""
    if not files["labels"].is_file():
        raise FileNotFoundError(
            f"{files['labels']}: labels are needed, and the model made none of {next(iter(files.values()))}"
        )
    if files["labels"].parent.name == "mri":
        return read_anatomy(files, spatial_size)
    ids, affine = load_label_map(files["labels"])
    box, box_affine = cut_to_brain(fold_ids(ids), affine, spatial_size, str(files["labels"]))
    return Anatomy(box, box_affine, compute_hemisphere_distances(box), False, None)


def _gather_scans(
    files: Mapping[str, Path], contrasts: Sequence[str], anatomy: Anatomy
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Every contrast on the box, where its field of view reaches, and the rigid map from the reference to it."""
    scans: dict[str, np.ndarray] = {}
    seen: dict[str, np.ndarray] = {}
    motion: dict[str, np.ndarray] = {}
    for key in contrasts:
        values, affine = read_scan(files[key])
        if key == "CT":
            values = check_hounsfield(values, str(files[key]))
        matrix = (
            align_scan((scans[contrasts[0]], anatomy.affine), (values, affine), key == "CT") if scans else np.eye(4)
        )
        grid = (matrix @ anatomy.affine, anatomy.ids.shape)
        scans[key] = resample_to_box(values, affine, *grid, outside=AIR_HU if key == "CT" else 0.0)
        seen[key] = resample_to_box(np.ones_like(values), affine, *grid) > 0.5
        motion[key] = matrix
    return scans, seen, motion


def _first(folder: Path, patterns: Sequence[str]) -> Path | None:
    """First file by path under a folder's data type folders that fits a pattern."""
    found = sorted(
        f for pattern in patterns for f in folder.glob(f"*/{pattern}") if f.name.endswith((".nii", ".nii.gz"))
    )
    return found[0] if found else None


def _find_labels(derivatives: Path, name: str) -> dict[str, Path]:
    """Files of the labels of a visit: a FreeSurfer folder before a label map."""
    folders = sorted(f.parent for f in derivatives.glob(f"*/{name}/mri") if f.is_dir())
    for folder in folders:
        files = find_files(folder)
        if files["labels"].is_file():
            return files
    found = _derived(derivatives, name, LABEL_PATTERNS)
    return {"labels": found} if found else {}


def _derived(derivatives: Path, name: str, patterns: Sequence[str]) -> Path | None:
    """First file of a visit in derivatives, in the space of its own scan, that fits a pattern; earlier patterns go first."""
    files = sorted(f for f in derivatives.glob(f"**/{name}_*") if "_space-" not in f.name)
    return next((f for pattern in patterns for f in files if f.match(pattern)), None)
