"""The page of one scan: warnings, pictures of every map, volumes, and what was used, in one file that needs nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import nibabel as nib
import numpy as np

from brainfm_monai.anatomy import Protocol
from brainfm_monai.io import write_text
from brainfm_monai.outputs import (
    ScanResult,
    compute_totals_mm3,
    compute_volumes_mm3,
    fit_scan_to_template,
    grow_surfaces,
)
from brainfm_monai.outputs.template import load_template
from brainfm_monai.report.html import data_address, render
from brainfm_monai.report.surfaces import draw_surface_cells, surface_caption
from brainfm_monai.slices import (
    BONE_WINDOW_HU,
    BRAIN_WINDOW_HU,
    Cell,
    Slice,
    blend,
    compose,
    cut_slices,
    encode,
    heat,
    outline,
    paint,
    shade,
)
from brainfm_monai.tasks import Task

__all__ = ["compose_page", "draw_sections", "write_report"]

PIXEL_MM, MARGIN_MM = 0.8, 22.0  # margin around cerebrum and cerebellum: skull and scalp, not the neck
MANY = (0.1, 0.25, 0.4, 0.5, 0.62, 0.75, 0.9)  # positions within the brain's box, from inferior, posterior, left
# nuclei, ventricles, vertex; thalami; one side
FEW = {"axial": (0.35, 0.5, 0.68), "coronal": (0.5,), "sagittal": (0.32,)}
WINDOW_PERCENTILES = (0.5, 99.5)  # of the brain's intensities, so that skin fat or bone does not darken it
RIBBON_COLOURS = ((1.0, 0.25, 0.25, 0.55), (1.0, 1.0, 1.0, 0.25))  # of cortex and white matter
TEMPLATE_LEVELS = ((0.35, (0.25, 0.75, 1.0)), (0.75, (1.0, 0.82, 0.25)))  # shares of its maximum: outline, white matter
ENTROPY_TOP = 0.5
SECTIONS = {
    "image": "The scan in other contrasts",
    "distance": "Cortex",
    "bias_field": "Bias field",
    "coordinates": "Way to the template",
    "probability": "Lesions",
    "scale": "Expected error",
}

Draw = Callable[[Slice], np.ndarray]  # the picture of a slice
Row = tuple[str, Draw]  # with its title


def write_report(scan: ScanResult) -> None:
    """Write the page of one scan, ``_report.html``."""
    write_text(scan.path("report.html"), compose_page(scan))


def compose_page(scan: ScanResult) -> str:
    """The page of one scan as HTML."""
    protocol = scan.layout.protocol
    soft = scan.soft_volumes_mm3
    volumes = compute_volumes_mm3(scan.labels, scan.affine, len(protocol)) if soft is None else soft
    facts = [
        "" if scan.frame is None else f"volume {scan.frame} of its file",
        f"intensities clipped to {scan.window}" if scan.window else "",
        scan.modality and f"taken for {scan.modality}",
    ]
    view = scan.path("view.html")
    return render(
        "scan.html",
        title=scan.name,
        scan=scan,
        size=" x ".join(str(n) for n in scan.labels.shape),
        voxels=" x ".join(f"{z:.2f}" for z in nib.affines.voxel_sizes(scan.affine)),
        axes="".join(nib.orientations.aff2axcodes(scan.affine)),
        facts=[fact for fact in facts if fact],
        view=view.name if view.is_file() else "",
        sections=[(heading, text, data_address(encode(sheet))) for heading, text, sheet in draw_sections(scan)],
        soft=soft is not None,
        numbers={name: value for name, value in scan.summary.items() if not name.endswith("_mm3")},
        totals=compute_totals_mm3(np.asarray(volumes), protocol),
        **_volume_rows(protocol, np.asarray(volumes) / 1000),
    )


def _volume_rows(protocol: Protocol, volumes_ml: np.ndarray) -> dict[str, list[tuple[str, str, float, float]]]:
    """Structures of the brain with and without sides: name, colour, volume in mL, and that of the right side."""
    rows: dict[str, list[tuple[str, str, float, float]]] = {"paired": [], "single": []}
    for s in protocol.structures:
        if protocol.is_brain[s.label] and s.side != "right":
            name, colour = s.name.removeprefix("Left-").replace("-", " "), "#{:02x}{:02x}{:02x}".format(*s.colour)
            row = (name, colour, float(volumes_ml[s.label]), float(volumes_ml[s.mirror]))
            rows["paired" if s.side == "left" else "single"].append(row)
    return rows


def draw_sections(scan: ScanResult) -> Iterator[tuple[str, str, np.ndarray]]:
    """Heading, caption and picture, (rows, columns, 3) uint8, of every section of the page that the scan has maps for."""
    mask, labels = scan.layout.protocol.is_hemisphere[scan.labels], scan.layout.tasks["segmentation"]
    window = _grey_window(scan)

    def draw_scan(cut: Slice) -> np.ndarray:
        return shade(cut.read(scan.image, scan.affine)[..., 0], window)

    def draw_labels(cut: Slice) -> np.ndarray:
        values = cut.read(scan.labels[None], scan.affine, nearest=True)
        return paint(labels, values, draw_scan(cut), scan.layout.protocol, cut.plane)

    def cut_at(positions: dict[str, tuple[float, ...]]) -> list[Slice]:
        return cut_slices(mask, scan.affine, positions, MARGIN_MM, PIXEL_MM)

    cells: list[list[Cell]] = []
    for plane in FEW:
        cells += _cells(cut_at({plane: MANY}), [(plane, draw_scan), ("", draw_labels)])
    caption = "colours as in the table of volumes; tissues of the head are faint"
    yield "Scan and segmentation", caption, compose(cells)
    few = cut_at(FEW)
    for heading, rows in _sections_of_maps(scan, draw_scan).items():
        if rows:
            yield heading, "; ".join(title for title, _ in rows), compose(_cells(few, rows))
    if scan.path("surfaces.tsv").is_file() and grow_surfaces(scan):  # they were asked for
        yield "White and pial surface", surface_caption(scan), compose(draw_surface_cells(scan, few, draw_scan))


def _sections_of_maps(scan: ScanResult, draw_scan: Draw) -> dict[str, list[Row]]:
    """Rows of pictures below each heading; a heading whose maps are absent has none."""
    rows: dict[str, list[Row]] = {heading: [] for heading in ["The CT in two windows", *SECTIONS.values(), "Certainty"]}
    if _is_ct(scan):
        rows["The CT in two windows"] = _ct_rows("", lambda cut: cut.read(scan.image, scan.affine))
    for entry, task in scan.layout.maps.items():
        if task.picture in SECTIONS and entry in scan.maps:
            rows[SECTIONS[task.picture]] += _map_rows(scan, task, draw_scan)
    if "entropy" in scan.maps:
        title = f"entropy of the labels: black certain, white {ENTROPY_TOP:g} of the maximum"
        entropy = scan.maps["entropy"]
        rows["Certainty"].append((title, lambda cut: heat(cut.read(entropy, scan.network_affine)[..., 0], ENTROPY_TOP)))
    return rows


def _cells(slices: Sequence[Slice], rows: Sequence[Row]) -> list[list[Cell]]:
    return [
        [Cell(draw(cut), cut.plane.marks, "" if i else title) for i, cut in enumerate(slices)] for title, draw in rows
    ]


def _is_ct(scan: ScanResult) -> bool:
    return scan.modality.startswith("ct")


def _grey_window(scan: ScanResult) -> tuple[float, float]:
    """Intensities of the scan that are black and white: of a CT the brain's window, else percentiles within the brain."""
    if _is_ct(scan):
        return BRAIN_WINDOW_HU
    image = scan.image.cpu().numpy()[0]
    brain = image[scan.layout.protocol.is_brain[scan.labels]]
    low, high = np.percentile(brain if brain.size else image, WINDOW_PERCENTILES)
    margin = 0.1 * (high - low)
    return max(float(low - margin), float(image.min())), float(high + margin)


def _ct_rows(prefix: str, read: Draw) -> list[Row]:
    """A CT in the window of the brain and in that of bone."""

    def row(window: tuple[float, float]) -> Row:
        return f"{prefix}{window[0]:g} to {window[1]:g} HU", lambda cut: shade(read(cut)[..., 0], window)

    return [row(BRAIN_WINDOW_HU), row(BONE_WINDOW_HU)]


def _map_rows(scan: ScanResult, task: Task, draw_scan: Draw) -> list[Row]:
    """Rows of pictures of one map."""
    values, affine = scan.maps[task.entry].cpu(), scan.network_affine

    def read(cut: Slice) -> np.ndarray:
        return cut.read(values, affine)

    def draw(cut: Slice, factor: float = 1.0, window: tuple[float, float] | None = None) -> np.ndarray:
        return paint(task, read(cut) / factor, draw_scan(cut), scan.layout.protocol, cut.plane, window)

    if task.output_unit == "HU" and task.picture == "image":
        return _ct_rows(f"{task.entry}, ", read)
    if task.picture == "image":
        low, high = np.percentile(values.numpy()[:, ::2, ::2, ::2], WINDOW_PERCENTILES)
        return [(task.entry, lambda cut: draw(cut, window=(float(low), float(high))))]
    if task.picture == "distance":
        return [
            ("pial (red) and white (yellow) surface", draw),
            ("ribbon (red) and white matter", lambda cut: _ribbon(read(cut), draw_scan(cut))),
        ]
    if task.picture == "bias_field":
        head = scan.maps["segmentation"].cpu() > 0
        middle = float(values[head].median()) if head.any() else 1.0  # the scale of a bias field is free
        window = _grey_window(scan)

        def inside(cut: Slice) -> np.ndarray:
            return cut.read(scan.labels[None], scan.affine, nearest=True) > 0

        return [
            ("bias field (red: too bright, full colour at a factor of 2)", lambda cut: draw(cut, middle) * inside(cut)),
            (
                "scan without it",
                lambda cut: shade(cut.read(scan.image, scan.affine)[..., 0] * middle / read(cut)[..., 0], window),
            ),
        ]
    if task.picture == "coordinates":
        return [*_template_rows(scan, draw_scan), ("predicted coordinates, lines every 20 mm", draw)]
    return [(f"{task.entry}, {task.output_unit}", draw)]


def _ribbon(distance: np.ndarray, base: np.ndarray) -> np.ndarray:
    pial, white = distance[..., [0, 2]].min(axis=-1) < 0, distance[..., [1, 3]].min(axis=-1) < 0
    for mask, colour in ((pial & ~white, RIBBON_COLOURS[0]), (white, RIBBON_COLOURS[1])):
        base = blend(base, mask[..., None] * np.array(colour))
    return base


def _template_rows(scan: ScanResult, draw_scan: Draw) -> list[Row]:
    """The template laid over the scan, and its outlines on the scan; nothing where there is too little brain for a fit."""
    template, template_affine = load_template()
    try:
        warp = fit_scan_to_template(scan)
    except ValueError:
        return []
    top = float(template.max())

    def read(cut: Slice) -> np.ndarray:
        return Slice(cut.plane, warp(cut.points_mm)).read(template[None], template_affine)[..., 0]

    def draw_outlines(cut: Slice) -> np.ndarray:
        picture, values = draw_scan(cut), read(cut)
        for share, colour in TEMPLATE_LEVELS:
            picture = outline(picture, values, share * top, colour)
        return picture

    return [
        ("MNI152 laid over the scan", lambda cut: shade(read(cut), (0, top))),
        ("its outlines on the scan", draw_outlines),
    ]
