"""Running the network over whole scans: precision, memory, mirror images."""

from brainfm_monai.inferers.automatic import MEMORY_MODES, ScanInferer
from brainfm_monai.inferers.memory import free_memory, peak_memory
from brainfm_monai.inferers.precision import (
    AutocastInferer,
    fast_bfloat16,
    parse_precision,
    prepare_network,
    reduced_precision,
)
from brainfm_monai.inferers.second_look import SecondLookInferer
from brainfm_monai.inferers.slabs import SlabInferer
from brainfm_monai.inferers.volume import ForegroundInferer, MirrorInferer, WholeVolumeInferer, WindowInferer

__all__ = [
    "MEMORY_MODES",
    "AutocastInferer",
    "ForegroundInferer",
    "MirrorInferer",
    "ScanInferer",
    "SecondLookInferer",
    "SlabInferer",
    "WholeVolumeInferer",
    "WindowInferer",
    "fast_bfloat16",
    "free_memory",
    "parse_precision",
    "peak_memory",
    "prepare_network",
    "reduced_precision",
]
