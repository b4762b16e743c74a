"""Files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

__all__ = ["write_text", "write_whole"]


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
