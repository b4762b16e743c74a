"""The contact sheet of generated scans."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from PIL import Image

from brainfm_monai import cli
from brainfm_monai.anatomy import Protocol
from brainfm_monai.preview import write_preview
from brainfm_monai.synthesis import SynthesisRanges, Synthesizer
from brainfm_monai.tasks import TaskLayout

SIZE = (24, 28, 20)


def write_label_map(path: Path) -> Path:
    ids = np.zeros(SIZE, dtype=np.uint8)
    ids[3:21, 4:24, 3:17] = 3
    ids[3:12, 6:20, 5:15] = 2
    ids[12:21, 6:20, 5:15] = 42
    nib.save(nib.Nifti1Image(ids, np.eye(4)), path)
    return path


def write_datalist(folder: Path) -> Path:
    labels = nib.load(write_label_map(folder / "ids.nii.gz"))
    head, generation = Protocol.load("synthseg_head"), Protocol.load("synthseg_generation")
    ids = np.asanyarray(labels.dataobj)  # type: ignore[attr-defined]
    for name, protocol in (("segmentation", head), ("generation_labels", generation)):
        nib.save(nib.Nifti1Image(protocol.encode(ids), np.eye(4)), folder / f"{name}.nii.gz")
    x = np.indices(SIZE).transpose(1, 2, 3, 0).astype(np.float32) - 10
    nib.save(nib.Nifti1Image(x, np.eye(4)), folder / "mni.nii.gz")
    nib.save(nib.Nifti1Image(np.concatenate([x, x[..., :1]], -1), np.eye(4)), folder / "distance.nii.gz")
    entry = {key: f"{key}.nii.gz" for key in ("generation_labels", "segmentation", "distance", "mni")}
    datalist = folder / "datalist.json"
    datalist.write_text(
        json.dumps({"training": [{"subject": "one", **entry}], "validation": [{"subject": "two", **entry}], "test": []})
    )
    return datalist


def _read(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path))


def test_a_sheet_of_a_datalist_shows_as_many_scans_as_asked(tmp_path: Path) -> None:
    sheet = write_preview(write_datalist(tmp_path), tmp_path / "out" / "sheet.png", count=3, size=SIZE)
    rows, columns = _read(sheet).shape[:2]
    two = _read(write_preview(tmp_path / "datalist.json", tmp_path / "two.png", count=2, size=SIZE))
    assert rows > 1.8 * two.shape[0]  # a second row for the third scan
    assert columns == two.shape[1]
    assert float(_read(sheet).std() / 255) > 0.05
    assert [p.name for p in sheet.parent.iterdir()] == ["sheet.png"]


def test_the_command_draws_with_other_laws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, sheet = write_datalist(tmp_path), tmp_path / "sheet.png"
    arguments = [
        "preview",
        str(source),
        str(sheet),
        "--count=2",
        "--size=[16,16,16]",
        "--lesion_prob=1",
        "--scaling=[0.9,0.9]",
    ]
    monkeypatch.setattr(sys, "argv", ["brainfm-monai", *arguments])
    cli.main()
    assert capsys.readouterr().out.strip() == str(sheet)
    assert sheet.is_file()
    monkeypatch.setattr(sys, "argv", ["brainfm-monai", "preview", str(source), "--rotations=1"])
    with pytest.raises(SystemExit, match=r"docs/sampling\.md lists the fields, found no rotations"):
        cli.main()


def test_another_source_or_suffix_is_named(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    for name in ("nowhere.json", "notes.txt"):
        with pytest.raises((FileNotFoundError, ValueError), match=re.escape(name)):
            write_preview(tmp_path / name, tmp_path / "sheet.png")
    with pytest.raises(ValueError, match=r"the sheet is a PNG, found suffix '\.jpg'"):
        write_preview(tmp_path / "notes.txt", tmp_path / "sheet.jpg")


def test_what_was_drawn_is_told(tmp_path: Path) -> None:
    ranges = SynthesisRanges(
        rotation_deg=(0, 0), shear=(0, 0), scaling=(1.1, 1.1), mirror_prob=1, resolution_weights=(0, 1, 0, 0),
        clinical_spacing_mm=(5, 5), noise_std=(7, 7), rician_prob=1, skull_strip_prob=1, head_removal_prob=0,
    )  # fmt: skip
    labels = torch.ones(1, 1, *SIZE, dtype=torch.uint8)
    synthesizer = Synthesizer(ranges, TaskLayout(["segmentation"]), SIZE)
    text = synthesizer.draw({"generation_labels": labels, "segmentation": labels}, [0]).describe()
    assert "synthetic\n" in text
    assert sorted(re.search(r"(\S+) x (\S+) x (\S+) mm", text).groups()) == ["1.0", "1.0", "5.0"]  # type: ignore[union-attr]
    assert "turned 0 deg, scaled 1.10" in text
    assert "noise 7.0 Rician" in text
    assert "mirrored, stripped" in text
