"""From scans to finished folders: which outputs, which share of the list, scan after scan, or one image in Python."""

from brainfm_monai.prediction.catalogue import OUTPUTS, select_outputs
from brainfm_monai.prediction.loop import ScanDataset, ScanLoader, local_device, predict_scans, share_of
from brainfm_monai.prediction.single import Prediction, predict

__all__ = [
    "OUTPUTS", "Prediction", "ScanDataset", "ScanLoader", "local_device", "predict", "predict_scans", "select_outputs",
    "share_of",
]  # fmt: skip
