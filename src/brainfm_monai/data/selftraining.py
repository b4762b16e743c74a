"""Labels for scans that have none, from the bundle's own model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import nibabel as nib
import numpy as np
from monai.bundle import run
from nibabel.affines import apply_affine, voxel_sizes

from brainfm_monai.data.intensities import read_scan, resample_to_box
from brainfm_monai.io import find_bundle

__all__ = ["predict_labels", "predicted_file", "to_one_mm"]

logger = logging.getLogger(__name__)


def predicted_file(folder: Path, name: str) -> Path:
    """Where the bundle's inference writes the label map with FreeSurfer ids of a scan."""
    return folder / name / f"{name}_desc-freesurfer_dseg.nii.gz"


def predict_labels(scans: Mapping[str, Path], output_dir: Path, bundle: str | Path) -> None:
    """Run the bundle's inference on scans, brought to 1 mm first; those that have a result already are left out.

    A scan that fails leaves no result; the inference itself tells why.

    Args:
        scans: by subject, the scan to label.
        output_dir: folder for the results, see :func:`predicted_file`.
        bundle: folder of the bundle.

    Raises:
        FileNotFoundError: if the bundle has no inference config.
    """
    waiting = {name: scan for name, scan in scans.items() if not predicted_file(output_dir, name).is_file()}
    bundle = find_bundle(bundle)
    configs = bundle / "configs"
    if not waiting:
        return
    if not (configs / "inference.json").is_file():
        raise FileNotFoundError(
            f"{configs / 'inference.json'}: {len(waiting)} subjects have no labels and need the bundle's model"
        )
    with TemporaryDirectory() as scratch:
        for name, scan in waiting.items():
            try:
                nib.save(to_one_mm(scan), Path(scratch) / f"{name}.nii.gz")
            except ValueError as error:
                logger.error("%s", error)
        if not any(Path(scratch).iterdir()):
            return
        try:
            run(
                config_file=str(configs / "inference.json"),
                meta_file=str(configs / "metadata.json"),
                logging_file=str(configs / "logging.conf"),
                bundle_root=str(bundle),
                input=scratch,
                output_dir=str(output_dir),
            )
        except SystemExit as end:  # some scans failed; they are reported as subjects without labels
            logger.error("%s", end)


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
