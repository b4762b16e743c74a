"""Many subjects, made in parallel, checked, written whole: finished ones are skipped, bad ones reported at the end."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import Distribution, version
from pathlib import Path
from typing import Any

from brainfm_monai.data import subjects
from brainfm_monai.data.check import check_subject
from brainfm_monai.data.datalist import PROTOCOLS, make_entry
from brainfm_monai.data.registration import TEMPLATE_NAME
from brainfm_monai.io import find_repeated, hash_file, refuse_if, write_folder, write_text

logger = logging.getLogger(__name__)

REFUSED = ("left and right", "axes")  # rules of the check whose breach no training survives
FREE = ("versions", "person")  # facts of a record that do not decide whether the subject is made again
PACKAGES = "brainfm-monai numpy nibabel monai itk itk-elastix edt libigl nilearn scikit-learn".split()


class PreparationError(ValueError):
    """Some subjects could not be prepared; the others were."""


@dataclass(frozen=True)
class Job:
    """One subject that is to be prepared."""

    name: str  # of the subject and of its folder
    kind: str  # which preparation it is
    files: Mapping[str, Path]  # what it is made of, by role; the first one names the subject in messages
    settings: Mapping[str, Any]  # what is asked for, as it is recorded; a subject that was made otherwise is made again
    options: Mapping[str, Any]  # for ``make``: what does not belong into the record, as paths of tables
    make: Callable[..., tuple[subjects.Volumes, dict[str, Any]]]  # of files, settings, options; see make_volumes

    @property
    def source(self) -> Path:
        """The file or folder that messages name."""
        return next(iter(self.files.values()))

    def describe(self) -> dict[str, Any]:
        """The record of the subject: names and hashes of its files without their folders, settings and units."""
        sources = {role: {"name": path.name, "sha256": hash_file(path)} for role, path in self.files.items()}
        return {
            **{"kind": self.kind, "sources": sources, **self.settings, "spacing_mm": 1.0, "axes": "RAS"},
            "distance": {"unit": "mm", "channels": ["lp", "lw", "rp", "rw"], "sign": "negative inside"},
            "mni": {"unit": "mm", "axes": "RAS", "spacing_mm": float(subjects.MNI_FACTOR)},
            "versions": {name: version(name) for name in PACKAGES if any(Distribution.discover(name=name))},
        }


def common_settings(dataset: str, protocol: str, size: Sequence[int] | str) -> dict[str, Any]:
    """What every preparation records; ValueError if ``size`` is not three positive multiples of 4."""
    box = [int(n) for n in (size.strip("()[] ").split(",") if isinstance(size, str) else size)]
    is_wrong = len(box) != 3 or any(n < subjects.MNI_FACTOR or n % subjects.MNI_FACTOR for n in box)
    refuse_if(is_wrong, f"prepare: 'size' must be three positive multiples of {subjects.MNI_FACTOR}", tuple(box))
    return {"dataset": dataset, "protocol": Path(protocol).name, "spatial_size": box, "template": TEMPLATE_NAME}


def make_subject(job: Job, output_dir: Path) -> list[str]:
    """Make the subject of a job, check it as ``data check`` does, and write its folder, whole or not at all.

    An older folder is replaced. The faults are returned, one line each, and the record of the subject names them.
    ValueError if left and right are exchanged or the head lies on its side; or what the making of its volumes raises.
    """
    volumes, facts = job.make(job.files, job.settings, job.options)
    with write_folder(output_dir / job.name) as folder:
        subjects.write_subject(folder, volumes, job.describe() | facts)
        entry = {**make_entry(folder), "subject": job.name, "simulated": []}  # what the package paints needs no check
        entry |= {key: job.options[key] for key in PROTOCOLS if key in job.options}
        findings = check_subject(entry)
        for finding in findings:
            if finding.rule in REFUSED:
                raise ValueError(f"{job.source}: {finding.rule}: {finding.found}")
        faults = [*facts.get("faults", ()), *(f"{finding.rule}: {finding.found}" for finding in findings)]
        if faults:
            subjects.write_record(folder, {**subjects.read_record(folder), "faults": faults})
    return faults


def run_jobs(jobs: Sequence[Job], output: str | Path, *, processes: int = 1, overwrite: bool = False) -> list[Path]:
    """Prepare subjects with different names; finished ones are skipped, so that an interrupted run continues.

    Returns the folders in ``output`` in the order of the jobs. ValueError if two jobs have one name; PreparationError
    at the end, with one line for each that failed.
    """
    output_dir, failures = Path(output), []
    twice = find_repeated(job.name for job in jobs)
    refuse_if(twice, f"{output_dir}: subjects with different names are needed", f"twice: {twice}")
    waiting = [job for job in jobs if overwrite or not is_finished(job, output_dir)]
    for table in {Path(str(job.options.get(key, ""))) for job in waiting for key in PROTOCOLS}:
        if table.is_file():  # a protocol of the user's: who reads the subjects finds it beside them
            write_text(output_dir / table.name, table.read_text(encoding="utf-8"))
    for job, outcome in subjects.run_parallel(partial(make_subject, output_dir=output_dir), waiting, processes):
        if isinstance(outcome, BaseException):
            text = " ".join(str(outcome).split()) or type(outcome).__name__
            failures.append(text if str(job.source) in text else f"{job.source}: {text}")
            continue
        for fault in outcome:
            logger.warning("%s: %s", job.name, fault)
    if failures:
        lines = "\n".join(sorted(failures))
        raise PreparationError(f"{len(failures)} of {len(jobs)} subjects were not prepared:\n{lines}")
    return [output_dir / job.name for job in jobs]


def is_finished(job: Job, output_dir: Path) -> bool:
    """Whether a subject is there, out of the same files with the same settings; its person is brought up to date."""
    folder = output_dir / job.name
    try:
        record, needed = subjects.read_record(folder), job.describe()
    except (OSError, ValueError):
        return False  # a source that cannot be read is reported when the subject is made
    same = all(record.get(key) == value for key, value in needed.items() if key not in FREE)
    finished = same and all(subjects.subject_file(folder, key).is_file() for key in record.get("keys", ["mni"]))
    if finished and "person" in needed and record.get("person") != needed["person"]:
        subjects.write_record(folder, {**record, "person": needed["person"]})
    return finished
