"""What is installed, what this machine is fast in, and what is missing for what."""

import os
import platform
import re
import sys
from importlib import metadata

from brainfm_monai import __version__

CORE = "core"  # what is installed without an extra


def version() -> str:
    """Print the version."""
    return __version__


def doctor() -> str:
    """Report what is installed, what this machine is fast in, and which package is missing for what."""
    import psutil
    import torch

    from brainfm_monai.io import find_bundle
    from brainfm_monai.networks import reduced_precision

    weights = find_bundle() / "models" / "model.pt"
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if kind == "cuda" else f"{platform.machine()}, {os.cpu_count()} cores"
    precision = str(reduced_precision(torch.device(kind))).removeprefix("torch.")
    memory, python = psutil.virtual_memory(), f"Python {platform.python_version()} on {sys.platform}"
    lines = [
        f"brainfm-monai {__version__}, {python}, torch {torch.__version__}",
        f"device: {kind} ({name}), fast in {precision}",
        f"memory: {memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB are free",
        f"weights: {weights if weights.is_file() else f'{weights} is missing: pass --bundle FOLDER or --weights FILE'}",
    ]
    for extra, missing in sorted(_missing_packages().items(), key=lambda row: row[0] != CORE):
        name = "predict" if extra == CORE else f"extra {extra}"
        remedy = f'missing {", ".join(missing)}: pip install "brainfm-monai[{extra}]"'.replace(f"[{CORE}]", "")
        lines.append(f"{name}: {remedy if missing else 'complete'}")
    return "\n".join(lines)


def _missing_packages() -> dict[str, list[str]]:
    """Names of the packages of each extra that are not installed, by the package's own metadata."""
    missing: dict[str, list[str]] = {}
    try:
        requirements = metadata.requires("brainfm-monai") or []
    except metadata.PackageNotFoundError:  # the package lies in a bundle, whose metadata.json names its packages
        return {}
    for requirement in requirements:
        package, _, condition = requirement.partition(";")
        (name,) = re.findall(r"^[\w.-]+", package)
        extras = re.findall(r"extra == ['\"]([\w-]+)", condition) or [CORE]
        absent = [] if any(metadata.distributions(name=name)) else [name]
        missing.setdefault(extras[0], []).extend(absent)
    return missing
