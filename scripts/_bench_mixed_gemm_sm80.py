"""Cases of the mixed-input product of compute capability 8 for `bench_kernels`; it runs on Hopper too."""

from _bench_mixed_gemm import NK, mixed_case

from qjax.pallas_kernels.mixed_gemm_sm80 import TileConfig, mixed_gemm

FORMATS = ("int4_1x128", "int4_1x32_min", "int8_channel", "fp8_e4m3_channel")


def ampere_case(name: str, m: int, n: int, k: int, config: TileConfig | None = None) -> dict:
    """The fields of a benchmark case of random data."""
    return mixed_case(name, m, n, k, config, op="mixed_gemm_sm80", gemm=mixed_gemm)


__all__ = ["FORMATS", "NK", "ampere_case"]
