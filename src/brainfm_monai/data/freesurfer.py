"""Prepared subjects out of a FreeSurfer or FastSurfer ``SUBJECTS_DIR``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from brainfm_monai.anatomy import Protocol
from brainfm_monai.data.distances import compute_hemisphere_distances
from brainfm_monai.data.generation import make_generation_labels
from brainfm_monai.data.intensities import cluster_extracerebral, read_scan, resample_to_box, scale_intensities
from brainfm_monai.data.jobs import Job, run_jobs
from brainfm_monai.data.labels import fold_ids, load_label_map
from brainfm_monai.data.prepare import cut_to_brain
from brainfm_monai.data.registration import TEMPLATE_NAME, compute_mni_coordinates
from brainfm_monai.data.subjects import MNI_FACTOR, check_size, write_subject
from brainfm_monai.data.surfaces import compute_surface_distance, read_surface

__all__ = ["BRAIN_PROTOCOL", "Anatomy", "find_files", "prepare_freesurfer", "read_anatomy", "read_talairach"]

BRAIN_PROTOCOL = "synthseg_brain"
# best first: parcellated ones agree with the surfaces at the cortex; those of FastSurfer follow
SEGMENTATIONS: tuple[str, ...] = (
    "aparc+aseg",
    "aparc.DKTatlas+aseg",
    "aparc.a2009s+aseg",
    "aparc.DKTatlas+aseg.mapped",
)
SEGMENTATIONS += ("aparc.DKTatlas+aseg.deep.withCC", "aparc.DKTatlas+aseg.deep", "aseg", "aseg.presurf", "aseg.auto")
SCANS = ("orig.mgz", "nu.mgz", "T1.mgz", "norm.mgz")  # with the head where there is one
SURFACES = ("lh.pial", "lh.white", "rh.pial", "rh.white")  # in the order of the distance's channels
TALAIRACH = Path("mri") / "transforms" / "talairach.xfm"
# from the MNI305 space of talairach.xfm to MNI152; the matrix of FreeSurfer's documentation of coordinate systems
MNI305_TO_MNI152 = np.array(
    [
        [0.9975, -0.0073, 0.0176, -0.0429],
        [0.0146, 1.0009, -0.0024, 1.5496],
        [-0.0130, -0.0093, 0.9971, 1.1840],
        [0, 0, 0, 1],
    ]
)


@dataclass(frozen=True)
class Anatomy:
    """What a subject's folder says of the anatomy, on the box of the prepared subject.

    Attributes:
        ids: FreeSurfer ids with parcels folded, shape (H, W, D).
        affine: voxels of the box to scanner RAS mm.
        distance: signed distances in mm, shape (H, W, D, 4).
        from_surfaces: whether the distances are those to the subject's surfaces; else they come from the labels.
        to_mni: rough affine from scanner RAS to MNI152 mm, if the folder has one.
    """

    ids: np.ndarray
    affine: np.ndarray
    distance: np.ndarray
    from_surfaces: bool
    to_mni: np.ndarray | None


def prepare_freesurfer(
    subjects_dir: str | Path,
    output_dir: str | Path,
    *,
    protocol: str = BRAIN_PROTOCOL,
    spatial_size: Sequence[int] = (192, 224, 224),
    dataset: str = "",
    jobs: int = 1,
    overwrite: bool = False,
    dry_run: bool = False,
) -> list[Path]:
    """Prepare the subjects of a ``SUBJECTS_DIR``; finished ones are skipped.

    Args:
        subjects_dir: folder with one folder per subject, or the folder of one subject.
        output_dir: folder for the subjects' folders.
        protocol: protocol of the segmentation target: a name or a table file.
        spatial_size: size of the box in voxels of 1 mm, multiples of 4.
        dataset: name of the set in counts and lists; the folder's name where it is empty.
        jobs: number of processes; each needs about 4 GB.
        overwrite: prepare finished subjects again.
        dry_run: tell what would be done, and do nothing.

    Returns:
        The subjects' folders, in alphabetical order.

    Raises:
        FileNotFoundError: if there is no such folder, or no subject in it.
        PreparationError: at the end, if some subjects failed: one line for each.
    """
    root = Path(subjects_dir)
    folders = [root] if (root / "mri").is_dir() else sorted(f.parent for f in root.glob("[!.]*/mri") if f.is_dir())
    folders = [
        f for f in folders if not re.match(r"fsaverage", f.name)
    ]  # templates, which FreeSurfer links into the folder
    if not folders:
        raise FileNotFoundError(
            f"{root}: a folder with subjects of FreeSurfer (folders with mri/) is needed, found none"
        )
    settings: dict[str, Any] = {
        "dataset": dataset or (root.resolve().parent if folders == [root] else root.resolve()).name,
        "protocol": Path(protocol).name,
        "spatial_size": list(check_size(spatial_size)),
        "template": TEMPLATE_NAME,
    }
    options = {"protocol": protocol}
    work = [
        Job(f.name, "freesurfer", find_files(f), settings, make_from_freesurfer, options | {"folder": f})
        for f in folders
    ]
    return run_jobs(work, output_dir, processes=jobs, overwrite=overwrite, dry_run=dry_run)


def find_files(folder: Path) -> dict[str, Path]:
    """The files of a subject that its preparation uses, by role; a missing segmentation is told of when it is read."""
    candidates = [folder / "mri" / f"{name}.mgz" for name in SEGMENTATIONS]
    files = {"labels": next((f for f in candidates if f.is_file()), candidates[0])}
    scans = [folder / "mri" / name for name in SCANS]
    scan = next((f for f in scans if f.is_file()), None)
    files |= {"T1w": scan} if scan else {}
    surfaces = {name: folder / "surf" / name for name in SURFACES}
    if all(f.is_file() for f in surfaces.values()):
        files |= surfaces
    return files | ({"talairach": folder / TALAIRACH} if (folder / TALAIRACH).is_file() else {})


def make_from_freesurfer(job: Job, target: Path) -> None:
    """Write the subject of a FreeSurfer folder: labels, distances, coordinates and the T1w scan."""
    anatomy = read_anatomy(job.files, job.settings["spatial_size"])
    volumes: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    clusters = None
    if "T1w" in job.files:
        scan = resample_to_box(*read_scan(job.files["T1w"]), anatomy.affine, anatomy.ids.shape)
        volumes["T1w"] = (scale_intensities(scan), anatomy.affine)
        clusters = cluster_extracerebral(scan, anatomy.ids > 0)
    found, facts = describe_anatomy(anatomy, job.options["protocol"], clusters)
    write_subject(target, volumes | found, job.describe() | facts)


def describe_anatomy(
    anatomy: Anatomy, protocol: str, clusters: np.ndarray | None
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], dict[str, Any]]:
    """Generation labels, segmentation, distances and MNI coordinates of an anatomy, as :func:`write_subject` takes them.

    Args:
        anatomy: labels and distances on the box.
        protocol: protocol of the segmentation target.
        clusters: see :func:`make_generation_labels`.

    Returns:
        Values and affine by key, and what the record says of them.
    """
    surfaces = anatomy.distance if anatomy.from_surfaces else None
    labels, generation_protocol = make_generation_labels(anatomy.ids, surfaces, clusters)
    volumes = {
        "generation_labels": (labels, anatomy.affine),
        "segmentation": (Protocol.load(protocol).encode(anatomy.ids, "segmentation"), anatomy.affine),
        "distance": (anatomy.distance, anatomy.affine),
        "mni": compute_mni_coordinates(anatomy.ids, anatomy.affine, factor=MNI_FACTOR, initial=anatomy.to_mni),
    }
    from_what = "surfaces" if anatomy.from_surfaces else "labels"
    return volumes, {"generation_protocol": generation_protocol, "distances_from": from_what}


def read_anatomy(files: Mapping[str, Path], spatial_size: Sequence[int]) -> Anatomy:
    """Read the labels, surfaces and Talairach transform of a subject, see :func:`find_files`.

    Raises:
        FileNotFoundError: if the segmentation is missing.
        ValueError: if a file is not what its name says, or the surfaces belong to another volume.
    """
    ids, affine = load_label_map(files["labels"])
    box, box_affine = cut_to_brain(fold_ids(ids), affine, spatial_size, str(files["labels"]))
    has_surfaces = all(name in files for name in SURFACES)
    if has_surfaces:
        volume: Any = nib.load(files["labels"])
        surfaces = [read_surface(files[name], volume) for name in SURFACES]
        distance = np.stack([compute_surface_distance(*s, box_affine, box.shape) for s in surfaces], axis=-1)
    else:
        distance = compute_hemisphere_distances(box)
    to_mni = MNI305_TO_MNI152 @ read_talairach(files["talairach"]) if "talairach" in files else None
    return Anatomy(box, box_affine, distance, has_surfaces, to_mni)


def read_talairach(path: Path) -> np.ndarray:
    """Read the affine of ``talairach.xfm``, from scanner RAS to MNI305 mm.

    Raises:
        ValueError: if the file holds no linear transform of three rows.
    """
    found = re.search(r"Linear_Transform\s*=([^;]*);", path.read_text(encoding="utf-8", errors="replace"))
    try:
        rows = np.array([float(v) for v in found.group(1).split()]).reshape(3, 4) if found else None
    except ValueError:
        rows = None
    if rows is None or not np.isfinite(rows).all() or abs(np.linalg.det(rows[:, :3])) < 1e-3:
        raise ValueError(f"{path}: an invertible 'Linear_Transform' of 3 x 4 numbers is needed, found none")
    return np.vstack([rows, [0, 0, 0, 1]])
