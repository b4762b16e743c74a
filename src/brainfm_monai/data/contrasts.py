"""Scans of a subject: brought onto its box, scaled, with masks of where they hold no data, and lesions drawn on them.

Here ``ids`` are FreeSurfer ids on the box of the subject, (H, W, D), and ``affine`` takes its voxels to RAS mm.
"""

from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import itk
import numpy as np
import torch
from monai.data import MetaTensor
from monai.data.itk_torch_bridge import metatensor_to_itk_image
from nibabel.affines import apply_affine, from_matvec, voxel_sizes
from scipy import ndimage
from scipy.spatial.distance import cdist
from scipy.spatial.transform import Rotation

from brainfm_monai.anatomy import Protocol, is_brain
from brainfm_monai.data.intensities import find_head, read_scan, resample_to_box
from brainfm_monai.data.labels import AIR_HU
from brainfm_monai.data.subjects import Image
from brainfm_monai.io import read_table, refuse_if
from brainfm_monai.synthesis.acquisition import CONTRASTS, read_contrasts

LOWEST_HU = -1024.0  # scanners fill with less outside of their field of view
MINIMUM_AIR_SHARE = 0.01
SAME_PLACE_DICE = 0.5
MINIMUM_COVER = 0.8  # share of the labelled brain that must lie in the head of its scan; in real subjects 0.97 and more
SAME_GRID_MM = 0.1
SHELL_MM = (6, 14)  # skull and scalp around the brain
STRIPPED_SHARE, DEFACED_SHARE = 0.9, 0.7  # of a shell or of the face that must be exactly 0
# eyes, nose and cheeks, and what defacing tools clear in front of and below them: low and high corner in MNI152 mm
FACE_MNI_MM = ((-35, 55, -65), (35, 85, -30))
FRONT_MNI_MM = ((-90, 15, -140), (90, 130, 5))
MINIMUM_VOXELS = 100  # of a structure whose brightness is compared
RAS_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
ORTHOGONAL_TOLERANCE_MM = 1e-4  # per voxel
_ROWS = read_table(str(resources.files("brainfm_monai") / "datasets" / "elastix.tsv"))
# what differs from elastix's own parameters of affine registrations: of images of one contrast, and of any two
AFFINE: dict[str, Sequence[str]] = {row["parameter"]: row["affine"].split() for row in _ROWS if row["affine"]}
RIGID: dict[str, Sequence[str]] = {row["parameter"]: row["rigid"].split() for row in _ROWS if row["rigid"]}


class BoxScan(NamedTuple):
    """A scan on the box of its subject."""

    values: np.ndarray  # in the unit of the file, shape (H, W, D); air where the scan does not reach
    seen: np.ndarray  # mask of the field of view, same shape, bool
    motion: np.ndarray  # rigid map from RAS mm of the reference to RAS mm of this scan, shape (4, 4)
    corners: np.ndarray  # centres of the corner voxels of the file's grid in RAS mm, shape (8, 3)


def gather_scans(files: Mapping[str, Path], ids: np.ndarray, affine: np.ndarray) -> dict[str, BoxScan]:
    """Every contrast among files by role, on the box. The first one is the reference; the others are registered to it.

    ValueError if a file holds no scan, a CT is not in HU, or the labels do not lie on the head of the reference.
    """
    scans: dict[str, BoxScan] = {}
    for key, path in ((key, path) for key, path in files.items() if key in CONTRASTS):
        values, file_affine = read_scan(path)
        outside, reference, motion = 0.0, next(iter(scans.values()), None), np.eye(4)
        if key == "CT":
            values, outside = check_hounsfield(values, str(path)), AIR_HU
        if reference is not None:
            motion = align_scan((reference.values, affine), (values, file_affine), key == "CT")
        grid = (motion @ affine, ids.shape)
        on_box = resample_to_box(values, file_affine, *grid, outside=outside)
        seen = resample_to_box(np.ones_like(values), file_affine, *grid) > 0.5
        scans[key] = BoxScan(on_box, seen, motion, _corners(values.shape, file_affine))
        brain = is_brain(ids) & seen
        cover = find_head(on_box - outside)[brain].mean() if reference is None and brain.any() else 0.0
        rule = f"{path}: a scan on whose head the labels of {files['labels'].name} lie is needed"
        refuse_if(reference is None and cover < MINIMUM_COVER, rule, f"{100 * cover:.0f} % of the labelled brain in it")
    return scans


def recognise_contrast(path: Path, ids: np.ndarray, affine: np.ndarray) -> str:
    """The contrast of a scan: CT if it is in HU, else that whose table is most like the structures' brightness."""
    values, file_affine = read_scan(path)
    if values.min() < AIR_HU / 2 and (values < AIR_HU / 2).mean() > MINIMUM_AIR_SHARE and values.max() > -AIR_HU / 2:
        return "CT"
    on_box = resample_to_box(values, file_affine, affine, ids.shape)
    protocol = Protocol.load("synthseg_generation")
    names = [name for name in CONTRASTS if name != "CT"]
    counts = {int(i): int((ids == i).sum()) for i in protocol.freesurfer_ids[protocol.is_brain]}
    present = [i for i, count in counts.items() if count >= MINIMUM_VOXELS]
    found = [float(np.median(on_box[ids == i])) for i in present]
    means = read_contrasts(names, protocol)[0].numpy()[:, [protocol.label_of_id[i] for i in present]]
    weights = [counts[i] for i in present]
    likeness = [np.cov(mean, found, fweights=weights)[0, 1] / np.sqrt(np.cov(mean, fweights=weights)) for mean in means]
    return names[int(np.argmax(likeness))]


def align_scan(fixed: Image, moving: Image, is_ct: bool = False) -> np.ndarray:
    """Rigid map (4, 4) from points of the fixed scan in RAS mm to those of the moving one, by mutual information.

    It starts where the headers place the scans, unless the heads then hardly overlap, else with the centres of gravity
    on each other. ``is_ct`` tells that the moving one is in HU. RuntimeError if elastix fails.
    """
    values, affine = moving
    if is_ct:
        values = np.clip(values, AIR_HU, 200.0) - AIR_HU  # bone would outweigh all soft tissue
    seen = resample_to_box(values, affine, fixed[1], fixed[0].shape)
    head, other_head = find_head(fixed[0]), find_head(seen)
    dice = 2 * (head & other_head).sum() / max(1, head.sum() + other_head.sum())
    return register_linear(fixed, (values, affine), RIGID, from_headers=bool(dice > SAME_PLACE_DICE))


def measure_motion(matrix: np.ndarray, centre_mm: np.ndarray) -> dict[str, float]:
    """Angle in degrees of a rigid map and how far it takes a point, in mm."""
    angle = np.rad2deg(Rotation.from_matrix(matrix[:3, :3]).magnitude())
    shift = np.linalg.norm(apply_affine(matrix, centre_mm) - centre_mm)
    return {"rotation_deg": round(float(angle), 2), "shift_mm": round(float(shift), 2)}


def check_hounsfield(values: np.ndarray, source: str) -> np.ndarray:
    """A CT in HU, with what lies below air's range lifted to it; ValueError if hardly a voxel is as dark as air."""
    dark = float((values < AIR_HU / 2).mean())
    rule = f"{source}: a CT in HU with air at about -1000 is needed"
    refuse_if(dark < MINIMUM_AIR_SHARE, rule, f"{100 * dark:.2f} % of it below -500")
    return np.maximum(values, LOWEST_HU)


def carry_lesion(
    files: Mapping[str, Path], contrast: str, scans: Mapping[str, BoxScan], affine: np.ndarray
) -> tuple[np.ndarray | None, str]:
    """Bring the mask of lesions, the file of the role ``lesion``, onto the box, from the scan on which it was drawn.

    That is the scan of ``contrast``; if this is empty, the scan whose grid the mask has, or the only one. The scans on
    the box know how the head moved between them. Returns the mask, uint8, or None and why it is left out.
    """
    values, file_affine = read_scan(files["lesion"])
    corners = _corners(values.shape, file_affine)
    fits = [key for key, scan in scans.items() if cdist(corners, scan.corners).min(axis=1).max() < SAME_GRID_MM]
    drawn_on = contrast or next(iter(fits or (scans if len(scans) == 1 else ())), "")
    if drawn_on not in scans:
        needed = f"that of {' or '.join(scans)}" if not contrast else f"a scan of {contrast}"
        return None, f"{files['lesion'].name} is left out: its grid must be {needed}, or its name tell space-<contrast>"
    scan, drawn = scans[drawn_on], values > 0.5
    lesion = resample_to_box(drawn.astype(np.float32), file_affine, scan.motion @ affine, scan.values.shape) > 0.5
    if drawn.any() and not lesion.any():
        return None, f"{files['lesion'].name} is left out: no lesion of it lies in the box"
    return lesion.astype(np.uint8), ""


def find_removed(
    contrast: str, scan: BoxScan, mask: Path | None, ids: np.ndarray, affine: np.ndarray, mni_mm: np.ndarray
) -> np.ndarray:
    """Where a scan on the box holds no data, bool (H, W, D): outside its field of view or the brain, or where defaced.

    A mask of the data set, which is 1 where the scan was defaced, decides where there is one. Without it: defacing and
    brain extraction set voxels to exactly 0, which the noise of air rarely is. A scan, not yet scaled, counts as
    brain-extracted if nine tenths of a shell around the brain are 0, and as defaced if seven tenths of the place of
    eyes and nose are. ``mni_mm`` are MNI152 coordinates on a grid of blocks of the box, (H / n, W / n, D / n, 3).
    """
    removed = ~scan.seen
    if mask is not None:
        return np.asarray(removed | (resample_to_box(*read_scan(mask), scan.motion @ affine, ids.shape) > 0.5))
    brain = is_brain(ids)
    empty = scan.values == (AIR_HU if contrast == "CT" else 0)
    away = ndimage.distance_transform_edt(~brain, sampling=voxel_sizes(affine))
    shell = (away > SHELL_MM[0]) & (away < SHELL_MM[1]) & scan.seen
    if shell.any() and empty[shell].mean() > STRIPPED_SHARE:
        return np.asarray(removed | (empty & ~brain))
    face = _within(mni_mm, FACE_MNI_MM, ids.shape) & scan.seen
    if face.any() and empty[face].mean() > DEFACED_SHARE:
        removed = removed | (empty & _within(mni_mm, FRONT_MNI_MM, ids.shape) & ~brain)
    return np.asarray(removed)


def _within(mni_mm: np.ndarray, corners: tuple[tuple[int, ...], tuple[int, ...]], shape: tuple[int, ...]) -> np.ndarray:
    """Voxels of the box whose block lies between two corners in MNI152 space."""
    inside = ((mni_mm > corners[0]) & (mni_mm < corners[1])).all(axis=-1)
    return np.kron(inside, np.ones([n // m for n, m in zip(shape, inside.shape, strict=True)], dtype=bool))


def _corners(shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """Centres of the corner voxels of a grid in RAS mm, shape (8, 3)."""
    return np.asarray(apply_affine(affine, np.indices((2, 2, 2)).reshape(3, -1).T * (np.array(shape) - 1)))


def register_linear(
    fixed: Image, moving: Image, parameters: Mapping[str, Sequence[str]], *, from_headers: bool = False
) -> np.ndarray:
    """Find the linear map, shape (4, 4), from the points of the fixed image in RAS mm to those of the moving one.

    ``parameters`` are :data:`AFFINE` or :data:`RIGID`, or a variation of them. The search starts where the affines
    place the images, or with the centres of gravity on each other. RuntimeError if elastix fails, as without contrast.
    """
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
    left, _, right = np.linalg.svd(affine[:3, :3] / spacing)
    if np.abs(affine[:3, :3] - (left @ right) * spacing).max() > ORTHOGONAL_TOLERANCE_MM:
        grid = from_matvec((left @ right) * spacing)
        middle = (np.array(volume.shape) - 1) / 2
        grid[:3, 3] = apply_affine(affine, middle) - apply_affine(grid, middle)
        volume, affine = resample_to_box(volume, affine, grid, volume.shape, outside=float(volume.min())), grid
    values = torch.from_numpy(np.ascontiguousarray(volume[None], dtype=np.float32))
    return metatensor_to_itk_image(MetaTensor(values, affine=torch.from_numpy(affine)), dtype=np.float32)
