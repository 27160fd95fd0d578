"""QArray: a quantized array as a JAX pytree, its packing and its dequantization."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from qjax import wgmma_layout
from qjax.formats import WHOLE, QFormat, Storage


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QArray:
    """A quantized array of logical shape [..., N, K].

    ``w[..., n, k] = (q - zero_point) * scale * global_scale``, scales indexed by block; with
    ``format.offset == "minimum"``: ``u * scale + minimum`` with the unsigned code u. Build it with
    `QArray.from_parts` (which validates) or `qjax.quantize`; the constructor itself checks nothing, so
    that it may hold tracers, specs and shape structs inside JAX transformations.

    Attributes:
        qvalue: Codes: [..., N, K] for "plain" storage, uint8 [..., N, K*bits/8] for "packed", int32
            [..., N/64, K/64, bits/2, 256] for "wgmma", "wgmma8" and "wgmma8_pairs".
        scale: [..., ceil(N/bn), ceil(K/bk)], of either sign.
        zero_point: Integers of scale's shape, in units of the signed code q, or None.
        minimum: Values of scale's shape and dtype, or None.
        global_scale: float32 [..., 1, 1], or None.
        column_perm: int32 [K] or None: stored column i holds logical column column_perm[i] (act-order).
        format: The storage.
        dtype: Name of the dtype that `dequantize` returns by default.
    """

    qvalue: Array
    scale: Array
    zero_point: Array | None = None
    minimum: Array | None = None
    global_scale: Array | None = None
    column_perm: Array | None = None
    format: QFormat = dataclasses.field(metadata={"static": True}, kw_only=True)
    dtype: str = dataclasses.field(default="bfloat16", metadata={"static": True}, kw_only=True)

    @classmethod
    def from_parts(
        cls,
        format: QFormat,
        qvalue: Array,
        scale: Array,
        *,
        zero_point: Array | None = None,
        minimum: Array | None = None,
        global_scale: Array | None = None,
        column_perm: Array | None = None,
        dtype: DTypeLike = "bfloat16",
    ) -> "QArray":
        """Builds a QArray from its canonical parts, validated.

        Raises:
            ValueError: If a part is missing, superfluous, or of the wrong shape or dtype.
        """
        w = cls(
            qvalue,
            scale,
            zero_point,
            minimum,
            global_scale,
            column_perm,
            format=format,
            dtype=jnp.dtype(dtype).name,
        )
        w.validate()
        return w

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape, computed from the codes and the storage."""
        if self.format.ordered:
            *lead, n, k, _, _ = self.qvalue.shape
            return (*lead, n * wgmma_layout.BLOCK, k * wgmma_layout.BLOCK)
        *lead, last = self.qvalue.shape
        return (*lead, last if self.format.storage == "plain" else last * 8 // self.format.bits)

    @property
    def ndim(self) -> int:
        """Number of logical axes."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts together."""
        return sum(x.nbytes for x in jax.tree.leaves(self))

    def validate(self) -> None:
        """Checks the parts against the format.

        Raises:
            ValueError: Naming the part, what it must be and what was found.
        """

        def expect(name, part, wanted, shape, dtype):
            if (part is not None) != wanted:
                raise ValueError(
                    f"QArray of {self.format}: {name} must be {'present' if wanted else 'None'}"
                )
            if part is not None and (
                tuple(part.shape) != tuple(shape) or part.dtype != jnp.dtype(dtype)
            ):
                raise ValueError(
                    f"QArray of {self.format}: {name} must be {jnp.dtype(dtype).name}{list(shape)}; "
                    f"found {part.dtype}{list(part.shape)}"
                )

        f = self.format
        if self.qvalue.ndim < (4 if f.ordered else 2):
            raise ValueError(
                f"QArray: qvalue needs at least two axes; found {list(self.qvalue.shape)}"
            )
        shape = self.shape
        scales = f.scale_shape(shape)
        expect("qvalue", self.qvalue, True, f.storage_shape(shape), f.storage_dtype)
        expect("scale", self.scale, True, scales, f.stored_scale_dtype)
        expect("zero_point", self.zero_point, f.offset == "zero_point", scales, f.zero_point_dtype)
        expect("minimum", self.minimum, f.offset == "minimum", scales, f.stored_scale_dtype)
        expect("global_scale", self.global_scale, f.global_scale, (*shape[:-2], 1, 1), jnp.float32)
        if self.column_perm is not None:
            expect("column_perm", self.column_perm, True, shape[-1:], jnp.int32)

    def dequantize(self, dtype: DTypeLike | None = None) -> Array:
        """The array [..., N, K] in `dtype` (default: `self.dtype`), computed in float32, columns in logical order."""
        w = dequantize_stored(self)
        if self.column_perm is not None:
            w = jnp.take(w, jnp.argsort(self.column_perm), axis=-1)
        return w.astype(self.dtype if dtype is None else dtype)


def dequantize_stored(w: QArray) -> Array:
    """The float32 array [..., N, K] with columns in stored order (before undoing `column_perm`)."""
    w = to_packed(w)
    shape, block = w.shape, w.format.block_size(w.shape)
    codes = unpack(w.qvalue, w.format)
    scale = expand_blocks(decode_scale(w.scale), shape, block)
    if w.minimum is not None:
        unsigned = codes.astype(jnp.float32) + 2.0 ** (w.format.bits - 1)
        return unsigned * scale + expand_blocks(w.minimum.astype(jnp.float32), shape, block)
    if w.zero_point is not None:
        zero_point = expand_blocks(w.zero_point.astype(jnp.int32), shape, block)
        codes = codes.astype(jnp.int32) - zero_point
    values = codes.astype(jnp.float32) * scale
    return values if w.global_scale is None else values * w.global_scale


def to_wgmma(w: QArray, *, pairs: bool = False, eight_bit: bool = False) -> QArray:
    """The same array in "wgmma" storage, or experts (more than two axes) of MXFP4 in "wgmma8" storage.

    Every row gets the scale of its block, and groups of a multiple of 128 columns the scale of each 128 columns;
    nothing is lost.

    Args:
        w: In the storage of checkpoints; others are returned as they are.
        pairs: Experts of MXFP4 in "wgmma8_pairs" storage instead: their even rows are a gate's.
        eight_bit: INT4 in "wgmma8" storage, to meet 8-bit inputs.

    Raises:
        ValueError: If the format or the shape does not allow it.
    """
    if w.format.ordered:
        return w
    if w.format.storage == "packed" and w.format.element == "float4_e2m1fn" and w.ndim > 2:
        return _to_wgmma8(w, "wgmma8_pairs" if pairs else "wgmma8")
    block_n, block_k = w.format.block_shape
    repeat = block_k // 128 if block_k != WHOLE and block_k % 128 == 0 else 1
    block_k = block_k // repeat
    storage = "wgmma8" if eight_bit else "wgmma"
    format = dataclasses.replace(w.format, block_shape=(block_n, block_k), storage=storage)
    format.storage_shape(w.shape)
    n = w.shape[-2]
    groups = 1 if block_k == WHOLE else -(-w.shape[-1] // block_k)

    def by_rows(part: Array | None, dtype) -> Array | None:
        if part is None:
            return None
        if part.dtype == jnp.float8_e8m0fnu:
            part = _e8m0_to_bfloat16(part)
        part = jnp.repeat(part, n if block_n == WHOLE else block_n, axis=-2)[..., :n, :]
        part = jnp.repeat(part, repeat, axis=-1)[..., :groups]
        return wgmma_layout.to_row_blocks(part.astype(dtype))

    codes, bits = w.qvalue, w.format.bits
    if bits not in (2, 4, 8):
        codes = unpack(codes, w.format)
        codes = pack_bits((codes + jnp.int8(8)).astype(jnp.uint8), 4) if bits == 3 else codes
    if codes.dtype != jnp.uint8:
        codes = jax.lax.bitcast_convert_type(codes, jnp.uint8)
    if eight_bit:
        words = wgmma_layout.to_words8(codes, format.element)
    else:
        words = wgmma_layout.to_words(codes, format.stored_bits)
    return dataclasses.replace(
        w,
        qvalue=words,
        scale=by_rows(w.scale, format.stored_scale_dtype),
        zero_point=by_rows(w.zero_point, format.zero_point_dtype),
        minimum=by_rows(w.minimum, format.stored_scale_dtype),
        format=format,
    )


def to_packed(w: QArray) -> QArray:
    """The same array in the storage of checkpoints: the inverse of `to_wgmma`, others as they are."""
    if not w.format.ordered:
        return w
    if w.format.eight_bit and w.format.spec.is_float:
        return _from_wgmma8(w)
    format, bits = w.format.in_checkpoints, w.format.bits
    block_n = format.block_size(w.shape)[0]

    def by_blocks(part: Array | None, dtype) -> Array | None:
        if part is None:
            return None
        part = wgmma_layout.from_row_blocks(part)[..., ::block_n, :]
        if jnp.dtype(dtype) == jnp.float8_e8m0fnu:
            return _bfloat16_to_e8m0(part)
        return part.astype(dtype)

    if w.format.storage == "wgmma8":
        codes = wgmma_layout.from_words8(w.qvalue, w.format.element)
    else:
        codes = wgmma_layout.from_words(w.qvalue, w.format.stored_bits)
    if bits == 3:
        codes = pack((unpack_bits(codes, 4).astype(jnp.int8) - jnp.int8(8)), format)
    elif bits > 4:
        dtype = format.storage_dtype if bits == 8 else jnp.int8
        codes = jax.lax.bitcast_convert_type(codes, dtype)
        codes = codes if bits == 8 else pack(codes, format)
    return dataclasses.replace(
        w,
        qvalue=codes,
        scale=by_blocks(w.scale, format.scale_dtype),
        zero_point=by_blocks(w.zero_point, format.zero_point_dtype),
        minimum=by_blocks(w.minimum, format.scale_dtype),
        format=format,
    )


def _to_wgmma8(w: QArray, storage: Storage) -> QArray:
    """MXFP4 in this storage: scale codes count from 127, the code of the largest, modulo 256."""
    format = dataclasses.replace(w.format, storage=storage, global_scale=True)
    format.storage_shape(w.shape)
    qvalue, codes = w.qvalue, jax.lax.bitcast_convert_type(w.scale, jnp.uint8)
    if storage == "wgmma8_pairs":
        qvalue, codes = wgmma_layout.pair_rows(qvalue), wgmma_layout.pair_rows(codes)
    largest = jnp.max(codes, axis=(-2, -1), keepdims=True)
    # The float32 number of this e8m0 code, bit by bit: 2**-127 is subnormal, 255 is NaN.
    bits = jnp.where(largest == 0, jnp.uint32(0x00400000), largest.astype(jnp.uint32) << 23)
    bits = jnp.where(largest == 255, jnp.uint32(0x7FC00000), bits)
    relative = wgmma_layout.to_row_blocks(codes - largest + jnp.uint8(127))
    return dataclasses.replace(
        w,
        qvalue=wgmma_layout.to_words8(qvalue),
        scale=jax.lax.bitcast_convert_type(relative, jnp.float8_e8m0fnu),
        global_scale=jax.lax.bitcast_convert_type(bits, jnp.float32),
        format=format,
    )


def _from_wgmma8(w: QArray) -> QArray:
    """The inverse of `_to_wgmma8`."""
    assert w.global_scale is not None
    bits = jax.lax.bitcast_convert_type(w.global_scale, jnp.uint32)
    largest = (bits >> 23).astype(jnp.uint8)
    relative = wgmma_layout.from_row_blocks(jax.lax.bitcast_convert_type(w.scale, jnp.uint8))
    codes = relative - jnp.uint8(127) + largest
    qvalue = wgmma_layout.from_words8(w.qvalue)
    if w.format.storage == "wgmma8_pairs":
        qvalue, codes = wgmma_layout.unpair_rows(qvalue), wgmma_layout.unpair_rows(codes)
    return dataclasses.replace(
        w,
        qvalue=qvalue,
        scale=jax.lax.bitcast_convert_type(codes, jnp.float8_e8m0fnu),
        global_scale=None,
        format=w.format.in_checkpoints,
    )


def _e8m0_to_bfloat16(scale: Array) -> Array:
    """The same powers of two, bit by bit: a conversion may flush 2**-127, which is subnormal."""
    code = jax.lax.bitcast_convert_type(scale, jnp.uint8).astype(jnp.uint16)
    bits = jnp.where(code == 0, jnp.uint16(0x0040), code << jnp.uint16(7))
    bits = jnp.where(code == 255, jnp.uint16(0x7FC0), bits)
    return jax.lax.bitcast_convert_type(bits, jnp.bfloat16)


def _bfloat16_to_e8m0(scale: Array) -> Array:
    """The inverse of `_e8m0_to_bfloat16`."""
    bits = jax.lax.bitcast_convert_type(
        scale, jnp.uint16
    )  # the exponent of 2**-127 is 0, of NaN 255
    return jax.lax.bitcast_convert_type(
        (bits >> jnp.uint16(7)).astype(jnp.uint8), jnp.float8_e8m0fnu
    )


def decode_scale(scale: Array) -> Array:
    """Scales as float32."""
    return scale.astype(jnp.float32)


def expand_blocks(blocks: Array, shape: tuple[int, ...], block: tuple[int, int]) -> Array:
    """Repeats one value per block over the block's elements: [..., ceil(N/bn), ceil(K/bk)] -> [..., N, K]."""
    for axis, size in ((-2, block[0]), (-1, block[1])):
        if blocks.shape[axis] == 1 or size == 1:
            continue  # a single block broadcasts, a block of one is already expanded
        blocks = jnp.repeat(blocks, size, axis=axis)
    blocks = blocks[..., : shape[-2], : shape[-1]]
    return jnp.broadcast_to(blocks, shape)


def pack(codes: Array, format: QFormat) -> Array:
    """Stores element values: integers q, or floating values that lie on the element's grid.

    Args:
        codes: [..., N, K], integers in the element's range, or float values on its grid.
        format: The storage.

    Returns:
        `format.storage_dtype` of `format.storage_shape(codes.shape)`.
    """
    if format.storage == "plain":
        return codes.astype(format.storage_dtype)
    shape = format.storage_shape(codes.shape)
    if format.spec.is_float:
        unsigned = _encode_e2m1(codes)
    else:
        unsigned = (codes.astype(jnp.int32) + 2 ** (format.bits - 1)).astype(jnp.uint8)
    return pack_bits(unsigned, format.bits).reshape(shape)


def unpack(qvalue: Array, format: QFormat) -> Array:
    """The inverse of `pack`: signed integers (int8) or floating values, one per element."""
    if format.storage == "plain":
        return qvalue.astype(jnp.float32) if format.spec.is_float else qvalue
    unsigned = unpack_bits(qvalue, format.bits)
    if format.spec.is_float:
        return _decode_e2m1(unsigned)
    return unsigned.astype(jnp.int8) - jnp.int8(2 ** (format.bits - 1))


def pack_bits(codes: Array, bits: int) -> Array:
    """Packs unsigned codes (uint8 [..., K]) into a little-endian bit stream (uint8 [..., K*bits/8])."""
    *lead, k = codes.shape
    if 8 % bits == 0:
        per_byte = 8 // bits
        groups = codes.reshape(*lead, k // per_byte, per_byte)
        return _join_bits([groups[..., i] for i in range(per_byte)], bits)
    # A code may straddle bytes: eight codes fill `bits` bytes, one bit at a time.
    stream = jnp.stack([(codes >> jnp.uint8(i)) & jnp.uint8(1) for i in range(bits)], axis=-1)
    stream = stream.reshape(*lead, k * bits // 8, 8)
    return _join_bits([stream[..., i] for i in range(8)], 1)


def _join_bits(fields: list[Array], width: int) -> Array:
    """One byte from `8 / width` fields, the first in the lowest bits."""
    shifted = (f << jnp.uint8(i * width) for i, f in enumerate(fields))
    return functools.reduce(jnp.bitwise_or, shifted)


def unpack_bits(packed: Array, bits: int) -> Array:
    """The inverse of `pack_bits`."""
    *lead, nbytes = packed.shape
    k = nbytes * 8 // bits
    if 8 % bits == 0:
        mask = jnp.uint8(2**bits - 1)
        fields = [(packed >> jnp.uint8(shift)) & mask for shift in range(0, 8, bits)]
        return jnp.stack(fields, axis=-1).reshape(*lead, k)
    # Eight codes lie in `bits` bytes; each spans at most two of them.
    chunks = packed.reshape(*lead, nbytes // bits, bits).astype(jnp.uint16)
    chunks = jnp.concatenate([chunks, jnp.zeros_like(chunks[..., :1])], axis=-1)
    codes = []
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        pair = chunks[..., byte] | (chunks[..., byte + 1] << jnp.uint16(8))
        codes.append((pair >> jnp.uint16(shift)) & jnp.uint16(2**bits - 1))
    return jnp.stack(codes, axis=-1).astype(jnp.uint8).reshape(*lead, k)


def _encode_e2m1(values: Array) -> Array:
    """float4_e2m1fn codes (sign, two exponent bits, one mantissa bit) of values on the grid."""
    v = values.astype(jnp.float32)
    a = jnp.abs(v)
    magnitude = jnp.where(a < 2, a * 2, jnp.where(a < 4, a + 2, a / 2 + 4))
    magnitude = jnp.nan_to_num(magnitude).astype(jnp.uint8)
    return magnitude | (jnp.signbit(v).astype(jnp.uint8) << jnp.uint8(3))


def _decode_e2m1(codes: Array) -> Array:
    """float32 values of float4_e2m1fn codes: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives."""
    m = (codes & jnp.uint8(7)).astype(jnp.float32)
    a = jnp.where(m < 4, m * 0.5, jnp.where(m < 6, m - 2, m * 2 - 8))
    return jnp.where(codes >= 8, -a, a)
