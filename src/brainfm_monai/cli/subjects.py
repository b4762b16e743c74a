"""Commands that make training subjects, list and check them, fetch open data, and make scans to try things on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

__all__ = [
    "check_data",
    "demo_scans",
    "fetch_data",
    "list_subjects",
    "prepare_bids",
    "prepare_freesurfer",
    "prepare_labels",
]

logger = logging.getLogger(__name__)

SIZE = (192, 224, 224)


def demo_scans(output: str) -> None:
    """Write the demo's scans: the MNI152 T1, and a clinical scan simulated from it.

    Args:
        output: folder for the scans.
    """
    from brainfm_monai.data.demo import write_demo_scans

    write_demo_scans(str(output))


def prepare_labels(
    input: str,
    output: str,
    jobs: int = 1,
    overwrite: bool = False,
    protocol: str = "synthseg_head",
    generation_protocol: str = "synthseg_generation",
    ids: str | None = None,
    size: Sequence[int] = SIZE,
    contrasts: Sequence[str] | str = (),
    dataset: str = "",
    dry_run: bool = False,
) -> None:
    """Prepare subjects for training from label maps; finished ones are skipped.

    Args:
        input: folder of label maps with FreeSurfer or SynthSeg ids, or one of them.
        output: folder for the prepared subjects, one folder each.
        jobs: subjects that are prepared at once; each needs about 3 GB.
        overwrite: prepare finished subjects again.
        protocol: label protocol of the segmentation: a name or a table file.
        generation_protocol: label protocol of what the generator paints: a name or a table file.
        ids: table (columns id and freesurfer_id) for maps with ids of their own.
        size: box around the brain, in voxels of 1 mm.
        contrasts: images to paint on the labels, out of T1w, T2w, FLAIR and CT, separated by commas.
        dataset: name of the set in lists and counts; the folder's name if not given.
        dry_run: tell what would be done, and do nothing.
    """
    from brainfm_monai.data.prepare import prepare_label_maps

    labels = {"protocol": protocol, "generation_protocol": generation_protocol, "ids": ids}
    settings = {**labels, "spatial_size": size, "contrasts": contrasts, "dataset": dataset}
    _prepare(prepare_label_maps, input, output, **settings, jobs=jobs, overwrite=overwrite, dry_run=dry_run)


def prepare_freesurfer(
    input: str,
    output: str,
    jobs: int = 1,
    overwrite: bool = False,
    protocol: str = "synthseg_brain",
    size: Sequence[int] = SIZE,
    dataset: str = "",
    dry_run: bool = False,
) -> None:
    """Prepare subjects for training from FreeSurfer's or FastSurfer's results; finished ones are skipped.

    Args:
        input: SUBJECTS_DIR, or the folder of one subject.
        output: folder for the prepared subjects, one folder each.
        jobs: subjects that are prepared at once; each needs about 4 GB.
        overwrite: prepare finished subjects again.
        protocol: label protocol of the segmentation: a name or a table file.
        size: box around the brain, in voxels of 1 mm.
        dataset: name of the set in lists and counts; the folder's name if not given.
        dry_run: tell what would be done, and do nothing.
    """
    from brainfm_monai.data.freesurfer import prepare_freesurfer as prepare

    settings = {"protocol": protocol, "spatial_size": size, "dataset": dataset}
    _prepare(prepare, input, output, **settings, jobs=jobs, overwrite=overwrite, dry_run=dry_run)


def prepare_bids(
    input: str,
    output: str,
    jobs: int = 1,
    overwrite: bool = False,
    bundle: str = "bundle",
    protocol: str = "synthseg_brain",
    size: Sequence[int] = SIZE,
    dataset: str = "",
    dry_run: bool = False,
) -> None:
    """Prepare subjects for training from a BIDS folder of T1w, T2w, FLAIR and CT; finished ones are skipped.

    Labels come from its derivatives (FreeSurfer, FastSurfer, fMRIPrep, SynthSeg); scans without any are labelled by the
    bundle's model, which their records say.

    Args:
        input: BIDS folder.
        output: folder for the prepared subjects, one folder each.
        jobs: subjects that are prepared at once; each needs about 4 GB.
        overwrite: prepare finished subjects again.
        bundle: folder of the bundle, whose model labels what has no labels.
        protocol: label protocol of the segmentation: a name or a table file.
        size: box around the brain, in voxels of 1 mm.
        dataset: name of the set in lists and counts; the folder's name if not given.
        dry_run: tell what would be done, and do nothing.
    """
    from brainfm_monai.data.bids import prepare_bids as prepare

    settings = {"bundle": str(bundle), "protocol": protocol, "spatial_size": size, "dataset": dataset}
    _prepare(prepare, input, output, **settings, jobs=jobs, overwrite=overwrite, dry_run=dry_run)


def list_subjects(
    root: str,
    output: str = "datalist.json",
    validation: Sequence[str] | str = (),
    validation_fraction: float = 0.0,
    test: Sequence[str] | str = (),
    test_fraction: float = 0.0,
    seed: int = 0,
) -> str:
    """Write the datalist of folders of subjects, and count what they have.

    Args:
        root: folder of prepared subjects or in BrainFM's own layout; several are separated by commas.
        output: the list; a relative path is taken from the first folder.
        validation: names of subjects that are kept out of training, separated by commas.
        validation_fraction: share of the other persons that is drawn for validation.
        test: names of subjects that are kept for testing, separated by commas.
        test_fraction: share of the other persons that is drawn for testing.
        seed: seed of the draws.

    Returns:
        Path of the list.
    """
    from brainfm_monai.data.datalist import split_names, write_datalist

    roots = split_names(root)
    written = write_datalist(
        roots,
        str(output),
        validation=validation,
        validation_fraction=validation_fraction,
        test=test,
        test_fraction=test_fraction,
        seed=seed,
    )
    return str(written)


def check_data(source: str, jobs: int = 1, picture: str | None = None) -> None:
    """Look for the faults of a set of subjects; the exit status is 1 if there are any.

    Grids that differ within a subject, unknown ids, empty targets, intensities out of range, left and right exchanged,
    implausible heads, distances that disagree with labels, and coordinates that fold.

    Args:
        source: datalist, folder of prepared subjects, or folder in BrainFM's own layout.
        jobs: subjects that are checked at once.
        picture: folder for one contact sheet per subject.
    """
    from brainfm_monai.data.check import check_set
    from brainfm_monai.data.datalist import count_subjects, format_counts

    findings, entries = check_set(str(source), jobs=jobs, picture_dir=picture)
    logger.info("%s", format_counts(count_subjects(entries)))
    if findings:
        lines = [f"{finding.subject}: {finding.rule}: {finding.found}" for finding in findings]
        raise SystemExit("\n".join([f"{len(findings)} faults in {len(entries)} subjects:", *lines]))


def fetch_data(name: str, output: str, jobs: int = 4, table: str | None = None) -> None:
    """Download an open data set and check its hashes; what is there already is kept.

    ``synthseg``: 20 label maps of whole heads (Apache-2.0). ``open_ms``: T1w, T2w and FLAIR of people with multiple sclerosis,
    as a BIDS folder (CC-BY).

    Args:
        name: name of the set.
        output: folder for its files.
        jobs: downloads at once.
        table: another table of files than the package's (columns name, file, address, sha256, bytes, licence, content).
    """
    from brainfm_monai.data.fetch import DownloadError, fetch_dataset

    try:
        files = fetch_dataset(str(name), str(output), table=table, jobs=jobs)
    except DownloadError as error:
        raise SystemExit(str(error)) from error
    logger.info("%d files of %s in %s", len(files), name, output)


def _prepare(prepare: Callable[..., list[Path]], input: str, output: str, **settings: Any) -> None:
    """Run a preparation; subjects that failed are told at the end, and in the exit status."""
    from brainfm_monai.data.jobs import PreparationError

    try:
        prepare(str(input), str(output), **settings)
    except PreparationError as error:
        raise SystemExit(str(error)) from error
