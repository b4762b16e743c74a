"""Commands that make training subjects, list and check them, fetch open data, and make scans to try things on."""

import logging
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import Any

logger = logging.getLogger(__name__)

Command = Callable[..., Any]


def _lazy(module: str, name: str, doc: str, *, is_shown: bool = False) -> property:
    """A command of a module of ``data``, imported when asked for; Fire prints what it returns if ``is_shown``."""

    def load(_: object) -> Command:
        function: Command = getattr(import_module(f"brainfm_monai.data.{module}"), name)

        @wraps(function)
        def command(*args: Any, **kwargs: Any) -> None:
            function(*args, **kwargs)

        return function if is_shown else command

    return property(load, doc=doc)


class Prepare:
    """Prepare subjects for training from label maps, from FreeSurfer's results, or from a BIDS folder."""

    labels = _lazy("prepare", "prepare_labels", "Out of label maps.")
    freesurfer = _lazy("freesurfer", "prepare_freesurfer", "Out of FreeSurfer's or FastSurfer's results.")
    bids = _lazy("bids", "prepare_bids", "Out of a BIDS folder.")


def check_data(source: str, jobs: int = 1, picture: str | None = None) -> None:
    """Look for the faults of a set of subjects; the exit status is 1 if there are any.

    Grids that differ within a subject, unknown ids, empty targets, intensities out of range, left and right exchanged,
    heads that lie on their side or are implausible, distances that disagree with labels, coordinates that fold, and
    several protocols.

    Args:
        source: datalist, folder of prepared subjects, or folder in BrainFM's own layout.
        jobs: subjects that are checked at once; each needs about 2 GB.
        picture: folder for one contact sheet per subject.
    """
    from brainfm_monai.data.check import check_set
    from brainfm_monai.data.datalist import count_subjects, format_counts

    findings, entries = check_set(str(source), jobs=jobs, picture_dir=picture)
    logger.info("%s", format_counts(count_subjects(entries)))
    if findings:
        lines = [f"{finding.subject}: {finding.rule}: {finding.found}" for finding in findings]
        raise SystemExit("\n".join([f"{len(findings)} faults in {len(entries)} subjects:", *lines]))


class Data:
    """Download open data, write the datalist of prepared subjects, and look for faults in subjects."""

    fetch = _lazy("fetch", "fetch_dataset", "Download an open data set.")
    list = _lazy("datalist", "write_datalist", "Write the datalist of folders of subjects.", is_shown=True)
    check = staticmethod(check_data)


def demo_scans(output: str) -> None:
    """Write the demo's scans: the MNI152 T1, and a clinical scan simulated from it.

    Args:
        output: folder for the scans.
    """
    from brainfm_monai.data.fetch import write_demo_scans

    write_demo_scans(str(output))
