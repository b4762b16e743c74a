"""Plain state dicts: tensors only, and only such as fit the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from brainfm_monai.io import first_line

__all__ = ["load_weights", "read_state_dict"]


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read a plain state dict; nothing in the file is run.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not a dictionary of tensors.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: a file of weights is needed, found no such file")
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch each raise their own kinds
        raise ValueError(
            f"{path}: a plain state dict of tensors is needed, and it cannot be read as one: {first_line(error)}"
        ) from error
    if isinstance(state, dict):
        others = [
            f"'{key}' of type {type(value).__name__}" for key, value in state.items() if not isinstance(value, Tensor)
        ]
    if not isinstance(state, dict) or not state or others:
        found = type(state).__name__ if not isinstance(state, dict) else others[0] if state else "no entries"
        raise ValueError(f"{path}: a plain state dict of tensors is needed, found {found}")
    return dict(state)


def load_weights(network: nn.Module, path: str | Path) -> None:
    """Load a file of weights into a network that it fits exactly.

    Args:
        network: module whose parameters and buffers are overwritten.
        path: plain state dict, written by ``torch.save(network.state_dict(), path)``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not a state dict, or a tensor is missing, unknown or of another shape; the first is named.
    """
    state, expected = read_state_dict(path), network.state_dict()
    for key in [*expected, *state]:
        found, needed = (
            f"'{key}' of shape {tuple(x[key].shape)}" if key in x else f"no '{key}'" for x in (state, expected)
        )
        if found != needed:
            raise ValueError(f"{path}: the weights must fit the network, found {found} where the network has {needed}")
    network.load_state_dict(state)
