"""MONAI dictionary transforms of the inference path: reading any scan, and naming the maps of the one output tensor."""

from brainfm_monai.transforms.cortex import HEMISPHERES, FindBoundariesd, find_boundaries
from brainfm_monai.transforms.detail import RestoreDetaild
from brainfm_monai.transforms.maps import MODES, SplitTasksd, allowed_labels
from brainfm_monai.transforms.reading import LoadScand, NormalisePercentilesd, ScanSpacingd

__all__ = [
    "HEMISPHERES", "MODES", "FindBoundariesd", "LoadScand", "NormalisePercentilesd", "RestoreDetaild", "ScanSpacingd",
    "SplitTasksd", "allowed_labels", "find_boundaries",
]  # fmt: skip
