"""One picture per subject: everything that a training would see of it, in three planes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from brainfm_monai.anatomy import Protocol
from brainfm_monai.data.loading import LoadedSubject
from brainfm_monai.data.subjects import CONTRASTS
from brainfm_monai.io import write_whole
from brainfm_monai.slices import Cell, Slice, blend, compose, cut_slices, encode, paint, shade
from brainfm_monai.tasks import TASKS

MIDDLE = {"axial": (0.5,), "coronal": (0.5,), "sagittal": (0.5,)}
ROWS = (*CONTRASTS, "generation_labels", "segmentation", "distance", "mni")
LABELS = ("generation_labels", "segmentation")
DEFACED = (0.35, 0.0, 0.35, 1.0)
GOLDEN_RATIO = 0.618
LONGEST_FAULT = 110  # characters


def write_contact_sheet(subject: LoadedSubject, path: Path, faults: Sequence[str] = ()) -> Path:
    """Draw the volumes of a subject in rows, and three planes through the brain's centre in columns, into a PNG.

    Labels, surfaces (pial red, white yellow) and lines of equal coordinates are drawn over the first row; faults stand in red
    under the title.
    """
    key = "segmentation" if "segmentation" in subject.keys else subject.keys[0]
    slices = cut_slices(subject[key] > 0, subject.affine(key), MIDDLE)
    bases = [np.zeros((*cut.points_mm.shape[:2], 3)) for cut in slices]
    rows: list[list[Cell]] = []
    for name in (name for name in ROWS if name in subject.keys):
        pictures = [_draw(subject, name, cut, base) for cut, base in zip(slices, bases, strict=True)]
        titles = (f"{name.replace('_', ' ')}{' (0 to 80 HU)' if name == 'CT' else ''}", "", "")
        marks = (cut.plane.marks for cut in slices)
        rows.append([Cell(*parts) for parts in zip(pictures, marks, titles, strict=True)])
        bases = pictures if len(rows) == 1 else bases
    heading = [(str(subject.entry["subject"]), "white"), *((fault[:LONGEST_FAULT], "tomato") for fault in faults)]
    with write_whole(path) as partial:
        partial.write_bytes(encode(compose(rows, heading), "png"))
    return path


def _draw(subject: LoadedSubject, key: str, cut: Slice, base: np.ndarray) -> np.ndarray:
    """One slice of a volume, over the picture of the first row."""

    def read(key: str) -> np.ndarray:
        values = subject[key]
        first = values[None] if values.ndim == 3 else np.moveaxis(values, -1, 0)
        is_nearest = key in LABELS or key.endswith("_mask")
        return cut.read(np.ascontiguousarray(first), subject.affine(key), nearest=is_nearest)

    if key == "generation_labels":
        return shade(_shades()[np.clip(read(key)[..., 0], 0, 255).astype(int)])
    name = str(subject.entry.get("protocol", ""))  # one that is not shipped is reported as a fault
    protocol = Protocol.load(name if name in Protocol.names() else "synthseg_head")
    values = read(key)
    if key == "segmentation":  # labels that the protocol lacks are reported as a fault
        values = np.minimum(values, len(protocol) - 1)
    picture = paint(TASKS[key], values, base, protocol, cut.plane)
    mask = f"{key}_defacing_mask"
    return blend(picture, (read(mask) > 0) * np.array(DEFACED)) if mask in subject.keys else picture


def _shades() -> np.ndarray:
    """Shade of every generation label: well apart; codes that mix two tissues go evenly from white to grey matter to fluid."""
    labels = np.arange(256)
    table = np.where(labels < 150, 0.25 + 0.7 * np.mod(labels * GOLDEN_RATIO, 1), 0)
    table[0] = 0
    table[150:251] = np.linspace(1.0, 0.1, 101)
    table[251:] = np.linspace(0.2, 0.6, 5)
    return np.asarray(table)
