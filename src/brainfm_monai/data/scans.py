"""Which scans to work on: one file, or all in a folder, each with a name of its own."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from brainfm_monai.transforms import SCAN_SUFFIXES, scan_stem

__all__ = ["find_scans"]


def find_scans(source: str | Path, output_dir: str | Path | None = None) -> list[dict[str, str]]:
    """List a scan, or every NIfTI and MGH file in a folder and the folders in it, in the order of their paths.

    Hidden files and folders are passed over, and so are the results of earlier runs in ``output_dir``.

    Args:
        source: file or folder; an empty string, which is a configuration's default, lists nothing.
        output_dir: where results are written; it may lie inside ``source`` but not be the same.

    Returns:
        One ``{"image": path, "name": name}`` per scan. The name is the file's stem; stems that occur twice are preceded by
        the folders they lie in (``sub-01_T1w``), and numbered where that is not enough.

    Raises:
        FileNotFoundError: if there is no such file or folder, or no scan in the folder.
        ValueError: if the file has another suffix, or the results would land among the scans.
    """
    kinds = ", ".join(SCAN_SUFFIXES)
    if not str(source):
        return []
    path = Path(source)
    if not path.exists():
        raise FileNotFoundError(f"{source}: a scan or a folder of scans is needed, found no such file or folder")
    if path.is_file():
        if not path.name.lower().endswith(SCAN_SUFFIXES):
            raise ValueError(f"{source}: a scan is a file of the kind {kinds}, found another suffix")
        return [{"image": str(path), "name": scan_stem(path)}]
    output = Path(output_dir).resolve() if output_dir else None
    if output == path.resolve():
        raise ValueError(f"{source}: results need a folder of their own, found output_dir to be the folder of the scans")
    files = [f for f in sorted(path.rglob("*")) if f.is_file() and _is_scan(f.relative_to(path))]
    files = [f for f in files if output is None or output not in f.resolve().parents]
    if not files:
        raise FileNotFoundError(f"{source}: a folder of scans ({kinds}) is needed, found none in it")
    return [{"image": str(f), "name": name} for f, name in zip(files, _names([f.relative_to(path) for f in files]), strict=True)]


def _is_scan(relative: Path) -> bool:
    return relative.name.lower().endswith(SCAN_SUFFIXES) and not any(part.startswith(".") for part in relative.parts)


def _names(relative: list[Path]) -> list[str]:
    """Different names for files at these paths, also where file names ignore case."""
    names = [scan_stem(path) for path in relative]
    count = Counter(name.lower() for name in names)
    names = ["_".join([*p.parent.parts, n]) if count[n.lower()] > 1 else n for p, n in zip(relative, names, strict=True)]
    taken: set[str] = set()
    for i, name in enumerate(names):
        number = 1
        while names[i].lower() in taken:
            number += 1
            names[i] = f"{name}-{number}"
        taken.add(names[i].lower())
    return names
