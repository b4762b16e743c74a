"""Reading weights safely: nothing in a file is ever run."""

from brainfm_monai.weights.finetune import load_coarse_weights, load_pretrained, make_pretrained
from brainfm_monai.weights.imported import import_weights
from brainfm_monai.weights.plain import load_weights, read_state_dict
from brainfm_monai.weights.published import Published, WeightsInfo, load_published

__all__ = [
    "Published",
    "WeightsInfo",
    "import_weights",
    "load_coarse_weights",
    "load_pretrained",
    "load_published",
    "load_weights",
    "make_pretrained",
    "read_state_dict",
]
