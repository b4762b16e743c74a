"""The interactive view: one HTML file with the scan, its segmentation, and NiiVue out of the wheel of ipyniivue."""

import base64
import binascii
import logging
import re
from functools import lru_cache
from importlib import util
from pathlib import Path

import nibabel as nib
import numpy as np
from isal import igzip
from markupsafe import Markup

from brainfm_monai.io import write_text
from brainfm_monai.outputs.result import PACKING, ScanResult
from brainfm_monai.report.page import render

logger = logging.getLogger(__name__)

WINDOW_PERCENTILES = (0.5, 99.8)  # of the head
# The widget of ipyniivue carries NiiVue's own bundle as percent-encoded text, for pages that it saves.
BUNDLE = re.compile(r'="([A-Za-z0-9_.!~*\'()%-]{500000,})"')
EXPORT = re.compile(r"export\{[^{}]*\bNiivue\b[^{}]*\};?\s*$")


@lru_cache(maxsize=1)
def find_niivue() -> str | None:
    """NiiVue's script out of the package ipyniivue, without its exports; None if the package is not installed.

    Where the script is missing one line reports it, once for each run.
    """
    package, reason = util.find_spec("ipyniivue"), "found no package ipyniivue"
    if package is not None and package.origin:
        widget = Path(package.origin).parent / "static" / "widget.js"
        bundle = BUNDLE.search(widget.read_text(encoding="utf-8")) if widget.is_file() else None
        # percent-encoded text is quoted-printable text with another sign: binascii decodes it faster than urllib does
        text = binascii.a2b_qp(bundle[1].replace("%", "=")).decode("utf-8") if bundle else ""
        script, count = EXPORT.subn("", text)
        if count:
            return script
        reason = f"found an ipyniivue without it ({widget})"
    logger.warning("no interactive view: NiiVue is needed, %s: pip install 'ipyniivue>=2.4.4,<2.5'", reason)
    return None


def compose_view(scan: ScanResult, script: str) -> str:
    """The view as HTML: the scan in 256 grey values, the labels with names and colours, and NiiVue."""
    image, head = scan.image.cpu().numpy()[0], scan.labels > 0
    low, high = np.percentile(image[head] if head.any() else image, WINDOW_PERCENTILES)
    grey = np.clip((image - low) / max(high - low, 1e-6) * 255, 0, 255).astype(np.uint8)
    files = [nib.Nifti1Image(volume, scan.affine).to_bytes() for volume in (grey, scan.labels)]
    packed = [base64.b64encode(igzip.compress(file, PACKING, mtime=0)).decode("ascii") for file in files]
    safe = Markup(script.replace("</script", "<\\/script"))  # a script of a package, not of a scan
    return render("view.html", title=scan.name, script=safe, volumes=packed, protocol=scan.layout.protocol)


def write_view(scan: ScanResult) -> None:
    """Write the interactive view, ``_view.html``, where NiiVue is installed; it opens without a network."""
    if (script := find_niivue()) is not None:
        write_text(scan.path("view.html"), compose_view(scan, script))
