"""Training on corrected scans."""

from __future__ import annotations

from typing import Any

from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.train import TrainTask

from brain_app.segmentation import SegmentationTask

__all__ = ["FineTuning"]


class FineTuning(TrainTask):
    """Fine-tuning of the weights in use on the corrected scans."""

    def __init__(self, task: SegmentationTask, conf: dict[str, str]) -> None:
        super().__init__("Fine-tuning on corrected scans")
        self.task, self.conf = task, conf

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any]:
        """Not there yet."""
        raise NotImplementedError
