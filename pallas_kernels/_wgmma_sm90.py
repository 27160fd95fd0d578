"""Hopper wgmma that starts a sum instead of adding to one.

`plgpu.wgmma` adds to an accumulator that must first be filled with zeros. Where a kernel promotes two
products in one loop body, LLVM shares the register that holds the zero, ptxas then no longer sees that the
second sum starts at zero, and spends a move for each of its registers and spills (ptxas 13.5: 64 moves and up
to 170 registers spilled for 64x128). Here the first instruction has scale-d = false: it ignores the register.

Both products return complete sums (they wait), so a register operand may be overwritten afterwards.

A product may take the registers of an earlier one, but not in a loop of one step: LLVM unrolls it, and ptxas (13.0 and
13.5) then takes 0 + a of the first register of one product for that of the other.
"""

import functools

import numpy as np
from jax import Array
from jax import numpy as jnp
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import mma_utils, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, vector

_PTX_TYPES = {
    "float8_e4m3fn": "e4m3",
    "float8_e5m2": "e5m2",
    "bfloat16": "bf16",
    "float16": "f16",
    "int8": "s8",
}
_K_BYTES = 32  # of one instruction


def fp8_product(
    left, right, *, swizzle: int, tiled: bool = True, recycle: Array | None = None
) -> Array:
    """left @ right.T in float32.

    Args:
        left: Shared memory [64, K], e4m3 or e5m2, tiled (8, swizzle) and swizzled.
        right: Shared memory [N, K], likewise; N a multiple of 8 up to 256.
        swizzle: Bytes: 32, 64 or 128.
        tiled: False if the operands are swizzled without tiling. With K = swizzle the bytes are the same,
            but TMA may then start at any row of an array, not only at every eighth.
        recycle: An earlier product whose registers may hold this one.

    Returns:
        [64, N] in ``Layout.WGMMA``.
    """
    types = [_PTX_TYPES[jnp.dtype(ref.dtype).name] for ref in (left, right)]
    emit = functools.partial(_emit, types=types, swizzle=swizzle, first=0)

    def product(ctx, left, right, *recycle):
        del ctx
        return emit(left, (right,), recycle)

    product.interpret_impl = lambda left, right, *recycle: _reference(left, right)  # pyright: ignore[reportFunctionMemberAccess]
    if tiled:
        ref = _tiled(left.dtype, swizzle)
    else:
        ref = plgpu.RefType((plgpu.SwizzleTransform(swizzle),))
    return _inline(product, (ref, ref), (left, right), recycle, right.shape[0])


def mixed_product(
    left: Array,
    right,
    *,
    first: int,
    recycle: Array | None = None,
    total: Array | None = None,
) -> Array:
    """left @ right[:, first : first + K].T, the left operand in registers; or that added to `total`.

    Args:
        left: [64, K], bfloat16 or float16 in ``Layout.WGMMA``, K a multiple of 16; or float8_e4m3fn or int8 in
            ``Layout.WGMMA_8BIT``, K a multiple of 32.
        right: Shared memory [N, K'] of the same dtype, swizzled by 128 bytes: of 16 bits and tiled (8, 64), or of 8
            bits and not tiled, K' = 128.
        first: First column of `right`, of left's multiples.
        recycle: An earlier product whose registers may hold this one.
        total: [64, N] in ``Layout.WGMMA``, in whose registers the sum goes.

    Returns:
        [64, N] in ``Layout.WGMMA``: float32, or int32 (exact) of int8.
    """
    k = left.shape[1]
    types = [_PTX_TYPES[jnp.dtype(left.dtype).name]] * 2
    accumulate = total is not None
    emit = functools.partial(_emit, types=types, swizzle=128, first=first, accumulate=accumulate)

    def product(ctx, left, right, *held):
        del ctx
        return emit(left, (right,), held)

    def reference(left, right, *held):
        found = _reference(left, right[:, first : first + k])
        return held[0] + found if accumulate else found

    product.interpret_impl = reference  # pyright: ignore[reportFunctionMemberAccess]
    if left.dtype.itemsize == 2:
        arg_types = (plgpu.Layout.WGMMA, _tiled(left.dtype, 128))
    else:
        arg_types = (plgpu.Layout.WGMMA_8BIT, plgpu.RefType((plgpu.SwizzleTransform(128),)))
    held = total if accumulate else recycle
    return _inline(product, arg_types, (left, right), held, right.shape[0], _sum_dtype(left.dtype))


def fp8_register_product(left: Array, rights, *, recycle: Array | None = None) -> Array:
    """left @ (sum of rights).T in float32, the left operand in registers.

    Args:
        left: [64, 128], e4m3, in ``Layout.WGMMA_8BIT``.
        rights: Shared memory [N, 128] of each, e4m3 or e5m2, swizzled by 128 bytes without tiling.
        recycle: An earlier product whose registers may hold this one.

    Returns:
        [64, N] in ``Layout.WGMMA``.
    """
    types = [_PTX_TYPES[jnp.dtype(x.dtype).name] for x in (left, *rights)]

    def product(ctx, left, *rest):
        del ctx
        rights_, recycle = rest[: len(rights)], rest[len(rights) :]
        return _emit(left, rights_, recycle, types=types, swizzle=128, first=0)

    def reference(left, *rest):
        return sum(_reference(left, right) for right in rest[: len(rights)])

    product.interpret_impl = reference  # pyright: ignore[reportFunctionMemberAccess]
    ref = plgpu.RefType((plgpu.SwizzleTransform(128),))
    arg_types = (plgpu.Layout.WGMMA_8BIT, *(ref for _ in rights))
    return _inline(product, arg_types, (left, *rights), recycle, rights[0].shape[0])


def fp8_register_products(lefts: tuple[Array, ...], rights) -> tuple[Array, ...]:
    """`fp8_register_product` of each left operand, which wait for each other only once.

    Args:
        lefts: As there.
        rights: As there.

    Returns:
        As there, of each.
    """
    types = [_PTX_TYPES[jnp.dtype(x.dtype).name] for x in (lefts[0], *rights)]

    def product(ctx, *operands):
        del ctx
        lefts_, rights_ = operands[: len(lefts)], operands[len(lefts) :]
        return tuple(_emit_several(lefts_, rights_, types))

    def reference(*operands):
        lefts_, rights_ = operands[: len(lefts)], operands[len(lefts) :]
        return tuple(sum(_reference(left, right) for right in rights_) for left in lefts_)

    product.interpret_impl = reference  # pyright: ignore[reportFunctionMemberAccess]
    ref = plgpu.RefType((plgpu.SwizzleTransform(128),))
    arg_types = (*(plgpu.Layout.WGMMA_8BIT for _ in lefts), *(ref for _ in rights))
    shape = (64, rights[0].shape[0])
    out = plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=plgpu.Layout.WGMMA)
    return_type = tuple(out for _ in lefts)
    return plgpu.inline_mgpu(arg_types=arg_types, return_type=return_type)(product)(*lefts, *rights)


def mixed_accumulate(total: Array, left: Array, right) -> Array:
    """total + left @ right.T in float32, the left operand in registers; total's registers hold the sum.

    Args:
        total: [64, N] in ``Layout.WGMMA``.
        left: [64, 64], bfloat16 or float16, in ``Layout.WGMMA``.
        right: Shared memory [N, 64] of the same dtype, swizzled by 128 bytes without tiling.

    Returns:
        [64, N] in ``Layout.WGMMA``.
    """
    types = [_PTX_TYPES[jnp.dtype(left.dtype).name]] * 2

    def product(ctx, left, right, total):
        del ctx
        return _emit(left, (right,), (total,), types=types, swizzle=128, first=0, accumulate=True)

    product.interpret_impl = lambda left, right, total: total + _reference(left, right)  # pyright: ignore[reportFunctionMemberAccess]
    arg_types = (plgpu.Layout.WGMMA, plgpu.RefType((plgpu.SwizzleTransform(128),)))
    return _inline(product, arg_types, (left, right), total, right.shape[0])


def load_columns(ref, first: Array | None = None, *, columns: int | None = None) -> Array:
    """A vector for the columns of a sum, from any address.

    `plgpu.load` reads it in pairs, which a start at an odd element would misalign.

    Args:
        ref: Shared or global memory [N], float32.
        first: int32, the first element; past the last one, that is repeated.
        columns: How many with `first`, otherwise all; a multiple of 8.

    Returns:
        [columns] in ``Layout.WGMMA.reduce(0)``.
    """
    shape = ref.shape if columns is None else (columns,)

    def load(ctx, ref, *first):
        del ctx
        layout, f32 = fa.WGMMA_COL_LAYOUT, ir.F32Type.get()
        index = ir.IndexType.get()
        one, last = (arith.constant(index, i) for i in (1, ir.MemRefType(ref.type).shape[0] - 1))

        def at(i):
            if not first:
                return i
            (start,) = first[0].registers.flat
            return arith.minsi(arith.addi(i, arith.index_cast(index, start)), last)

        values = np.empty(layout.registers_shape(shape), dtype=object)
        for place, (i,) in zip(np.ndindex(values.shape), layout.thread_idxs(shape), strict=True):
            pair = [memref.load(ref, [at(j)]) for j in (i, arith.addi(i, one))]
            values[place] = vector.from_elements(ir.VectorType.get((2,), f32), pair)
        return fa.FragmentedArray(_registers=values, _layout=layout, _is_signed=None)

    def reference(ref, *first):
        if not first:
            return ref
        return ref[jnp.minimum(first[0] + jnp.arange(shape[0]), ref.shape[0] - 1)]

    load.interpret_impl = reference  # pyright: ignore[reportFunctionMemberAccess]
    layout = plgpu.Layout.WGMMA.reduce(0)
    out = plgpu.ShapeDtypeStruct(shape, jnp.float32, layout=layout)
    args = (ref,) if first is None else (ref, first)
    # A scalar has no layout; any will do.
    types = (plgpu.RefType(), layout)[: len(args)]
    return plgpu.inline_mgpu(arg_types=types, return_type=out)(load)(*args)


def _sum_dtype(dtype):
    return jnp.int32 if dtype == jnp.int8 else jnp.float32


def _reference(left: Array, right: Array) -> Array:
    if left.dtype == jnp.int8:
        return jnp.matmul(left, right.T, preferred_element_type=jnp.int32)
    return jnp.matmul(left.astype(jnp.float32), right.astype(jnp.float32).T, precision="highest")


def _tiled(dtype, swizzle: int) -> plgpu.RefType:
    columns = swizzle // jnp.dtype(dtype).itemsize
    return plgpu.RefType((plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(swizzle)))


def _inline(
    product, arg_types, args, recycle: Array | None, columns: int, dtype: DTypeLike = jnp.float32
) -> Array:
    if recycle is not None:
        arg_types, args = (*arg_types, plgpu.Layout.WGMMA), (*args, recycle)
    out = plgpu.ShapeDtypeStruct((64, columns), dtype, layout=plgpu.Layout.WGMMA)
    return plgpu.inline_mgpu(arg_types=arg_types, return_type=out)(product)(*args)


def _emit(
    left, rights, recycle, *, types, swizzle: int, first: int, accumulate: bool = False
) -> fa.FragmentedArray:
    """The instructions of one product: fence, K/k of them for each right operand, commit, wait."""
    itemsize = 2 if types[0] in ("bf16", "f16") else 1
    integers = types[0] == "s8"
    columns = _shape(rights[0])[0]
    count, layout = columns // 2, fa.WGMMA_LAYOUT_ACC_32BIT
    kind = ir.IntegerType.get_signless(32) if integers else ir.F32Type.get()
    recycled = [_scalar(r) for a in recycle for r in a.to_layout(layout).registers.flat]
    in_registers = isinstance(left, fa.FragmentedArray)
    if in_registers:
        i32 = ir.IntegerType.get_signless(32)
        words = [utils.bitcast(r, i32) for r in left.registers.flat]
        depth, left_stride = left.shape[1], 0
        # With 16 bits the left operand in registers leaves the right one's transposition to say.
        flags = "1, 1, 0" if itemsize == 2 else "1, 1"
    else:
        base, left_stride = _descriptor(left, swizzle, itemsize, 64, is_right=False)
        depth = _shape(left)[1]
        words, flags = [base], "1, 1"
    flags = "" if integers else f", {flags}"
    described = [_descriptor(r, swizzle, itemsize, columns, is_right=True) for r in rights]

    operand = count + len(recycled)  # each recycled register is an input tied to an output
    right_operand = operand + len(words)
    sums = "{" + ",".join(f"${i}" for i in range(count)) + "}"
    ptx = ["{", ".reg .pred add; .reg .b64 l, r;", "wgmma.fence.sync.aligned;"]
    # False either way, but ptxas must not see it where registers are recycled: it would untie them.
    if accumulate:
        ptx.append("setp.ne.b32 add, 1, 0;")
    else:
        ptx.append(
            f"setp.eq.b64 add, ${right_operand}, 0;" if recycled else "setp.ne.b32 add, 0, 0;"
        )
    for i in range(depth * itemsize // _K_BYTES):
        if in_registers:
            a = "{" + ",".join(f"${operand + 4 * i + j}" for j in range(4)) + "}"
        else:
            a, group = "l", divmod(i * _K_BYTES, swizzle)
            offset = mma_utils.encode_addr(group[0] * left_stride + group[1])
            ptx.append(f"add.s64 l, ${operand}, {offset};")
        group, within = divmod(first * itemsize + i * _K_BYTES, swizzle)
        for j, (_, right_stride) in enumerate(described):
            offset = mma_utils.encode_addr(group * right_stride + within)
            ptx.append(f"add.s64 r, ${right_operand + j}, {offset};")
            ptx.append(
                f"wgmma.mma_async.sync.aligned.m64n{columns}k{_K_BYTES // itemsize}"
                f".{'s32' if integers else 'f32'}.{types[0]}.{types[1 + j]} {sums}, {a}, r, add{flags};"
            )
            if (i, j) == (0, 0) and not accumulate:
                ptx.append("setp.ne.b32 add, 1, 0;")
    ptx += ["wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;", "}"]
    constraints = ["=r" if integers else "=f"] * count + [str(i) for i in range(len(recycled))]
    constraints += ["r" if in_registers else "l"] * len(words) + ["l"] * len(rights)
    registers = llvm.inline_asm(
        llvm.StructType.get_literal([kind] * count),
        [*recycled, *words, *(base for base, _ in described)],
        "\n".join(ptx),
        ",".join(constraints),
        has_side_effects=True,
    )
    values = np.empty(count, dtype=object)
    for i in range(count):
        value = llvm.extractvalue(kind, registers, [i])
        values[i] = vector.from_elements(ir.VectorType.get((1,), kind), [value])
    values = values.reshape(layout.registers_shape((64, columns)))
    signed = True if integers else None
    array = fa.FragmentedArray(_registers=values, _layout=layout, _is_signed=signed)
    return array.to_layout(fa.WGMMA_LAYOUT)


def _emit_several(lefts, rights, types) -> list[fa.FragmentedArray]:
    """The instructions of a product of each left operand in registers: those of all are in flight together."""
    columns, depth = _shape(rights[0])[0], lefts[0].shape[1]
    count, layout, f32 = columns // 2, fa.WGMMA_LAYOUT_ACC_32BIT, ir.F32Type.get()
    i32 = ir.IntegerType.get_signless(32)
    words = [utils.bitcast(r, i32) for left in lefts for r in left.registers.flat]
    described = [_descriptor(r, 128, 1, columns, is_right=True)[0] for r in rights]
    total, per_left = count * len(lefts), depth // 8
    right_operand = total + len(words)
    ptx = ["{", ".reg .pred add; .reg .b64 r;", "wgmma.fence.sync.aligned;"]
    ptx.append("setp.ne.b32 add, 0, 0;")
    for i in range(depth // _K_BYTES):
        for j in range(len(rights)):
            offset = mma_utils.encode_addr(i * _K_BYTES)
            ptx.append(f"add.s64 r, ${right_operand + j}, {offset};")
            for n in range(len(lefts)):
                sums = ",".join(f"${n * count + c}" for c in range(count))
                first = total + per_left * n + 4 * i
                a = ",".join(f"${first + c}" for c in range(4))
                ptx.append(
                    f"wgmma.mma_async.sync.aligned.m64n{columns}k{_K_BYTES}.f32.{types[0]}.{types[1 + j]}"
                    f" {{{sums}}}, {{{a}}}, r, add, 1, 1;"
                )
            if (i, j) == (0, 0):
                ptx.append("setp.ne.b32 add, 1, 0;")
    ptx += ["wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;", "}"]
    constraints = ["=f"] * total + ["r"] * len(words) + ["l"] * len(rights)
    registers = llvm.inline_asm(
        llvm.StructType.get_literal([f32] * total),
        [*words, *described],
        "\n".join(ptx),
        ",".join(constraints),
        has_side_effects=True,
    )
    arrays = []
    for n in range(len(lefts)):
        values = np.empty(count, dtype=object)
        for i in range(count):
            value = llvm.extractvalue(f32, registers, [n * count + i])
            values[i] = vector.from_elements(ir.VectorType.get((1,), f32), [value])
        values = values.reshape(layout.registers_shape((64, columns)))
        array = fa.FragmentedArray(_registers=values, _layout=layout, _is_signed=None)
        arrays.append(array.to_layout(fa.WGMMA_LAYOUT))
    return arrays


def _shape(ref: ir.Value) -> tuple[int, int]:
    """Rows and columns of an operand in shared memory."""
    if ref.type.rank == 2:
        return tuple(ref.type.shape)
    return mma_utils.tiled_memref_shape(ref)[0]


def _descriptor(ref, swizzle: int, itemsize: int, rows: int, *, is_right: bool):
    """The matrix descriptor of an operand, and the bytes between its swizzle-wide column groups."""
    width = swizzle // itemsize
    if ref.type.rank == 2:  # not tiled: one column group, whose atoms of 8 rows follow one another
        assert _shape(ref)[1] == width, f"an untiled operand has {width} columns: {ref.type}"
        base = mma_utils.encode_descriptor(
            ref, leading_byte_offset=0, stride_byte_offset=8 * swizzle, swizzle=swizzle
        )
        return base, 0
    if is_right:
        ref = utils.memref_transpose(ref, (1, 0, 3, 2))
    (base, _), (_, stride), fastest = mma_utils.create_descriptor(
        ref,
        swizzle=swizzle,
        large_tile=(width, width) if is_right else (rows, width),
        group_size=(width, rows) if is_right else (rows, width),
        logical_k_major=is_right,
    )
    assert fastest == mma_utils.Dim.K
    return base, stride


def _scalar(register: ir.Value) -> ir.Value:
    i32 = ir.IntegerType.get_signless(32)
    zero = llvm.ConstantOp(i32, ir.IntegerAttr.get(i32, 0)).result
    return llvm.extractelement(register, zero)
