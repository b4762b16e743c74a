"""The tables of contrasts: complete, the same on both sides, and for CT in the order that Hounsfield units have."""

from __future__ import annotations

import csv
from importlib import resources

import pytest

from brainfm_monai.anatomy import Protocol

FOLDER = resources.files("brainfm_monai") / "contrasts"
NAMES = sorted(f.name.removesuffix(".tsv") for f in FOLDER.iterdir() if f.name.endswith(".tsv"))


def read(name: str) -> dict[int, tuple[float, float]]:
    rows = list(csv.DictReader((FOLDER / f"{name}.tsv").read_text(encoding="utf-8").splitlines(), delimiter="\t"))
    table = {int(row["freesurfer_id"]): (float(row["mean"]), float(row["mean_std"])) for row in rows}
    assert len(table) == len(rows), "an id may stand once"
    return table


@pytest.mark.parametrize("name", NAMES)
def test_a_table_has_every_structure_and_the_same_values_on_both_sides(name: str) -> None:
    table, structures = read(name), Protocol.load("synthseg_generation").structures
    assert set(table) == {s.freesurfer_id for s in structures}
    for structure in structures:
        assert table[structure.freesurfer_id] == table[structures[structure.mirror].freesurfer_id], structure.name
        assert table[structure.freesurfer_id][1] > 0, structure.name


def test_hounsfield_units_rise_from_air_to_cortical_bone() -> None:
    table = read("CT")
    air, other_tissues, fluid, lesion, white, cortex, vein, cancellous, cortical = 0, 507, 4, 25, 2, 3, 514, 516, 515
    means = [table[i][0] for i in (air, other_tissues, fluid, lesion, white, cortex, vein, cancellous, cortical)]
    assert means == sorted(means)
    assert table[air][0] == -1000
    assert 5 <= table[cortex][0] - table[white][0] <= 10, "grey and white matter differ by 5 to 10 HU"
