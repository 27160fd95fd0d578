"""What the built wheel holds: every module of the tree, once, and nothing else."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = {"qjax": "qjax", "models": "qjax/models", "pallas_kernels": "qjax/pallas_kernels"}
SHIPPED = {".py", ".json", ".txtpb", ".typed"}


def shipped_files() -> set[str]:
    """Paths inside the wheel that the tree asks for."""
    paths = set()
    for folder, target in SOURCES.items():
        for file in (ROOT / folder).rglob("*"):  # does not descend into the two links
            relative = file.relative_to(ROOT / folder)
            if file.suffix in SHIPPED and relative.parts[0] not in ("models", "pallas_kernels"):
                paths.add(f"{target}/{relative.as_posix()}")
    return paths


def build(kind: str, tree: Path, out: Path) -> Path:
    """Builds an sdist or a wheel of the tree with the pinned setuptools, without a network."""
    code = f"from setuptools import build_meta as b; print(b.build_{kind}({str(out)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tree, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """A copy, because setuptools writes beside its sources."""
    copy = tmp_path_factory.mktemp("build") / "tree"
    copy.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    for folder in SOURCES:
        shutil.copytree(
            ROOT / folder,
            copy / folder,
            symlinks=True,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    return copy


def package_files(wheel: Path) -> set[str]:
    names = zipfile.ZipFile(wheel).namelist()
    assert len(names) == len(set(names))
    assert {name.split("/")[0] for name in names} == {"qjax", "qjax-0.1.0.dist-info"}
    return {name for name in names if name.startswith("qjax/")}


def test_wheel_holds_every_module_and_nothing_else(tree, tmp_path):
    assert package_files(build("wheel", tree, tmp_path)) == shipped_files()


def test_wheel_built_from_the_sdist_is_the_same(tree, tmp_path):
    with tarfile.open(build("sdist", tree, tmp_path)) as archive:
        archive.extractall(tmp_path, filter="data")
    (unpacked,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert package_files(build("wheel", unpacked, tmp_path)) == shipped_files()


def test_installed_wheel_imports_both_mapped_packages(tree, tmp_path):
    zipfile.ZipFile(build("wheel", tree, tmp_path)).extractall(tmp_path / "site")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r});"
        "import qjax, qjax.models, qjax.pallas_kernels;"
        "print(qjax.__file__, qjax.models.__file__, qjax.pallas_kernels.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert all(file.startswith(str(tmp_path)) for file in done.stdout.split())
