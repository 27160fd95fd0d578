"""Times prefill and decode of whole models of published shapes, their weights random.

    python scripts/bench_generation.py --models gpt-oss-20b gpt-oss-120b --out benchmarks/generation.jsonl

A decode step's floor is the time that a copy of its bytes would take: weights that the step multiplies by (of the
experts, the number that tokens choose on average if they choose at random), and the keys and values that it attends
to. Times are wall clock: a number of steps from the dispatch of the first to the end of the last.
"""

import argparse
import collections
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from bench_kernels import measure_ceilings, run_stamp
from flax import nnx
from rich.console import Console
from rich.table import Table

from qjax import nn, testing
from qjax.generation import Generator
from qjax.recipe import recipe
from qjax.registry import model_module
from qjax.sampling import SamplingArrays, SamplingParams

PAGE_SIZE = 64
GPT_OSS = {
    "model_type": "gpt_oss",
    "vocab_size": 201088,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "attention_bias": True,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150000.0,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "original_max_position_embeddings": 4096,
        "truncate": False,
    },
    "sliding_window": 128,
    "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}


def gpt_oss(layers: int, experts: int) -> dict[str, Any]:
    """config.json of a GPT-OSS model."""
    windows = ["sliding_attention", "full_attention"] * (layers // 2)
    return GPT_OSS | {
        "num_hidden_layers": layers,
        "num_local_experts": experts,
        "layer_types": windows,
    }


MODELS = {  # name: config.json, recipe
    "gpt-oss-20b": (gpt_oss(24, 32), "GPT_OSS_MXFP4"),
    "gpt-oss-120b": (gpt_oss(36, 128), "GPT_OSS_MXFP4"),
    "llama-3.1-8b-int4": (LLAMA, "W4A16"),
    "llama-3.1-8b-fp8": (LLAMA, "FP8_DYNAMIC"),
    "llama-3.1-8b-bf16": (LLAMA, "bf16"),
}


class Bench:
    """One model on the device, and what its steps must read."""

    def __init__(self, name: str):
        """Draws the weights of a model of `MODELS`."""
        config, recipe_name = MODELS[name]
        module = model_module(config["model_type"])
        parsed = module.Config.from_hf(config)
        used = recipe(recipe_name, num_layers=parsed.num_hidden_layers)
        self.model = module.Model(parsed, specs=nn.resolve(used, module.Model(parsed)))
        nn.initialize(self.model, jax.random.key(0))
        nn.prepack(self.model)
        self.steps = Generator(self.model, page_size=PAGE_SIZE).steps
        self.top_k = config.get("num_experts_per_tok", 0)
        self.num_experts = config.get("num_local_experts", 0)
        self.bytes = collections.Counter()
        for path, variable in nnx.to_flat_state(nnx.state(self.model)):
            part = next((p for p in ("experts", "embed_tokens") if p in path), "dense")
            self.bytes[part] += sum(x.nbytes for x in jax.tree.leaves(variable.get_value()))

    def active_bytes(self, batch: int) -> float:
        """Weights that a decode step multiplies by, if each token draws its experts at random."""
        if not self.num_experts:
            return self.bytes["dense"]
        chosen = 1 - (1 - self.top_k / self.num_experts) ** batch
        return self.bytes["dense"] + self.bytes["experts"] * chosen

    def cache_bytes(self, batch: int, context: int) -> float:
        """Keys and values that a decode step attends to."""
        slots = jax.eval_shape(lambda: self.steps.new_slots(1, PAGE_SIZE))
        windows = getattr(self.model.config, "sliding_windows", ()) or [None] * len(
            slots.cache.layers
        )
        token = [
            sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(c)) / PAGE_SIZE
            for c in slots.cache.layers
        ]
        return batch * sum(
            size * min(context, window or context)
            for size, window in zip(token, windows, strict=True)
        )

    def prefill(self, tokens: int, chunk: int) -> float:
        """Microseconds until the first token after a prompt."""
        sampling = SamplingArrays.of([SamplingParams()])
        ids = np.random.default_rng(0).integers(0, 1000, (1, tokens)).astype(np.int32)
        rows, times = np.zeros(1, np.int32), []
        slots, drawn = self.steps.new_slots(1, tokens + 1), self.steps.put(np.zeros(1, np.int32))
        for _ in range(3):
            jax.block_until_ready(slots)
            begin = time.perf_counter()
            for start in range(0, tokens, chunk):
                part = ids[:, start : start + chunk]
                count = np.array([part.shape[1]], np.int32)
                slots, drawn = self.steps.prefill(slots, drawn, rows, part, start, count, sampling)
            jax.block_until_ready(drawn)
            times.append(1e6 * (time.perf_counter() - begin))
        return min(times[1:])

    def decode(self, batch: int, context: int, steps: int) -> float:
        """Microseconds of a step that appends one token to each of `batch` sequences of `context` tokens.

        At least `steps` are timed together.
        """
        sampling = self.steps.put(SamplingArrays.of([SamplingParams()] * batch))
        per_call = self.steps.tokens_per_call
        calls = -(-steps // per_call)
        slots = self.steps.new_slots(batch, context + 3 * calls * per_call)
        full = dataclasses.replace(slots.cache, lengths=jnp.full((batch,), context, jnp.int32))
        slots = dataclasses.replace(slots, cache=full)
        wanted = self.steps.put(np.full(batch, per_call, np.int32))
        tokens, times = self.steps.put(np.arange(batch, dtype=np.int32)), []
        for _ in range(3):
            begin = time.perf_counter()
            for _ in range(calls):
                slots, tokens, _ = self.steps.decode(slots, tokens, wanted, sampling)
            jax.block_until_ready(tokens)
            times.append(1e6 * (time.perf_counter() - begin) / (calls * per_call))
        return min(times[1:])


def measure(
    name: str, args: argparse.Namespace, copy_gb_s: float, stamp: dict
) -> list[testing.BenchmarkRecord]:
    """The records of one model."""
    bench = Bench(name)
    records = [
        testing.BenchmarkRecord(
            **stamp,
            op="prefill",
            format=name,
            shape={
                "batch": 1,
                "tokens": args.prefill,
                "weight_mb": round(bench.bytes.total() / 1e6),
            },
            time_us=bench.prefill(args.prefill, args.prefill_chunk),
        )
    ]
    for batch in args.batches:
        nbytes = bench.active_bytes(batch) + bench.cache_bytes(batch, args.context)
        us = bench.decode(batch, args.context, args.steps)
        gb_s = 1e-3 * nbytes / us
        records.append(
            testing.BenchmarkRecord(
                **stamp,
                op="decode",
                format=name,
                shape={"batch": batch, "context": args.context},
                time_us=us,
                gb_s=gb_s,
                ceiling_fraction=gb_s / copy_gb_s,
            )
        )
    return records


def render(records: Sequence[testing.BenchmarkRecord], copy_gb_s: float) -> Table:
    """The table of a run."""
    table = Table(title=f"a copy moves {copy_gb_s:.0f} GB/s")
    for column in ("model", "step", "shape", "ms", "tokens/s", "floor, ms", "of floor"):
        table.add_column(
            column, justify="left" if column in ("model", "step", "shape") else "right"
        )
    for r in records:
        tokens = r.shape["batch"] * r.shape.get("tokens", 1)
        floor = None if r.ceiling_fraction is None else r.time_us * r.ceiling_fraction
        table.add_row(
            r.format,
            r.op,
            " ".join(f"{k}={v}" for k, v in r.shape.items()),
            f"{1e-3 * r.time_us:.2f}",
            f"{1e6 * tokens / r.time_us:.0f}",
            "" if floor is None else f"{1e-3 * floor:.2f}",
            "" if r.ceiling_fraction is None else f"{r.ceiling_fraction:.0%}",
        )
    return table


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--batches", nargs="+", type=int, default=(1, 16, 64, 128))
    parser.add_argument("--context", type=int, default=1024, help="tokens before a decode step")
    parser.add_argument("--prefill", type=int, default=8192, help="tokens of the prompt")
    parser.add_argument("--prefill-chunk", type=int, default=8192, help="tokens of a call")
    parser.add_argument("--steps", type=int, default=32, help="decode steps timed together")
    parser.add_argument("--out", type=Path, help="JSON lines file that gets the records")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the chosen models one after the other."""
    args = parse_arguments(argv)
    console = Console(width=120)
    copy_gb_s = measure_ceilings(30)["copy"]
    records = []
    for name in args.models:
        found = measure(name, args, copy_gb_s, run_stamp())
        records += found
        if args.out:
            testing.append_records(args.out, found)
        console.print(render(found, copy_gb_s))


if __name__ == "__main__":
    main()
