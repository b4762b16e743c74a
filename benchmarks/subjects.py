"""What a prepared subject costs: its size on disk, and the time to load it on one core.

    python benchmarks/subjects.py FOLDER [REPEATS]

FOLDER holds prepared subjects. Loading is `LoadSubjectd` of all its files: unpacked, channel first, in the
units of the training; the first reading of each subject, which warms the disk's cache, does not count.
"""

from __future__ import annotations

import platform
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

from brainfm_monai.data.datalist import find_subjects
from brainfm_monai.data.loading import LoadSubjectd
from brainfm_monai.data.subjects import STORAGE

LIMIT_MB, LIMIT_S = 25, 0.5


def main(folder: Path, repeats: int) -> None:
    """Print one row of a table for each subject, and the medians."""
    torch.set_num_threads(1)
    print(
        f"{platform.processor() or platform.machine()}, one thread, monai {version('monai')}, nibabel {version('nibabel')}"
    )
    print("| subject | volumes | MB on disk | CPU s to load | elapsed s |\n|---|---|---|---|---|")
    sizes, medians = [], []
    for entry in find_subjects(folder):
        keys = [key for key in STORAGE if key in entry]
        load = LoadSubjectd(keys)
        seconds, elapsed = [], []
        for _ in range(repeats + 1):
            started, start = time.perf_counter(), time.process_time()
            load(entry)
            seconds.append(time.process_time() - start)
            elapsed.append(time.perf_counter() - started)
        sizes.append(sum(Path(entry[key]).stat().st_size for key in keys) / 1e6)
        medians.append(statistics.median(seconds[1:]))
        print(
            f"| {entry['subject']} | {len(keys)} | {sizes[-1]:.1f} | {medians[-1]:.2f} | {statistics.median(elapsed[1:]):.2f} |"
        )
    print(
        f"largest {max(sizes):.1f} MB (at most {LIMIT_MB}), slowest to load {max(medians):.2f} CPU s (at most {LIMIT_S})"
    )


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) == 3 else 5)
