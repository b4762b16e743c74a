"""Reading weights safely: nothing in a file is ever run."""

from brainfm_monai.weights.loading import load_pretrained, load_weights, make_pretrained, read_state_dict
from brainfm_monai.weights.published import WeightsInfo, import_weights, load_published

__all__ = [
    "WeightsInfo", "import_weights", "load_pretrained", "load_published", "load_weights", "make_pretrained",
    "read_state_dict",
]  # fmt: skip
