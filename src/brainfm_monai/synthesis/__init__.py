"""The generator: ranges, one draw of every random quantity, and the pure rendering of images and targets."""

from brainfm_monai.synthesis.ranges import SynthesisParams, SynthesisRanges
from brainfm_monai.synthesis.rendering import render
from brainfm_monai.synthesis.sampling import sample

__all__ = ["SynthesisParams", "SynthesisRanges", "render", "sample"]
