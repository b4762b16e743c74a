"""Published checkpoints, read by ``torch.load`` with an unpickler that calls nothing.

A checkpoint is a pickle, which can call any function. The unpickler of this module knows dictionaries, numbers, text
and tensors. Every other class becomes an inert :class:`Placeholder`; a file that calls anything else is refused.
"""

import pickle
import tarfile
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import torch
from torch import Tensor

from brainfm_monai.io import first_line

NEVER_NAMED = {"nt", "os", "posix", "subprocess", "sys"}  # modules that no weights need: naming one is refused already
# functions whose value nothing here needs: numbers of numpy, sets, paths, devices
IGNORED = {"_codecs.encode", "builtins.complex", "builtins.set", "collections.defaultdict", "numpy.dtype", "torch.Size"}
IGNORED |= {f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("_reconstruct", "scalar")}
IGNORED |= {"pathlib.PosixPath", "torch.device"}


class _Refused(Exception):
    """The file asks for a call; the message is the name of what it would call."""


class _InertType(type):
    """Classes that cannot be called or changed."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise _Refused(cls.__qualname__)

    def __setattr__(cls, name: str, value: Any) -> None:
        raise _Refused(cls.__qualname__)


class Placeholder(metaclass=_InertType):
    """An object of a class that is not imported: its attributes can be read, and do nothing."""

    def __new__(cls, *args: Any) -> "Placeholder":
        """Make an empty object; a class that needs arguments is refused."""
        if args:
            raise _Refused(cls.__qualname__)
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)

    def __setitem__(self, key: Any, value: Any) -> None:
        """Forget an item of a dictionary's subclass."""


class _Rebuild:
    """What a file may call: bound methods, which, unlike functions, have no attributes that the file could set."""

    def tensor(self, storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
        """Tensor over a storage, within bounds that torch checks; hooks and metadata of the file are left out."""
        tensor: Tensor = torch._utils._rebuild_tensor(storage, offset, size, stride)
        return tensor

    def parameter(self, data: Any, *_: Any) -> Any:
        """The tensor of a parameter."""
        return data

    def nothing(self, *_: Any) -> Placeholder:
        """Placeholder of a value that is not needed."""
        return Placeholder.__new__(Placeholder)


REBUILD = _Rebuild()
CALLABLE: dict[str, Any] = {
    "collections.OrderedDict": OrderedDict,
    "torch._utils._rebuild_tensor": REBUILD.tensor,
    "torch._utils._rebuild_tensor_v2": REBUILD.tensor,
    "torch._utils._rebuild_parameter": REBUILD.parameter,
    **dict.fromkeys(IGNORED, REBUILD.nothing),
}


class _Unpickler(pickle.Unpickler):
    """Imports nothing. ``sizes`` are the bytes of every record of a zip archive, which torch does not compare."""

    sizes: dict[str, int] | None = None

    def find_class(self, module: str, name: str) -> Any:
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))  # Python 2's names
        full = f"{module}.{name}"
        if module.split(".")[0] in NEVER_NAMED:
            raise _Refused(full)
        return CALLABLE.get(full) or _InertType(name, (Placeholder,), {"__qualname__": full})

    @property
    def persistent_load(self) -> Callable[[Any], Any]:
        # torch sets the function that reads a storage of the file
        return self._load_storage

    @persistent_load.setter
    def persistent_load(self, load: Callable[[Any], Any]) -> None:
        self._load = load

    def _load_storage(self, pid: Any) -> Any:
        if pid[0] != "storage":
            raise pickle.UnpicklingError("something other than a storage stands outside the pickle")
        if self.sizes is not None:
            kind, key, elements = pid[1], pid[2], pid[4]
            dtype = torch.uint8 if kind is torch.UntypedStorage else kind.dtype
            size, needed = self.sizes.get(f"data/{key}"), elements * dtype.itemsize
            if size != needed:
                raise pickle.UnpicklingError(f"{needed} bytes are needed in data/{key}, found {size}")
        return self._load(pid)


def read_checkpoint(path: str | Path) -> Any:
    """Content of a ``torch.save`` file, of torch 1.6 or newer or of the format before.

    Containers, numbers, text and tensors are as they were saved, objects of other classes are a :class:`Placeholder`.
    The file must stay as it is while its tensors are used: tensors of a zip archive are read from the disk when they
    are needed. An optimiser's state, twice the size of the weights, never is. FileNotFoundError if there is no such
    file, ValueError if it is truncated or no checkpoint, or asks for a call, which is named.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: a file of weights is needed, found no such file")
    try:
        sizes = _record_sizes(path)
        unpickler = type("Unpickler", (_Unpickler,), {"sizes": sizes})

        def load(file: IO[bytes], **options: Any) -> Any:
            return unpickler(file, **options).load()

        restricted = SimpleNamespace(__name__="restricted", Unpickler=unpickler, load=load)
        return torch.load(path, "cpu", restricted, weights_only=False, mmap=sizes is not None)
    except _Refused as refused:
        rule = f"{path}: a checkpoint of tensors, numbers and text is needed"
        raise ValueError(f"{rule}; this one asks for '{refused}', and was not loaded") from None
    except Exception as error:  # a damaged pickle can raise anything
        rule, reason = f"{path}: a whole torch checkpoint is needed", f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(f"{rule}, and it cannot be read as one: {reason}") from error


def _record_sizes(path: str | Path) -> dict[str, int] | None:
    """Bytes of every record of a zip archive without the name of its folder; ``None`` for the format before."""
    if not zipfile.is_zipfile(path):
        if tarfile.is_tarfile(path):
            raise ValueError("an archive of torch 0.1, which torch unpacks into a folder, is not read")
        return None
    with zipfile.ZipFile(path) as archive:
        records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
    if "data.pkl" not in records or "constants.pkl" in records or any(i.compress_type for i in records.values()):
        raise ValueError("a record data.pkl, no TorchScript and no compression are needed in the archive")
    return {name: info.file_size for name, info in records.items()}
