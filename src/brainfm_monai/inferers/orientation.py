"""The header against the anatomy: a head turned in its grid is recognised by what the network makes of its turns."""

import logging
from collections.abc import Callable
from itertools import permutations, product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as nnf
from monai.data import MetaTensor
from monai.inferers import Inferer
from torch import Tensor

from brainfm_monai.inferers.two_stage import WHOLE, head_box, pad_to_multiple
from brainfm_monai.networks import MultiTaskNet
from brainfm_monai.tasks import TaskLayout

logger = logging.getLogger(__name__)

SAMPLE = 4  # voxels of 1 mm from point to point of the first result that is judged
COARSE = 2  # further pooling of the backbone's grid, 2 mm, for the candidates: 4 mm
MULTIPLE = 16  # of the size of an image, which the poolings of the network need
# Misfit in mm of 1 mm scans as they should be, and turned (t1_crop): 3 at 2 mm against 13 and more for every other turn
# that was tried; 7.5 at 4 mm against 12.6 and more.
UNSURE_MM = 8.0
CONFIRMED = 4  # best turns at 4 mm that are looked at again at 2 mm: 4 mm alone do not decide for a brain without skull
CLEARER = 0.75  # the turn has at most so much of the misfit of the header's axes
MINIMUM_POINTS = 500
LARGEST_MISFIT_MM = 1000.0  # of a volume without a brain
ENDS = (("left", "right"), ("posterior", "anterior"), ("inferior", "superior"))


def list_turns() -> list[np.ndarray]:
    """The 24 rotations by right angles as matrices (3, 3), the one that changes nothing first; a mirror is none.

    A row has the axis of the given volume that becomes an axis of the turned volume, -1 where its direction changes.
    """
    ways = product(permutations(range(3)), product((1, -1), repeat=3))
    matrices = (np.eye(3, dtype=int)[list(axes)] * np.array(signs)[:, None] for axes, signs in ways)
    return [matrix for matrix in matrices if np.linalg.det(matrix) > 0]


def apply_turn(matrix: np.ndarray, volume: Tensor) -> Tensor:
    """Turn a volume of shape (B, C, H, W, D); the transposed matrix turns it back."""
    axes, signs = np.abs(matrix).argmax(1), matrix.sum(1)
    moved = volume.permute(0, 1, *(2 + int(axis) for axis in axes))
    return moved.flip([2 + i for i in range(3) if signs[i] < 0]).contiguous()


def describe_turn(matrix: np.ndarray) -> str:
    """Angle, and where the head's right, front and top lie by the header."""
    degrees = np.degrees(np.arccos(np.clip((np.trace(matrix) - 1) / 2, -1, 1)))
    right, front, top = (ENDS[int(np.abs(row).argmax())][int(row.sum() > 0)] for row in matrix)
    return f"by {degrees:.0f} degrees, its right, front and top lie where the header says {right}, {front} and {top}"


def misfit(brain: Tensor, coordinates: Tensor, voxel_mm: float) -> float:
    """How badly MNI coordinates fit the voxels that they are of: an upright brain's are nearly an affine map of them.

    A network that sees a head from an unknown side gives coordinates that lie together and scatter. The misfit is the
    median distance in mm from the affine map that fits best, divided by the smallest stretch of that map. It is large
    where there is hardly a brain, or where the map mirrors or turns the brain by more than 60 degrees.

    ``brain`` is a mask, (H, W, D), the coordinates are in mm, (3, H, W, D), and voxels have ``voxel_mm``.
    """
    points = brain.nonzero().double().cpu().numpy() * voxel_mm
    if len(points) * voxel_mm**3 < MINIMUM_POINTS:
        return LARGEST_MISFIT_MM
    target = coordinates[:, brain].double().cpu().numpy().T
    matrix = np.column_stack([points, np.ones(len(points))])
    fit = np.linalg.lstsq(matrix, target, rcond=None)[0]
    rest_mm = float(np.median(np.linalg.norm(matrix @ fit - target, axis=1)))
    left, stretch, right = np.linalg.svd(fit[:3].T)
    if np.linalg.det(left @ right) < 0 or np.trace(left @ right) < 2.0:  # trace of a turn by 60 degrees
        return LARGEST_MISFIT_MM
    return min(rest_mm / max(float(stretch.min()), 1e-3), LARGEST_MISFIT_MM)


class OrientationInferer(Inferer):
    """Run another inferer, and look whether the head lies in its grid as the header says.

    Where the MNI coordinates of the result fit the voxels badly, the network sees the head in voxels of 4 mm from all
    24 sides, and the best of them again in its own voxels. A turn that fits clearly better than the header's axes, or
    none, is a warning in the metadata of the image. With ``fix`` the turned head is inferred, and its maps are brought
    back to the grid that was given. Without segmentation or MNI coordinates in the layout nothing is compared. A head
    that is only mirrored cannot be recognised: its anatomy is that of another head.
    """

    def __init__(self, inferer: Inferer, layout: TaskLayout, fix: bool = False) -> None:
        super().__init__()
        self.inferer, self.layout, self.fix = inferer, layout, fix

    def __call__(self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Map images of shape (B, 1, H, W, D) to what the inferer gives; a turn is looked for in batches of one."""
        output: Tensor = self.inferer(inputs, network, *args, **kwargs)
        maps = output.shape[1] in (self.layout.channels, self.layout.label_channels)  # else features
        compares = maps and {"segmentation", "mni"} <= set(self.layout.tasks)
        if not (compares and len(inputs) == 1 and isinstance(network, MultiTaskNet)):
            return output
        image, found = (x.as_tensor() if isinstance(x, MetaTensor) else x for x in (inputs, output))
        first = self._misfit(found[:, :, ::SAMPLE, ::SAMPLE, ::SAMPLE], float(SAMPLE))
        if first < UNSURE_MM:
            return output
        turn = self.find_turn(image, network, first)
        if turn is None:
            usual = f"misfit {first:.0f} mm, {UNSURE_MM:.0f} at most are usual"
            rule = "no turn of the head fits clearly better: look at the orientation and at the segmentation"
            message = f"the MNI coordinates do not fit the brain ({usual}), and {rule}"
        else:
            rule = "turned back by --fix_orientation" if self.fix else "pass --fix_orientation True to turn it back"
            turned = f"the head is turned {describe_turn(turn)}"
            message = f"the orientation of the header does not fit the anatomy: {turned}; {rule}"
        _add_warning(inputs, message)
        if turn is None or not self.fix:
            return output
        upright = apply_turn(turn.T, self.inferer(apply_turn(turn, image), network, *args, **kwargs))
        return MetaTensor(upright).copy_meta_from(output) if isinstance(output, MetaTensor) else upright

    def find_turn(self, image: Tensor, network: MultiTaskNet, first_mm: float) -> np.ndarray | None:
        """The turn that fits better than the axes of an image, (1, 1, H, W, D), with a misfit of so many mm, if any."""
        head = image[(*WHOLE, *head_box(image))]
        if min(head.shape[2:]) < network.stride * COARSE:
            return None  # too thin to be seen in coarse voxels
        fine = network.pool(head)
        coarse, turns = nnf.avg_pool3d(fine, COARSE), list_turns()
        scores = [self._look(apply_turn(turn, coarse), network, COARSE) for turn in turns]
        ranked = [int(i) for i in np.argsort(scores) if i > 0][:CONFIRMED]
        limit = min(CLEARER * first_mm, UNSURE_MM)
        return next((turns[i] for i in ranked if self._look(apply_turn(turns[i], fine), network) < limit), None)

    def _look(self, image: Tensor, network: MultiTaskNet, pooled: int = 1) -> float:
        """Misfit of one pass through the backbone, whose image has its voxels, ``pooled`` times larger."""
        features = network.backbone(pad_to_multiple(image, MULTIPLE))
        output = network.head(features[(*WHOLE, *map(slice, image.shape[2:]))])
        missing = self.layout.channels - output.shape[1]  # those of a context head, which the misfit does not need
        return self._misfit(nnf.pad(output, [0, 0, 0, 0, 0, 0, 0, missing]), float(network.stride * pooled))

    def _misfit(self, output: Tensor, voxel_mm: float) -> float:
        maps = self.layout.split(output.float())
        labels = maps["segmentation"]
        labels = labels[0, 0].long() if labels.shape[1] == 1 else labels[0].argmax(0)
        brain = torch.as_tensor(self.layout.protocol.is_brain).to(labels.device)[labels]
        return misfit(brain, 100.0 * maps["mni"][0], voxel_mm)  # MNI coordinates leave the network in units of 100 mm


def _add_warning(image: Tensor, message: str) -> None:
    """Add a line to the warnings in the metadata of an image; collated metadata are lists."""
    logger.warning(message)
    if isinstance(image, MetaTensor):
        given = image.meta.get("warnings", "")
        lines = [line for line in [*(given if isinstance(given, list) else [given]), message] if line]
        image.meta["warnings"] = ["\n".join(lines)] if isinstance(given, list) else "\n".join(lines)
