"""Prepared subjects out of label maps, and of corrected scans: what a training needs of an anatomy, written once."""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from brainfm_monai.data.datalist import make_entry
from brainfm_monai.data.freesurfer import make_volumes
from brainfm_monai.data.jobs import Job, common_settings, is_finished, make_subject, run_jobs
from brainfm_monai.data.labels import read_id_table
from brainfm_monai.data.subjects import CONTRASTS, SIZE, split_names
from brainfm_monai.io import SCAN_SUFFIXES, hash_file, refuse_if, scan_stem


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
) -> list[Path]:
    """Prepare subjects for training from label maps; finished ones are skipped.

    A subject is labels, distances and MNI coordinates on a box of 1 mm voxels in RAS+ order around the brain.
    ValueError if there is no label map, two would have one subject name, or there is no such contrast; PreparationError
    at the end, with one line for each label map that failed.

    Args:
        input: folder of label maps (NIfTI or MGH) with FreeSurfer or SynthSeg ids, a file, or a list of both.
        output: folder for the prepared subjects, whose folders are named after the files, and returned in that order.
        jobs: subjects that are prepared at once; each needs about 3 GB.
        overwrite: prepare finished subjects again.
        protocol: label protocol of the segmentation: a name or a table file.
        generation_protocol: label protocol of what the generator paints: a name or a table file.
        ids: table (columns id, and freesurfer_id or name) for maps with ids of their own.
        size: box around the brain, in voxels of 1 mm, multiples of 4.
        contrasts: images that a training paints on the labels, out of T1w, T2w, FLAIR and CT, separated by commas; a
            finished subject keeps its own where none are asked for.
        dataset: name of the set in lists and counts; the folder's name if not given.
    """
    asked = split_names(contrasts)
    if unknown := [name for name in asked if name not in CONTRASTS]:
        raise ValueError(f"prepare: 'contrasts' must be out of {', '.join(CONTRASTS)}, got {', '.join(unknown)}")
    simulated = [name for name in CONTRASTS if name in asked]
    settings = common_settings(dataset, protocol, size) | {"generation_protocol": Path(generation_protocol).name}
    settings |= {"simulated": simulated} if simulated else {}  # a finished subject keeps its own
    options = {"ids": ids, "generation_protocol": generation_protocol, "protocol": protocol}
    work = []
    for source in _find_sources(input):
        files = {"labels": source} | ({"ids": Path(ids)} if ids else {})
        of_set = {"dataset": dataset or source.resolve().parent.name}
        work.append(Job(scan_stem(source), "labels", files, settings | of_set, options, make_volumes))
    return run_jobs(work, output, processes=jobs, overwrite=overwrite)


def _find_sources(inputs: str | Path | Sequence[str | Path]) -> list[Path]:
    sources: list[Path] = []
    for item in [inputs] if isinstance(inputs, (str, Path)) else inputs:
        files = [Path(item)]
        if files[0].is_dir():
            files = [f for f in files[0].iterdir() if f.name.lower().endswith(SCAN_SUFFIXES) and f.name[0] != "."]
        refuse_if(not files, f"{item}: label maps ({', '.join(SCAN_SUFFIXES)}) are needed", "none")
        sources += sorted(files)
    return sources


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
    """Prepare the subject of a scan and its label map as an annotator corrects them; the same content is prepared once.

    The labels are also painted in the other contrasts. Returns the item of a datalist, with whole paths.
    FileNotFoundError if a file is missing, ValueError if the files are no scan and labels that lie on each other.

    Args:
        image: the scan.
        label: label map in the same space, in a grid of its own.
        output_dir: folder for the subject's folder, whose name holds a hash of both files and the settings.
        ids: FreeSurfer id or name of each id in the label map, see :func:`read_id_table`; None: FreeSurfer ids.
        contrast: T1w, T2w, FLAIR or CT; without it, that with the most similar order of brightness.
        protocol: protocol of the segmentation target.
        size: box around the brain, in voxels of 1 mm, multiples of 4.
    """
    files = {"labels": Path(label), "image": Path(image)}
    table = None if ids is None else read_id_table(ids, protocol)
    settings = common_settings("annotated", protocol, size)
    settings |= {"contrast": contrast, "ids": {str(key): value for key, value in (table or {}).items()}}
    content = hashlib.sha256("".join([*map(hash_file, files.values()), repr(settings)]).encode()).hexdigest()
    name = f"{scan_stem(label)}_{content[:12]}"
    job = Job(name, "annotated", files, settings, {"protocol": protocol, "ids": table}, make_volumes)
    if not is_finished(job, Path(output_dir)):
        make_subject(job, Path(output_dir))
    return make_entry(Path(output_dir) / name)
