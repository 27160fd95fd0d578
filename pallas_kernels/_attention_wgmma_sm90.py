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

import numpy as np
from jax import Array
from jax import numpy as jnp
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import mma_utils, utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, vector

_ROWS = 64  # of one wgmma
_DEPTH = 16  # of one wgmma of 16-bit operands
_TURNS = 8  # the first of two named barriers; lower ones are Mosaic GPU's
_PTX_TYPES = {"bfloat16": "bf16", "float16": "f16"}


def logits(query, key, *, swizzle: int) -> Array:
    """query @ key.T in float32.

    Args:
        query: Shared memory [64, H], bfloat16 or float16, tiled (8, swizzle / 2) and swizzled.
        key: Shared memory [S, H], likewise; S a multiple of 16 up to 256.
        swizzle: Bytes: 32, 64 or 128.

    Returns:
        [64, S] in ``Layout.WGMMA``.
    """
    emit = functools.partial(_emit, swizzle=swizzle)

    def product(ctx, query, key):
        del ctx
        return emit(query=query, key=key)

    product.interpret_impl = _product  # pyright: ignore[reportFunctionMemberAccess]
    ref = _tiled(query.dtype, swizzle)
    return plgpu.inline_mgpu(arg_types=(ref, ref), return_type=_sums(key.shape[0]))(product)(
        query, key
    )


def logits_and_values(
    query, key, p: Array, value, out: Array, *, swizzle: int, pending: int = 0
) -> tuple[Array, Array]:
    """`logits` of one tile and ``out + p @ value`` of the tile before it, in one turn.

    Args:
        query: As in `logits`.
        key: As in `logits`.
        p: [64, S] in ``Layout.WGMMA``, of the query's dtype.
        value: Shared memory [S, Hv], tiled and swizzled like `key`; Hv a multiple of swizzle / 2 up to 256.
        out: float32 [64, Hv] in ``Layout.WGMMA``.
        swizzle: Bytes: 32, 64 or 128.
        pending: 1 returns as soon as the logits are there; the output is not before `settle`.
    """
    emit = functools.partial(_emit, swizzle=swizzle, pending=pending)

    def product(ctx, query, key, p, value, out):
        del ctx
        return emit(query=query, key=key, p=p, value=value, out=out)

    def reference(query, key, p, value, out):
        return _product(query, key), _accumulate(p, value, out)

    product.interpret_impl = reference  # pyright: ignore[reportFunctionMemberAccess]
    ref, registers = _tiled(query.dtype, swizzle), plgpu.Layout.WGMMA
    return plgpu.inline_mgpu(
        arg_types=(ref, ref, registers, ref, registers),
        return_type=(_sums(key.shape[0]), _sums(value.shape[1])),
    )(product)(query, key, p, value, out)


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
    emit = functools.partial(_emit, swizzle=swizzle)

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


def _product(query: Array, key: Array) -> Array:
    return jnp.matmul(query.astype(jnp.float32), key.astype(jnp.float32).T, precision="highest")


def _accumulate(p: Array, value: Array, out: Array) -> Array:
    return out + jnp.matmul(p.astype(jnp.float32), value.astype(jnp.float32), precision="highest")


def _sums(columns: int) -> plgpu.ShapeDtypeStruct:
    return plgpu.ShapeDtypeStruct((_ROWS, columns), jnp.float32, layout=plgpu.Layout.WGMMA)


def _tiled(dtype, swizzle: int) -> plgpu.RefType:
    columns = swizzle // jnp.dtype(dtype).itemsize
    return plgpu.RefType((plgpu.TilingTransform((8, columns)), plgpu.SwizzleTransform(swizzle)))


def _emit(*, query=None, key=None, p=None, value=None, out=None, swizzle: int, pending: int = 0):
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
        (columns, depth), dtype = mma_utils.tiled_memref_shape(key)
        q_base, q_offset = _descriptor(query, swizzle, _ROWS, "left")
        k_base, k_offset = _descriptor(key, swizzle, columns, "right")
        q_base, k_base = operand(q_base), operand(k_base)
        sums = "{" + ",".join(f"${i}" for i in range(columns // 2)) + "}"
        outputs += [None] * (columns // 2)
        for i in range(depth // _DEPTH):
            body.append(f"add.s64 l, {q_base}, {mma_utils.encode_addr(q_offset(i))};")
            kind = f"m64n{columns}k16.f32.{dtype}.{dtype}"
            issue("l", kind, k_base, k_offset(i), sums, "add", "1, 1, 0, 0")
            if i == 0:
                body.append("setp.ne.b32 add, 1, 0;")
        body.append("wgmma.commit_group.sync.aligned;")
    if value is not None:
        (depth, width), dtype = mma_utils.tiled_memref_shape(value)
        v_base, v_offset = _descriptor(value, swizzle, width, "transposed")
        v_base = operand(v_base)
        first = len(outputs)
        sums = "{" + ",".join(f"${first + i}" for i in range(width // 2)) + "}"
        outputs += [None] * (width // 2)
        tied = [_scalar(r) for r in out.to_layout(fa.WGMMA_LAYOUT_ACC_32BIT).registers.flat]
        words = [operand(word) for word in _words(p)]
        kind = f"m64n{width}k16.f32.{dtype}.{dtype}"
        for i in range(depth // _DEPTH):
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
    """A tiled operand's matrix descriptor, and the byte offset of its i-th slice of depth 16.

    `size` is its rows (left), or the columns of the product (right, transposed).
    """
    group = swizzle // 2  # depth that one swizzled row of a K-major operand holds
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
    per_group = group // _DEPTH

    def offset(i: int) -> int:
        return i // per_group * stride + i % per_group * strides[0]

    return base, offset


def _words(p: fa.FragmentedArray) -> list[ir.Value]:
    """Pairs of 16-bit values, four for each slice of depth 16."""
    i32 = ir.IntegerType.get_signless(32)
    slices = [p[:, i : i + _DEPTH] for i in range(0, p.shape[1], _DEPTH)]
    return [utils.bitcast(r, i32) for part in slices for r in part.registers.flat]


def _scalar(register: ir.Value) -> ir.Value:
    i32 = ir.IntegerType.get_signless(32)
    zero = llvm.ConstantOp(i32, ir.IntegerAttr.get(i32, 0)).result
    return llvm.extractelement(register, zero)
