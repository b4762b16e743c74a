"""The command ``brainfm-monai``: each command is a few lines that call the package or run a config of the bundle."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fire

from brainfm_monai import __version__

__all__ = ["COMMANDS", "main"]


def version() -> str:
    """Tell the version."""
    return __version__


def demo_scans(output: str) -> None:
    """Write the demo's scans: the MNI152 T1, and a clinical scan simulated from it.

    Args:
        output: folder for the scans.
    """
    from brainfm_monai.data.demo import write_demo_scans

    write_demo_scans(str(output))


def prepare_labels(
    input: str,
    output: str,
    jobs: int = 1,
    overwrite: bool = False,
    protocol: str = "synthseg_head",
    size: Sequence[int] = (192, 224, 224),
) -> None:
    """Prepare subjects for training from label maps; finished ones are skipped.

    Args:
        input: folder of label maps with FreeSurfer ids, or one of them.
        output: folder for the prepared subjects, one folder each.
        jobs: subjects that are prepared at once; each needs about 3 GB.
        overwrite: prepare finished subjects again.
        protocol: label protocol of the segmentation: a name or a table file.
        size: box around the brain, in voxels of 1 mm.
    """
    from brainfm_monai.data.prepare import PreparationError, prepare_label_maps

    try:
        prepare_label_maps(str(input), str(output), protocol=protocol, spatial_size=size, jobs=jobs, overwrite=overwrite)
    except PreparationError as error:
        raise SystemExit(str(error)) from error


def list_subjects(root: str, validation: Sequence[str] | str = (), validation_fraction: float = 0.0, seed: int = 0) -> str:
    """Write the datalist of a folder of prepared subjects.

    Args:
        root: folder of prepared subjects; the list becomes datalist.json in it.
        validation: names of subjects that are kept out of training, separated by commas.
        validation_fraction: share of the other subjects that is drawn for validation.
        seed: seed of that draw.

    Returns:
        Path of the list.
    """
    from brainfm_monai.data.datalist import write_datalist

    return str(write_datalist(str(root), validation=validation, validation_fraction=validation_fraction, seed=seed))


def predict(input: str, output: str, bundle: str = "bundle", **overrides: Any) -> None:
    """Segment and map a scan, or all scans in a folder.

    Args:
        input: NIfTI or MGH file, or a folder of them.
        output: folder for the results, one folder per scan.
        bundle: folder of the bundle.
        overrides: any other ``--key value`` replaces that key of configs/inference.json.
    """
    run_bundle(bundle, ["inference.json"], input=str(input), output_dir=str(output), **overrides)


def evaluate(datalist: str, output: str, bundle: str = "bundle", **overrides: Any) -> None:
    """Compare predicted label maps with reference label maps: Dice by structure.

    Args:
        datalist: JSON file ``{"testing": [{"image": path, "label": path}, ...]}``.
        output: folder for the results and the tables dice.tsv and dice_summary.tsv.
        bundle: folder of the bundle.
        overrides: any other ``--key value`` replaces that key of configs/inference.json or evaluate.json.
    """
    run_bundle(bundle, ["inference.json", "evaluate.json"], datalist=_existing(datalist), output_dir=str(output), **overrides)


def train(datalist: str, bundle: str = "bundle", coarse: bool = False, **overrides: Any) -> None:
    """Train on prepared subjects; a training that was interrupted goes on where it was.

    Args:
        datalist: list written by ``brainfm-monai data list``.
        bundle: folder of the bundle.
        coarse: train the coarse network, whose model.pt the fine training takes as ``--coarse_weights``.
        overrides: any other ``--key value`` replaces that key of configs/train.json, as in ``--max_epochs 10 --output_dir OUT``.
    """
    names = ["train.json", "coarse.json"] if coarse else ["train.json"]
    run_bundle(bundle, names, datalist=_existing(datalist), **overrides)


def run_bundle(bundle: str | Path, names: Sequence[str], **overrides: Any) -> None:
    """Run configs of a bundle with MONAI, later ones over earlier ones.

    Raises:
        FileNotFoundError: if the bundle has no such config.
    """
    from monai.bundle import run

    configs = Path(str(bundle)) / "configs"
    files = [configs / name for name in names]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file}: a config of the bundle is needed, found no such file: pass --bundle FOLDER")
    settings = {
        "bundle_root": str(bundle),
        "meta_file": str(configs / "metadata.json"),
        "logging_file": str(configs / "logging.conf"),
    }
    run(config_file=[str(file) for file in files], **settings, **overrides)


def _existing(path: str) -> str:
    if not Path(str(path)).is_file():  # fire makes a number of what looks like one
        raise FileNotFoundError(f"{path}: a datalist (JSON) is needed, found no such file")
    return str(path)


COMMANDS: dict[str, Callable[..., Any] | dict[str, Callable[..., Any]]] = {
    "predict": predict,
    "prepare": {"labels": prepare_labels},
    "data": {"list": list_subjects},
    "train": train,
    "evaluate": evaluate,
    "demo-scans": demo_scans,
    "version": version,
}


def main() -> None:
    """Run a command; a wrong value or a missing file is told in one line, with exit status 1."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        fire.Fire(COMMANDS, name="brainfm-monai")
    except (ValueError, OSError) as error:
        sys.exit(f"brainfm-monai: {error}")
