"""Subjects out of folders, many at once, or out of a corrected scan: made, checked, and written whole."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.metadata import Distribution, version
from pathlib import Path
from typing import Any

from brainfm_monai.data import subjects
from brainfm_monai.data.bids import find_bids, predict_labels
from brainfm_monai.data.check import check_subject
from brainfm_monai.data.datalist import make_entry
from brainfm_monai.data.freesurfer import find_freesurfer, make_volumes
from brainfm_monai.data.labels import find_label_maps
from brainfm_monai.data.registration import TEMPLATE_NAME
from brainfm_monai.data.subjects import CONTRASTS, MNI_FACTOR, SIZE, Source
from brainfm_monai.io import find_repeated, hash_file, refuse_if, scan_stem, write_text, write_whole

logger = logging.getLogger(__name__)

# how each kind of folder is searched, and the protocol of its segmentations
KINDS = {
    "labels": (find_label_maps, "synthseg_head"),
    "freesurfer": (find_freesurfer, "synthseg_brain"),
    "bids": (find_bids, "synthseg_brain"),
}
REFUSED = ("left and right", "axes")  # rules of the check whose breach no training survives
FREE = ("versions", "person")  # facts of a record that do not decide whether the subject is made again
PACKAGES = "brainfm-monai numpy nibabel monai itk itk-elastix edt libigl nilearn scikit-learn".split()


class PreparationError(ValueError):
    """Some subjects could not be prepared; the others were."""


def describe(source: Source) -> dict[str, Any]:
    """The record of a subject: names and hashes of its files without their folders, settings and units."""
    sources = {role: {"name": path.name, "sha256": hash_file(path)} for role, path in source.files.items()}
    return {
        **{"kind": source.facts["kind"], "sources": sources, **source.facts, "spacing_mm": 1.0, "axes": "RAS"},
        "distance": {"unit": "mm", "channels": ["lp", "lw", "rp", "rw"], "sign": "negative inside"},
        "mni": {"unit": "mm", "axes": "RAS", "spacing_mm": float(MNI_FACTOR)},
        "versions": {name: version(name) for name in PACKAGES if any(Distribution.discover(name=name))},
    }


def prepare_subjects(
    kind: str, input: str | Path | Sequence[str | Path], output: str | Path, *, jobs: int = 1, overwrite: bool = False,
    protocol: str = "", generation_protocol: str = "", ids: str | Path | None = None,
    contrasts: Sequence[str] | str = (), size: Sequence[int] | str = SIZE, dataset: str = "",
    bundle: str | Path = "bundle",
) -> list[Path]:  # fmt: skip
    """Prepare subjects for training from a folder, as in ``prepare bids STUDY SUBJECTS``; finished ones are skipped.

    Returns the folders of the subjects. ValueError or FileNotFoundError if there is no subject, two would have one
    name, or an argument is wrong; PreparationError at the end, with one line for each subject that failed.

    Args:
        kind: ``labels`` (maps with FreeSurfer or SynthSeg ids), ``freesurfer`` (its results, or FastSurfer's), or
            ``bids``: T1w, T2w, FLAIR and CT, registered rigidly to the one that has labels in ``derivatives``; a visit
            without labels is labelled by the bundle's model, as its record says.
        input: label map or folder of them, SUBJECTS_DIR or a folder in it, BIDS folder; or a list of these.
        output: folder for the prepared subjects, one folder each.
        jobs: subjects that are prepared at once; each needs about 4 GB.
        overwrite: prepare finished subjects again.
        protocol: label protocol of the segmentation, a name or a table file; without it, ``synthseg_head`` for label
            maps and ``synthseg_brain`` for the others.
        generation_protocol: label protocol of what the generator paints on label maps, a name or a table file; without
            it, ``synthseg_generation``.
        ids: table (columns id and freesurfer_id) for label maps with ids of their own.
        contrasts: images that a training paints on label maps, out of T1w, T2w, FLAIR and CT, separated by commas; a
            finished subject keeps its own where none are asked for.
        size: box around the brain, in voxels of 1 mm, multiples of 4.
        dataset: name of the set in lists and counts; the folder's name if not given.
        bundle: folder of the bundle, whose model labels what has no labels.
    """
    refuse_if(kind not in KINDS, f"prepare: one of {', '.join(KINDS)} is needed", f"'{kind}'")
    (find, usual), asked = KINDS[kind], subjects.split_names(contrasts)
    unknown = ", ".join(name for name in asked if name not in CONTRASTS)
    refuse_if(unknown, f"prepare: 'contrasts' must be out of {', '.join(CONTRASTS)}", unknown)
    rule = "prepare: label maps are needed for 'ids', 'contrasts' and 'generation_protocol'"
    refuse_if(kind != "labels" and (ids or asked or generation_protocol), rule, kind)
    protocols, own = {"protocol": protocol or usual}, {"dataset": dataset} if dataset else {}
    settings = make_settings(kind, protocols["protocol"], size)
    if kind == "labels":
        protocols |= {"generation_protocol": generation_protocol or "synthseg_generation"}
        settings |= {"generation_protocol": Path(protocols["generation_protocol"]).name}
        simulated = [name for name in CONTRASTS if name in asked]
        settings |= {"simulated": simulated} if simulated else {}  # a finished subject keeps its own
    inputs = [input] if isinstance(input, str | Path) else input
    sources = [source for item in inputs for source in find(Path(item))]
    unlabelled = [source for source in sources if "labels" not in source.files]
    predict_labels(unlabelled, Path(output) / ".predicted", bundle)
    for source in sources if ids else ():
        source.files["ids"] = Path(str(ids))
    sources = [s._replace(facts={**settings, **s.facts, **own}, protocols=protocols) for s in sources]
    return make_subjects(sources, Path(output), processes=jobs, overwrite=overwrite)


def make_settings(kind: str, protocol: str, size: Sequence[int] | str) -> dict[str, Any]:
    """What every preparation records; ValueError if ``size`` is not three positive multiples of 4."""
    box = [int(n) for n in (size.strip("()[] ").split(",") if isinstance(size, str) else size)]
    is_wrong = len(box) != 3 or any(n < MNI_FACTOR or n % MNI_FACTOR for n in box)
    refuse_if(is_wrong, f"prepare: 'size' must be three positive multiples of {MNI_FACTOR}", tuple(box))
    names = {"kind": kind, "dataset": kind, "protocol": Path(protocol).name}  # a folder gives a set its own name
    return {**names, "spatial_size": box, "template": TEMPLATE_NAME}


def prepare_label(
    image: str | Path, label: str | Path, output_dir: str | Path, *, ids: Mapping[int, int] | None = None,
    size: Sequence[int] | str = SIZE,
) -> dict[str, Any]:  # fmt: skip
    """Prepare the subject of a scan and its label map as an annotator corrects them; the same content is prepared once.

    The contrast of the scan is recognised, and the labels are also painted in the others. The label map may have a grid
    of its own, and ids of its own, whose FreeSurfer ids are given. Returns the item of a datalist, with whole paths. An
    error of one line if a file is missing, or the files are no scan and labels that lie on each other.
    """
    files, output_dir = {"labels": Path(label), "image": Path(image)}, Path(output_dir)
    settings = make_settings("annotated", "synthseg_head", size)
    settings |= {"ids": {str(key): value for key, value in (ids or {}).items()}}
    content = hashlib.sha256("".join([*map(hash_file, files.values()), repr(settings)]).encode()).hexdigest()
    name, protocols = f"{scan_stem(label)}_{content[:12]}", {"protocol": settings["protocol"]}
    source = Source(name, files, settings, protocols)
    if not is_finished(source, output_dir):
        make_subject(source, output_dir)
    return make_entry(output_dir / name)


def make_subjects(sources: Sequence[Source], output: Path, *, processes: int, overwrite: bool) -> list[Path]:
    """Prepare subjects, see :func:`prepare_subjects`; finished ones are skipped: an interrupted run continues."""
    twice, failures = find_repeated(source.name for source in sources), []
    refuse_if(twice, f"{output}: subjects with different names are needed", f"twice: {twice}")
    waiting = [source for source in sources if overwrite or not is_finished(source, output)]
    for table in {Path(name) for source in waiting for name in source.protocols.values()}:
        if table.is_file():  # a protocol of the user's: who reads the subjects finds it beside them
            write_text(output / table.name, table.read_text(encoding="utf-8"))
    for source, outcome in subjects.run_parallel(partial(make_subject, output_dir=output), waiting, processes):
        if isinstance(outcome, BaseException):
            text = " ".join(str(outcome).split()) or type(outcome).__name__
            failures.append(text if str(source.place) in text else f"{source.place}: {text}")
            continue
        for fault in outcome:
            logger.warning("%s: %s", source.name, fault)
    if failures:
        lines = [f"{len(failures)} of {len(sources)} subjects were not prepared:", *sorted(failures)]
        raise PreparationError("\n".join(lines))
    return [output / source.name for source in sources]


def make_subject(source: Source, output_dir: Path) -> list[str]:
    """Make a subject, check it as ``data check`` does, and write its folder, whole or not at all; an older one goes.

    The faults are returned, one line each, and recorded; one that no training survives is a ValueError.
    """
    volumes, facts = make_volumes(source)
    with write_whole(output_dir / source.name, folder=True) as folder:
        subjects.write_subject(folder, volumes, describe(source) | facts)
        findings = check_subject({**make_entry(folder), "subject": source.name, **source.protocols})
        for _, rule, found in findings:
            if rule in REFUSED:
                raise ValueError(f"{source.place}: {rule}: {found}")
        faults = [*facts.get("faults", ()), *(f"{rule}: {found}" for _, rule, found in findings)]
        if faults:
            subjects.write_record(folder, {**subjects.read_record(folder), "faults": faults})
    return faults


def is_finished(source: Source, output_dir: Path) -> bool:
    """Whether a subject is there, out of the same files with the same settings; its person is brought up to date."""
    folder = output_dir / source.name
    try:
        record, needed = subjects.read_record(folder), describe(source)
    except (OSError, ValueError):
        return False  # a source that cannot be read is reported when the subject is made
    same = all(record.get(key) == value for key, value in needed.items() if key not in FREE)
    finished = same and all(subjects.subject_file(folder, key).is_file() for key in record.get("keys", ["mni"]))
    if finished and "person" in needed and record.get("person") != needed["person"]:
        subjects.write_record(folder, {**record, "person": needed["person"]})
    return finished
