"""The command ``brainfm-monai``: each command is a few lines that call the package or run a config of the bundle."""

import logging
import os
import sys
from collections.abc import Callable
from typing import Any

import fire

from brainfm_monai.cli.bundle import evaluate, import_weights, predict, train
from brainfm_monai.cli.doctor import doctor, version
from brainfm_monai.cli.functions import POSTPONED, Data, Prepare
from brainfm_monai.cli.words import spell_out

__all__ = ["COMMANDS", "main"]

COMMANDS: dict[str, Callable[..., Any] | Prepare | Data] = {
    "predict": predict,
    "prepare": Prepare(),
    "data": Data(),
    "preview": POSTPONED["preview"],
    "train": train,
    "evaluate": evaluate,
    "compare": POSTPONED["compare"],
    "import-weights": import_weights,
    "export": POSTPONED["export"],
    "demo-scans": POSTPONED["demo-scans"],
    "doctor": doctor,
    "version": version,
}


def main() -> None:
    """Run a command; a wrong value or a missing file is reported in one line, with exit status 1."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    words = sys.argv[1:]
    try:
        commands = {**COMMANDS, **{name: POSTPONED[name]() for name in words[:1] if name in POSTPONED}}
        fire.Fire(commands, spell_out(words, commands), name="brainfm-monai")
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of the output has left, as in "| head -1"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more at its end
        sys.exit(1)
    except ModuleNotFoundError as error:
        rule = f"the package '{error.name}' is needed, found none"
        sys.exit(f"brainfm-monai: {rule}: brainfm-monai doctor says which extra contains it")
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"brainfm-monai: {error}")
