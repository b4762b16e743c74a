"""White and pial surfaces out of predicted distances against those out of the distances of the labels.

    python benchmarks/surfaces.py SUBJECT PREDICTION SCAN [SUBJECT PREDICTION SCAN ...]

SUBJECT is the folder of a prepared subject, SCAN a scan of it with isotropic voxels, PREDICTION the ``*_distance.nii.gz`` that
``brainfm-monai predict`` wrote of it. The surfaces of the reference are grown out of the subject's own distances, with levels of 0;
those of the prediction with the levels of ``inference.json`` and the scan. One row for each hemisphere and surface: distances in mm
(mean and 95th percentile, to the reference and back), bias and mean error of the thickness, Euler number, share of crossing
triangles. The last line is the time of the predictions' surfaces of both hemispheres, with thickness, curvature, crossings and
Euler number, as ``predict`` takes it, mean over the scans, and the largest resident set of the process.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from brainfm_monai.evaluation.surfaces import SIDES, compare_surfaces, compare_thickness, grow_surfaces
from brainfm_monai.surfaces import Hemisphere, compute_euler_number, compute_mean_curvature

CONFIG = Path(__file__).parents[1] / "bundle/configs/inference.json"
BRIGHTEST = 0.999  # quantile that becomes 1, as the network's input has it
COLUMNS = "subject side surface to_mean to_p95 back_mean back_p95 thickness_bias thickness_error euler crossing"


def read(path: Path) -> tuple[torch.Tensor, np.ndarray]:
    """Values of a file, channels first, and its affine."""
    image = nib.load(path)
    values = torch.from_numpy(image.get_fdata(dtype=np.float32).copy())  # type: ignore[attr-defined]
    return (values.movedim(-1, 0) if values.ndim == 4 else values), image.affine  # type: ignore[attr-defined]


def measure_all(found: dict[str, Hemisphere]) -> None:
    """What ``predict`` measures of surfaces; crossings and thickness are found while the surfaces grow."""
    for one in found.values():
        compute_euler_number(one.faces)
        for vertices in (one.white_mm, one.pial_mm):
            compute_mean_curvature(vertices, one.faces)


def main(words: list[str]) -> None:
    """Print one row for each surface, and what they cost."""
    levels = json.loads(CONFIG.read_text(encoding="utf-8"))["surface_levels_mm"]
    print("| " + " | ".join(COLUMNS.split()) + " |\n" + "|---" * len(COLUMNS.split()) + "|")
    elapsed, used, subjects = 0.0, 0.0, words[::3]
    for subject, prediction, scan in zip(subjects, words[1::3], words[2::3], strict=True):
        (distance, affine), image = read(Path(prediction)), read(Path(scan))[0]
        image = ((image - image.min()) / (np.quantile(image.numpy(), BRIGHTEST) - image.min())).clamp(0, 1)
        begun, cpu = time.perf_counter(), time.process_time()
        found = grow_surfaces(distance, affine, levels, image)
        measure_all(found)
        elapsed, used = elapsed + time.perf_counter() - begun, used + time.process_time() - cpu
        true = grow_surfaces(*read(Path(subject) / "distance.nii.gz"))
        for letter, side in SIDES.items():
            thickness = compare_thickness(found[letter], true[letter])
            for kind in ("white", "pial"):
                meshes = [(getattr(one[letter], f"{kind}_mm"), one[letter].faces) for one in (found, true)]
                row = compare_surfaces(meshes[0], meshes[1])
                keys = ("to_reference_mean", "to_reference_p95", "from_reference_mean", "from_reference_p95")
                numbers = [f"{row[key]:.2f}" for key in keys]
                numbers += [f"{thickness[f'vertex_thickness_{key}']:.2f}" for key in ("bias", "error")]
                numbers += [f"{row['euler_number']:.0f}", f"{row['crossing_share']:.5f}"]
                print(
                    f"| {Path(subject).name} | {side} | {kind} | " + " | ".join(numbers) + " |",
                    flush=True,
                )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    count = len(subjects)
    print(
        f"both hemispheres: {elapsed / count:.1f} s, {used / count:.1f} CPU s; peak {peak:.1f} GB, references included"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
