"""Makes Markdown tables and a roofline plot of benchmark records.

python scripts/render_benchmarks.py benchmarks/h200.jsonl --plot benchmarks/roofline.png
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from qjax.testing import BenchmarkRecord, read_records


def tables(records: Sequence[BenchmarkRecord]) -> str:
    """Markdown: one table for each op, format and GPU, the latest record of each shape."""
    latest = {}
    for record in records:
        latest[record.op, record.format, record.gpu, tuple(record.shape.items())] = record
    groups: dict[tuple[str, str, str], list[BenchmarkRecord]] = {}
    for record in latest.values():
        groups.setdefault((record.op, record.format, record.gpu), []).append(record)
    return "\n".join(_table(*key, group) for key, group in groups.items())


def _table(op: str, format: str, gpu: str, records: Sequence[BenchmarkRecord]) -> str:
    axes = list(records[0].shape)
    dates = sorted({r.date for r in records})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    header = [
        *axes,
        "µs",
        "TFLOP/s",
        "GB/s",
        "of ceiling",
        "error",
        "fastest peer",
        "peer µs",
        "ratio",
    ]
    lines = [
        f"### {op}, {format} ({gpu}, {when})",
        "",
        "| " + " | ".join(header) + " |",
        "|" + "---|" * len(header),
    ]
    for r in records:
        cells = [
            *(str(r.shape[axis]) for axis in axes),
            f"{r.time_us:.1f}",
            _cell(r.tflops, ".0f"),
            _cell(r.gb_s, ".0f"),
            _cell(r.ceiling_fraction, ".0%"),
            _cell(r.error, ".1e"),
            r.peer or "",
            _cell(r.peer_time_us, ".1f"),
            _cell(r.peer_ratio, ".2f"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    ratios = [r.peer_ratio for r in records if r.peer_ratio is not None]
    if ratios:
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        lines += ["", f"Geometric mean of the ratios: {mean:.2f}; least: {min(ratios):.2f}."]
    return "\n".join(lines) + "\n"


def _cell(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)


def plot_roofline(records: Sequence[BenchmarkRecord], path: Path) -> None:
    """Arithmetic rate over arithmetic intensity, with the roof that the records' ceilings imply."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 5))
    points = [(r, 1e3 * r.tflops / r.gb_s, r.tflops) for r in records if r.tflops and r.gb_s]
    for op in sorted({r.op for r, _, _ in points}):
        mine = [(x, y) for r, x, y in points if r.op == op]
        axes.scatter([x for x, _ in mine], [y for _, y in mine], label=op, s=14)
    # A case's fraction is of the nearer ceiling, so rate over fraction lies on the roof.
    roof = sorted((x, y / r.ceiling_fraction) for r, x, y in points if r.ceiling_fraction)
    if roof:
        axes.plot(*zip(*roof, strict=True), color="black", linewidth=1, label="measured ceilings")
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte that must move", ylabel="TFLOP/s")
    axes.grid(alpha=0.3)
    if points:
        axes.legend()
    figure.tight_layout()
    temporary = path.with_name(path.name + ".tmp")
    figure.savefig(temporary, dpi=150, format=path.suffix.lstrip(".") or "png")
    temporary.replace(path)
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the tables, writes the plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, help="JSON lines files of benchmark records")
    parser.add_argument("--plot", type=Path, help="where to write the roofline plot")
    arguments = parser.parse_args(argv)
    records = [record for path in arguments.files for record in read_records(path)]
    print(tables(records))
    if arguments.plot:
        plot_roofline(records, arguments.plot)


if __name__ == "__main__":
    main()
