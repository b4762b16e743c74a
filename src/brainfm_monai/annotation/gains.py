"""Weights after a training on corrected scans: the new ones where they help, the old ones everywhere else."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

from brainfm_monai.networks import MultiTaskNet

logger = logging.getLogger(__name__)

SMALLEST_GAIN = 0.01  # of a structure's Dice with the corrected labels, for which its new weights are taken
Items = Sequence[Mapping[str, Any]]
REAL = {"T1w": 1.0, "T2w": 1.0, "FLAIR": 1.0, "CT": 80.0}  # value of a real image that the network sees as 1


@torch.no_grad()
def keep_gains(network: MultiTaskNet, items: Items, old: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights before a training, with the new rows of the head for the structures that the training brought nearer.

    A structure is taken if its Dice with the corrected labels, over all corrected scans, rose by :data:`SMALLEST_GAIN`,
    or if the annotators deleted it and it shrank by that share. All other structures and maps stay as they were: what
    nobody corrected does not drift. The network comes from the training, for scans in the voxels of its backbone, and
    has the ``old`` weights afterwards; the items are as :class:`~brainfm_monai.data.loading.HoldSubjectd` holds them.
    """
    new = {key: value.clone() for key, value in network.state_dict().items()}
    rows, protocol = network.layout.slices["segmentation"], network.layout.protocol
    (dice, size, _), (old_dice, old_size, absent) = (_compare(network, state, items) for state in (new, old))
    shrunk = (old_size - size) / old_size.clamp_min(1)
    # a deleted structure has no Dice; tissues of the head are absent because nobody labelled the head
    gain = torch.where(absent & torch.as_tensor(protocol.is_brain, device=absent.device), shrunk, dice - old_dice)
    gained = (gain > SMALLEST_GAIN).nonzero().flatten().tolist()
    if not gained and gain.max() > 0:
        gained = [int(gain.argmax())]
    names = ", ".join(protocol.structures[label].name for label in gained)
    logger.info("structures nearer to the corrected labels: %s", names or "none, so that the weights are the old ones")
    chosen, state = [rows.start + label for label in gained], dict(old)
    for key in ("head.weight", "head.bias"):
        state[key] = old[key].to(new[key].device, torch.float32, copy=True)
        state[key][chosen] = new[key][chosen].float()
    return state


def _compare(network: MultiTaskNet, weights: Mapping[str, Tensor], items: Items) -> tuple[Tensor, Tensor, Tensor]:
    """Of each structure (0 for the background): Dice with the labels, predicted voxels, whether no label has it."""
    network.load_state_dict(weights)
    network.eval()
    rows, device = network.layout.slices["segmentation"], network.head.weight.device
    overlap, pred_size, label_size = torch.zeros(3, len(network.layout.protocol), device=device)
    for item in items:
        name = next(name for name in REAL if item.get(f"real_{name}"))
        pred = network((item[name].to(device) / REAL[name]).clamp(0, 1)[None])[0, rows].argmax(0)
        label = nnf.interpolate(item["segmentation"][None].to(device), pred.shape, mode="nearest-exact")[0, 0].long()
        for counts, voxels in ((overlap, pred[pred == label]), (pred_size, pred), (label_size, label)):
            counts += torch.bincount(voxels.flatten(), minlength=len(counts))
    dice = 2 * overlap / (pred_size + label_size).clamp_min(1)
    dice[0] = 0  # the rows of the structures decide
    return dice, pred_size, label_size == 0
