"""Downloads from a server on this machine: whole files, resumed ones, wrong ones, and none at all."""

from __future__ import annotations

import hashlib
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from brainfm_monai import cli
from brainfm_monai.data import fetch
from brainfm_monai.data.fetch import DownloadError, fetch_dataset, read_open_sets

FILES = {"a.nii.gz": bytes(range(256)) * 40, "sub-01/anat/b.nii.gz": b"scan" * 3000}


@dataclass
class Server:
    """Address, what is asked of it, whether it knows ranges, and the share of a file that it sends."""

    address: str = ""
    ranges: list[str | None] = field(default_factory=list)
    resumes: bool = True
    share: float = 1.0


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = FILES.get(self.path.lstrip("/"))
            if content is None:
                self.send_error(404, "Not Found")
                return
            asked = self.headers.get("Range")
            state.ranges.append(asked)
            start = int(re.sub(r"\D", "", asked)) if asked and state.resumes else 0
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            self.wfile.write(content[start : round(len(content) * state.share)])

        def log_message(self, format: str, *args: object) -> None:
            """Keep quiet."""

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=listening.serve_forever)
    thread.start()
    state.address = f"http://127.0.0.1:{listening.server_address[1]}"
    yield state
    listening.shutdown()
    listening.server_close()
    thread.join()


def write_table(path: Path, address: str, files: dict[str, bytes] = FILES) -> Path:
    rows = ["name\tfile\taddress\tsha256\tbytes\tlicence\tcontent"]
    for name, content in files.items():
        row = ("tiny", name, f"{address}/{name}", hashlib.sha256(content).hexdigest(), str(len(content)), "CC0", "test")
        rows.append("\t".join(row))
    path.write_text("\n".join(rows), encoding="utf-8")
    return path


def test_files_arrive_whole_and_are_not_fetched_twice(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "TABLE", write_table(tmp_path / "table.tsv", server.address))
    paths = fetch_dataset("tiny", tmp_path / "out")
    assert [path.read_bytes() for path in paths] == list(FILES.values())
    assert sorted(f.name for f in (tmp_path / "out").rglob("*") if f.is_file()) == ["a.nii.gz", "b.nii.gz"]
    paths[0].write_bytes(b"changed")
    fetch_dataset("tiny", tmp_path / "out")
    assert paths[0].read_bytes() == FILES["a.nii.gz"]
    assert len(server.ranges) == 3


def test_a_wrong_file_is_refused_and_the_others_come(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "TABLE", tmp_path / "table.tsv")
    table = write_table(tmp_path / "table.tsv", server.address, {**FILES, "gone.nii.gz": b"none"})
    text = table.read_text(encoding="utf-8")
    table.write_text(text.replace(hashlib.sha256(FILES["a.nii.gz"]).hexdigest(), "0" * 64), encoding="utf-8")
    with pytest.raises(DownloadError) as caught:
        fetch_dataset("tiny", tmp_path / "out", jobs=1)
    message = str(caught.value).splitlines()
    assert message[0] == "2 of 3 files were not fetched:"
    assert message[1].startswith("a.nii.gz: SHA-256 000000000000... is needed, found ")
    assert message[2].endswith("/gone.nii.gz answers 404 Not Found")
    assert [f.name for f in (tmp_path / "out").rglob("*") if f.is_file()] == ["b.nii.gz"]


def test_an_answer_that_breaks_off_is_one_line(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "TABLE", write_table(tmp_path / "table.tsv", server.address))
    server.share = 0.5
    with pytest.raises(
        DownloadError, match=r"^2 of 2 files.*\na\.nii\.gz: the answer of http://.* breaks off: "
    ) as raised:
        fetch_dataset("tiny", tmp_path / "out")
    assert str(raised.value).count("\n") == 2
    assert not [f for f in (tmp_path / "out").rglob("*") if f.is_file()]
    server.share = 1.0
    assert [path.read_bytes() for path in fetch_dataset("tiny", tmp_path / "out")] == list(FILES.values())


def test_no_network_is_told_plainly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as silent:  # it has its port, so that nobody else does, and does not listen
        silent.bind(("127.0.0.1", 0))
        table = write_table(tmp_path / "table.tsv", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(fetch, "TABLE", table)
        with pytest.raises(DownloadError, match=r"a\.nii\.gz: 127\.0\.0\.1 cannot be reached .* is there a network\?"):
            fetch_dataset("tiny", tmp_path / "out")
        monkeypatch.setattr("sys.argv", ["brainfm-monai", "data", "fetch", "tiny", str(tmp_path / "out")])
        with pytest.raises(SystemExit, match=r"^brainfm-monai: a\.nii\.gz: 127\.0\.0\.1 cannot be reached"):
            cli.main()


def test_the_package_lists_open_sets() -> None:
    sets = read_open_sets()
    assert len(sets["synthseg"]) == 20
    assert all(re.fullmatch(r"[0-9a-f]{64}", file["sha256"]) for files in sets.values() for file in files)
    assert all(
        file["address"].startswith("https://") and int(file["bytes"]) > 1e6 for files in sets.values() for file in files
    )
    assert {file["licence"] for file in sets["synthseg"]} == {"Apache-2.0"}
    people = [file["file"].split("/")[0] for file in sets["open_ms"]]
    assert all(people.count(person) == 3 for person in people)


@pytest.mark.shared_data
def test_the_hashes_are_those_of_the_real_files(shared_data: Path) -> None:
    maps = {file["file"]: file for file in read_open_sets()["synthseg"]}
    found = sorted((shared_data / "synthseg" / "training_label_maps").glob("*.nii.gz"))
    assert len(found) == 17
    for path in found:
        content = path.read_bytes()
        assert (hashlib.sha256(content).hexdigest(), str(len(content))) == (
            maps[path.name]["sha256"],
            maps[path.name]["bytes"],
        )


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"nothing: an open data set of the table is needed \(open_ms, synthseg\), found no such"
    ):
        fetch_dataset("nothing", tmp_path)
