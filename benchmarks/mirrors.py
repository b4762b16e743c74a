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


LEFT_RIGHT = '.replace("left", "~").replace("right", "left").replace("~", "right")'
INJECTIONS = (
    Injection(
        "the reader of volumes", "io/volumes.py", "return Volume(values, stored.affine,", "return Volume(values[::-1], stored.affine,",
        ("tests/test_io_volumes.py", "tests/test_geometry.py"),
    ),
    Injection(
        "the affine of a header", "io/headers.py", "    return affine, noticed", "    return np.diag([-1.0, 1, 1, 1]) @ affine, noticed",
        ("tests/test_io_volumes.py", "tests/test_geometry.py"),
    ),
    Injection(
        "the names of the label table", "anatomy.py", 'name, side = row["name"], row["side"]',
        'name, side = row["name"].replace("Left", "~").replace("Right", "Left").replace("~", "Right"), row["side"]',
        ("tests/test_anatomy.py",),
    ),
    Injection(
        "the mirror average", "inferers/two_stage.py", "self.layout.mirror(run(image.flip(MIRROR_AXIS)).float())",
        "run(image.flip(MIRROR_AXIS)).float().flip(MIRROR_AXIS)", ("tests/test_inferers.py",),
    ),
    Injection(
        "the mirror average by planes", "inferers/two_stage.py", "self.layout.mirror(decode(total - b, total - a))",
        "decode(total - b, total - a).flip(MIRROR_AXIS)", ("tests/test_inferers.py",),
    ),
    Injection(
        "the labels on their way back to the grid of the scan", "outputs/result.py", "torch.linalg.inv(source.affine) @ target",
        "torch.linalg.inv(source.affine) @ torch.diag(target.new_tensor([-1, 1, 1, 1])) @ target",
        ("tests/test_outputs_maps.py", "tests/test_geometry.py"),
    ),
    Injection(
        "the hemispheres of the surfaces", "outputs/cortex.py", 'zip(scan.layout.tasks["distance"].channel_names, channels',
        'zip(("rp", "rw", "lp", "lw"), channels', ("tests/test_outputs_maps.py", "tests/test_geometry.py"),
    ),
    Injection(
        "the vertices of the surfaces", "outputs/cortex.py", "POINTSET=vertices", "POINTSET=vertices * np.float32([-1, 1, 1])",
        ("tests/test_outputs_maps.py", "tests/test_geometry.py"),
    ),
    Injection(
        "the sign of MNI coordinates in the mirror average", "tasks.tsv", "\t-1 1 1\t", "\t1 1 1\t",
        ("tests/test_tasks.py", "tests/test_synthesis.py"),
    ),
    Injection(
        "the sign of MNI coordinates in the file", "outputs/template.py", 'scan.in_grid("mni")',
        'scan.in_grid("mni") * np.float32([-1, 1, 1]).reshape(3, 1, 1, 1)', ("tests/test_outputs_maps.py", "tests/test_geometry.py"),
    ),
    Injection(
        "the transform files", "outputs/template.py", "RAS_LPS = np.diag([-1.0,", "RAS_LPS = np.diag([1.0,", ("tests/test_geometry.py",),
    ),
    Injection(
        "the exported network", "networks/multitask.py", "self.backbone(self.pool(image))",
        "self.backbone(self.pool(image.flip([2]) if torch.jit.is_scripting() else image))", ("tests/test_exports.py",),
    ),
    Injection(
        "the labels that MONAI Label sends", "annotation/__init__.py", "id_of[_plain(name)]", f"id_of[_plain(name){LEFT_RIGHT}]",
        ("tests/test_annotation.py",),
    ),
    Injection(
        "the labels of the generator", "synthesis/rendering.py", "geometry.mirror_labels[labels], labels", "labels, labels",
        ("tests/test_synthesis.py",),
    ),
    Injection(
        "the letters on the pictures", "slices.py", 'Plane(2, 0, 1, "RL")', 'Plane(2, 0, 1, "LR")', ("tests/test_slices.py",),
    ),
)  # fmt: skip


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
