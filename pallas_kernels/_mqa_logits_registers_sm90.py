"""What a math warpgroup of the indexer's logits does in registers: products in flight, and the sum over heads.

A product is 64 keys by the heads of a few queries, [64, N] in ``Layout.WGMMA``: a thread has two keys, 8 apart, and
of each query a quarter of its heads, neighbours in pairs. So most of the sum over heads is one thread's own; four
threads then exchange halves of what they have, until each is left with every fourth of their sums.
"""

import functools

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import mma_utils, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector
from jaxlib.mlir.dialects import math as mlir_math

from qjax.pallas_kernels import _wgmma_sm90 as wgmma

ROWS = 64  # keys of a product
_DEPTH = 32  # of one wgmma
_LAYOUT = plgpu.Layout.WGMMA
_SCALAR = plgpu.Layout.WGMMA  # any: scalars have no layout


def start(keys, queries, before: Array | None = None):
    """Issues keys @ queries.T; the product is not there before `finish`, or before the next `start` that gets it.

    Args:
        keys: Shared memory [64, D], float8_e4m3fn, swizzled by D bytes without tiling; D is 64 or 128.
        queries: Shared memory [N, D], likewise; N a multiple of 8 up to 128.
        before: The product that was issued before. It is waited for, but only after this one is queued: ptxas
            would otherwise put what is done with it between the instructions of this one.

    Returns:
        float32 [64, N] in ``Layout.WGMMA``, to be given to `start` or `finish` and to nothing else; and `before`,
        complete, if it was given.
    """
    swizzle = keys.shape[1]
    ref = plgpu.RefType((plgpu.SwizzleTransform(swizzle),))
    given = () if before is None else (before,)

    def product(ctx, keys, queries, *before):
        del ctx
        found = _emit(keys, queries, before[0] if before else None, swizzle)
        return found if before else found[0]

    def reference(keys, queries, *before):
        return (wgmma._reference(keys, queries), *before)

    product.interpret_impl = reference  # pyright: ignore[reportFunctionMemberAccess]
    sums = _sums(queries.shape[0])
    return plgpu.inline_mgpu(
        arg_types=(ref, ref, *(_LAYOUT for _ in given)),
        return_type=(sums, sums) if given else sums,
    )(product)(keys, queries, *given)


def finish(product: Array) -> Array:
    """Waits for the product that was issued last."""

    def wait(ctx, product):
        del ctx
        return _emit(None, None, product, 0)[0]

    wait.interpret_impl = lambda product: product  # pyright: ignore[reportFunctionMemberAccess]
    return plgpu.inline_mgpu(arg_types=(_LAYOUT,), return_type=_sums(product.shape[1]))(wait)(
        product
    )


def _emit(keys, queries, before, swizzle: int) -> tuple[fa.FragmentedArray, ...]:
    """Issues a product if there are operands, and waits for the one before it if there is one."""
    layout, f32 = fa.WGMMA_LAYOUT_ACC_32BIT, ir.F32Type.get()
    ptx, tied, inputs, issued = ["{"], [], [], 0
    if before is not None:
        tied = [wgmma._scalar(r) for r in before.to_layout(layout).registers.flat]
    if keys is not None:
        columns, depth = wgmma._shape(queries)
        issued = columns // 2
        for ref, rows, is_right in ((keys, ROWS, False), (queries, columns, True)):
            inputs.append(wgmma._descriptor(ref, swizzle, 1, rows, is_right=is_right)[0])
        sums = "{" + ",".join(f"${i}" for i in range(issued)) + "}"
        ptx.append(".reg .pred add; .reg .b64 l, r;")
        ptx += ["setp.ne.b32 add, 0, 0;", "wgmma.fence.sync.aligned;"]
        first = issued + 2 * len(tied)
        for i in range(depth // _DEPTH):
            offset = mma_utils.encode_addr(i * _DEPTH)
            ptx.append(f"add.s64 l, ${first}, {offset}; add.s64 r, ${first + 1}, {offset};")
            kind = f"wgmma.mma_async.sync.aligned.m64n{columns}k{_DEPTH}.f32.e4m3.e4m3"
            ptx.append(f"{kind} {sums}, l, r, add, 1, 1;")
            if i == 0:
                ptx.append("setp.ne.b32 add, 1, 0;")
        ptx.append("wgmma.commit_group.sync.aligned;")
    if tied:
        ptx.append(f"wgmma.wait_group.sync.aligned {1 if issued else 0};")
    constraints = ["=f"] * (issued + len(tied))
    constraints += [str(issued + i) for i in range(len(tied))] + ["l"] * len(inputs)
    struct = llvm.inline_asm(
        llvm.StructType.get_literal([f32] * (issued + len(tied))),
        [*tied, *inputs],
        "\n".join([*ptx, "}"]),
        ",".join(constraints),
        has_side_effects=True,
    )
    found = [llvm.extractvalue(f32, struct, [i]) for i in range(issued + len(tied))]
    return tuple(_array(part) for part in (found[:issued], found[issued:]) if part)


def _array(registers: list[ir.Value]) -> fa.FragmentedArray:
    layout, vec = fa.WGMMA_LAYOUT_ACC_32BIT, ir.VectorType.get((1,), ir.F32Type.get())
    values = np.empty(len(registers), dtype=object)
    for i, register in enumerate(registers):
        values[i] = vector.from_elements(vec, [register])
    values = values.reshape(layout.registers_shape((ROWS, 2 * len(registers))))
    array = fa.FragmentedArray(_registers=values, _layout=layout, _is_signed=None)
    return array.to_layout(fa.WGMMA_LAYOUT)


def weigh(
    product: Array,
    half_weights: Array,
    scales: Array,
    bounds,
    out,
    first_key: Array,
) -> None:
    """Writes sum_h 2 * half_weights[h] * relu(product[., h]) * scale of each query, -inf outside its range.

    Args:
        product: float32 [64, queries * H] in ``Layout.WGMMA``.
        half_weights: float32 [queries * H] in ``Layout.WGMMA.reduce(0)``.
        scales: float32 [64] in ``Layout.WGMMA.reduce(1)``, of the keys.
        bounds: Shared memory int32 [2 * queries]: of each query the first key, and the one past its last.
        out: Shared memory float32 [queries, 64].
        first_key: Number of the first key, to compare with bounds.
    """
    queries = out.shape[0]

    def store(ctx, product, weights, scales, bounds, out, first_key):
        del ctx
        i32, f32 = ir.IntegerType.get_signless(32), ir.F32Type.get()
        pitch = ir.MemRefType(out.type).get_strides_and_offset()[0][0]
        thread = arith.remui(utils.thread_idx(), _i32(128))
        odd, high = (
            arith.cmpi(arith.CmpIPredicate.ne, arith.andi(thread, _i32(bit)), _i32(0))
            for bit in (1, 2)
        )
        sums = _share(_sums_of_heads(product, weights, queries), odd, high)
        scale = arith.select(odd, *(_register(scales.registers.flat[i]) for i in (1, 0)))
        # A warp has 16 keys; four of its threads share one of the first 8, and the one 8 after it.
        key = arith.muli(arith.divui(thread, _i32(32)), _i32(16))
        in_warp = arith.remui(thread, _i32(32))
        key = arith.addi(key, arith.divui(in_warp, _i32(4)))
        key = arith.addi(key, arith.select(odd, _i32(8), _i32(0)))
        number = arith.addi(key, _integer(first_key))
        for i, value in enumerate(sums):
            query = _i32(2 * i)
            if 2 * i + 1 < queries:
                query = arith.select(high, _i32(2 * i + 1), query)
            at = arith.muli(query, _i32(2))
            begin, end = (
                llvm.load(i32, _address(bounds, arith.addi(at, _i32(j)), i32)) for j in (0, 1)
            )
            inside = arith.andi(
                arith.cmpi(arith.CmpIPredicate.sge, number, begin),
                arith.cmpi(arith.CmpIPredicate.slt, number, end),
            )
            value = arith.select(inside, arith.mulf(value, scale), utils.c(float("-inf"), f32))
            at = arith.addi(arith.muli(query, _i32(pitch)), key)
            llvm.store(value, _address(out, at, f32))

    def reference(product, weights, scales, bounds, out, first_key):
        terms = (product + jnp.abs(product)) * weights[None]
        value = jnp.sum(terms.reshape(ROWS, queries, -1), axis=2).T * scales[None]
        key = first_key + jnp.arange(ROWS, dtype=jnp.int32)[None]
        bounds = bounds.reshape(queries, 2)
        inside = (key >= bounds[:, :1]) & (key < bounds[:, 1:])
        return (jnp.where(inside, value, -jnp.inf),)

    store.interpret_impl = reference  # pyright: ignore[reportFunctionMemberAccess]
    store.interpret_writes = (4,)  # pyright: ignore[reportFunctionMemberAccess]
    types = (_LAYOUT, _LAYOUT.reduce(0), _LAYOUT.reduce(1), plgpu.RefType(), plgpu.RefType())
    plgpu.inline_mgpu(arg_types=(*types, _SCALAR))(store)(
        product, half_weights, scales, bounds, out, first_key
    )


def _sums_of_heads(product, weights, queries: int) -> list[tuple[ir.Value, ir.Value]]:
    """Of each query, this thread's part of the sums of its two keys.

    relu(x) is (x + |x|) / 2: a maximum would run at half the rate of an addition, and the half is in the weights.
    """
    layout = fa.WGMMA_LAYOUT_ACC_32BIT
    terms = [_register(r) for r in product.to_layout(layout).registers.flat]
    pairs = list(weights.registers.flat)
    blocks = len(pairs) // queries  # of 8 heads
    found = []
    for query in range(queries):
        sums: list[list[ir.Value]] = [
            [],
            [],
        ]  # of each key: two chains, that additions need not wait
        for block in range(blocks * query, blocks * (query + 1)):
            for key, part in enumerate(sums):
                for i in (0, 1):
                    x = terms[4 * block + 2 * key + i]
                    weight = vector.extract(pairs[block], [], [i])
                    x = arith.addf(x, mlir_math.absf(x))
                    if len(part) < (2 if queries == 1 else 1):
                        part.append(arith.mulf(x, weight))
                    else:
                        chain = i % len(part)
                        part[chain] = mlir_math.fma(x, weight, part[chain])
        found.append(tuple(functools.reduce(arith.addf, part) for part in sums))
    return found


def _share(sums: list[tuple[ir.Value, ir.Value]], odd: ir.Value, high: ir.Value) -> list[ir.Value]:
    """Adds up the sums of four neighbouring threads, and leaves each a quarter of them.

    Odd threads get the second keys; of two queries, the upper two threads get the second. Both halves get the last
    query where their number is odd.
    """

    def exchange(first, second, which, distance):
        mine, other = arith.select(which, second, first), arith.select(which, first, second)
        return arith.addf(mine, utils.shfl_bfly(other, distance))

    by_query = [exchange(*pair, odd, 1) for pair in sums]
    found = []
    for i in range(0, len(by_query), 2):
        if i + 1 < len(by_query):
            found.append(exchange(by_query[i], by_query[i + 1], high, 2))
        else:
            found.append(arith.addf(by_query[i], utils.shfl_bfly(by_query[i], 2)))
    return found


def _sums(columns: int) -> plgpu.ShapeDtypeStruct:
    return plgpu.ShapeDtypeStruct((ROWS, columns), jnp.float32, layout=_LAYOUT)


def _register(register: ir.Value) -> ir.Value:
    return vector.extract(register, [], [0])


def _integer(scalar: fa.FragmentedArray) -> ir.Value:
    return scalar.registers.item()


def _i32(value: int) -> ir.Value:
    return utils.c(value, ir.IntegerType.get_signless(32))


def _address(ref, index: ir.Value, element: ir.Type) -> ir.Value:
    index = arith.extui(ir.IntegerType.get_signless(64), index)
    return utils.getelementptr(utils.memref_ptr(ref), [index], element)
