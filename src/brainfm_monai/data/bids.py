"""Prepared subjects out of a BIDS folder: scans of several contrasts, with labels from derivatives or from the model."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from brainfm_monai.data.freesurfer import BRAIN_PROTOCOL, find_files, make_from_scans
from brainfm_monai.data.jobs import Job, run_jobs
from brainfm_monai.data.registration import TEMPLATE_NAME
from brainfm_monai.data.selftraining import predict_labels, predicted_file
from brainfm_monai.data.subjects import SIZE, check_size
from brainfm_monai.io import scan_stem

__all__ = ["Session", "find_sessions", "prepare_bids"]

logger = logging.getLogger(__name__)

CONTRAST_OF_SUFFIX = {"T1w": "T1w", "T2w": "T2w", "FLAIR": "FLAIR", "CT": "CT", "ct": "CT"}
# Label maps with FreeSurfer ids in derivatives: fMRIPrep's two, and those of SynthSeg. A bare _dseg may hold any ids.
LABEL_PATTERNS = ("*_desc-aparcaseg_dseg.nii.gz", "*_desc-aseg_dseg.nii.gz", "*synthseg*.nii.gz", "*synthseg*.mgz")
LESION_PATTERNS = ("*_label-lesion_mask.nii.gz", "*_label-lesion_roi.nii.gz")
# entities that say what was made of a scan; all others say which scan it was made of
DERIVED = {"space", "desc", "label", "res", "den", "hemi", "seg", "atlas", "mod", "model", "part"}
NATIVE_SPACES = {"orig", "native", "individual", "scanner"}  # of the scan that a file was made of
PREDICTIONS = ".predicted"


class BidsFile(NamedTuple):
    """A file of a BIDS folder.

    Attributes:
        path: the file.
        scan: the entities that tell which scan it is or was made of: ``{("sub", "01"), ("run", "02")}``.
        contrast: of the scan that it is or was made of; empty where its name does not tell.
        is_native: whether it lies in the space of that scan.
    """

    path: Path
    scan: frozenset[tuple[str, str]]
    contrast: str
    is_native: bool


@dataclass(frozen=True)
class Session:
    """One visit of one person.

    Attributes:
        name: ``sub-01`` or ``sub-01_ses-1``.
        person: ``sub-01``.
        scans: file of each contrast; the first one is the reference, on which the labels lie.
        masks: defacing masks that the folder holds, by contrast.
        labels: files of the labels by role, see :func:`brainfm_monai.data.freesurfer.find_files`; empty where there are none.
        lesion: mask of lesions on one of the scans, if there is one.
        lesion_of: contrast of that scan; empty where the name of the mask does not tell.
    """

    name: str
    person: str
    scans: dict[str, Path]
    masks: dict[str, Path] = field(default_factory=dict)
    labels: dict[str, Path] = field(default_factory=dict)
    lesion: Path | None = None
    lesion_of: str = ""


def find_sessions(root: str | Path) -> list[Session]:
    """List the visits in a BIDS folder that have a scan of a known contrast, with the labels that derivatives have of them.

    Labels, lesions and masks are those of the very scan: their entities (``ses``, ``acq``, ``run``, ...) and the contrast in
    their name are those of the scan, and a ``space`` is the scan's own. A name that leaves entities out belongs to the one scan
    that it can mean. Labels whose name tells no contrast are those of the T1w. Of several scans of one contrast, the first with
    labels is taken, or the first by name. A folder of FreeSurfer does not tell which of several T1w scans it was made of:
    FreeSurfer's own copy of the scan is taken then. Files that belong to none of the scans are reported.

    Raises:
        FileNotFoundError: if there is none.
    """
    root = Path(root)
    derived: dict[str, list[BidsFile]] = {}
    for path in sorted((root / "derivatives").rglob("sub-*_*")):
        derived.setdefault(path.name.split("_")[0], []).append(_parse(path))
    sessions = []
    for person in sorted(f for f in root.glob("sub-*") if f.is_dir()):
        raw = [_parse(f) for f in sorted(person.glob("*/*")) + sorted(person.glob("ses-*/*/*")) if f.is_file()]
        scans = [f for f in raw if _is_scan(f)]
        visits = sorted({_entities(f.path).get("ses", "") for f in scans})
        for visit in visits:
            name = f"{person.name}_ses-{visit}" if visit else person.name
            sessions.append(_make_session(root, name, visit, scans, [*raw, *derived.get(person.name, [])]))
        for folder in (root / "derivatives").glob(f"*/{person.name}/mri") if len(visits) > 1 and visits[0] else ():
            logger.warning("%s: not used: it does not tell of which visit of %s it is", folder.parent, person.name)
    if not sessions:
        raise FileNotFoundError(
            f"{root}: a BIDS folder with sub-*/.../*_T1w, _T2w, _FLAIR or _CT scans is needed, found none"
        )
    return sessions


def _make_session(
    root: Path, name: str, visit: str, scans_of_person: Sequence[BidsFile], files: Iterable[BidsFile]
) -> Session:
    """A visit: its scans, and what belongs to them among the files of the person."""
    candidates = [f for f in files if _entities(f.path).get("ses", visit) == visit]
    scans = [f for f in scans_of_person if f in candidates]
    labels, reference = _find_labels(root, name, scans, scans_of_person, candidates)
    chosen = {reference.contrast: reference} if reference else {}
    order = [contrast for contrast in dict.fromkeys(CONTRAST_OF_SUFFIX.values()) if contrast not in chosen]
    chosen |= {c: first for c in order if (first := next((f for f in scans if f.contrast == c), None))}
    paths = {contrast: scan.path for contrast, scan in chosen.items()}
    if reference and "T1w" in labels:
        paths["T1w"] = labels.pop("T1w")
    masks, lesions = {}, []
    for f in candidates:
        if f.path.match("*_defacemask.nii*") and f.contrast in chosen:
            if _belongs(f, chosen[f.contrast], scans_of_person):
                masks[f.contrast] = f.path
        elif any(f.path.match(pattern) for pattern in LESION_PATTERNS):
            of = [c for c, scan in chosen.items() if f.contrast in ("", c) and _belongs(f, scan, scans_of_person)]
            lesions += [f] if of else []
            if not of:
                logger.warning(
                    "%s: not used: its entities and contrast are those of no scan in use of %s", f.path, name
                )
    lesion = lesions[0] if lesions else None
    for f in lesions[1:]:
        logger.warning("%s: not used: %s is", f.path, lesions[0].path.name)
    contrast = lesion.contrast if lesion else ""
    return Session(name, name.split("_")[0], paths, masks, labels, lesion.path if lesion else None, contrast)


def _find_labels(
    root: Path, name: str, scans: Sequence[BidsFile], rivals: Sequence[BidsFile], files: Sequence[BidsFile]
) -> tuple[dict[str, Path], BidsFile | None]:
    """Files of the labels of a visit by role, and the scan that they belong to: FreeSurfer's folder before a label map."""
    first_t1w = next((f for f in scans if f.contrast == "T1w"), None)
    is_only_visit = all(_entities(f.path).get("ses") == _entities(scans[0].path).get("ses") for f in rivals)
    names = {name, name.split("_")[0]} if is_only_visit else {name}
    for folder in sorted(f for n in names for f in (root / "derivatives").glob(f"*/{n}/mri")):
        found = find_files(folder.parent)
        if found["labels"].is_file():
            is_only = sum(f.contrast == "T1w" for f in scans) == 1
            if is_only or "T1w" not in found:
                found.pop("T1w", None)  # the raw scan, not FreeSurfer's copy of it
            if first_t1w or "T1w" in found:
                own = BidsFile(found["T1w"], frozenset(), "T1w", True) if "T1w" in found else first_t1w
                return found, own
    maps = [f for pattern in LABEL_PATTERNS for f in files if f.path.match(pattern)]
    for contrast in dict.fromkeys(CONTRAST_OF_SUFFIX.values()):
        for label in maps:
            of_contrast = label.contrast or ("T1w" if first_t1w else contrast)
            for scan in scans:
                is_sure = label.contrast or first_t1w or len({f.contrast for f in scans}) == 1
                if scan.contrast == contrast == of_contrast and is_sure and _belongs(label, scan, rivals):
                    return {"labels": label.path}, scan
    for label in maps:
        logger.warning("%s: not used: its entities, space and contrast are those of no scan of %s", label.path, name)
    return {}, None


def _belongs(made: BidsFile, scan: BidsFile, rivals: Sequence[BidsFile]) -> bool:
    """Whether a file was made of a scan and lies in its space; ``rivals`` are all scans of the person."""
    if not made.is_native:
        return False
    meant = [f for f in rivals if f.contrast == scan.contrast and made.scan <= f.scan]
    return made.scan == scan.scan or meant == [scan]


def _parse(path: Path) -> BidsFile:
    entities = _entities(path)
    words = [part for part in scan_stem(path).split("_") if "-" not in part]
    space = entities.get("space", "")
    named = [space, *words, entities.get("mod", "")]
    contrast = next((CONTRAST_OF_SUFFIX[word] for word in named if word in CONTRAST_OF_SUFFIX), "")
    scan = frozenset((key, value) for key, value in entities.items() if key not in DERIVED)
    return BidsFile(path, scan, contrast, not space or space in NATIVE_SPACES or space in CONTRAST_OF_SUFFIX)


def _entities(path: Path) -> dict[str, str]:
    """Entities of a file's name; that of the session may stand in the folder alone."""
    parts = [part.partition("-") for part in (path.parent.parent.name, *scan_stem(path).split("_"))]
    return {key: value for key, dash, value in parts if dash}


def _is_scan(file: BidsFile) -> bool:
    """Whether a raw file is a scan of a known contrast: magnitudes, not phases."""
    suffix, part = scan_stem(file.path).split("_")[-1], _entities(file.path).get("part", "mag")
    return suffix in CONTRAST_OF_SUFFIX and part == "mag" and file.path.name.endswith((".nii", ".nii.gz"))


def prepare_bids(
    input: str | Path,
    output: str | Path,
    *,
    jobs: int = 1,
    overwrite: bool = False,
    bundle: str | Path = "bundle",
    protocol: str = BRAIN_PROTOCOL,
    size: Sequence[int] | str = SIZE,
    dataset: str = "",
    dry_run: bool = False,
) -> list[Path]:
    """Prepare subjects for training from a BIDS folder of T1w, T2w, FLAIR and CT; finished ones are skipped.

    Labels come from its derivatives (FreeSurfer, FastSurfer, fMRIPrep, SynthSeg); a visit without any is labelled by the
    bundle's model from its reference scan, and its record says ``"labels_from": "model"``. The scan with labels is the
    reference; the other contrasts are registered to it rigidly and resampled once.

    Args:
        input: BIDS folder.
        output: folder for the prepared subjects, one folder each.
        jobs: subjects that are prepared at once; each needs about 4 GB.
        overwrite: prepare finished subjects again.
        bundle: folder of the bundle, whose model labels what has no labels.
        protocol: label protocol of the segmentation: a name or a table file.
        size: box around the brain, in voxels of 1 mm, multiples of 4.
        dataset: name of the set in lists and counts; the folder's name if not given.
        dry_run: log what would be done, and do nothing.

    Returns:
        The subjects' folders, in the order of their names.

    Raises:
        FileNotFoundError: if there is no scan, or labels are missing and there is no bundle.
        PreparationError: at the end, if some visits failed: one line for each.
    """
    box = list(check_size(size))
    sessions, predictions = find_sessions(input), Path(output) / PREDICTIONS
    if not dry_run:
        predict_labels({s.name: next(iter(s.scans.values())) for s in sessions if not s.labels}, predictions, bundle)
    work = []
    for session in sessions:
        settings: dict[str, Any] = {
            "dataset": dataset or Path(input).resolve().name,
            "person": session.person,
            "labels_from": "derivatives" if session.labels else "model",
            "protocol": Path(protocol).name,
            "spatial_size": box,
            "template": TEMPLATE_NAME,
        }
        files = session.scans | (session.labels or {"labels": predicted_file(predictions, session.name)})
        files |= {f"{key}_mask": path for key, path in session.masks.items()}
        if session.lesion:
            files["lesion"] = session.lesion
            settings |= {"lesion_of": session.lesion_of} if session.lesion_of else {}
        work.append(Job(session.name, "bids", files, settings, make_from_scans, {"protocol": protocol}))
    return run_jobs(work, output, processes=jobs, overwrite=overwrite, dry_run=dry_run)
