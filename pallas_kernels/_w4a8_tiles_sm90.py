"""How the product of INT4 weights and 8-bit activations is cut into tiles, and which cut the model of its time prefers.

An SM of an H200 (1.7 GHz) is fed 18 bytes a clock from memory if all SMs are, and 44 from L2 (what the FP8 product
gets). Its integer pipe has 64 lanes, its float32 pipe 128 (half and all of what it issues), and its tensor cores take
4096 products of 8 bits a clock. So 36 weights arrive in a clock, for each of which 64 / 36 = 1.8 integer instructions
can be issued, and decoding takes 0.4 to 1.1 (`_w4a8_registers_sm90`): few tokens wait for memory, given enough
loads in flight. Each group of columns adds a multiply-add for every sum, and a conversion for every int32 sum:
``tokens / group_size`` for each weight.

A warpgroup decodes, waits for the product and promotes it, one group after another; only other warpgroups use the
tensor cores meanwhile. Four of them, which share K or the rows, hide that for few tokens. For many, two warpgroups
take turns (`_w4a8_wide_sm90`): sums of 256 tokens fill the registers and decoding costs least; with 128 there are
enough tiles, or parts of K, for all SMs where the product is small. From 64 tokens on, steps take 1.4 times as long as
the pipes would: 1430 clocks for 256 tokens, 890 for 128.
"""

import dataclasses

from jax.experimental import pallas as pl

from qjax.pallas_kernels._mixed_gemm_tiles_sm90 import COLUMNS, MAX_SMEM, TileConfig
from qjax.pallas_kernels._w4a8_wide_sm90 import STEP, WideTileConfig
from qjax.wgmma_layout import BLOCK

_GHZ = 1.7
_MEMORY, _L2 = 18.0, 44.0  # bytes a clock of each SM
_GROUP_CLOCKS = (
    100.0  # latencies that a group adds: loads from shared memory, first sums of a product
)
_STEP_CLOCKS = 60.0  # barriers
_OVERHEAD = 1.4  # what steps of many tokens take longer than their pipes
_MULTICAST = 0.97  # of a step whose x comes for two CTAs

Tiles = TileConfig | WideTileConfig


@dataclasses.dataclass(frozen=True)
class Costs:
    """What a kind of operands costs.

    Attributes:
        decode: Integer instructions a weight.
        convert: Integer instructions for each sum of a group: 1 where it is int32.
        promotes: Whether each group's sums are added up in float32.
        group: Columns of a product: at most 128.
        scale_bytes: Bytes of scales and zero points for each weight.
    """

    decode: float
    convert: int
    promotes: bool
    group: int
    scale_bytes: float


def costs(k: int, group_size: int, *, integers: bool, zeros: bool, scale_bytes: int) -> Costs:
    """The costs of x of int8 (`integers`) or FP8, with `scale_bytes` for each scale of a weight."""
    decode = (7 / 8 if zeros else 3 / 8) if integers else (9 / 8 if zeros else 1)
    whole, group = group_size == k, min(group_size, 128)
    per_weight = 0.0 if whole else (scale_bytes + 2 * zeros) / group
    return Costs(decode, int(integers and not whole), not (integers and whole), group, per_weight)


def candidate_tiles(m: int, k: int, cost: Costs) -> list[Tiles]:
    """The tilings worth considering, each with as many stages as fit, 10 at most and 6 for many tokens."""
    columns = next((c for c in COLUMNS if c >= m), COLUMNS[-1])
    shapes = [(columns, 1, 4), (columns, 2, 2), (columns, 4, 1)]
    candidates: list[Tiles] = []
    if columns == COLUMNS[-1]:
        shapes = [(128, 2, 1), (64, 2, 2)]
        # Four groups in a step leave no registers for 256 tokens.
        wide = WideTileConfig(256 if cost.group >= 64 else 192, 2)
        for cluster in (1, 2) if m > 128 else ():
            config = dataclasses.replace(wide, cluster=cluster)
            candidates.append(config.deepest(cost.scale_bytes))
    for columns, blocks, parts in shapes:
        for splits in (1, 2, 4):
            config = TileConfig(columns, blocks, parts, 128, 2, splits)
            while config.stages < (10 if columns <= 32 else 6):
                deeper = dataclasses.replace(config, stages=config.stages + 1)
                if deeper.smem_bytes(cost.scale_bytes, x_bytes=1) > MAX_SMEM:
                    break
                config = deeper
            if splits > 1 and (k < splits * config.step or m > 256):
                continue
            if columns == 64 and (parts, splits) in ((4, 1), (4, 4), (2, 4)):
                continue  # there are no registers for the sums of other warpgroups or CTAs
            candidates.append(config)
            if splits == 2 and columns == 128:
                candidates.append(dataclasses.replace(config, tail=True))
    return candidates


def choose_tiles(m: int, n: int, k: int, cost: Costs, *, num_sms: int) -> Tiles:
    """The tiling with the least modelled time."""
    candidates = candidate_tiles(m, k, cost)
    return min(candidates, key=lambda c: modelled_us(c, m, n, k, cost, num_sms=num_sms))


def step_clocks(config: Tiles, cost: Costs) -> float:
    """Clocks of a pipeline stage: what its slowest pipe needs, or the chain of what one warpgroup does."""
    wide = isinstance(config, WideTileConfig)
    warpgroups, depth = (2, STEP) if wide else (config.blocks * config.parts, config.depth)
    # Of one warpgroup:
    weights, groups = BLOCK * depth, depth / min(cost.group, depth)
    sums = BLOCK * config.columns * groups
    integers = (weights * cost.decode + sums * cost.convert) / 64
    floats = sums * cost.promotes / 128
    tensor = weights * max(config.columns, 32) / 4096
    # Shared memory that a stage fills, from L2.
    step = depth if wide else config.step
    loaded = config.rows * step * (0.5 + cost.scale_bytes) + step * config.columns
    chain = groups * _GROUP_CLOCKS + integers + floats + tensor
    pipes = [warpgroups * t for t in (integers, integers / 2 + floats, tensor)]
    clocks = max(*pipes, loaded / _L2, chain)
    if config.columns >= 64:
        clocks *= _OVERHEAD * (_MULTICAST if wide and config.cluster > 1 else 1)
    return clocks + (0 if wide else _STEP_CLOCKS)


def modelled_us(config: Tiles, m: int, n: int, k: int, cost: Costs, *, num_sms: int) -> float:
    """Microseconds of rounds of steps, or of reading the weights; a launch and the sums' ends as `mixed_gemm`'s."""
    step_us = step_clocks(config, cost) / (1000 * _GHZ)
    if isinstance(config, WideTileConfig):
        rows, columns = config.tiles(m, n)
        us = pl.cdiv(rows * columns, num_sms // config.cluster) * (pl.cdiv(k, STEP) * step_us + 1.8)
    else:
        us = _rounds_us(config, m, n, k, step_us, num_sms=num_sms)
    memory_us = n * k * (0.5 + cost.scale_bytes) / (_MEMORY * num_sms * 1000 * _GHZ)
    # Neither hides the other wholly.
    return 3.1 + (us**3 + memory_us**3) ** (1 / 3)


def _rounds_us(config: TileConfig, m: int, n: int, k: int, step_us: float, *, num_sms: int):
    # Not every group of four SMs is free of others' borders.
    clusters = max(num_sms // config.splits * (3 if config.splits == 4 else 4) // 4, 1)
    alone, cut = config.rounds(m, n, clusters)
    if config.tail and not alone:
        return float("inf")  # the same as without
    steps, outputs = pl.cdiv(k, config.step), config.rows / BLOCK * config.columns
    epilogue_us = (0.0045 + 0.012 * (config.parts - 1)) * outputs
    us = alone * (steps * step_us + epilogue_us)
    if config.splits > 1:
        epilogue_us += 0.8 + 0.007 * config.splits * outputs
    return us + pl.cdiv(cut, clusters) * (pl.cdiv(steps, config.splits) * step_us + epilogue_us)
