"""Words of a command line as Python values: paths, names and labels stay the strings that were typed."""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fire.parser import DefaultParseValue

from brainfm_monai.io import literal

SWITCHES = ("True", "False", "true", "false", "1", "0")
# overrides of configs that are not parameters of a command: switches, which need no value, and texts
SWITCH_KEYS = (
    "overwrite", "keep_lesions", "compile", "second_look", "fix_orientation", "mlflow", "activation_checkpointing",
)  # fmt: skip
TEXT_KEYS = ("input", "section", "name", "shard")
TEXT_ENDINGS = ("_dir", "_root", "_file", "weights", "datalist")


def spell_out(words: list[str], commands: Mapping[str, Any]) -> list[str]:
    """Write a command line such that Fire, which takes every word for a Python literal, yields what was typed.

    Without this ``2024_05_02`` is the number 20240502, ``1.10`` is 1.1 and ``out#3`` is ``out``. Parameters that are
    strings or paths by their annotation get the word as it stands; parameters that are sequences of them take all words
    up to the next flag, or one word with commas. Overrides of a config may still be numbers, lists and expressions.
    Words after ``--`` are no flags.

    Returns the command and ``--parameter=literal`` for each value; the words unchanged where help is asked for or there
    is no such command. ValueError if there are more words than the command has parameters.
    """
    function, rest = _find_command(words, commands)
    if function is None or {"--help", "-h"} & set(rest):
        return words
    parameters = [p for p in inspect.signature(function).parameters.values() if p.kind != p.VAR_KEYWORD]
    if any(p.kind == p.VAR_POSITIONAL for p in parameters):  # it takes any words
        return words
    kinds = {p.name: p.annotation.__name__ if isinstance(p.annotation, type) else str(p.annotation) for p in parameters}
    flags, loose = _take_flags(rest, kinds)
    free = [name for name in kinds if name not in flags]
    command = words[: len(words) - len(rest)]
    if len(loose) > len(free):
        raise ValueError(f"{' '.join(command)}: {len(free)} more words are possible, found {' '.join(loose)}")
    values = {name: [word] for name, word in zip(free, loose, strict=False)} | flags
    return [*command, *(f"--{name}={_spell(name, value, kinds)}" for name, value in values.items())]


def _find_command(words: list[str], commands: Any) -> tuple[Callable[..., Any] | None, list[str]]:
    """The function that the first words name, and the words after it."""
    for position, word in enumerate(words, 1):
        is_table = isinstance(commands, Mapping)
        commands = commands.get(word) if is_table else getattr(commands, word.replace("-", "_"), None)
        if inspect.isroutine(commands):
            return commands, words[position:]
        if commands is None:
            break
    return None, []


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
        is_switch = kinds.get(name) == "bool" or (name not in kinds and name in SWITCH_KEYS)
        flags[name] = [value] if equals else []
        most = 0 if equals else len(left) if _is_list(name, kinds) else 1
        while left and most and not left[0].startswith("--") and (not is_switch or left[0] in SWITCHES):
            most -= 1
            flags[name].append(left.pop(0))
    return flags, loose


def _spell(name: str, values: list[str], kinds: Mapping[str, str]) -> str:
    """The Python literal of a parameter, or of an override, whose strings the config parser may evaluate."""
    if not values:
        return "True"
    if _is_list(name, kinds):
        parts = [part for value in values for part in _split(value)]
        return repr(parts if len(parts) > 1 else parts[0])
    (value,) = values
    if name in kinds:
        is_text = any(kind in kinds[name] for kind in ("str", "Path")) and "Sequence" not in kinds[name]
        return repr(value) if is_text and not (value == "None" and "None" in kinds[name]) else value
    if name == "args_file":  # MONAI reads it before there is a parser
        return repr(value)
    if name in TEXT_KEYS or name.endswith(TEXT_ENDINGS):
        return repr(value if value.startswith(("$", "@")) and not Path(value).exists() else literal(value))
    parsed = DefaultParseValue(value)
    is_number = isinstance(parsed, int | float) and not isinstance(parsed, bool)
    return repr(value if (isinstance(parsed, str) and "#" in value) or (is_number and "_" in value) else parsed)


def _is_list(name: str, kinds: Mapping[str, str]) -> bool:
    return "Sequence[str" in kinds.get(name, "")


def _split(value: str) -> list[str]:
    """Parts of a word that holds several, as in ``01,02`` and ``['01', '02']``; a path with commas is one."""
    if Path(value).exists() or not value.strip(", "):
        return [value]
    inner = value[1:-1] if value[0] + value[-1] in ("[]", "()") else value
    return [part.strip(" '\"") for part in inner.split(",") if part.strip()]
