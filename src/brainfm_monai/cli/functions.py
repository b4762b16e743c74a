"""Commands that are functions of the package, and the groups of those that make, list and check training subjects."""

from collections.abc import Callable
from functools import wraps
from importlib import import_module
from typing import Any

Command = Callable[..., Any]


def loader(module: str, name: str, doc: str = "") -> Callable[..., Command]:
    """A function that imports a command of the package; Fire prints what the command returns, unless it is a list.

    ``doc`` is what the list of commands says, for which nothing is imported. Where a library is missing, the command
    stands in the list and ends with the error.
    """

    def load(_: object = None) -> Command:
        try:
            function: Command = getattr(import_module(f"brainfm_monai.{module}"), name)
        except ModuleNotFoundError as error:
            missing = error

            def refuse(*args: Any, **kwargs: Any) -> None:
                raise missing

            refuse.__doc__ = f"Needs the package '{missing.name}': brainfm-monai doctor names the extra."
            return refuse

        @wraps(function)
        def command(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            return None if isinstance(result, list) else result

        return command

    load.__doc__ = doc
    return load


class Prepare:
    """Prepare subjects for training from label maps, from FreeSurfer's results, or from a BIDS folder."""

    labels = property(loader("data.prepare", "prepare_labels"))
    freesurfer = property(loader("data.freesurfer", "prepare_freesurfer"))
    bids = property(loader("data.bids", "prepare_bids"))


class Data:
    """Download open data, write the datalist of prepared subjects, and look for faults in subjects."""

    fetch = property(loader("data.fetch", "fetch_dataset"))
    list = property(loader("data.datalist", "write_datalist"))
    check = property(loader("data.check", "check_data"))


POSTPONED = {  # commands that are imported when they are called
    "preview": loader("preview", "write_preview", "Draw a contact sheet of generated scans with their targets."),
    "compare": loader("evaluation", "compare_evaluations", "Compare two evaluations of the same scans."),
    "export": loader("exports", "export_bundle", "Write the bundle's network with its weights as TorchScript or ONNX."),
    "demo-scans": loader("data.fetch", "write_demo_scans", "Write two scans to try things on."),
}
