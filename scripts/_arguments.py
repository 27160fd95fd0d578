"""Command-line arguments and set-up that scripts which run models share."""

import argparse
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import jax

from qjax import Sharding, checkpoint, make_mesh
from qjax.recipe import KV_CACHE_FORMATS, SCHEMES

CACHE_BYTES = 4 * 2**30


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """--model, --recipe, --dtype, --mesh, --kv-cache, --implementation, --quiet."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", help="folder, hub id or GGUF file (default: SmolLM2-135M-Instruct)"
    )
    group.add_argument(
        "--recipe", help=f"quantize while loading: bf16 or one of {', '.join(SCHEMES)}"
    )
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of activations and plain weights (default: bfloat16 on a GPU, float32 on a CPU)",
    )
    group.add_argument(
        "--mesh",
        metavar="AXIS=SIZE,...",
        help="devices to spread over, axes data, expert and tensor, as in tensor=4,data=2; a machine "
        "without a GPU plays that many devices",
    )
    group.add_argument(
        "--kv-cache",
        choices=list(KV_CACHE_FORMATS),
        help="storage of keys and values (default: what the checkpoint says, or --dtype)",
    )
    group.add_argument(
        "--implementation",
        choices=("pallas_mosaic_gpu", "xla"),
        help="of the ops (default: the kernel where there is one, else XLA)",
    )
    group.add_argument("--quiet", action="store_true", help="no progress bars and statistics")


def model_path(args: argparse.Namespace) -> str | Path:
    """What --model names, or the default model."""
    return checkpoint.default_model_path() if args.model is None else args.model


def dtype(args: argparse.Namespace) -> str:
    """--dtype, or the one that suits the device."""
    return args.dtype or ("bfloat16" if jax.default_backend() == "gpu" else "float32")


def sharding(args: argparse.Namespace) -> Sharding:
    """What --mesh describes; to be called before jax sees its devices."""
    if args.mesh is None:
        return Sharding()
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        count = math.prod(int(size) for size in re.findall(r"=\s*(\d+)", args.mesh))
        jax.config.update("jax_num_cpu_devices", max(1, min(count, 64)))
    return Sharding(make_mesh(args.mesh))


def load(args: argparse.Namespace) -> checkpoint.LoadedModel:
    """The model that the arguments describe."""
    mesh = sharding(args)
    return checkpoint.load(
        model_path(args),
        recipe=args.recipe,
        dtype=dtype(args),
        sharding=mesh,
        kv_cache=args.kv_cache,
        implementation=args.implementation,
        progress=not args.quiet,
    )


def use_compilation_cache() -> None:
    """Keeps compiled functions in $XDG_CACHE_HOME/qjax/xla (or ~/.cache/qjax/xla), up to 4 GiB.

    JAX_COMPILATION_CACHE_DIR chooses another folder.
    """
    if jax.config.jax_compilation_cache_dir is not None:
        return
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    jax.config.update("jax_compilation_cache_dir", str(Path(home) / "qjax" / "xla"))
    # With a bound jax locks the folder, so that two scripts may run at a time.
    jax.config.update("jax_compilation_cache_max_size", CACHE_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def run_main(name: str, main: Callable[[], None]) -> int:
    """Runs a script's body: a ValueError is the user's to read, in one line and with exit code 2."""
    use_compilation_cache()
    try:
        main()
    except ValueError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    return 0
