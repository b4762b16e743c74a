"""The interactive view: one HTML file with the scan, its segmentation, and NiiVue from an installed package."""

from __future__ import annotations

import base64
import gzip
import json
import logging
import os
from functools import lru_cache
from html import escape
from pathlib import Path

import nibabel as nib
import numpy as np

from brainfm_monai.outputs import ScanResult

__all__ = ["compose_view", "find_niivue", "write_view"]

logger = logging.getLogger(__name__)

SCRIPT = Path("node_modules/@niivue/niivue/dist/niivue.umd.js")
WINDOW_PERCENTILES = (0.5, 99.8)  # of the head
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
html, body {{ margin: 0; height: 100%; background: #000; color: #ddd; font: 14px system-ui, sans-serif; }}
body {{ display: flex; flex-direction: column; }} main {{ flex: 1; min-height: 0; position: relative; }}
header {{ padding: 8px 14px; display: flex; gap: 24px; align-items: center; flex-wrap: wrap; }} #place {{ color: #9cf; }}
</style></head><body>
<header><strong>{title}</strong>
<label>segmentation <input id="opacity" type="range" min="0" max="1" step="0.05" value="0.4"></label>
<span id="place"></span></header>
<main><canvas id="view"></canvas></main>
<script>{script}</script>
<script>
const data = {data};
const viewer = new niivue.Niivue({{ show3Dcrosshair: true, isRadiologicalConvention: true, sagittalNoseLeft: true,
  onLocationChange: show }});
function show(location) {{
  const [x, y, z] = location.mm;
  const label = Math.round(location.values[1] ? location.values[1].value : 0);
  document.getElementById("place").textContent =
    `${{x.toFixed(1)}} ${{y.toFixed(1)}} ${{z.toFixed(1)}} mm  ${{data.names[label] || ""}}`;
}}
async function start() {{
  await viewer.attachToCanvas(document.getElementById("view"));
  for (const [name, base64] of [["scan.nii.gz", data.scan], ["segmentation.nii.gz", data.labels]])
    viewer.addVolume(await niivue.NVImage.loadFromBase64({{ base64, name }}));
  viewer.volumes[1].setColormapLabel(data.colours);
  viewer.setOpacity(1, 0.4);
  viewer.setSliceType(viewer.sliceTypeMultiplanar);
  viewer.updateGLVolume();
  document.getElementById("opacity").oninput = (event) => viewer.setOpacity(1, Number(event.target.value));
  document.body.dataset.ready = "yes";
}}
start();
</script></body></html>
"""


@lru_cache(maxsize=1)
def find_niivue() -> str | None:
    """The script of the npm package ``@niivue/niivue``, installed here, in a folder above, or in ``NODE_PATH``; None: not at all.

    Where it is missing one line tells, once for each run.
    """
    here = Path.cwd()
    places = [folder / SCRIPT for folder in (here, *here.parents)]
    places += [
        Path(folder) / SCRIPT.relative_to("node_modules")
        for folder in os.environ.get("NODE_PATH", "").split(os.pathsep)
        if folder
    ]
    for place in places:
        if place.is_file():
            return place.read_text(encoding="utf-8")
    logger.warning("no interactive view: NiiVue is needed, found no %s: run 'npm install @niivue/niivue' here", SCRIPT)
    return None


def write_view(scan: ScanResult) -> None:
    """Write the interactive view, ``_view.html``, where NiiVue is installed; it opens without a network."""
    script = find_niivue()
    if script is not None:
        scan.path("view.html").write_text(compose_view(scan, script), encoding="utf-8")


def compose_view(scan: ScanResult, script: str) -> str:
    """The view as HTML: the scan in 256 grey values, the label map, names and colours, and NiiVue's script."""
    image = scan.image.cpu().numpy()[0]
    low, high = np.percentile(image[scan.labels > 0] if (scan.labels > 0).any() else image, WINDOW_PERCENTILES)
    grey = np.clip((image - low) / max(high - low, 1e-6) * 255, 0, 255).astype(np.uint8)
    protocol = scan.layout.protocol
    structures = protocol.structures
    colours = {
        "R": [s.colour[0] for s in structures],
        "G": [s.colour[1] for s in structures],
        "B": [s.colour[2] for s in structures],
        "A": [255 if protocol.is_brain[s.label] else 90 * (s.label > 0) for s in structures],
        "I": [s.label for s in structures],
        "labels": [s.name for s in structures],
    }
    data = {
        "scan": _encode(grey, scan.affine),
        "labels": _encode(scan.labels, scan.affine),
        "names": [s.name if s.label else "" for s in structures],
        "colours": colours,
    }
    safe = script.replace("</script", "<\\/script")
    return PAGE.format(title=escape(scan.name), script=safe, data=json.dumps(data).replace("</", "<\\/"))


def _encode(volume: np.ndarray, affine: np.ndarray) -> str:
    image = nib.Nifti1Image(volume, affine)
    return base64.b64encode(gzip.compress(image.to_bytes(), compresslevel=6)).decode("ascii")
