"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from uuid import uuid4

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["locked", "write_folder", "write_text", "write_whole"]


@contextmanager
def write_whole(path: str | Path) -> Iterator[Path]:
    """Write a file beside its place, then rename it: the file appears whole or not at all.

    The temporary file lies in the same folder, has a name of its own (several processes may write the same file) and the same
    suffixes (libraries choose the format by them). The folder is created. The temporary file is removed if the block fails.

    Args:
        path: file to write; an existing file is replaced.

    Yields:
        Path of the temporary file, which the block writes.

    Example:
        >>> with write_whole("table.tsv") as partial:  # doctest: +SKIP
        ...     partial.write_text("a b")
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{uuid4().hex[:8]}.partial.{target.name}")
    try:
        yield partial
        with partial.open("rb+" if os.name == "nt" else "rb") as written:  # Windows syncs what is open for writing
            os.fsync(written.fileno())  # the content reaches the disk before the name does
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file, whole or not at all."""
    with write_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def write_folder(path: str | Path) -> Iterator[Path]:
    """Fill a folder beside its place, then rename it: the folder appears whole or not at all.

    The temporary folder is hidden and locked. It is removed if the block fails. After the process was killed the lock is free,
    and the next call for the same place removes the temporary folder. Several processes may write the same folder: the last
    one stays.

    Args:
        path: folder to write; an existing folder is replaced.

    Yields:
        Path of the temporary folder, which the block fills.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in target.parent.glob(f".????????.partial.{escape(target.name)}"):
        with locked(leftover, wait=False) as alone:
            if alone:
                shutil.rmtree(leftover, ignore_errors=True)
    partial, old = (target.with_name(f".{uuid4().hex[:8]}.partial.{target.name}") for _ in range(2))
    partial.mkdir()
    with locked(partial, wait=False):
        try:
            yield partial
            with suppress(FileNotFoundError):  # a folder cannot be renamed onto a filled one
                target.rename(old)
            partial.rename(target)
        finally:
            for folder in (partial, old):
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def locked(folder: str | Path, wait: bool = True) -> Iterator[bool]:
    """Hold a folder while a block runs: no other process that asks for the folder holds it at the same time.

    Nothing is left on disk, and the operating system frees the folder of a process that dies. Where the system has no such lock
    (Windows, some network disks) the block runs without.

    Args:
        folder: created if it is absent and ``wait`` is set.
        wait: until another process frees the folder.

    Yields:
        Whether the folder is held.
    """
    if wait:
        Path(folder).mkdir(parents=True, exist_ok=True)
    handle = None
    try:
        if fcntl is not None:
            handle = os.open(folder, os.O_RDONLY)
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = handle is not None
    except OSError:
        held = False
    try:
        yield held
    finally:
        if handle is not None:
            os.close(handle)
