"""Words of a command line as arguments: paths, names and labels stay the strings that were typed."""

import inspect
import re
from collections.abc import Callable, Mapping
from os.path import exists  # unlike a Path, words longer than the name of a file do not raise
from typing import Any

from fire.parser import DefaultParseValue

from brainfm_monai.io import literal, refuse_if

SWITCHES = ("True", "False", "true", "false", "1", "0")
NUMBERS: dict[str, Any] = {"int": int, "float": int | float}  # types of a value by the annotation of a parameter
# overrides of configs that are not parameters of a command: switches, which need no value, and texts
SWITCH_KEYS = ("overwrite", "compile", "second_look", "fix_orientation", "mlflow", "activation_checkpointing")
TEXT_KEYS = ("input", "section", "name", "shard")
TEXT_ENDINGS = ("_dir", "_root", "_file", "weights", "datalist")
OVERRIDE = "text or expression"  # type of these texts
LIST = "Sequence[str"  # beginning of the type of a parameter that takes several words


def read_words(command: str, words: list[str], function: Callable[..., Any]) -> dict[str, Any]:
    """Arguments of a function out of the words of a command line; words after ``--`` are no flags.

    Strings and paths, by the annotation, get the word as it stands: ``1.10`` is no number. Sequences of them take all
    words up to the next flag, or one word with commas. Others, and overrides of a config, are Python literals where
    they can be, and else strings. ValueError if a word is missing, of another type, or belongs to no parameter.
    """
    parameters = inspect.signature(function, eval_str=True).parameters
    named = {name: p for name, p in parameters.items() if p.kind != p.VAR_KEYWORD}
    flags, loose = _take_flags(words, named)
    free = [name for name in named if name not in flags]
    if len(loose) > len(free):
        raise ValueError(f"{command}: {len(free)} more words are possible, found {' '.join(loose)}")
    values = {name: [word] for name, word in zip(free, loose, strict=False)} | flags
    faults = [f"--{name}" for name in flags if name not in named and len(named) == len(parameters)]
    faults += [f"no {name.upper()}" for name, p in named.items() if p.default is p.empty and name not in values]
    if faults:
        raise ValueError(f"{describe(command, function).splitlines()[0]}, found {', '.join(faults)}")
    return {name: _read(name, value, _type_of(name, named)) for name, value in values.items()}


def describe(command: str, function: Callable[..., Any]) -> str:
    """The help of a command: how it is called, and what its arguments are."""
    parameters = inspect.signature(function).parameters.values()
    needed = [p.name.upper() for p in parameters if p.default is p.empty and p.kind != p.VAR_KEYWORD]
    defaults = [f"  --{p.name} {p.default}" for p in parameters if p.default is not p.empty]
    usage = " ".join(["usage: brainfm-monai", command, *needed, "[--key value]..."])
    return "\n".join([usage, "", str(inspect.getdoc(function)), "", *(["Defaults:"] if defaults else []), *defaults])


def _type_of(name: str, named: Mapping[str, inspect.Parameter]) -> str:
    """The annotation of a parameter; of an override of a config what its name says: bool, a text, or any."""
    if name in named:
        return inspect.formatannotation(named[name].annotation)
    is_text = name in TEXT_KEYS or name.endswith(TEXT_ENDINGS)
    return "bool" if name in SWITCH_KEYS else OVERRIDE if is_text else "any"


def _take_flags(words: list[str], named: Mapping[str, inspect.Parameter]) -> tuple[dict[str, list[str]], list[str]]:
    """Words of the flags by name, and the words that belong to no flag."""
    flags: dict[str, list[str]] = {}
    loose, left = list[str](), list(words)
    while left:
        word = left.pop(0)
        if word == "--":
            return flags, loose + left
        if not (word.startswith("--") and word[2:3].isidentifier()):
            loose.append(word)
            continue
        key, equals, value = word[2:].partition("=")
        name = key.replace("-", "_")
        kind, flags[name] = _type_of(name, named), [value] if equals else []
        most = 0 if equals else len(left) if LIST in kind else 1
        while len(flags[name]) < most and left and not left[0].startswith("--"):
            if kind == "bool" and left[0] not in SWITCHES:
                break
            flags[name].append(left.pop(0))
    return flags, loose


def _read(name: str, values: list[str], kind: str) -> Any:
    """The value of a parameter, or of an override, whose strings the config parser may evaluate."""
    refuse_if(not values and kind not in ("bool", "any"), f"--{name}: a value is needed", "none")
    if not values:
        return True
    if LIST in kind:
        return [part for value in values for part in _split(value)]
    (value,) = values
    is_wrong = kind == "bool" and value not in SWITCHES and value[:1] not in ("$", "@")
    refuse_if(is_wrong, f"--{name}: True or False is needed", f"'{value}'")
    if kind == OVERRIDE:  # MONAI reads args_file before there is a parser
        is_literal = name != "args_file" and (not value.startswith(("$", "@")) or exists(value))  # noqa: PTH110
        return literal(value) if is_literal else value
    if value == "None" and re.search("None|Optional", kind):
        return None
    choices = re.findall(r"'(\w+)'", kind)
    refuse_if(choices and value not in choices, f"{name}: one of {', '.join(choices)} is needed", f"'{value}'")
    is_text = re.search("str|Path|Literal", kind) and "Sequence" not in kind
    parsed = value if is_text else _parse(value)
    is_wrong = kind in NUMBERS and not isinstance(parsed, NUMBERS[kind])
    refuse_if(is_wrong, f"--{name}: a number ({kind}) is needed", f"'{value}'")
    return parsed


def _parse(value: str) -> Any:
    """A Python literal, in which plain words are strings; what has ``#``, or a number with ``_``, stays a string."""
    parsed = DefaultParseValue(value.capitalize() if value in ("true", "false") else value)
    is_number = isinstance(parsed, int | float) and not isinstance(parsed, bool)
    return value if (isinstance(parsed, str) and "#" in value) or (is_number and "_" in value) else parsed


def _split(value: str) -> list[str]:
    """Parts of a word that holds several, as in ``01,02`` and ``['01', '02']``; a path with commas is one."""
    if exists(value) or not value.strip(", "):  # noqa: PTH110
        return [value]
    inner = value[1:-1] if value[0] + value[-1] in ("[]", "()") else value
    return [part.strip(" '\"") for part in inner.split(",") if part.strip()]
