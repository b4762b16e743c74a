"""The command that shows what the generator makes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["preview"]


def preview(
    input: str,
    output: str = "preview.png",
    count: int = 24,
    seed: int = 0,
    size: Sequence[int] = (160, 192, 160),
    samples: int = 1,
    mild_samples: int = 0,
    **ranges: Any,
) -> str:
    """Draw a contact sheet of generated scans with their targets and what was drawn for them.

    Args:
        input: datalist (JSON) of prepared subjects, or one label map with FreeSurfer ids.
        output: PNG file.
        count: number of scans.
        seed: seed of the first scan; the next ones count up.
        size: size of the scans, in voxels of 1 mm.
        samples: scans that share one deformation and its targets.
        mild_samples: how many of them are mild.
        ranges: any field of SynthesisRanges, as in --lesion_prob 1 --rotation_deg "[-30,30]"; docs/sampling.md lists them.

    Returns:
        Path of the sheet.
    """
    from brainfm_monai.preview import write_preview
    from brainfm_monai.synthesis import parse_ranges

    laws = parse_ranges(ranges)
    sheet = write_preview(
        str(input),
        str(output),
        count=count,
        seed=seed,
        spatial_size=size,
        samples=samples,
        mild_samples=mild_samples,
        ranges=laws,
    )
    return str(sheet)
