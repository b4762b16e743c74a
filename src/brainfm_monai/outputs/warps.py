"""The way to the template in files that ITK, ANTs and people read, and scan and template laid over each other."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from nibabel.affines import apply_affine
from torch import Tensor

from brainfm_monai.functional.spatial import warp as sample
from brainfm_monai.io import write_text
from brainfm_monai.outputs.images import save_map
from brainfm_monai.outputs.result import TEMPLATE_SPACE, ScanResult, once_per_scan
from brainfm_monai.outputs.template import (
    Warp,
    fit_affine,
    fit_warp,
    fold_fraction,
    invert_warp,
    load_template,
)

__all__ = [
    "TO_SCAN",
    "TO_TEMPLATE",
    "fit_affine_to_template",
    "fit_scan_to_template",
    "resample_through",
    "write_coordinates",
    "write_transforms",
]

OUTER_FLUID_ID = 24  # around the brain
RAS_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # ITK counts to the left and to the back
TO_TEMPLATE = f"from-scan_to-{TEMPLATE_SPACE}_mode-image"
TO_SCAN = f"from-{TEMPLATE_SPACE}_to-scan_mode-image"
DISPLACEMENT_STEP_MM = 2.0**-8  # a power of 2, so that float32 holds the rounded numbers exactly and they compress well
TEMPLATE_STRIDE = 3  # the warps are smooth: stored every 3 mm
SLAB = 32  # slices that are resampled at once


def write_coordinates(scan: ScanResult) -> None:
    """Write the template coordinates of every voxel, as the network sees them: ``_mni``, x, y, z in steps of 0.05 mm."""
    text = "right, anterior and superior coordinate of each voxel in the template; 0 outside the computed box"
    save_map(scan, "mni", np.moveaxis(scan.in_grid("mni"), 0, -1), text, Space=TEMPLATE_SPACE)


@once_per_scan
def fit_affine_to_template(scan: ScanResult) -> np.ndarray:
    """Matrix from the scan's RAS mm to the template's, (4, 4), fitted to the predicted coordinates of the brain's tissue.

    Raises:
        ValueError: if too little brain was found.
    """
    brain = _tissue(scan)
    points = apply_affine(scan.network_affine, np.argwhere(brain))
    return fit_affine(points, scan.maps["mni"].cpu().numpy()[:, brain].T)


@once_per_scan
def fit_scan_to_template(scan: ScanResult) -> Warp:
    """The smooth map from the scan's RAS mm to the template's, of which :func:`fit_affine_to_template` is the affine part.

    Raises:
        ValueError: if too little brain was found.
    """
    coordinates = scan.maps["mni"].cpu().numpy()
    return fit_warp(coordinates, _tissue(scan), scan.network_affine, fit_affine_to_template(scan))


def _tissue(scan: ScanResult) -> np.ndarray:
    """The brain without the fluid around it, in the network's grid, bool, shape (H, W, D)."""
    protocol = scan.layout.protocol
    tissue = protocol.is_brain & (protocol.freesurfer_ids != OUTER_FLUID_ID)
    return np.asarray(tissue[scan.maps["segmentation"].cpu().numpy()[0]])


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
    template, template_affine = load_template()
    coarse_affine = template_affine @ np.diag([TEMPLATE_STRIDE] * 3 + [1.0])
    shape = tuple(
        -(-n // TEMPLATE_STRIDE) + 1 for n in template.shape
    )  # one more, so that the whole template is covered
    backward = invert_warp(forward, shape, coarse_affine)
    for name, warp in ((TO_TEMPLATE, backward), (TO_SCAN, forward)):
        write_text(scan.path(f"{name}_desc-affine_xfm.tfm"), format_itk_affine(warp.matrix))
        write_displacement(scan.path(f"{name}_xfm.nii.gz"), warp)
    np.savetxt(scan.path(f"from-scan_to-{TEMPLATE_SPACE}_mode-points_desc-affine_xfm.txt"), forward.matrix, fmt="%.9g")
    folds = {"predicted": _folds_of_prediction(scan), "warp": fold_fraction(forward)}
    scan.summary.update(
        {"folds_of_predicted_coordinates": round(folds["predicted"], 6), "folds_of_warp": round(folds["warp"], 6)}
    )
    scan.write_sidecar(
        f"{TO_TEMPLATE}_xfm",
        Space=TEMPLATE_SPACE,
        Units="mm, displacements in LPS as ITK and ANTs have them, of the affine and the residual together",
        FoldFraction=folds,
        AffinePointsScanToTemplateRAS=forward.matrix.tolist(),
    )
    in_template = resample_through(scan.image.cpu(), scan.affine, template.shape, template_affine, backward)
    scan.save_image(
        f"space-{TEMPLATE_SPACE}_image", in_template, template_affine, Description="the scan in the template's grid"
    )
    in_scan = resample_through(
        torch.from_numpy(template)[None], template_affine, scan.labels.shape, scan.affine, forward
    )
    scan.save_image(f"desc-{TEMPLATE_SPACE}_T1w", in_scan, Description="the template in the grid of the scan's files")


def _folds_of_prediction(scan: ScanResult) -> float:
    """Share of the brain in which the coordinates, as the network gives them, fold space."""
    brain = scan.layout.protocol.is_brain[scan.maps["segmentation"].cpu().numpy()[0]]
    box = tuple(slice(int(axis.min()), int(axis.max()) + 1) for axis in np.nonzero(brain))
    coordinates = np.moveaxis(scan.maps["mni"].cpu().numpy()[:, *box], 0, -1)
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


def resample_through(
    image: Tensor, affine: np.ndarray, shape: tuple[int, ...], grid_affine: np.ndarray, to_image: Warp
) -> np.ndarray:
    """Read an image where a map sends each voxel of another grid.

    Args:
        image: shape (1, h, w, d).
        affine: its voxel indices to RAS mm.
        shape: size of the other grid.
        grid_affine: its voxel indices to RAS mm.
        to_image: map from its space to that of the image.

    Returns:
        float32 array of the other grid, 0 where nothing is known.
    """
    source = torch.as_tensor(image)[None].float()
    field = torch.from_numpy(to_image.residual.astype(np.float32)).movedim(-1, 0)[None]
    to_index = np.linalg.inv(affine)
    turn = torch.from_numpy(to_index[:3, :3].astype(np.float32))
    parts = []
    for first in range(0, shape[0], SLAB):
        size = (min(SLAB, shape[0] - first), *shape[1:])
        residual = sample(field, _coordinates(np.linalg.inv(to_image.affine) @ grid_affine, size, first))
        where = _coordinates(to_index @ to_image.matrix @ grid_affine, size, first)
        where += torch.einsum("ij,bjhwd->bihwd", turn, residual)
        parts.append(sample(source, where)[0, 0].numpy())
    return np.concatenate(parts)


def _coordinates(matrix: np.ndarray, size: tuple[int, ...], first: int) -> Tensor:
    """A matrix applied to the indices of a slab that begins at ``first``, shape (1, 3, *size)."""
    index = [torch.arange(n, dtype=torch.float32) for n in size]
    index[0] += first
    rows = torch.from_numpy(matrix[:3].astype(np.float32))
    x, y, z = index[0][:, None, None], index[1][:, None], index[2]
    return torch.stack([row[0] * x + row[1] * y + row[2] * z + row[3] for row in rows])[None]
