"""Break left and right on purpose, one place after the other, and name the test that fails.

    python benchmarks/mirrors.py [NAME ...]

Each injection changes one line of a copy of the package, so that left becomes right at that place alone, and runs the tests of the
place with the copy. An injection that no test finds is a fault of the tests: it is reported, and the exit status is 1. So is a
line that the package does not contain any more: the injection must follow the code. The tests of MONAI Label's servers are not
run here.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path("src/brainfm_monai")


class Injection(NamedTuple):
    """One place: its name, the file, the text that is replaced, the text in its place, and the tests that must fail."""

    name: str
    file: str
    text: str
    mirrored: str
    tests: tuple[str, ...]


INJECTIONS: tuple[Injection, ...] = ()


def inject(injection: Injection, folder: Path) -> str:
    """The first test that fails with the injection, or an empty string.

    Raises:
        ValueError: if the file does not contain the text exactly once.
    """
    copy = folder / injection.name.replace(" ", "_")
    shutil.copytree(ROOT / PACKAGE, copy / "src/brainfm_monai", ignore=shutil.ignore_patterns("__pycache__", "bundle"))
    (copy / "src/brainfm_monai/bundle").symlink_to(ROOT / "bundle", target_is_directory=True)
    shutil.copytree(ROOT / "tests", copy / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    for name in (
        "bundle",
        "benchmarks",
        "packaging",
        "monailabel_app",
        "docs",
        "setup.cfg",
        "pyproject.toml",
        "README.md",
    ):
        (copy / name).symlink_to(ROOT / name)
    path = copy / PACKAGE / injection.file
    text = path.read_text(encoding="utf-8")
    if text.count(injection.text) != 1:
        count = text.count(injection.text)
        raise ValueError(
            f"{injection.name}: {injection.file} must contain {injection.text!r} once, found it {count} times"
        )
    path.write_text(text.replace(injection.text, injection.mirrored), encoding="utf-8")
    words = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        f"--basetemp={copy / 'temporary'}",
        *injection.tests,
    ]
    environment = {**os.environ, "PYTHONPATH": str(copy / "src")}
    done = subprocess.run(words, cwd=copy, env=environment, capture_output=True, text=True)
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, flags=re.MULTILINE)
    return failed[1] if failed else ""


def main(names: list[str]) -> int:
    """Print a row for each injection; 1 if one was not found."""
    missed = 0
    print("| left and right exchanged in | found by |\n|---|---|")
    for injection in INJECTIONS:
        if not names or injection.name in names:
            with tempfile.TemporaryDirectory() as folder:
                found = inject(injection, Path(folder))
            missed += not found
            print(f"| {injection.name} (`{injection.file}`) | {f'`{found}`' if found else '**no test**'} |", flush=True)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
