"""Time of the whole command on one 1 mm scan: all outputs against ``segmentation,volumes``.

    python benchmarks/predict.py [ROUNDS [OPTIONS OF PREDICT]]

Both are run as whole commands, ``brainfm-monai predict SCAN OUT``, in turn, ROUNDS times (default 3), on the MNI152 T1 that nilearn
ships. The medians of the time on the wall and of the CPU are printed with their ratio, which should be at most 1.3. CPU seconds
beside the time on the wall tell whether the machine was otherwise busy. The third line is the start-up: ``brainfm-monai --help``.
What a processor with AVX2 alone needs, a newer one shows with the environment ``ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2
MKL_ENABLE_INSTRUCTIONS=AVX2`` and the options ``--precision float32``.
"""

from __future__ import annotations

import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from brainfm_monai.data.fetch import write_demo_scans

ROUNDS = 3
BUNDLE = Path(__file__).resolve().parents[1] / "bundle"
OUTPUTS = {"segmentation,volumes": ["--outputs", "segmentation,volumes"], "all outputs": []}


def time_command(arguments: list[str]) -> tuple[float, float]:
    """Seconds on the wall and of CPU of a whole command."""
    before, begun = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-m", "brainfm_monai", *arguments], check=True, capture_output=True)
    wall, after = time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(rounds: int = ROUNDS, *options: str) -> None:
    """Measure and print."""
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in [*OUTPUTS, "--help"]}
    with tempfile.TemporaryDirectory() as folder:
        scan = write_demo_scans(folder)[0]
        for number in range(rounds):
            for name, chosen in OUTPUTS.items():
                out = Path(folder) / f"{name.replace(' ', '_')}_{number}"
                command = ["predict", str(scan), str(out), "--bundle", str(BUNDLE), *chosen, *options]
                times[name].append(time_command(command))
            times["--help"].append(time_command(["--help"]))
    medians = {name: [median(values) for values in zip(*pairs, strict=True)] for name, pairs in times.items()}
    for name, (wall, cpu) in medians.items():
        print(f"{name:22s} {wall:7.1f} s  CPU {cpu:7.1f} s")
    (few, few_cpu), (every, every_cpu) = (medians[name] for name in OUTPUTS)
    print(f"{'ratio':22s} {every / few:7.2f}    CPU {every_cpu / few_cpu:7.2f}")


if __name__ == "__main__":
    main(int(next(iter(sys.argv[1:]), ROUNDS)), *sys.argv[2:])
