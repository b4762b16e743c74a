"""Prepared subjects out of label maps, of FreeSurfer's results, and of corrected scans: what a training needs, written once."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from brainfm_monai.data.datalist import LONGITUDINAL, make_entry
from brainfm_monai.data.jobs import SURFACES, Job, common_settings, is_finished, make_subject, run_jobs
from brainfm_monai.data.labels import choose_contrasts, read_id_table
from brainfm_monai.data.subjects import SIZE, hash_file
from brainfm_monai.io import SCAN_SUFFIXES, scan_stem

BRAIN_PROTOCOL = "synthseg_brain"
# best first: parcellated ones agree with the surfaces at the cortex; those of FastSurfer follow
SEGMENTATIONS = "aparc+aseg aparc.DKTatlas+aseg aparc.a2009s+aseg aparc.DKTatlas+aseg.mapped".split()
SEGMENTATIONS += "aparc.DKTatlas+aseg.deep.withCC aparc.DKTatlas+aseg.deep aseg aseg.presurf aseg.auto".split()
SCANS = ("orig.mgz", "nu.mgz", "T1.mgz", "norm.mgz")  # with the head where there is one


def prepare_labels(
    input: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    jobs: int = 1,
    overwrite: bool = False,
    protocol: str = "synthseg_head",
    generation_protocol: str = "synthseg_generation",
    ids: str | Path | None = None,
    size: Sequence[int] | str = SIZE,
    contrasts: Sequence[str] | str = (),
    dataset: str = "",
    dry_run: bool = False,
) -> list[Path]:
    """Prepare subjects for training from label maps; finished ones are skipped.

    A subject is labels, distances and MNI coordinates on a box of 1 mm voxels in RAS+ order around the brain. Its folder holds
    ``generation_labels.nii.gz``, ``segmentation.nii.gz``, ``distance.nii.gz`` (mm, negative inside; left pial, left white,
    right pial, right white), ``mni.nii.gz`` (mm, on a grid of 4 mm) and ``subject.json``.

    Args:
        input: folder of label maps (NIfTI or MGH) with FreeSurfer or SynthSeg ids, a file, a glob pattern, or a list of these.
        output: folder for the prepared subjects, one folder each, named after the file; these are returned in that order.
        jobs: subjects that are prepared at once; each needs about 3 GB.
        overwrite: prepare finished subjects again.
        protocol: label protocol of the segmentation: a name or a table file.
        generation_protocol: label protocol of what the generator paints: a name or a table file.
        ids: table (columns id, and freesurfer_id or name) for maps with ids of their own.
        size: box around the brain, in voxels of 1 mm, multiples of 4.
        contrasts: images that a training paints on the labels, out of T1w, T2w, FLAIR and CT, separated by commas; a finished
            subject keeps its own where none are asked for.
        dataset: name of the set in lists and counts; the folder's name if not given.
        dry_run: log what would be done, and do nothing.

    Raises:
        ValueError: if there is no label map, two would have one subject name, or there is no such contrast.
        PreparationError: at the end, if some label maps failed: one line for each.
    """
    simulated = choose_contrasts(contrasts)
    settings = common_settings(dataset, protocol, size) | {"generation_protocol": Path(generation_protocol).name}
    settings |= {"simulated": simulated} if simulated else {}  # a finished subject keeps its own
    options = {"ids": ids, "generation_protocol": generation_protocol, "protocol": protocol}
    work = []
    for source in _find_sources(input):
        files = {"labels": source} | ({"ids": Path(ids)} if ids else {})
        of_set = {"dataset": dataset or source.resolve().parent.name}
        work.append(Job(scan_stem(source), "labels", files, settings | of_set, options))
    return run_jobs(work, output, processes=jobs, overwrite=overwrite, dry_run=dry_run)


def _find_sources(inputs: str | Path | Sequence[str | Path]) -> list[Path]:
    sources: list[Path] = []
    for item in [inputs] if isinstance(inputs, (str, Path)) else inputs:
        files = [Path(item)]
        if files[0].is_dir():
            files = [f for f in files[0].iterdir() if f.name.lower().endswith(SCAN_SUFFIXES) and f.name[0] != "."]
        elif not files[0].exists() and glob.has_magic(str(item)):
            files = [Path(f) for f in glob.glob(str(item), recursive=True)]  # noqa: PTH207 (Path.glob takes no absolute pattern)
        if not files:
            raise ValueError(f"{item}: label maps ({', '.join(SCAN_SUFFIXES)}) are needed, found none")
        sources += sorted(files)
    return sources


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
        output: folder for the prepared subjects, one folder each, which are returned in alphabetical order.
        jobs: subjects that are prepared at once; each needs about 4 GB.
        overwrite: prepare finished subjects again.
        protocol: label protocol of the segmentation: a name or a table file.
        size: box around the brain, in voxels of 1 mm, multiples of 4.
        dataset: name of the set in lists and counts; the folder's name if not given (of SUBJECTS_DIR in the derivatives of a BIDS
            folder, that of the BIDS folder, so that its persons are the same).
        dry_run: log what would be done, and do nothing.

    Raises:
        FileNotFoundError: if there is no such folder, or no subject in it.
        PreparationError: at the end, if some subjects failed: one line for each.
    """
    root = Path(input)
    is_subject = (root / "mri").is_dir()
    folders = [root] if is_subject else sorted(f.parent for f in root.glob("[!.]*/mri") if f.is_dir())
    folders = [f for f in folders if not f.name.startswith("fsaverage")]  # templates, which FreeSurfer links here
    if not folders:
        needed = f"{root}: a folder with subjects of FreeSurfer (folders with mri/) is needed"
        raise FileNotFoundError(f"{needed}, found none")
    home = root.resolve().parent if is_subject else root.resolve()
    home = home.parent.parent if home.parent.name == "derivatives" else home
    settings, template_of = common_settings(dataset or home.name, protocol, size), _find_templates(folders)
    work = []
    for f in folders:
        person = {"person": template_of[f.name]} if f.name in template_of else {}
        work.append(Job(f.name, "freesurfer", find_files(f), settings | person, {"protocol": protocol}))
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
    scans = [f for name in SCANS if (f := folder / "mri" / name).is_file()]
    files |= {"T1w": scans[0]} if scans else {}
    surfaces = {name: folder / "surf" / name for name in SURFACES}
    files |= surfaces if all(f.is_file() for f in surfaces.values()) else {}
    talairach = folder / "mri" / "transforms" / "talairach.xfm"
    return files | ({"talairach": talairach} if talairach.is_file() else {})


def prepare_label(
    image: str | Path,
    label: str | Path,
    output_dir: str | Path,
    *,
    ids: str | Path | Mapping[int, int | str] | None = None,
    contrast: str = "",
    protocol: str = "synthseg_head",
    size: Sequence[int] | str = SIZE,
) -> dict[str, Any]:
    """Prepare the subject of a scan and its label map, as an annotator corrects them; the same content is prepared once.

    The scan is a real image of the subject beside the labels, which are also painted in simulated contrasts.

    Args:
        image: the scan.
        label: label map in the same space, in a grid of its own.
        output_dir: folder for the subject's folder, whose name holds a hash of both files and the settings.
        ids: FreeSurfer id, or name of a structure in a shipped protocol, of each id in the label map; or a table of these, see
            :func:`read_id_table`. Without it the label map holds FreeSurfer ids.
        contrast: T1w, T2w, FLAIR or CT; without it, the one in which the structures have the most similar order of brightness.
        protocol: protocol of the segmentation target.
        size: box around the brain, in voxels of 1 mm, multiples of 4.

    Returns:
        The item of a datalist, with whole paths.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if the files are not a scan and a label map of known ids that lie on each other.
    """
    files = {"labels": Path(label), "image": Path(image)}
    table = None if ids is None else read_id_table(ids, protocol)
    settings = common_settings("annotated", protocol, size)
    settings |= {"contrast": contrast, "ids": {str(key): value for key, value in (table or {}).items()}}
    content = hashlib.sha256("".join([*map(hash_file, files.values()), repr(settings)]).encode()).hexdigest()
    name = f"{scan_stem(label)}_{content[:12]}"
    job = Job(name, "annotated", files, settings, {"protocol": protocol, "ids": table})
    if not is_finished(job, Path(output_dir)):
        make_subject(job, Path(output_dir))
    return make_entry(Path(output_dir) / name)
