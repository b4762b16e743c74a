"""The subjects of a BIDS folder: scans of several contrasts, with labels from derivatives or the bundle's model."""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from monai.bundle import run

from brainfm_monai.data.freesurfer import find_files
from brainfm_monai.data.subjects import CONTRASTS, Source
from brainfm_monai.io import bundle_arguments, find_contradiction, literal, refuse_if, scan_stem, write_table

logger = logging.getLogger(__name__)

CONTRAST_OF_SUFFIX = {**{contrast: contrast for contrast in CONTRASTS}, "ct": "CT"}
# Label maps with FreeSurfer ids in derivatives: fMRIPrep's two, and those of SynthSeg. A bare _dseg may hold any ids.
LABEL_PATTERNS = ("*_desc-aparcaseg_dseg.nii.gz", "*_desc-aseg_dseg.nii.gz", "*synthseg*.nii.gz", "*synthseg*.mgz")
LESION_PATTERNS = ("*_label-lesion_mask.nii.gz", "*_label-lesion_roi.nii.gz")
# entities that say what was made of a scan; all others say which scan it was made of
DERIVED = {"space", "desc", "label", "res", "den", "hemi", "seg", "atlas", "mod", "model", "part"}
# spaces of the scan that a file was made of
NATIVE_SPACES = {"", "orig", "native", "individual", "scanner", *CONTRAST_OF_SUFFIX}
UNUSED = "%s: not used: its entities, space and contrast are those of no scan in use of %s"


class BidsFile(NamedTuple):
    """A file of a BIDS folder."""

    path: Path
    entities: dict[str, str]  # of its name; that of the session may stand in the folder alone
    contrast: str  # of the scan that it is or was made of; empty where its name does not tell

    @property
    def scan(self) -> set[tuple[str, str]]:
        """The entities that tell which scan it is or was made of: ``{("sub", "01"), ("run", "02")}``."""
        return {(key, value) for key, value in self.entities.items() if key not in DERIVED}

    @property
    def is_scan(self) -> bool:
        """Whether a raw file is a scan of a known contrast: magnitudes, not phases."""
        is_image = self.path.name.endswith((".nii", ".nii.gz")) and self.entities.get("part", "mag") == "mag"
        return is_image and scan_stem(self.path).split("_")[-1] in CONTRAST_OF_SUFFIX

    def is_of(self, scan: "BidsFile", rivals: Sequence["BidsFile"]) -> bool:
        """Whether the file was made of a scan and lies in its space; ``rivals`` are all scans of the person."""
        meant = [f for f in rivals if f.contrast == scan.contrast and self.scan <= f.scan]
        return self.entities.get("space", "") in NATIVE_SPACES and (self.scan == scan.scan or meant == [scan])


def find_bids(root: Path) -> list[Source]:
    """The visits in a BIDS folder that have a scan of a known contrast; FileNotFoundError if there is none.

    Labels from derivatives, lesions and masks are those of the very scan, by the rules of ``docs/data.md``. Of several
    scans of one contrast, the first with labels is taken, or the first by name. Files of none of these are reported.
    """
    derivatives, sources = root / "derivatives", []
    derived: dict[str, list[BidsFile]] = {}
    for file in _parse_all(derivatives.rglob("sub-*_*"), derivatives):
        derived.setdefault(file.path.name.split("_")[0], []).append(file)
    for person in sorted(f for f in root.glob("sub-*") if f.is_dir()):
        raw = [f for places in ("*/*", "ses-*/*/*") for f in _parse_all(person.glob(places), root)]
        scans, files = [f for f in raw if f.is_scan], [*raw, *derived.get(person.name, [])]
        visits = sorted({f.entities.get("ses", "") for f in scans})
        for visit in visits:
            name = f"{person.name}_ses-{visit}" if visit else person.name
            of_visit = [f for f in files if f.entities.get("ses", visit) == visit]
            roles, lesion_of = _find_roles(derivatives, name, scans, of_visit)
            origin = "derivatives" if "labels" in roles else "model"
            facts = {"dataset": root.resolve().name, "person": person.name, "labels_from": origin, **lesion_of}
            sources.append(Source(name, roles, facts))
        for folder in derivatives.glob(f"*/{person.name}/mri") if len(visits) > 1 and visits[0] else ():
            logger.warning("%s: not used: it does not tell of which visit of %s it is", folder.parent, person.name)
    rule = f"{root}: a BIDS folder with sub-*/.../*_T1w, _T2w, _FLAIR or _CT scans is needed"
    refuse_if(not sources, rule, "none", FileNotFoundError)
    return sources


def _find_roles(
    derivatives: Path, name: str, rivals: Sequence[BidsFile], files: Sequence[BidsFile]
) -> tuple[dict[str, Path], dict[str, str]]:
    """Files of a visit by role, reference first, and what a lesion was drawn on; ``rivals`` are the person's scans."""
    scans = sorted((f for f in rivals if f in files), key=lambda f: CONTRASTS.index(f.contrast))
    labels, reference = _find_labels(derivatives, name, scans, rivals, files)
    chosen = {reference.contrast: reference} if reference else {}
    for scan in scans:
        chosen.setdefault(scan.contrast, scan)
    roles, lesions = {contrast: scan.path for contrast, scan in chosen.items()} | labels, []
    for f in files:
        of = [c for c, scan in chosen.items() if f.contrast in ("", c) and f.is_of(scan, rivals)]
        if f.path.match("*_defacemask.nii*") and f.contrast in of:
            roles[f"{f.contrast}_mask"] = f.path
        elif any(f.path.match(pattern) for pattern in LESION_PATTERNS):
            lesions += [f] if of else []
            if not of:
                logger.warning(UNUSED, f.path, name)
    for f in lesions[1:]:
        logger.warning("%s: not used: %s is", f.path, lesions[0].path.name)
    roles |= {"lesion": lesions[0].path} if lesions else {}
    return roles, {"lesion_of": lesions[0].contrast} if lesions and lesions[0].contrast else {}


def _find_labels(
    derivatives: Path, name: str, scans: Sequence[BidsFile], rivals: Sequence[BidsFile], files: Sequence[BidsFile]
) -> tuple[dict[str, Path], BidsFile | None]:
    """Files of a visit's labels by role, and the scan that they belong to: FreeSurfer's folder before a label map."""
    t1w = [f for f in scans if f.contrast == "T1w"]
    is_only_visit = len({f.entities.get("ses") for f in rivals}) == 1
    names = {name, name.split("_")[0]} if is_only_visit else {name}
    for folder in sorted(f for n in names for f in derivatives.glob(f"*/{n}/mri")):
        roles = find_files(folder.parent)
        if len(t1w) == 1:
            roles.pop("T1w", None)  # the raw scan, not FreeSurfer's copy of it
        if roles["labels"].is_file() and (t1w or "T1w" in roles):
            return roles, BidsFile(roles["T1w"], {}, "T1w") if "T1w" in roles else t1w[0]
    maps = [f for pattern in LABEL_PATTERNS for f in files if f.path.match(pattern)]
    contrasts = {f.contrast for f in scans}
    unnamed = "T1w" if t1w else contrasts.pop() if len(contrasts) == 1 else ""  # contrast of labels that name none
    for contrast in CONTRASTS:
        for label in (f for f in maps if (f.contrast or unnamed) == contrast):
            for scan in (f for f in scans if f.contrast == contrast and label.is_of(f, rivals)):
                return {"labels": label.path}, scan
    for label in maps:
        logger.warning(UNUSED, label.path, name)
    return {}, None


def _parse_all(paths: Iterable[Path], root: Path) -> list[BidsFile]:
    """The files below a folder, in order; one whose name contradicts its folders is reported and left out."""
    files = []
    for path in sorted(path for path in paths if path.is_file()):
        if problem := find_contradiction(path, root):
            logger.warning("%s: not used: %s", path, problem)
            continue
        stem = scan_stem(path).split("_")
        parts = [part.partition("-") for part in (path.parent.parent.name, *stem)]
        entities = {key: value for key, dash, value in parts if dash}
        words = [entities.get("space", ""), *(part for part in stem if "-" not in part), entities.get("mod", "")]
        contrasts = [CONTRAST_OF_SUFFIX[word] for word in words if word in CONTRAST_OF_SUFFIX]
        files.append(BidsFile(path, entities, contrasts[0] if contrasts else ""))
    return files


def predicted_file(folder: Path, name: str) -> Path:
    """Where the bundle's inference writes the FreeSurfer ids of a scan."""
    return folder / name / f"{name}_desc-freesurfer_dseg.nii.gz"


def predict_labels(sources: Sequence[Source], output_dir: Path, bundle: str | Path) -> None:
    """Add :func:`predicted_file` as labels; the bundle's inference makes what is missing and reports what it cannot."""
    rows = []
    for source in sources:
        scan, labels = source.place.resolve(), predicted_file(output_dir, source.name)
        source.files["labels"] = labels
        rows += [] if labels.is_file() else [(scan, source.name)]
    if not rows:
        return
    try:
        arguments = bundle_arguments(bundle, ["inference.json"])
    except FileNotFoundError as error:
        rule = f"inference.json: {len(rows)} subjects have no labels and need the bundle's model"
        raise FileNotFoundError(f"{rule}, found {error}") from error
    with TemporaryDirectory() as scratch:
        table = Path(scratch) / "scans.tsv"
        write_table(table, ("image", "name"), rows)
        places = {"input": literal(str(table)), "output_dir": literal(str(output_dir))}
        try:
            run(**arguments, **places, outputs="segmentation", grid="1mm")
        except SystemExit as end:  # some scans failed; they are reported as subjects without labels
            logger.error("%s", end)
