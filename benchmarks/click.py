"""Time and memory of a click in MONAI Label: labels of a scan, as 3D Slicer asks for them, by the stock app and by ours.

In the environment of ``make label-server``:

    python benchmarks/click.py SCAN... [--clicks N]

Each app's server gets every SCAN by upload and is asked for its labels N times (default 3), with the settings that an annotator gets
first. Printed are, for each app and scan, the first click, the median of the others, the CPU seconds of a click, and the peak of the
server's memory up to then (``VmHWM`` of ``/proc``). A server of its own answers for each scan.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import nibabel as nib
import requests

REPOSITORY = Path(__file__).resolve().parents[1]
MODEL = "brain_multitask"
PATIENCE_S = 600
TICKS = os.sysconf("SC_CLK_TCK")


def make_command(app: str, folder: Path) -> list[str]:
    """The app, with the options that it needs."""
    if app == "ours":
        return ["--app", str(REPOSITORY / "monailabel_app")]
    download = ["-m", "monailabel.main", "apps", "--download", "--name", "monaibundle", "--output", str(folder)]
    subprocess.run([sys.executable, *download], check=True, capture_output=True)
    link = folder / "monaibundle" / "model" / MODEL
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(REPOSITORY / "bundle")
    conf = ["--conf", "models", MODEL, "--conf", "zoo_source", "local", "--conf", "sam2", "false"]
    return ["--app", str(folder / "monaibundle"), *conf]


def cpu_seconds(pid: int) -> float:
    """CPU seconds of a process so far, all threads."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def peak_gb(pid: int) -> float:
    """Peak of the resident memory of a process."""
    lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) * 1024 / 1e9


def wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    """Return when the server answers."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end and server.poll() is None:
        try:
            requests.get(f"{url}/info/", timeout=PATIENCE_S)
        except requests.ConnectionError:
            time.sleep(0.5)
        else:
            return
    raise SystemExit(f"{url}: the server did not start")


def measure(app: str, scan: Path, clicks: int) -> str:
    """A row of the table."""
    with tempfile.TemporaryDirectory() as name, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        folder = Path(name)
        (folder / "studies").mkdir()
        command = [sys.executable, "-m", "monailabel.main", "start_server", "--studies", str(folder / "studies")]
        command += ["--host", "127.0.0.1", "--port", str(port), *make_command(app, folder)]
        url, query = f"http://127.0.0.1:{port}", {"image": "scan", "output": "image"}
        form = {"params": json.dumps({"result_dtype": "uint8"})}
        with (folder / "log").open("w") as log:
            server = subprocess.Popen(command, stdout=log, stderr=log)
            try:
                wait_for(url, server)
                with scan.open("rb") as file:
                    requests.put(
                        f"{url}/datastore/",
                        params={"image": "scan"},
                        files={"file": (scan.name, file)},
                        timeout=PATIENCE_S,
                    ).raise_for_status()
                seconds, used = [], []
                for _ in range(clicks):
                    begun, before = time.perf_counter(), cpu_seconds(server.pid)
                    answer = requests.post(f"{url}/infer/{MODEL}", params=query, data=form, timeout=PATIENCE_S)
                    answer.raise_for_status()
                    seconds.append(time.perf_counter() - begun)
                    used.append(cpu_seconds(server.pid) - before)
                peak = peak_gb(server.pid)
            finally:
                server.terminate()
                server.wait()
    shape = " x ".join(map(str, nib.load(scan).shape))  # type: ignore[attr-defined]
    later = median(seconds[1:] or seconds)
    return f"| {app} | {scan.name} | {shape} | {seconds[0]:.1f} | {later:.1f} | {median(used):.1f} | {peak:.1f} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scans", nargs="+", type=Path)
    parser.add_argument("--clicks", type=int, default=3)
    chosen = parser.parse_args()
    print("| app | scan | voxels | first click, s | later, s | CPU, s | peak, GB |\n|---|---|---|---|---|---|---|")
    for app in ("stock", "ours"):
        for scan in chosen.scans:
            print(measure(app, scan, chosen.clicks), flush=True)


if __name__ == "__main__":
    main()
