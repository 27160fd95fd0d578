"""Measure a model: perplexity on a text, distance from the unquantized model, or from stored logits.

    uv run scripts/evaluate.py --recipe W4A16
    uv run scripts/evaluate.py --model DIR --baseline OTHER_DIR --kv-cache fp8_e4m3
    uv run scripts/evaluate.py --model DIR --reference DIR/reference.npz --key logits

The text (by default the help topics that come with Python, in English) is cut into windows that see
nothing before them. With --recipe, or --baseline, the mean KL divergence from the unquantized model
(or the baseline) and the fraction of positions with the same first choice are measured too.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import _arguments
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track

from qjax import checkpoint, evaluation
from qjax.nn import CausalLM, ExpertLinear, Linear, modules
from qjax.recipe import KVCacheFormat
from qjax.tokenizer import Tokenizer


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    _arguments.add_model_arguments(parser)
    parser.add_argument("--text", type=Path, help="UTF-8 text (default: Python's help topics)")
    parser.add_argument("--window", type=int, default=512, help="tokens per window (%(default)s)")
    parser.add_argument(
        "--max-tokens", type=int, default=8192, help="tokens of the text used (%(default)s)"
    )
    parser.add_argument("--baseline", help="model to compare with, loaded unquantized")
    parser.add_argument("--reference", type=Path, help="npz file with input_ids and logits")
    parser.add_argument("--key", default="logits", help="array of --reference (%(default)s)")
    parser.add_argument(
        "--float-activations",
        action="store_true",
        help="leave out the activation quantization of recipe or checkpoint",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(argv)


def without_activation_quantization(model: CausalLM) -> None:
    for _, module in modules(model):
        if isinstance(module, Linear | ExpertLinear):
            module.activation_format = None


def cache_format(args: argparse.Namespace, loaded: checkpoint.LoadedModel) -> KVCacheFormat | None:
    """The cache that the run goes through: one that was asked for, or that the checkpoint asks for."""
    if args.kv_cache or not args.float_activations:
        return loaded.recipe.kv_cache
    return None


def compare_logits(args: argparse.Namespace) -> dict:
    try:
        with np.load(args.reference) as file:
            missing = {"input_ids", args.key} - set(file.files)
            if missing:
                raise ValueError(f"{args.reference}: has no {sorted(missing)}; it has {file.files}")
            ids, reference = file["input_ids"], file[args.key]
    except OSError as error:
        raise ValueError(f"{args.reference}: {error}") from error
    loaded = _arguments.load(args)
    if args.float_activations:
        without_activation_quantization(loaded.model)
    run = evaluation.forward(loaded.model, cache_format(args, loaded))
    logits = np.asarray(run(jnp.asarray(ids, jnp.int32)))
    return dataclasses.asdict(evaluation.logits_error(logits, reference))


def read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: no readable UTF-8 text: {error}") from error


def score_text(args: argparse.Namespace) -> dict:
    loaded = _arguments.load(args)
    if args.float_activations:
        without_activation_quantization(loaded.model)
    baseline = None
    if args.baseline or args.recipe:
        chosen = {"model": args.baseline or args.model, "recipe": "bf16"}
        baseline = _arguments.load(argparse.Namespace(**{**vars(args), **chosen})).model
    text = evaluation.default_text() if args.text is None else read_text(args.text)
    # A few characters per token: what lies far behind the last window need not be tokenized.
    ids = Tokenizer.load(loaded.tokenizer).encode(text[: 16 * args.max_tokens])
    windows = evaluation.windows(ids, args.window, args.max_tokens)

    def progress(rows: Iterable[np.ndarray]) -> Iterable[np.ndarray]:
        return track(
            rows, "evaluating", console=Console(stderr=True), transient=True, disable=args.quiet
        )

    score = evaluation.score_text(
        loaded.model,
        windows,
        baseline=baseline,
        kv_cache=cache_format(args, loaded),
        progress=progress,
    )
    return {**dataclasses.asdict(score), "perplexity": score.perplexity}


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    result = compare_logits(args) if args.reference else score_text(args)
    result = {k: v for k, v in result.items() if v is not None}
    if args.json:
        print(json.dumps({"model": str(args.model or "default"), "recipe": args.recipe, **result}))
    else:
        print("  ".join(f"{k} {v:.6g}" for k, v in result.items()))


if __name__ == "__main__":
    sys.exit(_arguments.run_main("evaluate", main))
