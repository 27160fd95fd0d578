"""Hopper wgmma for attention: the two products of one step, issued together while it is this warpgroup's turn.

Two warpgroups share the tensor cores. Each issues its products only in its turn and hands the turn over as soon
as they are issued, so that one computes its softmax while the products of the other run (FlashAttention-3,
Shah et al. 2024, "ping-pong"). A turn is a named barrier: nothing else of a step may come between taking it,
the instructions and handing it over, which is why all of that is one block of PTX here.

Every function waits for its products before it returns, but for an output left pending on purpose, which `settle`
waits for. The registers of `p` stay as they are until then: ptxas before 13.3 does not by itself keep a register
operand alive until its wgmma has read it.
"""

import functools
from collections.abc import Sequence

import numpy as np
from jax import Array
from jax import numpy as jnp
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import mma_utils, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, vector

_ROWS = 64  # of one wgmma
_DEPTH_BYTES = 32  # of a row of an operand that one wgmma takes
_TURNS = 8  # the first of two named barriers; lower ones are Mosaic GPU's
_PTX_TYPES = {"f8E4M3FN": "e4m3", "f8E5M2": "e5m2"}


def logits(queries: Sequence, key, *, swizzle: int) -> Array:
    """The sum of query @ key.T over the queries' parts, in float32.

    Args:
        queries: Shared memory, each [64, H] of 16 or 8 bits, tiled (8, columns of `swizzle` bytes) and swizzled.
        key: Shared memory [S, H], likewise of as many bits; S a multiple of 16 up to 256.
        swizzle: Bytes: 32, 64 or 128.

    Returns:
        [64, S] in ``Layout.WGMMA``.
    """
    emit = functools.partial(_emit, swizzle=swizzle)

    def product(ctx, key, *queries):
        del ctx
        return emit(queries=queries, key=key)

    product.interpret_impl = _product  # pyright: ignore[reportFunctionMemberAccess]
    refs = tuple(_tiled(x.dtype, swizzle) for x in (key, *queries))
    return plgpu.inline_mgpu(arg_types=refs, return_type=_sums(key.shape[0]))(product)(
        key, *queries
    )


def logits_and_values(
    queries: Sequence,
    key,
    p: Array,
    value,
    out: Array,
    *,
    swizzle: int,
    value_swizzle: int,
    pending: int = 0,
) -> tuple[Array, Array]:
    """`logits` of one tile and ``out + p @ value`` of the tile before it, in one turn.

    Args:
        queries: As in `logits`.
        key: As in `logits`.
        p: [64, S] in ``Layout.WGMMA``, of the values' dtype.
        value: Shared memory [S, Hv] of 16 bits, tiled and swizzled; Hv a multiple of value_swizzle / 2 up to 256.
        out: float32 [64, Hv] in ``Layout.WGMMA``.
        swizzle: Of queries and keys, bytes: 32, 64 or 128.
        value_swizzle: Likewise of values.
        pending: 1 returns as soon as the logits are there; the output is not before `settle`.
    """
    emit = functools.partial(_emit, swizzle=swizzle, value_swizzle=value_swizzle, pending=pending)

    def product(ctx, p, value, out, key, *queries):
        del ctx
        return emit(queries=queries, key=key, p=p, value=value, out=out)

    def reference(p, value, out, key, *queries):
        return _product(key, *queries), _accumulate(p, value, out)

    product.interpret_impl = reference  # pyright: ignore[reportFunctionMemberAccess]
    registers, refs = plgpu.Layout.WGMMA, (_tiled(x.dtype, swizzle) for x in (key, *queries))
    return plgpu.inline_mgpu(
        arg_types=(registers, _tiled(value.dtype, value_swizzle), registers, *refs),
        return_type=(_sums(key.shape[0]), _sums(value.shape[1])),
    )(product)(p, value, out, key, *queries)


def settle(out: Array, p: Array, following: Array) -> Array:
    """Waits for an output that was pending on `p`; the following p is complete before."""

    def wait(ctx, out, p, following):
        del ctx
        tied = [_scalar(r) for r in out.to_layout(fa.WGMMA_LAYOUT_ACC_32BIT).registers.flat]
        before, after = _words(following), _words(p)
        constraints = ["=f"] * len(tied) + [str(i) for i in range(len(tied))]
        constraints += ["r"] * len(before + after)
        # Reads that never happen (no GPU has 0 SMs), though ptxas cannot know. Those before the wait keep it from
        # moving the softmax after it. Those after keep the registers of p: before 13.3 it may reuse them as soon
        # as their wgmma is issued.
        ptx = ["{", ".reg .pred never; .reg .b32 sms;"]
        ptx.append("mov.u32 sms, %nsmid; setp.eq.u32 never, sms, 0;")

        def read(first: int, words):
            for i in range(first, first + len(words), 4):
                ptx.append(
                    f"@never st.shared.v4.b32 [sms], {{${i}, ${i + 1}, ${i + 2}, ${i + 3}}};"
                )

        read(2 * len(tied), before)
        ptx.append("wgmma.wait_group.sync.aligned 0;")
        read(2 * len(tied) + len(before), after)
        text = "\n".join([*ptx, "}"])
        types = [ir.F32Type.get()] * len(tied)
        return _array(_asm(types, [*tied, *before, *after], text, ",".join(constraints)))

    wait.interpret_impl = lambda out, p, following: out  # pyright: ignore[reportFunctionMemberAccess]
    registers = plgpu.Layout.WGMMA
    return plgpu.inline_mgpu(
        arg_types=(registers, registers, registers), return_type=_sums(out.shape[1])
    )(wait)(out, p, following)


def values(p: Array, value, out: Array, *, swizzle: int) -> Array:
    """out + p @ value, arguments as in `logits_and_values`."""
    emit = functools.partial(_emit, value_swizzle=swizzle)

    def product(ctx, p, value, out):
        del ctx
        return emit(p=p, value=value, out=out)

    product.interpret_impl = _accumulate  # pyright: ignore[reportFunctionMemberAccess]
    registers = plgpu.Layout.WGMMA
    return plgpu.inline_mgpu(
        arg_types=(registers, _tiled(p.dtype, swizzle), registers),
        return_type=_sums(value.shape[1]),
    )(product)(p, value, out)


def offer_first_turn() -> None:
    """Lets warpgroup 0 begin: warpgroup 1 calls this once, before its first product."""

    def arrive(ctx):
        del ctx
        _asm([], [], f"bar.arrive {_TURNS}, 256;", "")

    arrive.interpret_impl = lambda: ()  # pyright: ignore[reportFunctionMemberAccess]
    plgpu.inline_mgpu()(arrive)()


def _product(key: Array, *queries: Array) -> Array:
    query = sum(x.astype(jnp.float32) for x in queries)
    return jnp.matmul(query, key.astype(jnp.float32).T, precision="highest")


def _accumulate(p: Array, value: Array, out: Array) -> Array:
    return out + jnp.matmul(p.astype(jnp.float32), value.astype(jnp.float32), precision="highest")


def _sums(columns: int) -> plgpu.ShapeDtypeStruct:
    return plgpu.ShapeDtypeStruct((_ROWS, columns), jnp.float32, layout=plgpu.Layout.WGMMA)


def _tiled(dtype, swizzle: int) -> plgpu.RefType:
    columns = swizzle // jnp.dtype(dtype).itemsize
    return plgpu.RefType((plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(swizzle)))


def _emit(
    *,
    queries=(),
    key=None,
    p=None,
    value=None,
    out=None,
    swizzle: int = 0,
    value_swizzle: int = 0,
    pending: int = 0,
):
    """Takes the turn, issues what products there are arguments for, hands the turn over and waits."""
    outputs, inputs, tied, body = [], [], [], []
    columns = 0

    def operand(value_in) -> str:
        inputs.append(value_in)
        return f"@{len(inputs) - 1}@"

    def issue(left: str, right: str, base: str, offset: int, sums: str, add: str, flags: str):
        body.append(f"add.s64 r, {base}, {mma_utils.encode_addr(offset)};")
        body.append(
            f"wgmma.mma_async.sync.aligned.{right} {sums}, {left}, r, {add}, {flags};",
        )

    if key is not None:
        (columns, width), dtype = mma_utils.tiled_memref_shape(key)
        depth = _depth(key)
        k_base, k_offset = _descriptor(key, swizzle, columns, "right")
        k_base = operand(k_base)
        sums = "{" + ",".join(f"${i}" for i in range(columns // 2)) + "}"
        outputs += [None] * (columns // 2)
        for query in queries:
            _, q_dtype = mma_utils.tiled_memref_shape(query)
            q_base, q_offset = _descriptor(query, swizzle, _ROWS, "left")
            q_base = operand(q_base)
            for i in range(width // depth):
                body.append(f"add.s64 l, {q_base}, {mma_utils.encode_addr(q_offset(i))};")
                kind = f"m64n{columns}k{depth}.f32.{_ptx_type(q_dtype)}.{_ptx_type(dtype)}"
                # Operands of 16 bits may be transposed.
                flags = "1, 1, 0, 0" if depth == 16 else "1, 1"
                issue("l", kind, k_base, k_offset(i), sums, "add", flags)
                if i == 0:
                    body.append("setp.ne.b32 add, 1, 0;")
        body.append("wgmma.commit_group.sync.aligned;")
    if value is not None:
        (rows, width), dtype = mma_utils.tiled_memref_shape(value)
        v_base, v_offset = _descriptor(value, value_swizzle, width, "transposed")
        v_base = operand(v_base)
        first = len(outputs)
        sums = "{" + ",".join(f"${first + i}" for i in range(width // 2)) + "}"
        outputs += [None] * (width // 2)
        tied = [_scalar(r) for r in out.to_layout(fa.WGMMA_LAYOUT_ACC_32BIT).registers.flat]
        words = [operand(word) for word in _words(p)]
        kind = f"m64n{width}k16.f32.{dtype}.{dtype}"
        for i in range(rows // 16):
            left = "{" + ",".join(words[4 * i : 4 * i + 4]) + "}"
            issue(left, kind, v_base, v_offset(i), sums, "yes", "1, 1, 1")
        body.append("wgmma.commit_group.sync.aligned;")

    ptx = [
        "{",
        ".reg .pred add, yes; .reg .b64 l, r; .reg .b32 mine, other;",
        "setp.ne.b32 add, 0, 0; setp.ne.b32 yes, 1, 0;",
        "mov.u32 mine, %tid.x; shr.b32 mine, mine, 7; xor.b32 other, mine, 1;",
        f"add.u32 mine, mine, {_TURNS}; add.u32 other, other, {_TURNS};",
        "bar.sync mine, 256;",
        "wgmma.fence.sync.aligned;",
        *body,
        "bar.arrive other, 256;",
        f"wgmma.wait_group.sync.aligned {pending};",
        "}",
    ]
    text, shift = "\n".join(ptx), len(outputs) + len(tied)
    for i in reversed(range(len(inputs))):
        text = text.replace(f"@{i}@", f"${shift + i}")
    constraints = ["=f"] * len(outputs)
    constraints += [str(len(outputs) - len(tied) + i) for i in range(len(tied))]
    constraints += ["l" if str(x.type) == "i64" else "r" for x in inputs]
    registers = _asm(
        [ir.F32Type.get()] * len(outputs), [*tied, *inputs], text, ",".join(constraints)
    )
    split = columns // 2
    found = [_array(part) for part in (registers[:split], registers[split:]) if part]
    return found[0] if len(found) == 1 else tuple(found)


def _asm(types, operands, text: str, constraints: str) -> list[ir.Value]:
    result = llvm.StructType.get_literal(types) if types else ir.Type.parse("!llvm.void")
    struct = llvm.inline_asm(result, operands, text, constraints, has_side_effects=True)
    return [llvm.extractvalue(t, struct, [i]) for i, t in enumerate(types)]


def _array(registers: list[ir.Value]) -> fa.FragmentedArray:
    layout, vec = fa.WGMMA_LAYOUT_ACC_32BIT, ir.VectorType.get((1,), ir.F32Type.get())
    values = np.empty(len(registers), dtype=object)
    for i, register in enumerate(registers):
        values[i] = vector.from_elements(vec, [register])
    values = values.reshape(layout.registers_shape((_ROWS, 2 * len(registers))))
    array = fa.FragmentedArray(_registers=values, _layout=layout, _is_signed=None)
    return array.to_layout(fa.WGMMA_LAYOUT)


def _descriptor(ref, swizzle: int, size: int, role: str):
    """A tiled operand's matrix descriptor, and the byte offset of the slice of it that the i-th wgmma takes.

    `size` is its rows (left), or the columns of the product (right, transposed).
    """
    depth = _depth(ref)
    group = swizzle // _DEPTH_BYTES * depth  # depth that a swizzled row of a K-major operand holds
    if role == "left":
        sizes = dict(large_tile=(size, group), group_size=(size, group), logical_k_major=False)
    else:
        if role == "right":  # stored [columns, depth]
            ref = utils.memref_transpose(ref, (1, 0, 3, 2))
        sizes = dict(large_tile=(group, group), group_size=(group, size), logical_k_major=True)
    (base, (_, strides)), (_, stride), fastest = mma_utils.create_descriptor(
        ref, swizzle=swizzle, **sizes
    )
    assert (fastest == mma_utils.Dim.K) == (role != "transposed")
    per_group = group // depth

    def offset(i: int) -> int:
        return i // per_group * stride + i % per_group * strides[0]

    return base, offset


def _depth(ref) -> int:
    """Of one wgmma."""
    return 8 * _DEPTH_BYTES // utils.bitwidth(ir.MemRefType(ref.type).element_type)


def _ptx_type(dtype: ir.Type) -> str:
    return _PTX_TYPES.get(str(dtype), str(dtype))


def _words(p: fa.FragmentedArray) -> list[ir.Value]:
    """Pairs of 16-bit values, four for each slice of depth 16."""
    i32 = ir.IntegerType.get_signless(32)
    slices = [p[:, i : i + 16] for i in range(0, p.shape[1], 16)]
    return [utils.bitcast(r, i32) for part in slices for r in part.registers.flat]


def _scalar(register: ir.Value) -> ir.Value:
    i32 = ir.IntegerType.get_signless(32)
    zero = llvm.ConstantOp(i32, ir.IntegerAttr.get(i32, 0)).result
    return llvm.extractelement(register, zero)
