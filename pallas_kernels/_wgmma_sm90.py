"""A Hopper wgmma that starts its sum instead of adding to one.

`plgpu.wgmma` adds to an accumulator that must first be filled with zeros. Where a kernel promotes two
products in one loop body, LLVM shares the register that holds the zero, ptxas then no longer sees that the
second sum starts at zero, and spends a move for each of its registers and spills (ptxas 13.5: 64 moves and up
to 170 registers spilled for 64x128). Here the first instruction has scale-d = false: it ignores the register.
"""

import numpy as np
from jax import Array
from jax import numpy as jnp
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import mma_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, vector

_PTX_TYPES = {"float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2"}
_K_BYTES = 32  # of one instruction


def fp8_product(left, right, *, swizzle: int, recycle: Array | None = None) -> Array:
    """left @ right.T in float32, complete when it returns.

    Args:
        left: Shared memory [64, K], e4m3 or e5m2, tiled (8, swizzle) and swizzled.
        right: Shared memory [N, K], likewise; N a multiple of 8 up to 256.
        swizzle: Bytes: 32, 64 or 128.
        recycle: An earlier product whose registers may hold this one.

    Returns:
        [64, N] in ``Layout.WGMMA``.
    """
    types = [_PTX_TYPES[jnp.dtype(ref.dtype).name] for ref in (left, right)]
    columns = right.shape[0]

    def emit(ctx, left, right, *recycle):
        del ctx
        return _emit(left, right, recycle, types, columns, swizzle)

    emit.interpret_impl = lambda left, right, *recycle: jnp.matmul(
        left.astype(jnp.float32), right.astype(jnp.float32).T, precision="highest"
    )
    ref = plgpu.RefType((plgpu.TilingTransform((8, swizzle)), plgpu.SwizzleTransform(swizzle)))
    out = plgpu.ShapeDtypeStruct((64, columns), jnp.float32, layout=plgpu.Layout.WGMMA)
    recycled = () if recycle is None else (recycle,)
    arg_types = (ref, ref, *(plgpu.Layout.WGMMA for _ in recycled))
    return plgpu.inline_mgpu(arg_types=arg_types, return_type=out)(emit)(left, right, *recycled)


def _emit(left, right, recycle, types, columns, swizzle) -> fa.FragmentedArray:
    right = mgpu.memref_transpose(right, (1, 0, 3, 2))
    (left_base, _), (_, left_stride), _ = mma_utils.create_descriptor(
        left,
        swizzle=swizzle,
        large_tile=(64, swizzle),
        group_size=(64, swizzle),
        logical_k_major=False,
    )
    (right_base, _), (_, right_stride), _ = mma_utils.create_descriptor(
        right,
        swizzle=swizzle,
        large_tile=(swizzle, swizzle),
        group_size=(swizzle, columns),
        logical_k_major=True,
    )
    count = columns // 2
    sums = "{" + ",".join(f"${i}" for i in range(count)) + "}"
    (_, depth), _ = mma_utils.tiled_memref_shape(left)
    ptx = [
        "{",
        ".reg .pred add; .reg .b64 l, r;",
        "wgmma.fence.sync.aligned;",
    ]
    if recycle:
        first = 2 * count  # ties each output to an input
        (recycled,) = recycle
        inputs = [
            llvm.extractelement(r, _zero())
            for r in recycled.to_layout(fa.WGMMA_LAYOUT_ACC_32BIT).registers.flat
        ]
        ptx.append(f"setp.eq.b64 add, ${first}, 0;")
    else:
        first, inputs = count, []
        ptx.append("setp.ne.b32 add, 0, 0;")
    for i in range(depth // _K_BYTES):
        group, within = divmod(i * _K_BYTES, swizzle)
        ptx += [
            f"add.s64 l, ${first}, {mma_utils.encode_addr(group * left_stride + within)};",
            f"add.s64 r, ${first + 1}, {mma_utils.encode_addr(group * right_stride + within)};",
            f"wgmma.mma_async.sync.aligned.m64n{columns}k32.f32.{types[0]}.{types[1]} "
            f"{sums}, l, r, add, 1, 1;",
        ]
        if i == 0:
            ptx.append("setp.ne.b32 add, 1, 0;")
    ptx += ["wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;", "}"]
    f32 = ir.F32Type.get()
    registers = llvm.inline_asm(
        llvm.StructType.get_literal([f32] * count),
        [*inputs, left_base, right_base],
        "\n".join(ptx),
        ",".join(["=f"] * count + [str(i) for i in range(len(inputs))] + ["l", "l"]),
        has_side_effects=True,
    )
    layout = fa.WGMMA_LAYOUT_ACC_32BIT
    values = np.empty(count, dtype=object)
    for i in range(count):
        value = llvm.extractvalue(f32, registers, [i])
        values[i] = vector.from_elements(ir.VectorType.get((1,), f32), [value])
    values = values.reshape(layout.registers_shape((64, columns)))
    array = fa.FragmentedArray(_registers=values, _layout=layout, _is_signed=None)
    return array.to_layout(fa.WGMMA_LAYOUT)


def _zero():
    i32 = ir.IntegerType.get_signless(32)
    return llvm.ConstantOp(i32, ir.IntegerAttr.get(i32, 0)).result
