"""Commands that bring weights in, and networks out."""

from __future__ import annotations

from pathlib import Path

__all__ = ["export", "import_weights"]


def import_weights(file: str, output: str, half: bool = False) -> str:
    """Turn the published weights of BrainFM or SuperSynth into files that the bundle uses.

    The file is yours to fetch, and its licence to accept: brainfm_pretrained.pth of github.com/jhuldr/BrainFM, or
    SuperSynth_August_2025.pth of FreeSurfer's mri_super_synth. Nothing in the file is run. The folder can be moved. Use it by

        brainfm-monai predict SCAN OUT --args_file OUTPUT/overrides.json

    Args:
        file: the published checkpoint.
        output: folder for model.pt, overrides.json and source.json (format, SHA-256, template space, licence).
        half: write half precision, half the size.

    Returns:
        What was found in the file.
    """
    from brainfm_monai.weights import import_weights as import_file

    info = import_file(str(file), str(output), half=half).info
    return f"{info.format}: {', '.join(info.tasks)}; licence {info.licence}; use it with --args_file {output}/overrides.json"


def export(output: str, bundle: str = "bundle", overrides: str = "", size: int = 64) -> str:
    """Write the bundle's network with its weights as TorchScript (.ts) or ONNX (.onnx), for any size of scan.

    Args:
        output: the file; its suffix decides.
        bundle: folder of the bundle.
        overrides: overrides.json of imported weights; empty: the bundle's own.
        size: side of the cube that an ONNX graph is traced with, an even multiple of what the network needs.

    Returns:
        Path of the file.
    """
    from brainfm_monai.exports import export_bundle
    from brainfm_monai.io import find_bundle

    configs = [find_bundle(bundle) / "configs" / "inference.json", *([Path(str(overrides))] if overrides else [])]
    return str(export_bundle(configs, str(bundle), str(output), size=size))
