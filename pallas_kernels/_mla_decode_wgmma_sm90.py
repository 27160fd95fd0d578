"""Hopper wgmma for latent attention: both products of one step, issued together.

Two math warpgroups share a tile of latents in shared memory. Each computes the logits of its half of the tile's
tokens, and the output of its half of the value columns from the probabilities of both. The tile is the right operand
of both products: as stored for the logits, transposed for the values.

An output may be left pending on purpose; `settle` waits for it.
"""

import functools

from jax import Array
from jax import numpy as jnp
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import mma_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir

from qjax.pallas_kernels import _attention_wgmma_sm90 as attention

ROWS = 64  # of one wgmma
TOKENS = 64  # of a tile
HALF = TOKENS // 2
_DEPTH = 16  # of one wgmma
_SWIZZLE = 128  # of queries and latents
_P_SWIZZLE = 64  # of probabilities: a half tile's row
_REGISTERS = plgpu.Layout.WGMMA
_SCALAR = plgpu.Layout.WGMMA  # any: scalars have no layout


def logits(query, tile, wg) -> Array:
    """query @ half.T in float32, of half `wg` of the tile's tokens.

    Args:
        query: Shared memory [64, H], bfloat16, tiled (8, 64) and swizzled by 128 bytes.
        tile: Shared memory [64, H], likewise.
        wg: Index of the math warpgroup.

    Returns:
        [64, 32] in ``Layout.WGMMA``.
    """

    def product(ctx, query, tile, wg):
        del ctx
        return _emit(wg, query=query, tile=tile)

    product.interpret_impl = _logits  # pyright: ignore[reportFunctionMemberAccess]
    ref = attention._tiled(query.dtype, _SWIZZLE)
    return plgpu.inline_mgpu(arg_types=(ref, ref, _SCALAR), return_type=attention._sums(HALF))(
        product
    )(query, tile, wg)


def logits_and_values(query, tile, p, before, out: Array, wg) -> tuple[Array, Array]:
    """`logits` of a tile, and ``out + p @ values`` of the tile before it, which is not there before `settle`.

    Args:
        query: As in `logits`.
        tile: As in `logits`.
        p: Shared memory [64, 32] of each half of the tile before, tiled (8, 32) and swizzled by 64 bytes.
        before: The tile before.
        out: float32 [64, V] in ``Layout.WGMMA``: columns wg * V .. (wg + 1) * V.
        wg: Index of the math warpgroup.
    """

    def product(ctx, query, tile, p0, p1, before, out, wg):
        del ctx
        return _emit(wg, query=query, tile=tile, p=(p0, p1), value=before, out=out, pending=1)

    def reference(query, tile, p0, p1, before, out, wg):
        return _logits(query, tile, wg), _values(p0, p1, before, out, wg)

    product.interpret_impl = reference  # pyright: ignore[reportFunctionMemberAccess]
    ref = attention._tiled(query.dtype, _SWIZZLE)
    p_ref = attention._tiled(query.dtype, _P_SWIZZLE)
    return plgpu.inline_mgpu(
        arg_types=(ref, ref, p_ref, p_ref, ref, _REGISTERS, _SCALAR),
        return_type=(attention._sums(HALF), attention._sums(out.shape[1])),
    )(product)(query, tile, *p, before, out, wg)


def values(p, before, out: Array, wg) -> Array:
    """``out + p @ values``, complete; arguments as in `logits_and_values`."""

    def product(ctx, p0, p1, before, out, wg):
        del ctx
        return _emit(wg, p=(p0, p1), value=before, out=out)

    product.interpret_impl = _values  # pyright: ignore[reportFunctionMemberAccess]
    ref = attention._tiled(before.dtype, _SWIZZLE)
    p_ref = attention._tiled(before.dtype, _P_SWIZZLE)
    return plgpu.inline_mgpu(
        arg_types=(p_ref, p_ref, ref, _REGISTERS, _SCALAR),
        return_type=attention._sums(out.shape[1]),
    )(product)(*p, before, out, wg)


def settle(out: Array, p: Array) -> Array:
    """Waits for a pending output; the probabilities `p` of the following tile are complete before."""

    def wait(ctx, out, p):
        del ctx
        tied = [
            attention._scalar(r) for r in out.to_layout(fa.WGMMA_LAYOUT_ACC_32BIT).registers.flat
        ]
        words = attention._words(p)
        constraints = ["=f"] * len(tied) + [str(i) for i in range(len(tied))] + ["r"] * len(words)
        # Stores that never happen (no GPU has 0 SMs), though ptxas cannot know: they keep it from moving the
        # softmax past the wait.
        ptx = ["{", ".reg .pred never; .reg .b32 sms;"]
        ptx.append("mov.u32 sms, %nsmid; setp.eq.u32 never, sms, 0;")
        for i in range(2 * len(tied), 2 * len(tied) + len(words), 4):
            ptx.append(f"@never st.shared.v4.b32 [sms], {{${i}, ${i + 1}, ${i + 2}, ${i + 3}}};")
        ptx += ["wgmma.wait_group.sync.aligned 0;", "}"]
        types = [ir.F32Type.get()] * len(tied)
        found = attention._asm(types, [*tied, *words], "\n".join(ptx), ",".join(constraints))
        return attention._array(found)

    wait.interpret_impl = lambda out, p: out  # pyright: ignore[reportFunctionMemberAccess]
    return plgpu.inline_mgpu(
        arg_types=(_REGISTERS, _REGISTERS), return_type=attention._sums(out.shape[1])
    )(wait)(out, p)


_matmul = functools.partial(jnp.matmul, precision="highest")


def _logits(query, tile, wg):
    half = tile.reshape(2, HALF, -1)[wg]
    return _matmul(query.astype(jnp.float32), half.astype(jnp.float32).T)


def _values(p0, p1, before, out, wg):
    p = jnp.concatenate([p0, p1], axis=1).astype(jnp.float32)
    width = out.shape[1]
    value = before[:, : 2 * width].reshape(TOKENS, 2, width)[:, wg]
    return out + _matmul(p, value.astype(jnp.float32))


def _emit(wg, *, query=None, tile=None, p=None, value=None, out=None, pending: int = 0):
    """Issues what products there are arguments for, and waits for all but the last `pending`."""
    outputs, inputs, tied, body = [], [], [], []

    def operand(value_in) -> str:
        inputs.append(value_in)
        return f"@{len(inputs) - 1}@"

    number = operand(wg.registers.item())
    if tile is not None:
        (_, depth), dtype = mma_utils.tiled_memref_shape(tile)
        q_base, q_offset = attention._descriptor(query, _SWIZZLE, ROWS, "left")
        k_base, k_offset = attention._descriptor(tile, _SWIZZLE, HALF, "right")
        q_base, k_base = operand(q_base), operand(k_base)
        sums = "{" + ",".join(f"${i}" for i in range(HALF // 2)) + "}"
        outputs += [None] * (HALF // 2)
        shift = mma_utils.encode_addr(HALF * depth * 2)
        body.append(f"mul.wide.u32 shift, {number}, {shift}; add.s64 base, {k_base}, shift;")
        for i in range(depth // _DEPTH):
            body.append(f"add.s64 l, {q_base}, {mma_utils.encode_addr(q_offset(i))};")
            body.append(f"add.s64 r, base, {mma_utils.encode_addr(k_offset(i))};")
            kind = f"wgmma.mma_async.sync.aligned.m64n{HALF}k16.f32.{dtype}.{dtype}"
            body.append(f"{kind} {sums}, l, r, {'yes' if i else 'no'}, 1, 1, 0, 0;")
        body.append("wgmma.commit_group.sync.aligned;")
    if value is not None:
        dtype, width = mma_utils.tiled_memref_shape(value)[1], out.shape[1]
        v_base, v_offset = attention._descriptor(value, _SWIZZLE, width, "transposed")
        v_base, first = operand(v_base), len(outputs)
        sums = "{" + ",".join(f"${first + i}" for i in range(width // 2)) + "}"
        outputs += [None] * (width // 2)
        registers = out.to_layout(fa.WGMMA_LAYOUT_ACC_32BIT).registers
        tied = [attention._scalar(r) for r in registers.flat]
        # Groups of 64 columns of 8 rows follow one another.
        shift = mma_utils.encode_addr(width * 8 * 2)
        body.append(f"mul.wide.u32 shift, {number}, {shift}; add.s64 base, {v_base}, shift;")
        for half, part in enumerate(p):
            p_base, p_offset = attention._descriptor(part, _P_SWIZZLE, ROWS, "left")
            p_base = operand(p_base)
            for i in range(HALF // _DEPTH):
                at = v_offset(half * (HALF // _DEPTH) + i)
                body.append(f"add.s64 l, {p_base}, {mma_utils.encode_addr(p_offset(i))};")
                body.append(f"add.s64 r, base, {mma_utils.encode_addr(at)};")
                kind = f"wgmma.mma_async.sync.aligned.m64n{width}k16.f32.{dtype}.{dtype}"
                body.append(f"{kind} {sums}, l, r, yes, 1, 1, 0, 1;")
        body.append("wgmma.commit_group.sync.aligned;")

    ptx = [
        "{",
        ".reg .pred no, yes; .reg .b64 l, r, base, shift;",
        "setp.ne.b32 no, 0, 0; setp.ne.b32 yes, 1, 0;",
        "wgmma.fence.sync.aligned;",
        *body,
        f"wgmma.wait_group.sync.aligned {pending};",
        "}",
    ]
    text, start = "\n".join(ptx), len(outputs) + len(tied)
    for i in reversed(range(len(inputs))):
        text = text.replace(f"@{i}@", f"${start + i}")
    constraints = ["=f"] * len(outputs)
    constraints += [str(len(outputs) - len(tied) + i) for i in range(len(tied))]
    constraints += ["l" if str(x.type) == "i64" else "r" for x in inputs]
    types = [ir.F32Type.get()] * len(outputs)
    registers = attention._asm(types, [*tied, *inputs], text, ",".join(constraints))
    split = HALF // 2 if tile is not None else 0
    found = [attention._array(part) for part in (registers[:split], registers[split:]) if part]
    return found[0] if len(found) == 1 else tuple(found)
