"""Quantize a model and write it as a Hugging Face folder.

    uv run scripts/quantize.py --model IN --recipe W4A16 --out DIR
    uv run scripts/quantize.py --model IN --recipe W4A16 --out DIR --method gptq --text FILE

IN is a Hugging Face folder, a hub id or a GGUF file (by default the packaged SmolLM2-135M-Instruct).
Rounding to nearest (rtn) quantizes each weight as it is loaded, so that the unquantized model is never
in memory. The other methods load it whole and quantize layer by layer on a calibration text, by default
the end of the help topics that come with Python. The folder loads in qjax (bit for bit what was quantized
here), in vLLM, in SGLang and in transformers.
"""

import argparse
import contextlib
import dataclasses
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from qjax import calibration, checkpoint, evaluation, nn
from qjax.recipe import KV_CACHE_FORMATS, SCHEMES, recipe
from qjax.tokenizer import Tokenizer

METHODS: dict[str, Callable[[argparse.Namespace], calibration.Method]] = {
    "gptq": lambda args: calibration.GPTQ(
        actorder=None if args.actorder == "none" else args.actorder
    ),
    "awq": lambda args: calibration.AWQ(),
    "autoround": lambda args: calibration.AutoRound(steps=args.steps),
}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="folder, hub id or GGUF file")
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
    parser.add_argument(
        "--kv-cache",
        choices=list(KV_CACHE_FORMATS),
        help="stated in the config; its scales are calibrated, whatever the method",
    )
    parser.add_argument("--method", choices=("rtn", *METHODS), default="rtn", help="(%(default)s)")
    parser.add_argument("--text", type=Path, help="UTF-8 calibration text")
    parser.add_argument(
        "--calibration-tokens", type=int, default=65536, help="at most (%(default)s)"
    )
    parser.add_argument("--window", type=int, default=512, help="tokens per window (%(default)s)")
    parser.add_argument(
        "--actorder",
        choices=("none", "weight", "group"),
        default="weight",
        help="gptq: column order",
    )
    parser.add_argument("--steps", type=int, default=200, help="autoround: steps per layer")
    parser.add_argument("--max-shard-gb", type=float, default=5.0, help="bound of one file")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing folder")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    return parser.parse_args(argv)


def quantize(args: argparse.Namespace) -> checkpoint.LoadedModel:
    """The model, quantized while it loads or layer by layer, and its KV scales."""
    chosen = recipe(args.recipe, ignore=tuple(args.ignore), kv_cache=args.kv_cache)
    first = chosen if args.method == "rtn" else "bf16"
    loaded = checkpoint.load(args.model, recipe=first, dtype=args.dtype, progress=not args.quiet)
    windows = np.zeros((0, args.window), np.int32)
    calibrated_cache = chosen.kv_cache is not None and chosen.kv_cache.calibrated
    if args.method != "rtn" or calibrated_cache:
        windows = calibration_windows(args, loaded.tokenizer)
    if args.method != "rtn":
        specs = nn.resolve(chosen, loaded.model)
        with progress_bar(args) as on_layer:
            model, errors = calibration.calibrate(
                loaded.model, specs, windows, METHODS[args.method](args), on_layer=on_layer
            )
        if not args.quiet:
            print_errors(errors)
        loaded = dataclasses.replace(loaded, model=model, recipe=chosen)
    if calibrated_cache:
        assert chosen.kv_cache is not None
        calibration.calibrate_kv_scales(loaded.model, windows, chosen.kv_cache)
    return loaded


def calibration_windows(args: argparse.Namespace, tokenizer: Path) -> np.ndarray:
    """Windows from the end of the text: an evaluation on its beginning sees other text."""
    try:
        text = evaluation.default_text() if args.text is None else args.text.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{args.text}: no readable UTF-8 text: {error}") from error
    ids = Tokenizer.load(tokenizer).encode(text)[-args.calibration_tokens :]
    return evaluation.windows(ids, args.window)


@contextlib.contextmanager
def progress_bar(args: argparse.Namespace) -> Iterator[Callable]:
    columns = (
        TextColumn(args.method),
        BarColumn(),
        TextColumn("layer {task.completed}/{task.total}"),
        TextColumn("output error {task.fields[error]:.4f}, to nearest {task.fields[nearest]:.4f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=args.quiet) as bar:
        task = bar.add_task(args.method, total=None, error=math.nan, nearest=math.nan)

        def on_layer(done: int, total: int, errors: list[calibration.ModuleError]) -> None:
            bar.update(task, completed=done, total=total)
            if errors:
                error = statistics.mean(e.output_error for e in errors)
                nearest = statistics.mean(e.nearest_error for e in errors)
                bar.update(task, error=error, nearest=nearest)

        yield on_layer


def print_errors(errors: list[calibration.ModuleError]) -> None:
    """The relative output error of each kind of module, over all layers."""
    kinds: dict[str, list[calibration.ModuleError]] = {}
    for e in errors:
        kinds.setdefault(".".join(e.path.split(".")[-2:]), []).append(e)
    table = Table("module", "output error", "rounded to nearest")
    for kind, found in kinds.items():
        mean = statistics.mean(e.output_error for e in found)
        table.add_row(kind, f"{mean:.4f}", f"{statistics.mean(e.nearest_error for e in found):.4f}")
    Console(stderr=True).print(table)


def unquantized_bytes(model: nn.CausalLM) -> int:
    """What the model's parameters would take in its own dtype."""
    values = (
        v.get_value()
        for _, v in nnx.to_flat_state(nnx.state(model, nnx.Any(nnx.Param, nn.QuantizedParam)))
    )
    return sum(math.prod(v.shape) * jnp.dtype(model.dtype).itemsize for v in values)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    args.model = args.model or checkpoint.default_model_path()
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
