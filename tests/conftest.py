"""What every test runs under: 8 virtual CPU devices, strict dtypes and ranks, shapes checked by beartype."""

import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def _wants_gpu(config: pytest.Config) -> bool:
    expression = config.getoption("markexpr")
    return "gpu" in expression and "not gpu" not in expression


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two workers for the whole suite on a CPU; one process for named tests and for a GPU."""
    whole_suite = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    return 2 if whole_suite and not _wants_gpu(config) else 0


def pytest_configure(config: pytest.Config) -> None:
    """Settle the environment (scripts that tests start inherit it), then import jax."""
    assert "jax" not in sys.modules, "jax was imported before its environment was set"
    if not _wants_gpu(config):  # an installed CUDA plugin without its GPU would log errors
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(ROOT / ".pytest_cache" / "jax")
        # With a size limit jax locks the folder: without, a worker may read what another half wrote.
        os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(2**30))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
    os.environ["HF_HUB_OFFLINE"] = "1"

    import jax
    from jaxtyping import install_import_hook

    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    install_import_hook("qjax", "annotation_checks.check_annotations")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip the tests marked gpu, and only those, where jax sees no GPU."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import jax

    if jax.default_backend() != "gpu":
        reason = "needs a GPU: pytest -m gpu" + (
            "" if _wants_gpu(config) else " (this run is on the CPU)"
        )
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def checkpoints_dir() -> Path:
    """Small folders written by the real exporters, kept beside the repository and not in it."""
    folder = ROOT.parent / "shared" / "checkpoints"
    if not folder.is_dir():
        pytest.skip(f"no exporters' checkpoints at {folder}")
    return folder
