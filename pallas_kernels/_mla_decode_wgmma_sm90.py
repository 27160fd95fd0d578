"""Hopper wgmma for latent attention: products that are issued here and awaited elsewhere.

Every product returns while it runs: what it returns is not there, and what it reads must stay, before `settle` (or, for
what it reads, `finish`). Left operands lie in memory of bfloat16, but are read as the right operand's type: FP8 latents
are widened to float16.
"""

from jax import Array, lax
from jax import numpy as jnp
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import mma_utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir

from qjax.pallas_kernels import _attention_wgmma_sm90 as attention

ROWS = 64  # of one wgmma
TOKENS = 64  # of a tile
_DEPTH = 16  # of one wgmma
_SWIZZLE = 128
_REGISTERS = plgpu.Layout.WGMMA


def logits(queries, keys, sums: Array | None = None) -> Array:
    """``sums + queries @ keys.T`` over several parts of their columns, in flight.

    Args:
        queries: Shared memory [64, H] of each part, bfloat16, tiled (8, 64) and swizzled by 128 bytes.
        keys: Shared memory [64, H] of each part, likewise.
        sums: float32 [64, 64] in ``Layout.WGMMA``, possibly in flight; None for zeros.
    """
    return _accumulate(queries, keys, sums, TOKENS, transposed=False)


def values(p, value, out: Array) -> Array:
    """``out + p @ value``, in flight.

    Args:
        p: Shared memory [64, 64], bfloat16, tiled (8, 64) and swizzled by 128 bytes.
        value: Shared memory [64, V], likewise.
        out: float32 [64, V] in ``Layout.WGMMA``.
    """
    return _accumulate((p,), (value,), out, out.shape[1], transposed=True)


def rescale(out: Array, factors: Array) -> Array:
    """``out * factors[:, None]``; nothing is done by warps whose factors are all 1, as most are after a while.

    Args:
        out: float32 [64, V] in ``Layout.WGMMA``, not in flight.
        factors: float32 [64] in ``Layout.WGMMA.reduce(1)``.
    """

    def multiply(ctx, out, factors):
        del ctx
        tied = _registers(out)
        upper, lower = (attention._scalar(r) for r in factors.registers.flat)
        count = len(tied)
        f = (f"${2 * count}", f"${2 * count + 1}")
        ptx = [
            "{",
            ".reg .pred same;",
            f"setp.eq.f32 same, {f[0]}, 0f3F800000;",
            f"setp.eq.and.f32 same, {f[1]}, 0f3F800000, same;",
            "vote.sync.all.pred same, same, 0xffffffff;",
            "@same bra done;",
            # Pairs of columns of a row and of the eighth row after it take turns.
            *(f"mul.f32 ${i}, ${i}, {f[i // 2 % 2]};" for i in range(count)),
            "done:",
            "}",
        ]
        constraints = ["=f"] * count + [str(i) for i in range(count)] + ["f", "f"]
        types = [ir.F32Type.get()] * count
        found = attention._asm(types, [*tied, upper, lower], "\n".join(ptx), ",".join(constraints))
        return attention._array(found)

    multiply.interpret_impl = lambda out, factors: out * factors[:, None]  # pyright: ignore[reportFunctionMemberAccess]
    return plgpu.inline_mgpu(
        arg_types=(_REGISTERS, _REGISTERS.reduce(1)), return_type=attention._sums(out.shape[1])
    )(multiply)(out, factors)


def finish(*, pending: int) -> None:
    """Waits until all products but the last `pending` have read what they read."""

    def wait(ctx):
        del ctx
        attention._asm([], [], f"wgmma.wait_group.sync.aligned {pending};", "")

    wait.interpret_impl = lambda: ()  # pyright: ignore[reportFunctionMemberAccess]
    plgpu.inline_mgpu()(wait)()


def settle(*arrays: Array, pending: int = 0) -> tuple[Array, ...]:
    """Waits for all products but the last `pending`; `arrays` are those that were in flight."""

    def wait(ctx, *arrays):
        del ctx
        registers = [_registers(array) for array in arrays]
        tied = [r for part in registers for r in part]
        constraints = ["=f"] * len(tied) + [str(i) for i in range(len(tied))]
        found = attention._asm(
            [ir.F32Type.get()] * len(tied),
            tied,
            f"wgmma.wait_group.sync.aligned {pending};",
            ",".join(constraints),
        )
        parts = []
        for part in registers:
            parts.append(attention._array(found[: len(part)]))
            found = found[len(part) :]
        return tuple(parts)

    wait.interpret_impl = lambda *arrays: arrays  # pyright: ignore[reportFunctionMemberAccess]
    return plgpu.inline_mgpu(
        arg_types=(_REGISTERS,) * len(arrays),
        return_type=tuple(attention._sums(array.shape[1]) for array in arrays),
    )(wait)(*arrays)


def _accumulate(lefts, rights, sums: Array | None, columns: int, *, transposed: bool) -> Array:
    count = len(lefts)

    def product(ctx, *args):
        del ctx
        pairs = list(zip(args[:count], args[count : 2 * count], strict=True))
        return _emit(pairs, args[2 * count] if sums is not None else None, columns, transposed)

    def reference(*args):
        total = args[2 * count] if sums is not None else 0.0
        for left, right in zip(args[:count], args[count : 2 * count], strict=True):
            left = lax.bitcast_convert_type(left, right.dtype).astype(jnp.float32)
            right = right.astype(jnp.float32)
            total += jnp.matmul(left, right if transposed else right.T, precision="highest")
        return total

    product.interpret_impl = reference  # pyright: ignore[reportFunctionMemberAccess]
    refs = tuple(attention._tiled(ref.dtype, _SWIZZLE) for ref in (*lefts, *rights))
    carried = () if sums is None else (sums,)
    return plgpu.inline_mgpu(
        arg_types=(*refs, *(_REGISTERS for _ in carried)), return_type=attention._sums(columns)
    )(product)(*lefts, *rights, *carried)


def _emit(pairs, sums, columns: int, transposed: bool) -> fa.FragmentedArray:
    """Issues the products of pairs of operands as one group."""
    tied = [] if sums is None else _registers(sums)
    accumulator = "{" + ",".join(f"${i}" for i in range(columns // 2)) + "}"
    start = columns // 2 + len(tied)
    bases, body = [], []
    for left, right in pairs:
        shape, dtype = mma_utils.tiled_memref_shape(right)
        role = "transposed" if transposed else "right"
        l_base, l_offset = attention._descriptor(left, _SWIZZLE, ROWS, "left")
        r_base, r_offset = attention._descriptor(right, _SWIZZLE, columns, role)
        left, right = start + len(bases), start + len(bases) + 1
        bases += [l_base, r_base]
        kind = f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.{dtype}.{dtype}"
        for i in range(shape[0 if transposed else 1] // _DEPTH):
            add = "yes" if tied or len(body) else "no"
            body.append(
                f"add.s64 l, ${left}, {mma_utils.encode_addr(l_offset(i))};"
                f"add.s64 r, ${right}, {mma_utils.encode_addr(r_offset(i))};"
                f"{kind} {accumulator}, l, r, {add}, 1, 1, 0, {int(transposed)};"
            )
    ptx = [
        "{",
        ".reg .pred no, yes; .reg .b64 l, r;",
        "setp.ne.b32 no, 0, 0; setp.ne.b32 yes, 1, 0;",
        "wgmma.fence.sync.aligned;",
        *body,
        "wgmma.commit_group.sync.aligned;",
        "}",
    ]
    constraints = ["=f"] * (columns // 2) + [str(i) for i in range(len(tied))] + ["l"] * len(bases)
    types = [ir.F32Type.get()] * (columns // 2)
    found = attention._asm(types, [*tied, *bases], "\n".join(ptx), ",".join(constraints))
    return attention._array(found)


def _registers(array: fa.FragmentedArray) -> list[ir.Value]:
    registers = array.to_layout(fa.WGMMA_LAYOUT_ACC_32BIT).registers
    return [attention._scalar(register) for register in registers.flat]
