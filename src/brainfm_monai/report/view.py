"""The interactive view: one HTML file with the scan, its segmentation, and NiiVue out of the wheel of ipyniivue."""

from __future__ import annotations

import base64
import gzip
import logging
import re
from functools import lru_cache
from importlib import util
from pathlib import Path
from urllib.parse import unquote

import nibabel as nib
import numpy as np
from markupsafe import Markup

from brainfm_monai.io import write_text
from brainfm_monai.outputs import ScanResult
from brainfm_monai.report.html import render

__all__ = ["compose_view", "find_niivue", "write_view"]

logger = logging.getLogger(__name__)

WINDOW_PERCENTILES = (0.5, 99.8)  # of the head
# The widget of ipyniivue carries NiiVue's own bundle as percent-encoded text, for pages that it saves.
BUNDLE = re.compile(r'="([A-Za-z0-9_.!~*\'()%-]{500000,})"')
EXPORT = re.compile(r"export\{[^{}]*\bNiivue\b[^{}]*\};?\s*$")


@lru_cache(maxsize=1)
def find_niivue() -> str | None:
    """NiiVue's script out of the installed package ipyniivue, without its exports; None if the package is not installed.

    Where the script is missing one line reports it, once for each run.
    """
    package = util.find_spec("ipyniivue")
    reason = "found no package ipyniivue"
    if package is not None and package.origin:
        widget = Path(package.origin).parent / "static" / "widget.js"
        found = BUNDLE.search(widget.read_text(encoding="utf-8")) if widget.is_file() else None
        script, count = EXPORT.subn("", unquote(found[1])) if found else ("", 0)
        if count:
            return script
        reason = f"found an ipyniivue without it ({widget})"
    logger.warning("no interactive view: NiiVue is needed, %s: pip install 'ipyniivue>=2.4.4,<2.5'", reason)
    return None


def write_view(scan: ScanResult) -> None:
    """Write the interactive view, ``_view.html``, where NiiVue is installed; it opens without a network."""
    script = find_niivue()
    if script is not None:
        write_text(scan.path("view.html"), compose_view(scan, script))


def compose_view(scan: ScanResult, script: str) -> str:
    """The view as HTML: the scan in 256 grey values, the label map, names and colours, and NiiVue's script."""
    image = scan.image.cpu().numpy()[0]
    low, high = np.percentile(image[scan.labels > 0] if (scan.labels > 0).any() else image, WINDOW_PERCENTILES)
    grey = np.clip((image - low) / max(high - low, 1e-6) * 255, 0, 255).astype(np.uint8)
    protocol = scan.layout.protocol
    structures = protocol.structures
    colours: dict[str, list[object]] = {
        channel: [s.colour[i] for s in structures] for i, channel in enumerate(("R", "G", "B"))
    }
    colours["A"] = [255 if protocol.is_brain[s.label] else 90 * (s.label > 0) for s in structures]
    colours |= {"I": [s.label for s in structures], "labels": [s.name for s in structures]}
    data = {
        "scan": _encode(grey, scan.affine),
        "labels": _encode(scan.labels, scan.affine),
        "names": [s.name if s.label else "" for s in structures],
        "colours": colours,
    }
    safe = Markup(script.replace("</script", "<\\/script"))  # a script of a package, not of a scan
    return render("view.html", title=scan.name, script=safe, data=data)


def _encode(volume: np.ndarray, affine: np.ndarray) -> str:
    image = nib.Nifti1Image(volume, affine)
    return base64.b64encode(gzip.compress(image.to_bytes(), compresslevel=3)).decode("ascii")
