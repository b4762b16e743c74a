"""Commands that measure how good predictions are, and compare two evaluations."""

from typing import Any

from brainfm_monai.cli.bundle import existing_datalist, run_bundle
from brainfm_monai.io import literal


def evaluate(
    datalist: str,
    output: str,
    bundle: str = "bundle",
    generated: bool = False,
    sweeps: bool = False,
    protocol: bool = False,
    surfaces: bool = False,
    **overrides: Any,
) -> None:
    """Measure predictions against what is true: every task, by structure, as tables, plots and a page.

    Cases that are measured already, with the same weights and settings, are skipped; ``torchrun`` shares them.

    Args:
        datalist: JSON file ``{"testing": [{"image": path, "label": path}, ...]}``; with ``--generated`` the list of
            prepared subjects that ``brainfm-monai data list`` writes, of which those for validation are taken.
        output: folder for metrics.tsv, summary.tsv, evaluation.html and the rest.
        bundle: folder of the bundle.
        generated: generate scans of held-out subjects, whose truth is known, instead of reading real ones.
        sweeps: also make the scans worse step by step, and draw the curves.
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
    run_bundle(bundle, names, datalist=existing_datalist(datalist), output_dir=literal(str(output)), **overrides)


def compare(first: str, second: str, output: str | None = None) -> str:
    """Compare two evaluations of the same scans: paired statistics as a table and a page.

    Args:
        first: folder of an evaluation.
        second: folder of another one, such as that of other weights.
        output: folder for comparison.tsv and comparison.html; by default the second one's.

    Returns:
        Path of the page.
    """
    from brainfm_monai.evaluation import compare_evaluations

    return str(compare_evaluations(str(first), str(second), str(second if output is None else output)))
