"""From predicted template coordinates to transforms: robust affine, smooth residual without folds, inverse; RAS mm."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from importlib import resources
from typing import Any

import nibabel as nib
import numpy as np
import torch
from nibabel.affines import apply_affine
from scipy.ndimage import find_objects, gaussian_filter
from torch import Tensor

from brainfm_monai.functional.separable import hat
from brainfm_monai.functional.spatial import jacobian_determinant
from brainfm_monai.functional.spatial import warp as sample
from brainfm_monai.io import write_text
from brainfm_monai.outputs.result import SAME_VOXELS, TEMPLATE_SPACE, ScanResult, once_per_scan

ROUNDS, STILL = 30, 1e-7  # of reweighting, at most; it ends when no element of the matrix moves by more
HUBER_MM = 2.0  # residuals above count by their length, those below by its square: the error of good coordinates
SAMPLES = 200_000  # voxels of the brain, at least, that the affine is fitted to: a brain has a million of 1 mm
SMOOTHING_MM = 5.0  # width of the Gaussian that averages the residual: what is finer is noise of the coordinates
SMOOTHING_GROWTH, SMOOTHING_ROUNDS = 1.5, 8  # until nothing folds: 5 mm become 85 mm
MINIMUM_JACOBIAN = 0.05  # a voxel of the brain that shrinks to less counts as folded
DECAY = 0.01  # share of brain in the Gaussian's reach below which the residual goes to 0, and the affine alone is left
INVERSION_ROUNDS, INVERSION_TOLERANCE_MM = 60, 0.01
SLAB = 16  # planes that are resampled at once: their coordinates stay in the cache of the processor
OUTER_FLUID_ID = 24  # around the brain
RAS_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # ITK counts to the left and to the back
TO_TEMPLATE = f"from-scan_to-{TEMPLATE_SPACE}_mode-image"
TO_SCAN = f"from-{TEMPLATE_SPACE}_to-scan_mode-image"
DISPLACEMENT_UNIT = "mm, displacements in LPS as ITK and ANTs have them, of the affine and the residual together"
DISPLACEMENT_STEP_MM = 2.0**-8  # a power of 2, so that float32 holds the rounded numbers exactly and they compress well
ITK_AFFINE = "#Insight Transform File V1.0\n#Transform 0\nTransform: AffineTransform_double_3_3\nParameters: {}\n"
ITK_AFFINE += "FixedParameters: 0 0 0\n"
TEMPLATE_STRIDE = 3  # the warps are smooth: stored every 3 mm


@lru_cache(maxsize=1)
def load_template() -> tuple[np.ndarray, np.ndarray]:
    """The MNI152 T1 that nilearn ships, brain only, 1 mm: intensities, shape (H, W, D), and affine to RAS mm."""
    # nilearn.datasets.load_mni152_template gives the same, but takes 0.2 s to import
    file = resources.files("nilearn") / "datasets/data/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"
    image: Any = nib.load(str(file))
    intensities = image.get_fdata(dtype=np.float32)
    return intensities / intensities.max(), np.asarray(image.affine, dtype=np.float64)


def grid_points(shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """RAS mm of every voxel, shape (*shape, 3), float32."""
    return apply_affine(affine, np.moveaxis(np.indices(shape, dtype=np.float32), 0, -1)).astype(np.float32)


@dataclass(frozen=True)
class Warp:
    """A smooth map of space: the point that each voxel of a grid goes to; linear between voxels, affine beyond."""

    points: np.ndarray  # RAS mm, shape (H, W, D, 3)
    affine: np.ndarray  # voxel indices of the grid to RAS mm, shape (4, 4)
    matrix: np.ndarray  # the map far from the brain, shape (4, 4)

    @cached_property
    def residual(self) -> Tensor:
        """What the map adds to its affine part, mm, shape (1, 3, H, W, D), float32."""
        residual = self.points - apply_affine(self.matrix, grid_points(self.points.shape[:3], self.affine))
        return torch.from_numpy(residual.astype(np.float32)).movedim(-1, 0)[None]

    def residual_at(self, points: np.ndarray) -> np.ndarray:
        """The residual at points of shape (..., 3), linearly interpolated, 0 beyond the grid."""
        index = apply_affine(np.linalg.inv(self.affine), points.reshape(-1, 3))
        coordinates = torch.from_numpy(index.T.astype(np.float32)).reshape(1, 3, -1, 1, 1)
        return sample(self.residual, coordinates)[0, :, :, 0, 0].T.numpy().reshape(points.shape)

    def __call__(self, points: np.ndarray) -> np.ndarray:
        """Map points of shape (..., 3)."""
        return apply_affine(self.matrix, points) + self.residual_at(points)


def fit_affine(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Matrix (4, 4) from source to target points (N, 3): least squares in which outliers count little (Huber).

    ValueError if the points do not determine it: fewer than 4, or in a plane.
    """
    goal = target.astype(np.float64)
    points = np.column_stack([source, np.ones(len(goal))]).astype(np.float64)
    if len(points) < 4 or np.linalg.matrix_rank(points - points.mean(axis=0), tol=1e-3) < 3:
        raise ValueError(f"affine fit: points that fill a volume are needed, found {len(points)} that do not")
    weight, matrix = np.ones(len(points)), np.eye(4)
    for _ in range(ROUNDS):
        weighted, last = points * weight[:, None], matrix.copy()
        matrix[:3] = np.linalg.solve(weighted.T @ points, weighted.T @ goal).T
        if np.abs(matrix - last).max() < STILL:
            break
        error = np.linalg.norm(points @ matrix[:3].T - goal, axis=1)
        weight = HUBER_MM / np.maximum(error, HUBER_MM)
    return matrix


def fit_warp(
    coordinates: np.ndarray, brain: np.ndarray, affine: np.ndarray, matrix: np.ndarray, spacing_vox: int = 3
) -> Warp:
    """Smooth map to the template that follows predicted coordinates within the brain, and is affine far from it.

    The residual of the affine fit ``matrix`` is averaged with a Gaussian over the brain alone (normalised convolution),
    and with a wider one as long as the map folds anywhere. Coordinates are (3, H, W, D), mm, the brain is bool, (H, W,
    D), the affine leads from voxel indices to RAS mm; the result has a voxel for every ``spacing_vox`` of theirs.
    """
    coarse = affine @ np.diag([spacing_vox] * 3 + [1.0])
    cut = (slice(None, None, spacing_vox),) * 3
    mask = brain[cut].astype(np.float32)
    spread = apply_affine(matrix, grid_points(mask.shape, coarse))
    residual = (np.moveaxis(coordinates[(slice(None), *cut)], 0, -1) - spread) * mask[..., None]
    # a coordinate that is far off is not smoothed but limited, as in the affine fit
    length = np.linalg.norm(residual, axis=-1, keepdims=True)
    limit = 5 * max(float(np.median(length[mask > 0])), HUBER_MM)
    residual *= np.minimum(1.0, limit / np.maximum(length, 1e-6))
    for number in range(SMOOTHING_ROUNDS):
        sigma = SMOOTHING_MM * SMOOTHING_GROWTH**number / np.linalg.norm(coarse[:3, :3], axis=0)
        weight = gaussian_filter(mask, sigma, mode="constant")[..., None]
        smooth = np.stack([gaussian_filter(residual[..., i], sigma, mode="constant") for i in range(3)], axis=-1)
        warp = Warp((spread + smooth / (weight + DECAY)).astype(np.float32), coarse, matrix)
        if fold_fraction(warp, minimum=MINIMUM_JACOBIAN) == 0:
            break
    return warp


def fold_fraction(warp: Warp, where: np.ndarray | None = None, minimum: float = 0.0) -> float:
    """Share of voxels (of a mask) whose Jacobian is at most ``minimum`` times that of the affine part; 0: folds."""
    scale = np.linalg.det(warp.affine[:3, :3]) * np.linalg.det(warp.matrix[:3, :3])
    folded = counted = 0
    for first in range(0, len(warp.points), SLAB):  # differences need a plane on either side
        part = warp.points[max(first - 1, 0) : first + SLAB + 1].astype(np.float32)
        determinant = jacobian_determinant(torch.from_numpy(part).movedim(-1, 0)[None])[0, 0].numpy() / scale
        values = determinant[min(first, 1) :][:SLAB]
        values = values if where is None else values[where[first : first + SLAB]]
        folded, counted = folded + int((values <= minimum).sum()), counted + values.size
    return folded / counted if counted else 0.0


def invert_warp(warp: Warp, shape: tuple[int, ...], affine: np.ndarray) -> Warp:
    """The inverse of a map, on a grid of its target space, by fixed-point iteration on the residual.

    With y = A x + r(x), x = A^-1 (y - r(x)) is repeated from x = A^-1 y until no point moves by more than 0.01 mm.
    """
    inverse, goal = np.linalg.inv(warp.matrix), grid_points(shape, affine).reshape(-1, 3)
    points = apply_affine(inverse, goal)
    for _ in range(INVERSION_ROUNDS):
        last, points = points, apply_affine(inverse, goal - warp.residual_at(points))
        if float(np.abs(points - last).max()) < INVERSION_TOLERANCE_MM:
            break
    return Warp(points.reshape(*shape, 3).astype(np.float32), affine, inverse)


def resample_through(
    image: Tensor, affine: np.ndarray, shape: tuple[int, ...], grid_affine: np.ndarray, to_image: Warp
) -> np.ndarray:
    """Read an image, (1, h, w, d), where a map sends each voxel of another grid; float32, 0 beyond the image."""
    source, to_index, moved = image[None].float(), np.linalg.inv(affine), np.zeros(shape, dtype=np.float32)
    if not (filled := find_objects((source[0, 0] != 0).numpy().astype(np.uint8))):
        return moved
    turn, matrix = torch.from_numpy(to_index[:3, :3].astype(np.float32)), to_index @ to_image.matrix @ grid_affine
    residual = torch.einsum("ij,bjhwd->bihwd", turn, to_image.residual)
    # the box of the grid out of which the map, its affine part and at most so much, leads to what is not 0
    most = residual.abs().amax((0, 2, 3, 4)).tolist()
    ends = [(side.start - 1 - reach, side.stop + reach) for side, reach in zip(filled[0], most, strict=True)]
    corners = apply_affine(np.linalg.inv(matrix), np.stack(np.meshgrid(*ends), axis=-1)).reshape(-1, 3)
    limits = np.clip([np.floor(corners.min(axis=0)), np.ceil(corners.max(axis=0)) + 1], 0, shape).astype(int)
    box = tuple(slice(*pair) for pair in limits.T)
    read_residual = _interpolate(residual, np.linalg.inv(to_image.affine) @ grid_affine, box)
    for first in range(box[0].start, box[0].stop, SLAB):
        slab = (slice(first, min(first + SLAB, box[0].stop)), *box[1:])
        moved[slab] = sample(source, _coordinates(matrix, slab).add_(read_residual(slab)))[0, 0].numpy()
    return moved


def _interpolate(field: Tensor, matrix: np.ndarray, box: tuple[slice, ...]) -> Callable[[tuple[slice, ...]], Tensor]:
    """What reads a field (1, C, h, w, d) in planes of a box of another grid, 0 beyond the field.

    The matrix leads from the indices of the grid to those of the field. Where the axes of both agree, but for order and
    direction, linear interpolation goes axis by axis.
    """
    order = np.abs(matrix[:3, :3]).argmax(axis=0)  # axis of the field along each axis of the grid
    steps, ends = matrix[order, range(3)], [side.stop for side in box]
    aside = (np.abs(matrix[:3, :3]).sum(axis=0) - np.abs(steps)) * ends
    if len(set(order)) < 3 or aside.max() > SAME_VOXELS:
        return lambda slab: sample(field, _coordinates(matrix, slab))
    turned = field[0].permute(0, *(1 + order))
    places = [step * np.arange(n) + matrix[axis, 3] for step, n, axis in zip(steps, ends, order, strict=True)]
    axes = zip(places, turned.shape[1:], strict=True)
    over_h, over_w, over_d = (hat(torch.from_numpy(place).float(), n) for place, n in axes)
    over_w, over_d, turn = over_w[box[1]], over_d[box[2]], "xh,chwd->cxwd"
    return lambda slab: (over_w @ torch.einsum(turn, over_h[slab[0]], turned) @ over_d.T)[None]


def _coordinates(matrix: np.ndarray, box: tuple[slice, ...]) -> Tensor:
    """A matrix applied to the indices in a box, shape (1, 3, H, W, D)."""
    x, y, z = (torch.from_numpy(axis).float() for axis in np.ogrid[box])
    rows = torch.from_numpy(matrix[:3].astype(np.float32))
    return torch.stack([row[0] * x + row[1] * y + row[2] * z + row[3] for row in rows])[None]


def _tissue(scan: ScanResult) -> np.ndarray:
    """The brain without the fluid around it, in the network's grid, bool, shape (H, W, D)."""
    protocol = scan.layout.protocol
    tissue = protocol.is_brain & (protocol.freesurfer_ids != OUTER_FLUID_ID)
    return np.asarray(tissue[scan.in_network_grid("segmentation")[0]])


@once_per_scan
def fit_affine_to_template(scan: ScanResult) -> np.ndarray:
    """Matrix (4, 4) from the scan's RAS mm to the template's, fitted to the brain's tissue; ValueError without one."""
    brain = np.flatnonzero(_tissue(scan))
    brain = brain[:: max(1, len(brain) // SAMPLES)]
    coordinates = scan.in_network_grid("mni")
    index = np.stack(np.unravel_index(brain, coordinates.shape[1:]), axis=-1)
    return fit_affine(apply_affine(scan.network_affine, index), coordinates.reshape(3, -1)[:, brain].T)


@once_per_scan
def fit_scan_to_template(scan: ScanResult) -> Warp:
    """The smooth map of which :func:`fit_affine_to_template` is the affine part, with its errors."""
    return fit_warp(scan.in_network_grid("mni"), _tissue(scan), scan.network_affine, fit_affine_to_template(scan))


def write_coordinates(scan: ScanResult) -> None:
    """Write the predicted template coordinates of every voxel: ``_mni``, x, y, z in steps of 0.05 mm."""
    text = "right, anterior and superior coordinate of each voxel in the template; 0 outside the computed box"
    scan.save_map("mni", scan.in_grid("mni"), text, Space=TEMPLATE_SPACE)


def write_transforms(scan: ScanResult) -> None:
    """Write affine and warp in both directions, the share of folds, and scan and template laid over each other.

    ``mode-image`` files move images: ``from-scan_to-T`` resamples the scan into the template's grid, and so holds, as
    ITK wants it, where each point of the template lies in the scan. The text matrix maps points.
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
        lps = RAS_LPS @ warp.matrix @ RAS_LPS
        numbers = " ".join(f"{value:.17g}" for value in [*lps[:3, :3].reshape(-1), *lps[:3, 3]])
        write_text(scan.path(f"{name}_desc-affine_xfm.tfm"), ITK_AFFINE.format(numbers))
        steps = (warp.points - grid_points(warp.points.shape[:3], warp.affine)) @ RAS_LPS[:3, :3] / DISPLACEMENT_STEP_MM
        displacement = (np.rint(steps) * DISPLACEMENT_STEP_MM).astype(np.float32)[:, :, :, None]  # five axes
        image = nib.Nifti1Image(displacement, warp.affine)
        image.header.set_intent("vector")
        scan.save_nifti(f"{name}_xfm", image)
    np.savetxt(scan.path(f"from-scan_to-{TEMPLATE_SPACE}_mode-points_desc-affine_xfm.txt"), forward.matrix, fmt="%.9g")
    brain = scan.layout.protocol.is_brain[scan.in_network_grid("segmentation")[0]]
    (box,) = find_objects(brain.astype(np.uint8))
    inside = np.moveaxis(scan.in_network_grid("mni")[(slice(None), *box)], 0, -1)
    predicted = fold_fraction(Warp(inside, scan.network_affine, np.eye(4)), brain[box])
    folds = {"predicted": predicted, "warp": fold_fraction(forward)}
    scan.summary |= {"folds_of_predicted_coordinates": round(predicted, 6), "folds_of_warp": round(folds["warp"], 6)}
    points = {"FoldFraction": folds, "AffinePointsScanToTemplateRAS": forward.matrix.tolist()}
    scan.write_sidecar(f"{TO_TEMPLATE}_xfm", Space=TEMPLATE_SPACE, Units=DISPLACEMENT_UNIT, **points)
    moved = resample_through(scan.image.cpu(), scan.affine, template.shape, affine, backward)
    scan.save_image(f"space-{TEMPLATE_SPACE}_image", moved, affine, Description="the scan in the template's grid")
    moved = resample_through(torch.from_numpy(template)[None], affine, scan.labels.shape, scan.affine, forward)
    scan.save_image(f"desc-{TEMPLATE_SPACE}_T1w", moved, Description="the template in the grid of the scan's files")
