"""Files that scanners, archives and other people's scripts send: read rightly, read with a warning, or refused in one line."""

from __future__ import annotations

import gzip
import os
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from brainfm_monai.io import ScanError, read_scan

VALUES = np.random.default_rng(0).integers(0, 900, (12, 14, 16)).astype(np.int16)
AFFINE = np.array([[-3.0, 0, 0, 18], [0, 3, 0, -21], [0, 0, 3, -24], [0, 0, 0, 1]])
LARGEST_BYTES = 2**23  # that a refused file may make the reader allocate


def nifti(values: np.ndarray = VALUES, affine: np.ndarray | None = AFFINE, **fields: Any) -> bytes:
    """Bytes of a NIfTI-1 file; ``fields`` overwrite its header: place in bytes, format and values."""
    raw = bytearray(nib.Nifti1Image(values, affine).to_bytes())
    for place, kind, *content in fields.values():
        raw[place : place + struct.calcsize("<" + kind)] = struct.pack("<" + kind, *content)
    return bytes(raw)


def typed(code: int, values: np.ndarray) -> bytes:
    """A file of a type that nibabel does not write: its code, and the numbers."""
    header = nifti(t=(70, "2h", code, 8 * values.itemsize))[:352]
    return header + values.tobytes(order="F")


def srow(matrix: np.ndarray) -> tuple[Any, ...]:
    return (280, "12f", *matrix[:3].ravel())


SFORM, QFORM, NO_QFORM = (254, "h", 1), (252, "h", 1), (252, "h", 0)
SHEARED = AFFINE @ np.array([[1, 0.3, 0, 0], [0, 1, 0, 0], [0, 0.2, 1, 0], [0, 0, 0, 1]])
RIGHT_HANDED = AFFINE @ np.diag([-1.0, 1, 1, 1])
CENTRED = np.array([[-3, 0, 0, 16.5], [0, 3, 0, -19.5], [0, 0, 3, -22.5], [0, 0, 0, 1]])  # the middle voxel at 0 mm
RGB = np.zeros((12, 14, 16), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])


def bomb(shape: tuple[int, int, int], kind: type[np.generic], zeros: int) -> bytes:
    """A header that promises a large volume, and a packed stream of zeros behind it."""
    header = nib.Nifti1Header()
    header.set_data_shape(shape)
    header.set_data_dtype(kind)
    header.set_sform(np.diag([0.3, 0.3, 0.3, 1]), 1)
    header["vox_offset"], header["magic"] = 352, b"n+1"
    return gzip.compress(header.binaryblock + bytes(4) + bytes(zeros))


# name of the file, its bytes, and the words of the refusal
REFUSED: dict[str, tuple[str, bytes, str]] = {
    "empty": ("a.nii", b"", "a NIfTI header is needed"),
    "empty, packed": ("a.nii.gz", gzip.compress(b""), "a NIfTI header is needed"),
    "text": ("a.nii", b"Dear customer, " * 100, "a NIfTI header is needed"),
    "a page of an archive": ("a.nii.gz", b"<html>404 not found</html>", "a NIfTI header is needed"),
    "wrong magic word": ("a.nii", nifti(m=(344, "4s", b"oops")), "a NIfTI header is needed"),
    "header alone": ("a.nii", nifti()[:352], "bytes are promised by the header, found a file of 352"),
    "half a header": ("a.nii", nifti()[:200], "a NIfTI header is needed"),
    "cut short": ("a.nii", nifti()[:-100], "bytes are promised by the header"),
    "cut short, packed": ("a.nii.gz", gzip.compress(nifti())[:-400], "the voxels cannot be read"),
    "packed after a cut": ("a.nii.gz", gzip.compress(nifti()[:-100]), "bytes are needed, found"),
    "check sum": ("a.nii.gz", gzip.compress(nifti())[:-8] + b"12345678", "CRC check failed"),
    "bytes changed": (
        "a.nii.gz",
        gzip.compress(nifti())[:900] + bytes(64) + gzip.compress(nifti())[964:],
        "cannot be read",
    ),
    "1000^3 on a tiny file": (
        "a.nii",
        gzip.decompress(bomb((1000, 1000, 1000), np.int16, 999)),
        "at most 536870912 voxels",
    ),
    "800^3 on a tiny file": (
        "a.nii",
        gzip.decompress(bomb((800, 800, 800), np.int16, 999)),
        "are promised by the header",
    ),
    "800^3 packed on a tiny file": ("a.nii.gz", bomb((800, 800, 800), np.int16, 999), "are promised by the header"),
    "a bomb that is shorter than it says": (
        "a.nii.gz",
        bomb((500, 500, 500), np.int16, 2**18),
        "promised by the header",
    ),
    "dimensions of 0": ("a.nii", nifti(d=(42, "3h", 12, 0, 16)), "at least 1 voxel"),
    "negative dimensions": ("a.nii", nifti(d=(42, "3h", 12, -14, 16)), "at least 1 voxel"),
    "99 dimensions": ("a.nii", nifti(d=(40, "h", 99)), "a NIfTI header is needed|1 to 7 dimensions"),
    "two dimensions": ("a.nii", nifti(VALUES[:, :, 0]), "a 3-D volume of at least 2 voxels along each axis"),
    "one slice": ("a.nii", nifti(VALUES[:, :, :1]), "a 3-D volume of at least 2 voxels along each axis"),
    "1 x N x M": ("a.nii", nifti(VALUES[:1]), "a 3-D volume of at least 2 voxels along each axis"),
    "several volumes": ("a.nii", nifti(np.stack([VALUES] * 3, -1)), "pass --frame N"),
    "vectors": ("a.nii", nifti(np.stack([VALUES] * 3, -1)[:, :, :, None]), "pass --frame N"),
    "colours": ("a.nii", nifti(RGB), "one real number per voxel is needed, found colours"),
    "complex": ("a.nii", nifti(VALUES.astype(np.complex64)), "found complex numbers"),
    "complex of 128 bits": ("a.nii", nifti(VALUES.astype(np.complex128)), "found complex numbers"),
    "128-bit floats": (
        "a.nii",
        typed(1536, VALUES.astype(np.longdouble)),
        "one real number per voxel is needed, found",
    ),
    "unknown type": ("a.nii", nifti(t=(70, "h", 4242)), "cannot be read|is needed"),
    "one bit": ("a.nii", nifti(t=(70, "h", 1)), "cannot be read|is needed"),
    "singular sform": ("a.nii", nifti(s=srow(np.zeros((4, 4))), c=SFORM, q=NO_QFORM), "three independent axes"),
    "flat sform": (
        "a.nii",
        nifti(s=srow(AFFINE @ np.diag([1, 1, 0, 1])), c=SFORM, q=NO_QFORM),
        "three independent axes",
    ),
    "NaN in the sform": ("a.nii", nifti(s=srow(AFFINE * np.nan), c=SFORM, q=NO_QFORM), "three independent axes"),
    "infinite sform": ("a.nii", nifti(s=srow(np.full((4, 4), np.inf)), c=SFORM, q=NO_QFORM), "three independent axes"),
    "zero spacing": ("a.nii", nifti(p=(80, "3f", 3, 0, 3), c=(252, "2h", 0, 0)), "voxel sizes above 0 mm"),
    "NaN spacing": ("a.nii", nifti(p=(80, "3f", 3, np.nan, 3), c=(252, "2h", 0, 0)), "voxel sizes above 0 mm"),
    "voxels within the header": (
        "a.nii",
        nifti(o=(108, "f", 0)),
        "begin at byte 352 or later are needed, found the byte 0",
    ),
    "voxels at no place": ("a.nii", nifti(o=(108, "f", np.nan)), "begin at byte 352 or later are needed"),
    "bits of another type": ("a.nii", nifti(t=(70, "2h", 4, 32)), "numbers of 16 bits are needed for the type 4"),
    "one file named as a pair": ("a.hdr", nifti(), "a NIfTI header is needed, found .* magic word b'n\\+1'"),
    "pointer of git-annex": ("a.nii.gz", b"/annex/objects/MD5E-s9--a.nii.gz\n", "a NIfTI header is needed"),
    "pointer of Git LFS": ("a.nii.gz", b"version https://git-lfs.github.com/spec/v1\n", "a NIfTI header is needed"),
    "packed twice": ("a.nii.gz", gzip.compress(gzip.compress(nifti())), "a NIfTI header is needed"),
    "NRRD with time in its space": (
        "a.nrrd",
        b"NRRD0005\ntype: uchar\ndimension: 4\nspace: left-posterior-superior-time\nsizes: 4 4 4 1\nspace directions: "
        b"(3,0,0,0) (0,3,0,0) (0,0,3,0) (0,0,0,1)\nencoding: raw\n\n" + bytes(64),
        "a space of 3 dimensions is needed",
    ),
    "metres": ("a.nii", nifti(affine=AFFINE / 1000), "a head scan extends over 10 to 600 mm"),
    "micrometres": ("a.nii", nifti(affine=AFFINE * 1000), "a head scan extends over 10 to 600 mm"),
    "constant": ("a.nii", nifti(np.full_like(VALUES, 7)), "an image with contrast is needed, found the value 7"),
    "zero": ("a.nii", nifti(np.zeros_like(VALUES)), "an image with contrast is needed, found the value 0"),
    "NaN everywhere": ("a.nii", nifti(np.full(VALUES.shape, np.nan, np.float32)), "finite voxels are needed"),
    "values beyond float32": ("a.nii", nifti(VALUES * 1e300), r"values up to 3.4e\+38 are needed"),
    "values below float32": ("a.nii", nifti(VALUES * 1e-300), "an image with contrast is needed"),
    "not MGH": ("a.mgz", gzip.compress(b"nothing of the kind" * 40), "cannot be read|is needed"),
    "half an MGH header": ("a.mgh", b"\0\0\0\1" + bytes(80), "an MGH header of 284 bytes is needed"),
    "not NRRD": ("a.nrrd", b"nothing of the kind", "Invalid NRRD magic"),
    "NRRD of 1000^3": (
        "a.nrrd",
        b"NRRD0004\ntype: short\ndimension: 3\nsizes: 1000 1000 1000\nencoding: raw\nendian: little\n\n" + bytes(99),
        "are promised by the header",
    ),
    "NRRD in colours": (
        "a.nrrd",
        b"NRRD0004\ntype: uchar\ndimension: 4\nkinds: RGB-color domain domain domain\nsizes: 3 4 4 4\nencoding: raw\n\n"
        + bytes(192),
        "found colours",
    ),
    "DICOM that is none": ("a.nii", bytes(128) + b"DICM" + bytes(400), "DICOM|header"),
}
# what is read as it is, or with a warning: bytes, the affine, and the words of the warning
READ: dict[str, tuple[str, bytes, np.ndarray, str]] = {
    "plain": ("a.nii", nifti(), AFFINE, ""),
    "packed under another name": ("a.nii", gzip.compress(nifti()), AFFINE, ""),
    "not packed, though it says so": ("a.nii.gz", nifti(), AFFINE, ""),
    "bytes behind the end": ("a.nii", nifti() + b"more", AFFINE, "holds 4 bytes more than its header promises"),
    "a dimension too short": ("a.nii.gz", gzip.compress(nifti() + nifti()[352:]), AFFINE, "holds 5376 bytes more"),
    "sizes in mm that are called metres": ("a.nii", nifti(u=(123, "B", 1)), AFFINE, ""),
    "NaN as the slope": ("a.nii", nifti(s=(112, "2f", np.nan, np.nan)), AFFINE, ""),
    "0 as qfac": ("a.nii", nifti(affine=RIGHT_HANDED, p=(76, "f", 0), c=(252, "2h", 1, 0)), RIGHT_HANDED, ""),
    "bytes behind the packed end": ("a.nii.gz", gzip.compress(nifti()) + b"more", AFFINE, ""),
    "packed in two members": ("a.nii.gz", gzip.compress(nifti()[:5000]) + gzip.compress(nifti()[5000:]), AFFINE, ""),
    "64-bit integers": ("a.nii", typed(1024, VALUES.astype(np.int64)), AFFINE, ""),
    "64-bit integers without a sign": ("a.nii", typed(1280, VALUES.astype(np.uint64)), AFFINE, ""),
    "64-bit floats": ("a.nii", nifti(VALUES.astype(np.float64)), AFFINE, ""),
    "four dimensions of one": ("a.nii", nifti(VALUES[..., None]), AFFINE, ""),
    "five dimensions of one": ("a.nii", nifti(VALUES[..., None, None]), AFFINE, ""),
    "slope 0": ("a.nii", nifti(s=(112, "2f", 0, 0)), AFFINE, ""),
    "sheared": ("a.nii", nifti(s=srow(SHEARED), c=SFORM, q=NO_QFORM), SHEARED, "disagree"),
    "right-handed": ("a.nii", nifti(affine=RIGHT_HANDED), RIGHT_HANDED, ""),
    "negative spacing beside a valid sform": ("a.nii", nifti(p=(80, "3f", -3, 3, 3)), AFFINE, ""),
    "spacing that the sform denies": ("a.nii", nifti(p=(80, "3f", 1, 1, 1), q=NO_QFORM), AFFINE, "sizes 1 x 1 x 1 mm"),
    "no orientation": ("a.nii", nifti(c=(252, "2h", 0, 0)), CENTRED, "no orientation"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_hostile_file_is_refused_in_one_line_without_memory(tmp_path: Path, case: str) -> None:
    name, content, words = REFUSED[case]
    path = tmp_path / name
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(ScanError, match=words) as caught:
            read_scan(path)
        assert tracemalloc.get_traced_memory()[1] < LARGEST_BYTES
    finally:
        tracemalloc.stop()
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", READ)
def test_an_unusual_file_is_read_as_it_is(tmp_path: Path, case: str) -> None:
    name, content, affine, words = READ[case]
    (tmp_path / name).write_bytes(content)
    found = read_scan(tmp_path / name)
    np.testing.assert_array_equal(found.values, VALUES)
    np.testing.assert_allclose(found.affine, affine, atol=1e-5)
    assert words in " ".join(found.warnings)
    assert bool(found.warnings) == bool(words)


def make_unreadable(path: Path) -> None:
    path.write_bytes(nifti())
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user may read every file")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (Path.mkdir, "found a folder"),
        (os.mkfifo, "found no regular file"),
        (lambda path: path.symlink_to(path), "found no such file"),
        (lambda path: path.symlink_to("nowhere"), "found no such file"),
        (make_unreadable, "Permission denied"),
    ],
    ids=["folder", "fifo", "link to itself", "dead link", "unreadable"],
)
def test_what_is_no_file_is_named(tmp_path: Path, make: Callable[[Path], object], words: str) -> None:
    path = tmp_path / "scan.nii.gz"
    make(path)
    with pytest.raises(ScanError, match=words):
        read_scan(path)


@pytest.mark.parametrize(("header", "voxels"), [("a.hdr", "a.img"), ("A.HDR", "A.IMG")])
def test_the_voxels_of_a_pair_are_found_or_named(tmp_path: Path, header: str, voxels: str) -> None:
    nib.save(nib.Nifti1Pair(VALUES, AFFINE), tmp_path / "pair.img")
    (tmp_path / "pair.hdr").rename(tmp_path / header)
    with pytest.raises(ScanError, match=f"the voxels are needed in {voxels} beside the header, found no such file"):
        read_scan(tmp_path / header)
    (tmp_path / "pair.img").rename(tmp_path / voxels)
    np.testing.assert_array_equal(read_scan(tmp_path / header).values, VALUES)
