"""What is static in decode attention's kernel: how it is split, its buffers and barriers."""

import dataclasses

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qjax.pallas_kernels import _paged_attention_loads_sm90 as loads
from qjax.pallas_kernels import _paged_attention_registers_sm90 as reg

SMEM_BYTES = 227 * 1024
BYTES_PER_US = 4.4e6  # that an H200 reads


@dataclasses.dataclass(frozen=True)
class Plan:
    """Static sizes of one call."""

    storage: reg.Storage
    page_size: int
    group: int
    queries: int
    splits: int
    stages: int
    window: int | None
    logit_scale: float
    soft_cap: float | None
    sinks: bool

    @property
    def rows(self) -> int:
        return self.group * self.queries

    @property
    def turned(self) -> bool:
        """Whether the products are (`_paged_attention_registers_sm90`)."""
        return self.rows <= 8

    @property
    def stat_columns(self) -> tuple[int, ...]:
        """What a query has is in each of a warp's rows, or turned, in each of eight columns."""
        return (8,) if self.turned else ()

    @property
    def warpgroups(self) -> int:
        return 1 if self.rows <= reg.ROWS else 2

    @property
    def row_blocks(self) -> int:
        """CTAs that share the rows."""
        return pl.cdiv(self.rows, reg.ROWS * self.warpgroups)

    @property
    def merged_rows(self) -> int:
        """Rows of a warpgroup's result."""
        return loads.merge_rows(min(self.rows, reg.ROWS), self.storage.dim)

    @property
    def pages_per_tile(self) -> int:
        return max(self.storage.tile // self.page_size, 1)


def ring_stages(storage: reg.Storage, warpgroups: int) -> tuple[int, int]:
    """Tiles of the ring, and CTAs that an SM then holds (by their registers: at most 3 or 2)."""
    size = 2 * storage.tile * storage.token_bytes
    for ctas in range(3 if storage.dim < 128 else 2, 1, -1) if warpgroups == 1 else ():
        stages = (SMEM_BYTES // ctas - 4096) // size
        if stages >= 2:
            return min(stages, 6), ctas
    return min((SMEM_BYTES - 4096) // size, 6), 1


def choose_splits(
    pairs: int, max_tokens: int, *, num_sms: int, ctas: int, storage: reg.Storage
) -> int:
    """Parts of the context that are done soonest if all sequences are as long as they may be.

    Args:
        pairs: CTAs of one split.
        max_tokens: Longest context that the page table can hold.
        num_sms: SMs to fill.
        ctas: CTAs that run at once on an SM.
        storage: Of the pages.
    """
    slots = num_sms * ctas
    whole = pairs * max_tokens * 2 * storage.token_bytes / BYTES_PER_US

    def microseconds(splits: int) -> float:
        waves, rest = divmod(pairs * splits, slots)
        # CTAs that have an SM to themselves are almost twice as fast.
        last = 0.0 if not rest else 0.55 if ctas > 1 and rest <= num_sms else 1.0
        combining = 0.0 if splits == 1 else 2.5 + 0.05 * splits
        reading = whole * (waves + last) * slots / (pairs * splits)
        return reading + 3.0 * (waves + (rest > 0)) + combining

    return min(range(1, max(1, min(max_tokens // (2 * storage.tile), 64)) + 1), key=microseconds)


def scratch(plan: Plan) -> dict:
    """Shared memory and barriers of the kernel."""
    storage = plan.storage
    dtype, columns = storage.stored
    shape = (plan.stages, 2, storage.tile, columns)
    copies = plan.pages_per_tile * (2 if storage.bits == 4 else 1)
    full = plgpu.Barrier(num_arrivals=copies, num_barriers=plan.stages)
    scales = {}
    if storage.bits == 4:
        rows = storage.tile * storage.dim // (128 * reg.SCALE_BLOCK)
        scales["block_scales"] = plgpu.SMEM((plan.stages, 2, rows, 128), jnp.float8_e4m3fn)
    stats = (plan.warpgroups, 128, *plan.stat_columns)
    return scales | dict(
        ring=plgpu.SMEM(shape, dtype, transforms=storage.transforms),
        tops=plgpu.SMEM(stats, jnp.float32),
        sums=plgpu.SMEM(stats, jnp.float32),
        keys_full=full,
        values_full=full,
        empty=plgpu.Barrier(num_arrivals=plan.warpgroups, num_barriers=plan.stages),
        done=plgpu.Barrier(num_arrivals=plan.warpgroups),
    )
