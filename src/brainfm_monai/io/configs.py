"""The bundle: its folder, the fingerprint of what its configs resolve to, strings that their parser leaves alone."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from enum import Enum
from functools import partial
from pathlib import Path, PurePath
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np

from brainfm_monai.io.files import refuse_if

DEFAULT_BUNDLE = "bundle"  # folder in the working directory
WITHOUT_STATE = ("device", "Generator", "RandomState")  # types that count by their name alone
PARTS = {  # what objects consist of that are more than their attributes
    FunctionType: ("__qualname__", "__code__", "__defaults__", "__closure__"), CellType: ("cell_contents",),
    CodeType: ("co_code", "co_consts", "co_names"), MethodType: ("__func__", "__self__"),
    partial: ("func", "args", "keywords"),
}  # fmt: skip
EVALUATED = "$%@#:"  # MONAI's parser gives these characters a meaning, some of them in the middle of a string


def find_bundle(bundle: str | Path = DEFAULT_BUNDLE) -> Path:
    """Folder of the bundle: the named one, or the package's where the working directory lacks the default name."""
    folder, carried = Path(bundle), Path(__file__).parents[1] / DEFAULT_BUNDLE
    missing = not (folder / "configs" / "inference.json").is_file()
    return carried if missing and str(bundle) == DEFAULT_BUNDLE and carried.is_dir() else folder


def bundle_arguments(bundle: str | Path, names: Sequence[str]) -> dict[str, Any]:
    """Arguments by which MONAI's ``run`` and ``ConfigWorkflow`` read configs of a bundle, see :func:`find_config`."""
    folder = find_bundle(bundle)
    return {
        "config_file": [str(find_config(bundle, name)) for name in names],
        "bundle_root": literal(str(folder)),
        "meta_file": str(folder / "configs" / "metadata.json"),
        "logging_file": str(folder / "configs" / "logging.conf"),
    }


def find_config(bundle: str | Path, name: str) -> Path:
    """Path of a config in ``configs`` or ``variants`` of the bundle, or of any file, else a FileNotFoundError."""
    folders = [find_bundle(bundle) / folder for folder in ("configs", "variants")]
    places = [Path(name)] if Path(name).name != name else [folder / name for folder in folders]
    found = [path for path in places if path.is_file()]
    names = sorted(path.stem for folder in folders for path in folder.glob("*.json"))
    listed = ", ".join(names) or "none: in Python pass bundle=FOLDER, else pass --bundle FOLDER"
    rule = f"{places[0]}: a config of the bundle is needed"
    refuse_if(not found, rule, f"no such file; there are {listed}", FileNotFoundError)
    return found[0]


def literal(text: str) -> str:
    """A string, or a ``$`` expression of an escaped literal, of which MONAI's parser makes the string as it stands."""
    if not set(EVALUATED) & set(text):
        return text
    return "$" + ascii(text).translate({ord(character): f"\\x{ord(character):02x}" for character in EVALUATED})


def fingerprint(*values: Any) -> str:
    """Hash (SHA-256, hexadecimal) of what results depend on: any values, and objects with all of their attributes.

    Two calls agree in different processes and on different devices. Paths count by their last part, devices and random
    generators not at all; the weights of a network do not count either (their file has a hash of its own).
    """
    return hashlib.sha256(json.dumps(_describe(values, []), sort_keys=True).encode()).hexdigest()


def _describe(value: Any, parents: list[int]) -> Any:
    """Nested lists that JSON can write; ``parents`` are the ids of the objects that hold the value."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, PurePath | Enum) or type(value).__name__ in WITHOUT_STATE:
        return [type(value).__qualname__, getattr(value, "name", "")]
    if isinstance(value, type | ModuleType | BuiltinFunctionType):
        return getattr(value, "__qualname__", value.__name__)
    if isinstance(value, np.ndarray) or hasattr(value, "detach"):  # an array or a tensor
        array = value if isinstance(value, np.ndarray) else value.detach().cpu().numpy()
        return [str(array.dtype), list(array.shape), hashlib.sha256(array.tobytes()).hexdigest()]
    if id(value) in parents:
        return ["inside", len(parents) - parents.index(id(value))]
    parents = [*parents, id(value)]
    if isinstance(value, set | frozenset | list | tuple):
        entries = [_describe(entry, parents) for entry in value]
        return sorted(entries, key=str) if isinstance(value, set | frozenset) else entries
    if isinstance(value, Mapping):
        return [[_describe(key, parents), _describe(value[key], parents)] for key in sorted(value, key=str)]
    names = next((names for kind, names in PARTS.items() if isinstance(value, kind)), ())
    parts: Any = [getattr(value, name) for name in names]
    if hasattr(value, "named_children"):  # a network
        attributes = {key: entry for key, entry in vars(value).items() if not key.startswith("_") and key != "training"}
        shapes = [[name, list(parameter.shape)] for name, parameter in value.named_parameters(recurse=False)]
        parts = [attributes, dict(value.named_children()), shapes]
    elif not names:
        parts = getattr(value, "__dict__", None) or ("" if " at 0x" in repr(value) else repr(value))
    return [type(value).__qualname__, _describe(parts, parents)]
