"""The page of one scan with pictures of every map, its interactive view, and the template engine of all pages."""

import base64
import binascii
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache, lru_cache, partial
from importlib import util
from itertools import chain
from pathlib import Path

import jinja2
import nibabel as nib
import numpy as np
from isal import igzip
from markupsafe import Markup

from brainfm_monai import outputs, slices, surfaces
from brainfm_monai.io import write_text
from brainfm_monai.outputs import ScanResult, template
from brainfm_monai.outputs.result import PACKING
from brainfm_monai.slices import BONE_WINDOW_HU, Cell, Slice, compose, heat, shade
from brainfm_monai.tasks import BRAIN_WINDOW_HU, Task

logger = logging.getLogger(__name__)

PIXEL_MM, MARGIN_MM = 0.8, 22.0  # margin around cerebrum and cerebellum: skull and scalp, not the neck
MANY = (0.1, 0.25, 0.4, 0.5, 0.62, 0.75, 0.9)  # positions within the brain's box, from inferior, posterior, left
FEW = {"axial": (0.35, 0.5, 0.68), "coronal": (0.5,), "sagittal": (0.32,)}  # nuclei, ventricles, vertex; thalami; side
WINDOW_PERCENTILES = (0.5, 99.5)  # of the brain's intensities, so that skin fat or bone does not darken it
TEMPLATE_LEVELS = ((0.35, (0.25, 0.75, 1.0)), (0.75, (1.0, 0.82, 0.25)))  # shares of its maximum: outline, white matter
ENTROPY_TOP = 0.5
SECTIONS = {"image": "The scan in other contrasts", "distance": "Cortex", "bias_field": "Bias field"}
SECTIONS |= {"coordinates": "Way to the template", "probability": "Lesions", "scale": "Expected error"}
WHITE_COLOUR, PIAL_COLOUR = (1.0, 0.9, 0.2), (1.0, 0.25, 0.25)  # of contours
THICKEST_MM = 5.0  # white in the views of surfaces
DARKEST = 0.25  # of the scale, for no thickness: thin cortex stands out from the black ground
LEFT, RIGHT = (-1.0, 0.0, 0.0), (1.0, 0.0, 0.0)  # directions towards the viewer
VIEWS = {
    "L": (("left hemisphere, from the left", LEFT, "AP"), ("left hemisphere, medial side", RIGHT, "PA")),
    "R": (("right hemisphere, from the right", RIGHT, "PA"), ("right hemisphere, medial side", LEFT, "AP")),
}
VIEW_PERCENTILES = (0.5, 99.8)  # of the head's intensities, in the interactive view
# The widget of ipyniivue carries NiiVue's own bundle as percent-encoded text, for pages that it saves.
BUNDLE = re.compile(r'="([A-Za-z0-9_.!~*\'()%-]{500000,})"')
EXPORT = re.compile(r"export\{[^{}]*\bNiivue\b[^{}]*\};?\s*$")

# Names of scans and structures are text, whatever they contain.
ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("brainfm_monai", "report/templates"), autoescape=True,
    undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True,
)  # fmt: skip
Draw = Callable[[Slice], np.ndarray]  # draws a slice
Row = tuple[str, Draw]  # with its title


def render(template: str, **values: object) -> str:
    """Fill a template of ``report/templates`` with values, of which texts are escaped; every page needs a ``title``."""
    return ENVIRONMENT.get_template(template).render(**values)


def compose_page(scan: ScanResult) -> str:
    """The page of one scan as HTML."""
    protocol, soft = scan.layout.protocol, scan.soft_volumes_mm3
    volumes_ml = (outputs.hard_volumes_mm3(scan) if soft is None else soft) / 1000
    return render(
        "scan.html", title=scan.name, scan=scan, sections=_encode_sections(scan), volumes_ml=volumes_ml,
        totals=outputs.compute_totals_mm3(volumes_ml, protocol), dice=outputs.expect_dice(scan),
        zooms=nib.affines.voxel_sizes(scan.affine), axes="".join(nib.orientations.aff2axcodes(scan.affine)),
    )  # fmt: skip


@outputs.once_per_scan
def _encode_sections(scan: ScanResult) -> list[tuple[str, ...]]:
    """Heading, caption and picture, WebP in base 64, of every section."""
    return [(*words, base64.b64encode(slices.encode(sheet)).decode("ascii")) for *words, sheet in draw_sections(scan)]


@outputs.begun_ahead(_encode_sections, shown=True)
def write_report(scan: ScanResult) -> None:
    """Write the page of one scan, ``_report.html``."""
    write_text(scan.path("report.html"), compose_page(scan))


def draw_sections(scan: ScanResult) -> Iterator[tuple[str, str, np.ndarray]]:
    """Heading, caption and picture, (rows, columns, 3) uint8, of every section that the scan has maps for."""
    protocol, labels, draw_scan = scan.layout.protocol, scan.layout.tasks["segmentation"], _grey(scan)

    def draw_labels(cut: Slice) -> np.ndarray:
        values = cut.read(scan.labels[None], scan.affine, nearest=True)
        return slices.paint(labels, values, draw_scan(cut), protocol, cut.plane)

    positions = {plane: (*MANY, *few) for plane, few in FEW.items()}
    every = slices.cut_slices(protocol.is_hemisphere[scan.labels], scan.affine, positions, MARGIN_MM, PIXEL_MM)
    planes = {plane: [cut for cut in every if cut.plane is slices.PLANES[plane]] for plane in FEW}
    parts = [_cells(of[: len(MANY)], [(plane, draw_scan), ("", draw_labels)]) for plane, of in planes.items()]
    caption = "colours as in the table of volumes; tissues of the head are faint"
    yield "Scan and segmentation", caption, compose(list(chain(*parts)))
    cuts = [cut for of_plane in planes.values() for cut in of_plane[len(MANY) :]]
    for heading, rows in _sections_of_maps(scan).items():
        if rows:
            yield heading, "; ".join(title for title, _ in rows), compose(_cells(cuts, rows))
    if "surfaces" in scan.outputs and outputs.grow_surfaces(scan):
        contours = _cells(cuts, [("pial (red) and white (yellow) surface", lambda cut: _draw_contours(scan, cut))])
        words, hemispheres = _draw_hemispheres(scan)
        yield "White and pial surface", "; ".join(words), compose([*contours, hemispheres])


def _cells(cuts: Sequence[Slice], rows: Sequence[Row]) -> list[list[Cell]]:
    """Rows of pictures; the first of a row has its title."""
    places = list(enumerate(cuts))
    return [[Cell(draw(cut), cut.plane.marks, "" if i else title) for i, cut in places] for title, draw in rows]


def _sections_of_maps(scan: ScanResult) -> dict[str, list[Row]]:
    """Rows of pictures below each heading; a heading whose maps are absent has none."""
    rows: dict[str, list[Row]] = {heading: [] for heading in ["The CT in two windows", *SECTIONS.values(), "Certainty"]}
    if scan.modality.startswith("ct"):
        rows["The CT in two windows"] = _ct_rows("", lambda cut: cut.read(scan.image, scan.affine))
    # where there are surfaces, their contours are the boundaries of the distances
    is_drawn_later = "surfaces" in scan.outputs and bool(outputs.grow_surfaces(scan))
    for entry, task in scan.layout.maps.items():
        if task.picture in SECTIONS and entry in scan.maps and not (is_drawn_later and task.picture == "distance"):
            rows[SECTIONS[task.picture]] += _map_rows(scan, task)
    if "entropy" in scan.maps:
        title = f"entropy of the labels: black certain, white {ENTROPY_TOP:g} of the maximum"
        entropy, affine = scan.maps["entropy"], scan.network_affine
        rows["Certainty"].append((title, lambda cut: heat(cut.read(entropy, affine)[..., 0], ENTROPY_TOP)))
    return rows


@outputs.once_per_scan
def _grey_window(scan: ScanResult) -> tuple[float, float]:
    """Intensities that are black and white: of a CT the brain's window, else percentiles within the brain."""
    if scan.modality.startswith("ct"):
        return BRAIN_WINDOW_HU
    image = scan.image.cpu().numpy()[0]
    brain = image[scan.layout.protocol.is_brain[scan.labels]]
    low, high = np.percentile(brain if brain.size else image, WINDOW_PERCENTILES)
    margin = 0.1 * (high - low)
    return max(float(low - margin), float(image.min())), float(high + margin)


@outputs.once_per_scan
def _grey(scan: ScanResult) -> Draw:
    """What draws a slice of the scan in grey, each slice once."""
    window, image = _grey_window(scan), scan.image
    return cache(lambda cut: shade(cut.read(image, scan.affine)[..., 0], window))


def _ct_rows(prefix: str, read: Draw) -> list[Row]:
    """A CT in the windows of brain and bone."""

    def draw(window: tuple[float, float], cut: Slice) -> np.ndarray:
        return shade(read(cut)[..., 0], window)

    windows = BRAIN_WINDOW_HU, BONE_WINDOW_HU
    return [(f"{prefix}{low:g} to {high:g} HU", partial(draw, (low, high))) for low, high in windows]


def _map_rows(scan: ScanResult, task: Task) -> list[Row]:
    """Rows of pictures of one map."""
    is_distance, affine, draw_scan = task.picture == "distance", scan.network_affine, _grey(scan)
    values = outputs.find_boundaries(scan) if is_distance else scan.maps[task.entry].cpu()
    read = cache(lambda cut: cut.read(values, affine))

    def draw(cut: Slice, factor: float = 1.0, window: tuple[float, float] | None = None) -> np.ndarray:
        return slices.paint(task, read(cut) / factor, draw_scan(cut), scan.layout.protocol, cut.plane, window)

    if task.picture == "image":
        if task.output_unit == "HU":
            return _ct_rows(f"{task.entry}, ", read)
        low, high = np.percentile(values.numpy()[:, ::2, ::2, ::2], WINDOW_PERCENTILES)
        return [(task.entry, lambda cut: draw(cut, window=(float(low), float(high))))]
    if task.picture == "bias_field":
        head, window = scan.maps["segmentation"].cpu() > 0, _grey_window(scan)
        middle = float(values[head].median()) if head.any() else 1.0  # the scale of a bias field is free

        def draw_field(cut: Slice) -> np.ndarray:
            return draw(cut, middle) * (cut.read(scan.labels[None], scan.affine, nearest=True) > 0)

        def draw_corrected(cut: Slice) -> np.ndarray:
            return shade(cut.read(scan.image, scan.affine)[..., 0] * middle / read(cut)[..., 0], window)

        title = "bias field (red: too bright, full colour at a factor of 2)"
        return [(title, draw_field), ("scan without it", draw_corrected)]
    if task.picture == "coordinates":
        return [*_template_rows(scan), ("predicted coordinates, lines every 20 mm", draw)]
    return [("pial (red) and white (yellow) surface" if is_distance else f"{task.entry}, {task.output_unit}", draw)]


def _template_rows(scan: ScanResult) -> list[Row]:
    """The template laid over the scan, and its outlines on the scan; empty where the brain is too small for a fit."""
    image, affine = template.load_template()
    try:
        warp = outputs.fit_scan_to_template(scan)
    except ValueError:
        return []
    top, draw_scan = float(image.max()), _grey(scan)

    read = cache(lambda cut: Slice(cut.plane, warp(cut.points_mm)).read(image[None], affine)[..., 0])

    def draw_outlines(cut: Slice) -> np.ndarray:
        picture, values = draw_scan(cut), read(cut)
        for share, colour in TEMPLATE_LEVELS:
            picture = slices.outline(picture, values, [share * top], colour)
        return picture

    laid_over = ("MNI152 laid over the scan", lambda cut: shade(read(cut), (0, top)))
    return [laid_over, ("its outlines on the scan", draw_outlines)]


def _draw_contours(scan: ScanResult, cut: Slice) -> np.ndarray:
    """A slice of the scan with the lines in which the surfaces pass through it."""
    picture = _grey(scan)(cut)
    for surface in outputs.grow_surfaces(scan).values():
        for vertices, colour in ((surface.white_mm, WHITE_COLOUR), (surface.pial_mm, PIAL_COLOUR)):
            picture = surfaces.draw_contour(picture, cut.points_mm, vertices, surface.faces, colour)
    return picture


def colour_by_thickness(thickness_mm: np.ndarray) -> np.ndarray:
    """Colours of vertices by the thickness there, (V,): (V, 3), in [0, 1]."""
    return heat(DARKEST + (1 - DARKEST) * thickness_mm[:, None] / THICKEST_MM)[:, 0]


def _draw_hemispheres(scan: ScanResult) -> tuple[list[str], list[Cell]]:
    """What the pictures of the surfaces show, with their quality, and both hemispheres from both sides."""
    words, cells = [f"the pial surface is coloured by thickness: violet 0, white {THICKEST_MM:g} mm"], []
    for letter, surface in outputs.grow_surfaces(scan).items():
        euler, closed = surfaces.compute_euler_number(surface.faces), float(surface.closed.mean())
        crossing = round(surface.crossing_shares[1], 5)
        words.append(f"{letter}: Euler number {euler}, share of crossing triangles {crossing}")
        words[-1] += f", of vertices in closed sulci {closed:.2f}"
        colours = colour_by_thickness(surface.thickness_mm)
        for title, towards, marks in VIEWS[letter]:
            picture = surfaces.draw_surface(surface.pial_mm, surface.faces, colours, towards)
            cells.append(Cell(picture[..., :3] / 255, marks, title))
    return words, cells


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
    low, high = np.percentile(image[head] if head.any() else image, VIEW_PERCENTILES)
    grey = np.clip((image - low) / max(high - low, 1e-6) * 255, 0, 255).astype(np.uint8)
    files = [nib.Nifti1Image(volume, scan.affine).to_bytes() for volume in (grey, scan.labels)]
    packed = [base64.b64encode(igzip.compress(file, PACKING, mtime=0)).decode("ascii") for file in files]
    safe = Markup(script.replace("</script", "<\\/script"))  # a script of a package, not of a scan
    return render("view.html", title=scan.name, script=safe, volumes=packed, protocol=scan.layout.protocol)


def write_view(scan: ScanResult) -> None:
    """Write the interactive view, ``_view.html``, where NiiVue is installed; it opens without a network."""
    if (script := find_niivue()) is not None:
        write_text(scan.path("view.html"), compose_view(scan, script))
