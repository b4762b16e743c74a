"""The command ``brainfm-monai``: each command is a few lines that call the package or run a config of the bundle."""

import logging
import os
import sys
from importlib import import_module
from typing import Any

from brainfm_monai.cli.words import describe, read_words

# words of each command, its module and function, which are imported when it is called, and what the list of them says
COMMANDS = {
    "predict": ("cli.bundle", "predict", "Segment and map a scan, or many."),
    "prepare": ("data.prepare", "prepare_subjects", "Prepare subjects: labels, freesurfer or bids."),
    "data fetch": ("data.fetch", "fetch_dataset", "Download open data."),
    "data list": ("data.datalist", "write_datalist", "Write the datalist of prepared subjects."),
    "data check": ("data.check", "check_data", "Look for faults in subjects."),
    "preview": ("preview", "write_preview", "Draw a contact sheet of generated scans with their targets."),
    "train": ("cli.bundle", "train", "Train on prepared subjects."),
    "evaluate": ("cli.bundle", "evaluate", "Measure predictions against what is true."),
    "compare": ("evaluation.writer", "compare_evaluations", "Compare two evaluations of the same scans."),
    "import-weights": ("weights", "import_weights", "Turn published weights into files that the bundle uses."),
    "demo-scans": ("data.fetch", "write_demo_scans", "Write two scans to try things on."),
    "doctor": ("cli.bundle", "doctor", "Report what is installed, and which package is missing for what."),
    "version": ("cli.bundle", "version", "Print the version."),
}
HELP = {"--help", "-h"}


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
