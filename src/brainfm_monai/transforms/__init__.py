"""MONAI dictionary transforms of the inference path: reading any scan, and naming the maps of the one output tensor."""

from __future__ import annotations

from brainfm_monai.transforms.intensities import NormalisePercentilesd, ScanSpacingd, window_hounsfield
from brainfm_monai.transforms.maps import MODES, Mode, SplitTasksd, allowed_labels
from brainfm_monai.transforms.reading import (
    SCAN_SUFFIXES,
    LoadScand,
    check_header,
    is_dicom_series,
    read_scan,
    scan_stem,
)

__all__ = [
    "MODES",
    "SCAN_SUFFIXES",
    "LoadScand",
    "Mode",
    "NormalisePercentilesd",
    "ScanSpacingd",
    "SplitTasksd",
    "allowed_labels",
    "check_header",
    "is_dicom_series",
    "read_scan",
    "scan_stem",
    "window_hounsfield",
]
