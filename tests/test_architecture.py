"""The rules of docs/architecture.md, read from the package's own source."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "brainfm_monai"
ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / PACKAGE
MODULES = sorted(SOURCE.rglob("*.py"))
MAXIMUM_LINES = 300
FORBIDDEN_NAMES = {"utils", "common", "helpers", "constants", "base"}

TABLES = {"anatomy", "tasks"}
# room -> the rooms it may import; a room that is not named here has no place in the house yet
MAY_IMPORT: dict[str, set[str]] = {
    "anatomy": set(),
    "tasks": {"anatomy"},
    "functional": set(),
    "io": set(),
    "surfaces": {"functional"},
    "synthesis": TABLES | {"functional"},
    "networks": set(TABLES),
    "weights": TABLES | {"networks"},
    "losses": TABLES | {"functional"},
    "metrics": TABLES | {"functional"},
    "transforms": TABLES | {"functional", "synthesis"},
    "engines": TABLES | {"synthesis", "losses", "inferers", "networks"},
    "handlers": TABLES | {"slices", "losses", "metrics"},
    "inferers": TABLES | {"networks"},
    "outputs": TABLES | {"functional", "surfaces", "transforms"},
    "slices": TABLES | {"functional"},
    "report": TABLES | {"outputs", "slices", "surfaces"},
    "preview": TABLES | {"slices", "synthesis", "data"},
    "prediction": TABLES | {"transforms", "outputs", "report"},
    "data": TABLES | {"functional", "synthesis", "transforms"},
    "evaluation": TABLES
    | {"surfaces", "report", "functional", "synthesis", "metrics", "outputs", "data", "transforms"},
    "annotation": TABLES | {"networks", "weights", "transforms", "data"},
    "__init__": TABLES | {"prediction"},
    "__main__": {"cli"},
}
for _room in set(MAY_IMPORT) - TABLES - {"functional", "io", "__main__"}:
    MAY_IMPORT[_room] |= {"io"}  # files and errors: every room but the tables and the formulas
MAY_IMPORT["cli"] = set(MAY_IMPORT) - {"__main__"}

# what only extras bring: the package itself has to start without
OPTIONAL = [
    "nilearn",
    "pandas",
    "edt",
    "skimage",
    "scipy",
    "sklearn",
    "igl",
    "tensorboard",
    "tqdm",
]
OPTIONAL += ["distributed", "onnx", "onnxruntime", "onnxscript", "monailabel", "jsonschema"]
OPTIONAL_ROOMS = {
    "data",
    "evaluation",
    "outputs",
    "prediction",
    "preview",
    "report",
    "surfaces",
}  # the extras prepare and report

DRAWS = {
    "rand",
    "randn",
    "randint",
    "randperm",
    "normal",
    "bernoulli",
    "multinomial",
    "poisson",
    "rand_like",
    "randn_like",
}
DRAWS |= {"randint_like", "random_", "uniform_", "bernoulli_", "exponential_", "log_normal_"}
SEEDED = ("random.Random", "np.random.default_rng")
HOST_SYNCHRONISATION = {"item", "tolist", "cpu", "numpy", "nonzero", "unique", "print"}


def room_of(path: Path) -> str:
    """First part of a module's path inside the package: the room that it belongs to."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def identify(path: Path) -> str:
    return str(path.relative_to(SOURCE))


def imported_modules(path: Path) -> Iterator[str]:
    """Full names of everything a file imports, at the top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise AssertionError(
                    f"{identify(path)}, line {node.lineno}: imports name the whole module, not a relative one"
                )
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imported_rooms(path: Path) -> set[str]:
    """Rooms of this package that a file imports."""
    names = {name.split(".")[1] for name in imported_modules(path) if name.startswith(f"{PACKAGE}.")}
    exported_at_the_top = {"TASKS", "Protocol", "Structure", "Task", "TaskLayout", "__version__"}
    return {"__init__" if name in exported_at_the_top else name for name in names}


def called_attributes(path: Path) -> Iterator[tuple[str, int]]:
    """Dotted names of everything a file calls or refers to by attribute, with the line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            yield ast.unparse(node), node.lineno
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield node.func.id, node.lineno


def test_the_package_is_read() -> None:
    assert {"anatomy", "tasks"} <= {room_of(path) for path in MODULES}


@pytest.mark.parametrize("path", MODULES, ids=identify)
def test_imports_follow_the_directions(path: Path) -> None:
    room = room_of(path)
    assert room in MAY_IMPORT, f"{identify(path)}: room '{room}' has no place in MAY_IMPORT and docs/architecture.md"
    wrong = imported_rooms(path) - MAY_IMPORT[room] - {room}
    assert not wrong, f"{identify(path)}: '{room}' may import {sorted(MAY_IMPORT[room])}, found {sorted(wrong)}"


def test_the_directions_have_no_circle() -> None:
    left = dict(MAY_IMPORT)
    while ready := [room for room, needs in left.items() if not needs & set(left)]:
        for room in ready:
            del left[room]
    assert not left


@pytest.mark.parametrize("room", ["networks", "losses", "metrics"])
def test_what_is_learned_does_not_know_the_generator(room: str) -> None:
    reached: set[str] = set()
    waiting = {room}
    while waiting:
        reached |= waiting
        waiting = set().union(*(MAY_IMPORT[name] for name in waiting)) - reached
    assert "synthesis" not in reached


@pytest.mark.parametrize("path", [path for path in MODULES if room_of(path) == "functional"], ids=identify)
def test_functional_imports_torch_alone(path: Path) -> None:
    outside = {name.split(".")[0] for name in imported_modules(path)} - sys.stdlib_module_names
    assert outside <= {"torch", PACKAGE}


@pytest.mark.parametrize("path", [*MODULES, *sorted((ROOT / "benchmarks").rglob("*.py"))], ids=lambda path: path.name)
def test_modules_are_short_and_named_for_their_job(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAXIMUM_LINES, f"{path.name}: a module has at most {MAXIMUM_LINES} lines, found {lines}"
    assert not FORBIDDEN_NAMES & {path.stem, path.parent.name}


def is_defined(dotted: str) -> bool:
    """Whether a name such as ``brainfm_monai.io.files.write_text`` leads to a module, or to a name in its text."""
    place, names = ROOT / "src", dotted.split(".")
    while names and (place / names[0]).is_dir():
        place /= names.pop(0)
    if names and (place / f"{names[0]}.py").is_file():
        text = (place / f"{names.pop(0)}.py").read_text(encoding="utf-8")
    else:
        text = (place / "__init__.py").read_text(encoding="utf-8")
    return all(re.search(rf"\b{name}\b", text) for name in names[:1])


@pytest.mark.parametrize("folder", ["src", "bundle", "docs", "monailabel_app", "benchmarks", "packaging"])
def test_names_of_the_package_in_texts_and_configs_exist(folder: str) -> None:
    texts = [path for path in (ROOT / folder).rglob("*") if path.suffix in {".py", ".json", ".md", ".html", ".sh"}]
    for path in texts:
        for dotted in set(re.findall(rf"\b{PACKAGE}(?:\.[A-Za-z_]\w*)+\b", path.read_text(encoding="utf-8"))):
            if not dotted.endswith((".py", ".tsv", ".json", ".md")):
                assert is_defined(dotted), f"{path.relative_to(ROOT)}: {dotted}"


@pytest.mark.parametrize("path", MODULES, ids=identify)
def test_the_package_does_not_print(path: Path) -> None:
    assert not [line for name, line in called_attributes(path) if name == "print"]


@pytest.mark.parametrize("path", [path for path in MODULES if identify(path) != "synthesis/sampling.py"], ids=identify)
def test_numbers_are_drawn_in_one_place(path: Path) -> None:
    drawn = []
    for name, line in called_attributes(path):
        parts = name.split(".")
        if room_of(path) == "data" and name.startswith(SEEDED):
            continue  # a split of subjects or the demo's noise, from a generator of its own with a seed in the call
        from_library = parts[0] in {"torch", "np", "numpy"} and (parts[-1] in DRAWS or "random" in parts[1:-1])
        # seeding a generator of one's own is right, seeding the global ones is not
        from_library |= name in {"torch.manual_seed", "torch.seed"} or parts[0] == "random"
        if from_library or (parts[-1].endswith("_") and parts[-1] in DRAWS):
            drawn.append(f"line {line}: {name}")
    assert not drawn, f"{identify(path)}: numbers are drawn in synthesis.sampling alone, found {drawn}"


PURE = [
    p
    for p in MODULES
    if room_of(p) == "functional" or (room_of(p) == "synthesis" and identify(p) != "synthesis/sampling.py")
]


@pytest.mark.parametrize("path", PURE, ids=identify)
def test_rendering_does_not_wait_for_the_device(path: Path) -> None:
    waits = [
        f"line {line}: {name}" for name, line in called_attributes(path) if name.split(".")[-1] in HOST_SYNCHRONISATION
    ]
    assert not waits, f"{identify(path)}: no host synchronisation here, found {waits}"


def run_python(code: str) -> str:
    """Standard output of a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_package_brings_no_optional_library() -> None:
    code = f"import sys, torch\nbefore = set(sys.modules)\nimport {PACKAGE}\nprint(*(set(sys.modules) - before))"
    loaded = {name.split(".")[0] for name in run_python(code).split()}  # torch itself looks for tqdm
    assert PACKAGE in loaded
    assert not loaded & set(OPTIONAL)
    assert "itk" not in loaded


def test_the_command_starts_without_the_slow_libraries() -> None:
    slow = {"torch", "monai", "matplotlib", "pandas", "jinja2", "itk"}
    loaded = run_python("import sys, brainfm_monai.cli\nprint(*sys.modules)").split()
    assert not slow & set(loaded)


def test_the_other_rooms_start_without_the_extras() -> None:
    names = [identify(path).removesuffix(".py").replace("/", ".") for path in MODULES]
    core = [n for n in names if n.split(".")[0] not in OPTIONAL_ROOMS and not n.endswith(("__init__", "__main__"))]
    code = "\n".join(
        [
            "import sys, importlib",
            f"for name in {OPTIONAL!r}: sys.modules[name] = None",
            f"for name in {core!r}: importlib.import_module('{PACKAGE}.' + name)",
            f"print(len({core!r}))",
        ]
    )
    assert int(run_python(code)) == len(core) > 2
