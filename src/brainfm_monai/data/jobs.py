"""Many subjects: prepared in parallel, finished ones skipped, a bad one reported at the end."""

from __future__ import annotations

import logging
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from brainfm_monai.data.subjects import describe_subject, read_record, subject_file

__all__ = ["Job", "PreparationError", "run_jobs"]

logger = logging.getLogger(__name__)


class PreparationError(RuntimeError):
    """Some subjects could not be prepared; the others were."""


@dataclass(frozen=True)
class Job:
    """One subject that is to be prepared.

    Attributes:
        name: name of the subject and of its folder.
        kind: which preparation it is.
        files: what it is made of, by role; the first one stands for the subject in messages.
        settings: what is asked for, as it is recorded; a subject that was made otherwise is made again.
        make: writes the subject into the folder that it is given; a function of a module, so that processes can be told of it.
        options: further arguments of ``make`` that do not belong into the record.
    """

    name: str
    kind: str
    files: Mapping[str, Path]
    settings: Mapping[str, Any]
    make: Callable[[Job, Path], None]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def source(self) -> Path:
        """The file or folder that messages name."""
        return next(iter(self.files.values()))

    def describe(self) -> dict[str, Any]:
        """What the record of the finished subject says."""
        return describe_subject(self.kind, self.files, self.settings)


def run_jobs(
    jobs: Sequence[Job], output_dir: str | Path, *, processes: int = 1, overwrite: bool = False, dry_run: bool = False
) -> list[Path]:
    """Prepare subjects; finished ones are skipped, so that an interrupted run goes on where it was.

    Args:
        jobs: the subjects, with different names.
        output_dir: folder for the subjects' folders.
        processes: how many are prepared at once.
        overwrite: prepare finished subjects again.
        dry_run: tell what would be done, and do nothing.

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
    waiting = [job for job in jobs if overwrite or not _is_finished(output_dir / job.name, job)]
    if dry_run:
        for job in jobs:
            verb = "would prepare" if job in waiting else "is finished:"
            logger.info(
                "%s %s from %s", verb, job.name, ", ".join(f"{role} {path}" for role, path in job.files.items())
            )
        return [output_dir / name for name in names]
    output_dir.mkdir(parents=True, exist_ok=True)
    bar = tqdm(_run(waiting, output_dir, processes), total=len(waiting), desc="preparing subjects", unit="subject")
    failures = [_one_line(job.source, error) for job, error in bar if error is not None]
    if failures:
        raise PreparationError(
            f"{len(failures)} of {len(jobs)} subjects were not prepared:\n" + "\n".join(sorted(failures))
        )
    return [output_dir / name for name in names]


def _run(jobs: Sequence[Job], output_dir: Path, processes: int) -> Iterator[tuple[Job, BaseException | None]]:
    """Do the jobs, in this process or in several, and give each with its error as it gets done."""
    if processes <= 1 or len(jobs) <= 1:
        for job in jobs:
            try:
                job.make(job, output_dir / job.name)
                yield job, None
            except Exception as error:
                yield job, error
        return
    # Threads of a library do not survive a fork, so the processes start afresh.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(processes, len(jobs)), context, initializer=torch.set_num_threads, initargs=(1,))
    try:
        running = {pool.submit(job.make, job, output_dir / job.name): job for job in jobs}
        for done in as_completed(running):
            yield running[done], done.exception()
    finally:
        pool.shutdown(cancel_futures=True)


def _is_finished(folder: Path, job: Job) -> bool:
    """Whether a subject is there, out of the same files and with the same settings."""
    try:
        found, wanted = read_record(folder), job.describe()
    except (OSError, ValueError):
        return False  # a source that cannot be read tells so when the subject is made
    same = all(found.get(key) == value for key, value in wanted.items() if key != "versions")
    return same and all(subject_file(folder, key).is_file() for key in found.get("keys", ["mni"]))


def _one_line(source: Path, error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if str(source) in text else f"{source}: {text}"
