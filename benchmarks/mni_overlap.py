"""How well MNI coordinates fit: the template's tissue maps, read at the coordinates, against the subject's labels.

    python benchmarks/mni_overlap.py LABELS [LABELS ...]

Each file is a map of FreeSurfer ids. White matter is that of cerebrum and cerebellum, and the template's map above 0.5;
grey matter is that of both cortices, hippocampus and amygdala. The Jacobian is that of the whole 4 mm grid.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import numpy as np
import torch
from nibabel.affines import apply_affine
from scipy.ndimage import map_coordinates

from brainfm_monai.data.labels import crop_to_brain, fold_ids, load_label_map
from brainfm_monai.data.registration import compute_jacobian, compute_mni_coordinates, load_template

SIZE = (192, 224, 224)
TISSUES = {"white": (2, 41, 7, 46, 77, 78, 79), "grey": (3, 42, 8, 47, 17, 18, 53, 54)}


def main(paths: list[Path]) -> None:
    """Print one row of a table for each map."""
    torch.set_num_threads(1)
    print("| map | Dice of white matter | Dice of grey matter | smallest Jacobian | s |\n|---|---|---|---|---|")
    (_, *maps), template_affine = load_template()
    for path in paths:
        ids, affine = load_label_map(path)
        ids = fold_ids(ids)
        box, box_affine = crop_to_brain(ids, affine, SIZE, str(path))
        start = time.perf_counter()
        coordinates, grid = compute_mni_coordinates(box, box_affine)
        seconds = time.perf_counter() - start
        fine = torch.nn.functional.interpolate(
            torch.from_numpy(coordinates).movedim(-1, 0)[None], size=SIZE, mode="trilinear"
        )
        voxels = apply_affine(np.linalg.inv(template_affine), fine[0].movedim(0, -1).numpy())
        dice = []
        for tissue, probability in zip(TISSUES.values(), maps, strict=True):
            found = map_coordinates(probability, np.moveaxis(voxels, -1, 0), order=1) > 0.5
            truth = np.isin(box, tissue)
            dice.append(2 * (found & truth).sum() / (found.sum() + truth.sum()))
        smallest = compute_jacobian(coordinates, grid).min()
        print(f"| {path.name} | {dice[0]:.3f} | {dice[1]:.3f} | {smallest:.2f} | {seconds:.0f} |")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main([Path(name) for name in sys.argv[1:]])
