"""Tools to test and measure GPU kernels, mostly on machines without a GPU.

`interpret` runs a kernel on the CPU, `lower_for_gpu` lowers it for Hopper, `ptxas_reports` really compiles it,
`measure_kernel_us` times it on a GPU, and `BenchmarkRecord` is a line of benchmarks/*.jsonl.
"""

from qjax.testing.interpret import interpret
from qjax.testing.lowering import lower_for_gpu
from qjax.testing.ptxas import PtxasReport, ptxas_available, ptxas_reports
from qjax.testing.records import (
    BenchmarkRecord,
    PeerTime,
    append_records,
    fastest_peer,
    read_peers,
    read_records,
)
from qjax.testing.timing import measure_kernel_us, rotate_inputs

__all__ = [
    "BenchmarkRecord",
    "PeerTime",
    "PtxasReport",
    "append_records",
    "fastest_peer",
    "interpret",
    "lower_for_gpu",
    "measure_kernel_us",
    "ptxas_available",
    "ptxas_reports",
    "read_peers",
    "read_records",
    "rotate_inputs",
]
