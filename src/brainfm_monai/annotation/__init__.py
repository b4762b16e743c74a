"""What a MONAI Label server needs: settings, structures of a label map, uncertainty, training on corrected scans."""

import json
import logging
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
import torch.nn.functional as nnf
from ignite.engine import Engine, Events
from monai.bundle import ConfigWorkflow
from monai.transforms import CropForeground
from torch import Tensor

from brainfm_monai.anatomy import Protocol
from brainfm_monai.io import ScanError, bundle_arguments, read_labels, read_scan, refuse_if, write_text, write_whole
from brainfm_monai.networks import MultiTaskNet
from brainfm_monai.tasks import TaskLayout
from brainfm_monai.transforms import SplitTasksd

logger = logging.getLogger(__name__)

NOT_STRUCTURES = {"background", "background-scribbles", "foreground-scribbles"}  # segments of clients
VALUE_KEYS = ("idx", "id", "value")  # how clients call the value of a segment
FOREGROUND = 0.05  # intensity above which a voxel belongs to the head, as at inference
MULTIPLE = 32  # sides of the network's input, in voxels
FOLDER = "training_label"  # in the bundle: prepared subjects, and what a training reports
PROGRESS = "progress.json"
SMALLEST_GAIN = 0.01  # of a structure's Dice with the corrected labels, for which its new weights are taken
Items = Sequence[Mapping[str, Any]]
REAL = {"T1w": 1.0, "T2w": 1.0, "FLAIR": 1.0, "CT": 80.0}  # value of a real image that the network sees as 1
GRID_TOLERANCE_MM = 1e-2  # between the affines of a scan and of its label map, which clients write in float32


def choose(use_click: bool | None, displayed: Any, value: Any) -> Any:
    """A setting of a click in MONAI Label, which adds ``use_click`` to a config; of any other run it is the ``value``.

    What is ``displayed`` is a list of choices, the fastest first, until a client has chosen one.
    """
    offered = displayed[0] if isinstance(displayed, list) else displayed
    return value if use_click is None else offered


def read_label_info(label: str | Path) -> list[dict[str, Any]]:
    """What a client said about a label map ``STUDIES/labels/TAG/ID.nii.gz`` of MONAI Label: its segments, or none."""
    path = Path(label)
    try:
        objects = json.loads((path.parents[2] / "datastore_v2.json").read_text(encoding="utf-8"))["objects"].values()
        infos = [entry["labels"][path.parent.name]["info"] for entry in objects if path.parent.name in entry["labels"]]
        return next((list(info.get("label_info") or []) for info in infos if info.get("name") == path.name), [])
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError):
        return []  # a label map from elsewhere


def match_structures(values: Collection[int], label_info: Items, protocol: Protocol, source: str) -> dict[int, int]:
    """FreeSurfer id by value, for each value of a label map, and for the background.

    3D Slicer numbers the segments that are left, in their order; names say which structure a value is. Values are those
    of the entries (``idx``) if all values of the map are among them, else positions in the list: Slicer counts
    scribbles in ``idx`` and leaves them out of the map. Without entries, values are labels of the protocol. ScanError,
    which begins with ``source``, if a value has no name, or an unknown one.
    """
    names = {s.label: s.name for s in protocol.structures}
    if label_info:
        given = {next((e[key] for key in VALUE_KEYS if key in e), None): str(e.get("name", "")) for e in label_info}
        names = {int(value): name for value, name in given.items() if value is not None}
        if not set(values) <= set(names):
            names = {number: str(entry.get("name", "")) for number, entry in enumerate(label_info, start=1)}
    id_of = {_plain(s.name): s.freesurfer_id for s in protocol.structures[1:]} | dict.fromkeys(NOT_STRUCTURES, 0)
    ids = {0: 0}
    for value in sorted(set(values) - {0}):
        name = names.get(value, "")
        rule = f"{source}: segments must have names of the model's structures"
        found = f"'{name}'" if name else "a value without a name"
        refuse_if(_plain(name) not in id_of, rule, f"{found} (value {value})", ScanError)
        ids[value] = id_of[_plain(name)]
    return ids


def _plain(name: str) -> str:
    """A name without differences of case and separators, which clients change."""
    return "-".join(name.lower().replace("_", " ").replace("-", " ").split())


@torch.no_grad()
def brain_uncertainty(network: MultiTaskNet, image: Tensor) -> float:
    """Mean entropy of the labels within the brain, relative to its maximum, in [0, 1]; 1 where no brain is found.

    See Settles, *Active learning literature survey*, 2009, section 3.1. The network is in evaluation mode; the image is
    (1, 1, H, W, D), RAS+, of 1 mm, in [0, 1].
    """
    if not (image > FOREGROUND).any():
        return 1.0
    head: Any = CropForeground(lambda voxels: voxels > FOREGROUND, k_divisible=MULTIPLE)(image[0])
    layout = TaskLayout(["segmentation"], network.layout.protocol)
    logits = network.head(network.encode(head.as_tensor()[None]))[0, : layout.channels]
    logits = logits - logits.amax(0)  # the entropy of large ones is a difference of large numbers
    maps = SplitTasksd("labels", layout, probabilities=True)({"labels": logits})
    brain = torch.as_tensor(layout.protocol.is_brain, device=logits.device)[maps["labels"].as_tensor().long()]
    return float(maps["entropy"][brain].mean()) if brain.any() else 1.0


def train_from_server(items: Items, bundle: str | Path, first_handler: Any, device: str, max_epochs: int) -> None:
    """Take over from ``train.json`` if MONAI Label's own task runs it: its items are scans with corrected labels.

    Its first handler loads the weights in use. The program ends after it: no training on subjects starts.
    """
    if not items or "label" not in items[0] or "generation_labels" in items[0]:
        return
    weights = Path(getattr(first_handler, "load_path", None) or "model.pt").name
    fine_tune(items, bundle, weights, device=device, max_epochs=max_epochs)
    raise SystemExit(0)


def fine_tune(items: Items, bundle: str | Path, weights: str = "model.pt", **overrides: Any) -> Path:
    """Fine-tune a file of ``models`` on the items of :func:`prepare_corrected`; returns ``models/model_tuned_N.pt``.

    ``overrides`` replace values of ``label_train.json`` and ``train.json``, such as ``max_epochs`` and ``device``.
    ValueError of one line if there is no corrected scan that can be used.
    """
    bundle = Path(bundle)
    start, target = bundle / "models" / weights, _next_weights(bundle)
    subjects = prepare_corrected(items, bundle / FOLDER / "subjects")
    logger.info("fine-tuning %s on %d corrected scans", weights, len(subjects))
    arguments = bundle_arguments(bundle, ["train.json", "label_train.json"]) | {"logging_file": False}
    arguments |= {"weights": str(start), "output_dir": str(bundle / FOLDER), "train#dataset#data": subjects}
    workflow = ConfigWorkflow(workflow_type="train", **arguments | overrides)
    workflow.initialize()
    workflow.run()
    network, data = (workflow.parser.get_parsed_content(name) for name in ("network", "train#dataset"))
    old = torch.load(start, map_location="cpu", weights_only=True)
    state = keep_gains(network, [data[i] for i in range(len(subjects))], old)
    with write_whole(target) as partial:
        torch.save({key: value.half().cpu() for key, value in state.items()}, partial)
    workflow.finalize()
    logger.info("%s: new weights; %s stays as it was", target.name, weights)
    return target


def prepare_corrected(items: Items, folder: Path) -> list[dict[str, Any]]:
    """Items of a datalist out of corrected scans: the scan is a real image, and the labels are also painted.

    Items have paths, ``image`` and ``label``, and perhaps ``label_info``, see :func:`match_structures`. Subjects in the
    ``folder`` are prepared once. ValueError if there are no items, or, with the first reason, if none can be used.
    """
    refuse_if(not items, "training: a corrected scan is needed", "none: save a label (Submit Label) first")
    from brainfm_monai.data.prepare import prepare_label  # the extra "prepare"

    protocol = Protocol.load("synthseg_head")
    subjects, faults = [], []
    for item in items:
        image, label = str(item["image"]), str(item["label"])
        try:
            values = np.unique(read_labels(label).values).tolist()
            info = item.get("label_info") or read_label_info(label)
            ids = match_structures(values, info, protocol, Path(label).name)
            subjects.append(prepare_label(_cut_to_labels(image, label, ids, protocol, folder), label, folder, ids=ids))
        except (ValueError, OSError) as error:
            faults.append(str(error))
            logger.error("%s", error)
    if not subjects:
        raise ValueError(faults[0])
    return subjects


def _cut_to_labels(image: str, label: str, ids: Mapping[int, int], protocol: Protocol, folder: Path) -> str:
    """The scan, without what is outside the labels if nobody labelled the head: unlabelled skin is not background."""
    head = {s.freesurfer_id for s in protocol.structures if protocol.is_head[s.label]}
    if head & set(ids.values()):
        return image
    scan, labels = read_scan(image), read_labels(label)
    shape = labels.values.shape
    is_same = scan.values.shape == shape and np.allclose(scan.affine, labels.affine, atol=GRID_TOLERANCE_MM)
    refuse_if(not is_same, f"{label}: labels of the brain alone must have the grid of the scan", shape, ScanError)
    path = folder / "brains" / Path(image).name
    with write_whole(path) as partial:
        nib.save(nib.Nifti1Image(scan.values * (labels.values > 0), scan.affine), partial)
    return str(path)


def _next_weights(bundle: Path) -> Path:
    """A name that no weights have yet."""
    endings = [path.stem.rsplit("_", 1)[1] for path in bundle.glob("models/model_tuned_*.pt")]
    return bundle / "models" / f"model_tuned_{max([0, *(int(n) for n in endings if n.isdigit())]) + 1}.pt"


class EpochReport:
    """Reports the progress of a training: one line in the log, and a JSON file that clients see as a progress bar."""

    def __init__(self, path: str | Path) -> None:
        self.path, self.began, self.losses = Path(path), time.time(), list[Tensor]()

    def attach(self, engine: Any) -> None:
        """Attach to a :class:`~brainfm_monai.engines.MultiTaskTrainer`."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, lambda: self.losses.append(engine.state.output["loss"]))
        engine.add_event_handler(Events.STARTED | Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Report an epoch."""
        epoch, epochs = engine.state.epoch, engine.state.max_epochs
        loss = float(torch.stack(self.losses).mean()) if self.losses else None
        report = {"epoch": epoch, "total_epochs": epochs, "start_ts": int(self.began), "loss": loss}
        write_text(self.path, json.dumps(report))
        if self.losses:
            logger.info("epoch %d of %d: loss %.3f, %.0f s", epoch, epochs, loss, time.time() - self.began)
        self.losses.clear()


@torch.no_grad()
def keep_gains(network: MultiTaskNet, items: Items, old: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights before a training, with the new rows of the head for the structures that the training brought nearer.

    Of these the Dice with the corrected labels of all scans rose by :data:`SMALLEST_GAIN`, or the annotators deleted
    the structure and it shrank by that share. The network comes from the training, and has the ``old`` weights
    afterwards; the items are as :class:`~brainfm_monai.data.loading.HoldSubjectd` holds them.
    """
    new = {key: value.clone() for key, value in network.state_dict().items()}
    rows, protocol = network.layout.slices["segmentation"], network.layout.protocol
    pairs = torch.stack([_count_pairs(network, state, items) for state in (new, old)])
    (size, old_size), present = pairs.sum(2), pairs[0].sum(0)
    dice, old_dice = 2 * pairs.diagonal(dim1=1, dim2=2) / (pairs.sum(1) + pairs.sum(2)).clamp_min(1)
    # a deleted structure has no Dice; tissues of the head are absent because nobody labelled the head
    deleted = (present == 0) & torch.as_tensor(protocol.is_brain, device=present.device)
    gain = torch.where(deleted, (old_size - size) / old_size.clamp_min(1), dice - old_dice)
    gain[0] = 0  # the rows of the structures decide
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


def _count_pairs(network: MultiTaskNet, weights: Mapping[str, Tensor], items: Items) -> Tensor:
    """Voxels of all items by the label that is predicted (rows) and the corrected one (columns)."""
    network.load_state_dict(weights)
    network.eval()
    device, layout = network.head.weight.device, network.layout
    rows, count = layout.slices["segmentation"], len(layout.protocol)
    pairs = torch.zeros(count**2, device=device)
    for item in items:
        name = next(name for name in REAL if item.get(f"real_{name}"))
        pred = network((item[name].to(device) / REAL[name]).clamp(0, 1)[None])[0, rows].argmax(0)
        label = nnf.interpolate(item["segmentation"][None].to(device), pred.shape, mode="nearest-exact")[0, 0].long()
        pairs += torch.bincount((count * pred + label).flatten(), minlength=count**2)
    return pairs.reshape(count, count)
