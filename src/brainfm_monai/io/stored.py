"""Where and how the voxels of a file are stored, and their reading in pieces: a header that lies allocates nothing."""

from __future__ import annotations

import gzip
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

__all__ = ["Stored", "open_packed", "read_frame"]

GZIP_MARK = b"\x1f\x8b"
LARGEST_RATIO = 1032  # of gzip: no byte of a packed file can give more
LARGEST_VOXELS = 2**29  # of one volume: 2 GiB in float32, a head at 0.2 mm
PIECE_BYTES = 2**24
TAIL_PIECES, TAIL_BYTES = 16, 2**20  # behind the voxels that are read on for the check sum


@dataclass(frozen=True)
class Stored:
    """How the voxels of a file are stored, by its header.

    Attributes:
        shape: (H, W, D), and more axes for several volumes.
        dtype: type of the numbers in the file, with its byte order.
        affine: voxel indices to RAS mm, shape (4, 4), float64.
        path: file of the voxels.
        offset: bytes before the first voxel, in the unpacked file.
        slope: factor of the stored numbers.
        intercept: added to the product.
        warnings: what is doubtful in the header, one sentence each.
        is_oriented: whether the header states which side is left.
        array: the voxels themselves, where a library has read and scaled the whole file.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    affine: np.ndarray
    path: Path
    offset: int = 0
    slope: float = 1.0
    intercept: float = 0.0
    warnings: tuple[str, ...] = ()
    is_oriented: bool = True
    array: np.ndarray | None = None


@contextmanager
def open_packed(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading, unpacked where its content, not its name, is gzip."""
    with path.open("rb") as file:
        is_packed = file.read(2) == GZIP_MARK
        file.seek(0)
        if not is_packed:
            yield file
            return
        with gzip.GzipFile(fileobj=file) as unpacked:
            yield unpacked  # type: ignore[misc]


def read_frame(stored: Stored, frame: int | str | None) -> np.ndarray:
    """Read voxels of a file, scaled as its header says.

    Args:
        stored: from the header.
        frame: which volume of several: its number, from 0; ``"mean"``; or ``"all"``.

    Returns:
        Shape (H, W, D), or (H, W, D, C) of all C volumes, of the stored type in the machine's byte order, or float32 where the
        header scales the numbers or ``frame`` is the mean.

    Raises:
        ValueError: if the file has fewer voxels than its header says.
        OSError, EOFError, zlib.error: if the file is damaged.
    """
    shape, frames = stored.shape[:3], math.prod(stored.shape[3:])
    if stored.array is not None:
        volumes = stored.array.reshape((*shape, frames), order="F")
        chosen = volumes if frame == "all" else volumes[..., int(frame or 0)] if frame != "mean" else None
        return volumes.mean(axis=3, dtype=np.float64).astype(np.float32) if chosen is None else chosen
    count = math.prod(shape) * stored.dtype.itemsize
    _check_length(stored.path, stored.offset + count * frames)
    with open_packed(stored.path) as stream:
        stream.seek(stored.offset + (count * frame if isinstance(frame, int) else 0))
        if frame == "mean":
            total = np.zeros(shape, np.float64)
            for _ in range(frames):
                total += _read_array(stream, stored.dtype, shape)
            return _scale(total / frames, stored).astype(np.float32)
        values = _read_array(stream, stored.dtype, (*shape, frames) if frame == "all" else shape)
        _check_sum(stream)
    return _scale(values, stored)


def _check_length(path: Path, needed: int) -> None:
    """Refuse a file that cannot hold the bytes that its header promises, before they are allocated.

    Raises:
        ValueError: if it cannot.
    """
    with path.open("rb") as file:
        ratio = LARGEST_RATIO if file.read(2) == GZIP_MARK else 1
    size = path.stat().st_size
    if needed > size * ratio:
        raise ValueError(
            f"the voxels cannot be read: {needed} bytes are promised by the header, found a file of {size}"
        )


def _read_array(stream: IO[bytes], dtype: np.dtype[Any], shape: tuple[int, ...]) -> np.ndarray:
    count = math.prod(shape) * dtype.itemsize
    content = bytearray()
    while len(content) < count and (piece := stream.read(min(PIECE_BYTES, count - len(content)))):
        content += piece
    if len(content) < count:
        raise ValueError(f"the voxels cannot be read: {count} bytes are needed, found {len(content)}")
    values = np.frombuffer(content, dtype).reshape(shape, order="F")
    return values.astype(dtype.newbyteorder("="), copy=False)


def _check_sum(stream: IO[bytes]) -> None:
    """Let gzip compare its check sum at the end of the stream; what follows the packed file is ignored."""
    try:
        for _ in range(TAIL_PIECES):
            if not stream.read(TAIL_BYTES):
                return
    except gzip.BadGzipFile as error:
        if "Not a gzipped file" not in str(error):
            raise


def _scale(values: np.ndarray, stored: Stored) -> np.ndarray:
    """Apply slope and intercept in float64, plane by plane, into float32."""
    if (stored.slope, stored.intercept) == (1.0, 0.0):
        return values
    scaled = np.empty(values.shape, np.float32, order="F")
    for plane in range(values.shape[2]):
        scaled[:, :, plane] = values[:, :, plane].astype(np.float64) * stored.slope + stored.intercept
    return scaled
