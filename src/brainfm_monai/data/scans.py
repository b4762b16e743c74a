"""The scans that a user means as items of a MONAI datalist."""

from typing import Any

from brainfm_monai import io


def find_scans(*args: Any, **kwargs: Any) -> list[dict[str, Any]]:
    """List scans as items with ``image`` and ``name``, but skipped ones: see :func:`brainfm_monai.io.find_scans`."""
    return [scan.item for scan in io.find_scans(*args, **kwargs) if not scan.skipped]
