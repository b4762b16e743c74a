"""Prepared subjects out of a FreeSurfer or FastSurfer ``SUBJECTS_DIR``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.affines import apply_affine

from brainfm_monai.anatomy import Protocol
from brainfm_monai.data.contrasts import (
    carry_lesion,
    find_removed,
    gather_scans,
    measure_motion,
    recognise_contrast,
)
from brainfm_monai.data.distances import compute_hemisphere_distances
from brainfm_monai.data.generation import make_generation_labels
from brainfm_monai.data.intensities import cluster_extracerebral, scale_intensities
from brainfm_monai.data.jobs import Job, run_jobs
from brainfm_monai.data.labels import cut_to_brain, fold_ids, load_label_map
from brainfm_monai.data.persons import LONGITUDINAL
from brainfm_monai.data.registration import TEMPLATE_NAME, compute_mni_coordinates
from brainfm_monai.data.simulated import find_paintable
from brainfm_monai.data.subjects import MNI_FACTOR, SIZE, check_size
from brainfm_monai.data.surfaces import compute_surface_distance, read_surface

__all__ = ["BRAIN_PROTOCOL", "Anatomy", "find_files", "make_from_scans", "prepare_freesurfer", "read_talairach"]

Volumes = dict[str, tuple[np.ndarray, np.ndarray]]

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
    input: str | Path,
    output: str | Path,
    *,
    jobs: int = 1,
    overwrite: bool = False,
    protocol: str = BRAIN_PROTOCOL,
    size: Sequence[int] | str = SIZE,
    dataset: str = "",
    dry_run: bool = False,
) -> list[Path]:
    """Prepare subjects for training from FreeSurfer's or FastSurfer's results; finished ones are skipped.

    Args:
        input: SUBJECTS_DIR, or the folder of one subject.
        output: folder for the prepared subjects, one folder each.
        jobs: subjects that are prepared at once; each needs about 4 GB.
        overwrite: prepare finished subjects again.
        protocol: label protocol of the segmentation: a name or a table file.
        size: box around the brain, in voxels of 1 mm, multiples of 4.
        dataset: name of the set in lists and counts; the folder's name if not given (of SUBJECTS_DIR in the derivatives of a BIDS
            folder, that of the BIDS folder, so that its persons are the same).
        dry_run: log what would be done, and do nothing.

    Returns:
        The subjects' folders, in alphabetical order.

    Raises:
        FileNotFoundError: if there is no such folder, or no subject in it.
        PreparationError: at the end, if some subjects failed: one line for each.
    """
    root = Path(input)
    is_subject = (root / "mri").is_dir()
    folders = [root] if is_subject else sorted(f.parent for f in root.glob("[!.]*/mri") if f.is_dir())
    folders = [f for f in folders if not f.name.startswith("fsaverage")]  # templates, which FreeSurfer links here
    if not folders:
        raise FileNotFoundError(
            f"{root}: a folder with subjects of FreeSurfer (folders with mri/) is needed, found none"
        )
    home = root.resolve().parent if is_subject else root.resolve()
    settings: dict[str, Any] = {
        "dataset": dataset or (home.parent.parent if home.parent.name == "derivatives" else home).name,
        "protocol": Path(protocol).name,
        "spatial_size": list(check_size(size)),
        "template": TEMPLATE_NAME,
    }
    template_of = _find_templates(folders)
    work = []
    for f in folders:
        person = {"person": template_of[f.name]} if f.name in template_of else {}
        work.append(
            Job(f.name, "freesurfer", find_files(f), settings | person, make_from_scans, {"protocol": protocol})
        )
    return run_jobs(work, output, processes=jobs, overwrite=overwrite, dry_run=dry_run)


def _find_templates(folders: Sequence[Path]) -> dict[str, str]:
    """Template of the longitudinal stream by folder, for the templates themselves and all visits that were used for them."""
    template_of = {f.name: f.name.split(LONGITUDINAL)[1] for f in folders if LONGITUDINAL in f.name}
    template_of |= {visit.split(LONGITUDINAL)[0]: template for visit, template in template_of.items()}
    for folder in folders:
        visits = folder / "base-tps"  # FreeSurfer lists the visits of a template there
        if visits.is_file():
            names = visits.read_text(encoding="utf-8", errors="replace").split()
            template_of |= dict.fromkeys(names, folder.name)
    return template_of | {template: template for template in template_of.values()}


def find_files(folder: Path) -> dict[str, Path]:
    """The files of a subject that its preparation uses, by role; a missing segmentation is reported when it is read."""
    candidates = [folder / "mri" / f"{name}.mgz" for name in SEGMENTATIONS]
    files = {"labels": next((f for f in candidates if f.is_file()), candidates[0])}
    scan = next((f for name in SCANS if (f := folder / "mri" / name).is_file()), None)
    files |= {"T1w": scan} if scan else {}
    surfaces = {name: folder / "surf" / name for name in SURFACES}
    if all(f.is_file() for f in surfaces.values()):
        files |= surfaces
    return files | ({"talairach": folder / TALAIRACH} if (folder / TALAIRACH).is_file() else {})


def make_from_scans(job: Job) -> tuple[Volumes, dict[str, Any]]:
    """The volumes of a subject with scans: anatomy, and every contrast on its box.

    The first contrast among the files is the reference, on which the labels lie; the others are registered to it rigidly and
    resampled once. A file of the role ``image`` is a reference whose contrast is recognised.
    """
    files = dict(job.files)
    anatomy = read_anatomy(files, job.settings["spatial_size"], job.options.get("ids"))
    if "image" in files:
        contrast = job.settings["contrast"] or recognise_contrast(files["image"], anatomy.ids, anatomy.affine)
        files = {contrast: files.pop("image"), **files}
    scans = gather_scans(files, anatomy.ids, anatomy.affine)
    clusters = cluster_extracerebral(scans["T1w"].values, anatomy.ids > 0) if "T1w" in scans else None
    volumes, facts = describe_anatomy(anatomy, job.options["protocol"], clusters)
    mni_mm = volumes["mni"][0]
    for key, scan in scans.items():
        volumes[key] = (scan.values if key == "CT" else scale_intensities(scan.values), anatomy.affine)
        removed = find_removed(key, scan, files.get(f"{key}_mask"), anatomy.ids, anatomy.affine, mni_mm)
        if removed.any():
            volumes[f"{key}_defacing_mask"] = (removed.astype(np.uint8), anatomy.affine)
    if "lesion" in files:
        lesion, fault = carry_lesion(files, job.settings.get("lesion_of", ""), scans, anatomy.affine)
        volumes |= {"lesion": (lesion, anatomy.affine)} if lesion is not None else {}
        facts |= {"faults": [fault]} if fault else {}
    if "image" in job.files:
        facts["simulated"] = find_paintable(volumes["generation_labels"][0], facts["generation_protocol"], scans)
    centre_mm = apply_affine(anatomy.affine, np.array(anatomy.ids.shape) / 2)
    moved = {key: measure_motion(scan.motion, centre_mm) for key, scan in list(scans.items())[1:]}
    return volumes, facts | {"reference": next(iter(scans), None), "registered": moved}


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


def read_anatomy(
    files: Mapping[str, Path], spatial_size: Sequence[int], table: Mapping[int, int] | None = None
) -> Anatomy:
    """Read the labels of a subject, and its surfaces and Talairach transform where it has them, see :func:`find_files`.

    Args:
        files: by role.
        spatial_size: size of the box in voxels.
        table: FreeSurfer id of each id in the label map; without it, the map holds FreeSurfer ids.

    Raises:
        FileNotFoundError: if the segmentation is missing.
        ValueError: if a file is not what its name says, or the surfaces belong to another volume.
    """
    ids, affine = load_label_map(files["labels"], table)
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
    text = path.read_text(encoding="utf-8", errors="replace")
    try:
        numbers = text.split("Linear_Transform")[1].split("=")[1].split(";")[0].split()
        affine = np.vstack([np.array(numbers, dtype=float).reshape(3, 4), [0, 0, 0, 1]])
        np.linalg.inv(affine)
    except (IndexError, ValueError, np.linalg.LinAlgError):
        raise ValueError(f"{path}: an invertible 'Linear_Transform' of 3 x 4 numbers is needed, found none") from None
    return affine
