"""The generator: ranges, one draw of every random quantity, and the pure rendering of images and targets."""

from brainfm_monai.synthesis.acquisition import IMAGES
from brainfm_monai.synthesis.deformation import make_coordinates, make_inverse_coordinates
from brainfm_monai.synthesis.description import describe
from brainfm_monai.synthesis.dictionary import FillMissingd, RandSynthesized
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
from brainfm_monai.synthesis.synthesizer import LARGEST_SEED, SUBJECT_KEYS, Synthesizer

__all__ = [
    "IMAGES",
    "LARGEST_SEED",
    "SUBJECT_KEYS",
    "AppearanceParams",
    "FillMissingd",
    "GeometryParams",
    "RandSynthesized",
    "SynthesisParams",
    "SynthesisRanges",
    "Synthesizer",
    "describe",
    "make_coordinates",
    "make_inverse_coordinates",
    "make_mild",
    "parse_ranges",
    "render",
    "sample",
]
