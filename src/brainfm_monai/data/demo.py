"""Scans to try the bundle on without any download: the MNI152 T1 that nilearn ships, and a clinical scan made from it."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.affines import apply_affine, from_matvec, voxel_sizes
from nibabel.processing import resample_from_to
from scipy.spatial.transform import Rotation

from brainfm_monai.io import write_whole

IN_PLANE_MM = 0.9
SLICE_THICKNESS_MM = 5  # also the spacing: slices without gaps, as in much of clinical routine
TILT_DEG = (9.0, 0.0, 6.0)  # about right, anterior and superior: a head that lies askew, slices not along it
NOISE_STD = 0.02  # of the brightest tissue
BIAS_LOG_AMPLITUDE = 0.35  # a surface coil's shading: factors of 0.7 to 1.4


def write_demo_scans(output_dir: str | Path) -> list[Path]:
    """Write ``mni152_T1w.nii.gz`` (1 mm) and ``clinical_T2like.nii.gz``, see :func:`simulate_clinical_scan`; return their paths."""
    from nilearn.datasets import load_mni152_template  # slow to import

    folder = Path(output_dir)
    template = load_mni152_template(resolution=1)
    t1w = nib.Nifti1Image(np.asarray(template.get_fdata(dtype=np.float32)), template.affine)
    scans = {"mni152_T1w.nii.gz": t1w, "clinical_T2like.nii.gz": simulate_clinical_scan(t1w)}
    for name, scan in scans.items():
        with write_whole(folder / name) as partial:
            nib.save(scan, partial)
    return [folder / name for name in scans]


def simulate_clinical_scan(t1w: nib.Nifti1Image, seed: int = 0) -> nib.Nifti1Image:
    """Make of a T1 what a clinical archive might hold: 5 mm slices askew to the head, dark-to-bright contrast, shading, noise.

    The contrast of the tissues is turned around (fluid bright, white matter dark); the voxels are stored from right to left and
    front to back (LPS), with the true oblique affine. ``t1w`` is skull-stripped with background 0, ``seed`` that of the noise; the
    image is int16, of 0.9 x 0.9 x 5 mm.
    """
    image = np.asarray(t1w.get_fdata(dtype=np.float32))
    brain = image > 0
    scale = float(np.percentile(image[brain], 99.5))
    inverted = np.where(brain, 1.0 - 0.8 * np.clip(image / scale, 0, 1), 0.0).astype(np.float32)
    fine_shape, fine_affine = _oblique_grid(t1w)
    fine = resample_from_to(nib.Nifti1Image(inverted, t1w.affine), (fine_shape, fine_affine), order=1)
    values = fine.get_fdata(dtype=np.float32)
    slices = values.reshape(*fine_shape[:2], -1, SLICE_THICKNESS_MM).mean(axis=-1)
    affine = fine_affine @ np.diag([1, 1, SLICE_THICKNESS_MM, 1])
    affine[:3, 3] += fine_affine[:3, 2] * (SLICE_THICKNESS_MM - 1) / 2
    noise = np.random.default_rng(seed).normal(0, NOISE_STD, (2, *slices.shape))
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in slices.shape), indexing="ij")
    shading = np.exp(BIAS_LOG_AMPLITUDE * (0.6 * x + 0.5 * y * y - 0.4 * z)).astype(
        np.float32
    )  # brighter to one corner
    magnitude = np.hypot(slices * shading + noise[0], noise[1])  # Rician: noise of a magnitude image
    return nib.Nifti1Image(np.rint(magnitude * 1000).astype(np.int16), affine)


def _oblique_grid(reference: nib.Nifti1Image) -> tuple[tuple[int, int, int], np.ndarray]:
    """LPS-stored grid around the centre of an image, tilted, with slices of 1 mm to be averaged later."""
    zooms = np.array([IN_PLANE_MM, IN_PLANE_MM, 1.0])
    extent_mm = np.array(reference.shape) * voxel_sizes(reference.affine) + 10
    shape = np.ceil(extent_mm / zooms / SLICE_THICKNESS_MM).astype(int) * SLICE_THICKNESS_MM
    matrix = Rotation.from_euler("xyz", TILT_DEG, degrees=True).as_matrix() @ np.diag(zooms * [-1, -1, 1])
    centre = apply_affine(reference.affine, (np.array(reference.shape) - 1) / 2)
    height, width, depth = (int(n) for n in shape)
    return (height, width, depth), from_matvec(matrix, centre - matrix @ ((shape - 1) / 2))
