"""What is static in prefill attention's kernel, its buffers and barriers, and its tiles of queries."""

import dataclasses
import math

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qjax.pallas_kernels._paged_attention_registers_sm90 import FP4, SCALE_BLOCK, Storage

ROWS = 64  # of queries, for each math warpgroup
WARPGROUPS = 2
Q_TILE = ROWS * WARPGROUPS
THREADS = 128  # of a warpgroup
LOG2E = math.log2(math.e)
SCALE_ROW = 128  # block scales of FP4 that TMA copies at least


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """Sizes of one CTA's buffers.

    Attributes:
        keys: Keys in a tile, a multiple of 16.
        stages: Tiles of keys, and of values, in flight.
        separate_output: Whether outputs have their own buffer, so that the next queries load while they leave;
            else they take the place of queries of the same size.
        overlap: Whether the softmax of a tile starts while the values of the tile before are still being multiplied,
            where no mask or soft cap needs the registers.
    """

    keys: int
    stages: int
    separate_output: bool
    overlap: bool

    def smem_bytes(self, dim: int, value_dim: int) -> int:
        """Bytes of the tiles of 16-bit queries, keys, values and outputs."""
        tiles = self.stages * self.keys * (dim + value_dim)
        return 2 * (tiles + Q_TILE * (dim + (value_dim if self.separate_output else 0)))


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static in one kernel."""

    batch: int
    q_heads: int
    kv_heads: int
    rows: int  # queries per sequence
    dim: int
    value_dim: int
    tile: TileConfig
    page_size: int | None
    causal: bool
    ragged: bool  # sequences may end inside a tile of keys
    window: int | None
    soft_cap: float | None
    sinks: bool
    narrow: str | None  # dtype of 8- and 4-bit pages
    token_scales: bool  # pages or tokens have scales of their own
    page_scales: bool  # pages have
    ctas: int

    @property
    def pieces(self) -> int:
        """Loads that make up a tile of keys."""
        return 1 if self.page_size is None else max(self.tile.keys // self.page_size, 1)

    @property
    def copies(self) -> int:
        """TMA copies of a tile: its codes and FP4's block scales."""
        return self.pieces * (2 if self.narrow == FP4 else 1)

    @property
    def producers(self) -> int:
        """Warpgroups: one for keys and values, or one for each of FP4's, which take the longest to widen."""
        return 2 if self.narrow == FP4 else 1

    @property
    def registers(self) -> tuple[int, int]:
        """Of a thread of a producer, and of a math warpgroup.

        Together no more than the CTA starts with, four times 128 or three times 168: the math warpgroups would wait
        for the rest for ever.
        """
        if self.producers == 2:
            return 48, 208
        return (72, 216) if self.narrow else (40, 232)

    @property
    def swizzle(self) -> int:
        return 128 if self.dim % 64 == 0 and self.value_dim % 64 == 0 else 64


def scratch(plan: Plan, dtype, out_dtype) -> dict:
    """Shared memory and barriers of the kernel; `dtype` is what the tensor cores multiply."""
    tile, swizzle = plan.tile, plan.swizzle
    tiled = (plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle))
    arrivals = 1 if plan.narrow else plan.pieces
    full = plgpu.Barrier(num_arrivals=arrivals, num_barriers=tile.stages)
    empty = plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=tile.stages)
    queries = plgpu.SMEM((WARPGROUPS, ROWS, plan.dim), dtype, transforms=tiled)
    output = plgpu.SMEM((WARPGROUPS, ROWS, plan.value_dim), out_dtype, transforms=tiled)
    buffers = dict(
        qo_smem=(queries, output) if tile.separate_output else (queries,),
        q_full=plgpu.Barrier(num_barriers=WARPGROUPS),
        q_empty=plgpu.Barrier(num_barriers=WARPGROUPS),
    )
    for name, dim in (("k_", plan.dim), ("v_", plan.value_dim)):
        buffers |= {
            name + "smem": plgpu.SMEM((tile.stages, tile.keys, dim), dtype, transforms=tiled),
            name + "full": full,
            name + "empty": empty,
            name + "arrived": plgpu.Barrier(num_arrivals=plan.copies),
        }
        if plan.narrow:
            storage = Storage(plan.narrow, dim)
            stored, columns = storage.stored
            shape = (tile.keys, columns)
            buffers[name + "narrow"] = plgpu.SMEM(shape, stored, transforms=storage.transforms)
        if plan.narrow == FP4:
            rows = tile.keys * dim // (SCALE_ROW * SCALE_BLOCK)
            buffers[name + "blocks"] = plgpu.SMEM((rows, SCALE_ROW), jnp.float8_e4m3fn)
    return buffers


@dataclasses.dataclass(frozen=True)
class Item:
    """One tile of queries: scalars of the kernel.

    Attributes:
        sequence: Index in the batch.
        head: Query head.
        kv_head: KV head.
        row: First query.
        position: Position of the first query.
        length: Keys of the sequence.
        first: First visible tile of keys.
        low: First tile that every query sees from its start on.
        high: First tile that some query does not see up to its end.
        last: End of the visible tiles; at least one is visited, if only to be masked.
    """

    sequence: Array
    head: Array
    kv_head: Array
    row: Array
    position: Array
    length: Array
    first: Array
    low: Array
    high: Array
    last: Array


def item_at(at, plan: Plan, offsets_gmem, query_lengths_gmem, lengths_gmem) -> Item:
    """The item of an entry of the schedule: tile of queries + tiles * (head + heads * sequence)."""
    q_tiles = pl.cdiv(plan.rows, Q_TILE)
    q_tile, at = lax.rem(at, q_tiles), lax.div(at, q_tiles)
    head, sequence = lax.rem(at, plan.q_heads), lax.div(at, plan.q_heads)
    kv_head = lax.div(head, plan.q_heads // plan.kv_heads)
    row, keys = q_tile * Q_TILE, plan.tile.keys
    length, count = lengths_gmem[sequence], query_lengths_gmem[sequence]
    position = offsets_gmem[sequence] + row
    end = position + lax.min(Q_TILE, count - row)  # past the last query's position
    visible = lax.min(length, end) if plan.causal else length
    last = lax.max(lax.div(visible + keys - 1, keys), 1)
    last = lax.select(row < count, last, 1)
    high = lax.div(lax.max(lax.min(length, position + 1) if plan.causal else length, 0), keys)
    first = low = 0
    if plan.window is not None:
        first = lax.min(lax.div(lax.max(position - plan.window + 1, 0), keys), last - 1)
        low = lax.div(lax.max(end - plan.window, 0) + keys - 1, keys)
    return Item(
        sequence=sequence,
        head=head,
        kv_head=kv_head,
        row=row,
        position=position,
        length=length,
        first=first,
        low=low,
        high=high,
        last=last,
    )
