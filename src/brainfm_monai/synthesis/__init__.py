"""The generator: ranges, one draw of every random quantity, and the pure rendering of images and targets."""

from brainfm_monai.synthesis.ranges import SynthesisParams, SynthesisRanges, parse_ranges
from brainfm_monai.synthesis.rendering import render
from brainfm_monai.synthesis.synthesizer import FLAGS, LARGEST_SEED, SUBJECT_KEYS, Synthesizer, describe

__all__ = [
    "FLAGS", "LARGEST_SEED", "SUBJECT_KEYS", "SynthesisParams", "SynthesisRanges", "Synthesizer", "describe",
    "parse_ranges", "render",
]  # fmt: skip
