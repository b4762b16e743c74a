"""The generator: ranges, one draw of every random quantity, and the pure rendering of images and targets."""

from brainfm_monai.synthesis.acquisition import IMAGES
from brainfm_monai.synthesis.deformation import make_coordinates
from brainfm_monai.synthesis.description import describe
from brainfm_monai.synthesis.ranges import (
    AppearanceParams,
    GeometryParams,
    SynthesisParams,
    SynthesisRanges,
    make_mild,
    parse_ranges,
)
from brainfm_monai.synthesis.rendering import render
from brainfm_monai.synthesis.sampling import sample
from brainfm_monai.synthesis.synthesizer import FLAGS, LARGEST_SEED, SUBJECT_KEYS, Synthesizer

__all__ = [
    "FLAGS",
    "IMAGES",
    "LARGEST_SEED",
    "SUBJECT_KEYS",
    "AppearanceParams",
    "GeometryParams",
    "SynthesisParams",
    "SynthesisRanges",
    "Synthesizer",
    "describe",
    "make_coordinates",
    "make_mild",
    "parse_ranges",
    "render",
    "sample",
]
