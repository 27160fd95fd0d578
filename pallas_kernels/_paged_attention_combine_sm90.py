"""The exact attention of a whole context from that of its parts.

Part s has attended to some of the tokens: out_s, normalized, and the base-2 logarithm of its softmax's denominator,
lse_s. The whole is sum_s 2^lse_s out_s / sum_s 2^lse_s (FlashDecoding).
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

LOG2E = math.log2(math.e)
_TINY = float(np.finfo(np.float32).tiny)
_SCALAR = plgpu.Layout.WGMMA  # any: scalars have no layout


def combine(
    parts: Array, log_sums: Array, sinks: Array | None, *, group: int, out_dtype: DTypeLike
) -> Array:
    """The attention of all parts.

    Args:
        parts: float32 [B, K, S, rows, H]; rows * H a multiple of 128 in each block.
        log_sums: float32 [B, K, S, blocks, L], of which the first rows / blocks count.
        sinks: float32 [N] or None; row r of KV head k has that of head k * group + r % group.
        group: Query heads of a KV head.
        out_dtype: Of the result.

    Returns:
        [B, K, rows, H].
    """
    batch, kv_heads, splits, rows, dim = parts.shape
    blocks, stride = log_sums.shape[3:]
    size = rows // blocks
    width = next(v for v in (4, 2, 1) if size * dim % (128 * v) == 0)
    layout = plgpu.Layout.WG_STRIDED((size, dim), vec_size=width)
    arrays = (parts, log_sums) if sinks is None else (parts, log_sums, sinks)

    def sum_parts(ctx, parts, log_sums, batch, head, block, *sinks):
        del ctx
        f32, i32, i64 = (
            ir.F32Type.get(),
            ir.IntegerType.get_signless(32),
            ir.IntegerType.get_signless(64),
        )

        def const(value: int):
            return utils.c(value, i32)

        def load(ref, index, count=None):
            at = utils.getelementptr(utils.memref_ptr(ref), [arith.extui(i64, index)], f32)
            kind = f32 if count is None else ir.VectorType.get((count,), f32)
            return llvm.load(kind, at, alignment=4 * (count or 1))

        def exp2(x):
            return utils.inline_ptx("ex2.approx.ftz.f32 $0, $1;", x, result_types=f32)

        head, block = head.registers.item(), block.registers.item()
        first = arith.addi(arith.muli(batch.registers.item(), const(kv_heads)), head)
        first = arith.muli(first, const(splits))
        thread = arith.remui(utils.thread_idx(), const(128))
        registers = []
        for i in range(size * dim // (128 * width)):
            flat = arith.muli(arith.addi(thread, const(128 * i)), const(width))
            row, column = arith.divui(flat, const(dim)), arith.remui(flat, const(dim))
            where, logs = [], []
            for s in range(splits):
                part = arith.addi(arith.muli(arith.addi(first, const(s)), const(blocks)), block)
                logs.append(load(log_sums, arith.addi(arith.muli(part, const(stride)), row)))
                at = arith.addi(arith.muli(part, const(size)), row)
                where.append(arith.addi(arith.muli(at, const(dim)), column))
            top, sink = functools.reduce(arith.maximumf, logs), None
            if sinks:
                member = arith.addi(arith.muli(block, const(size)), row)
                member = arith.addi(
                    arith.remui(member, const(group)), arith.muli(head, const(group))
                )
                sink = arith.mulf(load(sinks[0], member), utils.c(LOG2E, f32))
                top = arith.maximumf(top, sink)
            total = utils.c(0.0, f32) if sink is None else exp2(arith.subf(sink, top))
            sums = [utils.c(0.0, f32)] * width
            for log, at in zip(logs, where, strict=True):
                weight = exp2(arith.subf(log, top))
                total = arith.addf(total, weight)
                found = load(parts, at, width)
                for j in range(width):
                    term = arith.mulf(weight, vector.extract(found, [], [j]))
                    sums[j] = arith.addf(sums[j], term)
            scale = arith.divf(utils.c(1.0, f32), arith.maximumf(total, utils.c(_TINY, f32)))
            sums = [arith.mulf(x, scale) for x in sums]
            registers.append(vector.from_elements(ir.VectorType.get((width,), f32), sums))
        strided = layout.to_mgpu()
        found = np.array(registers, dtype=object).reshape(strided.registers_shape((size, dim)))
        return fa.FragmentedArray(_registers=found, _layout=strided, _is_signed=None)

    def reference(parts, log_sums, batch, head, block, *sinks):
        rows = block * size + jnp.arange(size)
        log = log_sums[batch, head, :, block, :size]
        top = jnp.max(log, axis=0)
        total = 0.0
        if sinks:
            sink = sinks[0][head * group + rows % group] * LOG2E
            top = jnp.maximum(top, sink)
            total = jnp.exp2(sink - top)
        weights = jnp.exp2(log - top[None])
        total = jnp.maximum(total + jnp.sum(weights, axis=0), _TINY)
        return jnp.sum(parts[batch, head][:, rows] * weights[..., None], axis=0) / total[:, None]

    sum_parts.interpret_impl = reference  # pyright: ignore[reportFunctionMemberAccess]
    types = (plgpu.RefType(), plgpu.RefType(), _SCALAR, _SCALAR, _SCALAR)
    types += (plgpu.RefType(),) * len(arrays[2:])
    inline = plgpu.inline_mgpu(
        arg_types=types,
        return_type=plgpu.ShapeDtypeStruct((size, dim), jnp.float32, layout=layout),
    )(sum_parts)

    def kernel(parts, log_sums, *rest):
        *sinks, out = rest
        block, head, sequence = (lax.axis_index(name) for name in ("block", "head", "sequence"))
        found = inline(parts, log_sums, sequence, head, block, *sinks)
        target = out.at[sequence, head, pl.ds(block * size, size)]
        target[...] = found.astype(out.dtype)

    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((batch, kv_heads, rows, dim), out_dtype),
        grid=(blocks, kv_heads, batch),
        grid_names=("block", "head", "sequence"),
        num_threads=1,
        thread_name="wg",
        kernel_name="combine_attention_parts",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )(*arrays)
