"""Builds the bundle as a model zoo distributes it: one zip that needs nothing of this project installed.

    python packaging/make_bundle.py [--output dist] [--name brain_multitask]

The zip holds the folders configs, docs and models of ``bundle/``, and the package itself beside them. Its configs differ from those
of the repository in three ways, so that they work from any working directory and out of ``monai.bundle.load``:

- ``bundle_root`` is the folder of the config that is read, where a workflow of MONAI reads it; else the working directory.
- ``package`` puts that folder on Python's path and imports the package. MONAI runs import statements of a config before everything
  else, when the folder is not on the path yet, so that expressions use ``@package`` in place of an import statement.
- components of the package require ``@package``.

Two builds of the same files give the same bytes: names are sorted, times and permissions fixed.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "brainfm_monai"
NAME = "brain_multitask"
FOLDERS = ("configs", "docs", "models")  # of bundle/
TIME = (1980, 1, 1, 0, 0, 0)  # the first that a zip can hold
LARGEST_MB = 25  # of a file, in the model zoo
BASES = {"evaluate.json": "inference.json", "features.json": "inference.json", "finetune.json": "train.json",
         "label_train.json": "train.json", "multi_gpu_train.json": "train.json"}  # laid over another config  # fmt: skip
IMPORTS = ["$import inspect", "$import sys"]
WHERE = (
    "$next((str(frame[0].f_locals['self'].config_root_path.parent) for frame in inspect.stack(0)"
    " if 'config_root_path' in getattr(frame[0].f_locals.get('self'), '__dict__', {})), '.')"
)


def make_bundle(output: Path, name: str = NAME) -> Path:
    """Build the zip.

    Args:
        output: folder for it.
        name: folder inside the zip, which MONAI's ``download`` takes as the bundle's name.

    Returns:
        Path of ``<name>_v<version>.zip``.

    Raises:
        ValueError: if a file is larger than the model zoo allows.
    """
    files = dict(sorted(_files()))
    large = [path for path, content in files.items() if len(content) > LARGEST_MB * 2**20]
    if large:
        raise ValueError(f"{large[0]}: a file of at most {LARGEST_MB} MB is needed, found {len(files[large[0]])} bytes")
    version = json.loads(files["configs/metadata.json"])["version"]
    output.mkdir(parents=True, exist_ok=True)
    target = output / f"{name}_v{version}.zip"
    partial = target.with_name(f".{target.name}.partial")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for path, content in files.items():
            entry = zipfile.ZipInfo(f"{name}/{path}", TIME)
            entry.external_attr, entry.compress_type, entry.create_system = 0o100644 << 16, zipfile.ZIP_DEFLATED, 3
            archive.writestr(entry, content)
    partial.replace(target)
    return target


def requirements() -> list[str]:
    """Requirements of pip for what the bundle needs, as the model zoo reads them in metadata.json."""
    metadata = json.loads((ROOT / "bundle/configs/metadata.json").read_text(encoding="utf-8"))
    names = {
        "monai": metadata["monai_version"],
        "numpy": metadata["numpy_version"],
        **metadata["required_packages_version"],
    }
    return [f"{name}=={version}" for name, version in names.items()]


def _files() -> Iterator[tuple[str, bytes]]:
    """Path in the bundle, and content, of every file."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "bundle", f"src/{PACKAGE}"], cwd=ROOT, capture_output=True, check=True
    )
    for name in listed.stdout.decode().split("\0"):
        path = ROOT / name
        if not name or path.is_symlink() or not path.is_file():
            continue
        part = Path(name).parts
        if part[0] == "src":
            yield "/".join(part[1:]), path.read_bytes()
        elif len(part) == 2 or part[1] in FOLDERS:
            place = "/".join(part[1:])
            rewritten = part[1] == "configs" and path.suffix == ".json" and path.name != "metadata.json"
            yield place, _rewrite(path).encode() if rewritten else path.read_bytes()


def _rewrite(path: Path) -> str:
    """A config that finds the package in its own bundle."""
    config = json.loads(path.read_text(encoding="utf-8"))
    below: dict[str, Any] = {}
    if path.name in BASES:
        below = json.loads((path.parent / BASES[path.name]).read_text(encoding="utf-8"))
    else:
        config["bundle_root"] = WHERE
    needed = [*_imports(below), *_imports(config)]
    for key in [key for key in config if key in ("imports", "+imports")]:  # "+" adds to the list below it
        lines = [*(IMPORTS if key == "imports" else []), *config[key]]
        config[key] = [line for line in dict.fromkeys(lines) if not line.startswith(f"$import {PACKAGE}")]
    modules = [
        _component("pkgutil.resolve_name", name=name, _requires_="@package_path") for name in dict.fromkeys(needed)
    ]
    package = {
        "package_path": "$sys.path.insert(1, @bundle_root)",
        "package_modules": modules,
        "package": _component("pkgutil.resolve_name", name=PACKAGE, _requires_=["@package_path", "@package_modules"]),
    }
    start = {key: config.pop(key) for key in ("_desc_", "imports", "+imports", "bundle_root") if key in config}
    config = {**start, **package, **_require(config)}
    return json.dumps(config, indent=4) + "\n"


def _component(target: str, **arguments: Any) -> dict[str, Any]:
    return {"_target_": target, **arguments}


def _imports(config: dict[str, Any]) -> list[str]:
    """Modules of the package that a config imports."""
    lines = [*config.get("imports", []), *config.get("+imports", [])]
    return [line.removeprefix("$import ") for line in lines if line.startswith(f"$import {PACKAGE}")]


def _require(value: Any) -> Any:
    """The same part of a config, whose components and expressions take the package from ``@package``."""
    if isinstance(value, list):
        return [_require(item) for item in value]
    if isinstance(value, str) and value.startswith("$"):
        return re.sub(rf"(?<![\w.'\"]){PACKAGE}\.", "@package.", value)
    if not isinstance(value, dict):
        return value
    rewritten = {key: _require(item) for key, item in value.items()}
    if str(value.get("_target_", "")).startswith(f"{PACKAGE}."):
        rewritten["_requires_"] = ["@package", *value.get("_requires_", [])]
    return rewritten


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="folder for the zip (dist)")
    parser.add_argument("--name", default=NAME, help=f"name of the bundle ({NAME})")
    parser.add_argument(
        "--requirements", action="store_true", help="print what metadata.json requires, for pip, instead"
    )
    words = parser.parse_args()
    print(" ".join(requirements()) if words.requirements else make_bundle(words.output, words.name))
