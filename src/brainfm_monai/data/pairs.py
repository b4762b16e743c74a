"""The list of an evaluation: scans, each with a reference label map, or with other maps of the same head."""

from __future__ import annotations

from pathlib import Path

from brainfm_monai.data.datalist import read_datalist
from brainfm_monai.io import scan_stem
from brainfm_monai.tasks import TASKS

__all__ = ["REFERENCES", "read_pairs"]

# what an item may hold beside its scan: entry of the list and task that it is the reference of
REFERENCES = {
    "label": "segmentation",
    **{name: name for name in TASKS if name not in ("segmentation", "super_resolution")},
}


def read_pairs(datalist: str | Path, section: str = "testing") -> list[dict[str, str]]:
    """Read a MONAI datalist of scans and their references.

    Args:
        datalist: JSON file ``{section: [{"image": path, "label": path}, ...]}``; paths are relative to its folder. An item may
            have a ``name``, a ``label_protocol`` where its label map does not hold FreeSurfer ids, and, beside the label map
            or in its place, ``T1w``, ``T2w``, ``FLAIR``, ``CT`` (HU), ``log_bias_field`` (logarithm of the factor), ``distance``
            (mm; left pial, left white, right pial, right white), ``mni`` (mm; x, y, z) and ``lesion``. They lie in the same
            space as the scan, in grids of their own.
        section: section of the list.

    Returns:
        The items with whole paths and different names.

    Raises:
        FileNotFoundError: if the list or one of its files is missing.
        ValueError: if the list is not such a list, or two items have one name.
    """
    if not Path(datalist).is_file():
        raise FileNotFoundError(f"{datalist}: a datalist (JSON) is needed, found no such file: pass --datalist FILE")
    items = read_datalist(datalist, section)
    pairs = []
    for item in items:
        there = [key for key in REFERENCES if key in item]
        if "image" not in item or not there:
            raise ValueError(
                f"{datalist}: every item needs 'image' and 'label' or another reference, found {sorted(item)}"
            )
        for key in ("image", *there):
            if not Path(item[key]).is_file():
                raise FileNotFoundError(f"{item[key]}: named in {datalist}, found no such file")
        pairs.append({"name": scan_stem(item["image"]), **item})
    names = [pair["name"] for pair in pairs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice or not pairs:
        raise ValueError(
            f"{datalist}: items with different names are needed, found {f'twice: {twice}' if twice else 'none'}"
        )
    return pairs
