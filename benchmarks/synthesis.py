"""How fast the generator is: median seconds per sample, by stage, and the memory it takes; the published generator beside it.

    python benchmarks/synthesis.py prepared/subject [--reference BrainFM] [--repeats 9]

SUBJECT is a folder of ``brainfm-monai prepare labels``. Real T1w, T2w, FLAIR and CT are painted from its labels, so that every
target exists. A figure is the median over the repeats; with a reference, calls of both alternate, so that both meet the same
machine, and the reference's reading of files does not count. ``load`` is what other processes took of the cores meanwhile:
repeat if it is not near 0.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as nnf
from torch import Tensor

from brainfm_monai.anatomy import Protocol
from brainfm_monai.synthesis import SynthesisRanges, Synthesizer, render, rendering
from brainfm_monai.synthesis.ranges import CONTRASTS, INTENSITY_TOP, read_contrasts
from brainfm_monai.tasks import TaskLayout

TASK_NAMES = ["segmentation", "T1w", "T2w", "FLAIR", "CT", "log_bias_field", "distance", "mni"]
SIZES, BATCHES = (128, 160), (1, 4)
# Functions of the rendering that are timed apart; what is left is "rest".
STAGES = {
    "make_coordinates": "deformation",
    "_read": "painting and sampling",
    "_read_mni": "MNI",
    "_look": "masks",
    "paint": "texture, mix-up, lesions",
    "acquire": "acquisition",
}


def load_subject(folder: Path) -> dict[str, Tensor]:
    """A prepared subject as a batch of one, with real images painted from its labels."""

    def read(key: str, dtype: type | None = None) -> np.ndarray:
        (file,) = folder.glob(f"{key}.nii*")  # the GPU kit's subjects are not compressed
        return np.asarray(nib.load(file).dataobj, dtype)  # type: ignore[attr-defined]

    volumes = {key: read(key) for key in ("generation_labels", "segmentation")}
    dense = {key: read(key, np.float32) for key in ("distance", "mni")}
    subject = {key: torch.from_numpy(np.ascontiguousarray(v))[None, None] for key, v in volumes.items()}
    # As a file holds them, with the channels of a voxel side by side: the layout that is sampled fastest.
    subject |= {key: torch.from_numpy(np.ascontiguousarray(v)).movedim(-1, 0)[None] for key, v in dense.items()}
    protocol = Protocol.load("synthseg_generation")
    means, _ = read_contrasts(CONTRASTS, protocol)
    for name, mean in zip(CONTRASTS, means, strict=True):
        image = mean[subject["generation_labels"].long()] / (1.0 if name == "CT" else INTENSITY_TOP)
        subject[name] = nnf.avg_pool3d(image, 3, stride=1, padding=1)
    return subject


def other_load() -> tuple[float, float]:
    """Seconds that all processes and that this one have had of the processors."""
    ticks = [int(v) for v in Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]]
    busy = sum(ticks) - ticks[3] - ticks[4]
    return busy / os.sysconf("SC_CLK_TCK"), time.process_time()


class Clock:
    """Wall-clock seconds by name, and what other processes took of the cores."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.seconds = device, defaultdict[str, list[float]](list)

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Time a block, with the device's work in it."""
        self._wait()
        busy, own = other_load()
        start = time.perf_counter()
        yield
        self._wait()
        wall = time.perf_counter() - start
        self.seconds[name].append(wall)
        now_busy, now_own = other_load()
        self.seconds[f"load {name}"].append(max(0.0, (now_busy - busy) - (now_own - own)) / wall)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def median(self, name: str) -> float:
        """Median of the seconds, NaN without any."""
        return statistics.median(self.seconds[name]) if self.seconds[name] else float("nan")


@contextmanager
def stages(clock: Clock) -> Iterator[None]:
    """Time the functions of the rendering apart."""
    kept: dict[str, Callable[..., Any]] = {name: getattr(rendering, name) for name in STAGES}

    def timed(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with clock.time(STAGES[name]):
                return kept[name](*args, **kwargs)

        return call

    for name in STAGES:
        setattr(rendering, name, timed(name))
    yield
    for name, function in kept.items():
        setattr(rendering, name, function)


def reset_peak() -> int:
    """Make the kernel forget the peak of this process; its present size in bytes."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return read_status("VmRSS")


def read_status(key: str) -> int:
    """Bytes that the kernel tells of this process."""
    line = next(v for v in Path("/proc/self/status").read_text(encoding="ascii").splitlines() if v.startswith(key))
    return int(line.split()[1]) * 1024


def measure(
    subject: dict[str, Tensor], size: int, batch: int, repeats: int, device: torch.device, reference: Any
) -> None:
    """Print the row of one size and batch, and its stages."""
    layout = TaskLayout(TASK_NAMES)
    synthesizer = Synthesizer(SynthesisRanges(), layout, (size, size, size))
    many = {key: value.expand(batch, *value.shape[1:]).to(device) for key, value in subject.items()}
    clock, before, peak = Clock(device), 0, 0
    for repeat in range(repeats + 1):
        seeds = range(batch * repeat, batch * (repeat + 1))
        if repeat == 1:
            clock.seconds.clear()  # the first call warms up
            before = reset_peak() if device.type == "cpu" else torch.cuda.memory_allocated()
        with clock.time("sample"):
            synthesizer(many, list(seeds))
        if reference is not None and batch == 1:
            with clock.time("reference"):
                reference()
            clock.seconds["reference"][-1] -= reference.read_seconds
    if reference is None:
        peak = (read_status("VmHWM") if device.type == "cpu" else torch.cuda.max_memory_allocated()) - before
    parts = Clock(device)
    with stages(parts), torch.no_grad():
        for repeat in range(repeats):
            with parts.time("draw"):
                params = synthesizer.draw(subject, [repeat])
            render({key: value.to(device) for key, value in subject.items()}, params.to(device), layout)
    by_stage = ", ".join(f"{name} {parts.median(name) * 1000:.0f}" for name in ("draw", *STAGES.values()))
    own = clock.median("sample") / batch
    row = [f"{size}^3", str(batch), f"{own:.3f}", f"{1 / own:.2f}", f"{clock.median('load sample'):.2f}"]
    row += [f"{peak / 2**30 / batch:.2f}" if peak else "-"]
    if reference is not None and batch == 1:
        ratio = statistics.median(
            r / s for r, s in zip(clock.seconds["reference"], clock.seconds["sample"], strict=True)
        )
        row += [f"{clock.median('reference'):.2f}", f"{clock.median('load reference'):.2f}", f"{ratio:.1f}"]
    sys.stdout.write("| " + " | ".join([*row, *["-"] * (9 - len(row))]) + " |\n")
    sys.stdout.write(f"    by stage, ms of a sample alone: {by_stage}\n")
    sys.stdout.flush()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("subject", type=Path, help="folder of a prepared subject")
    parser.add_argument("--reference", type=Path, help="checkout of the published code")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    arguments = parser.parse_args()
    subject = load_subject(arguments.subject)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    sys.stdout.write(f"{name}; {platform.processor() or platform.machine()}; torch {torch.__version__}; ")
    sys.stdout.write(
        f"python {platform.python_version()}; subject {tuple(subject['segmentation'].shape[2:])}, all targets\n\n"
    )
    sys.stdout.write(
        "| size | batch | s/sample | samples/s | load | peak GB/sample | reference s | its load | ratio |\n|"
        + "---|" * 9
        + "\n"
    )
    for size in arguments.sizes:
        reference = None
        if arguments.reference is not None:
            from reference_synthesis import make_reference_generator  # type: ignore[import-not-found]

            arrays = {key: value[0, 0].numpy() for key, value in subject.items() if value.shape[1] == 1}
            arrays["distance"] = subject["distance"][0].movedim(0, -1).numpy()
            fine = nnf.interpolate(subject["mni"], size=subject["segmentation"].shape[2:], mode="trilinear")
            arrays["mni"] = fine[0].movedim(0, -1).numpy()
            reference = make_reference_generator(arguments.reference, arrays, (size, size, size), seed=0)
        for batch in arguments.batches:
            measure(subject, size, batch, arguments.repeats, device, reference if batch == 1 else None)


if __name__ == "__main__":
    main()
