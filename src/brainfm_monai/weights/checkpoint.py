"""Checkpoints by torch's own unpickler for weights, which gets an inert class for every other name of the file."""

import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from brainfm_monai.io import first_line, refuse_if

# modules that no weights need: naming one is refused already (torch reads subprocess as commands, Python 2's name)
NEVER_NAMED = {"commands", "nt", "os", "posix", "subprocess", "sys"}
# what a file may call with arguments, because nothing here needs its value: numbers of numpy, dictionaries, paths
NOT_NEEDED = {"collections.defaultdict", "numpy.dtype", "pathlib.PosixPath"}
NOT_NEEDED |= {f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")}


class _Refused(Exception):
    """The file asks for a call; the message is the name of what it would call."""


class _Inert:
    """Base of the classes in place of the file's: an object is an ``OrderedDict`` with its items and attributes."""

    def __new__(cls, *args: Any) -> Any:
        if args and cls.__name__ not in NOT_NEEDED:
            raise _Refused(cls.__name__)
        return super().__new__(cls) if cls.__name__.startswith("numpy.") else OrderedDict()

    def __setstate__(self, state: Any) -> None:
        """Forget the state of numpy's numbers, which is no dictionary."""


def read_checkpoint(path: str | Path) -> Any:
    """Content of a ``torch.save`` file of torch 1.6 or newer.

    Objects of other classes than containers, numbers, text and tensors are dictionaries with their attributes in
    ``vars``. Tensors are read from the disk when they are needed. FileNotFoundError if there is no such file,
    ValueError if it is truncated or no checkpoint, or asks for a call, which is named.
    """
    refuse_if(not Path(path).is_file(), f"{path}: a file of weights is needed", "no such file", FileNotFoundError)
    try:
        names = get_unsafe_globals_in_checkpoint(path)
        for name in names:
            if name.split(".")[0] in NEVER_NAMED:
                raise _Refused(name)
        with zipfile.ZipFile(path) as archive:
            held = sum(record.compress_size for record in archive.infolist() if "/data/" in record.filename)
        sizes: list[int] = []

        def measure(storage: Any, _: str) -> Any:
            sizes.append(storage.nbytes())
            return storage

        with safe_globals([(type(name, (_Inert,), {}), name) for name in names]):
            content = torch.load(path, measure, weights_only=True, mmap=True)
        # a mapped storage goes on into the next record where its own is shorter, or packed
        refuse_if(sum(sizes) != held, f"{sum(sizes)} bytes of unpacked tensors are needed", held)
        return content
    except _Refused as refused:
        rule = f"{path}: a checkpoint of tensors, numbers and text is needed"
        raise ValueError(f"{rule}; this one asks for '{refused}', and was not loaded") from None
    except Exception as error:  # a damaged pickle can raise anything
        rule, reason = f"{path}: a whole torch checkpoint is needed", f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(f"{rule}, and it cannot be read as one: {reason}") from error
