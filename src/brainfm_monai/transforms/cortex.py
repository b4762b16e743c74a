"""Boundaries of the cortex at the resolution of the scan, and the labels of cortex and white matter by them."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as nnf
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.networks.layers import GaussianFilter
from monai.transforms import MapTransform
from monai.transforms.utils import generate_spatial_bounding_box
from monai.utils import convert_to_tensor
from torch import Tensor

from brainfm_monai.tasks import MAX_DISTANCE_MM, TaskLayout
from brainfm_monai.transforms.maps import MODES

HEMISPHERES = {"l": (2, 3), "r": (41, 42)}  # by channel letter: FreeSurfer ids of white matter and cortex
LEAST_WEIGHT = 0.5  # the scan counts more than the prediction
MIDLINE_MM = 0.1  # least distance of a boundary from where both hemispheres are equally deep
MOVED_SHARE = 0.5  # of a voxel whose label changes: at a boundary both labels have about half of the probability
MARGIN = 3  # voxels around a hemisphere in which the scan is looked at
# of what the scan shows of the white surface: where it is halfway between white and grey matter
REACH_MM = 5.0  # standard deviation of the Gaussian over which the intensity of a tissue is averaged
POOLED_MM = 3.0  # voxels in which that is done
SLOPE_MM = 1.5  # way over which the intensity goes from one tissue to the other, in a scan of 1 mm
ERROR_MM = 0.8  # of the predicted white surface: of 0.4, 0.6, 0.8 and 1.2 mm the best, see docs/outputs.md
FARTHEST_MM = (1.2, 2.2)  # from the predicted surface: up to the first the scan counts fully, beyond the second not
LEAST_NOISE = 0.005  # of the range of intensities
LEAST_CONTRAST, FULL_CONTRAST = 0.25, 0.75  # of the median, where the scan counts not at all, and fully
ROBUST_STD = 1.4826  # standard deviation of a normal distribution over its median absolute deviation


class Boundaries(NamedTuple):
    """Where the boundaries of the cortex are taken to be."""

    distance: dict[str, Tensor]  # signed distances by channel name, (H, W, D), with their zero at the boundaries
    # by channel letter, (H, W, D), int8: 1 white matter, -1 cortex, as the scan shows it; 0: the prediction counts more
    shown: dict[str, Tensor]


def find_boundaries(
    distance: Mapping[str, Tensor], voxel_mm: float = 1.0, levels_mm: Sequence[float] = (0.0, 0.0),
    image: Tensor | None = None,
) -> Boundaries:  # fmt: skip
    """Distances whose zero is where the boundaries are taken to be: what labels, surfaces and ribbon have in common.

    The levels are subtracted, the scan corrects the white surfaces, none comes nearer to the other hemisphere than
    where both are equally deep, and no pial surface lies within the white one.

    The distances are ``lp``, ``lw``, ``rp``, ``rw`` in mm, negative inside, shape (H, W, D), in isotropic voxels; a
    hemisphere may be missing. ``levels_mm`` are the predicted distances at which the true white and pial boundary
    stand: 0 for distances without bias. The image is the scan in the same grid, in [0, 1]; without it the white surface
    stays where the distance is 0.
    """
    found: dict[str, Tensor] = {}
    shown: dict[str, Tensor] = {}
    for side, opposite in (("l", "r"), ("r", "l")):
        if f"{side}w" not in distance:
            continue
        pial, has_opposite = distance[f"{side}p"], f"{opposite}w" in distance
        if has_opposite:
            pial = torch.maximum(pial, (pial - distance[f"{opposite}p"]) / 2 + levels_mm[1] + MIDLINE_MM)
        white, pial = distance[f"{side}w"] - levels_mm[0], pial - levels_mm[1]
        inside = torch.minimum(white, pial) < 0
        shown[side] = torch.zeros(white.shape, dtype=torch.int8, device=white.device)
        if image is not None and inside.any():
            ends = generate_spatial_bounding_box(inside[None], margin=MARGIN, allow_smaller=True)
            box = tuple(slice(*pair) for pair in zip(*ends, strict=True))
            measured, weight = measure_white(white[box], pial[box], image[box], voxel_mm)
            white[box] = torch.lerp(white[box], measured, weight)
            shown[side][box] = (weight > LEAST_WEIGHT) * torch.where(white[box] < 0, 1, -1).to(torch.int8)
        if has_opposite:
            white = torch.maximum(white, (white + levels_mm[0] - distance[f"{opposite}w"]) / 2 + MIDLINE_MM)
        found |= {f"{side}p": torch.minimum(pial, white), f"{side}w": white}
    return Boundaries(found, shown)


def measure_white(white: Tensor, pial: Tensor, image: Tensor, voxel_mm: float = 1.0) -> tuple[Tensor, Tensor]:
    """What the scan shows of the white surface; any contrast, as the tissues are taken from the scan.

    The intensity of white and grey matter is averaged over the neighbourhood on either side of the predicted surface.
    The scan's share of white matter then gives a distance of its own. Its weight against the prediction is that of
    inverse variance: the scan counts little where tissues differ little against its noise (CT), and not at all where
    the contrast is another than in most places (ventricles, hippocampus), or outside of the pial surface.

    ``white`` and ``pial`` are the predicted signed distances in mm, negative inside, and the image is in [0, 1]: all of
    shape (H, W, D), as are the measured distance in mm and its weight from 0 to 1.
    """
    near = white.abs() < FARTHEST_MM[0]
    inner = (-white - 0.5).clamp(0, 1) * (white > -2.9)  # distances end at -3 mm
    outer = (white - 0.3).clamp(0, 1) * (-pial - 0.3).clamp(0, 1)
    volumes = torch.stack([inner, inner * image, outer, outer * image])[None]
    larger = [max(round(n * voxel_mm / POOLED_MM), 1) for n in image.shape]
    smooth = GaussianFilter(3, REACH_MM / POOLED_MM)(nnf.interpolate(volumes, size=larger, mode="area"))
    means = nnf.interpolate(smooth, size=image.shape, mode="trilinear")[0]
    white_matter, grey_matter = means[1] / means[0].clamp_min(1e-6), means[3] / means[2].clamp_min(1e-6)
    contrast = white_matter - grey_matter
    core = inner > 0.9
    if not near.any() or not core.any():
        return white, torch.zeros_like(white)
    usual = contrast[near].median()
    unit = torch.where(usual == 0, 1, usual)
    noise = (ROBUST_STD * (image[core] - white_matter[core]).abs().median()).clamp_min(LEAST_NOISE)
    relative = contrast / unit
    share = (image - grey_matter) / (relative.clamp_min(LEAST_CONTRAST) * unit)
    measured = ((0.5 - share) * SLOPE_MM).clamp(-1, 1)
    certainty = usual**2 / (usual**2 + (noise * SLOPE_MM / ERROR_MM) ** 2)
    usable = ((relative - LEAST_CONTRAST) / (FULL_CONTRAST - LEAST_CONTRAST)).clamp(0, 1) * (-pial).clamp(0, 1)
    usable *= ((FARTHEST_MM[1] - white.abs()) / (FARTHEST_MM[1] - FARTHEST_MM[0])).clamp(0, 1)
    return measured, certainty * usable


class FindBoundariesd(MapTransform):
    """Find the boundaries of the cortex, and let cortex and white matter of label maps meet there.

    The entry ``boundaries``, (4, H, W, D) in mm, has the channels of ``distance``, with the zero where the boundaries
    are taken to be, see :func:`find_boundaries`; a hemisphere that the mode leaves out is far from everywhere. A
    network of 2 mm rounds thin gyri: where the scan counts more than the predicted distance, a voxel of cortex or white
    matter gets the label that the scan shows, and all other voxels keep theirs. Of the ``soft_volumes`` half a voxel
    moves with each label that changes, so that their sum stays. Without distances nothing changes, and without cortex
    in the protocol no label does.

    The keys are those of label maps, (1, H, W, D), in the grid of the distances, which may be missing; ``mode`` is a
    name out of :data:`~brainfm_monai.transforms.MODES`. With ``relabel=False`` all labels stay.
    """

    def __init__(
        self, keys: KeysCollection, layout: TaskLayout, levels_mm: Sequence[float] = (0.0, 0.0),
        mode: str = "whole_head", relabel: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(keys, allow_missing_keys=True)
        self.layout, self.levels_mm, self.relabel = layout, tuple(levels_mm), relabel
        self.excluded = MODES[mode].excluded_side[:1]

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Add the boundaries and change the label maps in place; ``image`` is the scan in their grid, in [0, 1]."""
        d = dict(data)
        if "distance" not in d:
            return d
        affine, channels = d["distance"].affine, convert_to_tensor(d["distance"], track_meta=False).float()
        names = self.layout.tasks["distance"].channel_names
        present = {n: one for n, one in zip(names, channels, strict=True) if n[0] != self.excluded}
        voxel_mm = float(torch.linalg.det(affine[:3, :3].double()).abs() ** (1 / 3))
        image = convert_to_tensor(d["image"], track_meta=False)[0].to(channels) if "image" in d else None
        found = find_boundaries(present, voxel_mm, self.levels_mm, image)
        far = torch.full_like(channels[0], MAX_DISTANCE_MM)
        d["boundaries"] = MetaTensor(torch.stack([found.distance.get(n, far) for n in names]), affine=affine)
        label_of_id = self.layout.protocol.label_of_id
        for side, shown in found.shown.items() if self.relabel else ():
            if not set(HEMISPHERES[side]) <= set(label_of_id):
                continue
            white, cortex = (label_of_id[i] for i in HEMISPHERES[side])
            for number, key in enumerate(self.key_iterator(d)):
                labels = d[key].as_tensor()[0]
                to_white, to_cortex = (labels == cortex) & (shown > 0), (labels == white) & (shown < 0)
                labels[to_white], labels[to_cortex] = white, cortex
                if "soft_volumes" in d and number == 0:
                    moved = (int(to_white.sum()) - int(to_cortex.sum())) * voxel_mm**3 * MOVED_SHARE
                    d["soft_volumes"][white] += moved
                    d["soft_volumes"][cortex] -= moved
        return d
