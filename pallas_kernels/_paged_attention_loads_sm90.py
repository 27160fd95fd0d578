"""What a warpgroup of the decode attention kernel reads beside keys and values, and the sum of its warps' parts.

`_paged_attention_registers_sm90` says how the arrays lie.
"""

import functools

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from qjax.pallas_kernels import _paged_attention_registers_sm90 as reg


def queries(query, sequence, head, block, *, group: int, storage: reg.Storage) -> Array:
    """The 16 rows of a row block, once for every warp.

    Args:
        query: Global memory [B, T, N, H], bfloat16 or float16.
        sequence: Index into B.
        head: KV head.
        block: Rows 16 * block and on of the T * group rows (t, g); those past the end repeat the last.
        group: Query heads of a KV head.
        storage: Of the pages; columns are in its `key_order`.

    Returns:
        [64, H] of the query's dtype.
    """
    _, steps, heads, dim = query.shape
    rows = steps * group
    order = storage.key_order()

    def load(ctx, query, sequence, head, block):
        del ctx
        dtype = ir.MemRefType(query.type).element_type
        lane, base = reg.lane(), utils.memref_ptr(query)
        pair = arith.remui(lane, reg.i32(4))
        starts = []
        for half in range(2):
            row = arith.addi(arith.muli(reg.value_of(block), reg.i32(reg.ROWS)), reg.i32(8 * half))
            row = arith.minsi(arith.addi(row, arith.divui(lane, reg.i32(4))), reg.i32(rows - 1))
            step, member = arith.divui(row, reg.i32(group)), arith.remui(row, reg.i32(group))
            index = arith.addi(arith.muli(reg.value_of(sequence), reg.i32(steps)), step)
            index = arith.addi(arith.muli(index, reg.i32(heads)), member)
            index = arith.addi(index, arith.muli(reg.value_of(head), reg.i32(group)))
            starts.append(arith.muli(index, reg.i32(dim)))
        # A pair of columns is a pair of channels; its place depends linearly on the lane.
        registers, vec = [], ir.VectorType.get((2,), dtype)
        for tile in range(dim // 8):
            first, second = int(order[8 * tile]), int(order[8 * tile + 2])
            offset = arith.addi(arith.muli(pair, reg.i32(second - first)), reg.i32(first))
            for start in starts:
                at = arith.extui(ir.IntegerType.get_signless(64), arith.addi(start, offset))
                at = utils.getelementptr(base, [at], dtype)
                if (apart := int(order[8 * tile + 1]) - first) == 1:
                    registers.append(llvm.load(vec, at))
                else:
                    other = utils.getelementptr(at, [apart], dtype)
                    pair_of = [llvm.load(dtype, at), llvm.load(dtype, other)]
                    registers.append(vector.from_elements(vec, pair_of))
        return reg.array(registers, dim)

    def reference(query, sequence, head, block):
        row = jnp.minimum(block * reg.ROWS + jnp.arange(reg.ROWS), rows - 1)
        found = query[sequence, row // group, head * group + row % group]
        return jnp.tile(found[:, order], (reg.WARPS, 1))

    load.interpret_impl = reference  # pyright: ignore[reportFunctionMemberAccess]
    kinds = (None, *[reg.SCALAR] * 3)
    return reg.inline(load, kinds, (64, dim), query.dtype)(query, sequence, head, block)


def row_values(values, start, block, *, repeat: int, count: int, turned: bool = False) -> Array:
    """values[start + r // repeat or r % -repeat] of each row r of a row block.

    Args:
        values: Global memory of any shape, float32 or int32.
        start: First element.
        block: The row block.
        repeat: Rows that share a value if positive; number of values that repeat if negative.
        count: Rows; those past the end repeat the last.
        turned: Whether the first eight rows are wanted as columns.

    Returns:
        [64] in ``Layout.WGMMA.reduce(1)``; turned, [64, 8] in ``Layout.WGMMA``.
    """

    def load(ctx, values, start, block):
        del ctx
        dtype = ir.MemRefType(values.type).element_type
        base, vec = utils.memref_ptr(values), ir.VectorType.get((1,), dtype)
        first = arith.muli(reg.value_of(block), reg.i32(reg.ROWS))
        found = []
        for i in range(2):
            if turned:  # two neighbouring columns
                inside = arith.muli(arith.remui(reg.lane(), reg.i32(4)), reg.i32(2))
                row = arith.addi(first, arith.addi(inside, reg.i32(i)))
            else:
                inside = arith.divui(reg.lane(), reg.i32(4))
                row = arith.addi(first, arith.addi(inside, reg.i32(8 * i)))
            row = arith.minsi(row, reg.i32(count - 1))
            divide = arith.divui if repeat > 0 else arith.remui
            at = arith.addi(reg.value_of(start), divide(row, reg.i32(abs(repeat))))
            at = arith.extui(ir.IntegerType.get_signless(64), at)
            at = utils.getelementptr(base, [at], dtype)
            found.append(llvm.load(dtype if turned else vec, at))
        signed = True if isinstance(dtype, ir.IntegerType) else None
        if turned:
            pair = vector.from_elements(ir.VectorType.get((2,), dtype), found)
            return reg.array([pair, pair], 8, signed=signed)
        layout = fa.WGMMA_ROW_LAYOUT
        found = np.array(found, dtype=object).reshape(layout.registers_shape((64,)))
        return fa.FragmentedArray(_registers=found, _layout=layout, _is_signed=signed)

    def reference(values, start, block):
        row = block * reg.ROWS + jnp.arange(8 if turned else 64) % reg.ROWS
        row = jnp.minimum(row, count - 1)
        found = values.reshape(-1)[start + (row // repeat if repeat > 0 else row % -repeat)]
        return jnp.broadcast_to(found, (64, 8)) if turned else found

    load.interpret_impl = reference  # pyright: ignore[reportFunctionMemberAccess]
    layout = plgpu.Layout.WGMMA if turned else plgpu.Layout.WGMMA.reduce(1)
    shape = (64, 8) if turned else (64,)
    out = plgpu.ShapeDtypeStruct(shape, values.dtype, layout=layout)
    wrap = plgpu.inline_mgpu(arg_types=(plgpu.RefType(), reg.SCALAR, reg.SCALAR), return_type=out)
    return wrap(load)(values, start, block)


def token_pages(table, sequence, tile, last_page, *, storage: reg.Storage, page_size: int) -> Array:
    """The page of each block of eight tokens of a tile.

    Args:
        table: Global memory int32 [B, pages].
        sequence: Index into B.
        tile: The tile's number in its sequence.
        last_page: Entry of the table that stands for those after it.
        storage: Of the pages.
        page_size: Tokens of a page.

    Returns:
        int32 [64, 8]: rows 8h .. 8h+7 of a warp's 16 have its blocks 2h and 2h+1 in even and odd columns.
    """
    width, n = table.shape[1], storage.tokens

    def load(ctx, table, sequence, tile, last_page):
        del ctx
        i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
        row = arith.extui(i64, arith.muli(reg.value_of(sequence), reg.i32(width)))
        row = utils.getelementptr(utils.memref_ptr(table), [row], i32)
        first = arith.muli(reg.value_of(tile), reg.i32(storage.tile))
        first = arith.addi(first, arith.muli(reg.warp(), reg.i32(n)))
        found = {}  # by the first of the blocks that share a page
        numbers = []
        for block in range(4):
            shared = 8 * min(block, n // 8 - 1) // min(page_size, n)
            if shared not in found:
                token = arith.addi(first, reg.i32(shared * min(page_size, n)))
                page = arith.minsi(arith.divui(token, reg.i32(page_size)), reg.value_of(last_page))
                found[shared] = llvm.load(
                    i32, utils.getelementptr(row, [arith.extui(i64, page)], i32)
                )
            numbers.append(found[shared])
        vec = ir.VectorType.get((2,), i32)
        pairs = [vector.from_elements(vec, numbers[i : i + 2]) for i in (0, 2)]
        return reg.array(pairs, 8, signed=True)

    def reference(table, sequence, tile, last_page):
        token = tile * storage.tile + jnp.arange(reg.WARPS)[:, None] * n
        token = token + 8 * jnp.minimum(jnp.arange(4), n // 8 - 1)[None]
        return _by_block(table[sequence, jnp.minimum(token // page_size, last_page)])

    load.interpret_impl = reference  # pyright: ignore[reportFunctionMemberAccess]
    kinds = (None, *[reg.SCALAR] * 3)
    return reg.inline(load, kinds, (64, 8), jnp.int32)(table, sequence, tile, last_page)


def load_scales(
    scales,
    pages: Array,
    head,
    tile,
    *,
    storage: reg.Storage,
    page_size: int,
    turned: bool = False,
) -> Array:
    """The scales of a tile's tokens, as they are carried to the tile's turn; see `spread_scales`.

    Args:
        scales: Global memory float32 [P, K], or [P, K, page_size].
        pages: From `token_pages`.
        head: KV head.
        tile: The tile's number in its sequence.
        storage: Of the pages.
        page_size: Tokens of a page.
        turned: Whether those of tokens are.

    Returns:
        float32 [64, 8], by blocks as in `token_pages`; or if tokens have their own, [64, storage.tokens / 2]:
        rows 8h .. 8h+7 and columns 8c .. 8c+7 have the tokens of block 2c + h, in each row, or turned, in each column.
    """
    (pool, heads), n = scales.shape[:2], storage.tokens
    per_token = len(scales.shape) == 3
    columns = n // 2 if per_token else 8

    def load(ctx, scales, pages, head, tile):
        del ctx
        i64, f32 = ir.IntegerType.get_signless(64), ir.F32Type.get()
        base, pair = utils.memref_ptr(scales), ir.VectorType.get((2,), f32)
        first = arith.muli(reg.value_of(tile), reg.i32(storage.tile))
        first = arith.addi(first, arith.muli(reg.warp(), reg.i32(n)))
        offset = arith.muli(arith.remui(reg.lane(), reg.i32(4)), reg.i32(2))
        if turned:
            offset = arith.divui(reg.lane(), reg.i32(4))
        single = turned or not per_token
        found, values = {}, []
        for block in range(n // 8):
            number = vector.extract(pages.registers.flat[block // 2], [], [block % 2])
            # The table of a sequence without tokens may hold anything.
            number = arith.maxsi(arith.minsi(number, reg.i32(pool - 1)), reg.i32(0))
            shared = block if per_token else 8 * block // min(page_size, n)
            if shared not in found:
                at = arith.muli(arith.extsi(i64, number), utils.c(heads, i64))
                at = arith.addi(at, arith.extui(i64, reg.value_of(head)))
                if per_token:
                    inside = arith.remui(arith.addi(first, reg.i32(8 * block)), reg.i32(page_size))
                    inside = arith.extui(i64, arith.addi(inside, offset))
                    at = arith.addi(arith.muli(at, utils.c(page_size, i64)), inside)
                at = utils.getelementptr(base, [at], f32)
                found[shared] = llvm.load(f32 if single else pair, at, alignment=4 if single else 8)
                if per_token and turned:
                    found[shared] = vector.broadcast(pair, found[shared])
            values.append(found[shared])
        if per_token:
            return reg.array(values, columns)
        values = [values[min(i, n // 8 - 1)] for i in range(4)]
        return reg.array([vector.from_elements(pair, values[i : i + 2]) for i in (0, 2)], columns)

    def reference(scales, pages, head, tile):
        number = pages.reshape(reg.WARPS, 2, 8, 8)[:, :, 0, :2].reshape(reg.WARPS, 4)
        number = jnp.clip(number, 0, pool - 1)
        if not per_token:
            return _by_block(scales[number, head])
        token = tile * storage.tile + jnp.arange(storage.tile).reshape(reg.WARPS, n // 8, 8)
        found = scales[number[:, : n // 8, None], head, token % page_size]
        if turned:
            tokens = jnp.broadcast_to(found.reshape(reg.WARPS, 1, n), (reg.WARPS, reg.ROWS, n))
            return reg.turn(tokens.reshape(64, n))
        found = found.reshape(reg.WARPS, n // 16, 2, 1, 8).transpose(0, 2, 3, 1, 4)
        return jnp.broadcast_to(found, (reg.WARPS, 2, 8, n // 16, 8)).reshape(64, columns)

    load.interpret_impl = reference  # pyright: ignore[reportFunctionMemberAccess]
    types = (plgpu.RefType(), plgpu.Layout.WGMMA, reg.SCALAR, reg.SCALAR)
    out = plgpu.ShapeDtypeStruct((64, columns), jnp.float32, layout=plgpu.Layout.WGMMA)
    return plgpu.inline_mgpu(arg_types=types, return_type=out)(load)(scales, pages, head, tile)


def spread_scales(
    scales: Array, *, storage: reg.Storage, per_token: bool, turned: bool = False
) -> Array:
    """float32 [64, storage.tokens]: the scale of each token, from `load_scales`; turned, half as many columns."""
    if turned and per_token:
        return scales
    n = storage.tokens
    columns = n // 2 if turned else n

    def spread(ctx, scales):
        del ctx
        pair = ir.VectorType.get((2,), ir.F32Type.get())
        registers = []
        for block in range(n // 8):
            if per_token:
                value = scales.registers.flat[block]
            else:
                value = vector.extract(scales.registers.flat[block // 2], [], [block % 2])
                value = vector.broadcast(pair, value)
            registers += [value] if turned else [value, value]
        return reg.array(registers, columns)

    def reference(scales):
        if per_token:
            found = scales.reshape(reg.WARPS, 2, 8, n // 16, 8)[:, :, 0].transpose(0, 2, 1, 3)
        else:
            found = scales.reshape(reg.WARPS, 2, 8, 8)[:, :, 0, :2].reshape(reg.WARPS, 4)[
                :, : n // 8
            ]
            found = jnp.repeat(found, 8, axis=1)
        found = found.reshape(reg.WARPS, 1, n)
        found = jnp.broadcast_to(found, (reg.WARPS, reg.ROWS, n)).reshape(64, n)
        return reg.turn(found) if turned else found

    spread.interpret_impl = reference  # pyright: ignore[reportFunctionMemberAccess]
    out = plgpu.ShapeDtypeStruct((64, columns), jnp.float32, layout=plgpu.Layout.WGMMA)
    return plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA,), return_type=out)(spread)(scales)


def tokens(shape: tuple[int, int], *, storage: reg.Storage, turned: bool) -> Array:
    """int32 of this shape: number in the tile of the token of each element of an array of tokens."""
    row, column = _places(shape)
    if turned:
        column = ((column >> 3) << 4) + (row & 15)
    return (row >> 4) * storage.tokens + column


def scaled_tokens(
    shape: tuple[int, int], *, storage: reg.Storage, per_token: bool, turned: bool
) -> Array:
    """int32 of this shape, that of `load_scales`: number in the tile of the scale's token, or of its block's first."""
    if turned and per_token:
        return tokens(shape, storage=storage, turned=True)
    row, column = _places(shape)
    if per_token:
        token = ((column >> 3) << 4) + (row & 8) + (column & 7)
    else:
        token = jnp.minimum(((row & 8) >> 2) + (column & 1), storage.tokens // 8 - 1) * 8
    return (row >> 4) * storage.tokens + token


def _places(shape):
    return (
        plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA) for axis in (0, 1)
    )


def over_tokens(values: Array, *, largest: bool, lanes: bool = True) -> Array:
    """The largest, or the sum, of each query's numbers of a warp's tokens.

    Args:
        values: float32, turned: [64, tokens / 2].
        largest: Which of these.
        lanes: Whether of all its tokens, else of those that a thread has.

    Returns:
        float32 [64, 8]: a warp's rows are alike; or if not all its tokens are in them, the sum is over rows, too.
    """
    columns = values.shape[1]
    join = arith.maximumf if largest else arith.addf

    def reduce(ctx, values):
        del ctx
        pair, found = ir.VectorType.get((2,), ir.F32Type.get()), []
        registers = list(values.registers.flat)
        for group in (registers,) if lanes else (registers[::2], registers[1::2]):
            numbers = []
            for j in range(2):
                number = functools.reduce(join, [vector.extract(r, [], [j]) for r in group])
                for distance in (4, 8, 16) if lanes else ():
                    number = join(number, utils.shfl_bfly(number, distance))
                numbers.append(number)
            found.append(vector.from_elements(pair, numbers))
        return reg.array(found if len(found) == 2 else found * 2, 8)

    def reference(values):
        take = jnp.max if largest else jnp.sum
        found = values.reshape(reg.WARPS, 16, columns // 8, 8)
        found = take(found, axis=(1, 2), keepdims=True) if lanes else take(found, axis=2)
        return jnp.broadcast_to(found.reshape(reg.WARPS, -1, 8), (reg.WARPS, 16, 8)).reshape(64, 8)

    reduce.interpret_impl = reference  # pyright: ignore[reportFunctionMemberAccess]
    return reg.inline(reduce, (plgpu.Layout.WGMMA,), (64, 8), jnp.float32)(values)


def largest_scale(scales: Array, *, lanes: bool) -> Array:
    """float32 [64, 8], all alike in a warp: its largest number; `lanes` says whether its threads have others."""

    def reduce(ctx, scales):
        del ctx
        numbers = [vector.extract(r, [], [j]) for r in scales.registers.flat for j in range(2)]
        number = functools.reduce(arith.maximumf, numbers)
        for distance in (1, 2, 4, 8, 16) if lanes else ():
            number = arith.maximumf(number, utils.shfl_bfly(number, distance))
        pair = vector.broadcast(ir.VectorType.get((2,), ir.F32Type.get()), number)
        return reg.array([pair, pair], 8)

    def reference(scales):
        found = jnp.max(scales.reshape(reg.WARPS, -1), axis=1)
        return jnp.broadcast_to(found[:, None, None], (reg.WARPS, 16, 8)).reshape(64, 8)

    reduce.interpret_impl = reference  # pyright: ignore[reportFunctionMemberAccess]
    return reg.inline(reduce, (plgpu.Layout.WGMMA,), (64, 8), jnp.float32)(scales)


def repeat(queries: Array, columns: int) -> Array:
    """[64, columns] with the eight columns again and again."""
    if columns == 8:
        return queries

    def spread(ctx, queries):
        del ctx
        registers = list(queries.registers.flat) * (columns // 8)
        return reg.array(registers, columns, signed=queries.is_signed)

    spread.interpret_impl = lambda x: jnp.tile(x, (1, columns // 8))  # pyright: ignore[reportFunctionMemberAccess]
    kinds = (plgpu.Layout.WGMMA,)
    return reg.inline(spread, kinds, (64, columns), queries.dtype)(queries)


def _by_block(values: Array) -> Array:
    """[64, 8] with values [warps, 4] of blocks, as `token_pages` has them."""
    found = values.reshape(reg.WARPS, 2, 1, 1, 2)
    return jnp.broadcast_to(found, (reg.WARPS, 2, 8, 4, 2)).reshape(64, 8)


def merge_rows(count: int, dim: int) -> int:
    """Rows that `merge` returns: at least `count`, and as many as a warpgroup can share evenly."""
    return next(r for r in range(count, reg.ROWS + 1) if r * dim % 128 == 0)


def merge(
    out: Array, scratch, part, *, rows: int, storage: reg.Storage, turned: bool = False
) -> Array:
    """The sum of the four warps' parts.

    Args:
        out: float32 [64, H], columns in ``storage.value_order``, or turned.
        scratch: A tile in shared memory, the first of (part + 1) * `merge_bytes` bytes that are free.
        part: Which of these parts to use.
        rows: From `merge_rows`.
        storage: Of the pages.
        turned: Whether `out` is.

    Returns:
        float32 [rows, H], its columns in order, in ``Layout.WG_STRIDED``.
    """
    dim = storage.dim
    width = next(v for v in (4, 2, 1) if rows * dim % (128 * v) == 0)
    layout = plgpu.Layout.WG_STRIDED((rows, dim), vec_size=width)
    stride = _merge_stride(dim)
    order = storage.value_order()
    kept = 8 if rows <= 8 else reg.ROWS

    def product(ctx, out, scratch, part):
        del ctx
        f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)
        base = arith.muli(reg.value_of(part), reg.i32(merge_bytes(rows, dim)))
        base = arith.addi(llvm.ptrtoint(i32, utils.memref_ptr(scratch)), base)
        lane, thread = reg.lane(), reg.thread()
        row = arith.addi(arith.muli(reg.warp(), reg.i32(kept)), arith.divui(lane, reg.i32(4)))
        pair = arith.remui(lane, reg.i32(4))
        utils.warpgroup_barrier()
        for i, register in enumerate(out.registers.flat):
            if turned:  # two rows of one of eight channels
                first, second = (int(order[8 * i + j]) for j in range(2))
                column = arith.muli(arith.divui(lane, reg.i32(4)), reg.i32(second - first))
                at = arith.addi(arith.muli(reg.warp(), reg.i32(kept)), arith.muli(pair, reg.i32(2)))
                at = arith.addi(arith.muli(at, reg.i32(stride)), column)
                at = arith.addi(base, arith.muli(arith.addi(at, reg.i32(first)), reg.i32(4)))
                values = [vector.extract(register, [], [j]) for j in range(2)]
                text = f"st.shared.f32 [$0], $1; st.shared.f32 [$0+{4 * stride}], $2;"
                utils.inline_ptx(text, at, *values, has_side_effects=True)
                continue
            tile, half = divmod(i, 2)
            if 8 * half >= kept:
                continue
            # Columns 2 * pair and 2 * pair + 1 of the tile.
            first, second, third = (int(order[8 * tile + j]) for j in range(3))
            at = arith.addi(arith.muli(pair, reg.i32(third - first)), reg.i32(first))
            at = arith.addi(arith.muli(arith.addi(row, reg.i32(8 * half)), reg.i32(stride)), at)
            at = arith.addi(base, arith.muli(at, reg.i32(4)))
            values = [vector.extract(register, [], [j]) for j in range(2)]
            step = second - first
            if step == 1:
                utils.inline_ptx(
                    "st.shared.v2.f32 [$0], {$1, $2};", at, *values, has_side_effects=True
                )
            else:
                utils.inline_ptx(
                    f"st.shared.f32 [$0], $1; st.shared.f32 [$0+{4 * step}], $2;",
                    at,
                    *values,
                    has_side_effects=True,
                )
        utils.warpgroup_barrier()
        registers = []
        for i in range(rows * dim // (128 * width)):
            flat = arith.muli(arith.addi(thread, reg.i32(128 * i)), reg.i32(width))
            at = arith.addi(
                arith.muli(arith.divui(flat, reg.i32(dim)), reg.i32(stride)),
                arith.remui(flat, reg.i32(dim)),
            )
            at = arith.addi(base, arith.muli(at, reg.i32(4)))
            total = None
            for warp in range(reg.WARPS):
                offset = warp * kept * stride * 4
                names = ", ".join(f"${j}" for j in range(width))
                kind = {1: "f32", 2: "v2.f32", 4: "v4.f32"}[width]
                names = names if width == 1 else f"{{{names}}}"
                found = utils.inline_ptx(
                    f"ld.shared.{kind} {names}, [${width}+{offset}];",
                    at,
                    result_types=[f32] * width,
                    has_side_effects=True,
                )
                found = list(found)
                total = (
                    found
                    if total is None
                    else [arith.addf(a, b) for a, b in zip(total, found, strict=True)]
                )
            registers.append(vector.from_elements(ir.VectorType.get((width,), f32), total))
        strided = layout.to_mgpu()
        found = np.array(registers, dtype=object).reshape(strided.registers_shape((rows, dim)))
        return fa.FragmentedArray(_registers=found, _layout=strided, _is_signed=None)

    def reference(out, scratch, part):
        del scratch, part
        out = reg.turn_back(out) if turned else out
        total = jnp.sum(out.reshape(reg.WARPS, reg.ROWS, dim), axis=0)
        return jnp.zeros_like(total).at[:, order].set(total)[:rows]

    product.interpret_impl = reference  # pyright: ignore[reportFunctionMemberAccess]
    shape = plgpu.ShapeDtypeStruct((rows, dim), jnp.float32, layout=layout)
    layouts = (plgpu.Layout.WGMMA, reg.tiled(storage), reg.SCALAR)
    return plgpu.inline_mgpu(arg_types=layouts, return_type=shape)(product)(out, scratch, part)


def merge_bytes(rows: int, dim: int) -> int:
    """Shared memory that `merge` needs."""
    return reg.WARPS * (8 if rows <= 8 else reg.ROWS) * _merge_stride(dim) * 4


def _merge_stride(dim: int) -> int:
    return dim + 8  # words of a row: eight rows start in different banks
