"""A contact sheet of generated scans with their targets and what was drawn for them."""

import textwrap
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from brainfm_monai.data.datalist import read_datalist
from brainfm_monai.data.loading import LoadSubjectd
from brainfm_monai.io import refuse_if, write_whole
from brainfm_monai.slices import Cell, compose, cut_slices, encode, paint, shade
from brainfm_monai.synthesis import SUBJECT_KEYS, Synthesizer, parse_ranges, render
from brainfm_monai.tasks import TASKS, TaskLayout

TARGETS = ("segmentation", "distance", "mni", "log_bias_field", "T1w", "T2w", "FLAIR", "CT", "lesion")
PROTOCOL = "synthseg_head"  # of the segmentation
COLUMNS = 2  # samples side by side
PIXEL_MM, SMALLEST_CELL = 0.75, 180  # the text of a sample fits into a cell
CHARACTER_PIXELS = 7  # width of a letter, about
VOXELS = np.eye(4)  # affine of a generated scan: 1 mm, RAS axes
KEYS = [key for key in SUBJECT_KEYS if key not in TASKS or TASKS[key].kind != "scalar"]  # volumes of a subject


def write_preview(
    input: str | Path, output: str | Path = "preview.png", count: int = 24, seed: int = 0,
    size: Sequence[int] = (160, 192, 160), **ranges: Any,
) -> Path:  # fmt: skip
    """Draw a contact sheet of generated scans with their targets and what was drawn for them; return its path.

    Args:
        input: datalist (JSON) of prepared subjects, which take turns.
        output: PNG file; another suffix is refused.
        count: number of scans.
        seed: seed of the first scan; the next ones count up.
        size: size of the scans, in voxels of 1 mm.
        ranges: any field of SynthesisRanges, as in --lesion_prob 1 --scaling "[1,1]"; docs/sampling.md lists them.
    """
    output, layout, laws = Path(output), TaskLayout(TARGETS, PROTOCOL), parse_ranges(ranges)
    refuse_if(output.suffix.lower() != ".png", f"{output}: the sheet is a PNG", f"suffix '{output.suffix}'")
    synthesizer, subjects = Synthesizer(laws, layout, size), read_datalist(input)
    rows: list[list[Cell]] = []
    for number in tqdm(range(count), desc="scans", unit="scan"):
        entry = subjects[number % len(subjects)]
        item, name = LoadSubjectd(KEYS)(entry), Path(str(entry.get("subject", number))).name
        subject = {key: item[key].as_tensor()[None] for key in KEYS if key in item}
        subject |= {f"real_{key}": torch.zeros(1) for key in entry.get("simulated", ())}  # no inputs, as in training
        with torch.no_grad():
            params = synthesizer.draw(subject, [seed + number], entry.get("generation_protocol"))
            out = render(subject, params, layout)
        maps = {name: np.asarray(value[0]) for name, value in out.items() if value.ndim == 5}
        rows.append(_draw_row(maps, f"{name}  seed {seed + number}\n{params.describe()}", layout))
    pairs = [list(chain(*rows[first : first + COLUMNS])) for first in range(0, len(rows), COLUMNS)]
    with write_whole(output) as partial:
        partial.write_bytes(encode(compose(pairs), "png"))
    return output


def _draw_row(maps: Mapping[str, np.ndarray], text: str, layout: TaskLayout) -> list[Cell]:
    """What was drawn for a sample, its image in three planes, and its targets, as the table of tasks says."""
    image, size = maps["image"], maps["image"].shape[1:]
    cuts = cut_slices(np.ones(size), VOXELS, pixel_mm=min(PIXEL_MM, max(size) / SMALLEST_CELL))
    bases = [shade(cut.read(image, VOXELS)[..., 0]) for cut in cuts]
    width = max(bases[0].shape[1] // CHARACTER_PIXELS, 10)
    lines = "\n".join(textwrap.fill(line, width) for line in text.split("\n"))
    cells = [Cell(np.zeros_like(bases[0]), caption=lines)]
    cells += [Cell(base, cut.plane.marks) for cut, base in zip(cuts, bases, strict=True)]
    for name, values in maps.items():
        task = layout.tasks.get(name)
        if task is None or not task.picture or (task.kind == "mask" and not values.any()):
            continue
        drawn, is_labels = task.target_to_map(torch.as_tensor(values)), task.kind == "labels"
        for cut, base in list(zip(cuts, bases, strict=True))[: 2 if is_labels else 1]:  # axial, and coronal for labels
            read = cut.read(drawn, VOXELS, nearest=is_labels)
            cells.append(Cell(paint(task, read, base, layout.protocol, cut.plane), caption=name))
    return cells
