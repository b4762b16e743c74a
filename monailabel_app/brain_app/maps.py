"""Every map of a scan from one pass: the files that `predict` writes, stored in the datastore under tags."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastapi import HTTPException
from monai.bundle import ConfigWorkflow
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType
from monailabel.utils.others.generic import name_to_device

from brain_app.segmentation import SegmentationTask, guarded
from brainfm_monai.io import literal, read_table
from brainfm_monai.tasks import TaskLayout

__all__ = ["MAPS", "MapTask", "available_maps", "predict_maps"]

# tag in the datastore -> task of the network, output of inference.json, end of the file's name
MAPS = {
    "T1w": ("T1w", "contrasts", "desc-synthetic_T1w"),
    "T2w": ("T2w", "contrasts", "desc-synthetic_T2w"),
    "FLAIR": ("FLAIR", "contrasts", "desc-synthetic_FLAIR"),
    "CT": ("CT", "contrasts", "desc-synthetic_ct"),
    "bias_corrected": ("log_bias_field", "bias_field", "desc-biascorrected_image"),
    "bias_field": ("log_bias_field", "bias_field", "biasfield"),
    "distance": ("distance", "distance", "distance"),
    "lesion": ("lesion", "lesion", "label-lesion_probseg"),
}
SETTINGS = ("mode", "mirror", "second_look", "memory")  # of inference.json, that clients may choose
NAME = "scan"


def available_maps(layout: TaskLayout) -> dict[str, str]:
    """Tags of the maps that a network predicts, with the end of their file's name."""
    return {tag: stem for tag, (task, _, stem) in MAPS.items() if task in layout.tasks}


def predict_maps(task: SegmentationTask, image: str, folder: Path, **settings: Any) -> dict[str, Path]:
    """Run the bundle's inference once and write the segmentation, the volumes and every map.

    Args:
        task: its network is used, so that the server holds one copy of the weights.
        image: path of the scan.
        folder: for the results.
        settings: values of ``inference.json``; ``model_filename`` and ``device`` choose the network.

    Returns:
        Files by tag; ``segmentation`` and ``volumes`` beside those of :func:`available_maps`.

    Raises:
        ValueError: if the scan or a setting cannot be used; one line.
    """
    configs = Path(task.bundle_path) / "configs"
    device = name_to_device(settings.pop("device", None))
    network = task._get_network(device, settings)
    layout: TaskLayout = network.layout
    outputs = dict.fromkeys(output for name, output, _ in MAPS.values() if name in layout.tasks)
    workflow = ConfigWorkflow(
        workflow_type="inference",
        config_file=str(configs / "inference.json"),
        meta_file=str(configs / "metadata.json"),
        logging_file=False,
        bundle_root=literal(task.bundle_path),
        scans=[{"image": literal(image), "name": NAME}],
        output_dir=literal(str(folder)),
        outputs=["segmentation", "volumes", *outputs],
        weights=literal(str(Path(task.bundle_path) / "models" / _first(settings.pop("model_filename")))),
        network_def=network,
        device=device,
        **settings,
    )
    try:
        workflow.initialize()
        workflow.run()
    except SystemExit as end:  # how the config reports a scan or weights that cannot be used
        raise ValueError(str(end)) from end
    finally:
        workflow.finalize()
    files = {tag: folder / NAME / f"{NAME}_{stem}.nii.gz" for tag, stem in available_maps(layout).items()}
    return {
        "segmentation": folder / NAME / f"{NAME}_dseg.nii.gz",
        "volumes": folder / NAME / f"{NAME}_volumes.tsv",
        **{tag: path for tag, path in files.items() if path.is_file()},
    }


class MapTask(InferTask):
    """One map of a scan, or the segmentation and all maps.

    A pass makes all maps and stores them; further requests of the same scan, weights and settings are answered from the store.

    Args:
        segmentation: the task whose network and settings are used.
        datastore: where the maps are kept.
        tag: of the map that is returned; ``None``: the segmentation is returned, with the addresses of all maps.
    """

    def __init__(
        self, segmentation: SegmentationTask, datastore: Callable[[], Datastore], tag: str | None = None
    ) -> None:
        text = f"{tag} of the scan" if tag else "Segmentation, and every map under a tag of its own"
        kind, labels = (InferType.OTHERS, []) if tag else (InferType.SEGMENTATION, segmentation.labels)
        super().__init__(kind, labels, 3, f"{text}, from one pass of the network")
        self.segmentation, self.datastore, self.tag = segmentation, datastore, tag

    def is_valid(self) -> bool:
        """Always: the segmentation's network is there."""
        return True

    def config(self) -> dict[str, Any]:
        """Settings for clients: those of the segmentation."""
        return {k: v for k, v in self.segmentation.config().items() if k in (*SETTINGS, "model_filename", "device")}

    def __call__(self, request: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """Return a file and what is known about it."""
        chosen = {key: _first(request.get(key, value)) for key, value in self.config().items()}
        image_id, image = request.get("image_id", ""), str(request["image"])
        store = self.datastore() if image_id else None
        made = {
            **chosen,
            "image_ts": Path(image).stat().st_mtime,
            "weights_ts": _weights_time(self.segmentation, chosen),
        }
        tag = self.tag or "original"
        if store is not None and store.get_label_info(image_id, tag).get("made") == made:
            return _copy(Path(store.get_label_uri(image_id, tag))), self._describe(store, image_id)
        with (
            tempfile.TemporaryDirectory() as folder,
            guarded(self.segmentation.bundle_path, image_id or Path(image).name),
        ):
            files = predict_maps(self.segmentation, image, Path(folder), **chosen)
            wanted = files.get(self.tag or "segmentation")
            if wanted is None:
                raise HTTPException(404, f"{self.tag}: a map of these weights is needed, found {', '.join(files)}")
            if store is not None:
                volumes = {row["name"]: float(row["hard_mm3"]) for row in read_table(files.pop("volumes"))}
                names = {"label_names": self.segmentation.labels, "volumes_mm3": volumes}
                for name, path in files.items():
                    known = {"made": made} | ({"params": names} if name == "segmentation" else {})
                    store.save_label(image_id, str(path), "original" if name == "segmentation" else name, known)
            return _copy(wanted), self._describe(store, image_id)

    def _describe(self, store: Datastore | None, image_id: str) -> dict[str, Any]:
        """Names of the labels, volumes, and addresses of the maps on the server."""
        if store is None:
            return {"label_names": self.labels}
        tags = [tag for tag in MAPS if store.get_label_uri(image_id, tag)]
        known = store.get_label_info(image_id, "original").get("params", {})
        maps = {tag: f"/datastore/label?label={image_id}&tag={tag}" for tag in tags}
        return {**known, "label_names": self.labels, "maps": maps}


def _first(value: Any) -> Any:
    """A choice: the first of a list that a client has not chosen from."""
    return value[0] if isinstance(value, list) else value


def _weights_time(task: SegmentationTask, chosen: dict[str, Any]) -> float:
    path = Path(task.bundle_path) / "models" / str(chosen["model_filename"])
    if not path.is_file():
        raise HTTPException(404, f"{path.name}: weights of this server are needed, found no such file")
    return path.stat().st_mtime


def _copy(path: Path) -> str:
    """A copy that the server removes after it was sent."""
    suffix = "".join(path.suffixes[-2:])
    with tempfile.NamedTemporaryFile(suffix=suffix, delete=False) as file, path.open("rb") as source:
        shutil.copyfileobj(source, file)
    return file.name
