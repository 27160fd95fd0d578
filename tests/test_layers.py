"""Imports go only down, and the two mapped folders import under one name only."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


def test_import_contracts_of_pyproject_hold():
    # In a process of its own: it sets logging up anew, which closes other libraries' handlers and with
    # absl's the stderr that pytest captures.
    done = run_python(
        "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("folder", ["models", "pallas_kernels"])
def test_mapped_folder_imports_only_through_the_package(folder):
    bare = run_python(f"import {folder}.x")
    assert bare.returncode != 0
    assert f"ImportError: import qjax.{folder}" in bare.stderr
    inside = run_python(f"import qjax.{folder} as m; print(m.__name__, m.__file__)")
    name, file = inside.stdout.split()
    assert name == f"qjax.{folder}"
    assert Path(file).resolve() == ROOT / folder / "__init__.py"


def test_importing_qjax_leaves_jax_uninitialized_and_flax_out():
    code = (
        "import sys, qjax.quantization, qjax.ops; from jax._src import xla_bridge;"
        "print(xla_bridge.backends_are_initialized(), 'flax' in sys.modules)"
    )
    assert run_python(code).stdout.split() == ["False", "False"]
