"""Sums in registers as two FP8 terms of the transposed output, what `fp8_split_sm90` makes of 16-bit rows.

Both terms of a number travel as one 16-bit element through the transposition, which moves no bytes; then a thread
holds two consecutive outputs of a token, whose bytes it pairs: 16-bit words of each term.
"""

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

_SPLIT_PTX = """{
.reg .b16 a, b; .reg .b32 h, t; .reg .f16 h0, h1; .reg .f32 f0, f1;
cvt.rn.satfinite.e4m3x2.f32 a, $2, $1;
cvt.rn.f16x2.e4m3x2 h, a;
mov.b32 {h0, h1}, h;
cvt.f32.f16 f0, h0;
cvt.f32.f16 f1, h1;
sub.f32 f0, $1, f0;
sub.f32 f1, $2, f1;
cvt.rn.satfinite.e5m2x2.f32 b, f1, f0;
mov.b32 t, {a, b};
prmt.b32 $0, t, 0, 0x3120;
}"""


def transposed_terms(value: Array) -> tuple[Array, Array]:
    """value.T as e4m3 and what that leaves as e5m2, two of consecutive rows of value in a 16-bit word.

    Args:
        value: float32 [64, N] in ``Layout.WGMMA``, magnitudes at most 448.

    Returns:
        Two int16 arrays [32, N], to be stored in a transposed buffer [N, 32].
    """
    columns = value.shape[1]

    def split(ctx, value):
        del ctx
        i32 = ir.IntegerType.get_signless(32)
        pair = ir.VectorType.get((2,), ir.BF16Type.get())
        registers = np.empty_like(value.registers)
        for i in np.ndindex(registers.shape):
            both = [vector.extract(value.registers[i], [], [j]) for j in (0, 1)]
            word = llvm.inline_asm(i32, both, _SPLIT_PTX, "=r,f,f")
            registers[i] = utils.bitcast(word, pair)
        return fa.FragmentedArray(_registers=registers, _layout=value.layout, _is_signed=None)

    def split_reference(value):
        first = value.astype(jnp.float8_e4m3fn)
        rest = (value - first.astype(jnp.float32)).astype(jnp.float8_e5m2)
        terms = jnp.stack([lax.bitcast_convert_type(t, jnp.uint8) for t in (first, rest)], axis=-1)
        return lax.bitcast_convert_type(terms, jnp.bfloat16)

    def pair(ctx, terms):
        del ctx
        i32, i16 = (ir.IntegerType.get_signless(bits) for bits in (32, 16))
        one = ir.VectorType.get((1,), i16)
        shape = (32, columns)
        out = [np.empty(_PAIRED.registers_shape(shape), dtype=object) for _ in range(2)]
        for i, register in enumerate(terms.registers.flat):
            word = utils.bitcast(register, i32)
            word = llvm.inline_asm(i32, [word], "prmt.b32 $0, $1, 0, 0x3120;", "=r,r")
            for shift, array in zip((0, 16), out, strict=True):
                half = arith.trunci(i16, arith.shrui(word, utils.c(shift, i32)))
                array.reshape(-1)[i] = vector.from_elements(one, [half])
        return tuple(
            fa.FragmentedArray(_registers=a, _layout=_PAIRED, _is_signed=True) for a in out
        )

    def pair_reference(terms):
        halves = lax.bitcast_convert_type(terms, jnp.uint8).reshape(32, 2, columns, 2)
        halves = halves.transpose(3, 0, 2, 1)  # term, pair of rows, column, row
        return tuple(lax.bitcast_convert_type(h, jnp.int16) for h in halves)

    split.interpret_impl = split_reference  # pyright: ignore[reportFunctionMemberAccess]
    pair.interpret_impl = pair_reference  # pyright: ignore[reportFunctionMemberAccess]
    packed = plgpu.ShapeDtypeStruct(value.shape, jnp.bfloat16, layout=plgpu.Layout.WGMMA)
    terms = plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA,), return_type=packed)(split)(value)
    terms = plgpu.layout_cast(terms, plgpu.Layout.WGMMA_TRANSPOSED)
    layout = plgpu.Layout.TILED(
        _PAIRED.tiling, _PAIRED.warp_dims, _PAIRED.lane_dims, _PAIRED.vector_dim
    )
    paired = plgpu.ShapeDtypeStruct((32, columns), jnp.int16, layout=layout)
    arg_types = (plgpu.Layout.WGMMA_TRANSPOSED,)
    return plgpu.inline_mgpu(arg_types=arg_types, return_type=(paired, paired))(pair)(terms)


# `WGMMA_TRANSPOSED_LAYOUT` with each thread's two rows as one element.
_PAIRED = fa.TiledLayout(
    fa.Tiling(((32, 8), (8, 8), (4, 8), (1, 2), (1, 1))),
    warp_dims=(-10,),
    lane_dims=(-6, -3, -5),
    vector_dim=-1,
    _check_canonical=False,
).canonicalize()
