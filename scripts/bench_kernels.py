"""Times the GPU kernels beside the ceilings and peers, and checks each output.

    python scripts/bench_kernels.py --ops fp8_block_gemm --out benchmarks/h200.jsonl

Needs a Hopper GPU. Prints one table and appends a JSON line for each case.
"""

import argparse
import concurrent.futures
import dataclasses
import datetime
import functools
import itertools
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import _bench_fp8_grouped_gemm as grouped
import _bench_fp8_training as training
import _bench_kv_cache_write as cache_write
import _bench_mixed_gemm as mixed
import _bench_mixed_gemm_sm80 as ampere
import _bench_mixed_grouped_gemm as experts
import _bench_mla_decode as latent
import _bench_moe_layer as mixture
import _bench_mqa_logits as indexer
import _bench_paged_attention as decode
import _bench_prefill_attention as prefill
import _bench_w4a8_gemm as w4a8
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

from qjax import testing
from qjax.pallas_kernels import _fp8_gemm_sm90, mixed_gemm_sm90
from qjax.pallas_kernels.fp8_block_gemm_sm90 import fp8_block_gemm
from qjax.pallas_kernels.fp8_quantize_sm90 import (
    fp8_quantize_1x128,
    fp8_quantize_per_token,
    padded_rows,
)
from qjax.pallas_kernels.fp8_rowwise_gemm_sm90 import fp8_rowwise_gemm
from qjax.pallas_kernels.mixed_gemm_sm90 import mixed_gemm, repack

ROOT = Path(__file__).parents[1]
DEEPSEEK_NK = ((2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048))
LLAMA_NK = ((4096, 4096), (28672, 4096), (8192, 8192))
INT4_NK = ((4096, 4096), (6144, 4096), (28672, 4096), (4096, 14336), (8192, 8192), (57344, 8192))
TOKENS = (1, 16, 64, 128, 256, 4096)
TOGETHER = 4  # cases whose arrays live at a time


@dataclasses.dataclass(frozen=True)
class Case:
    """One measurement.

    Attributes:
        op: Name of the kernel function.
        format: Format of the quantized operands.
        shape: Sizes by axis.
        fn: The measured function.
        args: Its arrays.
        error: The relative error of its output on those arrays.
        flops: Arithmetic that the case needs.
        nbytes: Bytes that the case must move: each input read and each output written once.
        unit: Which ceiling is its measure: "fp8", "bf16" (TFLOP/s) or "copy" (GB/s).
    """

    op: str
    format: str
    shape: dict[str, int]
    fn: Callable
    args: Sequence[jax.Array]
    error: Callable[[jax.Array], float]
    flops: float
    nbytes: float
    unit: str


def relative_error(out: jax.Array, expected: jax.Array) -> float:
    """Frobenius norm of the difference over that of what is expected."""
    difference = out.astype(jnp.float32) - expected
    return float(jnp.linalg.norm(difference) / jnp.linalg.norm(expected))


def float32_product(x: jax.Array, w: jax.Array) -> jax.Array:
    """x @ w.T in true float32."""
    return jnp.einsum("mk,nk->mn", x, w, precision=jax.lax.Precision.HIGHEST)


def fp8_gemm_case(op: str, m: int, n: int, k: int, config=None) -> Case:
    """A dense FP8 product of random data."""
    keys = jax.random.split(jax.random.key(m + n + k), 4)
    rows = padded_rows(m)
    x = jax.random.normal(keys[0], (rows, k)).astype(jnp.float8_e4m3fn)
    w = jax.random.normal(keys[1], (n, k)).astype(jnp.float8_e4m3fn)
    block = op == "fp8_block_gemm"
    blocks_n, blocks_k = -(-n // 128), -(-k // 128)
    shapes = ((blocks_k, -(-rows // 4) * 4), (blocks_n, blocks_k)) if block else ((rows,), (n,))
    x_scale, w_scale = (
        jax.random.uniform(key, shape, minval=0.5, maxval=2.0)
        for key, shape in zip(keys[2:], shapes, strict=True)
    )
    kernel = fp8_block_gemm if block else fp8_rowwise_gemm

    def error(out):
        if block:
            xs = jnp.repeat(x_scale.T, 128, axis=1)[:m, :k]
            ws = jnp.repeat(jnp.repeat(w_scale, 128, axis=0), 128, axis=1)[:n, :k]
        else:
            xs, ws = x_scale[:m, None], w_scale[:, None]
        xf, wf = x[:m].astype(jnp.float32), w.astype(jnp.float32)
        return relative_error(out, float32_product(xf * xs, wf * ws))

    return Case(
        op=op,
        format="fp8_e4m3_128x128" if block else "fp8_e4m3_channel",
        shape={"m": m, "n": n, "k": k},
        fn=jax.jit(lambda *args: kernel(*args, m=m, config=config)),
        args=(x, x_scale, w, w_scale),
        error=error,
        flops=2.0 * m * n * k,
        nbytes=float(m * k + n * k + 2 * m * n + 4 * (x_scale.size + w_scale.size)),
        unit="fp8",
    )


def int4_case(m: int, n: int, k: int, group: int, config=None) -> Case:
    """A product of bf16 activations and symmetric INT4 weights, random data."""
    keys = jax.random.split(jax.random.key(m + n + k), 3)
    x = jax.random.normal(keys[0], (m, k), jnp.bfloat16)
    codes = jax.random.bits(keys[1], (n, k // 2), jnp.uint8)
    scale = jax.random.uniform(keys[2], (n, k // group), jnp.bfloat16, 0.01, 0.02)

    def error(out):
        q = jnp.stack([codes & 15, codes >> 4], axis=-1).reshape(n, k).astype(jnp.float32) - 8
        w = q * jnp.repeat(scale.astype(jnp.float32), group, axis=1)
        return relative_error(out, float32_product(x.astype(jnp.float32), w))

    packed, by_rows, _ = jax.jit(lambda c, s: repack(c, s, group_size=group))(codes, scale)

    return Case(
        op="int4_gemm",
        format=f"int4_1x{group}",
        shape={"m": m, "n": n, "k": k},
        fn=jax.jit(lambda *args: mixed_gemm(*args, n=n, group_size=group, config=config)),
        args=(x, packed, by_rows),
        error=error,
        flops=2.0 * m * n * k,
        nbytes=n * k / 2 + 2.0 * (m * k + m * n + scale.size),
        unit="bf16",
    )


def quantize_case(op: str, m: int, k: int) -> Case:
    """An activation quantizer on random data."""
    x = jax.random.normal(jax.random.key(m + k), (m, k), jnp.bfloat16)
    block = op == "fp8_quantize_1x128"
    kernel = fp8_quantize_1x128 if block else fp8_quantize_per_token

    def error(out):
        q, scale = out
        scale = jnp.repeat(scale.T, 128, axis=1)[:m, :k] if block else scale[:, None]
        # Nearest rounding to 3 mantissa bits: an error above 3% is not rounding.
        return relative_error(q[:m].astype(jnp.float32) * scale, x.astype(jnp.float32))

    scales = m * -(-k // 128) if block else m
    return Case(
        op=op,
        format="fp8_e4m3_1x128" if block else "fp8_e4m3_channel",
        shape={"m": m, "k": k},
        fn=jax.jit(kernel),
        args=(x,),
        error=error,
        flops=0.0,
        nbytes=3.0 * m * k + 4 * scales,
        unit="copy",
    )


def makers(tokens: Sequence[int]) -> dict[str, list[Callable[[], Case]]]:
    """{op: makers of its cases}; makers, so that only some cases' arrays live at a time."""

    def made(case: Callable[..., dict], shapes, **options) -> list[Callable[[], Case]]:
        return [lambda s=s: Case(**case(*s, **options)) for s in shapes]

    def crossed(case: Callable[..., Case], *axes, **options) -> list[Callable[[], Case]]:
        """Of every combination, the last axis fastest; an axis' items may be tuples of arguments."""
        combinations = [()]
        for axis in axes:
            combinations = [
                (*c, *(item if isinstance(item, tuple) else (item,)))
                for c in combinations
                for item in axis
            ]
        return [functools.partial(case, *c, **options) for c in combinations]

    def fp8(op, sizes):
        return crossed(lambda n, k, m: fp8_gemm_case(op, m, n, k), sizes, tokens)

    def fp8_grouped(op):
        return [
            maker
            for masked, shapes in ((True, grouped.MASKED), (False, grouped.CONTIGUOUS))
            for maker in made(functools.partial(grouped.grouped_case, op), shapes, masked=masked)
        ]

    def quantizer(op):
        return crossed(lambda k, m: quantize_case(op, m, k), (2048, 7168, 16384), tokens)

    return {
        "fp8_block_grouped_gemm": fp8_grouped("fp8_block_grouped_gemm"),
        "fp8_rowwise_grouped_gemm": fp8_grouped("fp8_rowwise_grouped_gemm"),
        "fp8_block_gemm": fp8("fp8_block_gemm", DEEPSEEK_NK),
        "fp8_rowwise_gemm": fp8("fp8_rowwise_gemm", (*DEEPSEEK_NK, *LLAMA_NK)),
        "int4_gemm": crossed(
            lambda n, k, group, m: int4_case(m, n, k, group), INT4_NK, (128, 32), tokens
        ),
        "mixed_gemm": crossed(
            lambda f, n, k, m: Case(**mixed.mixed_case(f, m, n, k)),
            mixed.FORMATS,
            mixed.NK,
            tokens,
        ),
        "mixed_gemm_sm80": crossed(
            lambda f, n, k, m: Case(**ampere.ampere_case(f, m, n, k)),
            ampere.FORMATS,
            ampere.NK,
            tokens,
        ),
        "w4a8_gemm": made(w4a8.product_case, w4a8.PRODUCTS),
        "mixed_gated_grouped_gemm": made(
            experts.grouped_case, experts.grouped_cases(True), gated=True
        ),
        "mixed_grouped_gemm": made(experts.grouped_case, experts.grouped_cases(False), gated=False),
        "moe_layer": crossed(
            lambda e, m: Case(**mixture.layer_case(e, m)), mixture.EXPERTS, mixture.TOKENS
        ),
        "paged_attention": made(decode.decode_case, decode.CASES),
        "prefill_attention": made(prefill.dense_case, prefill.DENSE),
        "paged_prefill_attention": made(prefill.paged_case, prefill.PAGED),
        "kv_cache_write": made(cache_write.write_case, cache_write.CASES),
        "latent_attention": made(latent.decode_case, latent.CASES),
        "mqa_logits": made(indexer.prefill_case, indexer.PREFILL),
        "paged_mqa_logits": made(indexer.paged_case, indexer.PAGED),
        "fp8_training_gemm": made(training.product_case, training.PRODUCTS),
        "fp8_wgrad_gemm": made(training.wgrad_case, training.WGRADS),
        "fp8_quantize_both_axes": made(training.quantize_case, training.QUANTIZED),
        "fp8_quantize_128x128": made(training.weight_case, training.LLAMA),
        "fp8_quantize_1x128": quantizer("fp8_quantize_1x128"),
        "fp8_quantize_per_token": quantizer("fp8_quantize_per_token"),
    }


OPS = tuple(makers(TOKENS))


def run_stamp() -> dict[str, str]:
    """What the records of a run share: date, commit and GPU."""
    commit = subprocess.run(
        ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip() or "unknown",
        "gpu": jax.devices()[0].device_kind,
    }


def measure_ceilings(calls: int) -> dict[str, float]:
    """TFLOP/s of XLA's large bf16 and FP8 products, GB/s of a copy, all on random data."""
    size = 8192
    ceilings = {}
    for name, dtype in (("bf16", jnp.bfloat16), ("fp8", jnp.float8_e4m3fn)):
        x = jax.random.normal(jax.random.key(0), (size, size)).astype(dtype)

        def product(a, b):
            return jnp.einsum("mk,nk->mn", a, b, preferred_element_type=jnp.bfloat16)

        us = testing.measure_kernel_us(jax.jit(product), testing.rotate_inputs((x, x)), calls=calls)
        ceilings[name] = 2e-6 * size**3 / us
    rates = []
    for dtype in (jnp.bfloat16, jnp.float32):  # XLA's kernel for the wider one is often the faster
        x = jax.random.normal(jax.random.key(0), (2**30 // jnp.dtype(dtype).itemsize,), dtype)
        us = testing.measure_kernel_us(jax.jit(lambda a: -a), [(x,)], calls=calls)
        rates.append(2e-3 * x.nbytes / us)
    ceilings["copy"] = max(rates)
    return ceilings


def measure(case: Case, ceilings: dict[str, float], peers, stamp: dict, calls: int):
    """The record of a case."""
    error = case.error(case.fn(*case.args))
    us = testing.measure_kernel_us(case.fn, testing.rotate_inputs(case.args), calls=calls)
    tflops, gb_s = 1e-6 * case.flops / us, 1e-3 * case.nbytes / us
    arithmetic = 0.0 if case.unit == "copy" else tflops / ceilings[case.unit]
    known = [
        (peer, path.name)
        for path, times in peers.items()
        if (peer := testing.fastest_peer(times, case.op, case.format, case.shape))
    ]
    peer, source = min(known, key=lambda p: p[0].time_us, default=(None, None))
    return testing.BenchmarkRecord(
        **stamp,
        op=case.op,
        format=case.format,
        shape=case.shape,
        time_us=us,
        tflops=tflops or None,
        gb_s=gb_s,
        ceiling_fraction=max(arithmetic, gb_s / ceilings["copy"]),
        error=error,
        peer=peer and peer.peer,
        peer_time_us=peer and peer.time_us,
        peer_source=source,
    )


def compiled(makers: Sequence[Callable[[], Case]]) -> list[Case]:
    """Cases whose functions have run once, in parallel: compilation is mostly ptxas, a process of its own."""
    cases = [make() for make in makers]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(lambda case: jax.block_until_ready(case.fn(*case.args)), cases))
    return cases


def tilings(op: str, m: int, n: int, k: int) -> list[tuple[float, Callable[[], Case], object]]:
    """(modelled microseconds, maker of the case, tiling) of each candidate, the chosen one first."""
    num_sms, partial = jax.devices()[0].core_count, functools.partial
    if op == "int4_gemm":
        int4 = mixed_gemm_sm90
        rows = [
            (int4.modelled_us(c, m, n, k, num_sms=num_sms), partial(int4_case, m, n, k, 128, c), c)
            for c in int4.candidate_tiles(m, k, scale_bytes=2 / 128)
        ]
    elif op in w4a8.X_DTYPES:
        rows = [
            (us, partial(lambda *a: Case(**w4a8.product_case(*a)), op, m, n, k, c), c)
            for us, c in w4a8.tilings(op, m, n, k, num_sms=num_sms)
        ]
    else:
        fp8 = _fp8_gemm_sm90
        rows = [
            (
                fp8.modelled_us(c, m, n, k, num_sms=num_sms),
                partial(fp8_gemm_case, op, m, n, k, c),
                c,
            )
            for c in fp8.candidate_tiles(m, k)
        ]
    return sorted(rows, key=lambda row: row[0])


def sweep(op: str, tokens: Sequence[int], calls: int, most: int, console: Console) -> None:
    """Prints the times of the candidate tilings beside their model, of which the first is what the op chooses."""
    sizes = {"int4_gemm": INT4_NK, **dict.fromkeys(w4a8.X_DTYPES, w4a8.NK)}
    for n, k in sizes.get(op, DEEPSEEK_NK):
        for m in tokens:
            rows = tilings(op, m, n, k)[:most]
            cases = compiled([make for _, make, _ in rows])
            inputs = testing.rotate_inputs(cases[0].args)
            times = [testing.measure_kernel_us(case.fn, inputs, calls=calls) for case in cases]
            for i in sorted(range(len(rows)), key=lambda i: times[i])[:6]:
                modelled, _, config = rows[i]
                mark = " <- chosen" if i == 0 else ""
                console.print(
                    f"{op} {m} {n} {k} {times[i]:8.1f} us, modelled {modelled:8.1f} {config}{mark}",
                    soft_wrap=True,
                )
            console.print(f"{op} {m} {n} {k} chosen {times[0]:8.1f} us, best {min(times):8.1f}")


def render(records: Sequence[testing.BenchmarkRecord], ceilings: dict[str, float]) -> Table:
    """The table of a run."""
    title = ", ".join(f"{name} {value:.0f}" for name, value in ceilings.items())
    table = Table(title=f"ceilings: {title} (TFLOP/s, copy in GB/s)")
    for column in ("op", "shape", "us", "TFLOP/s", "GB/s", "of ceiling", "error", "peer", "ratio"):
        table.add_column(column, justify="left" if column in ("op", "shape", "peer") else "right")
    for r in records:
        table.add_row(
            r.op,
            " ".join(f"{k}={v}" for k, v in r.shape.items()),
            f"{r.time_us:.1f}",
            "" if r.tflops is None else f"{r.tflops:.0f}",
            f"{r.gb_s:.0f}",
            f"{r.ceiling_fraction:.0%}",
            f"{r.error:.1e}",
            r.peer or "",
            "" if r.peer_ratio is None else f"{r.peer_ratio:.2f}",
        )
    return table


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ops", nargs="+", choices=OPS, default=OPS, help="kernels (default: all)")
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS, help="values of M")
    parser.add_argument("--calls", type=int, default=30, help="timed calls a case")
    parser.add_argument("--out", type=Path, help="JSON lines file that gets the records")
    parser.add_argument(
        "--peers", type=Path, help="peers measured in this session (benchmarks/torch_peers.py)"
    )
    parser.add_argument(
        "--sweep",
        type=int,
        metavar="MOST",
        help="time so many candidate tilings instead, the ones modelled fastest",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the chosen benchmarks."""
    arguments = parse_arguments(argv)
    if jax.default_backend() != "gpu":
        raise SystemExit(
            f"bench_kernels: needs a Hopper GPU; JAX's default device is a {jax.default_backend()}"
        )
    console = Console(width=160)
    if arguments.sweep:
        swept: dict[str, tuple[str, ...]] = {
            op: (op,) for op in ("fp8_block_gemm", "fp8_rowwise_gemm", "int4_gemm")
        }
        swept["w4a8_gemm"] = tuple(w4a8.X_DTYPES)
        for name in itertools.chain(*(swept.get(op, ()) for op in arguments.ops)):
            sweep(name, arguments.tokens, arguments.calls, arguments.sweep, console)
        return
    stamp = run_stamp()
    files = [ROOT / "benchmarks" / "peers.jsonl", *([arguments.peers] if arguments.peers else [])]
    peers = {path: testing.read_peers(path) for path in files}
    ceilings = measure_ceilings(arguments.calls)
    records = []
    known = makers(arguments.tokens)
    chosen = [make for op in arguments.ops for make in known[op]]
    for start in range(0, len(chosen), TOGETHER):
        for case in compiled(chosen[start : start + TOGETHER]):
            records.append(measure(case, ceilings, peers, stamp, arguments.calls))
            if arguments.out:
                testing.append_records(arguments.out, records[-1:])
    console.print(render(records, ceilings))
    ratios = [r.peer_ratio for r in records if r.peer_ratio is not None]
    if ratios:
        mean = float(np.exp(np.mean(np.log(ratios))))
        console.print(
            f"geometric mean of the peers' times over ours: {mean:.2f}, least {min(ratios):.2f}"
        )


if __name__ == "__main__":
    main()
