"""Batch inference on a machine without a GPU, and a datastore that refuses files that are no scans."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from fastapi import HTTPException
from monailabel.datastore.local import LocalDatastore
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.batch_infer import BatchInferTask

from brainfm_monai.io import ScanError, first_line, read_scan

__all__ = ["ScanBatch", "ScanDatastore"]


class ScanBatch(BatchInferTask):
    """Batch inference that takes the request of 3D Slicer, which asks for several GPUs where there is none."""

    def __call__(self, request: dict[str, Any], datastore: Datastore, infer: Callable[..., Any]) -> dict[str, Any]:
        """Segment the scans of a datastore; a scan that fails is reported in its result, and the others are done."""

        def infer_one(single: dict[str, Any], store: Datastore) -> dict[str, Any]:
            try:
                result: dict[str, Any] = infer(single, store)
            except HTTPException as error:
                result = {"error": error.detail}
            return result

        many = bool(request.get("multi_gpu", True)) and torch.cuda.device_count() > 0
        whole: dict[str, Any] = super().__call__({**request, "multi_gpu": many, "max_workers": 1}, datastore, infer_one)
        return whole


class ScanDatastore(LocalDatastore):
    """Local datastore that checks an uploaded scan before the scan enters the list."""

    def add_image(self, image_id: str, image_filename: str, image_info: dict[str, Any]) -> str:
        """Add a scan.

        Raises:
            HTTPException: with status 422 if the file is no scan that can be used.
        """
        try:
            read_scan(image_filename)
        except ScanError as error:
            raise HTTPException(422, first_line(error).replace(image_filename, image_id)) from error
        name: str = super().add_image(image_id, image_filename, image_info)
        return name
