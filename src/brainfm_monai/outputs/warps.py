"""The way to the template in files that ITK, ANTs and people read, and scan and template laid over each other."""

from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from nibabel.affines import apply_affine

from brainfm_monai.io import write_text
from brainfm_monai.outputs.result import TEMPLATE_SPACE, ScanResult, once_per_scan
from brainfm_monai.outputs.template import (
    Warp,
    fit_affine,
    fit_warp,
    fold_fraction,
    invert_warp,
    load_template,
    resample_through,
)

OUTER_FLUID_ID = 24  # around the brain
RAS_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # ITK counts to the left and to the back
TO_TEMPLATE = f"from-scan_to-{TEMPLATE_SPACE}_mode-image"
TO_SCAN = f"from-{TEMPLATE_SPACE}_to-scan_mode-image"
DISPLACEMENT_STEP_MM = 2.0**-8  # a power of 2, so that float32 holds the rounded numbers exactly and they compress well
TEMPLATE_STRIDE = 3  # the warps are smooth: stored every 3 mm


def write_coordinates(scan: ScanResult) -> None:
    """Write the template coordinates of every voxel, as the network sees them: ``_mni``, x, y, z in steps of 0.05 mm."""
    text = "right, anterior and superior coordinate of each voxel in the template; 0 outside the computed box"
    scan.save_map("mni", scan.in_grid("mni"), text, Space=TEMPLATE_SPACE)


def _tissue(scan: ScanResult) -> np.ndarray:
    """The brain without the fluid around it, in the network's grid, bool, shape (H, W, D)."""
    protocol = scan.layout.protocol
    tissue = protocol.is_brain & (protocol.freesurfer_ids != OUTER_FLUID_ID)
    return np.asarray(tissue[scan.in_network_grid("segmentation")[0]])


@once_per_scan
def fit_affine_to_template(scan: ScanResult) -> np.ndarray:
    """Matrix from the scan's RAS mm to the template's, (4, 4), fitted to the predicted coordinates of the brain's tissue.

    Raises:
        ValueError: if too little brain was found.
    """
    brain = _tissue(scan)
    return fit_affine(apply_affine(scan.network_affine, np.argwhere(brain)), scan.in_network_grid("mni")[:, brain].T)


@once_per_scan
def fit_scan_to_template(scan: ScanResult) -> Warp:
    """The smooth map from the scan's RAS mm to the template's, of which :func:`fit_affine_to_template` is the affine part.

    Raises:
        ValueError: if too little brain was found.
    """
    return fit_warp(scan.in_network_grid("mni"), _tissue(scan), scan.network_affine, fit_affine_to_template(scan))


def write_transforms(scan: ScanResult) -> None:
    """Write affine and warp in both directions, the share of folds, and scan and template laid over each other.

    ``mode-image`` files move images: ``from-scan_to-T`` resamples the scan into the template's grid, and so holds, as ITK wants
    it, where each point of the template lies in the scan. The text matrix maps points.
    """
    try:
        forward = fit_scan_to_template(scan)
    except ValueError as error:
        scan.warnings.append(f"no transform to the template: {error}")
        return
    template, affine = load_template()
    shape = tuple(-(-n // TEMPLATE_STRIDE) + 1 for n in template.shape)  # one more: the whole template is covered
    backward = invert_warp(forward, shape, affine @ np.diag([TEMPLATE_STRIDE] * 3 + [1.0]))
    for name, warp in ((TO_TEMPLATE, backward), (TO_SCAN, forward)):
        write_text(scan.path(f"{name}_desc-affine_xfm.tfm"), format_itk_affine(warp.matrix))
        write_displacement(scan.path(f"{name}_xfm.nii.gz"), warp)
    np.savetxt(scan.path(f"from-scan_to-{TEMPLATE_SPACE}_mode-points_desc-affine_xfm.txt"), forward.matrix, fmt="%.9g")
    folds = {"predicted": _folds_of_prediction(scan), "warp": fold_fraction(forward)}
    scan.summary["folds_of_predicted_coordinates"] = round(folds["predicted"], 6)
    scan.summary["folds_of_warp"] = round(folds["warp"], 6)
    scan.write_sidecar(
        f"{TO_TEMPLATE}_xfm",
        Space=TEMPLATE_SPACE,
        Units="mm, displacements in LPS as ITK and ANTs have them, of the affine and the residual together",
        FoldFraction=folds,
        AffinePointsScanToTemplateRAS=forward.matrix.tolist(),
    )
    moved = resample_through(scan.image.cpu(), scan.affine, template.shape, affine, backward)
    scan.save_image(f"space-{TEMPLATE_SPACE}_image", moved, affine, Description="the scan in the template's grid")
    moved = resample_through(torch.from_numpy(template)[None], affine, scan.labels.shape, scan.affine, forward)
    scan.save_image(f"desc-{TEMPLATE_SPACE}_T1w", moved, Description="the template in the grid of the scan's files")


def _folds_of_prediction(scan: ScanResult) -> float:
    """Share of the brain in which the coordinates, as the network gives them, fold space."""
    brain = scan.layout.protocol.is_brain[scan.in_network_grid("segmentation")[0]]
    box = tuple(slice(int(axis.min()), int(axis.max()) + 1) for axis in np.nonzero(brain))
    coordinates = np.moveaxis(scan.in_network_grid("mni")[:, *box], 0, -1)
    return fold_fraction(Warp(coordinates, scan.network_affine, np.eye(4)), brain[box])


def format_itk_affine(matrix: np.ndarray) -> str:
    """An affine of RAS points as the text file of ITK, which counts in LPS."""
    lps = RAS_LPS @ matrix @ RAS_LPS
    numbers = " ".join(f"{value:.17g}" for value in [*lps[:3, :3].reshape(-1), *lps[:3, 3]])
    lines = ["#Insight Transform File V1.0", "#Transform 0", "Transform: AffineTransform_double_3_3"]
    return "\n".join([*lines, f"Parameters: {numbers}", "FixedParameters: 0 0 0", ""])


def write_displacement(path: Path, warp: Warp) -> None:
    """Write a map as a displacement field that ITK and ANTs read: NIfTI, five axes, vectors in LPS mm."""
    rounded = np.rint(warp.displacement @ RAS_LPS[:3, :3] / DISPLACEMENT_STEP_MM) * DISPLACEMENT_STEP_MM
    image = nib.Nifti1Image(rounded.astype(np.float32)[:, :, :, None], warp.affine)
    image.header.set_intent("vector")
    image.header.set_xyzt_units("mm")
    nib.save(image, path)
