"""The command ``brainfm-monai``: each command is a few lines that call the package or run a config of the bundle."""

import ctypes
import inspect
import logging
import os
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, Literal

from brainfm_monai import __version__
from brainfm_monai.cli.words import describe, read_words
from brainfm_monai.io import bundle_arguments, find_bundle, first_line, literal, refuse_if

logger = logging.getLogger(__name__)

# words of each command, its module and function, which are imported when it is called, and what the list of them says
COMMANDS = {
    "predict": ("cli", "predict", "Segment and map a scan, or many."),
    "prepare": ("data.prepare", "prepare_subjects", "Prepare subjects: labels, freesurfer or bids."),
    "data fetch": ("data.fetch", "fetch_dataset", "Download open data."),
    "data list": ("data.datalist", "write_datalist", "Write the datalist of prepared subjects."),
    "data check": ("data.check", "check_data", "Look for faults in subjects."),
    "preview": ("preview", "write_preview", "Draw a contact sheet of generated scans with their targets."),
    "train": ("cli", "train", "Train on prepared subjects."),
    "evaluate": ("cli", "evaluate", "Measure predictions against what is true."),
    "compare": ("evaluation.writer", "compare_evaluations", "Compare two evaluations of the same scans."),
    "import-weights": ("weights", "import_weights", "Turn published weights into files that the bundle uses."),
    "demo-scans": ("data.fetch", "write_demo_scans", "Write two scans to try things on."),
    "doctor": ("cli", "doctor", "Report what is installed, and which package is missing for what."),
    "version": ("cli", "version", "Print the version."),
}
HELP = {"--help", "-h"}
# M_MMAP_THRESHOLD, bytes from which memory goes back to the kernel at once, and M_TRIM_THRESHOLD, most bytes that are
# kept, by their numbers in malloc.h. A map of 1 mm has 35 to 70 MB.
KEPT = {-3: 2**27, -1: 2**29}


def main() -> None:
    """Run a command; a wrong value or a missing file is reported in one line, with exit status 1."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        result = _run(sys.argv[1:])
        if result is not None and not isinstance(result, list):
            sys.stdout.write(f"{result}\n")
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output has left, as in "| head -1"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more at its end
        sys.exit(1)
    except ModuleNotFoundError as error:
        rule = f"the package '{error.name}' is needed, found none"
        sys.exit(f"brainfm-monai: {rule}: brainfm-monai doctor says which extra contains it")
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"brainfm-monai: {error}")
    except RuntimeError as error:  # MONAI's "Failed to instantiate component", around what a component refuses
        if not isinstance(error.__cause__, ValueError | OSError):
            raise
        sys.exit(f"brainfm-monai: {error.__cause__}")


def _run(words: list[str]) -> Any:
    """The result of a command, the help of a command, or the list of those that begin with the words."""
    for count in (1, 2):
        command, rest = " ".join(words[:count]), words[count:]
        if command in COMMANDS:
            module, name, _ = COMMANDS[command]
            function = getattr(import_module(f"brainfm_monai.{module}"), name)
            return describe(command, function) if HELP & set(rest) else function(**read_words(command, rest, function))
    start = [word for word in words if word not in HELP]
    listed = [f"  {key:20}{text}" for key, (*_, text) in COMMANDS.items() if key.split()[: len(start)] == start]
    if not listed:
        raise ValueError(f"a command is needed, found '{' '.join(start)}': brainfm-monai --help lists them")
    return "\n".join(["brainfm-monai COMMAND --help describes a command:", *listed])


def predict(
    input: str, output: str, analysis_level: Literal["participant"] = "participant", bundle: str = "bundle",
    outputs: str | Sequence[str] = "all", participant_label: Sequence[str] | None = None, mirror: bool = True,
    precision: Literal["float32", "bfloat16", "float16"] | None = None,
    memory: Literal["auto", "full", "low", "windows"] = "auto", cluster: str | None = None, **overrides: Any,
) -> None:  # fmt: skip
    """Segment and map a scan, or many; scans that are finished already are skipped.

    Args:
        input: NIfTI, MGH or NRRD file, folder of a DICOM series, folder of scans, pattern in quotes, BIDS dataset, or
            TSV with the column image (and perhaps name, frame).
        output: folder for the results, one folder per scan, and summary.tsv.
        analysis_level: participant, the one level of this BIDS app.
        bundle: folder of the bundle.
        outputs: all, or some of segmentation, volumes, contrasts, bias_field, distance, surfaces, mni, transforms,
            lesion, quality, view, report; separated by commas.
        participant_label: subjects of a BIDS dataset, with or without sub-, separated by blanks or commas.
        mirror: average each scan with its mirror image; False takes half the time.
        precision: float32, bfloat16 or float16; by default what the device is fast in.
        memory: full, low (labels without probabilities, least memory) or windows; auto: full if the memory suffices.
        cluster: address of a Dask scheduler (tcp://host:8786) whose workers share the scans, or local:N processes.
        overrides: any other --key value replaces that key of configs/inference.json: --mode (whole_head, brain,
            cerebrum, left_hemisphere, right_hemisphere, ex_vivo), --grid (scan, 1mm), --frame (N, mean), --window
            ([low,high]), --modality (auto, mr, ct), --fix_orientation (True), --atlas (label map in MNI152 space),
            --shard (i/n), --overwrite, --weights (file), --device (cpu, cuda:1).
    """
    settings = {"outputs": outputs, "mirror": mirror, "memory": memory, "input": literal(input)}
    settings |= {"output_dir": literal(output), **({"precision": precision} if precision else {}), **overrides}
    if participant_label is not None:
        settings["participant_label"] = [literal(label) for label in participant_label]
    if memory != "low":
        _keep_freed_memory()
    run_bundle(bundle, ["inference.json"], cluster, **settings)


def _keep_freed_memory() -> None:
    """Let glibc keep freed memory (0.1 to 0.3 GB) for the next maps: new pages take a fifth of a scan's CPU seconds."""
    if platform.libc_ver()[0] == "glibc" and not any(name.startswith("MALLOC_") for name in os.environ):
        for option, size in KEPT.items():
            ctypes.CDLL(None).mallopt(option, size)


def train(datalist: str, bundle: str = "bundle", variant: Sequence[str] = (), **overrides: Any) -> None:
    """Train on prepared subjects; a training that was interrupted goes on where it was.

    Start with ``--variant small``, a small network that a laptop trains. With N GPUs: ``torchrun --nproc_per_node=N -m
    brainfm_monai train datalist.json --variant multi_gpu_train``.

    Args:
        datalist: list written by ``brainfm-monai data list``.
        bundle: folder of the bundle.
        variant: configs that are laid over configs/train.json in this order, separated by commas: the names of files in
            the bundle's folders variants and configs, without ``.json`` (small, finetune, multi_gpu_train, coarse,
            whose model.pt the fine training takes as ``--weights``, ...), or paths of your own configs.
        overrides: any other ``--key value`` replaces that key of configs/train.json: --max_epochs 10, --output_dir OUT,
            --batch_size 4, --accumulation 4 (parts of a batch, to save memory), --precision (float32, bfloat16,
            float16), --max_gradient_norm 5, --activation_checkpointing True, --compile True, --images "['T1w','CT']",
            --log_interval 10, --checkpoint_iterations 500, --learning_rate 0.0003, --seed 1.
    """
    configs = [name if name.endswith(".json") else f"{name}.json" for name in ["train", *filter(None, variant)]]
    run_bundle(bundle, configs, datalist=datalist, **overrides)


def evaluate(
    datalist: str, output: str, bundle: str = "bundle", generated: bool = False, sweeps: bool = False,
    protocol: bool = False, surfaces: bool = False, **overrides: Any,
) -> None:  # fmt: skip
    """Measure predictions against what is true: every task, by structure, as tables and a page.

    Cases that are measured already, with the same weights and settings, are skipped; ``torchrun`` shares them.

    Args:
        datalist: JSON file ``{"testing": [{"image": path, "label": path}, ...]}``; with ``--generated`` the list of
            ``brainfm-monai data list``, of which the subjects for validation are taken.
        output: folder for metrics.tsv, summary.tsv, evaluation.html and the rest.
        bundle: folder of the bundle.
        generated: generate scans of held-out subjects, whose truth is known, instead of reading real ones.
        sweeps: also make the scans worse step by step.
        protocol: the test protocol of BrainFM's authors: two resolutions, without and with a bias field.
        surfaces: also compare white and pial surfaces, and the thickness between them.
        overrides: any other ``--key value`` replaces that key of configs/inference.json or evaluate*.json: ``--weights
            FILE``, ``--section NAME``, ``--scans_per_subject N``, ``--overwrite``.
    """
    if protocol and (generated or sweeps):
        raise ValueError("evaluate: --protocol is for real scans and has its own conditions: pass it alone")
    variants = {"generated": generated, "protocol": protocol, "generated_sweeps": generated and sweeps}
    variants |= {"sweeps": sweeps and not generated, "surfaces": surfaces}
    names = ["inference.json", "evaluate.json", *(f"evaluate_{name}.json" for name, on in variants.items() if on)]
    run_bundle(bundle, names, datalist=datalist, output_dir=literal(str(output)), **overrides)


def run_bundle(bundle: str | Path, names: Sequence[str], cluster: str | None = None, **overrides: Any) -> None:
    """Run configs of a bundle, see :func:`~brainfm_monai.io.find_config`, with MONAI, later ones over earlier ones."""
    if "datalist" in overrides:
        path = overrides["datalist"]
        refuse_if(not Path(path).is_file(), f"{path}: a datalist (JSON) is needed", "no such file", FileNotFoundError)
        overrides["datalist"] = literal(path)
    if "args_file" in overrides:  # of imported weights, whose files lie beside it
        overrides.setdefault("weights_dir", literal(str(Path(str(overrides["args_file"])).parent)))
    arguments = bundle_arguments(bundle, names)
    if "args_file" not in overrides:  # which may bring keys of its own
        _warn_of_unknown(overrides, arguments["config_file"])
    if find_bundle(bundle) != Path(str(bundle)):  # the bundle that the package carries, where nothing is written
        arguments["output_dir"] = literal(str(Path("training").resolve()))
    if cluster is None:
        from monai.bundle import run

        if "device" in overrides:
            overrides["device"] = _check_device(overrides["device"])
        run(**arguments | overrides)
    else:
        from brainfm_monai.prediction.loop import predict_on_cluster

        predict_on_cluster(cluster, arguments | overrides)


def _warn_of_unknown(overrides: Mapping[str, Any], files: Sequence[str]) -> None:
    """Warn of overrides that no config has, such as misspelt ones, which MONAI takes without a word."""
    from monai.bundle import ConfigParser, run

    known = {*ConfigParser.load_config_files(files), *inspect.signature(run).parameters}
    for name in overrides:
        if name.partition("#")[0] not in known:
            logger.warning("--%s: no config has this key, and nothing reads it", name)


def _check_device(device: Any) -> str:
    """A device of this machine, by its name or an expression, as an expression; ValueError if torch has none."""
    import torch

    name = re.sub(r"^\$torch\.device\(['\"](.*)['\"]\)$", r"\1", device) if isinstance(device, str) else device
    if str(name).startswith(("$", "@")):  # more than a name
        return str(name)
    try:
        return f"$torch.device('{torch.empty(1, device=name).device}')"
    except (RuntimeError, AssertionError) as error:
        found = f"'{name}': {first_line(error)}"
        raise ValueError(f"--device: a device of this machine is needed, found {found}") from error


def version() -> str:
    """Print the version."""
    return __version__


def doctor() -> str:
    """Report what is installed, what this machine is fast in, and which package is missing for what."""
    import psutil
    import torch

    from brainfm_monai.networks import parse_precision

    weights = find_bundle() / "models" / "model.pt"
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    name = torch.cuda.get_device_name() if kind == "cuda" else f"{platform.machine()}, {os.cpu_count()} cores"
    precision = str(parse_precision(None, torch.device(kind))).removeprefix("torch.")
    memory, python = psutil.virtual_memory(), f"Python {platform.python_version()} on {sys.platform}"
    lines = [
        f"brainfm-monai {__version__}, {python}, torch {torch.__version__}",
        f"device: {kind} ({name}), fast in {precision}",
        f"memory: {memory.available / 2**30:.1f} of {memory.total / 2**30:.1f} GiB are free",
        f"weights: {weights if weights.is_file() else f'{weights} is missing: pass --bundle FOLDER or --weights FILE'}",
    ]
    for extra, missing in sorted(_missing_packages().items()):
        remedy = f'missing {", ".join(missing)}: pip install "brainfm-monai{f"[{extra}]" if extra else ""}"'
        lines.append(f"{f'extra {extra}' if extra else 'predict'}: {remedy if missing else 'complete'}")
    return "\n".join(lines)


def _missing_packages() -> dict[str, list[str]]:
    """Names of the packages of each extra (empty: the core) that are not installed, by the package's own metadata."""
    missing: dict[str, list[str]] = {}
    try:
        requirements = metadata.requires("brainfm-monai") or []
    except metadata.PackageNotFoundError:  # the package lies in a bundle, whose metadata.json names its packages
        return {}
    for requirement in requirements:
        ((name, extra),) = re.findall(r"^([\w.-]+)(?:.*extra == ['\"]([\w-]+))?", requirement)
        missing.setdefault(extra, []).extend([] if any(metadata.distributions(name=name)) else [name])
    return missing
