"""The one reader of volumes: what is read rightly, and what is refused in one line."""

from __future__ import annotations

import gzip
import re
import struct
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from brainfm_monai.io import ScanError, read_labels, read_scan, read_volume, scan_stem

RAMP = np.arange(12 * 14 * 16, dtype=np.float32).reshape(12, 14, 16)
TINY = np.diag([4.0, 4.0, 4.0, 1.0])


def write(path: Path, data: np.ndarray, zooms_mm: float = 1.0) -> Path:
    nib.save(nib.Nifti1Image(data, np.diag([zooms_mm] * 3 + [1.0])), path)
    return path


@pytest.mark.parametrize(
    ("name", "stem"),
    [("a/T1w.nii.gz", "T1w"), ("T1.v2.nii", "T1.v2"), ("norm.mgz", "norm"), ("X.MGH", "X"), ("odd.img", "odd")],
)
def test_the_stem_is_the_name_without_the_suffix(name: str, stem: str) -> None:
    assert scan_stem(name) == stem


def test_what_cannot_be_a_head_scan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ScanError, match=r"absent\.nii: a NIfTI, .* folder of a DICOM series is needed, found no such file"
    ):
        read_scan(tmp_path / "absent.nii")
    (tmp_path / "scan.txt").write_text("x")
    with pytest.raises(ScanError, match="found another suffix"):
        read_scan(tmp_path / "scan.txt")
    with pytest.raises(
        ScanError, match=r"extends over 10 to 600 mm along each axis, found 0\.012 x 0\.014 x 0\.016 mm"
    ):
        read_scan(write(tmp_path / "metres.nii", RAMP, zooms_mm=0.001))
    with pytest.raises(ScanError, match=r"extends over 10 to 600 mm along each axis, found 1\.2e"):
        read_scan(write(tmp_path / "micrometres.nii", RAMP, zooms_mm=1000))
    colours = np.zeros((12, 14, 16), dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    with pytest.raises(ScanError, match="one real number per voxel is needed, found colours"):
        read_scan(write(tmp_path / "rgb.nii", colours))
    with pytest.raises(ScanError, match="one real number per voxel is needed, found complex numbers"):
        read_scan(write(tmp_path / "kspace.nii", RAMP.astype(np.complex64)))


def write_frames(path: Path, frames: int = 3) -> Path:
    return write(path, np.stack([RAMP + 100 * i for i in range(frames)], axis=-1))


def test_one_frame_or_the_mean_of_all_is_taken(tmp_path: Path) -> None:
    path = str(write_frames(tmp_path / "frames.nii"))
    np.testing.assert_array_equal(read_scan(path, 2).values, RAMP + 200)
    np.testing.assert_allclose(read_scan(path, "mean").values, RAMP + 100)
    with pytest.raises(
        ScanError,
        match=r"one 3-D volume is needed, found 4-D data of shape .*: pass --frame N \(from 0\) or --frame mean",
    ):
        read_scan(path)
    with pytest.raises(ScanError, match="'frame' must be 'mean' or a number from 0 to 2, found 3"):
        read_scan(path, 3)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.uint16, np.int32, np.float32, np.float64])
def test_every_number_type_and_slope_is_read(tmp_path: Path, dtype: type[np.generic]) -> None:
    stored = (np.arange(12 * 14 * 16).reshape(12, 14, 16) % 100).astype(dtype)
    image = nib.Nifti1Image(stored, np.eye(4))
    image.header.set_slope_inter(2.0, -50.0)
    nib.save(image, tmp_path / "scan.nii")
    expected = stored.astype(np.float64) * (2.0 if np.issubdtype(dtype, np.integer) else 1.0)
    found = read_scan(tmp_path / "scan.nii").values
    scale = np.ptp(found) / np.ptp(expected)
    np.testing.assert_allclose(found - found.min(), (expected - expected.min()) * scale, atol=1e-3)
    reference: Any = nib.load(tmp_path / "scan.nii")
    np.testing.assert_allclose(found, reference.get_fdata(), atol=1e-4)


LPS_AFFINE = np.array([[-1.5, 0.2, 0.0, 10], [0.1, -1.2, 0.3, 20], [0.0, 0.25, 2.5, -30], [0, 0, 0, 1]])


def orthogonal(affine: np.ndarray) -> np.ndarray:
    """The nearest affine of right angles, which NRRD and DICOM ask for."""
    zooms = np.linalg.norm(affine[:3, :3], axis=0)
    left, _, right = np.linalg.svd(affine[:3, :3] / zooms)
    result = affine.copy()
    result[:3, :3] = (left @ right) * zooms
    return result


def write_with_itk(path: Path, data: np.ndarray, affine: np.ndarray) -> None:
    import itk

    flipped = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    image = itk.image_from_array(np.ascontiguousarray(data.transpose(2, 1, 0)))
    zooms = np.linalg.norm(flipped[:3, :3], axis=0)
    image.SetSpacing([float(z) for z in zooms])
    image.SetOrigin([float(v) for v in flipped[:3, 3]])
    image.SetDirection(itk.matrix_from_array(np.ascontiguousarray(flipped[:3, :3] / zooms)))
    itk.imwrite(image, str(path))


def test_an_nrrd_file_is_read_as_the_nifti_file_of_the_same_voxels(tmp_path: Path) -> None:
    affine = orthogonal(LPS_AFFINE)
    write_with_itk(tmp_path / "scan.nrrd", RAMP, affine)
    found = read_scan(tmp_path / "scan.nrrd")
    np.testing.assert_array_equal(found.values, RAMP)
    np.testing.assert_allclose(found.affine, affine, atol=1e-5)
    (tmp_path / "broken.nrrd").write_text("no image")
    with pytest.raises(ScanError, match=r"broken\.nrrd: the voxels cannot be read, found Invalid NRRD magic"):
        read_scan(tmp_path / "broken.nrrd")


def change(path: Path, **fields: Any) -> Path:
    """Overwrite fields of a NIfTI-1 header: their place in bytes and what is packed there."""
    places = {
        "pixdim": (76, "4f"),
        "codes": (252, "2h"),
        "quaternion": (256, "6f"),
        "slope": (112, "2f"),
        "srow": (280, "12f"),
    }
    raw = bytearray(path.read_bytes())
    for field, values in fields.items():
        place, kind = places[field]
        raw[place : place + struct.calcsize("<" + kind)] = struct.pack("<" + kind, *values)
    path.write_bytes(raw)
    return path


LAS = np.array([[-2.0, 0, 0, 11], [0, 3, 0, -20], [0, 0, 4, -30], [0, 0, 0, 1]])


def write_forms(path: Path, sform: np.ndarray | None, qform: np.ndarray | None) -> Path:
    """A NIfTI file of these two forms; None: code 0."""
    image: Any = nib.Nifti1Image(RAMP, np.eye(4) if sform is None else sform)
    image.set_sform(sform, 0 if sform is None else 2)
    image.set_qform(qform, 0 if qform is None else 1)
    nib.save(image, path)
    return path


def test_a_valid_sform_wins_and_an_unset_qform_is_never_used(tmp_path: Path) -> None:
    path = write_forms(tmp_path / "scan.nii", LAS, None)
    change(path, pixdim=(1, 2, 3.0001, 4), quaternion=(0, 0, 0, 0, 0, 0))  # rounded, and a qform that says RAS
    found = read_scan(path)
    np.testing.assert_array_equal(found.affine, LAS)
    assert (found.warnings, found.is_oriented) == ((), True)
    np.testing.assert_array_equal(read_scan(write_forms(tmp_path / "q.nii", None, LAS)).affine, LAS)


def test_forms_that_disagree_are_warned_of_with_both_values(tmp_path: Path) -> None:
    flipped, larger, turned = LAS @ np.diag([-1.0, 1, 1, 1]), LAS * 1.05, LAS.copy()
    turned[:3, :3] = [[-2, 0.3, 0], [0.2, 3, 0], [0, 0, 4]]
    for qform, words in (
        (
            flipped,
            r"sform \(2 x 3 x 4 mm, LAS\) and qform \(2 x 3 x 4 mm, RAS\) disagree on left and right; the sform is taken",
        ),
        (larger, r"sform \(2 x 3 x 4 mm, LAS\) and qform \(2.1 x 3.15 x 4.2 mm, LAS\) disagree; the sform is taken"),
        (turned, r"qform \(2.01 x 3.015 x 4 mm, LAS, 6 degrees oblique\) disagree; the sform is taken"),
    ):
        found = read_scan(write_forms(tmp_path / "scan.nii", LAS, qform))
        np.testing.assert_allclose(found.affine, LAS)
        assert len(found.warnings) == 1
        assert re.search(words, found.warnings[0]), found.warnings
    shifted = LAS.copy()
    shifted[:3, 3] += 30  # another origin turns nothing and changes no volume
    assert not read_scan(write_forms(tmp_path / "scan.nii", LAS, shifted)).warnings
    path = change(write_forms(tmp_path / "scan.nii", LAS, None), pixdim=(1, 1, 1, 1))
    assert "voxel sizes 1 x 1 x 1 mm and sform (2 x 3 x 4 mm, LAS) disagree" in read_scan(path).warnings[0]


def test_a_form_that_is_not_valid_gives_way_or_is_refused(tmp_path: Path) -> None:
    path = change(write_forms(tmp_path / "scan.nii", LAS, LAS), srow=[0] * 12)
    found = read_scan(path)
    np.testing.assert_allclose(found.affine, LAS)
    assert found.warnings == ("the header's sform is not valid; the qform is taken",)
    path = change(write_forms(tmp_path / "scan.nii", LAS, LAS), quaternion=[np.nan] * 6)
    np.testing.assert_allclose(read_scan(path).affine, LAS)
    for rows in ([0] * 12, [np.nan] * 12, [1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0], [np.inf] * 12):
        path = change(write_forms(tmp_path / "scan.nii", LAS, None), srow=rows)
        with pytest.raises(ScanError, match="an affine of three independent axes is needed, found the sform"):
            read_scan(path)


def test_without_a_form_the_voxel_sizes_are_taken_as_nibabel_takes_them_and_labels_are_refused(tmp_path: Path) -> None:
    from brainfm_monai.data.labels import load_label_map

    path = write_forms(tmp_path / "scan.nii", None, None)
    found = read_scan(path)
    assert not found.is_oriented
    assert found.warnings == (
        "the header states no orientation; left and right are taken from the order of the voxels",
    )
    reference: Any = nib.load(path)
    np.testing.assert_array_equal(found.affine, reference.affine)
    with pytest.raises(ScanError, match="a label map that states which side is left is needed"):
        load_label_map(path)
    with pytest.raises(
        ScanError, match="voxel sizes above 0 mm are needed where no orientation is stated, found 0 x 1 x 1"
    ):
        read_scan(change(path, pixdim=(1, 0, 1, 1)))


@pytest.mark.parametrize("packed", [False, True])
def test_a_header_that_promises_more_than_the_file_holds_allocates_nothing(tmp_path: Path, packed: bool) -> None:
    import tracemalloc

    header = nib.Nifti1Header()
    header.set_data_shape((640, 640, 640))
    header.set_data_dtype(np.float64)
    header.set_sform(np.diag([0.4, 0.4, 0.4, 1]), 1)
    header["vox_offset"] = 352
    content = header.binaryblock + bytes(4) + bytes(200_000)
    path = tmp_path / ("scan.nii.gz" if packed else "scan.nii")
    path.write_bytes(gzip.compress(content) if packed else content)
    tracemalloc.start()
    with pytest.raises(
        ScanError, match=r"the voxels cannot be read: 2097152352 bytes are promised by the header, found a file"
    ):
        read_scan(path)
    assert tracemalloc.get_traced_memory()[1] < 2**21
    tracemalloc.stop()


def test_the_content_and_not_the_name_says_what_is_packed(tmp_path: Path) -> None:
    plain = write(tmp_path / "plain.nii", RAMP).read_bytes()
    (tmp_path / "plain.nii.gz").write_bytes(plain)
    (tmp_path / "packed.nii").write_bytes(gzip.compress(plain))
    for name in ("plain.nii.gz", "packed.nii"):
        np.testing.assert_array_equal(read_scan(tmp_path / name).values, RAMP)
    damaged = bytearray(gzip.compress(plain))
    damaged[-6] ^= 1  # the check sum at the end
    (tmp_path / "damaged.nii.gz").write_bytes(damaged)
    with pytest.raises(ScanError, match=r"damaged.nii.gz: the voxels cannot be read, found CRC check failed"):
        read_scan(tmp_path / "damaged.nii.gz")


def test_formats_say_when_they_state_no_orientation(tmp_path: Path) -> None:
    nib.save(nib.MGHImage(RAMP, LAS), tmp_path / "scan.mgz")
    stated = read_scan(tmp_path / "scan.mgz")
    np.testing.assert_allclose(stated.affine, LAS, atol=1e-5)
    assert stated.is_oriented
    nib.save(nib.MGHImage(RAMP, LAS), tmp_path / "scan.mgh")
    raw = bytearray((tmp_path / "scan.mgh").read_bytes())
    raw[28:30] = bytes(2)  # goodRASFlag
    (tmp_path / "scan.mgh").write_bytes(raw)
    nib.save(nib.AnalyzeImage(RAMP, TINY), tmp_path / "scan.img")
    text = "NRRD0004\ntype: float\ndimension: 3\nsizes: 12 14 16\nspacings: 2 3 4\nencoding: raw\nendian: little\n\n"
    (tmp_path / "scan.nrrd").write_bytes(text.encode() + RAMP.tobytes(order="F"))
    for name in ("scan.mgh", "scan.hdr", "scan.nrrd"):
        found = read_scan(tmp_path / name)
        np.testing.assert_array_equal(found.values, RAMP)
        assert not found.is_oriented
        assert "states no orientation" in found.warnings[0]
    np.testing.assert_allclose(np.abs(np.diag(found.affine)), [2, 3, 4, 1])


def test_label_maps_hold_whole_numbers_of_32_bits(tmp_path: Path) -> None:
    ids = (RAMP.astype(np.int64) * 100_000)[:10]
    found = read_labels(write(tmp_path / "ids.nii", ids.astype(np.int32)))
    assert found.values.dtype == np.int32
    np.testing.assert_array_equal(found.values, ids)
    for values in (RAMP + 0.4, RAMP - 1, RAMP * np.nan):
        with pytest.raises(ScanError, match="ids must be whole numbers from 0 to 2147483647, found values"):
            read_labels(write(tmp_path / "ids.nii", values))


def test_values_that_float32_cannot_hold_are_refused_and_holes_are_warned_of(tmp_path: Path) -> None:
    with pytest.raises(ScanError, match=r"values up to 3.4e\+38 are needed, found larger ones"):
        read_scan(write(tmp_path / "large.nii", RAMP.astype(np.float64) * 1e300))
    holes = RAMP.copy()
    holes[:2, 0, 0] = np.nan, np.inf
    found = read_scan(write(tmp_path / "holes.nii", holes))
    assert found.warnings == ("2 voxels are NaN or infinite and become 0",)
    assert read_volume(tmp_path / "holes.nii").warnings == ()
