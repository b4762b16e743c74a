"""Write the two open pairs of a real T1 scan and its FreeSurfer segmentation as NIfTI files and a datalist.

    python benchmarks/real_pairs.py FOLDER OUT

FOLDER holds, at any depth, ``test_scan.npz`` of the voxelmorph repository (Apache-2.0) and ``norm.mgz`` with
``aparc.a2009s+aseg.mgz`` of the niivue repository (BSD-2). Both scans are brain-extracted, one person each. OUT gets four
NIfTI files and ``datalist.json``, which ``bundle/configs/evaluate.json`` reads.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import nibabel as nib
import numpy as np

# test_scan.npz has no affine. Its label ids and the place of brainstem and cerebellum show how its axes run: the left
# structures (ids 2 to 28) lie at high indices of axis 0, the cerebellum at high indices of axis 1 and low ones of axis 2. So
# the axes run left, inferior and anterior, as in every volume that FreeSurfer conforms; its spacing is 1 mm.
VOXELMORPH_AXES = np.array([[-1.0, 0.0, 0.0], [0.0, 0.0, 1.0], [0.0, -1.0, 0.0]])

Pair = tuple[np.ndarray, np.ndarray, np.ndarray]


def find(folder: Path, name: str) -> Path:
    """The one file of that name under a folder."""
    found = sorted(folder.rglob(name))
    if len(found) != 1:
        raise FileNotFoundError(f"{folder}: exactly one file '{name}' is needed below it, found {len(found)}")
    return found[0]


def read_voxelmorph(folder: Path) -> Pair:
    """Image, FreeSurfer ids and affine, with the origin in the middle of the volume."""
    with np.load(find(folder, "test_scan.npz")) as arrays:
        image, ids = arrays["vol"], arrays["seg"]
    affine = np.eye(4)
    affine[:3, :3] = VOXELMORPH_AXES
    affine[:3, 3] = -VOXELMORPH_AXES @ (np.array(image.shape) - 1) / 2
    return image, ids, affine


def read_niivue(folder: Path) -> Pair:
    """Image, FreeSurfer ids (Destrieux parcels in the cortex) and affine."""
    image = nib.freesurfer.MGHImage.from_filename(find(folder, "norm.mgz"))
    ids = nib.freesurfer.MGHImage.from_filename(find(folder, "aparc.a2009s+aseg.mgz"))
    if not np.allclose(image.affine, ids.affine):
        raise ValueError(f"{folder}: norm.mgz and aparc.a2009s+aseg.mgz must share one grid")
    return np.asarray(image.dataobj), np.asarray(ids.dataobj), image.affine


def main(folder: Path, out: Path) -> None:
    """Write both pairs and the datalist."""
    out.mkdir(parents=True, exist_ok=True)
    items = []
    for name, read in (("voxelmorph", read_voxelmorph), ("niivue", read_niivue)):
        image, ids, affine = read(folder)
        item = {"image": f"{name}_T1w.nii.gz", "label": f"{name}_labels.nii.gz"}
        nib.save(nib.Nifti1Image(image.astype(np.float32), affine), out / item["image"])
        nib.save(nib.Nifti1Image(np.rint(ids).astype(np.int32), affine), out / item["label"])
        items.append(item)
    (out / "datalist.json").write_text(json.dumps({"testing": items}, indent=2) + "\n", encoding="utf-8")
    print(f"{len(items)} pairs and datalist.json in {out}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
