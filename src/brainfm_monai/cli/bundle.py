"""Commands that run a config of the bundle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["evaluate", "predict", "run_bundle", "train"]


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
