"""Protocol tables, checked against each other and against the rules they state."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from brainfm_monai import Protocol, Structure
from brainfm_monai.anatomy import is_brain, is_fluid, is_head

SHIPPED = ("brainfm", "brainfm_generation", "synthseg_brain", "synthseg_generation", "synthseg_head")
HEADER = "label\tfreesurfer_id\tname\tside\tmirror\tred\tgreen\tblue\tincludes"
# FreeSurfer's colour table: the same brain structure has the same id in every protocol
FREESURFER = {
    "Left-Thalamus": 10,
    "Right-Thalamus": 49,
    "Left-Hippocampus": 17,
    "Right-Hippocampus": 53,
    "Brain-Stem": 16,
}


def write_table(path: Path, *rows: str, header: str = HEADER) -> Path:
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


@pytest.fixture(params=SHIPPED)
def protocol(request: pytest.FixtureRequest) -> Protocol:
    return Protocol.load(request.param)


def test_shipped_protocols_are_listed() -> None:
    assert Protocol.names() == list(SHIPPED)


@pytest.mark.parametrize(
    ("name", "count"),
    [("brainfm", 56), ("brainfm_generation", 256), ("synthseg_head", 44), ("synthseg_generation", 54)],
)
def test_number_of_labels(name: str, count: int) -> None:
    assert len(Protocol.load(name)) == count


def test_background_comes_first(protocol: Protocol) -> None:
    first = protocol.structures[0]
    assert (first.label, first.freesurfer_id, first.side) == (0, 0, "none")


def test_mirroring_twice_is_the_identity(protocol: Protocol) -> None:
    once = protocol.mirror_permutation
    assert [once[i] for i in once] == list(range(len(protocol)))
    assert once != list(range(len(protocol)))


def test_sides_and_mirrors_agree_with_the_names(protocol: Protocol) -> None:
    for s in protocol.structures:
        assert s.side == {"Left": "left", "Right": "right"}.get(s.name.split("-")[0], "none")
        opposite = s.name
        if s.side == "left":
            opposite = s.name.replace("Left-", "Right-", 1)
        elif s.side == "right":
            opposite = s.name.replace("Right-", "Left-", 1)
        assert protocol.structures[s.mirror].name == opposite


def test_names_and_ids_are_unique(protocol: Protocol) -> None:
    names = [s.name for s in protocol.structures]
    assert len(set(names)) == len(names)
    assert len(set(protocol.freesurfer_ids.tolist())) == len(protocol)


def test_colours_are_bytes(protocol: Protocol) -> None:
    assert all(0 <= part <= 255 for s in protocol.structures for part in s.colour)


def test_ids_are_freesurfers(protocol: Protocol) -> None:
    found = {s.name: s.freesurfer_id for s in protocol.structures if s.name in FREESURFER}
    assert found == FREESURFER


def test_protocols_agree_on_shared_names() -> None:
    brain = [
        {s.name: (s.freesurfer_id, s.side) for s in Protocol.load(n).structures if s.freesurfer_id < 99}
        for n in SHIPPED
    ]
    shared = set.intersection(*(set(b) for b in brain))
    assert len(shared) > 20
    for name in shared:
        assert len({b[name] for b in brain}) == 1


def test_every_generation_id_has_a_target_label() -> None:
    generation, head = Protocol.load("synthseg_generation"), Protocol.load("synthseg_head")
    assert set(generation.label_of_id) <= set(head.label_of_id)


def test_folding_keeps_the_side() -> None:
    generation, head = Protocol.load("synthseg_generation"), Protocol.load("synthseg_head")
    for s in generation.structures:
        assert head.structures[head.label_of_id[s.freesurfer_id]].side == s.side


def test_encode_and_decode_are_inverse(protocol: Protocol) -> None:
    labels = protocol.encode(protocol.freesurfer_ids)
    assert labels.dtype == np.uint8
    assert labels.tolist() == list(range(len(protocol)))


def test_encode_folds_included_ids() -> None:
    head = Protocol.load("synthseg_head")
    labels = head.encode(np.array([[77, 2], [136, 43]]))
    names = [[head.structures[i].name for i in row] for row in labels]
    assert names == [
        ["Left-Cerebral-White-Matter", "Left-Cerebral-White-Matter"],
        ["Left-Lateral-Ventricle", "Right-Lateral-Ventricle"],
    ]


def test_encode_names_unknown_ids_and_the_file() -> None:
    with pytest.raises(
        ValueError,
        match=r"^sub-01\.nii\.gz: every id must be in protocol 'synthseg_head', found unknown ids \[999, 1234\]$",
    ):
        Protocol.load("synthseg_head").encode(np.array([0, 999, 2, 1234]), "sub-01.nii.gz")


def test_brain_fluid_and_head_are_told_apart_by_one_law() -> None:
    ids = np.array([0, 2, 24, 43, 250, 507, 819, 901, 930, 1001, 2035, 12101])
    np.testing.assert_array_equal(
        ids[is_brain(ids)], [2, 24, 43, 250, 819, 1001, 2035, 12101]
    )  # parcels are brain, too
    np.testing.assert_array_equal(ids[is_head(ids)], [507, 901, 930])
    np.testing.assert_array_equal(ids[is_fluid(ids)], [24, 43])
    head = Protocol.load("synthseg_head")
    assert (int(head.is_brain.sum()), int(head.is_head.sum()), int(head.is_fluid.sum())) == (32, 11, 7)
    assert not head.is_hemisphere[[0, head.label_of_id[16], head.label_of_id[24]]].any()
    assert head.is_hemisphere[[head.label_of_id[2], head.label_of_id[47]]].all()


def test_more_labels_than_a_byte_holds_are_refused() -> None:
    rows = [Structure(i, i, f"S{i}", "none", i, (0, 0, 0)) for i in range(257)]
    assert len(Protocol("most", tuple(rows[:256]))) == 256
    with pytest.raises(ValueError, match=r"^protocol parcels: at most 256 labels are possible, found 257$"):
        Protocol("parcels", tuple(rows))


def test_a_users_table_is_one_file(tmp_path: Path) -> None:
    table = write_table(
        tmp_path / "mine.tsv",
        "0\t0\tUnknown\tnone\t0\t0\t0\t0\t",
        "1\t17\tLeft-Hippocampus\tleft\t2\t220\t216\t20\t7012 7014",
        "2\t53\tRight-Hippocampus\tright\t1\t220\t216\t20\t",
    )
    mine = Protocol.load(table)
    assert mine.name == "mine"
    assert mine.structures[1] == Structure(1, 17, "Left-Hippocampus", "left", 2, (220, 216, 20), (7012, 7014))
    assert mine.encode(np.array([0, 7014, 53])).tolist() == [0, 1, 2]


def test_a_missing_table_names_what_there_is() -> None:
    with pytest.raises(
        FileNotFoundError,
        match=rf"^aparc: not a protocol of this package \({', '.join(SHIPPED)}\)",
    ):
        Protocol.load("aparc")


BACKGROUND = "0\t0\tUnknown\tnone\t0\t0\t0\t0\t"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [BACKGROUND, "2\t3\tX\tnone\t2\t0\t0\t0\t"],
            r"protocol mine: labels must be 0, 1, 2, \.\.\. in order, got \[0, 2\]",
        ),
        (
            [BACKGROUND, "1\t3\tX\tnone\t1\t0\t0\t0\t3"],
            r"protocol mine: an id may stand once, found more than once: \[3\]",
        ),
        (
            [BACKGROUND, "1\t3\tX\tleft\t1\t0\t0\t0\t"],
            r"protocol mine: X \(left\) names mirror 1, which does not name it back",
        ),
        (
            [BACKGROUND, "1\t3\tX\tnone\t7\t0\t0\t0\t"],
            r"protocol mine: X \(none\) names mirror 7, which does not name it back",
        ),
        ([BACKGROUND, "1\t3\tX\tlinks\t1\t0\t0\t0\t"], r"mine\.tsv, line 3: side must be one of .*, found 'links'"),
        ([BACKGROUND, "1\tthree\tX\tnone\t1\t0\t0\t0\t"], r"mine\.tsv, line 3: numbers are needed, .*'three'"),
    ],
)
def test_a_broken_table_is_told_in_one_line(tmp_path: Path, rows: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        Protocol.load(write_table(tmp_path / "mine.tsv", *rows))


def test_a_table_without_its_columns_is_named(tmp_path: Path) -> None:
    table = write_table(tmp_path / "lut.tsv", "0\tUnknown", header="index\tname")
    with pytest.raises(
        ValueError, match=r"^lut\.tsv: a protocol table needs the columns label .* includes, found index name$"
    ):
        Protocol.load(table)


def test_an_empty_table_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^empty\.tsv: a protocol table needs the columns .*, found no rows$"):
        Protocol.load(write_table(tmp_path / "empty.tsv"))


def test_partial_volume_codes_are_those_of_the_reference() -> None:
    # 100..149 lesion to white, 150..199 white to grey, 200..249 grey to fluid, 2 % a code; 250 is fluid, 77 white matter
    weights = Protocol.load("brainfm_generation").mixture_weights
    np.testing.assert_allclose(weights.sum(1), 1, atol=1e-6)
    for code, parts in {
        1: {1: 1},
        100: {1: 1},
        125: {1: 0.5, 2: 0.5},
        150: {2: 1},
        199: {2: 0.02, 3: 0.98},
        237: {3: 0.26, 4: 0.74},
    }.items():
        assert {int(i): pytest.approx(weights[code, i]) for i in weights[code].nonzero()[0]} == parts
    assert weights[250, 4] == weights[77, 2] == 1


def test_a_pure_protocol_mixes_nothing() -> None:
    np.testing.assert_array_equal(Protocol.load("synthseg_head").mixture_weights, np.eye(44))


@pytest.mark.parametrize(
    ("mixture", "found"), [("2:0.5 3:0.4", "((2, 0.5), (3, 0.4))"), ("2:0.5 9:0.5", "((2, 0.5), (9, 0.5))")]
)
def test_a_mixture_that_does_not_add_up_is_named(tmp_path: Path, mixture: str, found: str) -> None:
    rows = [
        "0\t0\tUnknown\tnone\t0\t0\t0\t0\t\t",
        "1\t2\tWhite\tnone\t1\t0\t0\t0\t\t",
        "2\t3\tGrey\tnone\t2\t0\t0\t0\t\t",
    ]
    table = write_table(
        tmp_path / "t.tsv", *rows, f"3\t150\tMix\tnone\t3\t0\t0\t0\t\t{mixture}", header=f"{HEADER}\tmixture"
    )
    message = f"protocol t: Mix must mix pure structures with shares that sum to 1, got {found}"
    with pytest.raises(ValueError, match=re.escape(message)):
        Protocol.load(table)
