"""The architecture holds: imports point down, siblings do not know each other, and --help needs no JAX."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "rljax"

LEVELS = [
    {"config"},
    {
        "config_file",
        "jsonl",
        "types",
        "mesh",
        "hosts",
        "costs",
        "hardware",
        "hlo",
        "metrics",
        "run_log",
        "tokenizer",
        "watchdog",
    },
    {"models", "checkpoint"},
    {"data", "rewards", "sampling", "rl"},
    {"policy", "footprint"},
    {"evaluate", "sft", "sample", "export", "steptime", "aot"},
    {"train", "plan", "scaling"},
    {"plan_page", "compiled_plan"},
    {"cli"},
]
"""From the bottom up. A module may import those below it, and its own parts."""

INSIDE = {
    "rljax.tokenizer": set(),
    "rljax.scaling": {"config", "config_file", "costs"},  # reads files, never live arrays
}
"""Stricter than the levels: what of rljax these may import at all, None for anything below."""


def level(part: str) -> int:
    return next(i for i, parts in enumerate(LEVELS) if part in parts)


def imports_of(file: Path) -> set[str]:
    """Names under rljax imported anywhere in the file, as their first part: {"config", "models"}."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("rljax.")}
    return found


def upward_imports(part: str, imported: set[str]) -> set[str]:
    return {other for other in imported - {part} if level(other) >= level(part)}


FILES = sorted(file for file in PACKAGE.rglob("*.py") if file.parent != PACKAGE or file.stem != "__init__")


def test_there_are_files() -> None:
    assert len(FILES) > 20


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_point_down(file: Path) -> None:
    part = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    bad = upward_imports(part, imports_of(file))
    assert not bad, f"{file.relative_to(PACKAGE)} is on level {level(part)} ({part}) and imports {sorted(bad)}"


@pytest.mark.parametrize("part", sorted(name.removeprefix("rljax.") for name in INSIDE))
def test_stricter_parts(part: str) -> None:
    allowed = INSIDE[f"rljax.{part}"] | {"config", part}
    for file in FILES:
        if file.relative_to(PACKAGE).parts[0].removesuffix(".py") == part:
            assert imports_of(file) <= allowed, file


def test_an_upward_import_is_caught() -> None:
    assert upward_imports("rl", {"config", "sampling"}) == {"sampling"}  # siblings
    assert upward_imports("models", {"train"}) == {"train"}
    assert not upward_imports("train", {"rl", "models", "config"})


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["train", "--help"],
        ["plan", "--help"],
        ["convert", "--help"],
        ["sweep", "--help"],
        ["data", "--help"],
        ["data", "inspect", "--help"],
    ],
)
def test_help_imports_no_jax(arguments: list[str]) -> None:
    code = (
        "import sys; from rljax.cli import main; code = main(sys.argv[1:]); "
        "heavy = {'jax', 'flax', 'transformers', 'orbax', 'grain', 'scipy', 'torch', 'pyarrow'} & set(sys.modules); "
        "assert code == 0 and not heavy, (code, heavy)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout
