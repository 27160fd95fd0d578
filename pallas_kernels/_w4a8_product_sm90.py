"""One step of a W4A8 product: 64 weight rows decoded, multiplied with x from shared memory, scaled and added.

A step is one piece of inlined PTX, so that nothing comes between what overlaps. Weights stay in the registers of
wgmma's left operand for all tokens, 128 of which are multiplied at once: with 64, steps took 5% longer. Each product
starts with scale-d = false and takes registers of its own, which ptxas keeps apart from the sums (see `_wgmma_sm90`).

The second half of a group is decoded while the first is multiplied; the first half, and adding up the product in
float32, only overlap with other warpgroups. Two warpgroups that run alike would do both at the same time and leave
the tensor cores alone, so they may take turns at them, by two named barriers::

    warpgroup 0   decode | multiply ------ | add up, decode --- | multiply
    warpgroup 1          | add up, decode --- | multiply ------ | add up

A turn ends when half of its multiplications are left, which the tensor cores go on with.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import mma_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, vector

from qjax.pallas_kernels._mixed_gemm_registers_sm90 import words_layout
from qjax.pallas_kernels._w4a8_registers_sm90 import (
    COLUMNS,
    MAGIC,
    Decoding,
    decoding,
    eight_bit_weights,
)
from qjax.wgmma_layout import BLOCK

ROW_BYTES = 128  # of x in shared memory: one row of its swizzle
_PIECE = 128  # tokens of a product
_EARLY = 2  # 32 columns each that are decoded before the first product
# The barriers of a warpgroup's turns: 8 or 9, its own and the other's. Mosaic GPU takes lower ones.
_TURNS = (
    "mov.u32 mine, %tid.x; shr.u32 mine, mine, 7; add.u32 mine, mine, 8;",
    "xor.b32 other, mine, 1;",
)


def add_product(
    total: Array,
    words: Array,
    x,
    zero_point: Array | None,
    scale: Array | None,
    *,
    first: int,
    width: int,
    x_first: int,
    turns: bool = False,
) -> Array:
    """total + scale * (weights @ x.T), where the weights are `eight_bit_weights` of the words.

    Args:
        total: [64, N] in ``Layout.WGMMA``: float32, or int32 of int8, which takes no scale.
        words: int32 [blocks, 2, 256] of `wgmma_layout.to_words8`, in ``Layout.WG_STRIDED`` with 4 words a thread.
        x: Shared memory [N, 128], int8 or float8_e4m3fn, swizzled by 128 bytes and not tiled; N a multiple of 8.
        zero_point: float32 [64] in ``Layout.WGMMA.reduce(1)``, integers from -8 to 8; None for zeros.
        scale: float32 [64] in ``Layout.WGMMA.reduce(1)``; None for ones.
        first: First of the words' columns, a multiple of 32.
        width: Columns, a multiple of 32 up to 128.
        x_first: First column of x.
        turns: Whether two warpgroups, the first of the CTA, take turns; see `open_turns`.

    Returns:
        The sum, complete, in total's registers: the words' stage may be overwritten.
    """
    dtype, given = jnp.dtype(x.dtype), (zero_point is not None, scale is not None)

    def split(rest):
        rest = list(rest)
        return [rest.pop(0) if there else None for there in given]

    def step(ctx, total, words, x, *rest):
        del ctx
        offset, scale = split(rest)
        made = decoding(words, offset, dtype, first=first, width=width)
        return _emit(total, made, x, scale, dtype, x_first, turns)

    def reference(total, words, x, *rest):
        offset, scale = split(rest)
        zero_point = None if offset is None else offset - (MAGIC + 8)
        weights = eight_bit_weights(words, dtype, zero_point, first=first, width=width)
        x = x[:, x_first : x_first + width]
        if total.dtype == jnp.int32:
            return total + jnp.matmul(weights, x.T, preferred_element_type=jnp.int32)
        weights, x = weights.astype(jnp.float32), x.astype(jnp.float32)
        found = jnp.matmul(weights, x.T, precision="highest")
        return total + (found if scale is None else found * scale[:, None])

    step.interpret_impl = reference  # pyright: ignore[reportFunctionMemberAccess]
    offset = None if zero_point is None else zero_point + (MAGIC + 8)
    rest = [a for a in (offset, scale) if a is not None]
    return plgpu.inline_mgpu(
        arg_types=(
            plgpu.Layout.WGMMA,
            words_layout(words.shape),
            plgpu.RefType((plgpu.SwizzleTransform(ROW_BYTES),)),
            *(plgpu.Layout.WGMMA.reduce(1) for _ in rest),
        ),
        return_type=plgpu.ShapeDtypeStruct(total.shape, total.dtype, layout=plgpu.Layout.WGMMA),
    )(step)(total, words, x, *rest)


def _emit(
    total, made: Decoding, x: ir.Value, scale, dtype, x_first: int, turns: bool
) -> fa.FragmentedArray:
    layout, columns = fa.WGMMA_LAYOUT_ACC_32BIT, ir.MemRefType(x.type).shape[0]
    count = columns // 2
    whole = isinstance(total.mlir_dtype, ir.IntegerType)
    kind = ir.IntegerType.get_signless(32) if whole else ir.F32Type.get()
    totals = [_scalar(r) for r in total.to_layout(layout).registers.flat]
    scales = [] if scale is None else [_scalar(r) for r in scale.registers.flat]
    base = mma_utils.encode_descriptor(
        x, leading_byte_offset=0, stride_byte_offset=8 * ROW_BYTES, swizzle=ROW_BYTES
    )
    # Outputs come first, then the totals as inputs tied to them.
    operands = [*made.inputs, *scales, base]
    names = [f"${2 * count + i}" for i in range(len(operands))]
    lines = _lines(
        made,
        names[: len(made.inputs)],
        names[len(made.inputs) : -1],
        names[-1],
        columns=columns,
        x_first=x_first,
        integers=dtype == jnp.int8,
        whole=whole,
        turns=turns,
    )
    constraints = [f"={'r' if whole else 'f'}"] * count + [str(i) for i in range(count)]
    constraints += ["r"] * len(made.inputs) + ["f"] * len(scales) + ["l"]
    registers = llvm.inline_asm(
        llvm.StructType.get_literal([kind] * count),
        [*totals, *operands],
        "\n".join(lines),
        ",".join(constraints),
        has_side_effects=True,
    )
    values = np.empty(count, dtype=object)
    for i in range(count):
        value = llvm.extractvalue(kind, registers, [i])
        values[i] = vector.from_elements(ir.VectorType.get((1,), kind), [value])
    array = fa.FragmentedArray(
        _registers=values.reshape(layout.registers_shape((BLOCK, columns))),
        _layout=layout,
        _is_signed=True if whole else None,
    )
    return array.to_layout(fa.WGMMA_LAYOUT)


def _lines(
    made: Decoding,
    inputs: list[str],
    scales: list[str],
    x: str,
    *,
    columns: int,
    x_first: int,
    integers: bool,
    whole: bool,
    turns: bool,
) -> list[str]:
    """The PTX of a step whose sums are $0, $1, ...; `whole` sums are products themselves."""
    piece = max(c for c in range(8, min(columns, _PIECE) + 1, 8) if columns % c == 0)
    chunks, held = made.width // COLUMNS, piece // 2
    types, flags = ("s32.s8.s8", "") if integers else ("f32.e4m3.e4m3", ", 1, 1")
    fence, commit = "wgmma.fence.sync.aligned;", "wgmma.commit_group.sync.aligned;"
    wait = "wgmma.wait_group.sync.aligned"

    def weights(chunk):
        return [f"w{4 * chunk + i}" for i in range(4)]

    def totals(t):
        return [f"${t * held + i}" for i in range(held)]

    def products(t):
        return totals(t) if whole else [f"p{i}" for i in range(held)]

    def decode(chunks_):
        return [line for c in chunks_ for line in made.lines(c, weights(c), inputs)]

    def multiply(t, chunk):
        offset = mma_utils.encode_addr(t * piece * ROW_BYTES + x_first + COLUMNS * chunk)
        sums, left = (", ".join(names) for names in (products(t), weights(chunk)))
        return [
            f"add.s64 r, {x}, {offset};",
            f"wgmma.mma_async.sync.aligned.m64n{piece}k{COLUMNS}.{types} "
            f"{{{sums}}}, {{{left}}}, r, {'more' if chunk or whole else 'new'}{flags};",
        ]

    def promote(t):
        for i, (total, product) in enumerate(zip(totals(t), products(t), strict=True)):
            if integers:
                yield f"cvt.rn.f32.s32 float, {product};"
                product = "float"
            if scales:  # of a thread's two rows
                yield f"fma.rn.f32 {total}, {product}, {scales[i // 2 % 2]}, {total};"
            else:
                yield f"add.f32 {total}, {total}, {product};"

    ptx = [
        "{",
        f".reg .{'b32' if integers else 'f32'} p<{held}>;",
        f".reg .b32 w<{4 * chunks}>;",
        ".reg .f32 float; .reg .b64 r; .reg .pred new, more; .reg .b32 mine, other;",
        "setp.ne.b32 new, 0, 0; setp.ne.b32 more, 1, 0;",
        *(_TURNS if turns else ()),
        *decode(range(min(_EARLY, chunks))),
    ]
    handover = max(chunks - _EARLY, 1)  # so many multiplications before the other's turn
    for t in range(columns // piece):
        if turns:
            ptx.append("bar.sync mine, 256;")
        ptx.append(fence)
        for chunk in range(chunks):
            if t == 0 and chunk == _EARLY:
                ptx += [*decode(range(chunk, chunks)), fence]
            ptx += multiply(t, chunk)
            if chunk + 1 in (handover, chunks):
                ptx.append(commit)
        if turns:
            ptx += [f"{wait} {int(handover < chunks)};", "bar.arrive other, 256;"]
        ptx.append(f"{wait} 0;")
        if not whole:
            ptx += promote(t)
    return [*ptx, "}"]


def open_turns() -> None:
    """Gives the first of two warpgroups, which multiply with `turns`, the first turn; both call it."""
    _inline("setp.eq.u32 is, mine, 9; @is bar.arrive 8, 256;")


def close_turns() -> None:
    """Takes the turn that is left over; both warpgroups call it, after equally many products."""
    _inline("setp.eq.u32 is, mine, 8; @is bar.sync 8, 256;")


def _inline(line: str) -> None:
    def emit(ctx):
        del ctx
        ptx = "\n".join(["{", ".reg .pred is; .reg .b32 mine, other;", *_TURNS, line, "}"])
        llvm.inline_asm(ir.Type.parse("!llvm.void"), [], ptx, "", has_side_effects=True)

    emit.interpret_impl = lambda: ()  # pyright: ignore[reportFunctionMemberAccess]
    plgpu.inline_mgpu()(emit)()


def _scalar(register: ir.Value) -> ir.Value:
    zero = ir.IntegerAttr.get(ir.IntegerType.get_signless(32), 0)
    return llvm.extractelement(register, llvm.ConstantOp(zero.type, zero).result)
