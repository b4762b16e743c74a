"""Open data: a table of files with a download that checks them, and the demo's scans, which need no download."""

import logging
from http.client import HTTPException
from importlib import resources
from itertools import groupby
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import urlopen

import nibabel as nib
import numpy as np
from nibabel.affines import apply_affine, from_matvec, voxel_sizes
from nibabel.processing import resample_from_to
from nilearn.datasets import load_mni152_template
from scipy.spatial.transform import Rotation
from tqdm.contrib.concurrent import thread_map

from brainfm_monai.io import hash_file, read_table, refuse_if, write_whole

logger = logging.getLogger(__name__)

TABLE = str(resources.files("brainfm_monai") / "datasets" / "open.tsv")
TIMEOUT_S = 30
IN_PLANE_MM = 0.9
SLICE_THICKNESS_MM = 5  # also the spacing: slices without gaps, as in much of clinical routine
TILT_DEG = (9.0, 0.0, 6.0)  # about right, anterior and superior: a head that lies askew, slices not along it
NOISE_STD = 0.02  # of the brightest tissue
BIAS_LOG_AMPLITUDE = 0.35  # a surface coil's shading: factors of 0.7 to 1.4


class DownloadError(OSError):
    """Some files could not be fetched; the others were."""


def read_open_sets() -> dict[str, list[dict[str, str]]]:
    """The files of every set of the package's table: rows with path, address, SHA-256, bytes, licence, content."""
    return {name: list(rows) for name, rows in groupby(read_table(TABLE), lambda row: row["name"])}


def fetch_dataset(name: str, output: str | Path, *, jobs: int = 4) -> list[Path]:
    """Download an open data set and check its hashes; what is there already is kept. Returns its files.

    ``synthseg``: 20 label maps of whole heads (Apache-2.0). ``open_ms``: T1w, T2w and FLAIR of people with multiple
    sclerosis, as a BIDS folder (CC-BY). ValueError if there is no such set; DownloadError if a server cannot be
    reached, or at the end, with one line for each file that the server lacks or that is another one.

    Args:
        name: name of the set.
        output: folder for its files.
        jobs: downloads at once.
    """
    sets = read_open_sets()
    rule = f"{name}: an open data set of the table is needed ({', '.join(sorted(sets))})"
    refuse_if(name not in sets, rule, "no such name")
    files, targets = sets[name], [Path(output) / file["file"] for file in sets[name]]
    answers = thread_map(_fetch, files, targets, max_workers=max(1, jobs), desc=name, unit="file")
    if failures := [answer for answer in answers if answer]:
        raise DownloadError("\n".join([f"{len(failures)} of {len(files)} files were not fetched:", *failures]))
    logger.info("%d files of %s in %s", len(files), name, output)
    return targets


def _fetch(file: dict[str, str], target: Path) -> str:
    """Fetch one file, which appears whole, with the right hash, or not at all; return what is wrong with it, if any."""
    if target.is_file() and hash_file(target) == file["sha256"]:
        return ""
    address, rule = file["address"], f"{file['file']}: SHA-256 {file['sha256'][:12]}... is needed"
    try:
        with urlopen(address, timeout=TIMEOUT_S) as response, write_whole(target) as partial:
            partial.write_bytes(response.read())
            found = hash_file(partial)
            refuse_if(found != file["sha256"], rule, f"{found[:12]}... at {address}")
    except HTTPError as error:
        error.close()  # it holds the connection
        return f"{file['file']}: the server of {address} answers {error.code} {error.reason}"
    except HTTPException as error:  # as of a connection that ends early
        return f"{file['file']}: the answer of {address} breaks off: {error}"
    except ValueError as error:
        return str(error)
    except (URLError, ConnectionError, TimeoutError) as error:
        host, reason = urlsplit(address).hostname, getattr(error, "reason", error)
        advice = "is there a network? Whole files stay, run it again to continue"
        raise DownloadError(f"{file['file']}: {host} cannot be reached ({reason}): {advice}") from error
    return ""


def write_demo_scans(output: str | Path) -> list[Path]:
    """Write the demo's scans into a folder: the MNI152 T1 and a clinical scan simulated from it; return their paths."""
    folder, template = Path(output), load_mni152_template(resolution=1)
    t1w = nib.Nifti1Image(np.asarray(template.get_fdata(dtype=np.float32)), template.affine)
    scans = {"mni152_T1w.nii.gz": t1w, "clinical_T2like.nii.gz": simulate_clinical_scan(t1w)}
    for name, scan in scans.items():
        with write_whole(folder / name) as partial:
            nib.save(scan, partial)
    return [folder / name for name in scans]


def simulate_clinical_scan(t1w: nib.Nifti1Image, seed: int = 0) -> nib.Nifti1Image:
    """Make of a T1 what a clinical archive might hold: 5 mm slices askew to the head, turned contrast, shading, noise.

    Fluid is bright, white matter dark; voxels are stored from right to left and front to back, with the true oblique
    affine. ``t1w`` is skull-stripped with background 0; the image is int16, of 0.9 x 0.9 x 5 mm.
    """
    image = np.asarray(t1w.get_fdata(dtype=np.float32))
    scale = float(np.percentile(image[image > 0], 99.5))
    inverted = np.where(image > 0, 1.0 - 0.8 * np.clip(image / scale, 0, 1), 0.0).astype(np.float32)
    # a tilted grid around the centre of the head, stored LPS, with slices of 1 mm that are averaged
    zooms = np.array([IN_PLANE_MM, IN_PLANE_MM, 1.0])
    extent_mm = np.array(t1w.shape) * voxel_sizes(t1w.affine) + 10
    shape = np.ceil(extent_mm / zooms / SLICE_THICKNESS_MM).astype(int) * SLICE_THICKNESS_MM
    matrix = Rotation.from_euler("xyz", TILT_DEG, degrees=True).as_matrix() @ np.diag(zooms * [-1, -1, 1])
    centre = apply_affine(t1w.affine, (np.array(t1w.shape) - 1) / 2)
    fine_affine = from_matvec(matrix, centre - matrix @ ((shape - 1) / 2))
    fine = resample_from_to(nib.Nifti1Image(inverted, t1w.affine), (tuple(shape.tolist()), fine_affine), order=1)
    values = fine.get_fdata(dtype=np.float32)
    slices = values.reshape(*shape[:2], -1, SLICE_THICKNESS_MM).mean(axis=-1)
    affine = fine_affine @ from_matvec(np.diag([1, 1, SLICE_THICKNESS_MM]), [0, 0, (SLICE_THICKNESS_MM - 1) / 2])
    noise = np.random.default_rng(seed).normal(0, NOISE_STD, (2, *slices.shape))
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, n) for n in slices.shape), indexing="ij")  # brighter to one corner
    shading = np.exp(BIAS_LOG_AMPLITUDE * (0.6 * x + 0.5 * y * y - 0.4 * z)).astype(np.float32)
    magnitude = np.hypot(slices * shading + noise[0], noise[1])  # Rician: noise of a magnitude image
    return nib.Nifti1Image(np.rint(magnitude * 1000).astype(np.int16), affine)
