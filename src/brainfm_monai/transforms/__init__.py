"""MONAI dictionary transforms of the inference path: reading any scan, and naming the maps of the one output tensor."""

from __future__ import annotations

from brainfm_monai.io import ScanError
from brainfm_monai.transforms.intensities import NormalisePercentilesd, ScanSpacingd
from brainfm_monai.transforms.maps import MODES, Mode, SplitTasksd, allowed_labels
from brainfm_monai.transforms.reading import LoadScand, read_scan

__all__ = [
    "MODES",
    "LoadScand",
    "Mode",
    "NormalisePercentilesd",
    "ScanError",
    "ScanSpacingd",
    "SplitTasksd",
    "allowed_labels",
    "read_scan",
]
