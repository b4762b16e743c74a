"""Reading a ``torch.save`` file without running what its pickle asks for.

A checkpoint is a pickle, and a pickle can name any function and call it. Here tensors are rebuilt by this module alone, every
other class becomes an inert :class:`Placeholder`, and a file that would call anything is refused by the name of it.
"""

from __future__ import annotations

import pickle
import struct
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

__all__ = ["LazyTensor", "Placeholder", "open_checkpoint"]

ZIP_MAGIC = b"PK\x03\x04"
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # torch.serialization.MAGIC_NUMBER, before torch 1.6
LEGACY_PROTOCOL = 1001
READ_BYTES = 16 * 2**20  # at a time: a tensor is held once, not twice
NEVER_NAMED = {"nt", "os", "posix", "subprocess", "sys"}  # modules that no weights need: naming one is refused already
STORAGE_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class _Refused(Exception):
    """The file asks for a call; the message is its name."""


@dataclass(frozen=True)
class Storage:
    """Bytes of the file that hold the elements of tensors."""

    dtype: torch.dtype
    elements: int
    read: Callable[[int], bytearray]  # a number of bytes, or fewer where the file ends


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read from the file when it is asked for: an optimiser's state, twice the weights, never is."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def load(self) -> Tensor:
        """Read the tensor.

        Raises:
            ValueError: if the file holds fewer elements than the tensor spans.
        """
        dtype, last = (
            self.storage.dtype,
            self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True)),
        )
        if 0 in self.shape:
            return torch.empty(self.shape, dtype=dtype)
        if min(self.offset, *self.stride, *self.shape, 0) < 0 or last >= self.storage.elements:
            raise ValueError(f"a tensor of shape {self.shape} spans {last + 1} elements, found {self.storage.elements}")
        size = self.storage.elements * dtype.itemsize
        data = self.storage.read(size)
        if len(data) != size:
            raise ValueError(f"{size} bytes of a tensor of shape {self.shape} are needed, found {len(data)}")
        return torch.frombuffer(data, dtype=dtype).as_strided(self.shape, self.stride, self.offset)


class _InertType(type):
    """Classes that cannot be called: an instance comes of ``__new__`` alone, which does nothing."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        raise _Refused(cls.__qualname__)

    def __setattr__(cls, name: str, value: Any) -> None:
        raise _Refused(cls.__qualname__)


class Placeholder(metaclass=_InertType):
    """What stands where the file names a class that is not known: its attributes can be looked at, and do nothing."""

    def __new__(cls, *args: Any) -> Placeholder:
        """Make an empty object; one that wants arguments is more than a bag of attributes, and is refused."""
        if args:
            raise _Refused(cls.__qualname__)
        return object.__new__(cls)

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)

    def __setitem__(self, key: Any, value: Any) -> None:
        """Forget an item of a dictionary's subclass."""


class _Rebuilder:
    """A function that the file may call. It has no attributes that a file could set."""

    __slots__ = ("_function",)
    _function: Callable[..., Any]

    def __init__(self, function: Callable[..., Any]) -> None:
        object.__setattr__(self, "_function", function)

    def __setattr__(self, name: str, value: Any) -> None:
        raise _Refused(name)

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> LazyTensor:
    numbers = (offset, *shape, *stride)
    if not isinstance(storage, Storage) or len(shape) != len(stride) or not all(type(n) is int for n in numbers):
        raise pickle.UnpicklingError("a tensor without storage, shape and stride")
    return LazyTensor(storage, offset, tuple(shape), tuple(stride))


def _make_ordered(*items: Any) -> OrderedDict[Any, Any]:
    return OrderedDict(*items)


def _ignore(*_: Any) -> Placeholder:
    """What numbers of numpy, sets, paths and devices become: nothing that is read here needs them."""
    return Placeholder.__new__(Placeholder)


CALLABLE: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    "collections.OrderedDict": _make_ordered,
    **dict.fromkeys(
        (
            "_codecs.encode",
            "builtins.complex",
            "builtins.set",
            "collections.defaultdict",
            "numpy._core.multiarray._reconstruct",
            "numpy._core.multiarray.scalar",
            "numpy.core.multiarray._reconstruct",
            "numpy.core.multiarray.scalar",
            "numpy.dtype",
            "pathlib.PosixPath",
            "torch.Size",
            "torch.device",
        ),
        _ignore,
    ),
}


class _Unpickler(pickle.Unpickler):
    """Tensors by reference, known functions by this module's own, and placeholders for the rest."""

    def __init__(self, file: IO[bytes], make_storage: Callable[[torch.dtype, str, int], Storage]) -> None:
        super().__init__(file, encoding="utf-8")
        self._make_storage = make_storage

    def find_class(self, module: str, name: str) -> Any:
        """Never imports anything."""
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))  # Python 2's names
        full = f"{module}.{name}"
        if module.split(".")[0] in NEVER_NAMED:
            raise _Refused(full)
        if full in CALLABLE:
            return _Rebuilder(CALLABLE[full])
        if module == "torch" and name in STORAGE_DTYPES:
            return STORAGE_DTYPES[name]
        return _InertType(name, (Placeholder,), {"__qualname__": full})

    def persistent_load(self, pid: Any) -> Storage:
        """A storage of the file, by ``("storage", type, key, device, number of elements, None)``."""
        kind, dtype, key, _, elements, *view = pid
        if kind != "storage" or not isinstance(dtype, torch.dtype) or type(elements) is not int or any(view):
            raise pickle.UnpicklingError("something other than a storage stands outside the pickle")
        return self._make_storage(dtype, str(key), elements)


@contextmanager
def open_checkpoint(path: str | Path) -> Iterator[Any]:
    """Content of a ``torch.save`` file, of torch 1.6 or newer or of the format before it.

    Args:
        path: the file.

    Yields:
        What was saved: containers, numbers and text as they are, tensors as :class:`LazyTensor`, which can be read until the
        context ends, and objects of other classes as :class:`Placeholder`.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is truncated or no checkpoint, or asks to call something, which is named.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: a file of weights is needed, found no such file")
    with Path(path).open("rb") as file:
        try:
            is_zip = file.read(len(ZIP_MAGIC)) == ZIP_MAGIC
            file.seek(0)
            content = _read_zip(file) if is_zip else _read_legacy(file)
        except _Refused as refused:
            raise ValueError(
                f"{path}: a checkpoint of tensors, numbers and text is needed; this one asks for '{refused}', and was not loaded"
            ) from None
        except Exception as error:  # a damaged pickle can raise anything
            raise ValueError(
                f"{path}: a whole torch checkpoint is needed, and it cannot be read as one: {_first_line(error)}"
            ) from error
        yield content


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}{': ' + lines[0] if lines else ''}"


def _read_zip(file: IO[bytes]) -> Any:
    archive = zipfile.ZipFile(file)
    pickles = [name for name in archive.namelist() if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError(f"one file data.pkl is needed in the archive, found {len(pickles)}")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}byteorder" in archive.namelist() and archive.read(f"{root}byteorder") != b"little":
        raise ValueError("little-endian numbers are needed")

    def make_storage(dtype: torch.dtype, key: str, elements: int) -> Storage:
        name = f"{root}data/{key}"
        if archive.getinfo(name).file_size != elements * dtype.itemsize:
            raise ValueError(
                f"{elements * dtype.itemsize} bytes are needed in {name}, found {archive.getinfo(name).file_size}"
            )

        def read(size: int) -> bytearray:
            data = bytearray(size)
            with archive.open(name) as entry:
                done = 0
                while part := entry.read(READ_BYTES):  # the size was compared above
                    data[done : done + len(part)] = part
                    done += len(part)
            return data

        return Storage(dtype, elements, read)

    with archive.open(pickles[0]) as entry:
        return _Unpickler(entry, make_storage).load()


def _read_legacy(file: IO[bytes]) -> Any:
    storages: dict[str, tuple[torch.dtype, int]] = {}
    places: dict[str, int] = {}

    def make_storage(dtype: torch.dtype, key: str, elements: int) -> Storage:
        storages[key] = (dtype, elements)

        def read(size: int) -> bytearray:
            file.seek(places[key])
            return bytearray(file.read(size))

        return Storage(dtype, elements, read)

    magic, protocol, system, content, keys = (_Unpickler(file, make_storage).load() for _ in range(5))
    if (
        magic != LEGACY_MAGIC
        or protocol != LEGACY_PROTOCOL
        or not system["little_endian"]
        or set(keys) != set(storages)
    ):
        raise ValueError("neither a zip archive nor torch's format before it")
    for key in keys:
        dtype, elements = storages[key]
        (found,) = struct.unpack("<q", file.read(8))
        if found != elements:
            raise ValueError(f"{elements} elements are needed in storage {key}, found {found}")
        places[key] = file.tell()
        file.seek(elements * dtype.itemsize, 1)
    if file.tell() > file.seek(0, 2):
        raise ValueError("the file ends before its last tensor")
    return content
