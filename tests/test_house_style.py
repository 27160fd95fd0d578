"""Rules about whole files that no linter has."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("qjax", "models", "pallas_kernels", "scripts", "tests")
FILES = sorted(
    file
    for folder in FOLDERS
    for file in (ROOT / folder).rglob("*.py")
    if not file.name.startswith(".")
)
NEVER_IMPORTED = {"torch", "transformers"}


def relative(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def imported(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("file", FILES, ids=relative)
def test_file_is_short_documented_and_quiet(file):
    source, folder = file.read_text(), relative(file).split("/")[0]
    tree = ast.parse(source)
    assert ast.get_docstring(tree), "the module has no docstring"
    assert len(source.splitlines()) <= (600 if folder == "pallas_kernels" else 500)
    if folder != "pallas_kernels":
        functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
        assert not [f.name for f in functions if (f.end_lineno or 0) - f.lineno >= 100]
    if "tests/references/" in relative(file):  # these scripts run in an environment of their own
        return
    assert not imported(tree) & NEVER_IMPORTED
    calls = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    prints = [name.lineno for name in calls if isinstance(name, ast.Name) and name.id == "print"]
    # The one worker process of the package speaks to its parent over stdout.
    assert not prints or folder in ("scripts", "tests") or file.name.endswith("_worker.py")


def test_no_module_is_named_after_nothing():
    assert not {file.stem for file in FILES} & {"utils", "util", "helpers", "common", "misc"}
