"""Slices of volumes as pictures: the one renderer of pages, trainings, previews and contact sheets.

A slice is a plane of points in RAS mm, in which every volume is read by its own affine: no volume is resampled as a
whole. Pictures follow the radiological convention: left in a picture is the patient's right, or anterior.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
import torch
from monai.data import MetaTensor
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from brainfm_monai.anatomy import Protocol
from brainfm_monai.functional.spatial import gather_nearest, warp
from brainfm_monai.tasks import BRAIN_WINDOW_HU, Task

BONE_WINDOW_HU = (-450.0, 1050.0)
BOX_QUANTILES = (0.002, 0.998)  # of a mask's voxels along an axis: a stray voxel does not widen the box
BRAIN_OPACITY, WHITE_MATTER_OPACITY, HEAD_OPACITY = 0.55, 0.25, 0.22
WHITE_MATTER_IDS = (2, 41)
PIAL_COLOUR, WHITE_COLOUR = (1.0, 0.25, 0.25), (1.0, 0.88, 0.25)
AXIS_COLOURS = ((1.0, 0.38, 0.38), (0.38, 0.88, 0.38), (0.38, 0.63, 1.0))  # of lines of equal x, y and z
GRID_LEVELS_MM = range(-200, 201, 20)
LARGEST_LOG_BIAS = 0.7  # a factor of 2, shown in full colour
HEAT = np.array([[0, 0, 0], [0.45, 0.1, 0.5], [0.93, 0.35, 0.35], [1, 0.85, 0.45], [1, 1, 1]])  # black to white
LARGEST_OPACITY = 0.8  # of a probability over the scan
QUALITY, EFFORT = 88, 2  # of WebP: half the time of the default effort for 3 % more bytes
TEXT_PIXELS = 13
TIE = 0.499  # edge of the last voxel: a pixel between two voxels takes the one that the order of voxels does not decide

Window = tuple[float, float]  # values that are black and white


class Plane(NamedTuple):
    """A plane of slices: the RAS axes across it and along columns and rows of a picture, and letters of its sides."""

    axis: int
    horizontal: int
    vertical: int
    marks: str


PLANES = {"axial": Plane(2, 0, 1, "RL"), "coronal": Plane(1, 0, 2, "RL"), "sagittal": Plane(0, 1, 2, "AP")}
MIDDLE = {"axial": (0.5,), "coronal": (0.5,), "sagittal": (0.5,)}


@dataclass(frozen=True, eq=False)
class Slice:
    """A plane through the head, pixel by pixel."""

    plane: Plane  # which axes it shows
    points_mm: np.ndarray  # RAS mm of every pixel, shape (rows, columns, 3)
    # voxel indices of every pixel, shape (1, 3, rows, columns, 1), by the affine of the grid: many maps share one
    indices: dict[bytes, Tensor] = field(default_factory=dict, repr=False)

    def read(self, volume: Tensor | np.ndarray, affine: np.ndarray, nearest: bool = False) -> np.ndarray:
        """Values of a volume, (C, H, W, D), in the slice: shape (rows, columns, C).

        Linear interpolation to float32; beyond the volume its border goes on linearly. ``nearest`` takes the nearest
        voxel in the volume's type (labels), 0 beyond it. ``affine`` leads from voxel indices to RAS mm.
        """
        matrix = np.asarray(affine, dtype=np.float64)
        if (coordinates := self.indices.get(matrix.tobytes())) is None:
            index = nib.affines.apply_affine(np.linalg.inv(matrix), self.points_mm)
            coordinates = torch.from_numpy(np.moveaxis(index, -1, 0).astype(np.float32))[None, ..., None]
            self.indices[matrix.tobytes()] = coordinates
        # convert_to_tensor would copy an array whose axes are turned for every slice
        plain = volume.as_tensor() if isinstance(volume, MetaTensor) else torch.as_tensor(volume)
        source = plain[None].detach().cpu()
        if nearest:
            return gather_nearest(source, coordinates)[0, ..., 0].movedim(0, -1).numpy()
        return warp(source.float(), coordinates, padding_mode="border")[0, ..., 0].movedim(0, -1).numpy()


def find_box(mask: np.ndarray) -> list[tuple[int, int]]:
    """First and last index of a mask along each axis, without stray voxels; the whole grid if the mask is empty."""
    if not np.any(mask):
        return [(0, n - 1) for n in mask.shape]
    counts = [np.cumsum(np.asarray(mask, dtype=bool).sum(axis=axes)) for axes in ((1, 2), (0, 2), (0, 1))]
    ends = [np.searchsorted(count, np.array(BOX_QUANTILES) * count[-1]) for count in counts]
    return [(int(first), int(last)) for first, last in ends]


def cut_slices(
    mask: np.ndarray, affine: np.ndarray, positions: Mapping[str, Sequence[float]] = MIDDLE,
    margin_mm: float | None = None, pixel_mm: float = 1.0,
) -> list[Slice]:  # fmt: skip
    """Slices along the axes of a grid, at positions within the box around a mask, in true proportions.

    The affine takes voxels of the mask, bool, (H, W, D), to RAS mm. Positions of axial, coronal and sagittal slices are
    shares of the box, from inferior, posterior, left; a slice lies in the middle of a voxel. ``margin_mm`` is what is
    shown around the box; None: the whole grid.
    """
    turn = nib.orientations.io_orientation(affine)
    ras = affine @ nib.orientations.inv_ornt_aff(turn, mask.shape)  # the grid with its axes closest to R, A, S
    turned = nib.orientations.apply_orientation(np.asarray(mask), turn)
    zooms, box = nib.affines.voxel_sizes(ras), find_box(turned)

    def pixels(axis: int) -> np.ndarray:
        end = turned.shape[axis] - 1
        margin = end if margin_mm is None else round(margin_mm / zooms[axis])
        first, last = max(box[axis][0] - margin, 0), min(box[axis][1] + margin, end)
        count = max(round((last - first + 1) * zooms[axis] / pixel_mm), 1)
        return last + TIE - (np.arange(count) + 0.5) * (last - first + 1) / count

    slices = []
    for plane, share in ((PLANES[name], share) for name, shares in positions.items() for share in shares):
        rows, columns = np.meshgrid(pixels(plane.vertical), pixels(plane.horizontal), indexing="ij")
        first, last = box[plane.axis]
        index = np.full((*rows.shape, 3), round(first + share * (last - first)), dtype=np.float64)
        index[..., plane.vertical], index[..., plane.horizontal] = rows, columns
        slices.append(Slice(plane, nib.affines.apply_affine(ras, index)))
    return slices


def shade(values: np.ndarray, window: Window = (0.0, 1.0)) -> np.ndarray:
    """Grey values: shape (rows, columns) to (rows, columns, 3), in [0, 1]; the window's limits are black and white."""
    low, high = window
    return np.repeat(np.clip((values - low) / max(high - low, 1e-6), 0, 1)[..., None], 3, axis=-1)


def signed(values: np.ndarray, limit: float) -> np.ndarray:
    """White for 0, red for positive and blue for negative values, (rows, columns) to (rows, columns, 3), in [0, 1]."""
    x = np.clip(values / limit, -1, 1)
    return np.stack([1 + x.clip(max=0), 1 - np.abs(x), 1 - x.clip(min=0)], axis=-1)


def heat(values: np.ndarray, top: float = 1.0) -> np.ndarray:
    """Black for 0 over purple, red, yellow to white for ``top``, (rows, columns) to (rows, columns, 3), in [0, 1]."""
    place = np.clip(values / top, 0, 1) * (len(HEAT) - 1)
    return np.stack([np.interp(place, np.arange(len(HEAT)), HEAT[:, i]) for i in range(3)], axis=-1)


def blend(base: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """Lay colours with opacity, (rows, columns, 4), over a picture, (rows, columns, 3); all in [0, 1]."""
    return np.asarray(base * (1 - colours[..., 3:]) + colours[..., :3] * colours[..., 3:])


def outline(
    base: np.ndarray, values: np.ndarray, levels: Sequence[float], colour: Sequence[float],
    where: np.ndarray | None = None,
) -> np.ndarray:  # fmt: skip
    """Draw the lines on which values are one of the levels, one pixel wide; ``where`` limits them to a mask."""
    passed = np.asarray(sum(values > level for level in levels))
    above = np.pad(passed, ((0, 1), (0, 1)), mode="edge")
    line = (above[:-1, :-1] != above[:-1, 1:]) | (above[:-1, :-1] != above[1:, :-1])
    return np.where((line if where is None else line & where)[..., None], np.asarray(colour), base)


@lru_cache(maxsize=8)
def label_colours(protocol: Protocol) -> np.ndarray:
    """Red, green, blue and opacity of every label, (L, 4), in [0, 1]: the head and white matter are faint."""
    table = np.ones((len(protocol), 4), dtype=np.float32) * BRAIN_OPACITY
    table[:, :3] = np.array([s.colour for s in protocol.structures]) / 255
    table[np.isin(protocol.freesurfer_ids, WHITE_MATTER_IDS), 3] = WHITE_MATTER_OPACITY
    table[protocol.is_head, 3] = HEAD_OPACITY
    table[0, 3] = 0
    return table


def paint(
    task: Task, values: np.ndarray, base: np.ndarray, protocol: Protocol, plane: Plane, window: Window | None = None
) -> np.ndarray:
    """Draw a slice of a task's map by the column ``picture`` of the table of tasks: (rows, columns, 3).

    Values are the map in its ``output_unit``, shape (rows, columns, C), ``base`` is the scan there, (rows, columns, 3),
    in [0, 1], the protocol colours labels, the window is of an image. ValueError if the task has no picture.
    """
    first = values[..., 0]
    painters: dict[str, Callable[[], np.ndarray]] = {
        "labels": lambda: blend(base, label_colours(protocol)[first.astype(int)]),
        "image": lambda: shade(first, window or (BRAIN_WINDOW_HU if task.output_unit == "HU" else (0.0, 1.0))),
        "bias_field": lambda: signed(np.log(first.clip(min=1e-6)), LARGEST_LOG_BIAS),
        "probability": lambda: blend(base, np.dstack([heat(first), first.clip(0, LARGEST_OPACITY)])),
        "scale": lambda: heat(values.max(axis=-1), max(float(values.max()), 1e-6)),
        "distance": lambda: _draw_boundaries(values, base),
        "coordinates": lambda: _draw_grid(values, base, plane),
    }
    if task.picture not in painters:
        raise ValueError(f"paint: a task with a picture is needed, found '{task.name}'")
    return painters[task.picture]()


def _draw_boundaries(distance: np.ndarray, base: np.ndarray) -> np.ndarray:
    """The lines on which the distances are 0."""
    for channel, colour in enumerate((PIAL_COLOUR, WHITE_COLOUR) * 2):  # lp, lw, rp, rw
        base = outline(base, distance[..., channel], [0.0], colour)
    return base


def _draw_grid(coordinates: np.ndarray, base: np.ndarray, plane: Plane) -> np.ndarray:
    """Lines of equal coordinates, but for the border of the computed box, beyond which coordinates are 0."""
    known = np.any(coordinates != 0, axis=-1)
    for axis, shift in ((0, 2), (0, -2), (1, 2), (1, -2)):
        known = known & np.roll(known, shift, axis)
    for axis in (plane.horizontal, plane.vertical):
        base = outline(base, coordinates[..., axis], GRID_LEVELS_MM, AXIS_COLOURS[axis], known)
    return base


class Cell(NamedTuple):
    """A picture on a sheet, (rows, columns, 3), in [0, 1], with the letters of its sides and lines of text."""

    picture: np.ndarray
    marks: str = ""
    caption: str = ""


def compose(rows: Sequence[Sequence[Cell]]) -> np.ndarray:
    """Rows of cells, of any lengths, in the middle of fields of the largest cell's size: (rows, columns, 3), uint8."""
    height, width = (max(cell.picture.shape[i] for row in rows for cell in row) + 2 for i in (0, 1))
    image = Image.fromarray(np.zeros((height * len(rows), width * max(map(len, rows)), 3), dtype=np.uint8))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(TEXT_PIXELS)
    style: dict[str, Any] = {"fill": "white", "font": font, "stroke_width": 2, "stroke_fill": "black"}
    corners = [(x * width, y * height, cell) for y, row in enumerate(rows) for x, cell in enumerate(row)]
    for left, upper, cell in corners:
        pixels = Image.fromarray((np.clip(cell.picture, 0, 1) * 255).round().astype(np.uint8))
        image.paste(pixels, (left + (width - pixels.width) // 2, upper + (height - pixels.height) // 2))
    for left, upper, (_, marks, caption) in corners:  # after all pictures: a caption may be longer than its cell
        for letter, place, anchor in zip(marks, (left + 3, left + width - 4), ("la", "ra"), strict=False):
            draw.text((place, upper + 2), letter, anchor=anchor, **style)
        draw.text((left + 4, upper + height - (caption.count("\n") + 1) * (TEXT_PIXELS + 4) - 4), caption, **style)
    return np.asarray(image)


def encode(picture: np.ndarray, kind: str = "webp") -> bytes:
    """A picture, (rows, columns, 3) uint8, as the bytes of a ``webp`` or ``png`` file."""
    Image.fromarray(picture).save(buffer := io.BytesIO(), format=kind, quality=QUALITY, method=EFFORT)
    return buffer.getvalue()
