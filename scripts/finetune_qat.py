"""Fine-tune a model through the rounding of a recipe, so that it is good once quantized (QAT).

    uv run scripts/finetune_qat.py --recipe W4A16 --data FILE --out RUN --export DIR
    uv run scripts/finetune_qat.py --recipe MXFP4A16 --data CHATS.jsonl --distill 0.5 --out RUN
    uv run scripts/finetune_qat.py --model DIR --recipe stored --lora-rank 16 --data FILE --out RUN

The data is any text (cut into windows of --seq-len), or .jsonl with "text", "messages" (packed whole, the
assistant's words alone count) or "prompt" and "completion"; or "topics", Python's help topics, or "kjv",
the King James Bible (4.2 MB; `uv run --group corpus`). --recipe names a scheme, a format of weights
(int2_1x32), "none" (no quantization: the control), or "stored": the checkpoint's own quantized weights
stay packed and frozen beneath --lora-rank adapters. With another recipe and --lora-rank, adapters are
trained on frozen weights and the sum is rounded. Weights and optimizer are float32, activations --dtype.

RUN gets curve.jsonl (a line per step and evaluation), curve.png and checkpoints. A run that was killed
goes on with --resume exactly as it would have (to the bit on a GPU if XLA_FLAGS has
--xla_gpu_deterministic_ops=true: gradients of embeddings are sums in no fixed order). --export writes the
quantized model as a Hugging Face folder.
"""

import argparse
import contextlib
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import _arguments
import _training_data as training_data
import _training_model as training_model
import _training_step as training_step
import jax.numpy as jnp
from _training_data import Windows
from _training_run import RunFolder, as_numbers, perplexity
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from qjax import Sharding, checkpoint
from qjax.tokenizer import Tokenizer

FREE = ("out", "resume", "export", "export_format", "save_every", "keep", "quiet", "remat")
FREE += ("fsdp", "tensor", "expert", "implementation")
"""Options that a resumed run may change: the curve does not depend on them, but for the order of sums."""


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", help="folder, hub id or GGUF file (default: SmolLM2-135M-Instruct)")
    add("--recipe", default="W4A16", help="scheme, format, none or stored (%(default)s)")
    add("--ignore", nargs="*", default=["lm_head"], help="modules left alone (%(default)s)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="of activations")
    add("--out", type=Path, required=True, help="the run's folder")
    add("--resume", action="store_true", help="go on with the run in --out, if there is one")
    add("--export", type=Path, help="Hugging Face folder to write at the end")
    add("--export-format", choices=list(checkpoint.EXPORT_FORMATS), help="of --export")
    add("--implementation", choices=("pallas_mosaic_gpu", "xla"), help="of the ops (default: best)")
    add("--quiet", action="store_true", help="no progress bar")
    data = parser.add_argument_group("data").add_argument
    data("--data", default="topics", help="text, .jsonl, topics or kjv (%(default)s)")
    data("--eval-data", help="held-out text (default: the end of --data)")
    data("--eval-windows", type=int, default=16, help="held-out windows, at most (%(default)s)")
    data("--seq-len", type=int, default=512, help="targets per window (%(default)s)")
    data("--seed", type=int, default=0, help="of the order and of adapters")
    loop = parser.add_argument_group("training").add_argument
    loop("--steps", type=int, default=200, help="optimizer steps (%(default)s)")
    loop("--batch", type=int, default=16, help="windows per step (%(default)s)")
    loop("--accumulate", type=int, default=1, help="parts that a batch is computed in")
    loop("--remat", action="store_true", help="compute each layer's activations again: less memory")
    loop("--lr", type=float, default=1e-4, help="highest learning rate (%(default)s)")
    loop("--schedule", choices=("cosine", "linear", "constant"), default="cosine")
    loop("--warmup", type=int, help="steps of rising rate (default: a tenth of all, at most 100)")
    loop("--final-lr", type=float, default=0.1, help="last learning rate, of --lr (%(default)s)")
    loop("--weight-decay", type=float, default=0.01)
    loop("--betas", type=float, nargs=2, default=(0.9, 0.95), help="of AdamW (%(default)s)")
    loop("--clip", type=float, default=1.0, help="of the gradient's norm, 0 for none (%(default)s)")
    loop("--start-step", type=int, default=0, help="first step with quantization (%(default)s)")
    loop("--ramp-steps", type=int, default=0, help="over which it sets in (%(default)s)")
    loop("--learn-scale", action="store_true", help="train the weights' scales as well (LSQ)")
    loop("--clip-grid", action="store_true", help="no gradient for weights beyond the grid")
    loop("--fp8-training", choices=("e4m3", "e5m2"), help="products in FP8, gradients so")
    loop("--lora-rank", type=int, default=0, help="train adapters of this rank only")
    loop("--lora-alpha", type=float, help="their factor is alpha / rank (default: 2 * rank)")
    loop("--distill", type=float, default=0.0, help="weight of the KL from the unquantized model")
    loop("--temperature", type=float, default=1.0, help="of --distill")
    loop("--reverse-kl", action="store_true", help="KL(student || teacher) instead")
    loop("--eval-every", type=int, default=50, help="steps; 0: only first and last (%(default)s)")
    loop("--save-every", type=int, default=0, help="steps; 0: no checkpoints")
    loop("--keep", type=int, default=2, help="checkpoints that are kept (%(default)s)")
    mesh = parser.add_argument_group("mesh").add_argument
    mesh("--fsdp", type=int, default=1, help="devices that share batch, weights and optimizer")
    mesh("--tensor", type=int, default=1, help="devices that share each layer's channels")
    mesh("--expert", type=int, default=1, help="devices that share experts")
    args = parser.parse_args(argv)
    check(args)
    return args


def check(args: argparse.Namespace) -> None:
    """Checks the options against each other, and settles what depends on others."""
    for name in ("steps", "batch", "accumulate", "seq_len", "keep", "eval_windows"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1")
    if args.batch % (args.accumulate * args.fsdp):
        raise ValueError(
            f"--batch {args.batch} must be a multiple of --accumulate {args.accumulate} * --fsdp {args.fsdp}"
        )
    if not 0 <= args.distill <= 1:
        raise ValueError(f"--distill {args.distill} must be a weight from 0 to 1")
    if args.warmup is None:
        args.warmup = min(args.steps // 10, 100)
    if not 0 <= args.warmup < args.steps:
        raise ValueError(f"--warmup {args.warmup} must be less than --steps {args.steps}")
    if args.recipe == "stored" and not args.lora_rank:
        raise ValueError(
            "--recipe stored keeps packed weights, which can't be trained: --lora-rank N"
        )
    if args.fp8_training and (args.recipe != "none" or args.lora_rank):
        raise ValueError("--fp8-training multiplies plain weights: --recipe none, no --lora-rank")
    if args.export is not None and args.export.exists():
        raise ValueError(f"--export {args.export} exists; choose another folder")


def mesh(args: argparse.Namespace) -> Sharding:
    if args.fsdp * args.tensor * args.expert == 1:
        return Sharding()
    text = f"data={args.fsdp},expert={args.expert},tensor={args.tensor}"
    return _arguments.sharding(argparse.Namespace(mesh=text))


def windows(args: argparse.Namespace, tokenizer: Tokenizer) -> tuple[Windows, Windows]:
    """(training, held-out) windows."""
    documents, whole = training_data.read(args.data, tokenizer)
    packed = training_data.pack(documents, args.seq_len, whole=whole)
    if args.eval_data is not None:
        documents, whole = training_data.read(args.eval_data, tokenizer)
        held = training_data.pack(documents, args.seq_len, whole=whole)
        return packed, held.rows(slice(0, args.eval_windows))
    count = min(args.eval_windows, len(packed) // 10)
    if count == 0:
        raise ValueError(
            f"data: {len(packed)} windows of {args.seq_len} are too few to hold a tenth out; use more text, "
            "a smaller --seq-len or --eval-data"
        )
    return packed.rows(slice(0, -count)), packed.rows(slice(-count, None))


@contextlib.contextmanager
def progress(args: argparse.Namespace) -> Iterator[Callable[..., None]]:
    """A bar over the steps; yields what shows a phase, a step or the last numbers."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    hidden = args.quiet or not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as bar:
        task = bar.add_task("loading", total=args.steps, numbers="")
        yield lambda **fields: bar.update(task, **fields)


class Fit:
    """The loop over the steps: what it measures goes into the run's curve."""

    def __init__(self, args, run: RunFolder, loaded, dtype: str, show: Callable[..., None]):
        """Prepares the model, or takes it up where the run's last checkpoint left it."""
        self.args, self.run, self.show = args, run, show
        tokenizer = Tokenizer.load(loaded.tokenizer)
        train, self.held = windows(args, tokenizer)
        self.part = args.batch // args.accumulate
        self.sharding = loaded.model.sharding
        self.rate = training_model.learning_rate(args)
        self.batches = training_data.batches(train, args.batch, args.steps, args.seed)
        run.expect("tokens", training_data.fingerprint(train))
        self.done = run.last_step()
        self.teacher_graphdef, self.teacher = None, None
        if args.distill:
            show(description="copying the teacher")
            self.teacher_graphdef, self.teacher = training_model.copied(loaded.model, dtype)
        unquantized = {}
        layers = len(loaded.model.model.layers)
        if self.done == 0 and training_model.chosen_recipe(args, layers) is not None:
            show(description="evaluating")
            loaded.model.model.embed_tokens.dtype = dtype
            nll = training_step.evaluate(loaded.model, self.held, self.part)
            unquantized = {"unquantized_perplexity": perplexity(nll)}
        show(description="preparing")
        self.training = training_model.prepared(args, loaded.model, dtype)
        run.begin(self.done)
        if self.done:
            self._restore()
        else:
            self.evaluate(0, **unquantized)

    def train(self) -> None:
        """All steps that are left."""
        args, training = self.args, self.training
        objective = training_step.Objective(
            distill=args.distill,
            temperature=args.temperature,
            direction="backward" if args.reverse_kl else "forward",
            remat=args.remat,
        )
        take = training_step.train_step(
            training.graphdef,
            self.teacher_graphdef,
            training.transform,
            objective,
            training.state,
        )
        self.show(description="compiling", completed=self.done)
        self.clock = time.monotonic()
        waiting = None
        for step in range(self.done + 1, args.steps + 1):
            batch = training_step.put(next(self.batches), args.accumulate, self.sharding)
            training.state, metrics = take(training.state, training.frozen, self.teacher, batch)
            # One step behind, so that the device never waits for the host.
            if waiting is not None:
                self.record(*waiting)
            waiting = (step, metrics)
            last = step == args.steps
            evaluated = last or (args.eval_every and step % args.eval_every == 0)
            saved = args.save_every and (last or step % args.save_every == 0)
            if evaluated or saved:
                self.record(*waiting)
                waiting = None
                if evaluated:
                    self.evaluate(step)
                if saved:
                    self.save(step)
                self.clock = time.monotonic()

    def record(self, step: int, metrics: dict[str, Any]) -> None:
        """A step's line of the curve, once it has run."""
        found = as_numbers(metrics)
        seconds, self.clock = time.monotonic() - self.clock, time.monotonic()
        if not math.isfinite(found["loss"]):
            raise ValueError(f"step {step}: the loss is {found['loss']}; use a smaller --lr")
        speed = self.args.batch * self.args.seq_len / seconds
        self.run.add(
            step,
            **found,
            learning_rate=float(jnp.asarray(self.rate(step - 1))),
            seconds=seconds,
            tokens_per_second=speed,
            compiled=step == self.done + 1,
        )
        numbers = f"loss {found['loss']:.4f}  {speed:,.0f} tokens/s"
        self.show(description="training", completed=step, numbers=numbers)

    def evaluate(self, step: int, **others: float) -> None:
        """The line of the converted model's perplexity on the held-out windows."""
        self.show(description="evaluating", completed=step)
        nll = training_step.evaluate(self.training.converted(), self.held, self.part)
        self.run.add(step, eval_nll=nll, eval_perplexity=perplexity(nll), **others)

    def save(self, step: int) -> None:
        self.show(description="saving", completed=step)
        extra = {
            "optimizer": self.training.state.optimizer,
            "step": step,
            "data": self.batches.get_state(),
        }
        self.run.save(step, self.training.model(), extra, keep=self.args.keep)

    def _restore(self) -> None:
        template = {
            "optimizer": self.training.state.optimizer,
            "step": 0,
            "data": self.batches.get_state(),
        }
        model = self.training.model()
        extra = self.run.restore(self.done, model, template)
        self.training.take(model, extra["optimizer"], self.done)
        self.batches.set_state(extra["data"])

    def summary(self) -> str:
        """What the run came to, in one paragraph."""
        steps = [row for row in self.run.rows if "loss" in row]
        evaluations = [row for row in self.run.rows if "eval_perplexity" in row]
        timed = [row["seconds"] for row in steps if not row["compiled"]] or [steps[-1]["seconds"]]
        seconds = statistics.median(timed)
        tokens = self.args.batch * self.args.seq_len
        first, last = evaluations[0], evaluations[-1]
        start = f"{first['eval_perplexity']:.3f} before"
        if "unquantized_perplexity" in first:
            start = f"{first['unquantized_perplexity']:.3f} unquantized and untrained, {start}"
        return (
            f"{self.args.recipe}: {len(steps)} steps of {tokens} tokens, {1e3 * seconds:.1f} ms and "
            f"{tokens / seconds:,.0f} tokens/s each (median)\n"
            f"training loss {steps[0]['loss']:.4f} -> {steps[-1]['loss']:.4f}; held-out perplexity of the "
            f"converted model: {start}, {last['eval_perplexity']:.3f} after training\n"
            f"curve: {self.run.plot(f'{self.args.recipe}, {self.args.data}')}"
        )


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    sharding, dtype = mesh(args), _arguments.dtype(args)
    options = {k: v for k, v in vars(args).items() if k not in FREE} | {"dtype": dtype}
    run = RunFolder(args.out, options, resume=args.resume)
    with progress(args) as show:
        loaded = checkpoint.load(
            _arguments.model_path(args),
            recipe=None if args.recipe == "stored" else "bf16",
            dtype="float32",
            sharding=sharding,
            implementation=args.implementation,
            progress=False,
        )
        fit = Fit(args, run, loaded, dtype, show)
        fit.train()
        summary = fit.summary()
        if args.export is not None:
            show(description="exporting")
            summary += f"\nexported to {training_model.exported(fit.training, loaded)}"
    print(summary)


if __name__ == "__main__":
    sys.exit(_arguments.run_main("finetune_qat", main))
