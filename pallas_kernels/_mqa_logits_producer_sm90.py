"""The producer warpgroup of the indexer's logits: loads, and the -inf where nobody sees anything."""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qjax.pallas_kernels._mqa_logits_plan_sm90 import Plan

MOST_FILLS = 4  # steps filled between two loads


def produce(
    gmem,
    for_each_unit,
    worker,
    my_steps,
    plan: Plan,
    *,
    q_smem,
    weight_smem,
    bound_smem,
    key_smem,
    scale_smem,
    fill_smem,
    q_full,
    q_empty,
    full,
    empty,
    **_,
):
    """Loads the queries, weights and bounds of this worker's units, and their keys; fills with -inf.

    Args:
        gmem: The kernel's arrays by name.
        for_each_unit: Calls a function of each unit of the worker.
        worker: Number of this CTA.
        my_steps: Steps of all its units.
        plan: Of the kernel.
    """
    tile = plan.tile
    fill_smem[...] = jnp.full(fill_smem.shape, -jnp.inf, jnp.float32)
    plgpu.commit_smem()
    # Any worker may fill any step of any unit. Each takes an equal share of all (and leaves out those in ranges), a few
    # between two loads and the rest after them.
    quota, rest = divmod(plan.units * plan.steps, plan.workers)
    fill_begin = worker * quota + lax.min(worker, rest)
    fill_end = fill_begin + quota + lax.select(worker < rest, 1, 0)
    share = lax.div(fill_end - fill_begin + lax.max(my_steps, 1) - 1, lax.max(my_steps, 1))
    share = lax.min(share, MOST_FILLS)

    def fill(first, past):
        past = lax.min(past, fill_end)

        @pl.loop(lax.div(first, plan.steps), lax.div(past + plan.steps - 1, plan.steps))
        def _(unit):
            low = lax.max(first - unit * plan.steps, 0)
            high = lax.min(past - unit * plan.steps, plan.steps)
            begin = gmem["units"][unit, 0]
            end = begin + gmem["units"][unit + 1, 1] - gmem["units"][unit, 1]
            sequence, query = plan.place(unit)

            def store(step):
                columns = pl.ds(step * plan.step, plan.step)
                for row in range(0, min(plan.tile_queries, plan.queries), plan.fill_rows):
                    rows = pl.ds(query + row, plan.fill_rows)
                    plgpu.copy_smem_to_gmem(fill_smem, gmem["out"].at[sequence, rows, columns])

            pl.loop(low, lax.min(high, begin))(store)
            pl.loop(lax.max(low, end), high)(store)

    def load_unit(unit, first, steps, steps_before, units_before):
        sequence, query = plan.place(unit)
        buffer = lax.rem(units_before, 2)

        @pl.when(units_before >= 2)
        def _():
            plgpu.barrier_wait(q_empty.at[buffer])
            plgpu.commit_smem()  # orders the other warpgroups' reads before the next TMA writes

        plgpu.copy_gmem_to_smem(gmem["bounds"].at[unit], bound_smem.at[buffer], q_full.at[buffer])
        for group in range(tile.groups):
            rows = pl.ds((query + group * tile.queries) * plan.heads, plan.columns)
            for name, target in (
                ("query", q_smem.at[buffer, group]),
                ("weights", weight_smem.at[buffer, group, pl.ds(0, plan.columns)]),
            ):
                plgpu.copy_gmem_to_smem(gmem[name].at[sequence, rows], target, q_full.at[buffer])

        @pl.loop(0, steps)
        def _(i):
            count = steps_before + i
            slot = lax.rem(count, tile.stages)
            sources = _sources(gmem, sequence, first + i, plan)

            @pl.when(count >= tile.stages)
            def _():
                plgpu.barrier_wait(empty.at[slot])
                plgpu.commit_smem()

            for j, source in enumerate(sources):
                piece = pl.ds(j * plan.piece, plan.piece)
                for name, target in (("keys", key_smem), ("scales", scale_smem)):
                    plgpu.copy_gmem_to_smem(
                        gmem[name].at[source], target.at[slot, piece], full.at[slot]
                    )
            fill(fill_begin + count * share, fill_begin + (count + 1) * share)

    steps, units = for_each_unit(load_unit)
    fill(fill_begin + steps * share, fill_end)

    @pl.loop(lax.max(steps - tile.stages, 0), steps)
    def _(i):
        plgpu.barrier_wait(empty.at[lax.rem(i, tile.stages)])

    @pl.loop(lax.max(units - 2, 0), units)
    def _(i):
        plgpu.barrier_wait(q_empty.at[lax.rem(i, 2)])

    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def _sources(gmem, sequence, step, plan: Plan) -> list[tuple]:
    """Where the pieces of a step's keys are; those past the range's last page repeat it."""
    if plan.page_size is None:
        return [(pl.ds(step * plan.step, plan.step),)]
    last = lax.div(gmem["lengths"][sequence] - 1, plan.page_size)
    found = []
    for j in range(plan.pieces):
        key = step * plan.step + j * plan.piece
        page = gmem["table"][sequence, lax.min(lax.div(key, plan.page_size), last)]
        offset = pl.multiple_of(lax.rem(key, plan.page_size), plan.piece)
        found.append((page, pl.ds(offset, plan.piece)))
    return found
