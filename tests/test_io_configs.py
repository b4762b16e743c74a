"""The fingerprint of a resolved config, and strings that MONAI's parser leaves alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser

from brainfm_monai.io import fingerprint, literal, write_whole

SCRIPT = """
import sys
from monai.bundle import ConfigParser
parser = ConfigParser(ConfigParser.load_config_file(sys.argv[1]))
parser.update({"bundle_root": sys.argv[2]})
print(parser.get_parsed_content("settings").configuration)
"""


def configuration(repository: Path, **overrides: Any) -> str:
    """Fingerprint of the inference config, as the settings of a run hold it."""
    parser = ConfigParser(ConfigParser.load_config_file(repository / "bundle/configs/inference.json"))
    parser.update({"bundle_root": str(repository / "bundle"), **overrides})
    found: str = parser.get_parsed_content("settings").configuration
    return found


def test_everything_that_results_depend_on_changes_the_fingerprint(repository: Path) -> None:
    changes: list[dict[str, Any]] = [
        {"frame": 0},
        {"frame": 2},
        {"window": [0, 70]},
        {"mirror": False},
        {"second_look": False},
        {"memory": "low"},
        {"mode": "brain"},
        {"network_def#stride": 1},
        {"preprocessing#transforms#2#mode": "nearest"},
        {"preprocessing#transforms#3#upper": 0.99},
        {"postprocessing#transforms#0#probabilities": False},
        {"layout#tasks": ["segmentation"]},
    ]
    found = [configuration(repository), *(configuration(repository, **change) for change in changes)]
    assert len(set(found)) == len(found)


def test_the_fingerprint_is_the_same_in_another_process_place_and_on_another_device(
    repository: Path, tmp_path: Path
) -> None:
    expected = configuration(repository)
    assert configuration(repository, device=torch.device("meta"), outputs="volumes", overwrite=True) == expected
    config = repository / "bundle/configs/inference.json"
    command = [sys.executable, "-c", SCRIPT, str(config), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == expected


def test_fingerprints_of_plain_values() -> None:
    assert fingerprint({"a": 1, "b": [2.0]}) == fingerprint({"b": [2.0], "a": 1})
    assert fingerprint(1) != fingerprint("1") != fingerprint(Path("1"))
    assert fingerprint(torch.zeros(3)) != fingerprint(torch.zeros(4))
    assert fingerprint(lambda x: x + 1) != fingerprint(lambda x: x + 2)
    loop: list[Any] = []
    loop.append(loop)
    assert fingerprint(loop) != fingerprint([[]])


@pytest.mark.parametrize(
    "text", ["out", "a#1", "$HOME", "%x", "@input", "a@#b", "$__import__('os')", "it's@", 'a"$\\n', "ä@::n"]
)
def test_a_literal_reaches_the_config_unchanged(text: str) -> None:
    parser = ConfigParser({"input": "none", "path": "@input", "joined": "$@input + '/x'", "list": [{"image": "none"}]})
    parser.update({"input": literal(text), "list": [{"image": literal(text)}]})
    assert parser.get_parsed_content("path") == text
    assert parser.get_parsed_content("joined") == text + "/x"
    assert parser.get_parsed_content("list") == [{"image": text}]


def test_a_writer_removes_what_a_killed_one_left_and_nothing_that_is_being_written(tmp_path: Path) -> None:
    target = tmp_path / "table[1].tsv"
    left, foreign = tmp_path / ".0123abcd.partial.table[1].tsv", tmp_path / ".0123abcd.partial.table.tsv"
    left.write_text("half")
    foreign.write_text("of another file")
    with write_whole(target) as first:
        first.write_text("first")
        with write_whole(target) as second:
            second.write_text("second")
            assert not left.exists()
            assert first.exists()
        assert target.read_text() == "second"
    assert target.read_text() == "first"
    assert sorted(tmp_path.iterdir()) == [foreign, target]
