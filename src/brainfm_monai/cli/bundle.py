"""Commands that run a config of the bundle."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from brainfm_monai.io import find_bundle, literal

__all__ = ["existing_datalist", "find_config", "predict", "run_bundle", "train"]

PRECISIONS = ("float32", "bfloat16", "float16")
MEMORY_MODES = ("auto", "full", "low", "windows", "whole", "slabs")  # the last two: names of version 0.1 for full


def predict(
    input: str,
    output: str,
    analysis_level: str = "participant",
    bundle: str = "bundle",
    outputs: str | Sequence[str] = "all",
    participant_label: str | int | Sequence[str | int] | None = None,
    mirror: bool = True,
    precision: str | None = None,
    memory: str = "auto",
    cluster: str | None = None,
    **overrides: Any,
) -> None:
    """Segment and map a scan, or many; scans that are finished already are skipped.

    Args:
        input: NIfTI, MGH or NRRD file, folder of a DICOM series, folder of scans, pattern in quotes, BIDS dataset, or TSV with
            the column image (and perhaps name, frame, lesions).
        output: folder for the results, one folder per scan, and summary.tsv.
        analysis_level: participant, the one level of this BIDS app.
        bundle: folder of the bundle.
        outputs: all, or some of segmentation, volumes, contrasts, bias_field, distance, surfaces, mni, transforms, quality, view,
            report; separated by commas.
        participant_label: subjects of a BIDS dataset, with or without sub-, separated by blanks or commas.
        mirror: average each scan with its mirror image; False takes half the time.
        precision: float32, bfloat16 or float16; by default what the device is fast in.
        memory: full, low (labels without probabilities, least memory) or windows; auto takes full if the free memory suffices.
        cluster: for thousands of scans: the address of a Dask scheduler (tcp://host:8786) whose workers share the scans, or
            local:N for N processes of this machine.
        overrides: any other --key value replaces that key of configs/inference.json: --mode (whole_head, brain, cerebrum,
            left_hemisphere, right_hemisphere, ex_vivo), --grid (scan, 1mm), --frame (N, mean), --window ([low,high]),
            --modality (auto, mr, ct), --fix_orientation (True), --shard (i/n), --overwrite, --keep_lesions, --sharpen (strength),
            --weights (file), --device ("$torch.device('cpu')").
    """
    if analysis_level != "participant":
        raise ValueError(f"analysis_level: 'participant' is the one level there is, found '{analysis_level}'")
    if precision is not None and precision not in PRECISIONS:
        raise ValueError(f"precision: one of {', '.join(PRECISIONS)} is needed, found '{precision}'")
    if memory not in MEMORY_MODES:
        raise ValueError(f"memory: one of {', '.join(MEMORY_MODES[:4])} is needed, found '{memory}'")
    settings: dict[str, Any] = {"outputs": outputs if isinstance(outputs, str) else list(outputs)}
    settings |= {"mirror": bool(mirror), "memory": memory, **({"precision": precision} if precision else {})}
    if participant_label is not None:
        labels = [participant_label] if isinstance(participant_label, str | int) else participant_label
        settings["participant_label"] = [literal(str(label)) for label in labels]
    settings |= {"input": literal(str(input)), "output_dir": literal(str(output))}
    if cluster is None:
        run_bundle(bundle, ["inference.json"], **{**settings, **overrides})
    else:
        from brainfm_monai.prediction.cluster import predict_on_cluster

        predict_on_cluster(cluster, _settings(bundle, ["inference.json"], **{**settings, **overrides}))


def train(
    datalist: str, bundle: str = "bundle", coarse: bool = False, variant: str | Sequence[str] = (), **overrides: Any
) -> None:
    """Train on prepared subjects; a training that was interrupted goes on where it was.

    Start with ``--variant small``, a small network that a laptop trains. With N GPUs:
    ``torchrun --nproc_per_node=N -m brainfm_monai train datalist.json --variant multi_gpu_train``.

    Args:
        datalist: list written by ``brainfm-monai data list``.
        bundle: folder of the bundle.
        coarse: the same as ``--variant coarse``: train the coarse network, whose model.pt the fine training takes as
            ``--coarse_weights``.
        variant: configs that are laid over configs/train.json in this order, separated by commas: the names of files in
            the bundle's folders variants and configs, without ``.json`` (small, coarse, finetune, multi_gpu_train, ...), or
            paths of your own configs.
        overrides: any other ``--key value`` replaces that key of configs/train.json: --max_epochs 10, --output_dir OUT,
            --batch_size 4, --accumulation 4 (parts of a batch, to save memory), --precision (float32, bfloat16, float16),
            --max_gradient_norm 5, --activation_checkpointing True, --compile True, --images "['T1w','CT']", --log_interval 10,
            --checkpoint_iterations 500, --learning_rate 0.0003, --seed 1.
    """
    asked = variant.split(",") if isinstance(variant, str) else [str(name) for name in variant]
    names = [*(["coarse"] if coarse else []), *filter(None, asked)]
    configs = ["train.json", *(name if name.endswith(".json") else f"{name}.json" for name in names)]
    run_bundle(bundle, configs, datalist=existing_datalist(datalist), **overrides)


def run_bundle(bundle: str | Path, names: Sequence[str], **overrides: Any) -> None:
    """Run configs of a bundle with MONAI, later ones over earlier ones.

    Args:
        bundle: folder of the bundle.
        names: files in the folders ``configs`` and ``variants`` of the bundle, or paths of other configs.
        overrides: values that replace those of the configs.

    Raises:
        FileNotFoundError: if there is no such config.
    """
    from monai.bundle import run

    run(**_settings(bundle, names, **overrides))


def _settings(bundle: str | Path, names: Sequence[str], **overrides: Any) -> dict[str, Any]:
    """Arguments of :func:`monai.bundle.run`."""
    if "args_file" in overrides:  # of imported weights, whose files lie beside it
        overrides.setdefault("weights_dir", literal(str(Path(str(overrides["args_file"])).parent)))
    folder = find_bundle(bundle)
    if folder != Path(str(bundle)):  # the bundle that the package carries, where nothing is written
        overrides = {"output_dir": literal(str(Path("training").resolve())), **overrides}
    configs = folder / "configs"
    files = [find_config(bundle, name) for name in names]
    return {
        "config_file": [str(file) for file in files],
        "bundle_root": literal(str(folder)),
        "meta_file": str(configs / "metadata.json"),
        "logging_file": str(configs / "logging.conf"),
        **overrides,
    }


def find_config(bundle: str | Path, name: str) -> Path:
    """Path of a config: a file in ``configs`` or ``variants`` of the bundle, or, with a folder in its name, any file.

    Raises:
        FileNotFoundError: if there is no such config.
    """
    folders = [find_bundle(bundle) / folder for folder in ("configs", "variants")]
    places = [Path(name)] if Path(name).name != name else [folder / name for folder in folders]
    for path in places:
        if path.is_file():
            return path
    names = sorted(path.stem for folder in folders for path in folder.glob("*.json"))
    listed = ", ".join(names) or "none: pass --bundle FOLDER"
    raise FileNotFoundError(f"{places[0]}: a config of the bundle is needed, found no such file; there are {listed}")


def existing_datalist(path: str) -> str:
    """The path of a datalist as a value for a config.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: a datalist (JSON) is needed, found no such file")
    return literal(str(path))
