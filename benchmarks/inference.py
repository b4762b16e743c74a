"""Time and memory of inference on a CPU: a network of the published size, and the bundle's own on a whole head.

    python benchmarks/inference.py [bundle] [published] [agreement]

Each line is measured in a process of its own, so that its peak memory is its own; CPU seconds beside the time on the wall tell
whether the machine was otherwise busy. The network of the published size (264,063,138 parameters in its backbone, 160^3 voxels)
has random weights: time and memory do not depend on their values. The bundle's own network looks twice, as in inference.json, at
the MNI152 T1 that nilearn ships. The agreement of bfloat16 with float32 is measured with its weights on the same scan. What
needs bfloat16 is left out where the processor does not have it.
"""

from __future__ import annotations

import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import monai
import torch
from monai.bundle import ConfigParser
from monai.transforms import Compose

from brainfm_monai.data.fetch import write_demo_scans
from brainfm_monai.inferers import TwoStageInferer
from brainfm_monai.networks import MultiTaskNet, UNet, prepare_network
from brainfm_monai.networks.execution import fast_bfloat16
from brainfm_monai.tasks import TaskLayout
from brainfm_monai.weights import load_weights

BUNDLE = Path(__file__).resolve().parents[1] / "bundle"
THREADS = 2
CPU = torch.device("cpu")
CUBE = (160, 160, 160)  # voxels, of the published training
TASKS = ["segmentation", "T1w", "T2w", "FLAIR", "CT", "log_bias_field", "distance", "mni"]
# memory mode, mirror averaging, precision; the first line is the reference: the published way
PUBLISHED = [
    ("full", False, "float32"),
    ("low", False, "bfloat16"),
    ("full", False, "bfloat16"),
    ("low", False, "float32"),
]
OWN = [(m, mirror, p) for p in ("bfloat16", "float32") for m in ("low", "full") for mirror in (True, False)]


def bundle_parser() -> ConfigParser:
    """The inference configuration."""
    parser = ConfigParser()
    parser.read_config(str(BUNDLE / "configs/inference.json"))
    parser["bundle_root"] = str(BUNDLE)
    return parser


def read_template() -> torch.Tensor:
    """The demo's MNI152 T1 as the network meets it, (1, 1, H, W, D)."""
    preprocessing = bundle_parser().get_parsed_content("preprocessing")
    assert isinstance(preprocessing, Compose)
    with tempfile.TemporaryDirectory() as folder:
        scan = next(path for path in write_demo_scans(Path(folder)) if "mni152" in path.name)
        image: torch.Tensor = preprocessing({"image": str(scan)})["image"].as_tensor()[None]
    return image


def make(which: str) -> tuple[MultiTaskNet, torch.Tensor]:
    """A network and the image that it is measured on."""
    if which == "published":
        random = torch.rand(1, 1, *CUBE, generator=torch.Generator().manual_seed(0))
        return MultiTaskNet(UNet(unit_norm=True), TaskLayout(TASKS, "brainfm")), random
    network = bundle_parser().get_parsed_content("network_def")
    load_weights(network, BUNDLE / "models/model.pt")
    return network, read_template()


def measure(which: str, memory: str, mirror: bool, precision: str) -> dict[str, Any]:
    """Time and peak memory in this process: the median of three runs for the bundle's network, one for the large one."""
    torch.set_num_threads(THREADS)
    network, image = make(which)
    prepare_network(network, CPU)
    inferer = TwoStageInferer(network.layout, mirror, which == "bundle", memory, precision)
    seconds = []
    with torch.inference_mode():
        for _ in range(1 if which == "published" else 3):
            start, cpu_start = time.perf_counter(), time.process_time()
            inferer(image, network)
            seconds.append((time.perf_counter() - start, time.process_time() - cpu_start))
    wall, cpu = sorted(seconds)[len(seconds) // 2]
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return {"wall": wall, "cpu": cpu, "peak": peak_gb, "size": "x".join(map(str, image.shape[2:]))}


def agreement() -> dict[str, float]:
    """Share of voxels of the head with the same label in bfloat16 and float32, and the largest shift of MNI coordinates."""
    torch.set_num_threads(THREADS)
    network, image = make("bundle")
    prepare_network(network, CPU)
    layout = network.layout
    with torch.inference_mode():
        exact, rounded = (
            layout.split(TwoStageInferer(layout, memory="low", precision=name)(image, network))
            for name in ("float32", "bfloat16")
        )
    inside = image > 0.05  # the inferer's threshold of the head
    same = (exact["segmentation"] == rounded["segmentation"])[inside].float().mean()
    shift_mm = 100 * (exact["mni"] - rounded["mni"]).abs().amax(1, keepdim=True)[inside]
    return {
        "same label": float(same),
        "mean shift mm": float(shift_mm.mean()),
        "largest shift mm": float(shift_mm.max()),
    }


def processor() -> str:
    """Name of the processor and what it has for bfloat16."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    name = next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.processor())
    flags = next((line for line in lines if line.startswith("flags")), "")
    found = [flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if flag in flags.split()]
    return f"{name} ({', '.join(found)})"


def main(parts: list[str]) -> None:
    """Print a table."""
    print(
        f"{processor()}, {THREADS} threads; "
        f"Python {platform.python_version()}, torch {torch.__version__}, monai {monai.__version__}"
    )
    print(f"bfloat16 in hardware: {fast_bfloat16(CPU)}\n")
    if set(parts) & {"bundle", "published"}:
        print("| network | size | memory mode | mirror | precision | seconds | CPU seconds | peak GB |")
        print("|---|---|---|---|---|---|---|---|", flush=True)
    for which, lines in (("bundle", OWN), ("published", PUBLISHED)):
        for memory, mirror, precision in lines if which in parts else []:
            if precision == "bfloat16" and not fast_bfloat16(CPU):
                continue  # emulated, it takes minutes to hours
            command = [sys.executable, __file__, "--one", json.dumps([which, memory, mirror, precision])]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            cells = [which, found["size"], memory, "yes" if mirror else "no", precision]
            cells += [f"{found['wall']:.1f}", f"{found['cpu']:.1f}", f"{found['peak']:.2f}"]
            print(f"| {' | '.join(cells)} |", flush=True)
    if "agreement" in parts and fast_bfloat16(CPU):
        found = agreement()
        print(f"\nbfloat16 against float32, MNI152 T1: {', '.join(f'{k} {v:.5f}' for k, v in found.items())}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measure(*json.loads(sys.argv[2]))))
    else:
        main(sys.argv[1:] or ["bundle", "published", "agreement"])
