"""Write open scans of people who were not trained on, with their T1w as the reference, as NIfTI files and a datalist.

    python benchmarks/real_contrasts.py FOLDER OUT

FOLDER holds, at any depth, ``raw/patient04`` of open_ms_data (CC-BY, Lesjak et al. 2016; T1w, T2w and FLAIR of the first visit,
whole head, slices of 3 to 4 mm), the folder ``ds000011_t1`` with sub-13 and sub-14 of ds000011 (PDDL; T1w, and T2w of 5 mm slices,
whole heads, whose headers share no space), and the folder ``ds002748`` with sub-41 to sub-48 (CC0; brain-extracted T1w). OUT gets a
copy of every scan, the T1w once for each T2w and FLAIR, and ``datalist.json``, which ``brainfm-monai evaluate`` reads. A T1w is its
own reference: what is measured is the T1w that is made of a T1w.

The head moves between two scans of a session. The T1w is registered to each scan rigidly (elastix, mutual information), and the
motion goes into the header of its copy: its voxels stay as they were measured. A model that was trained on scans of these people
must not be measured on them.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.affines import apply_affine, voxel_sizes

from brainfm_monai.data.contrasts import align_scan, measure_motion, read_scan
from brainfm_monai.data.registration import resample_to_box

CONTRASTS = ("T1w", "T2w", "FLAIR")
# person -> scans by contrast, each as the end of its path
PEOPLE = {
    "ms04": {name: f"raw/patient04/study1_{name.replace('w', 'W')}.nii.gz" for name in CONTRASTS},
    **{
        f"sub-{person}": {
            "T1w": f"ds000011_t1/sub-{person}_T1w.nii.gz",
            "T2w": f"ds000011_t1/sub-{person}_inplaneT2.nii.gz",
        }
        for person in ("13", "14")
    },
    **{f"sub-{number}": {"T1w": f"ds002748/sub-{number}_T1w.nii.gz"} for number in range(41, 49)},
}


def to_one_mm(scan: Path) -> nib.Nifti1Image:
    """A scan on a 1 mm grid along its own axes, in RAS+ order.

    Raises:
        ScanError: if the file holds no scan.
    """
    values, affine = read_scan(scan)
    canonical = nib.as_closest_canonical(nib.Nifti1Image(values, affine))
    spacing = voxel_sizes(canonical.affine)
    height, width, depth = (int(np.ceil(n * s)) for n, s in zip(canonical.shape, spacing, strict=True))
    grid = canonical.affine @ np.diag([*(1 / spacing), 1])
    grid[:3, 3] = apply_affine(canonical.affine, (1 / spacing - 1) / 2)  # the corners of the boxes stay together
    return nib.Nifti1Image(
        resample_to_box(np.asarray(canonical.dataobj), canonical.affine, grid, (height, width, depth)), grid
    )


def find(folder: Path, end: str) -> Path:
    """The one file under a folder whose path ends so."""
    found = sorted(folder.rglob(end))
    if len(found) != 1:
        raise FileNotFoundError(f"{folder}: exactly one file '{end}' is needed below it, found {len(found)}")
    return found[0]


def align(scan: Path, reference: Path) -> tuple[nib.Nifti1Image, dict[str, float]]:
    """Bring a reference into the space of another scan of the same head.

    Args:
        scan: scan that stays where it is.
        reference: scan that is moved.

    Returns:
        The reference with its own voxels, float32, and an affine to RAS mm of the other scan; and the motion that was found: the
        angle in degrees, and in mm how far the middle of the scan goes.
    """
    fixed = to_one_mm(scan)  # slices of 4 mm and pixels of 0.5 mm would be smoothed by one number of voxels
    values, affine = read_scan(reference)
    matrix = align_scan((np.asarray(fixed.dataobj), fixed.affine), (values, affine))
    centre_mm = (fixed.affine @ [*((np.array(fixed.shape) - 1) / 2), 1])[:3]
    return nib.Nifti1Image(values, np.linalg.inv(matrix) @ affine), measure_motion(matrix, centre_mm)


def main(folder: Path, out: Path) -> None:
    """Write every scan with its reference, the datalist, and a line for each on what moved."""
    out.mkdir(parents=True, exist_ok=True)
    items = []
    print("| scan | rotation, degrees | shift, mm |\n|---|---|---|")
    for person, ends in PEOPLE.items():
        scans = {contrast: find(folder, end) for contrast, end in ends.items()}
        t1w = scans.pop("T1w")
        own = f"{person}_T1w"
        shutil.copyfile(t1w, out / f"{own}.nii.gz")
        items.append({"name": own, "image": f"{own}.nii.gz", "T1w": f"{own}.nii.gz"})
        for contrast, scan in scans.items():
            name = f"{person}_{contrast}"
            item = {"name": name, "image": f"{name}.nii.gz", "T1w": f"{name}_reference-T1w.nii.gz"}
            moved, motion = align(scan, t1w)
            shutil.copyfile(scan, out / item["image"])
            nib.save(moved, out / item["T1w"])
            items.append(item)
            print(f"| {name} | {motion['rotation_deg']:.2f} | {motion['shift_mm']:.2f} |", flush=True)
    (out / "datalist.json").write_text(json.dumps({"testing": items}, indent=2) + "\n", encoding="utf-8")
    print(f"{len(items)} scans with their T1w and datalist.json in {out}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
