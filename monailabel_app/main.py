"""MONAI Label app of the bundle: segmentation, the other maps, uncertainty, scribbles and training."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from brain_app.batch import ScanBatch, ScanDatastore
from brain_app.maps import MapTask, available_maps
from brain_app.sampling import Uncertainty
from brain_app.scribbles import GaussianMixtureScribbles, HistogramScribbles
from brain_app.segmentation import SegmentationTask
from brain_app.slicer import make_script
from brain_app.training import FineTuning
from fastapi import HTTPException
from fastapi.responses import PlainTextResponse
from monailabel.config import settings
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.infer_v2 import InferTask
from monailabel.interfaces.tasks.strategy import Strategy
from monailabel.interfaces.tasks.train import TrainTask
from monailabel.tasks.activelearning.first import First
from monailabel.tasks.activelearning.random import Random

logger = logging.getLogger(__name__)

MODEL = "brain_multitask"


class MyApp(MONAILabelApp):
    """The app.

    Args:
        app_dir: folder of this file.
        studies: folder of scans, or address of a DICOMweb archive.
        conf: ``bundle``: folder of the bundle, that beside this folder if not given; ``structures``: ``head`` or ``brain``.
    """

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        bundle = Path(conf.get("bundle") or Path(app_dir).parent / "bundle")
        self.segmentation = SegmentationTask(str(bundle.resolve()), conf)
        super().__init__(
            app_dir,
            studies,
            conf,
            name="brainfm-monai",
            description="Brain scans of any contrast: structures, other contrasts, distances, bias field",
            version=str(self.segmentation.version),
        )
        self._serve_slicer_script()

    def init_datastore(self) -> Datastore:
        """A folder of scans, checked on upload; archives as MONAI Label has them."""
        if self.studies.startswith(("http://", "https://")):
            return super().init_datastore()
        return ScanDatastore(
            self.studies,
            extensions=settings.MONAI_LABEL_DATASTORE_FILE_EXT,
            auto_reload=settings.MONAI_LABEL_DATASTORE_AUTO_RELOAD,
            read_only=settings.MONAI_LABEL_DATASTORE_READ_ONLY,
        )

    def init_infers(self) -> dict[str, InferTask]:
        """Segmentation, all maps, every map alone, and scribbles."""
        layout = self.segmentation.bundle_config.get_parsed_content("layout")
        maps = {tag: MapTask(self.segmentation, self.datastore, tag) for tag in available_maps(layout)}
        scribbles = {"histogram": HistogramScribbles(), "gaussian_mixture": GaussianMixtureScribbles()}
        return {MODEL: self.segmentation, "brain_maps": MapTask(self.segmentation, self.datastore), **maps, **scribbles}

    def init_trainers(self) -> dict[str, TrainTask]:
        """Fine-tuning on the corrected scans."""
        return {MODEL: FineTuning(self.segmentation)}

    def init_strategies(self) -> dict[str, Strategy]:
        """The least certain scan, any scan, the first scan."""
        return {"uncertainty": Uncertainty(self.segmentation), "random": Random(), "first": First()}

    def init_batch_infer(self) -> Callable[..., Any]:
        """Batch inference that takes the request of 3D Slicer."""
        return ScanBatch()

    def infer(self, request: dict[str, Any], datastore: Datastore | None = None) -> dict[str, Any]:
        """Run a task on a scan of the datastore or on a file that came with the request.

        Raises:
            HTTPException: with status 404 if there is no such task or scan.
        """
        store, image = datastore or self.datastore(), str(request.get("image"))
        if request.get("model") not in self._infers:
            raise HTTPException(404, f"{request.get('model')}: one of {', '.join(self._infers)} is needed")
        if not Path(image).exists():
            if not store.get_image_uri(image):
                raise HTTPException(404, f"{image}: a scan of the datastore is needed, found no such scan")
            request = {**request, "image_id": image}
        result: dict[str, Any] = super().infer(request, store)
        return result

    def info(self) -> dict[str, Any]:
        """What clients read at the start, with the colours of the structures."""
        known: dict[str, Any] = super().info()
        return {**known, "colours": {name: s.colour for name, s in self.segmentation.structures.items()}}

    def _serve_slicer_script(self) -> None:
        """Add ``/slicer.py`` to the server, if this process is the server."""
        server = sys.modules.get("monailabel.app")
        if server is None:
            return
        address = f"http://127.0.0.1:{settings.MONAI_LABEL_SERVER_PORT}"
        script = PlainTextResponse(make_script(address, self.segmentation.structures.values()))
        server.app.add_api_route("/slicer.py", lambda: script, methods=["GET"], include_in_schema=False)
