"""Configs of the bundle: the fingerprint of what a config resolved to, and strings that the config parser leaves alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from enum import Enum
from functools import partial
from pathlib import PurePath
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np

__all__ = ["fingerprint", "literal"]

WITHOUT_STATE = ("device", "Generator", "RandomState")  # types that count by their name alone
EVALUATED = "$%@#:"  # MONAI's parser gives these characters a meaning, some of them in the middle of a string


def literal(text: str) -> str:
    """Write a string for a config override such that MONAI's parser yields exactly this string.

    Args:
        text: a path or a name, which may hold ``$``, ``@``, ``%`` and ``#``.

    Returns:
        The string itself where the parser has nothing to evaluate, else a ``$`` expression of an escaped string literal.
    """
    if not any(character in text for character in EVALUATED):
        return text
    escaped = ascii(text)
    for character in EVALUATED:
        escaped = escaped.replace(character, f"\\x{ord(character):02x}")
    return f"${escaped}"


def fingerprint(*values: Any) -> str:
    """Hash of what results depend on: values, and objects with all of their attributes.

    Two calls agree in different processes and on different devices. Paths count by their last part, devices and random
    generators not at all; the weights of a network do not count either (their file has a hash of its own).

    Args:
        values: numbers, strings, containers, arrays, tensors, functions, transforms, inferers, networks, dataclasses, ...

    Returns:
        SHA-256 in hexadecimal digits.
    """
    return hashlib.sha256(json.dumps(_describe(values, []), sort_keys=True).encode()).hexdigest()


def _describe(value: Any, parents: list[int]) -> Any:
    """Nested lists that JSON can write; ``parents`` are the ids of the objects that hold the value."""
    import torch  # slow to import: the command starts without it

    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, PurePath | Enum) or type(value).__name__ in WITHOUT_STATE:
        return [type(value).__qualname__, getattr(value, "name", "")]
    if isinstance(value, torch.Tensor | np.ndarray):
        array = np.asarray(value.detach().cpu() if isinstance(value, torch.Tensor) else value)
        return [str(array.dtype), list(array.shape), hashlib.sha256(array.tobytes()).hexdigest()]
    if isinstance(value, type | ModuleType | BuiltinFunctionType):
        return getattr(value, "__qualname__", value.__name__)
    if id(value) in parents:
        return ["inside", len(parents) - parents.index(id(value))]
    parents = [*parents, id(value)]
    if isinstance(value, set | frozenset):
        return sorted((_describe(entry, parents) for entry in value), key=str)
    if isinstance(value, list | tuple):
        return [_describe(entry, parents) for entry in value]
    if isinstance(value, Mapping):
        return [[_describe(key, parents), _describe(value[key], parents)] for key in sorted(value, key=str)]
    return [type(value).__qualname__, _describe(_parts(value), parents)]


def _parts(value: Any) -> Any:
    """What an object consists of."""
    import torch  # slow to import: the command starts without it

    if isinstance(value, FunctionType):
        return [
            value.__qualname__,
            value.__code__,
            value.__defaults__,
            [c.cell_contents for c in value.__closure__ or ()],
        ]
    if isinstance(value, CodeType):
        return [value.co_code.hex(), value.co_consts, value.co_names]
    if isinstance(value, MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, torch.nn.Module):
        attributes = {key: entry for key, entry in vars(value).items() if not key.startswith("_") and key != "training"}
        return [
            attributes,
            dict(value.named_children()),
            [[k, list(p.shape)] for k, p in value.named_parameters(recurse=False)],
        ]
    return getattr(value, "__dict__", None) or ("" if " at 0x" in repr(value) else repr(value))
