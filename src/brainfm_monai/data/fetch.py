"""Open data sets: a table of their files, and a download that checks them."""

from __future__ import annotations

import logging
import shutil
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import urlopen

from tqdm import tqdm

from brainfm_monai.data.subjects import hash_file
from brainfm_monai.io import read_table, write_whole

logger = logging.getLogger(__name__)

TIMEOUT_S = 30


class DownloadError(OSError):
    """Some files could not be fetched; the others were."""


class NoNetworkError(ConnectionError):
    """The server cannot be reached at all."""


class OpenFile(NamedTuple):
    """One file of an open data set: a row of the table."""

    name: str  # of the set
    file: str  # path below the folder of the download
    address: str
    sha256: str
    bytes: int
    licence: str
    content: str  # what the set holds


def read_open_sets(table: str | Path | None = None) -> dict[str, list[OpenFile]]:
    """The files of every set, from the package's table or another one of the same columns.

    FileNotFoundError if there is no such table, ValueError if a row is not what it should be, or would lead out of the folder of
    the download.
    """
    source = Path(table or str(resources.files("brainfm_monai") / "datasets" / "open.tsv"))
    if not source.is_file():
        raise FileNotFoundError(f"{table}: a table of open data sets is needed, found no such file")
    sets: dict[str, list[OpenFile]] = {}
    for row in read_table(source):
        if set(OpenFile._fields) - set(row) or not row["bytes"].isdigit():
            raise ValueError(f"{source}: the columns {' '.join(OpenFile._fields)} are needed, found {list(row)}")
        file = OpenFile._make(int(row[key]) if key == "bytes" else row[key] for key in OpenFile._fields)
        path = PurePosixPath(file.file)
        if path.is_absolute() or ".." in path.parts or urlsplit(file.address).scheme not in ("http", "https"):
            needed = f"{source}: a relative path and an http address are needed"
            raise ValueError(f"{needed}, found {file.file} {file.address}")
        sets.setdefault(file.name, []).append(file)
    return sets


def fetch_dataset(name: str, output: str | Path, *, table: str | Path | None = None, jobs: int = 4) -> list[Path]:
    """Download an open data set and check its hashes; what is there already is kept. Returns its files.

    ``synthseg``: 20 label maps of whole heads (Apache-2.0). ``open_ms``: T1w, T2w and FLAIR of people with multiple sclerosis,
    as a BIDS folder (CC-BY).

    Args:
        name: name of the set.
        output: folder for its files.
        table: another table of files than the package's (columns name, file, address, sha256, bytes, licence, content).
        jobs: downloads at once.

    Raises:
        ValueError: if the table has no such set.
        NoNetworkError: if a server cannot be reached.
        DownloadError: at the end, if files could not be fetched or are not what the table says: one line for each.
    """
    sets, failures = read_open_sets(table), []
    if name not in sets:
        needed = f"an open data set of the table is needed ({', '.join(sorted(sets))})"
        raise ValueError(f"{name}: {needed}, found no such name")
    files, pool = sets[name], ThreadPoolExecutor(max(1, jobs))
    targets = [Path(output) / file.file for file in files]
    try:
        with tqdm(total=sum(file.bytes for file in files), desc=name, unit="B", unit_scale=True) as bar:
            running = [pool.submit(_fetch, file, target) for file, target in zip(files, targets, strict=True)]
            for file, done in zip(files, running, strict=True):
                try:
                    done.result()
                except DownloadError as error:
                    failures.append(str(error))
                bar.update(file.bytes)
    finally:
        pool.shutdown(cancel_futures=True)
    if failures:
        raise DownloadError(f"{len(failures)} of {len(files)} files were not fetched:\n" + "\n".join(failures))
    logger.info("%d files of %s in %s", len(files), name, output)
    return targets


def _fetch(file: OpenFile, target: Path) -> None:
    """Fetch one file; it appears whole, with the right hash, or not at all."""
    if target.is_file() and hash_file(target) == file.sha256:
        return
    try:
        with urlopen(file.address, timeout=TIMEOUT_S) as response, write_whole(target) as partial:
            with partial.open("wb") as stream:
                shutil.copyfileobj(response, stream)
            found = hash_file(partial)
            if found != file.sha256:
                needed = f"{file.file}: SHA-256 {file.sha256[:12]}... is needed"
                raise DownloadError(f"{needed}, found {found[:12]}... at {file.address}")
    except HTTPError as error:
        error.close()  # it holds the connection
        raise DownloadError(f"{file.file}: the server of {file.address} answers {error.code} {error.reason}") from error
    except (URLError, ConnectionError, TimeoutError) as error:
        host, reason = urlsplit(file.address).hostname, getattr(error, "reason", error)
        advice = "is there a network? Whole files stay, run it again to continue"
        raise NoNetworkError(f"{file.file}: {host} cannot be reached ({reason}): {advice}") from error
