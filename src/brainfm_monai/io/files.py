"""Files that appear whole or not at all, tab-separated tables as BIDS has them, and errors of one line."""

import csv
import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from glob import escape
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

FORMULA = ("=", "+", "-", "@", "\t", "\r")  # how a cell begins that spreadsheets compute
HASHED_BYTES = 2**20  # at a time, of a file
ABSENT = "n/a"  # BIDS' word for a missing value in a table
T = TypeVar("T")


class ScanError(ValueError):
    """A scan that cannot be used. The message is one line that names the file, the rule and what was found."""


def refuse_if(is_wrong: object, rule: str, found: object, kind: type[Exception] = ValueError) -> None:
    """Raise an error of one line, ``<rule>, found <found>``, if an input is wrong."""
    if is_wrong:
        raise kind(f"{rule}, found {found}")


def exit_on_error(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call a function from a config, where MONAI makes a traceback of errors: they become a SystemExit of one line."""
    try:
        return function(*args, **kwargs)
    except (ValueError, OSError, FloatingPointError) as error:
        raise SystemExit(str(error)) from error


def first_line(error: BaseException) -> str:
    """First line of an error's message, or the error's type if the message is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def one_line(error: BaseException, name: str) -> str:
    """Message of a failed scan: the first :class:`ScanError` among the error and its causes, else name and error."""
    while error.__cause__ is not None and not isinstance(error, ScanError):
        error = error.__cause__
    line, kind = first_line(error), type(error).__name__
    return line if isinstance(error, ScanError) else f"{name}: {kind}{'' if line == kind else f': {line}'}"


@contextmanager
def write_whole(path: str | Path, folder: bool = False) -> Iterator[Path]:
    """Write a file, or fill a folder, beside its place, then rename it: it appears whole or not at all.

    The block gets the path of a hidden and locked file or folder of the same suffixes, which is removed if the block
    fails, or by the next writer if the process is killed. What was there is replaced. Of several processes that write
    to the same place the last one stays.
    """
    target = Path(path)
    with hold_beside(target, folder) as partial:
        yield partial
        old = _name_beside(target)
        if folder:
            with suppress(FileNotFoundError):  # a folder cannot be renamed onto a filled one
                target.rename(old)
        else:
            with partial.open("rb+" if os.name == "nt" else "rb") as written:  # Windows syncs what one may write
                os.fsync(written.fileno())  # the content reaches the disk before the name does
        try:
            partial.replace(target)
        finally:
            _remove(old)


@contextmanager
def hold_beside(target: Path, folder: bool = False) -> Iterator[Path]:
    """Hold a hidden file or folder beside a place while a block runs; what killed processes left there is removed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for abandoned in target.parent.glob(f".????????.partial.{escape(target.name)}"):
        with locked(abandoned, wait=False) as alone:  # nobody else holds its lock
            if alone:
                _remove(abandoned)
    partial = _name_beside(target)
    partial.mkdir() if folder else partial.touch()
    try:
        with locked(partial, wait=False):
            yield partial
    finally:
        _remove(partial)


def _name_beside(target: Path) -> Path:
    return target.with_name(f".{uuid4().hex[:8]}.partial.{target.name}")


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def find_repeated(names: Iterable[T]) -> list[T]:
    """The names that occur more than once, sorted."""
    return sorted(name for name, count in Counter(names).items() if count > 1)  # type: ignore[type-var]


def hash_file(path: str | Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while block := file.read(HASHED_BYTES):
            digest.update(block)
    return digest.hexdigest()


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file, whole or not at all."""
    with write_whole(path) as partial:
        partial.write_text(text, encoding="utf-8")


@contextmanager
def locked(path: str | Path, wait: bool = True) -> Iterator[bool]:
    """Hold a folder or a file while a block runs: no other process that asks for it holds it at the same time.

    The operating system frees what a process held that dies. With ``wait`` a folder is created and waited for. The
    block gets whether it is held: where the system has no such lock (Windows, some network disks) it runs without.
    """
    if wait:
        Path(path).mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        held = False
        with suppress(OSError, ImportError):
            import fcntl  # not on Windows

            handle = os.open(path, os.O_RDONLY)
            stack.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        yield held


def read_table(path: str | Path) -> list[dict[str, str]]:
    """Read a TSV file with a header line: a dictionary of strings per row. ValueError if the file is no such table."""
    try:
        with Path(path).open(encoding="utf-8-sig", newline="") as file:
            columns, *rows = [row for row in csv.reader(file, delimiter="\t", strict=True) if row] or [[]]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: a tab-separated table in UTF-8 is needed, found {error}") from error
    twice = find_repeated(filter(None, columns))
    refuse_if(twice, f"{path}: columns with different names are needed", f"twice: {', '.join(twice)}")
    for number, row in enumerate(rows, 2):
        refuse_if(len(row) != len(columns), f"{path}: line {number} must have {len(columns)} cells", len(row))
    cells = [[cell[1:] if cell.startswith("'") and _is_formula(cell) else cell for cell in row] for row in rows]
    return [dict(zip(columns, row, strict=True)) for row in cells]


def write_table(path: str | Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a TSV file with a header line, whole or not at all, with an apostrophe before texts that are formulas."""
    with write_whole(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(columns)
        for row in rows:
            writer.writerow([f"'{cell}" if isinstance(cell, str) and _is_formula(cell) else cell for cell in row])


def _is_formula(cell: str) -> bool:
    """Whether a spreadsheet would compute a cell, also behind apostrophes; numbers are no formulas."""
    text = cell.lstrip("'")
    with suppress(ValueError):
        float(text)
        return False
    return text.startswith(FORMULA)
