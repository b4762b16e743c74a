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
from brainfm_monai.metrics import parse_structures

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


def fit_line(pairs: pd.DataFrame) -> tuple[float, float]:
    """Intercept and slope of Dice over entropy by least squares; the Dice never rises with the entropy."""
    slope, intercept = np.polyfit(pairs["entropy"], pairs["dice"], 1)
    return (float(intercept), float(slope)) if slope < 0 else (float(pairs["dice"].mean()), 0.0)


def expect(pairs: pd.DataFrame, line: tuple[float, float]) -> pd.Series:
    """Expected Dice of each pair."""
    return (line[0] + line[1] * pairs["entropy"]).clip(0, 1)


def main() -> None:
    """Fit, write, and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("generated", type=Path, help="evaluation of generated heads")
    parser.add_argument("--check", type=Path, help="evaluation of real pairs, on which the lines are checked")
    parser.add_argument("--weights", type=Path, default=PACKAGE / "bundle" / "models" / "model.pt")
    parser.add_argument("--output", type=Path, default=PACKAGE / "outputs" / "expected_dice.tsv")
    options = parser.parse_args()
    config = ConfigParser(ConfigParser.load_config_file(PACKAGE / "bundle" / "configs" / "evaluate.json"))
    digest, pairs, rows, lines = hash_file(options.weights), read_pairs(options.generated), [], {}
    for structure in parse_structures(config.get_parsed_content("structures_13")):
        mine = pairs[pairs["structure"] == structure.name]
        lines[structure.name] = fit_line(mine)
        errors = [  # of each head by the line of the other heads
            (expect(left_out, fit_line(mine[mine["head"] != head])) - left_out["dice"]).abs()
            for head, left_out in mine.groupby("head")
        ]
        ids = " ".join(str(i) for i in sorted(structure.ids) if i < 1000)
        values = (*lines[structure.name], float(pd.concat(errors).mean()))
        rows.append((digest, structure.name, ids, *(f"{x:.3f}" for x in values), len(mine)))
    write_table(options.output, COLUMNS, rows)
    print(pd.DataFrame(rows, columns=COLUMNS).drop(columns=["weights_sha256", "freesurfer_ids"]).to_string(index=False))
    if options.check:
        real = read_pairs(options.check)
        real = real[real["structure"].isin(lines)]
        expected = pd.concat([expect(part, lines[str(name)]) for name, part in real.groupby("structure")]).sort_index()
        error = expected - real["dice"]
        print(
            f"\nreal pairs: {len(real)} structures, mean error {error.mean():+.3f}, mean magnitude {error.abs().mean():.3f}"
        )
        print(f"correlation of expected and true Dice {np.corrcoef(expected, real['dice'])[0, 1]:.2f}")


if __name__ == "__main__":
    main()
