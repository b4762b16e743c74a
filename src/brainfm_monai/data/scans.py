"""The scans that a user means as items of a MONAI datalist."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from brainfm_monai import io

__all__ = ["find_scans"]


def find_scans(
    source: str | Path,
    output_dir: str | Path | None = None,
    participant_label: str | int | Sequence[str | int] | None = None,
) -> list[dict[str, Any]]:
    """List scans as items with ``image`` and ``name``, without what is skipped: see :func:`brainfm_monai.io.find_scans`."""
    return [scan.item for scan in io.find_scans(source, output_dir, participant_label) if not scan.skipped]
