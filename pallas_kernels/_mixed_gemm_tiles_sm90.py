"""How the mixed-input product is cut into tiles, and which cut the model of its time prefers."""

import dataclasses
import itertools
import math

from jax.experimental import pallas as pl

from qjax.wgmma_layout import BLOCK

MAX_SMEM = 227 * 1024
MAX_SCALE_BYTES = 6 / 32  # a float32 scale and a zero point for each 32 weights
COLUMNS = (8, 16, 32, 64, 128)
MIN_SUMS = 32  # TMA writes at multiples of 128 bytes


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """How the product is cut.

    Attributes:
        columns: Tokens of a CTA's tile, one of `COLUMNS`.
        blocks: Blocks of 64 weight rows of a CTA's tile (1, 2 or 4).
        parts: Math warpgroups for each block, each with a part of a stage's columns; blocks * parts <= 4.
        depth: Columns of K in a stage for each part: 64, 128 or 256.
        stages: Pipeline stages.
        splits: CTAs of a cluster (1, 2 or 4), each with a part of K.
        tail: Whether a cluster's CTAs take whole tiles of their own while there is one for every CTA, and cut only
            the rest.
        mma: Whether products are mma.sync's instead of wgmma's.
        share: Whether a cluster's CTAs share the x of neighbouring whole tiles by multicast. All tiles are whole then,
            but with `tail` not the last ones; columns are at least 16.
    """

    columns: int
    blocks: int
    parts: int
    depth: int
    stages: int
    splits: int = 1
    tail: bool = False
    mma: bool = False
    share: bool = False

    @property
    def rows(self) -> int:
        """Weight rows of a CTA's tile."""
        return BLOCK * self.blocks

    @property
    def step(self) -> int:
        """Columns of K in a pipeline stage."""
        return self.depth * self.parts

    def rounds(self, m: int, n: int, clusters: int) -> tuple[int, int]:
        """Tiles that each CTA computes alone at most, and tiles that the clusters cut."""
        row_tiles = pl.cdiv(n, self.rows)
        if not (self.tail or self.share):
            return 0, row_tiles * pl.cdiv(m, self.columns)
        teams = pl.cdiv(row_tiles, self.splits) * pl.cdiv(m, self.columns)
        alone = teams // clusters if self.tail else pl.cdiv(teams, clusters)
        return alone, max(teams - alone * clusters, 0) * self.splits

    def smem_bytes(
        self, scale_bytes: float, *, bits: int = 4, sums: float = 0, x_bytes: int = 2
    ) -> float:
        """Shared memory for the stages and the epilogue.

        Args:
            scale_bytes: Bytes of scales and offsets for each weight.
            bits: Bits of a code.
            sums: Sums of each token's columns for each column: 1 / group_size with minimums, otherwise 0.
            x_bytes: Bytes of an element of x.
        """
        tokens = x_bytes * self.columns + 4 * sums * max(self.columns, MIN_SUMS)
        stage = self.step * (self.rows * (bits / 8 + scale_bytes) + tokens)
        epilogue = self.rows * self.columns * (2 + 4 * (self.parts - 1))
        return self.stages * stage + epilogue + 8 * 1024


def choose_tiles(
    m: int,
    n: int,
    k: int,
    *,
    num_sms: int,
    scale_bytes: float = MAX_SCALE_BYTES,
    bits: int = 4,
    sums: float = 0,
) -> TileConfig:
    """The tiling with the least modelled time; see `modelled_us` and, for the arguments, `candidate_tiles`."""
    candidates = candidate_tiles(m, k, scale_bytes=scale_bytes, bits=bits, sums=sums)
    return min(candidates, key=lambda c: modelled_us(c, m, n, k, num_sms=num_sms, bits=bits))


def candidate_tiles(
    m: int, k: int, *, scale_bytes: float = MAX_SCALE_BYTES, bits: int = 4, sums: float = 0
) -> list[TileConfig]:
    """The tilings worth considering, each with as many stages as fit, 10 at most.

    Args:
        m: Tokens.
        k: Columns.
        scale_bytes: As `TileConfig.smem_bytes` takes it.
        bits: Likewise.
        sums: Likewise.
    """
    size = dict(scale_bytes=scale_bytes, bits=bits, sums=sums)
    columns = next((c for c in COLUMNS if c >= m), COLUMNS[-1])
    shapes = [(1, 4), (2, 2), (4, 1)] if columns <= 64 else [(2, 1)]
    parts = [(columns, *shape) for shape in shapes]
    if columns == 128:  # more tiles, where those of 128 tokens would leave SMs idle
        parts.append((64, 2, 2))
    candidates = []
    for part, depth, splits in itertools.product(parts, (64, 128, 256), (1, 2, 4)):
        columns, blocks, warpgroups = part
        if depth == 256 and (warpgroups > 1 or columns > 32):
            continue  # registers are full
        if depth == 64 and (warpgroups < 4 or columns < 64):
            continue  # there is room for more
        config = TileConfig(columns, blocks, warpgroups, depth, 2, splits)
        if columns == 8 and bits <= 4:
            config = dataclasses.replace(config, mma=True)
        while config.stages < 10:
            deeper = dataclasses.replace(config, stages=config.stages + 1)
            if deeper.smem_bytes(**size) > MAX_SMEM:
                break
            config = deeper
        if config.smem_bytes(**size) > MAX_SMEM:
            continue
        if splits == 1 or (k >= splits * config.step and m <= 256):
            candidates.append(config)
            if splits == 2 and columns == 128:  # else there are no registers for two epilogues
                candidates.append(dataclasses.replace(config, tail=True))
        if splits == 2 and columns == 128 and m > 512:
            candidates.append(dataclasses.replace(config, share=True))
    return candidates


def modelled_us(
    config: TileConfig, m: int, n: int, k: int, *, num_sms: int, bits: int = 4
) -> float:
    """Microseconds by counting rounds of steps; constants fitted to an H200's times within 10%.

    The integer instructions of dequantization set the pace of codes of up to 4 bits; with 8 bits they and the
    bytes are close, and neither hides the other wholly.
    """
    # Not every group of four SMs is free of others' borders.
    clusters = max(num_sms // config.splits * (3 if config.splits == 4 else 4) // 4, 1)
    alone, cut = config.rounds(m, n, clusters)
    if config.tail and not alone:
        return math.inf  # the same as without
    steps = pl.cdiv(k, config.step)
    step_us = 1.1e-5 * config.rows * config.step * (1 + 0.02 * config.columns)
    step_us = 1.2 * step_us + 0.18 if bits == 8 else step_us + 0.12
    outputs = config.rows / BLOCK * config.columns
    epilogue_us = 0.012 * (config.parts - 1) * outputs
    if config.columns == 64 and m > 64:
        step_us *= 0.9
    if config.share:
        step_us *= 0.97
    us = alone * (steps * step_us + epilogue_us)
    if config.splits > 1:
        epilogue_us += 0.8 + 0.0046 * config.splits * outputs
    us += pl.cdiv(cut, clusters) * (pl.cdiv(steps, config.splits) * step_us + epilogue_us)
    if bits == 8:
        bytes_us = n * k * pl.cdiv(m, config.columns) / 4.2e6
        us = (us**3 + bytes_us**3) ** (1 / 3)
    return 3.1 + us
