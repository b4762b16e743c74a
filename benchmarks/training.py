"""How much of a training step is spent outside the network: medians by stage, on the CPU or a GPU.

    python benchmarks/training.py [--size 160 160 160] [--features 64 128 256 512 1024 2048] [--batch 1] [--repeats 20]

A step takes a subject out of a cache, generates its scan and targets, and trains the network on them, as ``train.json`` does.
The subject is made of random blocks in a box of 192 x 224 x 224 voxels (``--source``). Stages are timed apart, by CUDA events on
a GPU, where the time that the device waits for the host counts to the stage in which it waits; the wall-clock time of a step
stands beside. ``load`` is what other processes took of the cores meanwhile: repeat if it is not near 0.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ignite
import monai
import torch
import torch.nn.functional as nnf
from monai.data import DataLoader
from torch import Tensor, nn

from brainfm_monai.anatomy import Protocol
from brainfm_monai.engines import (
    DrawnSubjects,
    DrawSampler,
    SynthesisPrepareBatch,
    make_ema_multi_avg_fn,
    prepare_for_training,
)
from brainfm_monai.inferers import AutocastInferer
from brainfm_monai.losses import MultiTaskLoss
from brainfm_monai.networks import MultiTaskNet, UNet
from brainfm_monai.synthesis import SynthesisRanges, Synthesizer
from brainfm_monai.tasks import TaskLayout

STAGES = ("loading", "generator", "forward", "loss", "backward", "optimizer")
NETWORK = ("forward", "backward")
BLOCK = 16  # voxels of one label of the made subject


def make_subject(size: tuple[int, int, int]) -> dict[str, Any]:
    """Blocks of all labels, distances to a plane, and coordinates, in the layout of a prepared subject."""
    protocol, generator = Protocol.load("synthseg_head"), torch.Generator().manual_seed(0)
    painted = Protocol.load("synthseg_generation")
    blocks = [-(-n // BLOCK) for n in size]
    labels = {}
    for key, count in {"segmentation": len(protocol), "generation_labels": len(painted)}.items():
        coarse = torch.randint(count, (1, 1, *blocks), generator=generator).float()
        labels[key] = nnf.interpolate(coarse, scale_factor=BLOCK)[0, :, : size[0], : size[1], : size[2]].to(torch.uint8)
    axes = torch.meshgrid(*(torch.arange(n) - n / 2 for n in size), indexing="ij")
    distance = torch.stack([axes[0], axes[0] + 2, -axes[0], 2 - axes[0]]).clamp(-6, 6)
    coarse_mni = nnf.interpolate(torch.stack(axes)[None], scale_factor=0.25, mode="trilinear")[0]
    return {"subject": "made", **labels, "distance": distance, "mni": coarse_mni}


def other_load() -> tuple[float, float]:
    """Seconds that all processes and that this one have had of the processors."""
    ticks = [int(v) for v in Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK"), time.process_time()


class Stages:
    """Milliseconds by stage, with CUDA events where there is a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.milliseconds = device, defaultdict[str, list[float]](list)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Time a block."""
        if self.device.type != "cuda":
            start = time.perf_counter()
            yield
            self.milliseconds[name].append((time.perf_counter() - start) * 1000)
            return
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        yield
        last.record()
        self._events.append((name, first, last))

    def finish(self) -> None:
        """Read the events of a step."""
        if self._events:
            torch.cuda.synchronize()
        for name, first, last in self._events:
            self.milliseconds[name].append(first.elapsed_time(last))
        self._events.clear()


def prepare(options: argparse.Namespace, device: torch.device) -> tuple[Any, ...]:
    """Objects of the step, as in ``train.json``."""
    layout = TaskLayout(["segmentation", "distance", "log_bias_field", "mni"])
    subject = make_subject(tuple(options.source))
    if options.cache_on_device:
        subject = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in subject.items()}
    loader = DataLoader(DrawnSubjects([subject] * 4), batch_sampler=DrawSampler(options.batch), num_workers=0)
    batches = SynthesisPrepareBatch(Synthesizer(SynthesisRanges(), layout, options.size))
    network = MultiTaskNet(UNet(features=options.features), layout)
    network = prepare_for_training(
        network, device, options.precision, options.activation_checkpointing, options.compile
    )
    return loader, batches, network, MultiTaskLoss(layout), AutocastInferer(options.precision)


def run(options: argparse.Namespace, device: torch.device) -> tuple[Stages, list[float]]:
    """Time the stages of some steps, and the steps themselves; the first two only warm up."""
    loader, batches, network, loss_function, inferer = prepare(options, device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=device.type == "cuda")
    average = torch.optim.swa_utils.AveragedModel(network, multi_avg_fn=make_ema_multi_avg_fn(0.999))
    stages, iterator = Stages(device), iter(loader)
    seconds: list[float] = []
    for number in range(options.repeats + 2):
        if number == 2:
            stages.finish()
            stages.milliseconds.clear()
            seconds.clear()
        start = time.perf_counter()
        with stages.time("loading"):
            batch = next(iterator)
        with stages.time("generator"):
            image, target = batches(batch, device, non_blocking=True)
        with stages.time("forward"):
            pred = inferer(image, network)
        with stages.time("loss"):
            loss = loss_function(pred, target)
        with stages.time("backward"):
            loss.backward()
        with stages.time("optimizer"):
            nn.utils.clip_grad_norm_(network.parameters(), 5.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            average.update_parameters(network)
        stages.finish()
        seconds.append(time.perf_counter() - start)
    return stages, seconds


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs=3, default=[160, 160, 160], help="voxels of a generated scan")
    parser.add_argument("--source", type=int, nargs=3, default=[192, 224, 224], help="voxels of the subject")
    parser.add_argument("--features", type=int, nargs="+", default=[64, 128, 256, 512, 1024, 2048])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument(
        "--precision", choices=["float32", "bfloat16", "float16"], help="default: what the device is fast in"
    )
    parser.add_argument("--activation_checkpointing", action="store_true")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--cache_on_device", action="store_true")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    versions = f"torch {torch.__version__}, monai {monai.__version__}, ignite {ignite.__version__}, python {platform.python_version()}"
    sys.stdout.write(f"{name}; {platform.processor() or platform.machine()}; {versions}\n")
    sys.stdout.write(
        f"size {options.size}, source {options.source}, features {options.features}, batch {options.batch}\n\n"
    )
    busy, own = other_load()
    start = time.perf_counter()
    stages, seconds = run(options, device)
    wall = time.perf_counter() - start
    now_busy, now_own = other_load()
    medians = {stage: statistics.median(stages.milliseconds[stage]) for stage in STAGES}
    total = sum(medians.values())
    sys.stdout.write("| stage | median ms | share |\n|---|---|---|\n")
    for stage, milliseconds in medians.items():
        sys.stdout.write(f"| {stage} | {milliseconds:.1f} | {milliseconds / total:.1%} |\n")
    outside = 1 - sum(medians[stage] for stage in NETWORK) / total
    sys.stdout.write(
        f"\noutside the network: {outside:.1%} of {total:.1f} ms; a whole step: {statistics.median(seconds) * 1000:.1f} ms\n"
    )
    if device.type == "cuda":
        sys.stdout.write(f"most memory of the GPU: {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB\n")
    sys.stdout.write(f"load: {max(0.0, (now_busy - busy) - (now_own - own)) / wall:.2f} cores\n")


if __name__ == "__main__":
    main()
