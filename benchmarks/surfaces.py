"""White and pial surfaces out of predicted distances against those out of the distances of the labels.

    python benchmarks/surfaces.py SUBJECT PREDICTION [SUBJECT PREDICTION ...]

SUBJECT is the folder of a prepared subject, PREDICTION the ``*_distance.nii.gz`` that ``brainfm-monai predict`` wrote of a scan of it.
Both surfaces of the reference are grown out of the subject's own distances, with levels of 0; those of the prediction with the
levels of ``inference.json``. One row for each hemisphere and surface: distances in mm (mean and 95th percentile, to the reference
and back), bias and mean error of the thickness, Euler number, share of crossing triangles, CPU seconds of the growth.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from brainfm_monai.evaluation.surfaces import compare_surfaces, compare_thickness
from brainfm_monai.surfaces import Hemisphere, grow_hemisphere

CONFIG = Path(__file__).parents[1] / "bundle/configs/inference.json"
CHANNELS = {"L": (0, 1, 2), "R": (2, 3, 0)}  # pial, white and the opposite pial distance
COLUMNS = "subject side surface to_mean to_p95 back_mean back_p95 thickness_bias thickness_error euler crossing cpu_s"


def grow(path: Path, side: str, levels_mm: list[float]) -> tuple[Hemisphere, float]:
    """Surfaces of a hemisphere out of a file of distances, and the CPU seconds that they took."""
    image = nib.load(path)
    distance = torch.from_numpy(np.moveaxis(image.get_fdata(dtype=np.float32), -1, 0).copy())  # type: ignore[attr-defined]
    pial, white, opposite = (distance[channel].clamp(-3, 3) for channel in CHANNELS[side])
    begun = time.process_time()
    surfaces = grow_hemisphere(white, pial, opposite, image.affine, levels_mm)  # type: ignore[attr-defined]
    assert surfaces is not None
    return surfaces, time.process_time() - begun


def main(words: list[str]) -> None:
    """Print one row for each surface."""
    levels = json.loads(CONFIG.read_text(encoding="utf-8"))["surface_levels_mm"]
    print("| " + " | ".join(COLUMNS.split()) + " |\n" + "|---" * len(COLUMNS.split()) + "|")
    for subject, prediction in zip(words[::2], words[1::2], strict=True):
        for side in CHANNELS:
            true, _ = grow(Path(subject) / "distance.nii.gz", side, [0.0, 0.0])
            found, seconds = grow(Path(prediction), side, levels)
            pair, wanted = (((s.white_mm, s.faces), (s.pial_mm, s.faces)) for s in (found, true))
            thickness = compare_thickness(pair, wanted)
            for name, one, two in (("white", pair[0], wanted[0]), ("pial", pair[1], wanted[1])):
                row = compare_surfaces(one, two)
                keys = ("to_reference_mean", "to_reference_p95", "from_reference_mean", "from_reference_p95")
                numbers = [f"{row[key]:.2f}" for key in keys]
                numbers += [f"{thickness[f'vertex_thickness_{key}']:.2f}" for key in ("bias", "error")]
                numbers += [f"{row['euler_number']:.0f}", f"{row['crossing_share']:.5f}", f"{seconds:.1f}"]
                print(f"| {Path(subject).name} | {side} | {name} | " + " | ".join(numbers) + " |", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
