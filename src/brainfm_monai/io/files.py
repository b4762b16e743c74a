"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path
from uuid import uuid4

__all__ = ["write_folder", "write_text", "write_whole"]


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
        with partial.open("rb") as written:
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
        if (lock := _lock(leftover)) is not None:
            shutil.rmtree(leftover, ignore_errors=True)
            os.close(lock)
    partial, old = (target.with_name(f".{uuid4().hex[:8]}.partial.{target.name}") for _ in range(2))
    partial.mkdir()
    lock = _lock(partial)
    try:
        yield partial
        with suppress(FileNotFoundError):  # a folder cannot be renamed onto a filled one
            target.rename(old)
        partial.rename(target)
    finally:
        for folder in (partial, old):
            shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _lock(folder: Path) -> int | None:
    """Descriptor that locks a folder until it is closed or the process ends; None if that is impossible."""
    try:
        import fcntl  # absent on Windows

        descriptor = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # another process holds the lock, or the file system has none
        os.close(descriptor)
        return None
    return descriptor
