"""Many subjects: made in parallel, checked, written whole; finished ones are skipped, a bad one is reported at the end."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from brainfm_monai.data.check import Volumes, check_subject
from brainfm_monai.data.datalist import PROTOCOLS, make_entry
from brainfm_monai.data.subjects import (
    SIDECAR,
    describe_subject,
    read_record,
    run_parallel,
    subject_file,
    write_subject,
)
from brainfm_monai.io import write_folder, write_text

__all__ = ["Job", "PreparationError", "is_finished", "make_subject", "run_jobs"]

logger = logging.getLogger(__name__)

REFUSED = ("left and right", "axes")  # rules of the check whose breach no training survives
FREE = ("versions", "person")  # facts of a record that do not decide whether the subject is made again


class PreparationError(ValueError):
    """Some subjects could not be prepared; the others were."""


@dataclass(frozen=True)
class Job:
    """One subject that is to be prepared.

    Attributes:
        name: name of the subject and of its folder.
        kind: which preparation it is.
        files: what it is made of, by role; the first one names the subject in messages.
        settings: what is asked for, as it is recorded; a subject that was made otherwise is made again.
        make: returns the volumes of the subject, as :func:`write_subject` takes them, and facts for its record; ``faults`` among
            them are reported. A function of a module, so that other processes can import it.
        options: further arguments of ``make`` that do not belong into the record.
    """

    name: str
    kind: str
    files: Mapping[str, Path]
    settings: Mapping[str, Any]
    make: Callable[[Job], tuple[dict[str, tuple[np.ndarray, np.ndarray]], dict[str, Any]]]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def source(self) -> Path:
        """The file or folder that messages name."""
        return next(iter(self.files.values()))


def make_subject(job: Job, target: Path) -> list[str]:
    """Make the subject of a job, check it as ``data check`` does, and write its folder, whole or not at all.

    Args:
        job: the subject.
        target: its folder; an older one is replaced.

    Returns:
        The faults, one line each; the record of the subject names them, too.

    Raises:
        ValueError: if left and right are exchanged or the head lies on its side; or what the job raises.
    """
    volumes, facts = job.make(job)
    with write_folder(target) as folder:
        record = describe_subject(job.kind, job.files, job.settings) | facts
        write_subject(folder, volumes, record)
        entry = {**make_entry(folder), "subject": job.name, "simulated": []}  # what the package paints needs no check
        entry |= {key: job.options[key] for key in PROTOCOLS if key in job.options}
        findings = check_subject(Volumes(entry))
        refused = [finding for finding in findings if finding.rule in REFUSED]
        if refused:
            raise ValueError(f"{job.source}: {refused[0].rule}: {refused[0].found}")
        faults = [*facts.get("faults", ()), *(f"{finding.rule}: {finding.found}" for finding in findings)]
        if faults:
            write_record(folder, {**read_record(folder), "faults": faults})
    return faults


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Write the record of a subject."""
    write_text(folder / SIDECAR, json.dumps(record, indent=2) + "\n")


def run_jobs(
    jobs: Sequence[Job], output_dir: str | Path, *, processes: int = 1, overwrite: bool = False, dry_run: bool = False
) -> list[Path]:
    """Prepare subjects; finished ones are skipped, so that an interrupted run continues where it stopped.

    Args:
        jobs: the subjects, with different names.
        output_dir: folder for the subjects' folders.
        processes: how many are prepared at once.
        overwrite: prepare finished subjects again.
        dry_run: log what would be done, and do nothing.

    Returns:
        The subjects' folders, in the order of the jobs.

    Raises:
        ValueError: if two jobs have one name.
        PreparationError: at the end, if some failed: one line for each.
    """
    output_dir = Path(output_dir)
    names = [job.name for job in jobs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{output_dir}: subjects with different names are needed, found twice: {twice}")
    waiting = [job for job in jobs if overwrite or not is_finished(output_dir / job.name, job)]
    folders = [output_dir / name for name in names]
    if dry_run:
        for job in jobs:
            verb = "would prepare" if job in waiting else "is finished:"
            files = ", ".join(f"{role} {path}" for role, path in job.files.items())
            logger.info("%s %s from %s", verb, job.name, files)
        return folders
    for table in {Path(str(job.options.get(key, ""))) for job in waiting for key in PROTOCOLS}:
        if table.is_file():  # a protocol of the user's: who reads the subjects finds it beside them
            write_text(output_dir / table.name, table.read_text(encoding="utf-8"))
    failures = []
    for job, outcome in run_parallel(partial(_make_in, Path(output_dir)), waiting, processes):
        if isinstance(outcome, BaseException):
            text = " ".join(str(outcome).split()) or type(outcome).__name__
            failures.append(text if str(job.source) in text else f"{job.source}: {text}")
        else:
            for fault in outcome:
                logger.warning("%s: %s", job.name, fault)
    if failures:
        lines = "\n".join(sorted(failures))
        raise PreparationError(f"{len(failures)} of {len(jobs)} subjects were not prepared:\n{lines}")
    return folders


def _make_in(output_dir: Path, job: Job) -> list[str]:
    return make_subject(job, output_dir / job.name)


def is_finished(folder: Path, job: Job) -> bool:
    """Whether a subject is there, out of the same files and with the same settings; its person is brought up to date."""
    try:
        found, wanted = read_record(folder), describe_subject(job.kind, job.files, job.settings)
    except (OSError, ValueError):
        return False  # a source that cannot be read is reported when the subject is made
    same = all(found.get(key) == value for key, value in wanted.items() if key not in FREE)
    finished = same and all(subject_file(folder, key).is_file() for key in found.get("keys", ["mni"]))
    if finished and "person" in wanted and found.get("person") != wanted["person"]:
        write_record(folder, {**found, "person": wanted["person"]})
    return finished
