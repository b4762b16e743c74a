"""Labels for scans that have none, from the bundle's own model."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from monai.bundle import run

from brainfm_monai.io import find_bundle, write_table

__all__ = ["predict_labels", "predicted_file"]

logger = logging.getLogger(__name__)


def predicted_file(folder: Path, name: str) -> Path:
    """Where the bundle's inference writes the label map with FreeSurfer ids of a scan."""
    return folder / name / f"{name}_desc-freesurfer_dseg.nii.gz"


def predict_labels(scans: Mapping[str, Path], output_dir: Path, bundle: str | Path) -> None:
    """Run the bundle's inference on scans, with labels of 1 mm; those that have a result already are left out.

    A scan that fails leaves no result; the inference itself reports why.

    Args:
        scans: by subject, the scan to label.
        output_dir: folder for the results, see :func:`predicted_file`.
        bundle: folder of the bundle.

    Raises:
        FileNotFoundError: if the bundle has no inference config.
    """
    waiting = {name: scan for name, scan in scans.items() if not predicted_file(output_dir, name).is_file()}
    if not waiting:
        return
    bundle = find_bundle(bundle)
    configs = bundle / "configs"
    if not (configs / "inference.json").is_file():
        raise FileNotFoundError(
            f"{configs / 'inference.json'}: {len(waiting)} subjects have no labels and need the bundle's model"
        )
    with TemporaryDirectory() as scratch:
        table = Path(scratch) / "scans.tsv"
        write_table(table, ("image", "name"), [(scan.resolve(), name) for name, scan in waiting.items()])
        try:
            run(
                config_file=str(configs / "inference.json"),
                meta_file=str(configs / "metadata.json"),
                logging_file=str(configs / "logging.conf"),
                bundle_root=str(bundle),
                input=str(table),
                output_dir=str(output_dir),
                outputs="segmentation",
                grid="1mm",
            )
        except SystemExit as end:  # some scans failed; they are reported as subjects without labels
            logger.error("%s", end)
