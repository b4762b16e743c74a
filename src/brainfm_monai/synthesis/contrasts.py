"""Tables of contrasts: the mean intensity of every tissue in a kind of scan."""

from collections.abc import Sequence
from functools import cache
from importlib import resources

import numpy as np
import torch
from torch import Tensor

from brainfm_monai.anatomy import Protocol
from brainfm_monai.io import read_table

CONTRASTS = ("T1w", "T2w", "FLAIR", "CT")


def read_contrasts(names: Sequence[str], protocol: Protocol) -> tuple[Tensor, Tensor]:
    """Means and the stds of these means, both (N, L), out of N of the package's tables for L generation labels.

    ``CT`` is in HU, the others are in [0, 255]; NaN for labels that a table does not know, as for partial-volume codes.

    Raises:
        ValueError: if there is no such table.
    """
    unknown = [name for name in names if name not in CONTRASTS]
    if unknown:
        raise ValueError(f"contrast_priors: names must be out of {list(CONTRASTS)}, got {unknown}")
    rows = [[_read(name).get(int(i), (np.nan, np.nan)) for i in protocol.freesurfer_ids] for name in names]
    means, stds = torch.tensor(rows, dtype=torch.float32).reshape(len(names), len(protocol), 2).unbind(-1)
    return means, stds


@cache
def _read(name: str) -> dict[int, tuple[float, float]]:
    rows = read_table(str(resources.files("brainfm_monai") / "contrasts" / f"{name}.tsv"))
    return {int(row["freesurfer_id"]): (float(row["mean"]), float(row["mean_std"])) for row in rows}
