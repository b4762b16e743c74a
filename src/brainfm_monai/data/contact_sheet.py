"""One picture per subject: everything that a training would see of it, in three planes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure

from brainfm_monai.anatomy import Protocol as LabelProtocol
from brainfm_monai.data.subjects import CONTRASTS

__all__ = ["write_contact_sheet"]

PANEL_INCH, DPI = 2.1, 90
PLANES = (
    ("axial", 2, "LR"),
    ("coronal", 1, "LR"),
    ("sagittal", 0, "PA"),
)  # name, axis across, letters at the picture's edges
DISTANCE_RANGE_MM = 5.0
CONTOURS = ((0, "tab:red"), (1, "gold"), (2, "tab:red"), (3, "gold"))  # channels: pial surfaces red, white ones yellow
GOLDEN_RATIO = 0.618


class SubjectVolumes(Protocol):
    """What the sheet needs of a subject."""

    entry: Any
    keys: list[str]

    def __getitem__(self, key: str) -> np.ndarray:
        """Values of a volume."""


def write_contact_sheet(volumes: SubjectVolumes, path: Path, faults: Sequence[str] = ()) -> Path:
    """Draw the volumes of a subject in rows and three planes through the brain's centre in columns.

    The left of the picture is the left of the subject. Surfaces (pial red, white yellow) are drawn over the first scan, or over
    the generation labels where there is none.

    Args:
        volumes: the subject.
        path: PNG to write; it appears whole or not at all.
        faults: lines that stand in red under the title.

    Returns:
        The path.
    """
    rows = _rows(volumes)
    labels = volumes["segmentation"] if "segmentation" in volumes.keys else rows[0][1]
    inside = np.argwhere(labels > 0) if (labels > 0).any() else np.argwhere(labels >= 0)
    centre = np.round((inside.min(axis=0) + inside.max(axis=0)) / 2).astype(int)
    figure = Figure(
        figsize=(PANEL_INCH * 3, PANEL_INCH * len(rows) + 0.6 + 0.15 * len(faults)), dpi=DPI, facecolor="black"
    )
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(rows), len(PLANES), squeeze=False)
    top = 1 - (0.5 + 0.15 * len(faults)) / figure.get_figheight()
    figure.subplots_adjust(left=0.06, right=1, bottom=0, top=top, wspace=0.01, hspace=0.01)
    figure.text(
        0.5, 1 - 0.2 / figure.get_figheight(), str(volumes.entry["subject"]), color="white", ha="center", fontsize=10
    )
    for number, fault in enumerate(faults):
        height = 1 - (0.36 + 0.15 * number) / figure.get_figheight()
        figure.text(0.5, height, fault[:110], color="tomato", ha="center", fontsize=6)
    for (name, picture, contours), line in zip(rows, panels, strict=True):
        for (plane, axis, letters), panel in zip(PLANES, line, strict=True):
            _draw(panel, picture, contours, axis, centre)
            if picture is rows[0][1]:
                panel.set_title(plane, color="white", fontsize=7, pad=1)
            for place, letter in zip((0.02, 0.93), letters, strict=True):
                panel.text(place, 0.03, letter, color="white", fontsize=6, transform=panel.transAxes)
        line[0].set_ylabel(name, color="white", fontsize=7)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}")
    figure.savefig(beside, format="png", facecolor="black")
    beside.replace(path)
    return path


def _rows(volumes: SubjectVolumes) -> list[tuple[str, np.ndarray, np.ndarray | None]]:
    """Name, picture (H, W, D) or (H, W, D, 3) in [0, 1], and distances whose zero levels are drawn over it."""
    distance = volumes["distance"] if "distance" in volumes.keys else None
    rows: list[tuple[str, np.ndarray, np.ndarray | None]] = []
    for contrast in CONTRASTS:
        if contrast in volumes.keys:
            values = volumes[contrast].astype(np.float32)
            picture = np.clip(values / 80, 0, 1) if contrast == "CT" else np.clip(values, 0, 1)
            mask = f"{contrast}_defacing_mask"
            if mask in volumes.keys:
                picture = np.where(volumes[mask][..., None] > 0, (0.35, 0.0, 0.35), picture[..., None].repeat(3, -1))
            rows.append((f"{contrast} (0 to 80 HU)" if contrast == "CT" else contrast, picture, None))
    if rows:
        rows[0] = (rows[0][0], rows[0][1], distance)
    if "generation_labels" in volumes.keys:
        rows.append(("generation labels", _grey(volumes["generation_labels"]), None if rows else distance))
    if "segmentation" in volumes.keys:
        rows.append(("segmentation", _colour(volumes["segmentation"], str(volumes.entry.get("protocol", ""))), None))
    if distance is not None:
        white = np.clip(distance[..., [1, 3]].min(axis=-1) / DISTANCE_RANGE_MM, -1, 1)
        rows.append(
            ("distance to white", np.stack([np.clip(white, 0, 1), 0 * white, np.clip(-white, 0, 1)], axis=-1), None)
        )
    if "mni" in volumes.keys:
        mni = volumes["mni"]
        ratio = np.array(next(r[1] for r in rows).shape[:3]) // mni.shape[:3] if rows else np.ones(3, dtype=int)
        stripes = np.abs(np.mod(mni / 40, 2) - 1).astype(
            np.float32
        )  # 40 mm of template space from dark to bright or back
        rows.append(("MNI x, y, z (40 mm)", np.kron(stripes, np.ones((*ratio, 1), dtype=np.float32)), None))
    return rows


def _draw(panel: Any, picture: np.ndarray, contours: np.ndarray | None, axis: int, centre: np.ndarray) -> None:
    at = int(np.clip(centre[axis], 0, picture.shape[axis] - 1))
    slices = np.take(picture, at, axis=axis).swapaxes(0, 1)
    panel.imshow(slices, origin="lower", cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    if contours is not None:
        levels = np.take(contours, at, axis=axis).swapaxes(0, 1)
        for channel, colour in CONTOURS:
            if levels[..., channel].min() < 0 < levels[..., channel].max():
                panel.contour(levels[..., channel], [0], colors=colour, linewidths=0.5)
    panel.set_xticks([])
    panel.set_yticks([])
    panel.set_frame_on(False)


def _grey(labels: np.ndarray) -> np.ndarray:
    """Labels as well-separated shades; codes that mix two tissues go evenly from one to the other."""
    table = np.where(np.arange(256) < 150, 0.25 + 0.7 * np.mod(np.arange(256) * GOLDEN_RATIO, 1), 0)
    table[0] = 0
    table[150:251] = np.linspace(1.0, 0.1, 101)  # white matter to grey matter to fluid
    table[251:] = np.linspace(0.2, 0.6, 5)
    return np.asarray(table[np.clip(labels, 0, 255).astype(int)], dtype=np.float32)


def _colour(labels: np.ndarray, protocol: str) -> np.ndarray:
    """Labels in the colours of their protocol, or in any different ones where it is unknown."""
    if protocol in LabelProtocol.names():
        table = np.array([s.colour for s in LabelProtocol.load(protocol).structures]) / 255
        table[0] = 0
    else:
        hue = np.mod(np.arange(256) * GOLDEN_RATIO, 1)
        table = hsv_to_rgb(np.stack([hue, np.full(256, 0.7), (np.arange(256) > 0) * 1.0], axis=-1))
    return np.asarray(table[np.minimum(labels.astype(int), len(table) - 1)], dtype=np.float32)
