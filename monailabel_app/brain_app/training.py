"""Training on corrected scans: one click, one fine-tuning of the weights in use, one new file of weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from monailabel.interfaces.datastore import Datastore, DefaultLabelTag
from monailabel.interfaces.tasks.train import TrainTask
from monailabel.utils.others.generic import device_list, name_to_device

from brain_app.segmentation import SegmentationTask, list_weights
from brainfm_monai.annotation import FOLDER, PROGRESS, fine_tune

__all__ = ["FineTuning"]


class FineTuning(TrainTask):
    """Fine-tuning on all scans with a final label.

    Args:
        task: the segmentation, whose bundle gets the new weights.
    """

    def __init__(self, task: SegmentationTask) -> None:
        super().__init__("Fine-tuning of the weights in use on the corrected scans; the result gets a name of its own")
        self.bundle = Path(task.bundle_path)

    def config(self) -> dict[str, Any]:
        """Settings for clients; the first values are those of ``label_train.json``."""
        defaults = json.loads((self.bundle / "configs" / "label_train.json").read_text(encoding="utf-8"))
        return {
            "device": device_list(),
            "model_filename": list_weights(self.bundle),
            "max_epochs": defaults["max_epochs"],
            "learning_rate": defaults["learning_rate"],
        }

    def stats(self) -> dict[str, Any]:
        """Progress of the newest training, as clients show it."""
        try:
            progress: dict[str, Any] = json.loads((self.bundle / FOLDER / PROGRESS).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return progress

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any]:
        """Train, and return the name of the new weights."""
        chosen = {
            key: value[0] if isinstance(value, list) else value for key, value in {**self.config(), **request}.items()
        }
        weights = fine_tune(
            [_with_names(item, datastore) for item in datastore.datalist()],
            self.bundle,
            str(chosen["model_filename"]),
            device=name_to_device(chosen["device"]),
            max_epochs=int(chosen["max_epochs"]),
            learning_rate=float(chosen["learning_rate"]),
        )
        return {"model_filename": weights.name}


def _with_names(item: dict[str, Any], datastore: Datastore) -> dict[str, Any]:
    """A corrected scan with the names of its segments, as the client saved them."""
    suffixes = "".join(Path(item["label"]).suffixes[-2:])
    image_id = Path(item["label"]).name.removesuffix(suffixes)
    return {**item, "label_info": datastore.get_label_info(image_id, DefaultLabelTag.FINAL).get("label_info", [])}
