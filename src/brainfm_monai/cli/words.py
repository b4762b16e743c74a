"""Words of a command line as arguments: paths, names and labels stay the strings that were typed."""

import inspect
from collections.abc import Callable, Mapping
from os.path import exists  # unlike a Path, words longer than the name of a file do not raise
from typing import Any

from fire.parser import DefaultParseValue

from brainfm_monai.io import literal, refuse_if

SWITCHES = ("True", "False", "true", "false", "1", "0")
NUMBERS: dict[str, Any] = {"int": int, "float": int | float}  # types of a value by the annotation of a parameter
SPELLINGS = {"true": "True", "false": "False"}
# overrides of configs that are not parameters of a command: switches, which need no value, and texts
SWITCH_KEYS = ("overwrite", "compile", "second_look", "fix_orientation", "mlflow", "activation_checkpointing")
TEXT_KEYS = ("input", "section", "name", "shard")
TEXT_ENDINGS = ("_dir", "_root", "_file", "weights", "datalist")


def read_words(command: str, words: list[str], function: Callable[..., Any]) -> dict[str, Any]:
    """Arguments of a function out of the words of a command line; words after ``--`` are no flags.

    Parameters that are strings or paths by their annotation get the word as it stands: ``1.10`` is no number.
    Parameters that are sequences of them take all words up to the next flag, or one word with commas. Others, and
    overrides of a config, are Python literals where they can be, and else strings. ValueError if a parameter without a
    default has no word, or there are more words or flags than the function has parameters.
    """
    parameters = list(inspect.signature(function).parameters.values())
    named = [p for p in parameters if p.kind != p.VAR_KEYWORD]
    kinds = {p.name: p.annotation.__name__ if isinstance(p.annotation, type) else str(p.annotation) for p in named}
    flags, loose = _take_flags(words, kinds)
    free = [name for name in kinds if name not in flags]
    if len(loose) > len(free):
        raise ValueError(f"{command}: {len(free)} more words are possible, found {' '.join(loose)}")
    values = {name: [word] for name, word in zip(free, loose, strict=False)} | flags
    faults = [f"--{name}" for name in flags if name not in kinds and len(named) == len(parameters)]
    faults += [f"no {p.name.upper()}" for p in named if p.default is p.empty and p.name not in values]
    if faults:
        raise ValueError(f"{describe(command, function).splitlines()[0]}, found {', '.join(faults)}")
    return {name: _read(name, value, kinds) for name, value in values.items()}


def describe(command: str, function: Callable[..., Any]) -> str:
    """The help of a command: how it is called, and what its arguments are."""
    parameters = inspect.signature(function).parameters.values()
    needed = [p.name.upper() for p in parameters if p.default is p.empty and p.kind != p.VAR_KEYWORD]
    defaults = [f"  --{p.name} {p.default}" for p in parameters if p.default is not p.empty]
    usage = " ".join(["usage: brainfm-monai", command, *needed, "[--key value]..."])
    return "\n".join([usage, "", str(inspect.getdoc(function)), "", *(["Defaults:"] if defaults else []), *defaults])


def _take_flags(words: list[str], kinds: Mapping[str, str]) -> tuple[dict[str, list[str]], list[str]]:
    """Words of the flags by name, and the words that belong to no flag."""
    flags: dict[str, list[str]] = {}
    loose: list[str] = []
    left = list(words)
    while left:
        word = left.pop(0)
        if word == "--":
            return flags, loose + left
        if not (word.startswith("--") and word[2:3].isidentifier()):
            loose.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        is_switch = _is_switch(name, kinds)
        flags[name] = [value] if equals else []
        most = 0 if equals else len(left) if _is_list(name, kinds) else 1
        while left and most and not left[0].startswith("--") and (not is_switch or left[0] in SWITCHES):
            most -= 1
            flags[name].append(left.pop(0))
    return flags, loose


def _read(name: str, values: list[str], kinds: Mapping[str, str]) -> Any:
    """The value of a parameter, or of an override, whose strings the config parser may evaluate."""
    is_text = name in TEXT_KEYS or name.endswith(TEXT_ENDINGS)
    needs_value = kinds[name] != "bool" if name in kinds else is_text
    refuse_if(not values and needs_value, f"--{name}: a value is needed", "none")
    if not values:
        return True
    if _is_list(name, kinds):
        parts = [part for value in values for part in _split(value)]
        return parts[0] if len(parts) == 1 else parts
    (value,) = values
    is_wrong = _is_switch(name, kinds) and value not in SWITCHES and value[:1] not in ("$", "@")
    refuse_if(is_wrong, f"--{name}: True or False is needed", f"'{value}'")
    if name in kinds:
        is_text = any(kind in kinds[name] for kind in ("str", "Path")) and "Sequence" not in kinds[name]
        parsed = value if is_text and not (value == "None" and "None" in kinds[name]) else _parse(value)
        is_wrong = kinds[name] in NUMBERS and not isinstance(parsed, NUMBERS.get(kinds[name], object))
        refuse_if(is_wrong, f"--{name}: a number ({kinds[name]}) is needed", f"'{value}'")
        return parsed
    if name == "args_file":  # MONAI reads it before there is a parser
        return value
    if is_text:
        is_expression = value.startswith(("$", "@")) and not exists(value)  # noqa: PTH110
        return value if is_expression else literal(value)
    return _parse(value)


def _parse(value: str) -> Any:
    """A Python literal, in which plain words are strings; what has ``#``, or a number with ``_``, stays a string."""
    parsed = DefaultParseValue(SPELLINGS.get(value, value))
    is_number = isinstance(parsed, int | float) and not isinstance(parsed, bool)
    return value if (isinstance(parsed, str) and "#" in value) or (is_number and "_" in value) else parsed


def _is_switch(name: str, kinds: Mapping[str, str]) -> bool:
    return kinds.get(name) == "bool" or (name not in kinds and name in SWITCH_KEYS)


def _is_list(name: str, kinds: Mapping[str, str]) -> bool:
    return "Sequence[str" in kinds.get(name, "")


def _split(value: str) -> list[str]:
    """Parts of a word that holds several, as in ``01,02`` and ``['01', '02']``; a path with commas is one."""
    if exists(value) or not value.strip(", "):  # noqa: PTH110
        return [value]
    inner = value[1:-1] if value[0] + value[-1] in ("[]", "()") else value
    return [part.strip(" '\"") for part in inner.split(",") if part.strip()]
