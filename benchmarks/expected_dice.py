"""The Dice to expect of each structure by its entropy: lines fitted on generated heads, checked on real pairs.

    brainfm-monai evaluate prepared/datalist.json GENERATED --generated --scans_per_subject 4
    python benchmarks/expected_dice.py GENERATED --check PAIRS

GENERATED and PAIRS are folders of evaluations, whose ``metrics.tsv`` has ``dice`` and ``entropy`` of each structure. The
table of the package, ``outputs/expected_dice.tsv``, is written anew: it holds for one file of weights.
"""

import argparse
from pathlib import Path

import numpy as np
import pandas as pd
from monai.bundle import ConfigParser

from brainfm_monai.io import hash_file, write_table
from brainfm_monai.metrics.segmentation import parse_structures

PACKAGE = Path(__file__).parents[1] / "src" / "brainfm_monai"
COLUMNS = ("weights_sha256", "structure", "freesurfer_ids", "intercept", "slope", "error", "pairs")
SIDES = {"left", "right"}


def read_pairs(folder: Path) -> pd.DataFrame:
    """Dice and entropy of each structure, side, scan and condition of an evaluation, with the head of the scan."""
    rows = pd.read_csv(folder / "metrics.tsv", sep="\t", na_values="n/a")
    rows = rows[(rows["task"] == "segmentation") & rows["metric"].isin(["dice", "entropy"])]
    pairs = rows.pivot_table("value", ["structure", "side", "scan", "condition"], "metric").dropna().reset_index()
    sided = pairs[pairs["side"].isin(SIDES)]["structure"].unique()
    pairs = pairs[pairs["side"].isin(SIDES) | ~pairs["structure"].isin(sided)]  # of a structure with sides, both sides
    return pairs.assign(head=pairs["scan"].str.rsplit("_", n=1).str[0])


def fit_lines(pairs: pd.DataFrame) -> dict[str, tuple[float, float]]:
    """Intercept and slope of Dice over entropy for each structure, by least squares; all structures share one slope.

    A slope of its own for each structure rests on few heads, and one head whose hippocampus is small turns it.
    """
    centred = pairs[["dice", "entropy"]] - pairs.groupby("structure")[["dice", "entropy"]].transform("mean")
    slope = min(0.0, float((centred["dice"] * centred["entropy"]).sum() / centred["entropy"].pow(2).sum()))
    means = pairs.groupby("structure")[["dice", "entropy"]].mean()
    return {str(name): (float(row["dice"] - slope * row["entropy"]), slope) for name, row in means.iterrows()}


def expect(pairs: pd.DataFrame, lines: dict[str, tuple[float, float]]) -> pd.Series:
    """Expected Dice of each pair."""
    values = [lines[s][0] + lines[s][1] * e for s, e in zip(pairs["structure"], pairs["entropy"], strict=True)]
    return pd.Series(values, pairs.index).clip(0, 1)


def main() -> None:
    """Fit, write, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("generated", type=Path, help="evaluation of generated heads")
    parser.add_argument("--check", type=Path, help="evaluation of real pairs, on which the lines are checked")
    parser.add_argument("--weights", type=Path, default=PACKAGE / "bundle" / "models" / "model.pt")
    parser.add_argument("--output", type=Path, default=PACKAGE / "outputs" / "expected_dice.tsv")
    options = parser.parse_args()
    config = ConfigParser(ConfigParser.load_config_file(PACKAGE / "bundle" / "configs" / "evaluate.json"))
    digest, pairs, rows = hash_file(options.weights), read_pairs(options.generated), []
    lines = fit_lines(pairs)
    errors = pd.concat(  # of each head by the lines of the other heads
        [
            (expect(part, fit_lines(pairs[pairs["head"] != head])) - part["dice"]).abs()
            for head, part in pairs.groupby("head")
        ]
    )
    for structure in parse_structures(config.get_parsed_content("structures_13")):
        mine = pairs["structure"] == structure.name
        ids = " ".join(str(i) for i in sorted(structure.ids) if i < 1000)
        values = (*lines[structure.name], float(errors[mine].mean()))
        rows.append((digest, structure.name, ids, *(f"{x:.3f}" for x in values), int(mine.sum())))
    write_table(options.output, COLUMNS, rows)
    print(pd.DataFrame(rows, columns=COLUMNS).drop(columns=["weights_sha256", "freesurfer_ids"]).to_string(index=False))
    if options.check:
        real = read_pairs(options.check)
        real = real[real["structure"].isin(lines)]
        expected = expect(real, lines)
        error = expected - real["dice"]
        print(
            f"\nreal pairs: {len(real)} structures, mean error {error.mean():+.3f}, mean magnitude {error.abs().mean():.3f}"
        )
        print(f"correlation of expected and true Dice {np.corrcoef(expected, real['dice'])[0, 1]:.2f}")


if __name__ == "__main__":
    main()
