"""Prepared subjects out of label maps: everything a training needs of an anatomy, written once to disk."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from brainfm_monai.anatomy import Protocol
from brainfm_monai.data.distances import PIAL_IDS, compute_hemisphere_distances
from brainfm_monai.data.jobs import Job, PreparationError, run_jobs
from brainfm_monai.data.labels import crop_to_box, find_brain_centre, fold_ids, load_label_map, read_id_table
from brainfm_monai.data.registration import TEMPLATE_NAME, compute_mni_coordinates
from brainfm_monai.data.simulated import choose_contrasts, read_means
from brainfm_monai.data.subjects import MNI_FACTOR, check_size, write_subject
from brainfm_monai.io import SCAN_SUFFIXES, scan_stem

__all__ = ["PreparationError", "cut_to_brain", "prepare_label_map", "prepare_label_maps"]

BOX_IDS = (*PIAL_IDS["left"], *PIAL_IDS["right"], 7, 8, 46, 47)


def prepare_label_map(
    source: str | Path,
    output_dir: str | Path,
    *,
    generation_protocol: str = "synthseg_generation",
    protocol: str = "synthseg_head",
    ids: str | Path | None = None,
    spatial_size: Sequence[int] = (192, 224, 224),
    contrasts: Sequence[str] | str = (),
) -> Path:
    """Prepare one subject: labels, distances and MNI coordinates on a fixed box of 1 mm voxels in RAS+ order.

    The folder appears whole or not at all; one that is there already is replaced.

    Args:
        source: label map (NIfTI or MGH) with FreeSurfer or SynthSeg ids, or with those of ``ids``.
        output_dir: folder in which the subject's folder is made; it is named after the file.
        generation_protocol: protocol of the labels that the generator paints: a name or a table file.
        protocol: protocol of the segmentation target: a name or a table file.
        ids: table file with the columns ``id`` and ``freesurfer_id``, for maps with ids of their own.
        spatial_size: size of the box in voxels, multiples of 4.
        contrasts: out of T1w, T2w, FLAIR and CT, to paint on the generation labels, see :func:`simulate_contrasts`.

    Returns:
        The subject's folder, with ``generation_labels.nii.gz``, ``segmentation.nii.gz``, ``distance.nii.gz`` (mm, negative
        inside; left pial, left white, right pial, right white), ``mni.nii.gz`` (mm, on a grid of 4 mm), one file for each
        contrast ([0, 1]; CT in HU) and ``subject.json``, which names the contrasts as ``simulated``.

    Raises:
        FileNotFoundError: if the label map, a protocol or the table is missing.
        ValueError: if the label map is not one volume of known ids, ``spatial_size`` does not fit, or a contrast or its table
            lacks what is asked of it.
    """
    job = _job(Path(source), "", generation_protocol, protocol, ids, spatial_size, contrasts)
    target = Path(output_dir) / job.name
    make_from_labels(job, target)
    return target


def prepare_label_maps(
    inputs: str | Path | Sequence[str | Path],
    output_dir: str | Path,
    *,
    generation_protocol: str = "synthseg_generation",
    protocol: str = "synthseg_head",
    ids: str | Path | None = None,
    spatial_size: Sequence[int] = (192, 224, 224),
    contrasts: Sequence[str] | str = (),
    dataset: str = "",
    jobs: int = 1,
    overwrite: bool = False,
    dry_run: bool = False,
) -> list[Path]:
    """Prepare many subjects in parallel; finished ones are skipped, so that an interrupted run goes on where it was.

    Args:
        inputs: folder of label maps, one file, a glob pattern, or a list of these.
        output_dir: folder for the subjects' folders.
        generation_protocol: see :func:`prepare_label_map`.
        protocol: see :func:`prepare_label_map`.
        ids: see :func:`prepare_label_map`.
        spatial_size: see :func:`prepare_label_map`.
        contrasts: see :func:`prepare_label_map`; a finished subject keeps its own where none are asked for.
        dataset: name of the set in counts and lists; the folder's name where it is empty.
        jobs: number of processes; each needs about 3 GB.
        overwrite: prepare finished subjects again.
        dry_run: tell what would be done, and do nothing.

    Returns:
        The subjects' folders, in the order of the inputs.

    Raises:
        ValueError: if there is no label map, two would have one subject name, or there is no such contrast.
        PreparationError: at the end, if some label maps failed: one line for each.
    """
    check_size(spatial_size)
    sources = _find_sources(inputs)
    work = [_job(s, dataset, generation_protocol, protocol, ids, spatial_size, contrasts) for s in sources]
    return run_jobs(work, output_dir, processes=jobs, overwrite=overwrite, dry_run=dry_run)


def make_from_labels(job: Job, target: Path) -> None:
    """Write the subject of a label map, see :func:`prepare_label_map`."""
    settings, options = job.settings, job.options
    table = read_id_table(options["ids"]) if options["ids"] else None
    ids, affine = load_label_map(job.source, table)
    ids = fold_ids(ids)
    protocols = [Protocol.load(options[name]) for name in ("generation_protocol", "protocol")]
    for known in protocols:
        known.encode(np.unique(ids), str(job.source))  # the whole map, not only what the box will keep of it
    box, box_affine = cut_to_brain(ids, affine, settings["spatial_size"], str(job.source))
    generation, segmentation = (known.encode(box) for known in protocols)
    # contrasts are painted when a training reads the subject; an id that a table lacks is reported here
    read_means(generation, protocols[0], settings.get("simulated", []), str(job.source))
    volumes = {
        "generation_labels": (generation, box_affine),
        "segmentation": (segmentation, box_affine),
        "distance": (compute_hemisphere_distances(box), box_affine),
        "mni": compute_mni_coordinates(box, box_affine, factor=MNI_FACTOR),
    }
    write_subject(target, volumes, job.describe())


def cut_to_brain(
    ids: np.ndarray, affine: np.ndarray, spatial_size: Sequence[int], source: str
) -> tuple[np.ndarray, np.ndarray]:
    """The box around cerebrum and cerebellum of a map of FreeSurfer ids, and its affine."""
    return crop_to_box(ids, affine, find_brain_centre(ids, BOX_IDS, source), spatial_size)


def _job(
    source: Path,
    dataset: str,
    generation_protocol: str,
    protocol: str,
    ids: str | Path | None,
    spatial_size: Sequence[int],
    contrasts: Sequence[str] | str,
) -> Job:
    settings: dict[str, Any] = {
        "dataset": dataset or source.resolve().parent.name,
        "generation_protocol": Path(generation_protocol).name,
        "protocol": Path(protocol).name,
        "spatial_size": list(check_size(spatial_size)),
        "template": TEMPLATE_NAME,
    }
    simulated = choose_contrasts(contrasts)
    settings |= {"simulated": simulated} if simulated else {}  # subjects from before there were any stay finished
    files: Mapping[str, Path] = {"labels": source} | ({"ids": Path(ids)} if ids else {})
    options = {"ids": ids, "generation_protocol": generation_protocol, "protocol": protocol}
    return Job(scan_stem(source), "labels", files, settings, make_from_labels, options)


def _find_sources(inputs: str | Path | Sequence[str | Path]) -> list[Path]:
    sources: list[Path] = []
    for item in [inputs] if isinstance(inputs, (str, Path)) else inputs:
        path = Path(item)
        if path.is_dir():
            found = sorted(
                f for f in path.iterdir() if f.name.lower().endswith(SCAN_SUFFIXES) and not f.name.startswith(".")
            )
        elif path.exists() or not glob.has_magic(str(item)):
            found = [path]
        else:
            found = sorted(Path(f) for f in glob.glob(str(item), recursive=True))  # noqa: PTH207 (Path.glob takes no absolute pattern)
        if not found:
            raise ValueError(f"{item}: label maps ({', '.join(SCAN_SUFFIXES)}) are needed, found none")
        sources += found
    if not sources:
        raise ValueError(f"{inputs}: label maps ({', '.join(SCAN_SUFFIXES)}) are needed, found none")
    return sources
