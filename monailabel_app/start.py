"""Start the server on this machine, and say what to type in 3D Slicer and in OHIF: ``make label-server STUDIES=folder``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

APP = Path(__file__).resolve().parent
ADDRESS = "127.0.0.1"  # loopback: nobody else on the network reaches the server
TEXT = """
The server will be at {url} (stop it with Ctrl-C). Scans: {studies}

3D Slicer, with the extension MONAILabel: module "MONAI Label", address {url}, then "Next Sample", "Run", correct, "Submit Label",
and "Train". Colours and maps, in Slicer's Python console:

    import urllib.request
    exec(urllib.request.urlopen("{url}/slicer.py").read())
    load_map("NAME OF THE SCAN", "T1w")        # after the model brain_maps has run

OHIF, for the scans of a DICOMweb archive: {url}/ohif/

docs/monai-label.md shows each step.

"""


def main() -> None:
    """Set the server up and become it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("studies", help="folder of NIfTI files, or the address of a DICOMweb archive")
    parser.add_argument("--port", default="8000")
    parser.add_argument(
        "--structures", choices=("head", "brain"), default="head", help="what the list of structures holds"
    )
    parser.add_argument("--bundle", default=str(APP.parent / "bundle"))
    chosen = parser.parse_args()
    remote = chosen.studies.startswith(("http://", "https://"))
    if not remote and not Path(chosen.studies).is_dir():
        raise SystemExit(f"{chosen.studies}: a folder of scans is needed, found no such folder: STUDIES=folder")
    os.environ.setdefault(
        "MONAI_LABEL_DICOMWEB_SEARCH_FILTER", '{"Modality": "MR"}'
    )  # the default of MONAI Label is CT
    url = f"http://{ADDRESS}:{chosen.port}"
    sys.stdout.write(TEXT.format(url=url, studies=chosen.studies))
    sys.stdout.flush()
    server = ["-m", "monailabel.main", "start_server", "--app", str(APP), "--studies", chosen.studies]
    server += ["--host", ADDRESS, "--port", chosen.port]
    server += ["--conf", "bundle", chosen.bundle, "--conf", "structures", chosen.structures]
    os.execv(sys.executable, [sys.executable, *server])


if __name__ == "__main__":
    main()
