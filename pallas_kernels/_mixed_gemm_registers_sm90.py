"""Codes of 2, 4 and 8 bits that `wgmma_layout` ordered, as wgmma's left operand in registers.

Every value is exact, so that the float32 scale of a group can multiply the sum of products instead:

    int2, int4  ``bits | u`` is the number bias + u; one subtraction leaves q - zero_point
    int8        float16: the same. bfloat16 has seven bits below its leading one: 128 + (q & 127) less
                128 or 256, which the code's sign bit chooses
    floats      sign, exponent and mantissa move to their places in the 16-bit float; a power of two, exact too,
                corrects the exponent's bias and makes subnormals what they should be. NaN and infinities
                become finite
"""

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm, vector

from qjax.pallas_kernels import _int4_gemm_registers_sm90 as int4
from qjax.wgmma_layout import BLOCK, from_words

ELEMENTS = {
    "int2": 2,
    "int4": 4,
    "int8": 8,
    "float4_e2m1fn": 4,
    "float8_e4m3fn": 8,
    "float8_e5m2": 8,
}
"""Bits of the codes that the kernel reads, by element."""

UNITS = {2: 64, 4: 64, 8: 32}
"""Columns of 64 rows whose codes a thread loads at once, by the codes' bits."""

_MINUS_ZEROS = "0x80008000"
_AND_OR, _AND_XOR = "0xEA", "0x6A"  # lop3 of a, b, c: (a & b) | c and (a & b) ^ c
# Left shift of a code's bits below the sign from bit 0, and the power of two that the result lacks.
_FLOATS = {
    ("float4_e2m1fn", "bfloat16"): (6, 2.0**126),
    ("float4_e2m1fn", "float16"): (9, 2.0**14),
    ("float8_e4m3fn", "bfloat16"): (4, 2.0**120),
    ("float8_e5m2", "bfloat16"): (5, 2.0**112),
    ("float8_e4m3fn", "float16"): (7, 2.0**8),
    ("float8_e5m2", "float16"): (8, 1.0),
}


def bias_of(element: str, dtype: DTypeLike) -> float:
    """What the numbers made of a code's bits exceed q by, where a zero point is subtracted from them."""
    wide = jnp.dtype(dtype) == jnp.float16
    if element == "int8":
        return 1024.0 + 128 if wide else 0.0
    return (1024.0 if wide else 128.0) + 2 ** (ELEMENTS[element] - 1)


def words_layout(shape: tuple[int, ...]):
    """How a warpgroup loads words [units, w, 256]: a thread's are a vector."""
    return plgpu.Layout.WG_STRIDED(shape, vec_size=min(2 * shape[1], 4))


def dequantize(
    words: Array,
    element: str,
    dtype: DTypeLike,
    zero_point: Array | None,
    *,
    first: int,
    width: int,
    zero: int = 0,
    ampere: bool = False,
) -> Array:
    """Differences q - zero_point, or the values of floating codes, as 16-bit floats.

    Args:
        words: int32 [units, w, 256] of `wgmma_layout`, units of `UNITS` columns, in `words_layout`.
        element: Key of `ELEMENTS`.
        dtype: bfloat16 or float16.
        zero_point: float32 [64] in ``Layout.WGMMA.reduce(1)``; None where all are `zero`. |q - zero_point| is
            at most 256.
        first: First column wanted, a multiple of 16.
        width: Columns wanted, a multiple of 16.
        zero: The zero point of all integers, where `zero_point` is None.
        ampere: Whether to use no instruction that compute capability 8.0 lacks.

    Returns:
        [64, width] in ``Layout.WGMMA``.
    """
    dtype = jnp.dtype(dtype)
    offset = None
    if zero_point is not None:
        offset = (zero_point + bias_of(element, dtype)).astype(dtype)
    if element == "int4":
        return int4.dequantize(
            words, dtype, offset, first=first, width=width, zero=zero, ampere=ampere
        )
    bits, shape = ELEMENTS[element], (BLOCK, width)

    def emit(ctx, words, *offset):
        del ctx
        return _emit(words, offset, element, first, shape, dtype, zero, ampere)

    def reference(words, *offset):
        if bits == 8:  # two units are a block
            words = jnp.pad(words, ((0, words.shape[0] % 2), (0, 0), (0, 0)))
        codes = from_words(words.reshape(1, -1, bits // 2, 256), bits)
        codes = codes[:, first * bits // 8 : (first + width) * bits // 8]
        if element == "float4_e2m1fn":
            codes = jnp.stack([codes & jnp.uint8(15), codes >> jnp.uint8(4)], axis=-1)
            magnitudes = jnp.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], jnp.float32)
            codes = codes.reshape(shape).astype(jnp.int32)
            values = jnp.take(magnitudes, codes & 7)
            return jnp.where(codes >= 8, -values, values).astype(dtype)
        if element.startswith("float8"):
            return lax.bitcast_convert_type(codes, jnp.dtype(element)).astype(dtype)
        if bits == 2:
            fields = [(codes >> jnp.uint8(2 * i)) & jnp.uint8(3) for i in range(4)]
            q = jnp.stack(fields, axis=-1).reshape(shape).astype(jnp.float32) - 2
        else:
            q = lax.bitcast_convert_type(codes, jnp.int8).astype(jnp.float32)
        if not offset:
            return (q - zero).astype(dtype)
        zeros = offset[0].astype(jnp.float32) - bias_of(element, dtype)
        return (q - zeros[:, None]).astype(dtype)

    emit.interpret_impl = reference  # pyright: ignore[reportFunctionMemberAccess]
    offsets = () if offset is None else (offset,)
    return plgpu.inline_mgpu(
        arg_types=(
            words_layout(words.shape),
            *(plgpu.Layout.WGMMA.reduce(1) for _ in offsets),
        ),
        return_type=plgpu.ShapeDtypeStruct(shape, dtype, layout=plgpu.Layout.WGMMA),
    )(emit)(words, *offsets)


def _emit(
    words, offset, element: str, first: int, shape, dtype, zero: int, ampere: bool
) -> fa.FragmentedArray:
    bits = ELEMENTS[element]
    i32 = ir.IntegerType.get_signless(32)
    pair = ir.VectorType.get((2,), ir.BF16Type.get() if dtype == jnp.bfloat16 else ir.F16Type.get())
    if offset:
        halves = [offset[0].registers[0, 0, half, 0, 0] for half in (0, 1)]
        constants = [utils.bitcast(utils.vector_concat([v, v]), i32) for v in halves]
    else:
        if element.startswith("float"):
            number = _FLOATS[element, dtype.name][1]
        else:
            number = bias_of(element, dtype) + zero
        # Both 16-bit halves of a register get the number.
        both = int(np.asarray(number, dtype).view(np.uint16)) * 0x10001
        both -= (both >> 31) << 32  # as a signed integer
        constants = [llvm.ConstantOp(i32, ir.IntegerAttr.get(i32, both)).result] * 2
    subtracts = bool(offset) or zero != 0
    registers = list(words.registers.flat)
    out = np.empty(fa.WGMMA_LAYOUT.registers_shape(shape), dtype=object)
    for j in range(shape[1] // 16):
        unit, group = divmod(first // 16 + j, UNITS[bits] // 16)
        if bits == 2:
            codes = [vector.extract(registers[unit], [], [group // 2])]
            ptx = _two_bits(8 * (group % 2), dtype, ampere)
        elif bits == 4:
            codes = [vector.extract(registers[unit], [], [group])]
            ptx = _float4(element, dtype, ampere)
        else:
            codes = [vector.extract(registers[unit], [], [2 * group + h]) for h in (0, 1)]
            if element == "int8":
                ptx = _integers(dtype, subtracts, ampere)
            else:
                ptx = _float8(element, dtype, ampere)
        inputs = [*codes, *constants]
        # What fused multiply-adds multiply by or add.
        constant = int4.MINUS_ONES if element.startswith("int") else _MINUS_ZEROS
        text = "\n".join(["{", ".reg .b32 t, u, c;", f"mov.b32 c, {constant};", *ptx, "}"])
        constraints = ",".join(["=&r"] * 4 + ["r"] * len(inputs))
        results = llvm.inline_asm(llvm.StructType.get_literal([i32] * 4), inputs, text, constraints)
        for i in range(4):  # register i: 8 columns i / 2, row half i % 2
            value = utils.bitcast(llvm.extractvalue(i32, results, [i]), pair)
            out[0, 2 * j + i // 2, 0, 0, i % 2, 0, 0, 0, 0] = value
    return fa.FragmentedArray(_registers=out, _layout=fa.WGMMA_LAYOUT, _is_signed=None)


def _two_bits(shift: int, dtype, ampere: bool) -> list[str]:
    """Outputs $0 to $3 of the word $4 and the offsets $5, $6 of the row halves."""
    number = "0x43004300" if dtype == jnp.bfloat16 else "0x64006400"
    lines = []
    for i in range(4):
        lines.append(f"shr.b32 t, $4, {shift + 2 * i};")
        lines.append(f"lop3.b32 t, t, 0x00030003, {number}, {_AND_OR};")
        lines.append(int4.subtraction(dtype, f"${i}", "t", f"${5 + i % 2}", ampere=ampere))
    return lines


def _integers(dtype, subtracts: bool, ampere: bool) -> list[str]:
    """Outputs $0 to $3 of the words $4, $5 and the offsets $6, $7 of the row halves."""
    lines = []
    for i in range(4):
        half = i % 2
        source = "t" if i >= 2 else f"${4 + half}"
        if i >= 2:  # the upper 8 columns' codes are the upper bytes
            lines.append(f"shr.b32 t, ${4 + half}, 8;")
        if dtype == jnp.float16:
            lines.append(f"lop3.b32 u, {source}, 0x00FF00FF, 0x64806480, {_AND_XOR};")
            lines.append(f"sub.f16x2 ${i}, u, ${6 + half};")
            continue
        lines.append(f"lop3.b32 u, {source}, 0x007F007F, 0x43004300, {_AND_OR};")
        lines.append(f"lop3.b32 t, {source}, 0x00800080, 0x43004300, {_AND_OR};")
        lines.append(int4.subtraction(dtype, f"${i}", "u", "t", ampere=ampere))
        if subtracts:
            offset = f"${6 + half}"
            lines.append(int4.subtraction(dtype, f"${i}", f"${i}", offset, ampere=ampere))
    return lines


def _float4(element: str, dtype, ampere: bool) -> list[str]:
    """Outputs $0 to $3 of the word $4 and the power of two $5."""
    left, _ = _FLOATS[element, dtype.name]
    lines = []
    for i in range(4):
        source = "$4"
        if i < 3:  # a code's sign to the top of its half
            lines.append(f"shl.b32 t, $4, {12 - 4 * i};")
            source = "t"
        lines += _float(source, 12 - left, 7 << left, f"${i}", "$5", dtype, ampere)
    return lines


def _float8(element: str, dtype, ampere: bool) -> list[str]:
    """Outputs $0 to $3 of the words $4, $5 and the power of two $6."""
    left, _ = _FLOATS[element, dtype.name]
    lines = []
    for i in range(4):
        source = f"${4 + i % 2}"
        if i < 2:  # the lower 8 columns' codes are the lower bytes
            lines.append(f"shl.b32 t, {source}, 8;")
            source = "t"
        if left == 8:  # the code's bits are the float's upper ones
            lines.append(f"and.b32 ${i}, {source}, 0xFF00FF00;")
        else:
            lines += _float(source, 8 - left, 0x7F << left, f"${i}", "$6", dtype, ampere)
    return lines


def _float(
    source: str, right: int, mask: int, target: str, power: str, dtype, ampere: bool
) -> list[str]:
    """The floats of codes whose signs are where the floats' are, and their other bits `right` bits too high."""
    kind = "bf16x2" if dtype == jnp.bfloat16 else "f16x2"
    scaled = f"mul.rn.{kind} {target}, u, {power};"
    if (
        ampere and kind == "bf16x2"
    ):  # mul.bf16x2 is of compute capability 9.0; -0 keeps zeros' signs
        scaled = f"fma.rn.bf16x2 {target}, u, {power}, c;"
    return [
        f"shr.b32 u, {source}, {right};",
        f"and.b32 u, u, {mask * 0x10001:#x};",
        f"lop3.b32 u, {source}, 0x80008000, u, {_AND_OR};",
        scaled,
    ]
