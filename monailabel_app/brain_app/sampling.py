"""Active learning: the scan whose segmentation is the least certain comes next."""

from __future__ import annotations

import logging
from typing import Any

import torch
from fastapi import HTTPException
from monai.transforms import Compose
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.strategy import Strategy
from monailabel.utils.others.generic import name_to_device

from brain_app.segmentation import UNUSABLE, SegmentationTask, guarded, list_weights
from brainfm_monai.annotation import brain_uncertainty

__all__ = ["Uncertainty"]

logger = logging.getLogger(__name__)


class Uncertainty(Strategy):
    """The unlabeled scan with the highest mean entropy of the labels within the brain.

    Scores are kept with the scans and belong to the weights that are in use. A request scores a few scans at most, so that the
    answer comes in time; scans without a score wait for the next request.

    Args:
        task: its network is used.
        scans_per_request: scans that one request scores.
    """

    def __init__(self, task: SegmentationTask, scans_per_request: int = 4) -> None:
        super().__init__("Scan with the least certain segmentation")
        self.task, self.scans_per_request = task, scans_per_request

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> dict[str, Any] | None:
        """Choose the next scan; ``None`` if all are labeled."""
        weights = list_weights(self.task.bundle_path)[0]
        images = datastore.get_unlabeled_images(request.get("label_tag"), request.get("labels"))
        scores = {image: datastore.get_image_info(image).get("uncertainty", {}).get(weights) for image in images}
        for image in [image for image, score in scores.items() if score is None][: self.scans_per_request]:
            scores[image] = self._score(datastore.get_image_uri(image), image, weights)
            datastore.update_image_info(image, {"uncertainty": {weights: scores[image]}})
        known = {image: score for image, score in scores.items() if score is not None}
        if not known:
            return None
        chosen = max(known, key=lambda image: known[image])
        return {"id": chosen, "score": known[chosen], "scored": len(known), "unlabeled": len(images)}

    def _score(self, path: str, image: str, weights: str) -> float:
        """Uncertainty of one scan; 0 for a scan that cannot be used, which is reported."""
        device = name_to_device(None)
        try:
            with guarded(self.task.bundle_path, image):
                data = {
                    **self.task.config(),
                    "image": path,
                    "image_path": path,
                    "device": device,
                    "model_filename": weights,
                }
                scan = Compose(self.task.pre_transforms(data))(data)["image"]
                network = self.task._get_network(device, data)
                with torch.no_grad():
                    return brain_uncertainty(network, scan.as_tensor()[None].to(device))
        except HTTPException as error:
            if error.status_code != UNUSABLE:
                raise
            logger.warning("%s", error.detail)
            return 0.0
