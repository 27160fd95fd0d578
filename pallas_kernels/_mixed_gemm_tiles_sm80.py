"""How the mixed-input product for Ampere is cut into tiles, and which cut a model of its time prefers."""

import dataclasses
import itertools
import math

from jax.experimental import pallas as pl

from qjax.wgmma_layout import BLOCK

MAX_SMEM = {"8.0": 80 * 1024, "8.7": 80 * 1024, "9.0": 80 * 1024}
"""Shared memory of a CTA by compute capability: two CTAs, or more, fit on an SM."""

LEAST_SMEM = 49 * 1024
"""The same of all others, with 100 KiB an SM of which each CTA costs one."""

COLUMNS = (8, 16, 32, 64)
SPLITS = (1, 2, 3, 4, 6, 8)
_ALIGNMENT = 1024  # of an array in shared memory


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """How the product is cut.

    Attributes:
        columns: Tokens of a tile, one of `COLUMNS`.
        blocks: Blocks of 64 weight rows of a tile, 1 or 2: tokens are read from shared memory once for both.
        depth: Columns of K in a pipeline stage, 64 or 128.
        stages: Pipeline stages, at least 2.
        splits: CTAs that share a tile, each with a part of K.
    """

    columns: int
    blocks: int
    depth: int
    stages: int
    splits: int = 1

    @property
    def rows(self) -> int:
        """Weight rows of a tile."""
        return BLOCK * self.blocks

    def smem_bytes(self, *, bits: int, group_size: int, row_bytes: int, sums: bool) -> int:
        """Shared memory for the stages.

        Args:
            bits: Bits of a code.
            group_size: Columns that share a scale.
            row_bytes: Of a group's scale and offset in a row, 0 where rows have one group.
            sums: Whether there are minimums, which need sums of tokens.
        """
        sizes = [2 * self.columns * self.depth, self.rows * self.depth * bits // 8]
        if row_bytes:
            groups = max(self.depth // group_size, 1)
            # A scale and an offset are arrays of their own.
            sizes += [self.rows * groups * row_bytes, _ALIGNMENT]
            sizes += [4 * groups * self.columns] if sums else []
        return sum(pl.cdiv(self.stages * size, _ALIGNMENT) * _ALIGNMENT for size in sizes)


def choose_tiles(
    m: int,
    n: int,
    k: int,
    *,
    num_sms: int,
    bits: int = 4,
    group_size: int = 128,
    row_bytes: int = 8,
    sums: bool = False,
    max_smem: int = LEAST_SMEM,
) -> TileConfig:
    """The tiling with the least modelled time; arguments as `modelled_us` and `TileConfig.smem_bytes` take them."""
    columns = next((c for c in COLUMNS if c >= m), COLUMNS[-1])
    size = dict(bits=bits, group_size=group_size, row_bytes=row_bytes, sums=sums)
    candidates = []
    for blocks, depth, splits in itertools.product((1, 2), (64, 128), SPLITS):
        if splits > 1 and (m > 128 or k < 4 * splits * depth):
            continue
        if blocks == 2 and depth == 128 and columns == 64:
            continue  # half the depth leaves room for twice the stages
        config = TileConfig(columns, blocks, depth, 2, splits)
        while config.stages < 5:
            deeper = dataclasses.replace(config, stages=config.stages + 1)
            if deeper.smem_bytes(**size) > max_smem:
                break
            config = deeper
        if config.smem_bytes(**size) <= max_smem:
            candidates.append(config)
    return min(candidates, key=lambda c: modelled_us(c, m, n, k, num_sms=num_sms, bits=bits))


def modelled_us(
    config: TileConfig, m: int, n: int, k: int, *, num_sms: int, bits: int = 4
) -> float:
    """Microseconds by the data sheet of an A100, not fitted to measurements.

    Args:
        config: The tiling.
        m: Tokens.
        n: Weight rows.
        k: Columns.
        num_sms: SMs.
        bits: Bits of a code.
    """
    ctas = pl.cdiv(n, config.rows) * pl.cdiv(m, config.columns) * config.splits
    steps = pl.cdiv(pl.cdiv(k, config.depth), config.splits)
    weights, tokens = config.rows * config.depth, config.columns * config.depth
    # What an SM does in a microsecond: bytes from memory, from L2 and from shared memory, products, and instructions
    # of each of its four schedulers.
    from_memory, from_l2, from_shared, products, instructions = 14e3, 50e3, 150e3, 1.2e6, 1.2e3
    tensor_instructions = (config.blocks + 0.5) * tokens / 128
    parallel = (
        weights * bits / 8 / (from_memory if m <= config.columns else from_l2)
        + 2 * tokens / from_l2,
        8 * tokens / from_shared,  # each warp reads all tokens
        weights * config.columns / products,
        (60 + 1.5 * weights / 128 + tensor_instructions + config.rows * config.columns / 128)
        / instructions,
    )
    step_us = sum(us**3 for us in parallel) ** (1 / 3)  # none hides the others wholly
    per_sm = pl.cdiv(ctas, num_sms)
    latency_us = 0.8 / (config.stages - 1)  # of a step of a CTA that is alone
    us = max(per_sm * steps * step_us, math.ceil(per_sm / 2) * steps * latency_us)
    if config.splits > 1:  # parts are written and read by another kernel
        us += 3 + 8 * config.splits * m * n / (num_sms * from_l2)
    return 3 + us
