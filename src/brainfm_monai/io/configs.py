"""The bundle: its folder, the fingerprint of what its configs resolve to, strings that their parser leaves alone."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from enum import Enum
from functools import partial
from pathlib import Path, PurePath
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np

DEFAULT_BUNDLE = "bundle"  # folder in the working directory
WITHOUT_STATE = ("device", "Generator", "RandomState")  # types that count by their name alone
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
    """Path of a config: a file in ``configs`` or ``variants`` of the bundle, or, with a folder in its name, any file.

    FileNotFoundError if there is no such config.
    """
    folders = [find_bundle(bundle) / folder for folder in ("configs", "variants")]
    places = [Path(name)] if Path(name).name != name else [folder / name for folder in folders]
    for path in places:
        if path.is_file():
            return path
    names = sorted(path.stem for folder in folders for path in folder.glob("*.json"))
    listed = ", ".join(names) or "none: in Python pass bundle=FOLDER, else pass --bundle FOLDER"
    raise FileNotFoundError(f"{places[0]}: a config of the bundle is needed, found no such file; there are {listed}")


def literal(text: str) -> str:
    """Write a string, such as a path with ``$`` or ``#``, for a config override so that MONAI's parser yields just it.

    Without anything to evaluate that is the string itself, else a ``$`` expression of an escaped string literal.
    """
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
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        return [value.__qualname__, value.__code__, value.__defaults__, cells]
    if isinstance(value, CodeType):
        return [value.co_code.hex(), value.co_consts, value.co_names]
    if isinstance(value, MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords]
    if isinstance(value, torch.nn.Module):
        attributes = {key: entry for key, entry in vars(value).items() if not key.startswith("_") and key != "training"}
        shapes = [[name, list(parameter.shape)] for name, parameter in value.named_parameters(recurse=False)]
        return [attributes, dict(value.named_children()), shapes]
    return getattr(value, "__dict__", None) or ("" if " at 0x" in repr(value) else repr(value))
