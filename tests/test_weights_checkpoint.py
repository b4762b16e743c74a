"""Checkpoints are read without running anything of them; one that asks for a call is refused by the name of it."""

from __future__ import annotations

import argparse
import collections
import io
import os
import pathlib
import pickle
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from brainfm_monai.weights import load_published
from brainfm_monai.weights.checkpoint import read_checkpoint
from brainfm_monai.weights.published import _tensors


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.function, self.args = function, args

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.function, self.args


def write_zip(path: Path, data: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", b"3\n")
    return path


def test_tensors_containers_numbers_and_text_come_back_and_the_rest_is_inert(tmp_path: Path) -> None:
    tensors = {
        "float": torch.rand(3, 4),
        "half": torch.rand(5).half(),
        "bfloat": torch.rand(5).bfloat16(),
        "view": torch.rand(4, 4).t()[1:],
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(3),
        "parameter": torch.nn.Parameter(torch.rand(2)),
    }
    content = {
        "tensors": collections.OrderedDict(tensors),
        "module": torch.nn.BatchNorm1d(2).state_dict(),  # an OrderedDict with an attribute
        "settings": argparse.Namespace(path="x", nested=argparse.Namespace(values=[1, 2.5, None, True, {"a": (1,)}])),
        "others": [
            np.float64(1),
            np.arange(3),
            torch.device("cpu"),
            {1},
            pathlib.Path("a"),
            b"bytes",
            torch.Size([1]),
        ],
        "maps": collections.defaultdict(list, {1: [2]}),
        "epoch": 12,
    }
    torch.save(content, tmp_path / "c.pth")
    found = read_checkpoint(tmp_path / "c.pth")
    for name, tensor in tensors.items():
        assert found["tensors"][name].dtype == tensor.dtype
        assert torch.equal(found["tensors"][name], tensor.detach())
    assert found["epoch"] == 12
    assert not isinstance(found["settings"], argparse.Namespace)
    assert vars(found["settings"])["path"] == "x"
    assert vars(vars(found["settings"])["nested"])["values"] == [1, 2.5, None, True, {"a": (1,)}]
    assert not any(isinstance(value, np.generic | np.ndarray | pathlib.Path) for value in found["others"])
    assert found["maps"] == {1: [2]}
    assert type(found["maps"]) is collections.OrderedDict


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda mark: Call(os.system, f"touch {mark}"), "posix.system"),
        (lambda mark: Call(subprocess.Popen, ["touch", str(mark)]), "commands.Popen"),
        (lambda mark: Call(eval, f"open({str(mark)!r}, 'w')"), "builtins.eval"),
        (lambda mark: Call(exec, f"open({str(mark)!r}, 'w')"), "builtins.exec"),
        (lambda mark: Call(open, str(mark), "w"), "io.open"),
        (lambda mark: Call(pathlib.Path.touch, pathlib.PosixPath(mark)), "builtins.getattr"),
        (lambda mark: Call(argparse.Namespace, 1), "argparse.Namespace"),
        (lambda mark: Call(torch.load, str(mark)), "torch.serialization.load"),
    ],
)
def test_a_call_is_refused_by_its_name(tmp_path: Path, call: Callable[[Path], Call], name: str) -> None:
    mark = tmp_path / "ran"
    content = {
        "model": {"backbone.encoders.0.x": torch.rand(2)},
        "train_args": {"deep": [argparse.Namespace(x=call(mark))]},
    }
    torch.save(content, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=rf"evil\.pth: .*; this one asks for '{name}', and was not loaded") as caught:
        load_published(tmp_path / "evil.pth")
    assert "\n" not in str(caught.value)
    assert not mark.exists()


RAW = {
    "GLOBAL REDUCE": b"cos\nsystem\n(S'touch MARK'\ntR.",
    "GLOBAL REDUCE of another name": b"cposix\nsystem\n(S'touch MARK'\ntR.",
    "STACK_GLOBAL REDUCE": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0atouch MARK\x85R.",
    "STACK_GLOBAL of a dotted name": b"\x80\x04\x8c\x07pathlib\x8c\x0cos.path.join\x93\x8c\x0atouch MARK\x85R.",
    "INST": b"(S'touch MARK'\nios\nsystem\n.",
    "OBJ": b"(cos\nsystem\nS'touch MARK'\no.",
    "NEWOBJ": b"\x80\x02cos\nsystem\nU\x0atouch MARK\x85\x81.",
    "NEWOBJ_EX": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0atouch MARK\x85}\x92.",
    "NEWOBJ of a class": b"\x80\x02csubprocess\nPopen\nU\x0atouch MARK\x85\x81.",
    "NEWOBJ of another class with arguments": b"\x80\x02ccode\nInteractiveInterpreter\nU\x0atouch MARK\x85\x81.",
    "BUILD": b"cos\nsystem\n(dS'x'\nS'touch MARK'\nsb.",
    "INST without arguments": b"(ios\ngetcwd\n.",
    "INST of another class": b"(S'touch MARK'\nicode\nInteractiveInterpreter\n.",
    "BUILD with __setstate__ of a class": b"cfoo\nBar\n(dS'__setstate__'\ncos\nsystem\nsb.",
    "nested calls": b"cbuiltins\ngetattr\n(c__builtin__\n__import__\n(S'os'\ntRS'system'\ntR(S'touch MARK'\ntR.",
    "copyreg": b"ccopyreg\n_reconstructor\n(csubprocess\nPopen\nc__builtin__\nobject\nNtR.",
    "operator": b"coperator\nattrgetter\n(S'system'\ntR(cfoo\nbar\ntR.",
}


@pytest.mark.parametrize("kind", RAW)
def test_no_opcode_calls_anything(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    data = RAW[kind].replace(b"MARK", b"RANX")
    path = write_zip(tmp_path / "evil.pth", data)
    with pytest.raises(ValueError, match=r"asks for '[\w.]+\.\w+', and was not loaded|cannot be read as one"):
        load_published(path)
    assert not (tmp_path / "RANX").exists()


def test_functions_that_may_be_called_cannot_be_changed(tmp_path: Path) -> None:
    for name in (b"collections\nOrderedDict", b"torch._utils\n_rebuild_tensor_v2"):
        path = write_zip(tmp_path / "evil.pth", b"c" + name + b"\n(N(dS'_function'\ncfoo\nbar\nstb.")
        with pytest.raises(ValueError, match=r"asks for '_function'|cannot be read as one"):
            load_published(path)
    torch.save({"model": {"backbone.encoders.0.x": torch.rand(2)}}, tmp_path / "good.pth")
    assert read_checkpoint(tmp_path / "good.pth")["model"]["backbone.encoders.0.x"].shape == (2,)


def test_a_truncated_file_is_an_error_of_one_line(tmp_path: Path) -> None:
    state = {f"backbone.encoders.0.{i}": torch.rand(40) for i in range(4)}
    torch.save({"model": state}, tmp_path / "whole.pth")
    whole = (tmp_path / "whole.pth").read_bytes()
    for length in [0, 1, 3, 4, *range(10, len(whole), 41), len(whole) - 1]:
        (tmp_path / "cut.pth").write_bytes(whole[:length])
        with pytest.raises(
            ValueError, match=r"cut\.pth: a whole torch checkpoint is needed, and it cannot be read as one"
        ) as caught:
            load_published(tmp_path / "cut.pth")
        assert "\n" not in str(caught.value)


def test_a_foreign_file_is_an_error_of_one_line(tmp_path: Path) -> None:
    foreign = tmp_path / "foreign.pth"
    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros(3))
    for content in (
        b"not a checkpoint\n" * 9,
        b"\x1f\x8b\x08\x00" * 9,
        b"\x89HDF\r\n\x1a\n",
        buffer.getvalue(),
        pickle.dumps({"a": 1}),
    ):
        foreign.write_bytes(content)
        with pytest.raises(ValueError, match=r"foreign\.pth: a whole torch checkpoint is needed") as caught:
            load_published(foreign)
        assert "\n" not in str(caught.value)


def test_damage_inside_a_whole_archive_is_told(tmp_path: Path) -> None:
    torch.save({"a": torch.arange(16.0)}, tmp_path / "good.pth")
    with zipfile.ZipFile(tmp_path / "good.pth") as good:
        entries = {name: good.read(name) for name in good.namelist()}

    def write(changes: dict[str, bytes]) -> Path:
        with zipfile.ZipFile(tmp_path / "bad.pth", "w") as bad:
            for name, data in entries.items():
                key = name.split("/", 1)[1]
                if changes.get(key) != b"":
                    bad.writestr(name, changes.get(key, data))
        return tmp_path / "bad.pth"

    assert b"K\x10" in entries["good/data.pkl"]
    longer = entries["good/data.pkl"].replace(b"K\x10\x85", b"K\x11\x85")  # a shape beyond the storage
    assert longer != entries["good/data.pkl"]
    for changes, message in (
        ({"data/0": b""}, "file not found"),
        ({"byteorder": b"middle"}, "Unknown endianness type"),
        ({"data.pkl": b""}, "file not found"),
        ({"data.pkl": longer}, "resize storage"),
    ):
        with pytest.raises(ValueError, match=rf"bad\.pth: a whole torch checkpoint is needed.*{message}"):
            read_checkpoint(write(changes))


def test_a_short_or_packed_record_does_not_go_on_into_the_next(tmp_path: Path) -> None:
    x = torch.arange(1000.0)
    torch.save({"a": x, "part": x[2:5], "none": torch.empty(0), "b": torch.arange(5000)}, tmp_path / "good.pth")
    assert torch.equal(read_checkpoint(tmp_path / "good.pth")["a"], x)
    for kept, packing in ((400, zipfile.ZIP_STORED), (4000, zipfile.ZIP_DEFLATED)):
        with zipfile.ZipFile(tmp_path / "good.pth") as good, zipfile.ZipFile(tmp_path / "bad.pth", "w") as bad:
            for name in good.namelist():
                is_first = name.endswith("/data/0")
                content = good.read(name)[: kept if is_first else None]
                bad.writestr(name, content, packing if is_first else zipfile.ZIP_STORED)
        with pytest.raises(
            ValueError, match=r"bad\.pth: a whole torch checkpoint.* bytes of unpacked tensors are needed"
        ):
            read_checkpoint(tmp_path / "bad.pth")


def test_other_archives_are_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), tmp_path / "script.pth")
    with tarfile.open(tmp_path / "old.pth", "w") as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    torch.save({"a": torch.zeros(1)}, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    for name in ("script.pth", "old.pth", "legacy.pth"):
        with pytest.raises(ValueError, match="Expected input to be a checkpoint"):
            read_checkpoint(tmp_path / name)


def test_a_hook_and_gradients_in_the_file_are_without_effect(tmp_path: Path) -> None:
    tensor = torch.rand(2, requires_grad=True)
    torch.save({"a": tensor}, tmp_path / "a.pth")
    found = _tensors(read_checkpoint(tmp_path / "a.pth"))["a"]
    assert not found.requires_grad
    assert not found._backward_hooks
