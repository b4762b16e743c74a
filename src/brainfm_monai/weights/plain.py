"""Plain state dicts: tensors only, and only such as fit the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["load_coarse_weights", "load_weights", "read_state_dict"]


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
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{path}: a plain state dict of tensors is needed, and it cannot be read as one: {first}"
        ) from error
    strange = None if isinstance(state, dict) else type(state).__name__
    if isinstance(state, dict):
        strange = next(
            (f"'{k}' of type {type(v).__name__}" for k, v in state.items() if not isinstance(v, Tensor)), None
        )
    if strange or not state:
        raise ValueError(f"{path}: a plain state dict of tensors is needed, found {strange or 'no entries'}")
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
    state = read_state_dict(path)
    expected = network.state_dict()
    for key, tensor in expected.items():
        if key not in state:
            raise ValueError(
                f"{path}: the weights must fit the network, found no '{key}' of shape {tuple(tensor.shape)}"
            )
        if state[key].shape != tensor.shape:
            found, wanted = tuple(state[key].shape), tuple(tensor.shape)
            raise ValueError(
                f"{path}: the weights must fit the network, found '{key}' of shape {found} where the network has {wanted}"
            )
    unknown = [key for key in state if key not in expected]
    if unknown:
        raise ValueError(
            f"{path}: the weights must fit the network, found '{unknown[0]}', which the network does not have"
        )
    network.load_state_dict(state)


def load_coarse_weights(network: nn.Module, path: str | Path) -> None:
    """Start a two-scale network from a coarse one, so that its first output is the coarse one's, each voxel repeated.

    Args:
        network: :class:`~brainfm_monai.networks.MultiTaskNet` over a :class:`~brainfm_monai.networks.TwoScaleUNet`.
        path: plain state dict of the coarse network, a ``MultiTaskNet`` over an ``AdditiveUNet``, whose tasks are the first ones
            of this network's layout; empty: nothing is done.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not a state dict, or does not hold the coarse part of the network.
    """
    if not str(path):
        return
    given, state = read_state_dict(path), network.state_dict()
    wanted = {
        name: name.replace("backbone.coarse.", "backbone.") for name in state if name.startswith("backbone.coarse.")
    }
    for name, source in wanted.items():
        if source not in given or given[source].shape != state[name].shape:
            found = tuple(given[source].shape) if source in given else "nothing"
            raise ValueError(
                f"{path}: the weights must fit the coarse network, found {found} for '{source}' of {tuple(state[name].shape)}"
            )
        state[name] = given[source]
    channels, context = given["head.weight"].shape[:2]
    state["head.weight"][:channels] = 0
    state["head.weight"][:channels, -context:] = given["head.weight"]
    state["head.bias"][:channels] = given["head.bias"]
    network.load_state_dict(state)
