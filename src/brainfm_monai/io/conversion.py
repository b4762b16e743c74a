"""The volume of a DICOM series as dcm2niix makes it, compared with the places of its slices."""

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from brainfm_monai.io.dicom import EXTRA, SPACING_TOLERANCE, TILT_TOLERANCE_DEG, Series, list_series
from brainfm_monai.io.files import refuse_if

CONVERSION_SECONDS = 1800


@contextmanager
def convert_series(path: str | Path, name: str | None = None) -> Iterator[tuple[Path, Series]]:
    """Convert one series of a folder, or of one file, to NIfTI by dcm2niix; the file lives as long as the block.

    The ``name`` is that of the series; None: the only one. ValueError if the series is not one stack of slices, an
    extra is missing, or the conversion fails.
    """
    series = list_series(path)
    usable = [s for s in series if (s.name == name if name else not s.problem)]
    kinds = "; ".join(f"{s.name} ({s.problem or f'{len(s.files)} files'})" for s in series)
    refuse_if(len(usable) != 1, "one DICOM series of evenly spaced slices is needed", f"{len(usable)} in {kinds}")
    (chosen,) = usable
    refuse_if(chosen.problem, "one evenly spaced stack of DICOM slices is needed", chosen.problem)
    try:
        import dcm2niix
    except ImportError as error:
        raise ValueError(EXTRA) from error
    with TemporaryDirectory() as folder:
        source, target = Path(folder, "source"), Path(folder, "target")
        source.mkdir()
        target.mkdir()
        for number, file in enumerate(chosen.files):  # these files alone, under names that every converter takes
            (source / f"{number:06d}.dcm").symlink_to(file.resolve())
        command = [dcm2niix.bin, *"-b n -z n -m y -x i -f scan -o".split(), str(target), str(source)]
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=CONVERSION_SECONDS)
        # beside a volume dcm2niix writes versions that it resampled: without tilt (_Tilt), with even distances (_Eq)
        made = [f for f in sorted(target.glob("*.nii")) if not re.search(r"_(Tilt|Eq)_?\d*\.nii$", f.name)]
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith(("Error", "Warning"))]
        said = [re.sub(r"\S+/(\d{6})\.dcm", lambda match: chosen.files[int(match[1])].name, line) for line in said]
        found = f"{len(made)}: {'; '.join(said[-2:])}"
        refuse_if(len(made) != 1, "dcm2niix must make one volume of the series", found)
        yield made[0], chosen


def place_by_headers(affine: np.ndarray, depth: int, series: Series) -> np.ndarray:
    """The affine of a converted series by the places of its slices, which keep a tilt, in the order of dcm2niix.

    ``affine``, (4, 4), is dcm2niix's, ``depth`` the number of slices. ValueError if both disagree on more than a tilt.
    """
    placed = np.array(series.affine)
    if placed[:3, 2] @ affine[:3, 2] < 0:
        placed[:3, 3] += placed[:3, 2] * (depth - 1)
        placed[:3, 2] *= -1
    sizes = np.linalg.norm(placed[:3, :3], axis=0)
    off = np.abs(placed - affine)[:3] / np.append(sizes, sizes.max())
    leaning = np.abs(placed[:3, 2] @ placed[:3, :2] / sizes[:2] / sizes[2]).max()
    is_tilted = leaning > np.sin(np.radians(TILT_TOLERANCE_DEG))
    tolerance = 1.0 if is_tilted else SPACING_TOLERANCE  # dcm2niix's own affine leaves a tilt out
    if off[:, :3].max() > tolerance or off[:, 3].max() > 1:
        raise ValueError(f"dcm2niix places slices otherwise than their headers: {np.round(affine[:3], 3).tolist()}")
    return placed
