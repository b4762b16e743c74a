"""Packs everything that a bare GPU machine needs to test, measure and train for some minutes, without a network.

    python packaging/make_gpu_kit.py DATALIST [--output dist/gpu-kit] [--megabytes 60] [--weights FILE]

The machine has Python 3.12 with torch, numpy, scipy, scikit-image, pandas, matplotlib, jinja2, psutil, tqdm, tensorboard and pytest. The
kit is one folder with the package and its bundle, its tests and benchmarks, the wheels of what that machine lacks, the weights to
start from, and subjects. ``run.sh MINUTES OUT`` of the kit does the rest.

Subjects are held as a training at 2 mm reads them: generation labels of 1 mm in one byte, the table that folds them into the
segmentation, distances and scans at 2 mm in one byte each, coordinates at 8 mm. A subject takes about 0.65 MB. Subjects are taken
in the order of the datalist, those for validation first, until the kit has reached its size.
"""

from __future__ import annotations

import argparse
import io
import json
import lzma
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
WHEELS = (
    "monai==1.6.1",
    "nibabel==5.4.2",
    "pytorch-ignite==0.5.5",
    "pynrrd==1.1.3",
    "fire==0.7.1",
    "termcolor==3.1.0",
    "edt==3.1.2",
)
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 17)] + ["manylinux2014_x86_64"]
IMAGES = ("T1w", "T2w", "FLAIR", "CT")
PLACES = (
    "src/brainfm_monai",
    "tests",
    "benchmarks",
    "bundle/configs",
    "bundle/variants",
    "setup.cfg",
    "pyproject.toml",
)
MEGABYTE = 2**20
GRIDS = {"distance": 2, "mni": 2} | dict.fromkeys(IMAGES, 2)  # voxels of the file in one of the kit, along each axis
SPARE = 100_000  # bytes for the datalist and the archive's own blocks


def shrink(values: np.ndarray, factor: int) -> np.ndarray:
    """Means of blocks of ``factor`` voxels along the first three axes, with the type's own rounding for whole numbers."""
    if any(n % factor for n in values.shape[:3]):
        raise ValueError(f"a grid whose sides divide by {factor} is needed, found {values.shape[:3]}")
    h, w, d = (n // factor for n in values.shape[:3])
    blocks = values.reshape(h, factor, w, factor, d, factor, -1).astype(np.float32)
    means = blocks.mean(axis=(1, 3, 5)).reshape(h, w, d, *values.shape[3:])
    return np.rint(means).astype(values.dtype) if np.issubdtype(values.dtype, np.integer) else means


def pack_subject(item: dict[str, Any], base: Path) -> dict[str, bytes]:
    """Files of one subject: ``generation_labels.nii``, ``fold.json`` and what else the subject has, at the kit's resolution.

    Args:
        item: entry of a datalist, whose paths start at ``base``.
        base: folder of the datalist.

    Raises:
        ValueError: if one generation label has two labels of the segmentation, so that no table can fold it.
    """
    files = {}
    labels: Any = nib.load(base / item["generation_labels"])
    generation = np.asarray(labels.dataobj).astype(np.uint8)
    folded: Any = nib.load(base / item["segmentation"])
    segmentation = np.asarray(folded.dataobj).astype(np.uint8)
    pairs = np.unique(np.stack([generation.ravel(), segmentation.ravel()]), axis=1)
    if len(np.unique(pairs[0])) != pairs.shape[1]:
        raise ValueError(f"{item['subject']}: one segmentation label for each generation label is needed")
    fold = np.zeros(256, dtype=int)
    fold[pairs[0]] = pairs[1]
    files["generation_labels.nii"] = nib.Nifti1Image(generation, labels.affine).to_bytes()
    files["fold.json"] = json.dumps(fold.tolist()).encode()
    for key, factor in GRIDS.items():
        if key in item and key not in item.get("simulated", ()):  # a training paints those itself
            stored: Any = nib.load(base / item[key])
            raw = shrink(np.asanyarray(stored.dataobj.get_unscaled()), factor)
            shift = np.eye(4)
            shift[:3, :3] *= factor
            shift[:3, 3] = (factor - 1) / 2
            image = nib.Nifti1Image(raw, stored.affine @ shift)
            slope, intercept = stored.dataobj.slope, stored.dataobj.inter
            image.header.set_slope_inter(slope, intercept)
            files[f"{key}.nii"] = image.to_bytes()
    return files


def unpack(archive: Path, output: Path) -> Path:
    """Write the subjects of a kit as prepared subjects, with their datalist.

    Args:
        archive: ``subjects.tar``.
        output: folder for them.

    Returns:
        Path of the datalist.
    """
    with tarfile.open(archive) as subjects:
        subjects.extractall(output, filter="data")
    for packed in output.glob("*.tar.xz"):
        with tarfile.open(packed) as files:
            files.extractall(output, filter="data")
        packed.unlink()
    for table in output.glob("*/fold.json"):
        labels: Any = nib.load(table.with_name("generation_labels.nii"))
        fold = np.array(json.loads(table.read_text()), dtype=np.uint8)
        nib.save(nib.Nifti1Image(fold[np.asarray(labels.dataobj)], labels.affine), table.with_name("segmentation.nii"))
    return output / "datalist.json"


def make_tar(files: Mapping[str, bytes]) -> bytes:
    """A tar archive of files by their names."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name, value in sorted(files.items()):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(value), 0o644
            archive.addfile(entry, io.BytesIO(value))
    return content.getvalue()


def pack_subjects(datalist: Path, limit: int) -> tuple[bytes, list[str], list[str]]:
    """A tar archive of at most ``limit`` bytes; the names of its subjects, and of those for which it has no room."""
    listed = json.loads(datalist.read_text(encoding="utf-8"))
    kept: dict[str, list[dict[str, Any]]] = {"training": [], "validation": []}
    files: dict[str, bytes] = {}
    left_out: list[str] = []
    for part in ("validation", "training"):
        for item in listed[part]:
            name = item["subject"]
            if f"{name}.tar.xz" not in files and name not in left_out:
                contents = pack_subject(item, datalist.parent)
                packed = lzma.compress(make_tar({f"{name}/{file}": content for file, content in contents.items()}))
                if sum(map(len, files.values())) + len(packed) + SPARE > limit:
                    left_out.append(name)
                else:
                    files[f"{name}.tar.xz"] = packed
            if name not in left_out:
                painted = item.get("simulated", ())
                held = [
                    key for key in ("generation_labels", "segmentation", *GRIDS) if key in item and key not in painted
                ]
                other = {key: item[key] for key in item if key not in GRIDS and not key.endswith("_mask")}
                kept[part].append(other | {key: f"{name}/{key}.nii" for key in held})
    names = [name.removesuffix(".tar.xz") for name in files]
    return make_tar(files | {"datalist.json": json.dumps(kept, indent=1).encode()}), names, left_out


def make_kit(datalist: Path, output: Path, megabytes: float, weights: Path, wheels: bool) -> None:
    """Write the kit's folder.

    Raises:
        ValueError: if the kit is larger than ``megabytes`` before it has a subject.
    """
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    with zipfile.ZipFile(output / "project.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for place in PLACES:
            path = ROOT / place
            for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
                inside = file.relative_to(ROOT)
                if file.is_file() and "__pycache__" not in inside.parts and "bundle" not in inside.parts[2:]:
                    archive.write(file, inside)
    shutil.copy(weights, output / "model.pt")
    shutil.copy(ROOT / "packaging/gpu_kit_run.sh", output / "run.sh")
    shutil.copy(Path(__file__), output / "kit.py")
    if wheels:
        words = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--only-binary=:all:",
            "--python-version",
            "3.12",
        ]
        words += ["--implementation", "cp", *(f"--platform={name}" for name in PLATFORMS), "-d", str(output / "wheels")]
        subprocess.run([*words, *WHEELS], check=True)
    taken = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    limit = int(megabytes * MEGABYTE) - taken
    if limit <= 0:
        raise ValueError(
            f"{output}: at most {megabytes:g} MiB are allowed, the kit has {taken / MEGABYTE:.1f} MiB without subjects"
        )
    subjects, names, left_out = pack_subjects(datalist, limit)
    (output / "subjects.tar").write_bytes(subjects)
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file()) / MEGABYTE
    print(
        f"{output}: {size:.1f} MiB with {len(names)} subjects; left out for want of room: {', '.join(left_out) or 'none'}"
    )
    print("on the machine: bash run.sh MINUTES OUT, in the kit's folder")


def main() -> None:
    """Build the kit, or unpack the subjects of one, where ``subjects.tar`` is given in place of a datalist."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("datalist", type=Path, help="datalist of prepared subjects")
    parser.add_argument("--output", type=Path, default=Path("dist/gpu-kit"))
    parser.add_argument("--megabytes", type=float, default=60, help="largest size of the kit, in MiB")
    parser.add_argument("--weights", type=Path, default=ROOT / "bundle/models/model.pt", help="weights to start from")
    parser.add_argument("--no-wheels", action="store_true", help="leave the wheels out: the machine has the packages")
    options = parser.parse_args()
    if options.datalist.name == "subjects.tar":
        print(unpack(options.datalist, options.output))
        return
    make_kit(options.datalist, options.output, options.megabytes, options.weights, not options.no_wheels)


if __name__ == "__main__":
    main()
