"""The simulated clinical scan, on a small made-up brain, and the scans of the demo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from brainfm_monai.data.fetch import simulate_clinical_scan, write_demo_scans


def small_brain() -> nib.Nifti1Image:
    """A ball of 20 mm, dark within and bright at its rim, off the centre of the grid."""
    affine = np.diag([1.0, 1.0, 1.0, 1.0])
    affine[:3, 3] = (-30, -28, -26)
    index = np.stack(np.meshgrid(np.arange(60), np.arange(58), np.arange(54), indexing="ij"), axis=-1)
    radius = np.linalg.norm(index + affine[:3, 3] - (4, -3, 2), axis=-1)
    return nib.Nifti1Image(np.where(radius < 20, 300 + 30 * radius, 0).astype(np.float32), affine)


def test_the_clinical_scan_lies_where_the_head_lies() -> None:
    scan: Any = simulate_clinical_scan(small_brain())
    assert nib.aff2axcodes(scan.affine) == ("L", "P", "S")
    np.testing.assert_allclose(nib.affines.voxel_sizes(scan.affine), (0.9, 0.9, 5.0))
    assert np.abs(scan.affine[:3, :3]).min(axis=0).max() < 0.5  # oblique, and yet near the axes
    data = np.asarray(scan.dataobj)
    weight = data > 100
    centre = np.argwhere(weight).mean(axis=0)
    np.testing.assert_allclose((scan.affine @ [*centre, 1])[:3], (4, -3, 2), atol=1.0)
    volume = weight.sum() * abs(np.linalg.det(scan.affine[:3, :3]))
    np.testing.assert_allclose(volume, 4 / 3 * np.pi * 20**3, rtol=0.1)


def test_the_clinical_scan_has_the_other_contrast_and_the_same_noise_every_time() -> None:
    scan: Any = simulate_clinical_scan(small_brain())
    data = np.asarray(scan.dataobj)
    index = np.argwhere(data > 100)
    world = index @ scan.affine[:3, :3].T + scan.affine[:3, 3]
    radius = np.linalg.norm(world - (4, -3, 2), axis=-1)
    values = data[tuple(index.T)]
    assert values[radius < 8].mean() > 1.3 * values[(radius > 12) & (radius < 16)].mean()
    again: Any = simulate_clinical_scan(small_brain())
    np.testing.assert_array_equal(data, np.asarray(again.dataobj))
    other: Any = simulate_clinical_scan(small_brain(), seed=1)
    assert (data != np.asarray(other.dataobj)).any()


def test_the_demo_writes_two_scans_whole(tmp_path: Path) -> None:
    paths = write_demo_scans(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    assert [path.name for path in paths] == ["mni152_T1w.nii.gz", "clinical_T2like.nii.gz"]
    t1w: Any = nib.load(paths[0])
    assert t1w.shape == (197, 233, 189)
