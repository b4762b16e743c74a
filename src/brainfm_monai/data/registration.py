"""MNI coordinates of a subject: its tissues are registered to those of MNI152, affine first, then diffeomorphic."""

from collections.abc import Mapping, Sequence
from functools import lru_cache, partial
from importlib import resources
from typing import Any

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as nnf
from monai.data import MetaTensor
from monai.data.itk_torch_bridge import metatensor_to_itk_image
from nibabel.affines import apply_affine, from_matvec, voxel_sizes
from nibabel.processing import resample_from_to
from nilearn import datasets as mni
from scipy.linalg import polar
from scipy.ndimage import distance_transform_edt, gaussian_filter, maximum_filter
from torch import Tensor

from brainfm_monai.data.subjects import Image
from brainfm_monai.functional.intensity import antialias
from brainfm_monai.functional.spatial import identity_grid, integrate_velocity, jacobian_determinant, warp
from brainfm_monai.io import read_table, refuse_if

TEMPLATE_NAME = "MNI152 ICBM 2009a symmetric, T1 and tissue maps as shipped with nilearn"
SPACING_VOX = 2
MINIMUM_JACOBIAN, UNFOLDING_ROUNDS = 0.2, 100
# fluid further than this from any brain tissue is left out, as in a brain-extracted template
FLUID_OUTSIDE, FLUID_RIM_VOX = 24, 2.0
# Chosen on one label map: white matter overlaps with a Dice of 0.803, 0.789 and 0.776 at 0.6, 1 and 1.5, and 223, 133
# and 87 voxels of the 4 mm grid come below MINIMUM_JACOBIAN
STIFFNESS = 1.0
BENDING = 4.0  # weight of second derivatives relative to first ones
STEP_VOX = 0.1  # of the optimiser, in voxels of the velocity field
SMOOTHING_MM = 0.7
MARGIN_VOX = 3  # around tissue, within which the images are compared
RAS_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
ORTHOGONAL_TOLERANCE_MM = 1e-4  # per voxel

_TABLES = resources.files("brainfm_monai") / "datasets"
# Medians of the template's T1 in its own tissue maps, and its value in the nuclei, white matter = 110; and shares of
# white and grey matter: where the template's maps mix both, as in the nuclei, these are its means in the structure.
LOOK_OF_ID = {
    int(row["freesurfer_id"]): [float(row[key]) for key in ("t1", "white", "grey")]
    for row in read_table(str(_TABLES / "registration.tsv"))
}
_ROWS = read_table(str(_TABLES / "elastix.tsv"))
# what differs from elastix's own parameters of affine registrations: of images of one contrast, and of any two
AFFINE, RIGID = ({row["parameter"]: row[kind].split() for row in _ROWS if row[kind]} for kind in ("affine", "rigid"))
# resolutions of the registration: voxels of its images and of its velocity field in mm, and the number of steps
LEVELS = ((4, 8, 60), (2, 4, 40))
_resize = partial(nnf.interpolate, mode="trilinear")  # a field on another grid over the same box, values as they are


def render_subject(ids: np.ndarray) -> np.ndarray:
    """A map of ids (H, W, D) as the template's images show a brain, see :func:`load_template`, (3, H, W, D)."""
    table = np.zeros((3, max(int(ids.max()), *LOOK_OF_ID) + 1), dtype=np.float32)
    table[:, list(LOOK_OF_ID)] = np.transpose(list(LOOK_OF_ID.values()))
    pictures = table[:, ids]
    is_fluid = ids == FLUID_OUTSIDE
    far = distance_transform_edt((pictures[0] == 0) | is_fluid) > FLUID_RIM_VOX
    pictures[0, far & is_fluid] = 0
    return pictures


@lru_cache(maxsize=1)
def load_template() -> Image:
    """MNI152 at 2 mm, (3, H, W, D), and its affine: brain of the T1, white matter = 110; shares of white and grey."""
    loaders = (mni.load_mni152_template, mni.load_mni152_wm_template, mni.load_mni152_gm_template)
    t1, white, grey = (load(resolution=SPACING_VOX) for load in loaders)
    mask = mni.load_mni152_brain_mask(resolution=SPACING_VOX).get_fdata() > 0
    picture = np.where(mask, t1.get_fdata(), 0) * (110.0 / 0.87)
    shares = [image.get_fdata(dtype=np.float32) for image in (white, grey)]
    return np.stack([picture.astype(np.float32), *shares]), np.asarray(t1.affine, dtype=np.float64)


def compute_mni_coordinates(
    ids: np.ndarray, affine: np.ndarray, factor: int = 4, *, initial: np.ndarray | None = None,
    levels: Sequence[tuple[int, int, int]] = LEVELS,
) -> Image:  # fmt: skip
    """Register a subject to MNI152: affine, then the flow of a stationary velocity field.

    The affine map makes a T1-like rendering of the labels agree with the template's T1 (elastix). The flow brings the
    template's maps of white and grey matter onto the subject's: mean squared difference, with a penalty on first and
    second derivatives of the velocity, from coarse to fine (Ashburner, A fast diffeomorphic image registration
    algorithm, NeuroImage 38, 2007). FreeSurfer ``ids``, (H, W, D), have voxels of 1 mm; ``initial`` is a rough matrix
    from RAS mm to MNI152 mm. Returns MNI152 RAS coordinates in mm, (H / factor, W / factor, D / factor, 3), float32,
    and their affine. ValueError if ``factor`` or 2 does not divide a size, RuntimeError if elastix fails or it folds.
    """
    rule = f"compute_mni_coordinates: sizes must be multiples of {SPACING_VOX} and {factor}"
    refuse_if(any(n % factor or n % SPACING_VOX for n in ids.shape), rule, ids.shape)
    pictures, (template, template_affine) = render_subject(ids), load_template()
    start, fixed_affine = np.eye(4) if initial is None else initial, coarsen_affine(affine, SPACING_VOX)
    fixed, moving = (_halve(pictures[:1], 1.0)[0].numpy(), start @ fixed_affine), (template[0], template_affine)
    matrix = register_linear(fixed, moving, AFFINE, from_headers=initial is not None) @ start
    velocity_mm = _flow(_halve(pictures[1:], SMOOTHING_MM)[None], fixed_affine, matrix, levels)
    grid_affine, spacing = coarsen_affine(affine, factor), levels[-1][1]
    ddf = _resize(integrate_velocity(velocity_mm / spacing) * (spacing / factor), [n // factor for n in ids.shape])
    displacement = ddf[0].movedim(0, -1).double().numpy()
    to_mni = matrix @ grid_affine
    points = apply_affine(to_mni, np.moveaxis(np.indices(displacement.shape[:3]), 0, -1))
    return unfold_coordinates(points, displacement @ to_mni[:3, :3].T, to_mni).astype(np.float32), grid_affine


def _halve(volumes: np.ndarray, sigma_vox: float) -> Tensor:
    """Volumes of shape (C, H, W, D), smoothed, at twice the voxel size."""
    smooth = np.stack([gaussian_filter(volume, sigma_vox, truncate=3.0) for volume in volumes])
    return nnf.avg_pool3d(torch.from_numpy(smooth), SPACING_VOX)


def _flow(fixed: Tensor, affine: np.ndarray, matrix: np.ndarray, levels: Sequence[tuple[int, int, int]]) -> Tensor:
    """Velocity field in mm after whose flow ``matrix`` leads from maps, (1, 2, H, W, D), 2 mm, to the template's."""
    (_, *maps), template_affine = load_template()
    moving = torch.from_numpy(np.stack(maps))[None]
    extent_mm = [n * SPACING_VOX for n in fixed.shape[2:]]
    velocity_mm = torch.zeros(1, 3, *(n // levels[0][1] for n in extent_mm))
    for image_mm, spacing_mm, iterations in levels:
        ratio = image_mm // SPACING_VOX
        subject, template = (nnf.avg_pool3d(images, ratio) for images in (fixed, moving))
        to_template = np.linalg.inv(coarsen_affine(template_affine, ratio)) @ matrix @ coarsen_affine(affine, ratio)
        read_template = partial(_read_template, template, torch.from_numpy(to_template).float())
        grid, scale = identity_grid(subject.shape[2:]), spacing_mm / image_mm
        # voxels far from any tissue of both images are 0 in both: a third to a quarter of the box remains
        tissue = (subject.flatten(2) + read_template(grid.flatten(2))).sum(1).reshape(subject.shape[2:])
        near = torch.from_numpy(maximum_filter(tissue.numpy(), 2 * MARGIN_VOX + 1)).flatten() > 0
        target = subject.flatten(2)[..., near]
        velocity = _resize(velocity_mm, [n // spacing_mm for n in extent_mm]) / spacing_mm
        velocity.requires_grad_()  # in its own voxels
        optimiser = torch.optim.Adam([velocity], lr=STEP_VOX)
        for _ in range(iterations):
            optimiser.zero_grad()
            moved = grid + _resize(integrate_velocity(velocity), subject.shape[2:]) * scale
            difference = read_template(moved.flatten(2)[..., near]) - target
            roughness = STIFFNESS * (spacing_mm / 4) ** 2 * _roughness(velocity)
            (difference.square().sum() / target.square().sum().clamp_min(1) + roughness).backward()
            optimiser.step()
        velocity_mm = velocity.detach() * spacing_mm
    return velocity_mm


def _read_template(template: Tensor, to_template: Tensor, voxels: Tensor) -> Tensor:
    """Maps of the template, (1, 2, N), at voxels of the subject, (1, 3, N)."""
    return warp(template, (to_template[:3, :3] @ voxels + to_template[:3, 3:])[..., None, None])[..., 0, 0]


def _roughness(velocity: Tensor) -> Tensor:
    """Mean square of first derivatives and, weighted, of second ones along the axes."""
    total = velocity.new_zeros(())
    for axis in (2, 3, 4):
        first = velocity.diff(dim=axis)
        total = total + first.square().mean() + BENDING * first.diff(dim=axis).square().mean()
    return total


def unfold_coordinates(points: np.ndarray, displacement: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Smooth a displacement where it folds or is about to, and nowhere else, until its Jacobian is at least 0.2.

    It leads from ``points`` to the template, both (H, W, D, 3), in mm; ``affine`` takes voxels to mm. Returns template
    coordinates. RuntimeError if folds remain.
    """
    for _ in range(UNFOLDING_ROUNDS):
        folded = compute_jacobian(points + displacement, affine) < MINIMUM_JACOBIAN
        if not folded.any():
            return points + displacement
        # around a lone voxel the weight is still one, and it fades out over some three voxels
        weight = np.clip(gaussian_filter(folded.astype(np.float32), 1.0) * 16, 0, 1)[..., None]
        displacement = displacement + weight * (gaussian_filter(displacement, 1.0, axes=(0, 1, 2)) - displacement)
    found = f"the map to the template has a Jacobian below {MINIMUM_JACOBIAN} at {int(folded.sum())} voxels"
    raise RuntimeError(f"{found}, and smoothing does not help")


def resample_to_box(
    values: np.ndarray, affine: np.ndarray, box_affine: np.ndarray, shape: tuple[int, int, int], outside: float = 0.0
) -> np.ndarray:
    """Bring a volume (H, W, D) onto a box of size ``shape`` with voxels of 1 mm in one linear interpolation, float32.

    Axes along which the scan is finer are smoothed first. Both affines take voxels to mm, the box's with any rigid
    motion in it; ``outside`` is the value where the scan does not reach.
    """
    target_mm = [float(voxel_sizes(box_affine).mean())] * 3
    volume = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
    image = nib.Nifti1Image(antialias(volume, voxel_sizes(affine).tolist(), target_mm).numpy(), affine)
    moved = resample_from_to(image, (shape, box_affine), order=1, mode="constant", cval=outside)
    return np.asarray(moved.dataobj, dtype=np.float32)


def register_linear(
    fixed: Image, moving: Image, parameters: Mapping[str, Sequence[str]], *, from_headers: bool = False
) -> np.ndarray:
    """Find the linear map, shape (4, 4), from the points of the fixed image in RAS mm to those of the moving one.

    ``parameters`` are a variation of :data:`AFFINE` or :data:`RIGID`. The search starts where the headers place the
    images, or with the centres of gravity on each other. RuntimeError if elastix fails, as without contrast.
    """
    import itk  # of the extra "prepare", which an evaluation does without

    stages = itk.ParameterObject.New()
    start = {"AutomaticTransformInitialization": ["false"]} if from_headers else {}
    stages.AddParameterMap(dict(stages.GetDefaultParameterMap("affine")) | dict(parameters) | start)
    try:
        elastix = itk.ElastixRegistrationMethod.New(_to_itk(*fixed), _to_itk(*moving), parameter_object=stages)
        elastix.SetLogToConsole(False)
        elastix.SetNumberOfThreads(1)
        elastix.Update()
    except RuntimeError as error:
        raise RuntimeError(f"registration: elastix gave up: {' '.join(str(error).split())[-200:]}") from error
    transform = elastix.ConvertToItkTransform(elastix.GetNthTransform(0))
    origin, *axes = (np.array(transform.TransformPoint(point)) for point in np.eye(4)[[3, 0, 1, 2], :3].tolist())
    return np.asarray(RAS_LPS @ from_matvec(np.stack(axes, axis=1) - origin[:, None], origin) @ RAS_LPS)


def _to_itk(volume: np.ndarray, affine: np.ndarray) -> Any:
    """An ITK image in RAS mm, on the closest grid with the orthogonal axes that ITK needs and a tilted gantry lacks."""
    spacing = voxel_sizes(affine)
    grid = from_matvec(polar(affine[:3, :3] / spacing)[0] * spacing)
    if np.abs(affine - grid)[:3, :3].max() > ORTHOGONAL_TOLERANCE_MM:
        middle = (np.array(volume.shape) - 1) / 2
        grid[:3, 3] = apply_affine(affine, middle) - apply_affine(grid, middle)
        volume, affine = resample_to_box(volume, affine, grid, volume.shape, outside=float(volume.min())), grid
    values = torch.from_numpy(np.ascontiguousarray(volume[None], dtype=np.float32))
    return metatensor_to_itk_image(MetaTensor(values, affine=torch.from_numpy(affine)), dtype=np.float32)


def coarsen_affine(affine: np.ndarray, factor: int) -> np.ndarray:
    """Affine of the grid whose voxels are blocks of ``factor`` voxels along each axis."""
    return affine @ from_matvec(np.eye(3) * factor, [(factor - 1) / 2] * 3)


def compute_jacobian(coordinates: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Jacobian (H, W, D) of a map in mm, (H, W, D, 3), on a grid of this affine; folds are where it is not positive."""
    in_mm = torch.from_numpy(np.moveaxis(coordinates, -1, 0)[None])
    return jacobian_determinant(in_mm)[0, 0].numpy() / np.linalg.det(affine[:3, :3])
