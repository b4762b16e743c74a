"""What a MONAI Label server needs to know of a scan: settings of a click, the structures of its labels, how certain they are."""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor

from brainfm_monai.anatomy import Protocol
from brainfm_monai.io import ScanError
from brainfm_monai.networks import MultiTaskNet

DATASTORE = "datastore_v2.json"  # MONAI Label's record of a folder of scans, beside its folder labels/
NOT_STRUCTURES = {"background", "background-scribbles", "foreground-scribbles"}  # segments of clients
VALUE_KEYS = ("idx", "id", "value")  # how clients call the value of a segment
FOREGROUND = 0.05  # intensity above which a voxel belongs to the head, as at inference
MULTIPLE = 32  # sides of the network's input, in voxels
PLANES = 16  # of the network's grid, decoded at a time


def choose(use_click: bool | None, displayed: Any, value: Any) -> Any:
    """A setting of a click in MONAI Label, or of any other run.

    Args:
        use_click: entry that MONAI Label adds to the config of every bundle; ``None`` in any other run, whose ``value`` is returned.
        displayed: what MONAI Label offers in ``displayable_configs``: a list of choices, the fastest first, which is returned,
            until a client has chosen one.
        value: value of any other run.
    """
    offered = displayed[0] if isinstance(displayed, list) else displayed
    return value if use_click is None else offered


def read_label_info(label: str | Path) -> list[dict[str, Any]]:
    """What a client said about a label map in a folder of MONAI Label: entries with ``name`` and ``idx`` of the segments.

    Of ``STUDIES/labels/TAG/ID.nii.gz`` the record ``STUDIES/datastore_v2.json`` is read; empty if it or its entry is absent.
    """
    path = Path(label)
    try:
        objects = json.loads((path.parents[2] / DATASTORE).read_text(encoding="utf-8"))["objects"].values()
        labels = [entry["labels"][path.parent.name] for entry in objects if path.parent.name in entry["labels"]]
        infos = [entry["info"] for entry in labels if entry["info"].get("name") == path.name]
        return list(infos[0].get("label_info") or []) if infos else []
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError):
        return []  # a label map from elsewhere


def match_structures(
    values: Collection[int], label_info: Sequence[Mapping[str, Any]], protocol: Protocol, source: str
) -> dict[int, int]:
    """FreeSurfer id by value, for each value of a label map and the background.

    3D Slicer numbers the segments that are left, in their order: deleting one moves all that follow. The names say which
    structure a value is. Values are those of the entries (``idx``) if all values of the map are among them, else positions in the
    list: Slicer counts scribbles in ``idx`` and leaves them out of the map.

    Args:
        values: of the label map, without the background.
        label_info: entries with ``name`` and a value, as the client sent them; without any, values are labels of the protocol.
        protocol: of the segmentation.
        source: name for messages.

    Raises:
        ScanError: if a value has no name, or a name that the protocol does not know.
    """
    names = {s.label: s.name for s in protocol.structures}
    if label_info:
        segments = [str(entry.get("name", "")) for entry in label_info]
        given = [next((entry[key] for key in VALUE_KEYS if key in entry), None) for entry in label_info]
        by_value = {int(value): name for value, name in zip(given, segments, strict=True) if value is not None}
        names = by_value if set(values) <= set(by_value) else dict(enumerate(segments, start=1))
    id_of = {_plain(s.name): s.freesurfer_id for s in protocol.structures[1:]} | dict.fromkeys(NOT_STRUCTURES, 0)
    ids = {0: 0}
    for value in sorted(set(values) - {0}):
        name = names.get(value)
        if name is None or _plain(name) not in id_of:
            found = "a value without a name" if name is None else f"'{name}'"
            rule = "segments must have names of the model's structures"
            raise ScanError(f"{source}: {rule}, found {found} (value {value})")
        ids[value] = id_of[_plain(name)]
    return ids


def _plain(name: str) -> str:
    """A name without differences of case and separators, which clients change."""
    return "-".join(name.lower().replace("_", " ").replace("-", " ").split())


@torch.no_grad()
def brain_uncertainty(network: MultiTaskNet, image: Tensor) -> float:
    """Mean entropy of the labels within the brain, relative to its maximum, in the grid of the network.

    The entropy of each voxel's probabilities, as in Settles, *Active learning literature survey*, 2009, section 3.1. The maps
    are not interpolated to the grid of the image: the mean hardly differs, and it takes a quarter of the time.

    Args:
        network: in evaluation mode.
        image: shape (1, 1, H, W, D), RAS+ order, voxels of 1 mm, intensities in [0, 1].

    Returns:
        Number in [0, 1]; 1 where no brain is found: such a scan needs a look first.
    """
    occupied = (image[0, 0] > FOREGROUND).nonzero()
    if not len(occupied):
        return 1.0
    first, last = occupied.amin(0).tolist(), (occupied.amax(0) + 1).tolist()
    head = image[:, :, *(slice(a, b) for a, b in zip(first, last, strict=True))]
    head = nnf.pad(head, [extra for size in reversed(head.shape[2:]) for extra in (0, -size % MULTIPLE)])
    features = network.backbone(nnf.avg_pool3d(head, network.stride))
    logits, protocol = network.layout.slices["segmentation"], network.layout.protocol
    is_brain = torch.as_tensor(protocol.is_brain, device=image.device)
    total = count = 0.0
    for part in features.split(PLANES, dim=2):
        log_probabilities = network.head(part)[0, logits].float().log_softmax(0)
        entropy = -(log_probabilities.exp() * log_probabilities).sum(0)
        brain = is_brain[log_probabilities.argmax(0)]
        total, count = total + float(entropy[brain].sum()), count + float(brain.sum())
    return total / count / math.log(len(protocol)) if count else 1.0
