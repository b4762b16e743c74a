"""The MONAI datalist of a folder of prepared subjects."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Sequence
from pathlib import Path

__all__ = ["write_datalist"]

SIDECAR = "subject.json"
KEYS = ("generation_labels", "segmentation", "distance", "mni")


def write_datalist(
    root: str | Path,
    path: str | Path = "datalist.json",
    *,
    validation: Sequence[str] | str = (),
    validation_fraction: float = 0.0,
    seed: int = 0,
) -> Path:
    """List the prepared subjects of a folder for ``monai.data.load_decathlon_datalist``.

    Paths in the list are relative to its folder. A target that a subject does not have is left out of its entry.

    Args:
        root: folder with one folder per prepared subject.
        path: the list to write; a relative path is taken from ``root``.
        validation: subjects kept for validation, by name; they may be separated by commas.
        validation_fraction: share of the other subjects that is drawn for validation, at random.
        seed: seed of the draw.

    Returns:
        Path of the list, with the sections ``training`` and ``validation``.

    Raises:
        FileNotFoundError: if ``root`` is no folder.
        ValueError: if there is no subject, a name for validation is not one of them, or none is left for training.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: a folder of prepared subjects is needed, no such folder")
    target = root / path
    names = sorted(f.parent.name for f in root.glob(f"[!.]*/{SIDECAR}"))
    if not names:
        raise ValueError(f"{root}: prepared subjects (folders with {SIDECAR}) are needed, found none")
    kept = set(_draw(names, _names(validation), validation_fraction, seed, root))
    entries = {name: _entry(root / name, target.parent) for name in names}
    sections = {
        "training": [entries[name] for name in names if name not in kept],
        "validation": [entries[name] for name in names if name in kept],
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.part")
    beside.write_text(json.dumps(sections, indent=2) + "\n", encoding="utf-8")
    beside.replace(target)
    return target


def _names(validation: Sequence[str] | str) -> list[str]:
    parts = validation.split(",") if isinstance(validation, str) else validation
    return [str(part).strip() for part in parts if str(part).strip()]


def _draw(names: list[str], wanted: list[str], fraction: float, seed: int, root: Path) -> list[str]:
    unknown = sorted(set(wanted) - set(names))
    if unknown:
        raise ValueError(f"{root}: 'validation' must name prepared subjects, found no {', '.join(unknown)}")
    if not 0 <= fraction < 1:
        raise ValueError(f"write_datalist: 'validation_fraction' must be in [0, 1), got {fraction}")
    rest = [name for name in names if name not in wanted]
    drawn = random.Random(seed).sample(rest, round(fraction * len(rest)))
    if len(wanted) + len(drawn) == len(names):
        raise ValueError(f"{root}: a subject must be left for training, found all {len(names)} in 'validation'")
    return [*wanted, *drawn]


def _entry(subject: Path, folder: Path) -> dict[str, str]:
    files = {key: subject / f"{key}.nii.gz" for key in KEYS}
    relative = {key: Path(os.path.relpath(file, folder)).as_posix() for key, file in files.items() if file.is_file()}
    return {"subject": subject.name, **relative}
