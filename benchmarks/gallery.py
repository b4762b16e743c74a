"""Twenty-two scans of open data through ``brainfm-monai predict``, and the gallery of the documents out of their pages.

    python benchmarks/gallery.py collect DATA SCANS     # copies the scans, each under a name of its own
    brainfm-monai predict SCANS OUT
    python benchmarks/gallery.py write OUT docs         # docs/gallery.md and its pictures

DATA is a folder with the open sets, in the folders that the table below names. The template of a CT has Cormack units and becomes
HU; the scan of voxelmorph is in an archive of numpy. The gallery shows the first two pictures, the surfaces and the probability of lesions of the scans that
have a caption, and a table of all: what the scan was taken for, the Euler numbers of its four surfaces, the largest share of
crossing triangles, and the warnings.
"""

from __future__ import annotations

import argparse
import base64
import io
import re
import shutil
from html import unescape
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
import pandas as pd
from PIL import Image

CORMACK_DARK, CORMACK_MIDDLE, CORMACK_SCALE = (
    900,
    200,
    10,
)  # Rorden et al., NeuroImage 61, 2012: soft tissue is spread tenfold
AIR_HU = -1000
VOXELMORPH_AFFINE = np.array(
    [[-1, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1]]
)  # of FreeSurfer's conformed volumes
SECTIONS = ("Scan and segmentation", "The scan in other contrasts", "White and pial surface", "Lesions")
HEADER = "| scan | source | taken for | Euler numbers (left white, pial; right white, pial) | most crossing | message |"
WIDTH, QUALITY = 1000, 75  # of pictures


class OpenScan(NamedTuple):
    """A scan of an open data set: name, file below the folder of data, source and licence, caption in the gallery or none."""

    name: str
    file: str
    source: str
    caption: str = ""


SCANS = (
    OpenScan("brainchop_T1w", "brainchop/public/t1_crop.nii.gz", "niivue-brainchop, MIT", "T1w of 1 mm, whole head"),
    OpenScan("synthsr_FLAIR", "py_synthsr/FLAIR.nii.gz", "py_synthsr, Apache-2.0"),
    OpenScan("volrender_T1w", "volrender/seg3D/MR.nii.gz", "volrender, MIT"),
    OpenScan("ms01_T1w", "open_ms/longitudinal/raw/patient01/study1_T1W.nii.gz", "Open MS, CC-BY (LIT Ljubljana)"),
    OpenScan("ms01_T2w", "open_ms/longitudinal/raw/patient01/study1_T2W.nii.gz", "Open MS, CC-BY (LIT Ljubljana)"),
    OpenScan(
        "ms01_FLAIR", "open_ms/longitudinal/raw/patient01/study1_FLAIR.nii.gz", "Open MS, CC-BY (LIT Ljubljana)",
        "FLAIR with slices of 3 mm, multiple sclerosis",
    ),
    OpenScan("ms04_T1w", "open_ms/longitudinal/raw/patient04/study1_T1W.nii.gz", "Open MS, CC-BY (LIT Ljubljana)"),
    OpenScan("ms04_T2w", "open_ms/longitudinal/raw/patient04/study1_T2W.nii.gz", "Open MS, CC-BY (LIT Ljubljana)"),
    OpenScan("ms04_FLAIR", "open_ms/longitudinal/raw/patient04/study1_FLAIR.nii.gz", "Open MS, CC-BY (LIT Ljubljana)"),
    OpenScan("stroke_T1w", "volrender/stroke/T1.nii.gz", "volrender, MIT"),
    OpenScan("stroke_T2w", "volrender/stroke/T2.nii.gz", "volrender, MIT", "T2w of an extracted brain with a stroke"),
    OpenScan("stroke_FLAIR", "volrender/stroke/FLAIR.nii.gz", "volrender, MIT"),
    OpenScan("extracted_T1w", "ds002748/sub-41_T1w.nii.gz", "ds002748, CC0", "T1w of an extracted brain, 0.9 mm"),
    OpenScan("extracted2_T1w", "ds002748/sub-42_T1w.nii.gz", "ds002748, CC0"),
    OpenScan("defaced_T1w", "ds000011_t1/sub-13_T1w.nii.gz", "ds000011, PDDL"),
    OpenScan("defaced2_T1w", "ds000011_t1/sub-14_T1w.nii.gz", "ds000011, PDDL"),
    OpenScan("thick_T2w", "ds000011_t1/sub-13_inplaneT2.nii.gz", "ds000011, PDDL", "T2w with slices of 5 mm"),
    OpenScan("lesion_T2w", "t2_lesion/M2307_T2w.nii.gz", "M2307, CC0"),
    OpenScan("lesion2_T2w", "t2_lesion/M2265_T2w.nii.gz", "M2265, MIT"),
    OpenScan("template_ct", "clinical_tbx/scct.nii.gz", "Clinical Toolbox, BSD-2", "CT: the mean of many heads, 2 mm"),
    OpenScan("niivue_T1w", "niivue/packages/niivue/demos/images/norm.mgz", "niivue, BSD-2"),
    OpenScan("voxelmorph_T1w", "voxelmorph/data/test_scan.npz", "voxelmorph, Apache-2.0"),
)  # fmt: skip


def to_hounsfield(cormack: np.ndarray) -> np.ndarray:
    """HU out of Cormack units, in which the 200 HU around water take eleven times their range."""
    above = cormack - CORMACK_DARK
    spread = np.clip(above, 0, CORMACK_MIDDLE * (CORMACK_SCALE + 1)) * CORMACK_SCALE / (CORMACK_SCALE + 1)
    return cormack - spread + AIR_HU


def collect(data: Path, output: Path) -> None:
    """Copy the scans under their names; one that is absent is reported."""
    output.mkdir(parents=True, exist_ok=True)
    for scan in SCANS:
        file = data / scan.file
        if not file.is_file():
            print(f"{file}: no such file, {scan.name} is left out")
        elif file.suffix == ".npz":
            volume = np.load(file)["vol"].astype(np.float32)
            nib.save(nib.Nifti1Image(volume, VOXELMORPH_AFFINE), output / f"{scan.name}.nii.gz")
        elif scan.name.endswith("_ct"):
            image = nib.load(file)
            values = to_hounsfield(np.asarray(image.get_fdata(dtype=np.float32)))  # type: ignore[attr-defined]
            nib.save(nib.Nifti1Image(values.astype(np.int16), image.affine), output / f"{scan.name}.nii.gz")  # type: ignore[attr-defined]
        else:
            shutil.copy(
                file, output / f"{scan.name}{''.join(file.suffixes[-2:]) if file.suffix == '.gz' else file.suffix}"
            )


def pictures_of(page: str) -> dict[str, Image.Image]:
    """Pictures of a page by the heading above each."""
    parts = re.split(r"<h2[^>]*>(.*?)</h2>", page, flags=re.DOTALL)
    pictures: dict[str, Image.Image] = {}
    for heading, body in zip(parts[1::2], parts[2::2], strict=True):
        found = re.search(r'src="data:image/\w+;base64,([^"]+)"', body)
        if found:
            pictures[unescape(heading).strip()] = Image.open(io.BytesIO(base64.b64decode(found[1])))
    return pictures


def save_picture(picture: Image.Image, path: Path) -> None:
    """A picture of at most ``WIDTH`` columns, as JPEG."""
    shrunk = picture.convert("RGB")
    shrunk.thumbnail((WIDTH, 10 * WIDTH))
    path.parent.mkdir(parents=True, exist_ok=True)
    shrunk.save(path, quality=QUALITY)


def write_gallery(results: Path, docs: Path) -> None:
    """Write ``gallery.md`` and its pictures."""
    summary = pd.read_csv(results / "summary.tsv", sep="\t", dtype=str, keep_default_na=False).set_index("scan")
    lines = [
        "# Gallery",
        "",
        "Scans of open data sets through `brainfm-monai predict` with the bundle's weights and default settings.",
        "The pictures come from the pages as they are, failures included.",
        "Radiological convention: the left of the head is on the right of the picture. Made by `benchmarks/gallery.py`.",
    ]
    for scan in SCANS:
        page = results / scan.name / f"{scan.name}_report.html"
        if scan.caption and page.is_file():
            lines += ["", f"## {scan.caption}", "", f"`{scan.name}`: {scan.source}."]
            pictures = pictures_of(page.read_text(encoding="utf-8"))
            for number, heading in enumerate(heading for heading in SECTIONS if heading in pictures):
                path = docs / "images" / f"gallery_{scan.name}_{number}.jpg"
                save_picture(pictures[heading], path)
                lines += ["", f"![{scan.caption}: {heading.lower()}](images/{path.name})"]
    lines += [
        "",
        "## All scans",
        "",
        HEADER,
    ]
    lines += ["|---|---|---|---|---|---|"]
    for scan in SCANS:
        if scan.name in summary.index:
            row = summary.loc[scan.name]
            euler = ", ".join(
                row.get(f"euler_number_{side}_{kind}", "n/a") for side in "LR" for kind in ("white", "pial")
            )
            shares = [row.get(f"crossing_share_{side}_{kind}", "") for side in "LR" for kind in ("white", "pial")]
            largest = max((float(share) for share in shares if share not in ("", "n/a")), default=float("nan"))
            cells = (
                scan.name,
                scan.source,
                row.get("modality", ""),
                euler,
                f"{100 * largest:.2f} %",
                row.get("message", ""),
            )
            lines.append("| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |")
    (docs / "gallery.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    """Collect the scans, or write the gallery."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("collect", "write"))
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    options = parser.parse_args()
    (collect if options.what == "collect" else write_gallery)(options.source, options.target)


if __name__ == "__main__":
    main()
