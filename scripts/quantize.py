"""Quantize a model and write it as a Hugging Face folder.

    uv run scripts/quantize.py --model IN --recipe W4A16 --out DIR

IN is a Hugging Face folder, a hub id or a GGUF file. Each weight is quantized as it is loaded, so the
unquantized model is never in memory. The folder loads in qjax (bit for bit what was quantized here), in
vLLM, in SGLang and in transformers.
"""

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
from flax import nnx

from qjax import checkpoint, nn
from qjax.recipe import KV_CACHE_FORMATS, SCHEMES, recipe


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder, hub id or GGUF file")
    parser.add_argument("--recipe", required=True, help=f"one of {', '.join(SCHEMES)}")
    parser.add_argument("--out", required=True, type=Path, help="folder to write")
    parser.add_argument(
        "--format",
        default="compressed-tensors",
        choices=list(checkpoint.EXPORT_FORMATS),
        help="how the folder stores the weights (default: %(default)s)",
    )
    parser.add_argument(
        "--ignore",
        nargs="*",
        default=["lm_head"],
        metavar="MODULE",
        help="modules left alone: paths or re: patterns (default: lm_head)",
    )
    parser.add_argument(
        "--dtype", default="bfloat16", help="of what stays plain (default: bfloat16)"
    )
    parser.add_argument("--kv-cache", choices=list(KV_CACHE_FORMATS), help="stated in the config")
    parser.add_argument("--max-shard-gb", type=float, default=5.0, help="bound of one file")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing folder")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser.parse_args(argv)


def quantize(args: argparse.Namespace) -> checkpoint.LoadedModel:
    """The model, quantized by rounding to nearest while it loads."""
    chosen = recipe(args.recipe, ignore=tuple(args.ignore), kv_cache=args.kv_cache)
    return checkpoint.load(args.model, recipe=chosen, dtype=args.dtype, progress=not args.quiet)


def unquantized_bytes(model: nn.CausalLM) -> int:
    """What the model's parameters would take in its own dtype."""
    values = (
        v.get_value()
        for _, v in nnx.to_flat_state(nnx.state(model, nnx.Any(nnx.Param, nn.QuantizedParam)))
    )
    return sum(math.prod(v.shape) * jnp.dtype(model.dtype).itemsize for v in values)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    started = time.monotonic()
    try:
        loaded = quantize(args)
        folder = checkpoint.export(
            loaded.model,
            args.out,
            format=args.format,
            source=loaded,
            max_shard_bytes=int(args.max_shard_gb * 1e9),
            overwrite=args.overwrite,
            progress=not args.quiet,
        )
    except ValueError as error:
        print(f"quantize: {error}", file=sys.stderr)
        return 2
    before = unquantized_bytes(loaded.model)
    after = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    seconds = time.monotonic() - started
    print(
        f"{args.model} -> {folder}: {args.recipe}, {before / 1e6:.1f} MB as {args.dtype} -> "
        f"{after / 1e6:.1f} MB ({before / after:.2f}x smaller) in {seconds:.1f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
