"""Measures quantization-aware training: what it recovers of rounding's loss, and what a step costs.

    python scripts/bench_qat.py recover --data kjv --out RUNS --records benchmarks/qat.jsonl --plot qat.png
    python scripts/bench_qat.py steps --records benchmarks/qat.jsonl

`recover` fine-tunes the small model through each recipe and, as the control, without one, on the same batches.
The gap that training may close lies between the control rounded to nearest and the control itself. `steps`
times whole optimizer steps over layers of Llama-3.1-8B's shape beside the same steps in bfloat16.
"""

import argparse
import concurrent.futures
import datetime
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import _arguments
import _training_step as training_step
import finetune_qat
import jax
import numpy as np
from rich.console import Console
from rich.table import Table

from qjax import checkpoint, nn, qat
from qjax.models import llama
from qjax.sharding import Sharding
from qjax.tokenizer import Tokenizer

# Learning rates: two bits move a weight only in large steps.
RECIPES = {"none": 2e-4, "W4A16": 2e-4, "MXFP4A16": 2e-4, "int2_1x32": 1e-3}
LLAMA_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 1024,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}
STEP_RECIPES = ("W4A16", "MXFP4A16", "FP8_BLOCK", "W4A8", "fp8_training")


def recover(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A record per recipe: perplexities of the held-out text, and the share of the gap that was recovered."""
    runs = {recipe: args.out / recipe for recipe in ("none", *args.recipes)}
    control = args.out / "control"

    def train(recipe: str) -> None:
        if finished(runs[recipe], args.steps) and (recipe != "none" or control.exists()):
            return
        command = [sys.executable, str(Path(finetune_qat.__file__)), "--recipe", recipe]
        command += ["--out", str(runs[recipe]), "--data", args.data, "--steps", str(args.steps)]
        command += ["--batch", str(args.batch), "--eval-every", str(args.eval_every), "--quiet"]
        command += ["--lr", str(args.lr or RECIPES.get(recipe, RECIPES["none"]))]
        command += ["--model", args.model] if args.model else []
        if recipe == "none":
            command += ["--export", str(control), "--export-format", "f32"]
        if subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode:
            raise SystemExit(f"bench_qat: the run of {recipe} failed")

    with concurrent.futures.ThreadPoolExecutor(args.parallel) as pool:
        list(pool.map(train, runs))
    curves = {r: [json.loads(x) for x in (o / "curve.jsonl").open()] for r, o in runs.items()}
    found = {r: [c for c in curve if "eval_perplexity" in c] for r, curve in curves.items()}
    trained = found["none"][-1]["eval_perplexity"]
    records = []
    for recipe in args.recipes:
        steps = [c for c in curves[recipe] if "loss" in c and not c["compiled"]]
        rounded = perplexity_of(args, control, recipe)
        learned = found[recipe][-1]["eval_perplexity"]
        records.append(
            {
                "benchmark": "qat_recovery",
                "recipe": recipe,
                "data": args.data,
                "steps": args.steps,
                "tokens_per_step": args.batch * 512,
                "untrained": found[recipe][0]["unquantized_perplexity"],
                "untrained_rounded": found[recipe][0]["eval_perplexity"],
                "control": trained,
                "control_rounded": rounded,
                "qat": learned,
                "recovered": (rounded - learned) / (rounded - trained),
                "training_s": sum(c["seconds"] for c in steps),
                "curve": [[c["step"], c["eval_perplexity"]] for c in found[recipe]],
                "control_curve": [[c["step"], c["eval_perplexity"]] for c in found["none"]],
            }
        )
    return records


def finished(run: Path, steps: int) -> bool:
    """Whether an earlier call made all steps of this run, so that it need not be repeated."""
    curve = run / "curve.jsonl"
    lines = [json.loads(x) for x in curve.open()] if curve.exists() else []
    return any(x["step"] == steps and "eval_perplexity" in x for x in lines)


def perplexity_of(args: argparse.Namespace, folder: Path, recipe: str) -> float:
    """Held-out perplexity of a folder's weights rounded to nearest."""
    own = finetune_qat.parse(["--data", args.data, "--recipe", recipe, "--out", "unused"])
    loaded = checkpoint.load(folder, recipe="bf16", dtype="float32", progress=False)
    _, held = finetune_qat.windows(own, Tokenizer.load(loaded.tokenizer))
    layers = len(loaded.model.model.layers)
    chosen = finetune_qat.training_model.chosen_recipe(own, layers)
    assert chosen is not None
    model = qat.convert(qat.prepare(loaded.model, chosen))
    model.model.embed_tokens.dtype = "bfloat16"
    return math.exp(training_step.evaluate(model, held, args.batch))


def plot(records: Sequence[dict[str, Any]], path: Path) -> None:
    """Perplexity over steps of each recipe and of the control, and where rounding leaves the control."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(records), 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, r in zip(np.atleast_1d(figure.subplots(1, len(records))), records, strict=True):
        axes.plot(*zip(*r["control_curve"], strict=True), color="0.4", label="control, bf16")
        axes.plot(*zip(*r["curve"], strict=True), color="tab:blue", label="QAT, quantized")
        axes.axhline(r["control_rounded"], color="tab:red", ls="--", label="control, rounded")
        wide = r["control_rounded"] > 10 * r["control"]
        axes.set(title=r["recipe"], xlabel="step", yscale="log" if wide else "linear")
        axes.legend(fontsize=8)
    figure.axes[0].set_ylabel("held-out perplexity")
    figure.savefig(path, dpi=150)


def steps(args: argparse.Namespace) -> list[dict[str, Any]]:
    """A record per recipe: milliseconds and bytes of a step, as multiples of the bfloat16 step's."""
    measured = {recipe: measure_step(args, recipe) for recipe in (None, *args.step_recipes)}
    plain_ms, plain_bytes = measured[None]
    return [
        {
            "benchmark": "qat_step",
            "recipe": recipe,
            "layers": args.layers,
            "tokens": args.tokens,
            "step_ms": ms,
            "bf16_step_ms": plain_ms,
            "time_ratio": ms / plain_ms,
            "memory_ratio": nbytes / plain_bytes,
        }
        for recipe, (ms, nbytes) in measured.items()
        if recipe is not None
    ]


def measure_step(args: argparse.Namespace, recipe: str | None) -> tuple[float, int]:
    """(milliseconds, bytes) of an optimizer step: float32 masters, bfloat16 products, AdamW.

    "fp8_training" quantizes no weights but multiplies in FP8.
    """
    config = llama.Config.from_hf(LLAMA_8B | {"num_hidden_layers": args.layers})
    model = llama.Model(config, dtype="float32")
    nn.initialize(model, jax.random.key(0))
    options = ["--out", "unused", *(["--remat"] * args.remat)]
    if recipe == "fp8_training":
        options += ["--recipe", "none", "--fp8-training", "e4m3"]
    else:
        options += ["--recipe", recipe or "none"]
    training = finetune_qat.training_model.prepared(finetune_qat.parse(options), model, "bfloat16")
    del model
    state, frozen = training.state, training.frozen
    take: Any = training_step.train_step(
        training.graphdef,
        None,
        training.transform,
        training_step.Objective(remat=args.remat),
        state,
    )
    rows = np.random.default_rng(0).integers(0, 1000, (args.tokens // 2048, 2049), np.int32)
    batch = {"tokens": rows, "counted": np.ones(rows.shape, bool)}
    batch = training_step.put(batch, 1, Sharding())
    compiled = take.lower(state, frozen, None, batch).compile()
    memory = compiled.memory_analysis()
    nbytes = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    times = []
    for _ in range(args.repeat + 2):
        start = time.perf_counter()
        state, metrics = compiled(state, frozen, None, batch)
        jax.block_until_ready(metrics)
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times[2:]), nbytes


def render(records: Sequence[dict[str, Any]]) -> Table:
    """The records as a table, curves left out."""
    table = Table()
    names = [k for k in records[0] if not k.endswith("curve") and k != "benchmark"]
    for name in names:
        table.add_column(name)
    for r in records:
        table.add_row(*(f"{r[n]:.3f}" if isinstance(r[n], float) else str(r[n]) for n in names))
    return table


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("recover")
    one.set_defaults(run=recover)
    one.add_argument("--model", help="folder, hub id or GGUF file (default: SmolLM2-135M-Instruct)")
    one.add_argument("--data", default="kjv", help="as finetune_qat's")
    one.add_argument(
        "--out", type=Path, required=True, help="folder of the runs; finished ones count"
    )
    one.add_argument("--recipes", nargs="+", default=[r for r in RECIPES if r != "none"])
    one.add_argument("--steps", type=int, default=200)
    one.add_argument("--batch", type=int, default=32)
    one.add_argument("--lr", type=float, help="default: each recipe's own")
    one.add_argument("--parallel", type=int, default=1, help="runs that share the GPU")
    one.add_argument("--eval-every", type=int, default=25)
    one.add_argument("--plot", type=Path, help="PNG of the curves")
    two = commands.add_parser("steps")
    two.set_defaults(run=steps, plot=None)
    two.add_argument("--step-recipes", nargs="+", default=STEP_RECIPES)
    two.add_argument("--layers", type=int, default=2)
    two.add_argument("--tokens", type=int, default=8192)
    two.add_argument("--repeat", type=int, default=10)
    two.add_argument("--remat", action="store_true")
    for command in (one, two):
        command.add_argument("--records", type=Path, help="JSON lines file that gets the records")
    args = parser.parse_args(argv)
    root = Path(__file__).parents[1]
    head = ["git", "-C", str(root), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(head, capture_output=True, text=True, check=False).stdout.strip()
    stamp = {
        "date": datetime.date.today().isoformat(),
        "commit": commit or "unknown",
        "gpu": jax.devices()[0].device_kind,
    }
    records = [stamp | r for r in args.run(args)]
    if args.records:
        with args.records.open("a") as file:
            file.writelines(json.dumps(r) + "\n" for r in records)
    if args.plot:
        plot(records, args.plot)
    Console(width=200).print(render(records))


if __name__ == "__main__":
    sys.exit(_arguments.run_main("bench_qat", main))
