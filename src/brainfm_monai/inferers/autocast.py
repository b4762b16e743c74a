"""The whole batch through the network under autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from monai.inferers import SimpleInferer
from torch import Tensor

from brainfm_monai.networks import autocast, parse_precision

__all__ = ["AutocastInferer"]


class AutocastInferer(SimpleInferer):
    """Give the network the whole batch under autocast, in training and in validation.

    Args:
        precision: see :func:`~brainfm_monai.networks.parse_precision`.

    Raises:
        ValueError: if there is no such precision.
    """

    def __init__(self, precision: str | None = None) -> None:
        super().__init__()
        parse_precision(precision, torch.device("cpu"))
        self.precision = precision

    def __call__(self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Map images of shape (B, 1, H, W, D) to the network's output."""
        with autocast(inputs.device, parse_precision(self.precision, inputs.device)):
            return network(inputs, *args, **kwargs)
