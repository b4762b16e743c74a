"""What a training on one corrected scan, as MONAI Label starts it, does to scans of other persons and contrasts.

    python benchmarks/forgetting.py SCAN... [--epochs N]

The correction: nilearn's brain at 2 mm with the labels of a click, the left thalamus and the right putamen grown by one voxel. The
values are those of ``label_train.json``. Printed are
the Dice of the correction before and after, and for each SCAN the Dice of its labels before the training with those after: the mean
over the structures of the brain, that without the two corrected ones, and the lowest. Settings are those of a click.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from scipy.ndimage import binary_dilation

from brainfm_monai.anatomy import Protocol
from brainfm_monai.annotation import fine_tune
from brainfm_monai.prediction import predict

BUNDLE = Path(__file__).resolve().parents[1] / "bundle"
CLICK: dict[str, Any] = {"mirror": False, "second_look": False, "memory": "low"}
GROWN = ("Left-Thalamus", "Right-Putamen")
SMALLEST = 100  # voxels of a structure that is compared


def segment(scan: Path, bundle: Path, weights: str) -> np.ndarray:
    """Labels of a click, in the grid of the scan."""
    labels = predict(scan, bundle, weights=str(bundle / "models" / weights), **CLICK)["segmentation"]
    return np.asarray(labels[0]).astype(np.uint8)


def compare(one: np.ndarray, two: np.ndarray, labels: list[int]) -> dict[int, float]:
    """Dice of the labels that have enough voxels in the first map."""
    counted = [label for label in labels if (one == label).sum() >= SMALLEST]
    return {
        label: 2 * ((one == label) & (two == label)).sum() / ((one == label).sum() + (two == label).sum())
        for label in counted
    }


def write_correction(folder: Path, bundle: Path, label_of: dict[str, int], brain: list[int]) -> tuple[Path, Path]:
    """The scan and its corrected labels."""
    from nilearn.datasets import load_mni152_template

    scan, label = folder / "scan.nii.gz", folder / "label.nii.gz"
    image = load_mni152_template(resolution=2)
    nib.save(nib.Nifti1Image(np.rint(image.get_fdata() * 1000).astype(np.int16), image.affine), scan)
    labels = segment(scan, bundle, "model.pt")
    labels[~np.isin(labels, brain)] = 0
    for name in GROWN:
        labels[binary_dilation(labels == label_of[name])] = label_of[name]
    nib.save(nib.Nifti1Image(labels, image.affine), label)
    return scan, label


def main() -> None:
    """Train, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scans", nargs="+", type=Path)
    parser.add_argument("--epochs", type=int)
    chosen = parser.parse_args()
    protocol = Protocol.load("synthseg_head")
    label_of = {s.name: s.label for s in protocol.structures}
    brain = [s.label for s in protocol.structures if protocol.is_brain[s.label]]
    grown = {label_of[name] for name in GROWN}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        bundle = folder / "bundle"
        for part in ("configs", "models"):
            shutil.copytree(BUNDLE / part, bundle / part, ignore=shutil.ignore_patterns("model_*"))
        scan, label = write_correction(folder, bundle, label_of, brain)
        scans = [scan, *chosen.scans]
        before = [segment(path, bundle, "model.pt") for path in scans]
        overrides = {"max_epochs": chosen.epochs} if chosen.epochs else {}
        weights = fine_tune([{"image": str(scan), "label": str(label)}], bundle, device="cpu", **overrides).name
        after = [segment(path, bundle, weights) for path in scans]
        truth: Any = nib.load(label)
        corrected = np.asarray(truth.dataobj)
        for when, labels in (("before", before[0]), ("after", after[0])):
            dice = compare(corrected, labels, brain)
            print(
                when,
                {name: round(float(dice[label_of[name]]), 3) for name in GROWN},
                f"mean {np.mean(list(dice.values())):.3f}",
            )
        for path, old, new in zip(scans, before, after, strict=True):
            dice = compare(old, new, brain)
            rest = [value for found, value in dice.items() if found not in grown]
            lowest = min(dice, key=lambda found: dice[found])
            text = f"mean {np.mean(list(dice.values())):.3f}, without the corrected {np.mean(rest):.3f}"
            print(
                f"{path.parent.name}/{path.name}: {text}, lowest {dice[lowest]:.3f} ({protocol.structures[lowest].name})"
            )


if __name__ == "__main__":
    main()
