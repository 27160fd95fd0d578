"""Times torch's FP8 rowwise and bf16 products, as JSON lines like those of peers.jsonl.

    python benchmarks/torch_peers.py --out /tmp/torch.jsonl

Runs in any environment with a CUDA build of torch; the project's own environment has none and needs none.
Median of CUDA-graph replays, each graph calling the product on inputs that rotate through more than the L2.
"""

import argparse
import datetime
import json
import statistics
from pathlib import Path

import torch

SHAPES = [
    (m, n, k)
    for n, k in (
        (2112, 7168),
        (24576, 1536),
        (7168, 16384),
        (4096, 7168),
        (7168, 2048),
        (8192, 8192),
    )
    for m in (1, 16, 64, 128, 256, 4096)
]
CACHE_BYTES = 60 * 2**20
REPLAYS = 20


def graph_us(call, sets) -> float:
    """Median time of one call in microseconds."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for inputs in sets[:2]:
            call(*inputs)
    side.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for inputs in sets:
            call(*inputs)
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / len(sets))
    return statistics.median(times)


def inputs(m: int, n: int, k: int, fp8: bool) -> list[tuple[torch.Tensor, ...]]:
    """Input sets that together exceed the cache three times."""
    size = (m * k + n * k) * (1 if fp8 else 2)
    sets = []
    for _ in range(min(max(2, 3 * CACHE_BYTES // size + 1), 256)):
        x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
        w = torch.randn(n, k, device="cuda", dtype=torch.bfloat16)
        if fp8:
            x, w = x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn)
            sets.append((x, w, torch.rand(m, 1, device="cuda"), torch.rand(1, n, device="cuda")))
        else:
            sets.append((x, w))
    return sets


def rowwise(x, w, x_scale, w_scale):
    """torch._scaled_mm with a scale for each row of both operands."""
    return torch._scaled_mm(
        x, w.t(), scale_a=x_scale, scale_b=w_scale, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def bf16(x, w):
    """The unquantized product."""
    return torch.nn.functional.linear(x, w)


def main() -> None:
    """Measures every shape and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="JSON lines file to write")
    path = parser.parse_args().out
    stamp = {"gpu": torch.cuda.get_device_name(), "date": datetime.date.today().isoformat()}
    lines = []
    for m, n, k in SHAPES:
        shape = {"m": m, "n": n, "k": k}
        for name, call, fp8 in (
            ("torch._scaled_mm rowwise, fast accumulation", rowwise, True),
            ("torch bf16 (unquantized)", bf16, False),
        ):
            us = graph_us(call, inputs(m, n, k, fp8))
            ops = (("fp8_rowwise_gemm", "fp8_e4m3_channel"),)
            if not fp8:
                ops += (("fp8_block_gemm", "fp8_e4m3_128x128"),)
            lines += [
                {"op": op, "format": fmt, "shape": shape, "peer": name, "time_us": us, **stamp}
                for op, fmt in ops
            ]
            print(f"{name}: {shape} {us:.1f} us", flush=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(line, sort_keys=True) + "\n" for line in lines))
    temporary.replace(path)


if __name__ == "__main__":
    main()
