"""Full compilation of kernels without a GPU: registers, spills and serialized wgmma.

XLA's CUDA compiler runs in a subprocess against a described GPU. That needs the `aot` extra: the CUDA plugin,
ptxas and their libraries, but no driver.
"""

import contextlib
import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
from jax.experimental.mosaic.gpu import utils as mosaic_utils

CAPABILITIES = ("8.0", "8.6", "8.9", "9.0")
"""Compute capabilities of the GPUs that kernels can be compiled for."""

SEPARATOR = "--- end of function ---\n"

_MODULES = ("jax_cuda13_plugin", "jax_plugins.xla_cuda13", "nvidia.cu13", "flatbuffers")


@dataclasses.dataclass(frozen=True)
class PtxasReport:
    """What ptxas says about one kernel.

    Attributes:
        kernel: Name of the entry function.
        registers: Registers per thread at entry.
        spill_bytes: Bytes of spill stores and loads.
        stack_bytes: Bytes of stack frame (local arrays), besides spills.
        serialized_wgmma: ptxas' notes that wgmma pipelines were serialized (C7510 and later), none if all is well.
    """

    kernel: str
    registers: int
    spill_bytes: int
    stack_bytes: int
    serialized_wgmma: tuple[str, ...]

    def check(self) -> None:
        """Asserts that nothing spills and that no wgmma is serialized."""
        assert not self.spill_bytes, f"{self.kernel} spills {self.spill_bytes} bytes: {self}"
        assert not self.serialized_wgmma, f"{self.kernel} serializes wgmma: {self.serialized_wgmma}"


def ptxas_available() -> bool:
    """Whether the `aot` extra is installed."""
    return not _missing()


def _missing() -> list[str]:
    def found(name: str) -> bool:
        try:
            return importlib.util.find_spec(name) is not None
        except ModuleNotFoundError:
            return False

    return [name for name in _MODULES if not found(name)]


def ptxas_reports(
    kernels: Sequence[tuple[Callable, Sequence[jax.Array | jax.ShapeDtypeStruct]]],
    *,
    capability: str = "9.0",
    timeout: float = 600,
) -> list[list[PtxasReport]]:
    """Compiles functions for a GPU and reports each one's kernels.

    Args:
        kernels: Pairs of a function of arrays and its arguments (arrays or shape structs).
        capability: The GPU's compute capability, one of `CAPABILITIES`: an A100's, an A10's, an L4's or an H200's.
        timeout: Seconds for all of them together.

    Returns:
        For each function, one report for each Mosaic GPU kernel in it.

    Raises:
        ModuleNotFoundError: If the `aot` extra is missing.
        RuntimeError: If the compiler fails; the message ends with its output.
        ValueError: If the compute capability is another.
    """
    if capability not in CAPABILITIES:
        raise ValueError(
            f"ptxas_reports: capability must be one of {CAPABILITIES}; found {capability!r}"
        )
    if missing := _missing():
        raise ModuleNotFoundError(
            f"compiling without a GPU needs {', '.join(missing)}: pip install 'qjax[aot]'"
        )
    with tempfile.TemporaryDirectory() as folder:
        for i, (fn, args) in enumerate(kernels):
            with _lowering_for(capability):
                exported = jax.export.export(jax.jit(fn), platforms=["cuda"])(*args)
            Path(folder, f"{i}.export").write_bytes(exported.serialize())
        result = subprocess.run(
            [
                *(sys.executable, "-m", "qjax.testing._ptxas_worker"),
                *(folder, str(len(kernels)), capability),
            ],
            env=_environment(),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if result.returncode:
            raise RuntimeError(
                f"the GPU compiler failed:\n{result.stdout[-4000:]}\n{result.stderr[-4000:]}"
            )
    return [parse_ptxas(part) for part in result.stdout.split(SEPARATOR)[:-1]]


@contextlib.contextmanager
def _lowering_for(capability: str) -> Iterator[None]:
    """Without a GPU Mosaic GPU lowers for compute capability 9.0, whatever is compiled afterwards."""
    major, minor = capability.split(".")
    old = mosaic_utils._infer_arch
    mosaic_utils._infer_arch = lambda: (int(major), int(minor))
    try:
        yield
    finally:
        mosaic_utils._infer_arch = old


def _environment() -> dict[str, str]:
    # ptxas is taken from PATH first, where an older one (before 13.3) may miscompile register operands.
    toolkit = importlib.util.find_spec("nvidia.cu13")
    folders = toolkit.submodule_search_locations if toolkit else None
    binaries = [str(Path(folder) / "bin") for folder in folders or ()]
    root = str(Path(__file__).parents[2])
    return os.environ | {
        "PATH": os.pathsep.join([*binaries, os.environ.get("PATH", "")]),
        "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
        "JAX_PLATFORMS": "cpu",
        "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "MOSAIC_GPU_DUMP_PTXAS": "1",
    }


def parse_ptxas(text: str) -> list[PtxasReport]:
    """The reports in ptxas' verbose output."""
    reports = []
    for run in text.split("Compile time")[:-1]:  # warnings come before their kernel's name
        properties = run.partition("Function properties")[2]
        name = re.search(r"entry function '(\w+?)(?:_mosaic_gpu_kernel)?'", run)
        assert name, f"ptxas names no entry function in:\n{run}"

        def number(pattern: str, properties: str = properties) -> int:
            return sum(int(x) for x in re.findall(pattern, properties))

        reports.append(
            PtxasReport(
                kernel=name[1],
                registers=number(r"Used (\d+) registers"),
                spill_bytes=number(r"(\d+) bytes spill"),
                stack_bytes=number(r"(\d+) bytes stack frame"),
                serialized_wgmma=tuple(re.findall(r"\(C75\d\d\)[^\n]*wgmma[^\n]*", run)),
            )
        )
    return reports
