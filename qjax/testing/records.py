"""Benchmark results as JSON lines, one measured case a line."""

import dataclasses
import json
import math
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkRecord:
    """One measured case.

    Attributes:
        date: ISO date of the run.
        commit: Commit of the code that ran.
        gpu: Device name.
        op: Operation, as the function in `qjax.pallas_kernels` or the peer's op is called.
        format: Format of the quantized operands.
        shape: Sizes by axis, such as {"m": 1, "n": 4096, "k": 7168}.
        time_us: Median kernel time.
        tflops: Arithmetic rate, None where bandwidth is the measure.
        gb_s: Bytes that must move over the time, None where arithmetic is the measure.
        ceiling_fraction: Rate over the ceiling that the same run measured (a large matrix product or copy).
        error: Relative error against the float32 reference on the same quantized data.
        peer: Name of the fastest known peer, None if none is known.
        peer_time_us: The peer's time.
        peer_source: File that the peer's time comes from.
    """

    date: str
    commit: str
    gpu: str
    op: str
    format: str
    shape: dict[str, int]
    time_us: float
    tflops: float | None = None
    gb_s: float | None = None
    ceiling_fraction: float | None = None
    error: float | None = None
    peer: str | None = None
    peer_time_us: float | None = None
    peer_source: str | None = None

    def __post_init__(self):
        if not (math.isfinite(self.time_us) and self.time_us > 0):
            raise ValueError(
                f"BenchmarkRecord: time_us must be positive and finite; found {self.time_us}"
            )

    @property
    def peer_ratio(self) -> float | None:
        """The peer's time over ours: above 1 we are faster."""
        return None if self.peer_time_us is None else self.peer_time_us / self.time_us


def append_records(path: str | os.PathLike, records: Iterable[BenchmarkRecord]) -> None:
    """Adds records at the end of a file, which is replaced whole or not at all."""
    path = Path(path)
    lines = path.read_text() if path.exists() else ""
    lines += "".join(json.dumps(dataclasses.asdict(r), sort_keys=True) + "\n" for r in records)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        file.write(lines)
    os.replace(file.name, path)


def read_records(path: str | os.PathLike) -> list[BenchmarkRecord]:
    """The records of a file.

    Raises:
        ValueError: If a line is no record; it names the file and the line.
    """
    records = []
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        try:
            records.append(BenchmarkRecord(**json.loads(line)))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: not a benchmark record: {error}") from error
    return records


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeerTime:
    """Another library's time for a case; fields as in `BenchmarkRecord`."""

    op: str
    format: str
    shape: dict[str, int]
    peer: str
    time_us: float
    gpu: str
    date: str


def read_peers(path: str | os.PathLike) -> list[PeerTime]:
    """The peers' times in a file of JSON lines."""
    return [PeerTime(**json.loads(line)) for line in Path(path).read_text().splitlines()]


def fastest_peer(
    peers: Iterable[PeerTime], op: str, format: str, shape: dict[str, int]
) -> PeerTime | None:
    """The fastest peer known for a case, None if none is."""
    same = [p for p in peers if (p.op, p.format, p.shape) == (op, format, shape)]
    return min(same, key=lambda p: p.time_us, default=None)
