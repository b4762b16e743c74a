"""One picture per subject: everything that a training would see of it, in three planes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from brainfm_monai.anatomy import Protocol as LabelProtocol
from brainfm_monai.data.subjects import CONTRASTS
from brainfm_monai.io import write_whole
from brainfm_monai.slices import Cell, Slice, blend, compose, cut_slices, encode, paint, shade
from brainfm_monai.tasks import TASKS

__all__ = ["write_contact_sheet"]

MIDDLE = {"axial": (0.5,), "coronal": (0.5,), "sagittal": (0.5,)}
ROWS = (*CONTRASTS, "generation_labels", "segmentation", "distance", "mni")
LABELS = ("generation_labels", "segmentation")
DEFACED = (0.35, 0.0, 0.35, 1.0)
GOLDEN_RATIO = 0.618
LONGEST_FAULT = 110  # characters


class SubjectVolumes(Protocol):
    """What the sheet needs of a subject."""

    entry: Any
    keys: list[str]

    def __getitem__(self, key: str) -> np.ndarray:
        """Values of a volume, shape (H, W, D) or (H, W, D, C)."""

    def affine(self, key: str) -> np.ndarray:
        """Voxels of a volume to RAS mm."""


def write_contact_sheet(volumes: SubjectVolumes, path: Path, faults: Sequence[str] = ()) -> Path:
    """Draw the volumes of a subject in rows, and three planes through the brain's centre in columns.

    Labels, surfaces (pial red, white yellow) and lines of equal coordinates are drawn over the first row.

    Args:
        volumes: the subject.
        path: PNG to write.
        faults: lines in red under the title.

    Returns:
        The path.
    """
    key = "segmentation" if "segmentation" in volumes.keys else volumes.keys[0]
    slices = cut_slices(volumes[key] > 0, volumes.affine(key), MIDDLE)
    bases = [np.zeros((*cut.points_mm.shape[:2], 3)) for cut in slices]
    rows: list[list[Cell]] = []
    for name in (name for name in ROWS if name in volumes.keys):
        pictures = [_draw(volumes, name, cut, base) for cut, base in zip(slices, bases, strict=True)]
        title = f"{name.replace('_', ' ')}{' (0 to 80 HU)' if name == 'CT' else ''}"
        rows.append(
            [Cell(p, cut.plane.marks, title * (p is pictures[0])) for cut, p in zip(slices, pictures, strict=True)]
        )
        bases = pictures if len(rows) == 1 else bases
    heading = [(str(volumes.entry["subject"]), "white"), *((fault[:LONGEST_FAULT], "tomato") for fault in faults)]
    with write_whole(path) as partial:
        partial.write_bytes(encode(compose(rows, heading), "png"))
    return path


def _draw(volumes: SubjectVolumes, key: str, cut: Slice, base: np.ndarray) -> np.ndarray:
    """One slice of a volume, over the picture of the first row."""

    def read(key: str) -> np.ndarray:
        values = volumes[key]
        first = values[None] if values.ndim == 3 else np.moveaxis(values, -1, 0)
        return cut.read(
            np.ascontiguousarray(first), volumes.affine(key), nearest=key in LABELS or key.endswith("_mask")
        )

    if key == "generation_labels":
        return shade(_shades()[np.clip(read(key)[..., 0], 0, 255).astype(int)])
    name = str(volumes.entry.get("protocol", ""))  # one that is not shipped is reported as a fault
    protocol = LabelProtocol.load(name if name in LabelProtocol.names() else "synthseg_head")
    values = read(key)
    if key == "segmentation":  # labels that the protocol lacks are reported as a fault
        values = np.minimum(values, len(protocol) - 1)
    picture = paint(TASKS[key], values, base, protocol, cut.plane)
    mask = f"{key}_defacing_mask"
    return blend(picture, (read(mask) > 0) * np.array(DEFACED)) if mask in volumes.keys else picture


def _shades() -> np.ndarray:
    """Shade of every generation label: well apart; codes that mix two tissues go evenly from white to grey matter to fluid."""
    labels = np.arange(256)
    table = np.where(labels < 150, 0.25 + 0.7 * np.mod(labels * GOLDEN_RATIO, 1), 0)
    table[0] = 0
    table[150:251] = np.linspace(1.0, 0.1, 101)
    table[251:] = np.linspace(0.2, 0.6, 5)
    return np.asarray(table)
