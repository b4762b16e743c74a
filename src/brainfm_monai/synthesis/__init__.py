"""The generator: ranges, one draw of every random quantity, and the pure rendering of images and targets."""

from brainfm_monai.synthesis.ranges import SynthesisRanges, parse_ranges
from brainfm_monai.synthesis.rendering import FLAGS, LARGEST_SEED, SUBJECT_KEYS, Synthesizer, render
from brainfm_monai.synthesis.sampling import SynthesisParams

__all__ = [
    "FLAGS", "LARGEST_SEED", "SUBJECT_KEYS", "SynthesisParams", "SynthesisRanges", "Synthesizer", "parse_ranges",
    "render",
]  # fmt: skip
