"""Tiles of the indexer's logits, their shared memory, and how the keys in ranges are divided among the SMs."""

import dataclasses
import functools

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qjax.pallas_kernels._mqa_logits_registers_sm90 import ROWS

WARPGROUPS = 2  # that multiply
KEYS = 2 * ROWS  # of a warpgroup's step
COLUMNS = 128  # of a product, at most: two in flight and both their weights fit the registers
FILL_ROWS = 8
SMEM_BYTES = 227 * 1024
MAX_STAGES = 6


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """What a CTA has of queries and keys at a time.

    Attributes:
        queries: Whose heads are the columns of one product.
        groups: Of so many queries in a tile.
        by_keys: Whether the two warpgroups share out a step's keys (256) or a tile's queries (and have the same
            128 keys).
        stages: Steps of keys in flight.
    """

    queries: int
    groups: int
    by_keys: bool
    stages: int


def choose_tiles(queries: int, heads: int, dim: int) -> TileConfig:
    """The tiles for sequences of so many queries.

    Few queries (decode) leave the keys to be shared out. Otherwise a tile has up to 512 heads, so that a key that comes
    from the L2 cache is multiplied often enough.

    Args:
        queries: Of a sequence.
        heads: H.
        dim: D.
    """
    # Two groups of 128 columns need 192 registers for accumulators and weights. With short products, or many queries in
    # one, ptxas finds no room for the rest.
    room = 2 if dim == 128 and heads > 16 else 1
    by_keys = queries * heads <= room * COLUMNS
    if by_keys:
        groups = next(
            g for g in range(1, queries + 1) if queries % g == 0 and queries // g * heads <= COLUMNS
        )
        tile = TileConfig(queries // groups, groups, by_keys, 1)
    else:
        tile = TileConfig(COLUMNS // heads, room * WARPGROUPS, by_keys, 1)
    one = Plan(1, queries, heads, dim, KEYS, None, tile, 1)
    per_stage = one.step * (dim + 4)
    stages = 1 + (SMEM_BYTES - one.smem_bytes) // per_stage
    return dataclasses.replace(tile, stages=min(stages, MAX_STAGES))


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static in one kernel."""

    batch: int
    queries: int  # of a sequence
    heads: int
    dim: int
    keys: int  # columns of the output
    page_size: int | None
    tile: TileConfig
    workers: int

    @property
    def tile_queries(self) -> int:
        return self.tile.queries * self.tile.groups

    @property
    def columns(self) -> int:
        """Of a product."""
        return self.tile.queries * self.heads

    @property
    def my_groups(self) -> int:
        """Groups of queries of one warpgroup."""
        return self.tile.groups // (1 if self.tile.by_keys else WARPGROUPS)

    @property
    def my_queries(self) -> int:
        return self.my_groups * self.tile.queries

    @property
    def step(self) -> int:
        """Keys in a step of the CTA."""
        return KEYS * (WARPGROUPS if self.tile.by_keys else 1)

    @property
    def steps(self) -> int:
        """In an output row."""
        return pl.cdiv(self.keys, self.step)

    @property
    def blocks(self) -> int:
        """Tiles of a sequence's queries."""
        return pl.cdiv(self.queries, self.tile_queries)

    @property
    def units(self) -> int:
        return self.batch * self.blocks

    def place(self, unit: Array) -> tuple[Array, Array]:
        """The sequence and the first query of a unit."""
        return lax.div(unit, self.blocks), lax.rem(unit, self.blocks) * self.tile_queries

    @property
    def piece(self) -> int:
        """Keys that are contiguous in memory."""
        return self.step if self.page_size is None else min(self.step, self.page_size)

    @property
    def pieces(self) -> int:
        return self.step // self.piece

    @property
    def fill_rows(self) -> int:
        """Rows of -inf that are written at once."""
        most = min(FILL_ROWS, self.queries)
        return next(n for n in range(most, 0, -1) if self.tile_queries % n == 0)

    @property
    def bound_slots(self) -> int:
        """Integers for the bounds of a tile's queries, in whole 128 bytes."""
        return pl.cdiv(2 * self.tile_queries, 32) * 32

    @property
    def registers(self) -> tuple[int, int]:
        """Of a thread of the producer and of the others; together 3 x 168, what the CTA starts with."""
        return (40, 232) if self.tile.by_keys else (24, 240)

    @property
    def smem_bytes(self) -> int:
        """Bytes of shared memory, barriers included."""
        queries = 2 * self.tile.groups * (self.columns * self.dim + 4 * COLUMNS)
        outputs = 4 * (2 * WARPGROUPS * self.my_queries * KEYS + self.fill_rows * self.step)
        return queries + outputs + self.tile.stages * self.step * (self.dim + 4) + 6 * 1024


def scratch(plan: Plan, dtype) -> dict:
    """Shared memory and barriers of the kernel."""
    tile, swizzled = plan.tile, (plgpu.SwizzleTransform(plan.dim),)
    return dict(
        q_smem=plgpu.SMEM((2, tile.groups, plan.columns, plan.dim), dtype, transforms=swizzled),
        # TMA writes to multiples of 128 bytes.
        weight_smem=plgpu.SMEM((2, tile.groups, COLUMNS), jnp.float32),
        bound_smem=plgpu.SMEM((2, plan.bound_slots), jnp.int32),
        key_smem=plgpu.SMEM((tile.stages, plan.step, plan.dim), dtype, transforms=swizzled),
        scale_smem=plgpu.SMEM((tile.stages, plan.step), jnp.float32),
        out_smem=plgpu.SMEM((WARPGROUPS, 2, plan.my_queries, KEYS), jnp.float32),
        fill_smem=plgpu.SMEM((plan.fill_rows, plan.step), jnp.float32),
        q_full=plgpu.Barrier(num_arrivals=2 * tile.groups + 1, num_barriers=2),
        q_empty=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=2),
        full=plgpu.Barrier(num_arrivals=2 * plan.pieces, num_barriers=tile.stages),
        empty=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=tile.stages),
    )


def schedule(bounds: Array, plan: Plan) -> tuple[Array, Array, Array]:
    """The steps of each unit (a tile of queries), and an equal share of all of them for each worker.

    Keys are independent of each other, so that a share may begin and end anywhere.

    Args:
        bounds: int32 [B, Q, 2] within 0..keys.
        plan: Of the kernel.

    Returns:
        The bounds of each unit's queries, int32 [units, bound_slots]; the first step of each unit and the steps of all
        units before it, int32 [units + 1, 2]; and of each worker its first step among those of all units, the one
        past its last, its first unit and the one past its last, int32 [workers, 4].
    """
    begin, end = bounds[..., 0], bounds[..., 1]
    begin = jnp.where(begin < end, begin, plan.keys)
    end = jnp.where(begin < end, end, 0)
    padding = ((0, 0), (0, plan.blocks * plan.tile_queries - plan.queries))
    begin = jnp.pad(begin, padding, constant_values=plan.keys).reshape(plan.units, -1)
    end = jnp.pad(end, padding).reshape(plan.units, -1)
    first = jnp.min(begin, axis=1) // plan.step
    last = (jnp.max(end, axis=1) + plan.step - 1) // plan.step
    counts = jnp.maximum(last - first, 0)
    past = jnp.cumsum(counts)
    zero, total = jnp.zeros((1,), jnp.int32), past[-1]
    units = jnp.stack(
        [jnp.concatenate([first, zero]), jnp.concatenate([zero, past])], axis=1
    ).astype(jnp.int32)
    number = jnp.arange(plan.workers + 1, dtype=jnp.int32)
    share, rest = total // plan.workers, total % plan.workers
    edges = number * share + jnp.minimum(number, rest)
    unit_of = functools.partial(jnp.searchsorted, past, side="right", method="compare_all")
    first_unit, last_unit = unit_of(edges[:-1]), unit_of(edges[1:] - 1)
    past_unit = jnp.where(edges[1:] > edges[:-1], last_unit + 1, first_unit)
    work = jnp.stack([edges[:-1], edges[1:], first_unit, past_unit], axis=1)
    bounds = jnp.stack([begin, end], axis=2).reshape(plan.units, -1)
    bounds = jnp.pad(bounds, ((0, 0), (0, plan.bound_slots - bounds.shape[1])))
    return bounds, units, work.astype(jnp.int32)
