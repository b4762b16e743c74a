"""Open data sets: a table of their files, and a download that resumes and checks."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from tqdm import tqdm

from brainfm_monai.data.subjects import hash_file

__all__ = ["DownloadError", "NoNetworkError", "OpenFile", "fetch_dataset", "read_open_sets"]

TIMEOUT_S = 30
PARTIAL_CONTENT = 206
TEXT = ("name", "file", "address", "sha256")


class DownloadError(RuntimeError):
    """Some files could not be fetched; the others were."""


class NoNetworkError(ConnectionError):
    """The server cannot be reached at all."""


class OpenFile(NamedTuple):
    """One file of an open data set: a row of the table.

    Attributes:
        name: name of the set.
        file: path below the folder of the download.
        address: where it is.
        sha256: hash of its content.
        bytes: its size.
        licence: of the set.
        content: what the set holds.
    """

    name: str
    file: str
    address: str
    sha256: str
    bytes: int
    licence: str
    content: str


def read_open_sets(table: str | Path | None = None) -> dict[str, list[OpenFile]]:
    """The files of every set, from the package's table or another one of the same columns.

    Raises:
        FileNotFoundError: if there is no such table.
        ValueError: if a row is not what it should be, or would lead out of the folder of the download.
    """
    if table is not None and not Path(table).is_file():
        raise FileNotFoundError(f"{table}: a table of open data sets is needed, found no such file")
    source = Path(table) if table is not None else resources.files("brainfm_monai") / "datasets" / "open.tsv"
    rows = list(csv.DictReader(source.read_text(encoding="utf-8").splitlines(), delimiter="\t"))
    sets: dict[str, list[OpenFile]] = {}
    for row in rows:
        try:
            file = OpenFile._make([*(row[key] for key in TEXT), int(row["bytes"]), row["licence"], row["content"]])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{source}: the columns {' '.join(OpenFile._fields)} are needed, found {list(row)}"
            ) from error
        path = PurePosixPath(file.file)
        if path.is_absolute() or ".." in path.parts or urlsplit(file.address).scheme not in ("http", "https"):
            raise ValueError(
                f"{source}: a relative path and an http address are needed, found {file.file} {file.address}"
            )
        sets.setdefault(file.name, []).append(file)
    return sets


def fetch_dataset(name: str, output_dir: str | Path, *, table: str | Path | None = None, jobs: int = 4) -> list[Path]:
    """Download a set; files that are there whole are kept, and an interrupted one goes on where it was.

    Args:
        name: name of the set in the table.
        output_dir: folder for the files.
        table: another table than the package's.
        jobs: downloads at once.

    Returns:
        The files, in the order of the table.

    Raises:
        ValueError: if the table has no such set.
        NoNetworkError: if a server cannot be reached.
        DownloadError: at the end, if files could not be fetched or are not what the table says: one line for each.
    """
    sets = read_open_sets(table)
    if name not in sets:
        raise ValueError(
            f"{name}: an open data set of the table is needed ({', '.join(sorted(sets))}), found no such name"
        )
    files = sets[name]
    targets = [Path(output_dir) / file.file for file in files]
    with tqdm(total=sum(file.bytes for file in files), desc=name, unit="B", unit_scale=True) as bar:
        failures = _fetch_all(files, targets, bar, max(1, jobs))
    if failures:
        raise DownloadError(f"{len(failures)} of {len(files)} files were not fetched:\n" + "\n".join(failures))
    return targets


def _fetch_all(files: Sequence[OpenFile], targets: Sequence[Path], bar: tqdm, jobs: int) -> list[str]:
    failures = []
    pool = ThreadPoolExecutor(jobs)
    try:
        running = [pool.submit(_fetch, file, target, bar) for file, target in zip(files, targets, strict=True)]
        for done in running:
            try:
                done.result()
            except DownloadError as error:
                failures.append(str(error))
    finally:
        pool.shutdown(cancel_futures=True)
    return failures


def _fetch(file: OpenFile, target: Path, bar: tqdm) -> None:
    """Fetch one file; it appears whole, with the right hash, or not at all."""
    if target.is_file() and hash_file(target) == file.sha256:
        bar.update(file.bytes)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    _download(file, part, bar)
    found = hash_file(part)
    if found != file.sha256:
        part.unlink()
        raise DownloadError(
            f"{file.file}: SHA-256 {file.sha256[:12]}... is needed, found {found[:12]}... at {file.address}"
        )
    part.replace(target)


def _download(file: OpenFile, part: Path, bar: tqdm) -> None:
    """Append to a partial file what is missing of it, or start anew where the server cannot."""
    have = part.stat().st_size if part.is_file() else 0
    if have >= file.bytes > 0:
        bar.update(file.bytes)
        return
    request = Request(file.address, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urlopen(request, timeout=TIMEOUT_S) as response:
            resumed = response.status == PARTIAL_CONTENT
            with part.open("ab" if resumed else "wb") as stream:
                shutil.copyfileobj(response, stream)
    except HTTPError as error:
        error.close()  # it holds the connection
        raise DownloadError(f"{file.file}: the server of {file.address} answers {error.code} {error.reason}") from error
    except (URLError, ConnectionError, TimeoutError) as error:
        reason = getattr(error, "reason", error)
        host = urlsplit(file.address).hostname
        raise NoNetworkError(
            f"{file.file}: {host} cannot be reached ({reason}): is there a network? What is there stays, run it again to go on"
        ) from error
    bar.update(file.bytes)
