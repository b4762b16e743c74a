"""Where the bundle is."""

from __future__ import annotations

from pathlib import Path

__all__ = ["DEFAULT_BUNDLE", "find_bundle"]

DEFAULT_BUNDLE = "bundle"  # folder in the working directory


def find_bundle(bundle: str | Path = DEFAULT_BUNDLE) -> Path:
    """Folder of the bundle.

    Args:
        bundle: folder; where the default name is no bundle in the working directory, the bundle that the package carries.

    Returns:
        The folder, which need not exist if it was named.
    """
    folder, carried = Path(bundle), Path(__file__).parents[1] / DEFAULT_BUNDLE
    missing = not (folder / "configs" / "inference.json").is_file()
    return carried if missing and str(bundle) == DEFAULT_BUNDLE and carried.is_dir() else folder
