"""DICOM: series of a folder, and what is not one evenly spaced stack of slices."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from brainfm_monai.io import ScanError, find_scans, is_dicom, list_series, read_scan
from brainfm_monai.transforms import LoadScand

pydicom = pytest.importorskip("pydicom")
pytest.importorskip("dcm2niix")

COUNT = 9
PIXELS = np.arange(COUNT * 12 * 10).reshape(COUNT, 12, 10).astype(np.uint16)  # slices, rows, columns
ROW, COLUMN = np.array([0.8, 0.6, 0.0]), np.array([-0.6, 0.8, 0.0])  # oblique, LPS
NORMAL = np.cross(ROW, COLUMN)
ORIGIN, ACROSS, DOWN, APART = np.array([-11.0, 7.0, -30.0]), 1.5, 2.5, 3.0


def write_slice(path: Path, index: int, place: Sequence[float] | np.ndarray, pixels: np.ndarray, **tags: Any) -> Any:
    """One MR slice of a series, as an uncompressed DICOM file."""
    data = pydicom.Dataset()
    data.file_meta = pydicom.dataset.FileMetaDataset()
    data.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = "1.2.840.10008.5.1.4.1.1.4"
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = f"1.2.3.4.{index + 1}"
    data.SeriesInstanceUID, data.StudyInstanceUID = "1.2.3.2", "1.2.3.1"
    data.Modality, data.SeriesNumber, data.SeriesDescription, data.InstanceNumber = "MR", 7, "T1 sag/3D", index + 1
    data.ImageType, data.PatientID, data.PatientName = ["ORIGINAL", "PRIMARY"], "X", "X"
    data.ImagePositionPatient = [float(v) for v in place]
    data.ImageOrientationPatient = [*ROW, *COLUMN]
    data.PixelSpacing, data.SliceThickness = [DOWN, ACROSS], APART
    data.Rows, data.Columns = pixels.shape[-2:]
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 16, 15, 0
    data.PixelData = pixels.astype("<u2").tobytes()
    for tag, value in tags.items():
        setattr(data, tag, value)
    data.save_as(path, enforce_file_format=True)
    return data


def write_series(folder: Path, start: int = 0, leave_out: Sequence[int] = (), tilt_mm: float = 0, **tags: Any) -> Path:
    """A stack of slices in files without suffixes, whose order is not that of the slices."""
    folder.mkdir(exist_ok=True)
    for n in range(COUNT):
        if n not in leave_out:
            place = ORIGIN + APART * n * NORMAL + tilt_mm * n * COLUMN
            write_slice(folder / f"MR.1.2.{99 - start - n}", start + n, place, PIXELS[n] + start, **tags)
    return folder


def check_places(found: Any, pixels: np.ndarray = PIXELS, tilt_mm: float = 0, normal: np.ndarray = NORMAL) -> None:
    """Every pixel lies where its slice's header puts it."""
    assert found.values.size == pixels.size
    slices, rows, columns = (a.ravel() for a in np.meshgrid(*map(np.arange, pixels.shape), indexing="ij"))
    world = ORIGIN + np.outer(columns * ACROSS, ROW) + np.outer(rows * DOWN + slices * tilt_mm, COLUMN)
    world = (world + np.outer(slices * APART, normal)) * [-1, -1, 1]
    inverse = np.linalg.inv(found.affine)
    voxels = world @ inverse[:3, :3].T + inverse[:3, 3]
    np.testing.assert_allclose(voxels, np.rint(voxels), atol=1e-3)
    np.testing.assert_array_equal(found.values[tuple(np.rint(voxels).astype(int).T)], pixels.ravel())


def test_a_series_is_read_slice_by_slice_whatever_the_files_are_called(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "series")
    (folder / "readme.txt").write_text("no slice")
    assert is_dicom(folder)
    assert not is_dicom(tmp_path)
    found = read_scan(folder)
    check_places(found)
    assert (found.modality, found.warnings) == ("mr", ())
    image = LoadScand("image")({"image": str(folder)})["image"]
    assert image.meta["scan_name"] == "series"


def test_packed_pixels_are_read(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "series")
    for file in folder.iterdir():
        data = pydicom.dcmread(file)
        data.compress(pydicom.uid.RLELossless)
        data.save_as(file)
    check_places(read_scan(folder))


def test_echoes_and_repetitions_of_a_series_are_scans_of_their_own(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "echoes", EchoTime=20, EchoNumbers=1)
    write_series(folder, start=COUNT, EchoTime=40, EchoNumbers=2)
    assert [s.name for s in list_series(folder)] == ["7-T1_sag_3D_echo-1", "7-T1_sag_3D_echo-2"]
    check_places(read_scan(folder, series="7-T1_sag_3D_echo-2"), PIXELS + COUNT)
    with pytest.raises(ScanError, match=r"one DICOM series of evenly spaced slices is needed, found 2 in 7-T1"):
        read_scan(folder)
    folder = write_series(tmp_path / "twice")
    write_series(folder, start=COUNT)
    assert [s.name for s in list_series(folder)] == ["7-T1_sag_3D_volume-1", "7-T1_sag_3D_volume-2"]
    check_places(read_scan(folder, series="7-T1_sag_3D_volume-1"))
    check_places(read_scan(folder, series="7-T1_sag_3D_volume-2"), PIXELS + COUNT)


def test_copies_of_files_count_once(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "series")
    for file in list(folder.iterdir())[:3]:
        (folder / f"copy of {file.name}").write_bytes(file.read_bytes())
    found = read_scan(folder)
    check_places(found)
    assert found.warnings == ("3 files are copies of others and count once",)


def test_missing_slices_and_uneven_distances_are_refused(tmp_path: Path) -> None:
    for name, leave_out, words in (
        ("middle", (4, 5), "distances from 3 to 9 mm"),
        ("every_second", (2, 4, 6), "distances from 3 to 6 mm"),
    ):
        with pytest.raises(ScanError, match=f"slices are missing or unevenly spaced: {words}"):
            read_scan(write_series(tmp_path / name, leave_out=leave_out))
    folder = write_series(tmp_path / "torn")
    write_series(folder, start=COUNT, leave_out=(0, 1, 2))  # a repetition that was broken off
    with pytest.raises(ScanError, match="slices are missing: 1 to 2 slices at one place"):
        read_scan(folder)
    with pytest.raises(ScanError, match="one slice alone"):
        read_scan(write_series(tmp_path / "one", leave_out=range(1, COUNT)))


def test_slices_whose_pixels_differ_in_size_are_refused(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "mixed", leave_out=(7, 8))
    for n in (7, 8):
        write_slice(folder / str(n), n, ORIGIN + APART * n * NORMAL, PIXELS[n], PixelSpacing=[DOWN / 2, ACROSS / 2])
    with pytest.raises(ScanError, match=r"pixels differ in size from slice to slice: 0\.75 to 2\.5 mm"):
        read_scan(folder)


def test_the_tilt_of_a_gantry_is_kept_in_the_affine(tmp_path: Path) -> None:
    found = read_scan(write_series(tmp_path / "tilt", tilt_mm=0.8, Modality="CT"))
    check_places(found, tilt_mm=0.8)
    assert found.warnings == ("the gantry was tilted by 14.9 degrees; the affine of the scan is sheared",)


def test_a_localizer_is_no_scan(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "scout")
    for n in range(3):
        write_slice(folder / f"L{n}", 50 + n, ORIGIN + n * ROW, PIXELS[n], ImageOrientationPatient=[*COLUMN, *NORMAL])
    assert [s.is_overview for s in list_series(folder)] == [True, True]
    with pytest.raises(ScanError, match="a localizer, slices in 2 directions under one series"):
        read_scan(folder)
    write_series(folder, start=100, SeriesInstanceUID="1.2.3.9", SeriesNumber=8)
    check_places(read_scan(folder), PIXELS + 100)  # the one series beside it


def test_a_mosaic_is_no_scan(tmp_path: Path) -> None:
    """Siemens lays all slices of a time point of a functional or diffusion series into one picture."""
    tags = {"ImageType": ["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"], "Manufacturer": "SIEMENS"}
    (tmp_path / "epi").mkdir()
    write_slice(
        tmp_path / "epi/1", 1, ORIGIN, np.block([[PIXELS[3 * i + j] for j in range(3)] for i in range(3)]), **tags
    )
    with pytest.raises(ScanError, match="a mosaic, Siemens' format of functional and diffusion series"):
        read_scan(tmp_path / "epi")
    assert "7-T1_sag_3D: a mosaic" in find_scans(tmp_path)[0].skipped


def test_what_nobody_means_as_a_scan_is_skipped_and_named(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "study", ImageType=["ORIGINAL", "PRIMARY", "M", "ND"])
    write_series(folder, start=20, ImageType=["ORIGINAL", "PRIMARY", "P", "ND"])
    others: list[dict[str, Any]] = [
        {"Modality": "SEG"},
        {"Modality": "SR"},
        {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7", "ImagePositionPatient": None},
        {"ImageType": ["DERIVED", "SECONDARY", "PROJECTION IMAGE", "MIP"]},
    ]
    for number, tags in enumerate(others):
        path = folder / f"other{number}"
        data = write_slice(path, 50 + number, ORIGIN, PIXELS[0], SeriesInstanceUID=f"1.3.{number}", **tags)
        if data.Modality == "SR":
            del data.Rows
            data.save_as(path, enforce_file_format=True)
    (folder / "DICOMDIR").write_bytes(bytes(128) + b"DICM")
    scans = find_scans(tmp_path)
    (scan,) = [scan for scan in scans if not scan.skipped]
    assert not scan.problem
    check_places(read_scan(scan.path, series=scan.series))
    reasons = "; ".join(scan.skipped for scan in scans)
    for words in (
        "a phase image by its image type: P",
        "the modality is SEG",
        "a secondary capture",
        "MIP, PROJECTION",
    ):
        assert words in reasons
    assert "no image: the modality is SR" in reasons
    with pytest.raises(ScanError, match="a phase image by its image type: P"):
        read_scan(folder, series=next(s.name for s in list_series(folder) if "phase" in s.problem))


def test_the_index_of_a_medium_is_no_series_of_its_folder(tmp_path: Path) -> None:
    write_series(tmp_path / "IMAGES")
    (tmp_path / "DICOMDIR").write_bytes(bytes(128) + b"DICM" + bytes(100))
    assert [(Path(s.path).name, bool(s.skipped)) for s in find_scans(tmp_path)] == [
        ("IMAGES", False),
        ("DICOMDIR", True),
    ]


def test_slices_of_one_series_in_two_folders_are_no_two_scans(tmp_path: Path) -> None:
    (tmp_path / "cut").mkdir()
    write_series(tmp_path / "cut" / "0", leave_out=range(5, COUNT))
    write_series(tmp_path / "cut" / "1", leave_out=range(5))
    for scan in find_scans(tmp_path / "cut"):
        assert scan.problem.startswith("the slices of one DICOM series must lie in one folder, found others of it in ")
    (tmp_path / "copied").mkdir()
    for name in ("0", "1"):  # of the whole series, with two volumes
        write_series(write_series(tmp_path / "copied" / name), start=COUNT)
    assert [scan.problem for scan in find_scans(tmp_path / "copied")] == [""] * 4


def test_series_of_several_persons_in_one_folder_name_the_person(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "flat", PatientID="ann")
    write_series(folder, start=20, PatientID="bob", SeriesInstanceUID="1.2.3.9")
    assert [s.name for s in list_series(folder)] == ["ann_7-T1_sag_3D", "bob_7-T1_sag_3D"]
    check_places(read_scan(folder, series="bob_7-T1_sag_3D"), PIXELS + 20)


def test_directions_that_headers_round_and_ids_that_an_anonymiser_broke_do_not_part_a_stack(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "series")
    for number, file in enumerate(sorted(folder.iterdir())):
        data = pydicom.dcmread(file)
        data.ImageOrientationPatient = [v + (5e-4 if number % 2 else -5e-4) for v in data.ImageOrientationPatient]
        data.SOPInstanceUID = "1.2.3.4.5"
        data.save_as(file)
    (series,) = list_series(folder)
    assert (series.problem, series.is_overview, len(series.files)) == ("", False, COUNT)


def test_what_the_network_does_not_know_is_warned_of(tmp_path: Path) -> None:
    found = read_scan(write_series(tmp_path / "pet", Modality="PT"))
    assert found.warnings == ("the modality is PT, where MR and CT are known",)
    found = read_scan(write_series(tmp_path / "inverse", PhotometricInterpretation="MONOCHROME1"))
    assert "small numbers are bright by the header (MONOCHROME1)" in found.warnings[0]
    check_places(found)


def test_slopes_that_differ_from_slice_to_slice_are_applied(tmp_path: Path) -> None:
    folder = write_series(tmp_path / "series")
    for file in folder.iterdir():
        data = pydicom.dcmread(file)
        data.RescaleSlope, data.RescaleIntercept = float(data.InstanceNumber), 0.0
        data.save_as(file)
    check_places(read_scan(folder), PIXELS * np.arange(1, COUNT + 1)[:, None, None])


def test_frames_of_one_file_lie_where_their_own_groups_put_them(tmp_path: Path) -> None:
    order = [3, 8, 0, 5, 1, 7, 2, 6, 4]

    def group(**tags: Any) -> Any:
        data = pydicom.Dataset()
        for tag, value in tags.items():
            setattr(data, tag, value)
        return data

    frames = [
        group(
            PlanePositionSequence=[group(ImagePositionPatient=[float(v) for v in ORIGIN + APART * n * NORMAL])],
            FrameContentSequence=[group(InStackPositionNumber=n + 1, StackID="1", DimensionIndexValues=[1, n + 1])],
        )
        for n in order
    ]
    shared = group(
        PixelMeasuresSequence=[group(PixelSpacing=[DOWN, ACROSS], SliceThickness=APART)],
        PlaneOrientationSequence=[group(ImageOrientationPatient=[*ROW, *COLUMN])],
    )
    write_slice(
        tmp_path / "enhanced",
        0,
        ORIGIN,
        PIXELS[order],
        SOPClassUID="1.2.840.10008.5.1.4.1.1.4.1",
        NumberOfFrames=COUNT,
        SharedFunctionalGroupsSequence=[shared],
        PerFrameFunctionalGroupsSequence=frames,
    )
    check_places(read_scan(tmp_path / "enhanced"))
    del frames[3], order[3]
    write_slice(
        tmp_path / "enhanced",
        0,
        ORIGIN,
        PIXELS[order],
        NumberOfFrames=COUNT - 1,
        SharedFunctionalGroupsSequence=[shared],
        PerFrameFunctionalGroupsSequence=frames,
    )
    with pytest.raises(ScanError, match="slices are missing or unevenly spaced: distances from 3 to 6 mm"):
        read_scan(tmp_path / "enhanced")


def test_what_has_no_pixels_or_places_and_a_missing_extra_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "damaged"
    folder.mkdir()
    (folder / "a").write_bytes(bytes(128) + b"DICM" + b"nonsense")
    with pytest.raises(
        ScanError, match=r"damaged: a DICOM image is needed, found no file with pixels|a is no readable"
    ):
        read_scan(folder)
    scanned = write_series(tmp_path / "scanned", ImagePositionPatient=None)
    with pytest.raises(ScanError, match="slices without a place, direction or pixel spacing"):
        read_scan(scanned)
    monkeypatch.setitem(sys.modules, "dcm2niix", None)
    with pytest.raises(ScanError, match=r"pip install 'brainfm-monai\[dicom\]'"):
        read_scan(write_series(tmp_path / "series"))
