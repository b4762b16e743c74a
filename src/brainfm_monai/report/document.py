"""The page itself: one HTML file that holds its pictures and needs nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

import nibabel as nib
import numpy as np

from brainfm_monai.anatomy import Structure
from brainfm_monai.outputs import ScanResult, compute_totals_mm3, compute_volumes_mm3
from brainfm_monai.report.figures import draw_panels, draw_segmentation, encode_figure, sections
from brainfm_monai.report.page import Page

__all__ = ["compose_document", "volume_rows", "write_report"]

STYLE = """
:root { color-scheme: dark; }
body { background: #000; color: #e8e8e8; font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1240px; padding: 20px; }
h1 { font-size: 24px; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 17px; margin: 28px 0 6px; color: #9cf; }
p { margin: 4px 0; } .quiet { color: #999; font-size: 13px; } img { width: 100%; display: block; }
.warnings { border: 1px solid #e0a030; background: #2a1e06; border-radius: 6px; padding: 8px 14px; margin: 14px 0; }
.clear { border-color: #2f7d4a; background: #08200f; }
table { border-collapse: collapse; font-size: 14px; } td, th { padding: 2px 14px 2px 4px; border-bottom: 1px solid #2c2c2c; }
th { text-align: left; color: #999; font-weight: 500; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
.swatch { display: inline-block; width: 12px; height: 12px; border-radius: 2px; margin-right: 8px; vertical-align: -1px; }
.columns { display: flex; flex-wrap: wrap; gap: 0 60px; align-items: flex-start; } a { color: #9cf; }
"""
CONVENTION = (
    "Radiological convention: the patient's right (R) is on the left of a picture, and in sagittal slices anterior (A). "
    "Slices follow the axes of the scan, in true proportions."
)


def write_report(scan: ScanResult) -> None:
    """Write the page of one scan, ``_report.html``: see :func:`compose_document`."""
    scan.path("report.html").write_text(compose_document(scan), encoding="utf-8")


def compose_document(scan: ScanResult) -> str:
    """The page of one scan as HTML: warnings, pictures of every map, volumes, and what was used."""
    page = Page.of(scan)
    parts = [*_heading(scan), *_warnings(scan)]
    parts += _figure(
        "Scan and segmentation",
        "colours as in the table of volumes; tissues of the head are faint",
        draw_segmentation(page),
    )
    for heading, panels in sections(page):
        parts += _figure(heading, "; ".join(panel.title for panel in panels), draw_panels(page, panels))
    parts += _volume_table(scan)
    parts += _settings(scan)
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(scan.name)}</title>'
    )
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en">\n<head>{head}<style>{STYLE}</style></head>\n<body>\n{body}\n</body>\n</html>\n'


def _heading(scan: ScanResult) -> Iterator[str]:
    size = " x ".join(str(n) for n in scan.labels.shape)
    zooms = " x ".join(f"{z:.2f}" for z in nib.affines.voxel_sizes(scan.affine))
    axes = "".join(nib.orientations.aff2axcodes(scan.affine))
    yield f"<h1>{escape(scan.name)}</h1>"
    taken = [f"volume {scan.frame} of its file"] * (scan.frame is not None) + [f"CT, {scan.window} HU"] * bool(
        scan.window
    )
    yield f"<p>{escape('; '.join([f'{size} voxels of {zooms} mm, stored as {axes}', *taken]))}</p>"
    yield f'<p class="quiet">{escape(CONVENTION)} For research; not a medical device.</p>'
    if (view := scan.path("view.html")).is_file():
        yield f'<p id="view"><a href="{escape(view.name)}">Turn and slice it in the interactive view</a></p>'


def _warnings(scan: ScanResult) -> Iterator[str]:
    if not scan.warnings:
        yield '<div class="warnings clear">No rule of quality found anything. Look at the pictures all the same.</div>'
        return
    lines = "".join(f"<p>{escape(warning)}</p>" for warning in scan.warnings)
    yield f'<div class="warnings"><strong>Look at this first</strong>{lines}</div>'


def _figure(heading: str, caption: str, figure: object) -> Iterator[str]:
    yield f"<h2>{escape(heading)}</h2>"
    yield f'<p class="quiet">{escape(caption)}</p>'
    yield f'<img alt="{escape(heading)}: {escape(caption)}" src="{encode_figure(figure)}">'  # type: ignore[arg-type]


def volume_rows(scan: ScanResult) -> list[tuple[Structure, float, float | None]]:
    """Structures of the brain: the structure, its volume in mL, and that of its right side, None without sides."""
    protocol = scan.layout.protocol
    hard = compute_volumes_mm3(scan.labels, scan.affine, len(protocol))
    volumes = (hard if scan.soft_volumes_mm3 is None else scan.soft_volumes_mm3) / 1000
    rows: list[tuple[Structure, float, float | None]] = []
    for s in protocol.structures:
        if protocol.is_brain[s.label] and s.side != "right":
            rows.append((s, float(volumes[s.label]), float(volumes[s.mirror]) if s.side == "left" else None))
    return rows


def _volume_table(scan: ScanResult) -> Iterator[str]:
    rows = volume_rows(scan)
    soft = scan.soft_volumes_mm3
    protocol = scan.layout.protocol
    best = compute_volumes_mm3(scan.labels, scan.affine, len(protocol)) if soft is None else soft
    yield "<h2>Volumes, mL</h2>"
    kind = "voxels counted" if soft is None else "sums of probabilities; a voxel that is half a structure counts half"
    yield f'<p class="quiet">{kind}. All numbers: {escape(scan.path("volumes.tsv").name)}</p><div class="columns">'
    totals = "".join(
        f'<tr><td>{name.replace("-", " ")}</td><td class="number">{volume / 1000:.0f}</td></tr>'
        for name, volume in compute_totals_mm3(np.asarray(best), protocol).items()
    )
    yield f"<table><tr><th>total</th><th class=number>mL</th></tr>{totals}</table>"
    paired = "".join(_sided_row(s, left, right) for s, left, right in rows if right is not None)
    yield f"<table><tr><th>structure</th><th class=number>left</th><th class=number>right</th></tr>{paired}</table>"
    single = "".join(
        f'<tr><td>{_swatch(s)}</td><td class="number">{volume:.1f}</td></tr>'
        for s, volume, right in rows
        if right is None
    )
    yield f"<table><tr><th>structure</th><th class=number>mL</th></tr>{single}</table></div>"


def _sided_row(structure: Structure, left: float, right: float) -> str:
    return (
        f'<tr><td>{_swatch(structure)}</td><td class="number">{left:.1f}</td><td class="number">{right:.1f}</td></tr>'
    )


def _swatch(structure: Structure) -> str:
    colour = "#{:02x}{:02x}{:02x}".format(*structure.colour)
    name = structure.name.removeprefix("Left-").removeprefix("Right-").replace("-", " ")
    return f'<span class="swatch" style="background:{colour}"></span>{escape(name)}'


def _settings(scan: ScanResult) -> Iterator[str]:
    used = scan.settings
    weights = f"{used.weights} (SHA-256 {used.weights_sha256[:12]})" if used.weights else "not stated"
    text = (
        f"{used.model} {used.version}, weights {weights}, protocol {used.protocol}, mode {used.mode}, grid {used.grid}"
    )
    yield f'<h2>What was used</h2><p class="quiet">{escape(text)}<br>Source: {escape(str(scan.source))}</p>'
