"""Tiles of 8- and 4-bit keys or values on their way to the float16 tiles that wgmma reads.

The producer warpgroup of prefill attention does it: a thread takes one token of the tile, or half of one, so that the
token's scale is one register, a token that nobody may see is one predicate, and the eight threads that share a
shared-memory access read and write eight different tokens, which the swizzles spread over all banks.

A scale here is relative: at most one, so that scaled numbers stay within float16. What it is relative to, and
`tile_unit`, go into the kernel's factors of logits and outputs.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from qjax.pallas_kernels import _paged_attention_registers_sm90 as reg
from qjax.pallas_kernels._prefill_attention_plan_sm90 import THREADS

PER_THREAD = plgpu.Layout.WG_STRIDED((THREADS,), vec_size=1)
_TARGET_SWIZZLE = 128
_BATCH = 4  # of 16 bytes, loaded before any is widened


def tile_unit(storage: reg.Storage) -> float:
    """What a one in the float16 tile stands for: FP4's numbers, up to 6 * 448, leave room for small scales."""
    return 2.0**7 if storage.bits == 4 else 1.0


def token_pages(table, sequence, tile, *, tokens: int, page_size: int) -> Array:
    """The page of each thread's token of a tile.

    Args:
        table: Global memory int32 [B, pages].
        sequence: Index into B.
        tile: The tile's number in its sequence.
        tokens: Of a tile.
        page_size: Tokens of a page.

    Returns:
        int32 [128] in `PER_THREAD`.
    """
    width = table.shape[1]

    def load(ctx, table, sequence, tile):
        del ctx
        i32, i64 = ir.IntegerType.get_signless(32), ir.IntegerType.get_signless(64)
        page = arith.divui(_token(tile, tokens), reg.i32(page_size))
        page = arith.minsi(page, reg.i32(width - 1))
        at = arith.addi(arith.muli(reg.value_of(sequence), reg.i32(width)), page)
        at = utils.getelementptr(utils.memref_ptr(table), [arith.extui(i64, at)], i32)
        return _per_thread(llvm.load(i32, at), signed=True)

    def reference(table, sequence, tile):
        token = tile * tokens + jnp.arange(THREADS) % tokens
        return table[sequence, jnp.minimum(token // page_size, width - 1)]

    load.interpret_impl = reference  # pyright: ignore[reportFunctionMemberAccess]
    out = plgpu.ShapeDtypeStruct((THREADS,), jnp.int32, layout=PER_THREAD)
    types = (plgpu.RefType(), reg.SCALAR, reg.SCALAR)
    return plgpu.inline_mgpu(arg_types=types, return_type=out)(load)(table, sequence, tile)


def token_scales(scales, pages: Array, head, tile, *, tokens: int, page_size: int) -> Array:
    """The scale of each thread's token of a tile.

    Args:
        scales: Global memory float32 [P, K] or [P, K, page_size].
        pages: From `token_pages`; any number is safe.
        head: KV head.
        tile: The tile's number in its sequence.
        tokens: Of a tile.
        page_size: Tokens of a page.

    Returns:
        float32 [128] in `PER_THREAD`.
    """
    pool, heads = scales.shape[:2]
    per_token = len(scales.shape) == 3

    def load(ctx, scales, pages, head, tile):
        del ctx
        i64, f32 = ir.IntegerType.get_signless(64), ir.F32Type.get()
        # The table past a sequence's pages may hold anything.
        number = vector.extract(pages.registers.item(), [], [0])
        number = arith.maxsi(arith.minsi(number, reg.i32(pool - 1)), reg.i32(0))
        index = arith.addi(arith.muli(number, reg.i32(heads)), reg.value_of(head))
        if per_token:
            slot = arith.remui(_token(tile, tokens), reg.i32(page_size))
            index = arith.addi(arith.muli(index, reg.i32(page_size)), slot)
        at = utils.getelementptr(utils.memref_ptr(scales), [arith.extui(i64, index)], f32)
        return _per_thread(llvm.load(f32, at))

    def reference(scales, pages, head, tile):
        token = tile * tokens + jnp.arange(THREADS) % tokens
        where = (jnp.clip(pages, 0, pool - 1), head)
        return scales[(*where, token % page_size) if per_token else where]

    load.interpret_impl = reference  # pyright: ignore[reportFunctionMemberAccess]
    out = plgpu.ShapeDtypeStruct((THREADS,), jnp.float32, layout=PER_THREAD)
    types = (plgpu.RefType(), PER_THREAD, reg.SCALAR, reg.SCALAR)
    wrap = plgpu.inline_mgpu(arg_types=types, return_type=out)
    return wrap(load)(scales, pages, head, tile)


def _token(tile: fa.FragmentedArray, tokens: int) -> ir.Value:
    """The thread's token of a tile, counted in the sequence."""
    inside = arith.remui(reg.thread(), reg.i32(tokens))
    return arith.addi(arith.muli(reg.value_of(tile), reg.i32(tokens)), inside)


def widen(
    source,
    target,
    valid,
    scale: Array | None = None,
    block_scales=None,
    *,
    storage: reg.Storage,
) -> None:
    """Writes a tile's numbers / `tile_unit` to the float16 tile.

    Args:
        source: Shared memory [tokens, H] with ``storage.transforms``; FP4 [tokens, H / 2]. 64 or 128 tokens.
        target: Shared memory float16 [tokens, H], tiled (8, 64) and swizzled by 128 bytes.
        valid: Tokens from this one on become zeros, whatever they hold; None for no such tokens.
        scale: float32 [128] in `PER_THREAD`, from `token_scales`, at most 1; None for 1.
        block_scales: Of FP4: shared memory, e4m3, tokens * H / 16 of them.
        storage: Of the pages.
    """
    tokens = target.shape[0]
    arguments = {"valid": valid, "scale": scale, "block_scales": block_scales}
    kinds = {"valid": reg.SCALAR, "scale": PER_THREAD, "block_scales": plgpu.RefType()}
    names = [name for name, value in arguments.items() if value is not None]
    tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(_TARGET_SWIZZLE))

    def convert(ctx, source, target, *rest):
        del ctx
        _Widening(source, target, tokens, storage, **dict(zip(names, rest, strict=True))).emit()

    def reference(source, target, *rest):
        del target
        given: dict[str, Any] = dict(zip(names, rest, strict=True))
        values = _reference_values(source, given.get("block_scales"), storage)
        if "scale" in given:
            values = values * given["scale"][:tokens, None]
        if "valid" in given:
            values = jnp.where(jnp.arange(tokens)[:, None] < given["valid"], values, 0)
        return (values.astype(jnp.float16),)

    convert.interpret_impl = reference  # pyright: ignore[reportFunctionMemberAccess]
    convert.interpret_writes = (1,)  # pyright: ignore[reportFunctionMemberAccess]
    types = (reg.tiled(storage), plgpu.RefType(tiled), *(kinds[name] for name in names))
    plgpu.inline_mgpu(arg_types=types)(convert)(
        source, target, *(arguments[name] for name in names)
    )


def _reference_values(stored: Array, block_scales: Array | None, storage: reg.Storage) -> Array:
    """float32 [tokens, H] / `tile_unit`."""
    if block_scales is None:
        return stored.astype(jnp.float32)
    codes = jnp.stack([stored & 15, stored >> 4], axis=-1).reshape(stored.shape[0], storage.dim)
    magnitude = jnp.asarray([0, 0.5, 1, 1.5, 2, 3, 4, 6])[codes & 7] / tile_unit(storage)
    scale = block_scales.astype(jnp.float32).reshape(stored.shape[0], -1)
    return jnp.where(codes > 7, -magnitude, magnitude) * jnp.repeat(scale, reg.SCALE_BLOCK, axis=1)


class _Widening:
    """The instructions of `widen`: a thread has the channels of a token, or half of them."""

    def __init__(
        self, source, target, tokens, storage, *, valid=None, scale=None, block_scales=None
    ):
        self.storage, self.parts = storage, THREADS // tokens
        self.row = arith.remui(reg.thread(), reg.i32(tokens))
        self.part = arith.divui(reg.thread(), reg.i32(tokens))
        self.channels = storage.dim // self.parts
        self.source = self._row_address(source, storage.row_bytes, storage.swizzle)
        self.target = self._row_address(target, 2 * storage.dim, _TARGET_SWIZZLE)
        self.seen = None
        if valid is not None:
            self.seen = arith.cmpi(arith.CmpIPredicate.slt, self.row, reg.value_of(valid))
        self.factor = None if scale is None else self._factor(scale.registers.item())
        self.block_scales = block_scales

    def _row_address(self, ref, row_bytes: int, swizzle: int) -> ir.Value:
        """Of the thread's first 16 bytes; others follow by `_chunk_address`."""
        inner = arith.remui(self.row, reg.i32(8))
        groups = arith.divui(self.row, reg.i32(8))
        offset = arith.addi(
            arith.muli(groups, reg.i32(8 * row_bytes)), arith.muli(inner, reg.i32(swizzle))
        )
        turn = arith.divui(inner, reg.i32(128 // swizzle))
        offset = arith.addi(offset, arith.muli(turn, reg.i32(16)))
        if self.parts > 1:
            own = row_bytes // self.parts
            if own >= swizzle:  # whole columns of tiles
                own = arith.muli(self.part, reg.i32(8 * own))
                offset = arith.addi(offset, own)
            else:
                offset = arith.xori(offset, arith.muli(self.part, reg.i32(own)))
        i32 = ir.IntegerType.get_signless(32)
        return arith.addi(llvm.ptrtoint(i32, utils.memref_ptr(ref)), offset)

    def _factor(self, scale: ir.Value) -> ir.Value:
        """The scale over `tile_unit`'s share, twice, in float16."""
        scale = vector.extract(scale, [], [0])
        if self.seen is not None:  # that of a token that was never written may be NaN
            scale = arith.select(self.seen, scale, utils.c(0.0, ir.F32Type.get()))
        return utils.inline_ptx(
            "cvt.rn.f16x2.f32 $0, $1, $1;", scale, result_types=ir.IntegerType.get_signless(32)
        )

    def emit(self) -> None:
        chunks = self.channels * self.storage.bits // 128
        if self.storage.bits == 4:
            self._load_block_scales()
        at = 0
        for first in range(0, chunks, _BATCH):
            loaded = []
            for i in range(first, min(first + _BATCH, chunks)):
                words = reg.shared_words(_chunk_address(self.source, i, self.storage.swizzle), 0, 4)
                if self.seen is not None:
                    words = [arith.select(self.seen, word, reg.i32(0)) for word in words]
                loaded += words
            widen = self._four_bits if self.storage.bits == 4 else self._eight_bits
            for words in widen(loaded, 4 * first):
                address = _chunk_address(self.target, at, _TARGET_SWIZZLE)
                text = "st.shared.v4.b32 [$0], {$1, $2, $3, $4};"
                utils.inline_ptx(text, address, *words, has_side_effects=True)
                at += 1

    def _eight_bits(self, loaded, first):
        """Sixteen bytes of float16 after each other."""
        del first
        for i in range(0, len(loaded), 2):
            words = [
                pair for w in loaded[i : i + 2] for pair in reg.widen_bytes(w, self.storage.dtype)
            ]
            yield words if self.factor is None else [_times(w, self.factor) for w in words]

    def _load_block_scales(self) -> None:
        """FP4's scales, two to a word, and what each is to be multiplied by."""
        count = self.channels // reg.SCALE_BLOCK  # scales of this thread
        at = arith.addi(
            arith.muli(self.row, reg.i32(self.storage.dim // reg.SCALE_BLOCK)),
            arith.muli(self.part, reg.i32(count)),
        )
        i32 = ir.IntegerType.get_signless(32)
        at = arith.addi(llvm.ptrtoint(i32, utils.memref_ptr(self.block_scales)), at)
        self.scales = []
        for word in reg.shared_words(at, 0, count // 4):
            if self.seen is not None:
                word = arith.select(self.seen, word, reg.i32(0))
            self.scales += reg.widen_bytes(word, "float8_e4m3fn")
        # Codes come out 2^-14 times too small; 2^7 of it is `tile_unit`.
        unit = reg.i32(0x58005800)  # 2^7, twice
        self.factor = unit if self.factor is None else _times(self.factor, unit)

    def _four_bits(self, loaded, first):
        """Sixteen bytes of float16 after each other; `first` is the number of words before these."""
        for i in range(0, len(loaded), 2):  # a block of 16 codes has two words
            block = (first + i) // 2
            pair = self.scales[block // 2]
            selector = reg.i32(0x3232 if block % 2 else 0x1010)
            scale = _times(_bytes_of(pair, pair, selector), self.factor)
            for word in loaded[i : i + 2]:
                yield [_times(codes, scale) for codes in _pairs_of_codes(word)]


def _pairs_of_codes(word: ir.Value) -> list[ir.Value]:
    """Neighbouring e2m1 numbers in float16, times 2^-14."""
    low = arith.shli(word, reg.i32(4))
    found = []
    for i in range(4):
        # The codes at the tops of both halves: sign to sign, the rest to exponent's end and mantissa's start.
        top = _bytes_of(word, low, reg.i32(i << 12 | (4 + i) << 4))
        rest = arith.andi(arith.shrui(top, reg.i32(3)), reg.i32(0x0E000E00))
        found.append(arith.ori(arith.andi(top, reg.i32(-0x7FFF8000)), rest))
    return found


def _chunk_address(base: ir.Value, index: int, swizzle: int) -> ir.Value:
    """Of a row's 16 bytes of this index; `base` has the row's turn of the swizzle."""
    column, inner = divmod(index, swizzle // 16)
    at = arith.xori(base, reg.i32(16 * inner)) if inner else base
    return arith.addi(at, reg.i32(8 * swizzle * column)) if column else at


def _times(a: ir.Value, b: ir.Value) -> ir.Value:
    i32 = ir.IntegerType.get_signless(32)
    return utils.inline_ptx("mul.rn.f16x2 $0, $1, $2;", a, b, result_types=i32)


def _bytes_of(first: ir.Value, second: ir.Value, selector: ir.Value) -> ir.Value:
    """Bytes of two words by the nibbles of a selector."""
    i32 = ir.IntegerType.get_signless(32)
    return utils.inline_ptx("prmt.b32 $0, $1, $2, $3;", first, second, selector, result_types=i32)


def _per_thread(value: ir.Value, *, signed: bool | None = None) -> fa.FragmentedArray:
    registers = np.empty((1,), dtype=object)
    registers[0] = vector.from_elements(ir.VectorType.get((1,), value.type), [value])
    layout = PER_THREAD.to_mgpu()
    return fa.FragmentedArray(_registers=registers, _layout=layout, _is_signed=signed)
