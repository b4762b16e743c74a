"""A contact sheet of generated scans with their targets and what was drawn for them."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from monai.data import load_decathlon_datalist
from monai.utils import convert_to_tensor
from torch import Tensor
from tqdm import tqdm

from brainfm_monai.anatomy import Protocol
from brainfm_monai.data.labels import crop_to_box, find_brain_centre, load_label_map
from brainfm_monai.data.loading import LoadSubjectd
from brainfm_monai.synthesis import SUBJECT_KEYS, SynthesisRanges, Synthesizer, describe, render
from brainfm_monai.tasks import MAX_DISTANCE_MM, TASKS, TaskLayout

__all__ = ["load_subjects", "write_preview"]

logger = logging.getLogger(__name__)

matplotlib.use("Agg")

BOX = (192, 224, 224)  # mm around the brain of a single label map
BRAIN_IDS = (2, 3, 7, 8, 41, 42, 46, 47)  # which place that box
LABEL_SUFFIXES = (".nii", ".nii.gz", ".mgz", ".mgh")
PANEL_INCHES = 1.7
COLUMNS = 2  # samples side by side
DISTANCE_PANELS = ("lp", "lw", "rp", "rw")


def load_subjects(source: str | Path, protocol: Protocol, generation_protocol: str) -> list[dict[str, Any]]:
    """Subjects of a datalist, or the one of a label map.

    Args:
        source: JSON datalist of prepared subjects, or a label map with FreeSurfer ids; of the latter there is no distance and no
            MNI target.
        protocol: of the segmentation.
        generation_protocol: by which a label map is painted.

    Returns:
        Entries with paths, or, for a label map, one entry with volumes (1, H, W, D).

    Raises:
        FileNotFoundError: if the source does not exist.
        ValueError: if it is neither a datalist nor a label map.
    """
    source = Path(source)
    if not source.is_file():
        raise FileNotFoundError(f"{source}: a datalist (JSON) or a label map is needed, found no such file")
    if source.suffix == ".json":
        sections = [
            name for name, value in json.loads(source.read_text(encoding="utf-8")).items() if isinstance(value, list)
        ]
        return [entry for name in sections for entry in load_decathlon_datalist(str(source), True, name)]
    if not source.name.endswith(LABEL_SUFFIXES):
        raise ValueError(f"{source}: a datalist (.json) or a label map ({', '.join(LABEL_SUFFIXES)}) is needed")
    ids, affine = load_label_map(source)
    ids, _ = crop_to_box(ids, affine, find_brain_centre(ids, BRAIN_IDS, str(source)), BOX)
    labels = {"generation_labels": Protocol.load(generation_protocol), "segmentation": protocol}
    return [
        {"subject": source.name, **{k: torch.from_numpy(p.encode(ids, str(source)))[None] for k, p in labels.items()}}
    ]


def _load(entry: Mapping[str, Any]) -> dict[str, Tensor]:
    """Volumes of an entry as a batch of one, in the unit of the files."""
    has = [*entry, *entry.get("simulated", ())]
    keys = [key for key in SUBJECT_KEYS if key in has and (key not in TASKS or TASKS[key].kind != "scalar")]
    item = entry if all(isinstance(entry.get(key), Tensor) for key in keys) else LoadSubjectd(keys)(entry)
    return {key: convert_to_tensor(item[key], track_meta=False)[None] for key in keys}


def write_preview(
    source: str | Path,
    output: str | Path,
    *,
    count: int = 24,
    seed: int = 0,
    spatial_size: Sequence[int] = (160, 192, 160),
    samples: int = 1,
    mild_samples: int = 0,
    ranges: SynthesisRanges | None = None,
    protocol: str = "synthseg_head",
    generation_protocol: str = "synthseg_generation",
) -> Path:
    """Draw scans and put them on one sheet: three planes, the targets, and the drawn parameters.

    Args:
        source: see :func:`load_subjects`; the subjects take turns.
        output: PNG file.
        count: number of scans.
        seed: of the first scan; the next ones follow.
        spatial_size: (H, W, D) of the scans, in voxels of 1 mm.
        samples: scans of one deformation, see :class:`Synthesizer`.
        mild_samples: how many of them are mild.
        ranges: laws of the generator; the published ones if not given.
        protocol: of the segmentation.
        generation_protocol: of subjects that do not name theirs.

    Returns:
        The sheet's path.

    Raises:
        ValueError: if the file is not to be a PNG, or see :func:`load_subjects`.
    """
    output = Path(output)
    if output.suffix.lower() != ".png":
        raise ValueError(f"{output}: the sheet is a PNG, found suffix '{output.suffix}'")
    tasks = ["segmentation", "distance", "mni", "log_bias_field", "T1w", "T2w", "FLAIR", "CT", "lesion"]
    layout = TaskLayout(tasks, protocol)
    synthesizer = Synthesizer(
        ranges or SynthesisRanges(), layout, spatial_size, generation_protocol=generation_protocol, samples=samples,
        mild_samples=mild_samples,
    )  # fmt: skip
    subjects = load_subjects(source, layout.protocol, generation_protocol)
    scans: list[tuple[dict[str, np.ndarray], str]] = []
    for number in tqdm(range(math.ceil(count / samples)), desc="scans", unit="subject"):
        entry = subjects[number % len(subjects)]
        subject = _load(entry)
        with torch.no_grad():
            params = synthesizer.draw(subject, [seed + number], entry.get("generation_protocol"))
            out = render(subject, params, layout)
        for place in range(samples):
            maps = {name: np.asarray(value[place]) for name, value in out.items() if value.ndim == 5}
            name = f"{Path(str(entry.get('subject', number))).name}  seed {seed + number}"
            scans.append((maps, f"{name}\n{describe(params, place)}"))
    output.parent.mkdir(parents=True, exist_ok=True)
    beside = output.with_name(f".{output.name}.part")
    _draw_sheet(scans[:count], layout).savefig(beside, format="png", dpi=100, facecolor="black")
    beside.replace(output)
    logger.info("%s", output)
    return output


def _draw_sheet(scans: Sequence[tuple[dict[str, np.ndarray], str]], layout: TaskLayout) -> Figure:
    panels = max(len(_panels(maps, layout)) for maps, _ in scans) + 1
    columns = min(COLUMNS, len(scans))
    rows = math.ceil(len(scans) / columns)
    figure = Figure(figsize=(columns * panels * PANEL_INCHES, rows * PANEL_INCHES * 1.25))
    space = {"left": 0.002, "right": 0.998, "bottom": 0.002, "top": 1 - 0.12 / rows, "wspace": 0.03, "hspace": 0.12}
    grid = figure.subplots(rows, columns * panels, squeeze=False, gridspec_kw=space)
    for axes in grid.flat:
        axes.set_axis_off()
    for number, (maps, text) in enumerate(scans):
        row, first = number // columns, (number % columns) * panels
        grid[row, first].text(0, 1, text, color="white", fontsize=6.5, va="top", transform=grid[row, first].transAxes)
        for axes, (title, draw) in zip(grid[row, first + 1 :], _panels(maps, layout).items(), strict=False):
            draw(axes)
            axes.set_title(title, color="white", fontsize=6, pad=1)
    return figure


def _panels(maps: Mapping[str, np.ndarray], layout: TaskLayout) -> dict[str, Any]:
    """Name and painter of every panel of a scan: planes through its middle, left of the head on the left."""
    image, labels = maps["image"][0], maps["segmentation"][0]
    colours = np.array([s.colour for s in layout.protocol.structures], dtype=np.float32) / 255
    middle = [n // 2 for n in image.shape]
    grey: dict[str, Any] = {"cmap": "gray", "vmin": 0, "vmax": 1}

    def cut(volume: np.ndarray, axis: int) -> np.ndarray:
        return np.take(volume, middle[axis], axis=axis).swapaxes(0, 1)

    def paint(volume: np.ndarray, axis: int = 2, **style: Any) -> Any:
        return lambda axes: axes.imshow(cut(volume, axis), origin="lower", **style)

    panels = {"axial": paint(image, 2, **grey), "coronal": paint(image, 1, **grey), "sagittal": paint(image, 0, **grey)}
    panels["segmentation"] = lambda axes: _overlay(axes, cut(image, 2), colours[cut(labels, 2)], cut(labels, 2) > 0)
    panels["coronal "] = lambda axes: _overlay(axes, cut(image, 1), colours[cut(labels, 1)], cut(labels, 1) > 0)
    if "distance" in maps:
        panels["surfaces"] = lambda axes: _contours(axes, cut(image, 2), [cut(d, 2) for d in maps["distance"]])
        nearest = np.abs(maps["distance"][[0, 2]]).min(0)
        panels["distance (mm)"] = paint(nearest, cmap="magma", vmin=0, vmax=MAX_DISTANCE_MM)
    if "mni" in maps:
        panels["MNI"] = lambda axes: _lines(axes, cut(image, 2), [cut(c * 100, 2) for c in maps["mni"][:2]])
    panels["log bias"] = paint(maps["log_bias_field"][0], cmap="RdBu_r", vmin=-1, vmax=1)
    panels |= {name: paint(maps[name][0], **grey) for name in ("T1w", "T2w", "FLAIR") if name in maps}
    if "CT" in maps:
        panels["CT"] = paint(maps["CT"][0], cmap="gray", vmin=0, vmax=0.08)
    if maps["lesion"].any():
        panels["lesion"] = paint(maps["lesion"][0], cmap="gray")
    return panels


def _overlay(axes: Axes, grey: np.ndarray, colour: np.ndarray, there: np.ndarray) -> None:
    axes.imshow(
        np.where(there[..., None], 0.5 * grey[..., None] + 0.5 * colour, grey[..., None]).clip(0, 1), origin="lower"
    )


def _contours(axes: Axes, grey: np.ndarray, distances: Sequence[np.ndarray]) -> None:
    axes.imshow(grey, cmap="gray", vmin=0, vmax=1, origin="lower")
    for name, distance in zip(DISTANCE_PANELS, distances, strict=True):
        if distance.min() < 0 < distance.max():
            axes.contour(distance, levels=[0], colors="#ff4040" if name.endswith("p") else "#ffe040", linewidths=0.4)


def _lines(axes: Axes, grey: np.ndarray, coordinates: Sequence[np.ndarray]) -> None:
    axes.imshow(grey, cmap="gray", vmin=0, vmax=1, origin="lower")
    for coordinate, colour in zip(coordinates, ("#ff6060", "#60e060"), strict=True):
        axes.contour(coordinate, levels=np.arange(-120, 121, 20), colors=colour, linewidths=0.4)
