"""Boundaries of the cortex at the resolution of the scan, and the labels of cortex and white matter by them."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from monai.config import KeysCollection
from monai.data import MetaTensor
from monai.transforms import MapTransform
from monai.transforms.utils import generate_spatial_bounding_box
from monai.utils import convert_to_tensor
from torch import Tensor

from brainfm_monai.tasks import MAX_DISTANCE_MM, TaskLayout
from brainfm_monai.transforms.maps import MODES
from brainfm_monai.transforms.refinement import measure_white

HEMISPHERES = {"l": (2, 3), "r": (41, 42)}  # by channel letter: FreeSurfer ids of white matter and cortex
LEAST_WEIGHT = 0.5  # the scan counts more than the prediction
MIDLINE_MM = 0.1  # least distance of a boundary from where both hemispheres are equally deep
MOVED_SHARE = 0.5  # of a voxel whose label changes: at a boundary both labels have about half of the probability
MARGIN = 3  # voxels around a hemisphere in which the scan is looked at


class Boundaries(NamedTuple):
    """Where the boundaries of the cortex are taken to be."""

    distance: dict[str, Tensor]  # signed distances by channel name, (H, W, D), with their zero at the boundaries
    # by channel letter, (H, W, D), int8: 1 white matter, -1 cortex, as the scan shows it; 0: the prediction counts more
    shown: dict[str, Tensor]


def find_boundaries(
    distance: Mapping[str, Tensor],
    voxel_mm: float = 1.0,
    levels_mm: Sequence[float] = (0.0, 0.0),
    image: Tensor | None = None,
) -> Boundaries:
    """Distances whose zero is where the boundaries are taken to be: what labels, surfaces and ribbon have in common.

    The levels are subtracted, the scan corrects the white surfaces, none comes nearer to the other hemisphere than
    where both are equally deep, and no pial surface lies within the white one.

    Args:
        distance: signed distances ``lp``, ``lw``, ``rp``, ``rw`` in mm, negative inside, shape (H, W, D); a hemisphere
            may be missing.
        voxel_mm: size of the isotropic voxels.
        levels_mm: predicted distance at which the true white and pial boundary stand: 0 for distances without bias.
        image: the scan in the same grid, in [0, 1]; None: the white surface stays where the distance is 0.
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


class FindBoundariesd(MapTransform):
    """Find the boundaries of the cortex, and let cortex and white matter of label maps meet there.

    The entry ``boundaries``, (4, H, W, D) in mm, has the channels of ``distance``, with the zero where the boundaries
    are taken to be, see :func:`find_boundaries`; a hemisphere that the mode leaves out is far from everywhere. A
    network of 2 mm rounds thin gyri: where the scan counts more than the predicted distance, a voxel of cortex or white
    matter gets the label that the scan shows, and all other voxels keep theirs. Of the ``soft_volumes`` half a voxel
    moves with each label that changes, so that their sum stays. Without distances nothing changes, and without cortex
    in the protocol no label does.

    Args:
        keys: label maps, (1, H, W, D), in the grid of the distances; a map may be missing.
        layout: tasks and label protocol.
        levels_mm: predicted distance at which the true white and pial boundary stand.
        mode: name out of :data:`~brainfm_monai.transforms.MODES`.
        relabel: False: labels stay.
    """

    def __init__(
        self,
        keys: KeysCollection,
        layout: TaskLayout,
        levels_mm: Sequence[float] = (0.0, 0.0),
        mode: str = "whole_head",
        relabel: bool = True,
    ) -> None:
        super().__init__(keys, allow_missing_keys=True)
        self.layout, self.levels_mm, self.relabel = layout, tuple(levels_mm), relabel
        self.excluded = MODES[mode].excluded_side[:1]

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Add the boundaries and change the label maps in place; ``image`` is the scan in their grid, in [0, 1]."""
        d = dict(data)
        if "distance" not in d:
            return d
        channels = convert_to_tensor(d["distance"], track_meta=False).float()
        distance = dict(zip(self.layout.tasks["distance"].channel_names, channels, strict=True))
        present = {
            name: one for name, one in distance.items() if not self.excluded or not name.startswith(self.excluded)
        }
        affine = d["distance"].affine
        voxel_mm = float(torch.linalg.det(affine[:3, :3].double()).abs() ** (1 / 3))
        image = convert_to_tensor(d["image"], track_meta=False)[0].to(channels) if "image" in d else None
        found = find_boundaries(present, voxel_mm, self.levels_mm, image)
        far = torch.full_like(channels[0], MAX_DISTANCE_MM)
        d["boundaries"] = MetaTensor(torch.stack([found.distance.get(n, far) for n in distance]), affine=affine)
        label_of_id = self.layout.protocol.label_of_id
        for side, shown in found.shown.items() if self.relabel else ():
            if not set(HEMISPHERES[side]) <= set(label_of_id):
                continue
            white, cortex = (label_of_id[i] for i in HEMISPHERES[side])
            grown = [self._relabel(d[key].as_tensor()[0], shown, [white, cortex]) for key in self.key_iterator(d)]
            if "soft_volumes" in d and grown:
                moved = grown[0] * voxel_mm**3 * MOVED_SHARE
                d["soft_volumes"][white] += moved
                d["soft_volumes"][cortex] -= moved
        return d

    @staticmethod
    def _relabel(labels: Tensor, shown: Tensor, pair: list[int]) -> int:
        """Change labels in place; returns the number of voxels by which white matter grows."""
        both = (labels == pair[0]) | (labels == pair[1])
        before = int((labels == pair[0]).sum())
        labels[both & (shown > 0)], labels[both & (shown < 0)] = pair
        return int((labels == pair[0]).sum()) - before
