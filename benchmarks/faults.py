"""Kill a command at random moments, and compare what the next run leaves with what an undisturbed run leaves.

    python benchmarks/faults.py predict --kills 50
    python benchmarks/faults.py prepare --kills 50
    python benchmarks/faults.py train --kills 50
    python benchmarks/faults.py bundle --kills 50
    python benchmarks/faults.py many --scans 200
    python benchmarks/faults.py together
    python benchmarks/faults.py generate --scans 2000

The first four start the command, kill it (SIGKILL) after a random share of the time that an undisturbed run takes, check that no
file of the results is damaged, start it again until it ends, and compare every file by what it holds. ``many`` runs scans in one
process and prints memory and open files after each tenth of them. ``together`` starts two processes in one output folder.
``generate`` draws and renders scans, and checks that all voxels are finite. Inputs are small and made here: the MNI152 template
at 4 mm with random intensities, and a network with random weights.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from brainfm_monai.io import fingerprint

ROOT = Path(__file__).resolve().parents[1]
FEATURES = [8, 8, 16]
BOX = "64,64,64"  # voxels of 1 mm
TASKS = ["segmentation", "distance", "log_bias_field", "mni"]
TIMES = ("finished.json", "train.log")  # files that hold times of day
HIDDEN = (".partial", ".failed")


def write_scans(folder: Path, count: int, size: int = 32) -> None:
    """Scans of random voxels."""
    folder.mkdir(parents=True)
    for number in range(count):
        values = np.random.default_rng(number).random((size, size + 2, size - 3)).astype(np.float32)
        nib.save(nib.Nifti1Image(values, np.diag([3.0, 2.4, 4.0, 1.0])), folder / f"scan{number:04d}.nii.gz")


def write_label_map(path: Path) -> None:
    """A head of nested boxes: skin, fluid, cortex and white matter of both sides."""
    labels = np.zeros((60, 70, 60), dtype=np.int16)
    labels[6:54, 6:64, 6:54] = 24
    for left, right, margin in ((3, 42, 10), (2, 41, 14)):  # the affine's x falls with the index
        labels[margin:30, margin : 70 - margin, margin : 60 - margin] = right
        labels[30 : 60 - margin, margin : 70 - margin, margin : 60 - margin] = left
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(labels, np.diag([-3.0, 3.0, 3.0, 1.0])), path)


def write_weights(folder: Path) -> Path:
    """Weights of a tiny network; what it predicts does not matter here."""
    from brainfm_monai.networks import MultiTaskNet, TwoScaleUNet
    from brainfm_monai.tasks import TaskLayout

    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = MultiTaskNet(TwoScaleUNet(1, FEATURES), TaskLayout(TASKS, "synthseg_head"), stride=2)
    torch.save(network.state_dict(), folder / "weights.pt")
    return folder / "weights.pt"


def predict_words(folder: Path, output: Path, *more: str) -> list[str]:
    """The command that predicts the scans of a folder with a tiny network."""
    words = ["predict", str(folder / "scans"), str(output), "--bundle", str(ROOT / "bundle"), "--precision", "float32"]
    words += ["--weights", str(folder / "weights.pt"), "--network_def#backbone#features", str(FEATURES)]
    words += ["--layout#tasks", str(TASKS), "--device", "$torch.device('cpu')"]
    words += ["--outputs", "segmentation,volumes,distance"]
    return [sys.executable, "-m", "brainfm_monai", *words, *more]


def prepare_predict(folder: Path) -> Callable[[Path], list[str]]:
    """Six small scans and a tiny network."""
    write_scans(folder / "scans", 6)
    write_weights(folder)
    return lambda output: predict_words(folder, output)


def prepare_prepare(folder: Path) -> Callable[[Path], list[str]]:
    """Two label maps; the box around the brain is small, because a registration in the whole one takes half a minute."""
    for number in range(2):
        write_label_map(folder / "maps" / f"map{number}.nii.gz")
    words = [sys.executable, "-m", "brainfm_monai", "prepare", "labels", str(folder / "maps")]
    return lambda output: [*words, str(output), "--jobs", "1", "--size", BOX]


def prepare_train(folder: Path) -> Callable[[Path], list[str]]:
    """Two prepared subjects and a tiny training: two epochs of four steps, a checkpoint after each step."""
    subprocess.run(prepare_prepare(folder)(folder / "prepared"), check=True, capture_output=True)
    words = ["data", "list", str(folder / "prepared"), "--validation", "map1"]
    subprocess.run([sys.executable, "-m", "brainfm_monai", *words], check=True, capture_output=True)
    words = ["train", str(folder / "prepared/datalist.json"), "--bundle", str(ROOT / "bundle"), "--variant", "small"]
    words += ["--max_epochs", "2", "--epoch_length", "4"]
    words += ["--checkpoint_iterations", "1", "--spatial_size", "[32,32,32]"]
    return lambda output: [sys.executable, "-m", "brainfm_monai", *words, "--output_dir", str(output)]


def prepare_bundle(folder: Path) -> Callable[[Path], list[str]]:
    """The zip of the bundle."""
    return lambda output: [sys.executable, str(ROOT / "packaging/make_bundle.py"), "--output", str(output)]


PREPARATIONS = {
    "predict": prepare_predict, "prepare": prepare_prepare, "train": prepare_train, "bundle": prepare_bundle,
}  # fmt: skip


def content_of(folder: Path) -> dict[str, str]:
    """What the files of a folder hold: packed ones by what they pack, without times of day."""
    found = {}
    for file in sorted(folder.rglob("*")):
        parts = file.relative_to(folder).parts
        timeless = not file.name.endswith(TIMES) and "events.out" not in file.name
        if not file.is_file() or parts[0].startswith(HIDDEN) or not timeless:
            continue
        if file.suffix == ".pt":  # an archive that holds its own name; minutes of a budget are times of day
            content = torch.load(file, weights_only=True, map_location="cpu")
            held = fingerprint({key: content[key] for key in content if key != "budget"})
        else:
            data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
            held = hashlib.sha256(data.replace(str(folder).encode(), b"OUT")).hexdigest()
        found["/".join(parts)] = held
    return found


def damaged(folder: Path) -> Iterator[str]:
    """Files that cannot be read as what they are named."""
    for file in folder.rglob("*"):
        if not file.is_file() or any(part.startswith(".") for part in file.relative_to(folder).parts):
            continue
        try:
            if file.name.endswith((".nii.gz", ".nii")):
                image: Any = nib.load(file)
                np.asarray(image.dataobj)
            elif file.suffix == ".json":
                json.loads(file.read_text(encoding="utf-8"))
            elif file.suffix == ".pt":
                torch.load(file, weights_only=True, map_location="cpu")
            elif file.suffix == ".zip" and zipfile.ZipFile(file).testzip():
                raise ValueError("a member of the archive has another check sum")
        except Exception as error:
            yield f"{file}: {error}"


def run(words: list[str], seconds: float | None = None) -> tuple[int, float]:
    """Run a command, killed after some seconds; its exit status and the time it took."""
    begun = time.monotonic()
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    try:
        _, text = process.communicate(timeout=seconds)
        if process.returncode:
            print(text.decode(errors="replace")[-1500:])
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    return process.returncode, time.monotonic() - begun


def kill_often(kind: str, kills: int, seed: int) -> None:
    """Kill a command at random moments, resume it, and compare."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = PREPARATIONS[kind](folder)
        status, seconds = run(command(folder / "whole"))
        if status:
            sys.exit(f"{kind}: the undisturbed run must end well, found exit status {status}")
        expected = content_of(folder / "whole")
        moments, attempt, killed, broken, different = random.Random(seed), 0, 0, 0, 0
        while killed < kills:
            output = folder / f"attempt{attempt}"
            attempt += 1
            while True:
                status, _ = run(command(output), moments.uniform(0.02, 1.0) * seconds)
                broken += len(list(damaged(output)))
                if status != -signal.SIGKILL or killed >= kills:
                    break
                killed += 1
            if status:
                status, _ = run(command(output))
            resumed = content_of(output)
            names = {file for file in {*expected, *resumed} if expected.get(file) != resumed.get(file)}
            different += len(names)
            counts = f"{killed} kills, {broken} damaged files, {different} files that differ"
            print(f"{kind}: {counts} {sorted(names)[:3]}", flush=True)
        print(f"{kind}: {killed} kills in {attempt} resumed runs: {broken} damaged files, {different} files differ")


def run_many(count: int) -> None:
    """Scans in one process: memory and open files after each tenth of them."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_scans(folder / "scans", count, size=16)
        write_weights(folder)
        process = subprocess.Popen(
            predict_words(folder, folder / "out"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        shown = 0
        while process.poll() is None:
            time.sleep(0.2)
            done = len(list((folder / "out").glob("[!.]*/[!.]*_finished.json")))
            status = Path(f"/proc/{process.pid}/status")
            if done >= shown + count // 10 and status.exists():
                shown = done
                memory = next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmRSS"))
                handles = len(list(Path(f"/proc/{process.pid}/fd").iterdir()))
                print(f"many: {done} scans, {int(memory) / 1024:.0f} MiB, {handles} open files", flush=True)
        print(
            f"many: {len(list((folder / 'out').glob('*/[!.]*_finished.json')))} of {count} scans, exit {process.returncode}"
        )


def run_together() -> None:
    """Two processes with the same scans and one output folder."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = prepare_predict(folder)
        run(command(folder / "whole"))
        both = [
            subprocess.Popen(command(folder / "both"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            for _ in range(2)
        ]
        status = [process.wait() for process in both]
        same = content_of(folder / "both") == content_of(folder / "whole")
        print(f"together: exit {status}, {'the same files as alone' if same else 'files differ from those alone'}")


def generate(count: int) -> None:
    """Draw and render scans of one label map; every voxel must be finite."""
    from brainfm_monai.synthesis import SynthesisRanges, Synthesizer
    from brainfm_monai.tasks import TaskLayout

    labels = torch.zeros(1, 1, 24, 28, 24, dtype=torch.uint8)
    labels[:, :, 4:20, 4:24, 4:12], labels[:, :, 4:20, 4:24, 12:20] = 2, 3
    layout = TaskLayout(["segmentation", "log_bias_field"], "synthseg_head")
    synthesizer = Synthesizer(SynthesisRanges(), layout, labels.shape[2:])
    bad = 0
    for seed in range(count):
        made = synthesizer({"generation_labels": labels, "segmentation": labels}, [seed])
        bad += not all(bool(torch.isfinite(volume).all()) for volume in made.values())
    print(f"generate: {count} scans, {bad} with voxels that are not finite")


def main() -> None:
    """Run one kind of fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=[*PREPARATIONS, "many", "together", "generate"])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--scans", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    if options.kind in PREPARATIONS:
        kill_often(options.kind, options.kills, options.seed)
    elif options.kind == "many":
        run_many(options.scans)
    elif options.kind == "together":
        run_together()
    else:
        generate(options.scans)


if __name__ == "__main__":
    main()
