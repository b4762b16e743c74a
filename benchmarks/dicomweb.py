"""A DICOMweb archive and a MONAI Label server: a scan goes in as DICOM MR, its structures come back by name as DICOM SEG.

In the environment of ``make label-server``, with Debian's ``orthanc`` and ``orthanc-dicomweb`` and the package ``dcmqi``:

    python benchmarks/dicomweb.py SCAN.nii.gz

Prints the names in the DICOM SEG and the overlap with the labels that the server returns as NIfTI.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import requests

REPOSITORY = Path(__file__).resolve().parents[1]
ARCHIVE, SERVER = "http://127.0.0.1:8042", "http://127.0.0.1:8043"
PLUGINS = Path("/usr/share/orthanc/plugins")
MODEL = "brain_multitask"
PATIENCE_S = 300


def write_series(scan: Path, folder: Path) -> int:
    """Write a scan as an axial DICOM MR series, one file a slice; the number of slices."""
    from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage, generate_uid

    image: Any = nib.as_closest_canonical(nib.load(scan))
    values = np.asarray(image.dataobj, dtype=np.float32)
    values = np.rint(4000 * (values - values.min()) / (values.max() - values.min())).astype(np.uint16)
    to_lps = np.diag([-1.0, -1, 1, 1]) @ image.affine
    spacing = np.linalg.norm(to_lps[:3, :3], axis=0)
    direction = to_lps[:3, :3] / spacing
    study, series, frame = generate_uid(), generate_uid(), generate_uid()
    for k in range(values.shape[2]):
        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = MRImageStorage, generate_uid()
        meta.TransferSyntaxUID = ExplicitVRLittleEndian
        file = folder / f"{k:04d}.dcm"
        slice_: Dataset = FileDataset(str(file), {}, file_meta=meta, preamble=b"\0" * 128)
        slice_.SOPClassUID, slice_.SOPInstanceUID = MRImageStorage, meta.MediaStorageSOPInstanceUID
        slice_.StudyInstanceUID, slice_.SeriesInstanceUID, slice_.FrameOfReferenceUID = study, series, frame
        slice_.PatientName, slice_.PatientID, slice_.Modality = "Test^Head", "test", "MR"
        slice_.StudyDate, slice_.StudyTime, slice_.SeriesDescription = "20260101", "120000", "T1w"
        slice_.StudyID, slice_.AccessionNumber, slice_.PatientBirthDate, slice_.PatientSex = "1", "1", "", "O"
        slice_.SeriesNumber, slice_.InstanceNumber = 1, k + 1
        slice_.Rows, slice_.Columns = values.shape[1], values.shape[0]
        slice_.SamplesPerPixel, slice_.PhotometricInterpretation, slice_.PixelRepresentation = 1, "MONOCHROME2", 0
        slice_.BitsAllocated, slice_.BitsStored, slice_.HighBit = 16, 16, 15
        slice_.PixelSpacing, slice_.SliceThickness = [float(spacing[1]), float(spacing[0])], float(spacing[2])
        slice_.ImageOrientationPatient = [float(x) for x in (*direction[:, 0], *direction[:, 1])]
        slice_.ImagePositionPatient = [float(x) for x in (to_lps @ [0, 0, k, 1])[:3]]
        slice_.PixelData = np.ascontiguousarray(values[:, :, k].T).tobytes()
        slice_.save_as(file, write_like_original=False)
    return values.shape[2]


def wait_for(address: str) -> Any:
    """JSON of an address, when it answers."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        try:
            answer = requests.get(address, timeout=10)
            if answer.ok:
                return answer.json()
        except requests.ConnectionError:
            pass
        time.sleep(1)
    raise SystemExit(f"{address}: an answer is needed, found none in {PATIENCE_S} s")


def main() -> None:
    """Run archive and server, and ask for a DICOM SEG."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scan", type=Path)
    scan = parser.parse_args().scan
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "series").mkdir()
        config = {"StorageDirectory": str(folder / "db"), "IndexDirectory": str(folder / "db"), "HttpPort": 8042}
        config |= {"RemoteAccessAllowed": False, "AuthenticationEnabled": False, "DicomServerEnabled": False}
        config |= {"Plugins": [str(PLUGINS)], "DicomWeb": {"Enable": True, "Root": "/dicom-web/"}}
        (folder / "orthanc.json").write_text(json.dumps(config))
        environment = {**os.environ, "MONAI_LABEL_DICOMWEB_CACHE_PATH": str(folder / "cache")}
        start = [
            sys.executable,
            str(REPOSITORY / "monailabel_app" / "start.py"),
            f"{ARCHIVE}/dicom-web",
            "--port",
            "8043",
        ]
        with (folder / "log").open("w") as log:
            archive = subprocess.Popen(["Orthanc", str(folder / "orthanc.json")], stdout=log, stderr=log)
            try:
                wait_for(f"{ARCHIVE}/system")
                slices = write_series(scan, folder / "series")
                for file in sorted((folder / "series").iterdir()):
                    requests.post(f"{ARCHIVE}/instances", data=file.read_bytes(), timeout=60).raise_for_status()
                server = subprocess.Popen(start, stdout=log, stderr=log, env=environment)
                try:
                    ask(slices)
                except BaseException:
                    sys.stderr.write((folder / "log").read_text(errors="replace")[-3000:])
                    raise
                finally:
                    server.terminate()
            finally:
                archive.terminate()


def ask(slices: int) -> None:
    """Infer as NIfTI and as DICOM SEG, and compare."""
    import pydicom

    labels = wait_for(f"{SERVER}/info/")["models"][MODEL]["labels"]
    chosen = requests.post(f"{SERVER}/activelearning/first", json={}, timeout=PATIENCE_S).json()["id"]
    info = [
        {"name": name, "model_name": "brainfm-monai"} for name, _ in sorted(labels.items(), key=lambda item: item[1])
    ]
    files = {}
    for output in ("image", "dicom_seg"):
        answer = requests.post(
            f"{SERVER}/infer/{MODEL}",
            params={"image": chosen, "output": output},
            data={"params": json.dumps({"label_info": info, "mode": "brain"})},
            timeout=PATIENCE_S,
        )
        answer.raise_for_status()
        files[output] = Path(tempfile.mkstemp(suffix=".nii.gz" if output == "image" else ".dcm")[1])
        files[output].write_bytes(answer.content)
    image: Any = nib.load(files["image"])
    values = np.asarray(image.dataobj)
    seg = pydicom.dcmread(files["dicom_seg"])
    segments = {int(item.SegmentNumber): str(item.SegmentLabel) for item in seg.SegmentSequence}
    frames = [
        int(f.SegmentIdentificationSequence[0].ReferencedSegmentNumber) for f in seg.PerFrameFunctionalGroupsSequence
    ]
    counts = dict.fromkeys(segments, 0)
    for number, pixels in zip(frames, seg.pixel_array, strict=True):
        counts[number] += int((pixels > 0).sum())
    sys.stdout.write(
        f"{slices} slices; labels {values.shape} {image.get_data_dtype()}; DICOM SEG with {len(segments)} segments\n"
    )
    for number, label in segments.items():
        expected = int((values == labels[label.lower()]).sum()) if label.lower() in labels else None
        sys.stdout.write(f"{label}\t{counts[number]} voxels in DICOM SEG\t{expected} in NIfTI\n")


if __name__ == "__main__":
    main()
