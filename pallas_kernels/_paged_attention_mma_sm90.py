"""The two products of decode attention with ``mma.sync``: queries with keys, weights with values.

`_paged_attention_registers_sm90` says how the arrays lie. Keys and values come from shared memory by ldmatrix, which
gives a thread four bytes of one token or, transposed, two bytes of each of two tokens.
"""

import jax.numpy as jnp
from jax import Array
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from qjax.pallas_kernels import _paged_attention_registers_sm90 as reg
from qjax.pallas_kernels._mma_sm80 import mma, pairs


def logits(query: Array, key, scales=None, *, storage: reg.Storage, turned: bool = False) -> Array:
    """Each warp's queries times its tokens' keys, in units of 1 / storage.unit.

    Args:
        query: [64, H] from `queries`, in ``storage.operand``.
        key: Shared memory [storage.tile, H] with ``storage.transforms``; FP4 [storage.tile, H / 2].
        scales: Of FP4: shared memory, e4m3, tile * H / 16 of them.
        storage: Of the pages.
        turned: Whether only the first eight rows are wanted, turned.

    Returns:
        float32 [64, storage.tokens], or half as many columns.
    """
    n, dim = storage.tokens, storage.dim
    columns = n // 2 if turned else n

    def product(ctx, query, key, *scales):
        del ctx
        tile = _Tile(key, storage)
        words = [utils.bitcast(r, ir.IntegerType.get_signless(32)) for r in query.registers.flat]
        sums = [[utils.c(0.0, ir.F32Type.get())] * 4 for _ in range(columns // 8)]
        rows = (
            [_KeyScales(scales[0], block, storage) for block in range(n // 8)] if scales else None
        )
        step, waiting = 0, [[] for _ in range(n // 8)]  # pairs of channels of each block of tokens
        for first in range(0, storage.row_bytes // 16, tile.chunks):
            for i, word in enumerate(tile.load(first, transposed=False)):
                block, chunk = i // tile.chunks, first + i % tile.chunks
                waiting[block] += _decode(word, storage, rows and rows[block].of_chunk(chunk))
            while len(waiting[0]) >= 2:
                right = [[waiting[block].pop(0) for _ in range(2)] for block in range(n // 8)]
                left = words[4 * step : 4 * step + 4]
                for i in range(len(sums)):
                    if turned:
                        operands = (
                            [
                                x
                                for pair in zip(*right[2 * i : 2 * i + 2], strict=True)
                                for x in pair
                            ],
                            left[::2],
                        )
                    else:
                        operands = left, right[i]
                    sums[i] = mma(storage.operand, *operands, sums[i])
                step += 1
        return reg.array(pairs(sums), columns)

    def reference(query, key, *scales):
        q = query.astype(jnp.float32).reshape(reg.WARPS, reg.ROWS, dim)
        k = _values(key, storage, *scales)[:, storage.key_order()].reshape(reg.WARPS, n, dim)
        found = jnp.einsum("wrd,wnd->wrn", q, k, precision="highest").reshape(64, n)
        return reg.turn(found) if turned else found

    product.interpret_impl = reference  # pyright: ignore[reportFunctionMemberAccess]
    arrays = (query, key) if scales is None else (query, key, scales)
    kinds = (plgpu.Layout.WGMMA, reg.tiled(storage), *[None] * len(arrays[2:]))
    return reg.inline(product, kinds, (64, columns), jnp.float32)(*arrays)


def add_values(
    p: Array,
    value,
    out: Array,
    rescale: Array,
    begin,
    end,
    scales=None,
    *,
    storage: reg.Storage,
    turned: bool = False,
) -> Array:
    """out * rescale + each warp's weights times its tokens' values, in units of 1 / storage.unit.

    Args:
        p: [64, storage.tokens], in ``storage.operand``; zero for tokens that are not to be seen.
        value: Shared memory, like keys in `logits`.
        out: float32 [64, H], columns in ``storage.value_order``.
        rescale: float32 [64] in ``Layout.WGMMA.reduce(1)``; turned, [64, 8].
        begin: Tokens of the tile before this one count as zeros, whatever the page holds.
        end: So do those from this one on.
        scales: As in `logits`.
        storage: Of the pages.
        turned: Whether p, out and the result are.
    """
    n, dim = storage.tokens, storage.dim
    columns = dim // 2 if turned else dim

    def product(ctx, p, value, out, rescale, begin, end, *scales):
        del ctx
        i32 = ir.IntegerType.get_signless(32)
        tile = _Tile(value, storage)
        words = [utils.bitcast(r, i32) for r in p.registers.flat]
        words = [_transposed(word) for word in words] if turned else words
        factors = rescale.registers.flat
        sums = [[] for _ in range(dim // (16 if turned else 8))]
        for i, r in enumerate(out.registers.flat):
            for j in range(2):
                factor = vector.extract(factors[i % 2], [], [j if turned else 0])
                sums[i // 2].append(arith.mulf(vector.extract(r, [], [j]), factor))
        masks = _masks(begin, end, storage)
        rows = [
            _ValueScales(scales[0], block, mask, storage)
            for block, mask in enumerate(masks if scales else ())
        ]
        per_word = 16 // storage.bits
        for first in range(0, storage.row_bytes // 16, tile.chunks):
            loaded = tile.load(first, transposed=True)
            right = {}  # by groups of eight channels: words of each block of tokens
            for c in range(tile.chunks):
                blocks = []
                for block, word in enumerate(loaded[c :: tile.chunks]):
                    # A word holds channels of one token, then of the next: pair tokens instead.
                    if rows:  # no code is a NaN: it is enough that the scale is zero
                        scale = rows[block].of_chunk(first + c)
                        blocks.append(_decode(_permute(word), storage, scale))
                        continue
                    word = arith.andi(word, masks[block])
                    blocks.append(_decode(_permute(word) if storage.bits == 8 else word, storage))
                for j in range(per_word):
                    right[per_word * (first + c) + j] = [found[j] for found in blocks]
            for at in sorted(right)[:: 1 + turned]:
                for step in range(n // 16):
                    pair = slice(2 * step, 2 * step + 2)
                    if turned:
                        left = [
                            x
                            for both in zip(right[at][pair], right[at + 1][pair], strict=True)
                            for x in both
                        ]
                        sums[at // 2] = mma(storage.operand, left, words[pair], sums[at // 2])
                    else:
                        left = words[4 * step : 4 * step + 4]
                        sums[at] = mma(storage.operand, left, right[at][pair], sums[at])
        return reg.array(pairs(sums), columns)

    def reference(p, value, out, rescale, begin, end, *scales):
        token = jnp.arange(storage.tile)
        seen = (token >= begin) & (token < end)
        v = jnp.where(seen[:, None], _values(value, storage, *scales), 0)[:, storage.value_order()]
        p = p.astype(jnp.float32)
        p = (reg.turn_back(p) if turned else p).reshape(reg.WARPS, reg.ROWS, n)
        part = jnp.einsum("wrn,wnd->wrd", p, v.reshape(reg.WARPS, n, dim), precision="highest")
        if turned:
            return out * jnp.tile(rescale, (1, dim // 16)) + reg.turn(part.reshape(64, dim))
        return out * rescale[:, None] + part.reshape(64, dim)

    product.interpret_impl = reference  # pyright: ignore[reportFunctionMemberAccess]
    arrays = (p, value, out, rescale, begin, end, *([] if scales is None else [scales]))
    registers, scalar = plgpu.Layout.WGMMA, reg.SCALAR
    factors = registers if turned else registers.reduce(1)
    kinds = (registers, reg.tiled(storage), registers, factors, scalar, scalar)
    kinds += (None,) * len(arrays[6:])
    return reg.inline(product, kinds, (64, columns), jnp.float32)(*arrays)


def _values(stored: Array, storage: reg.Storage, *scales: Array) -> Array:
    """The numbers that the tensor instructions see: float32 [tile, H]."""
    if not scales:
        return stored.astype(jnp.float32)
    codes = jnp.stack([stored & 15, stored >> 4], axis=-1).reshape(storage.tile, storage.dim)
    magnitude = jnp.asarray([0, 0.5, 1, 1.5, 2, 3, 4, 6])[codes & 7] / storage.unit
    scale = scales[0].astype(jnp.float32).reshape(storage.tile, -1)
    return jnp.where(codes > 7, -magnitude, magnitude) * jnp.repeat(scale, reg.SCALE_BLOCK, axis=1)


def _masks(begin, end, storage: reg.Storage) -> list[ir.Value]:
    """Of each block of tokens: a word's halves are those of two tokens, all ones where they are seen."""
    token = arith.addi(
        arith.muli(reg.warp(), reg.i32(storage.tokens)),
        arith.muli(arith.remui(reg.lane(), reg.i32(4)), reg.i32(2)),
    )
    masks = []
    for block in range(storage.tokens // 8):
        parts = []
        for j, mask in enumerate((0x0000FFFF, -0x10000)):
            at = arith.addi(token, reg.i32(8 * block + j))
            seen = arith.andi(
                arith.cmpi(arith.CmpIPredicate.sge, at, reg.value_of(begin)),
                arith.cmpi(arith.CmpIPredicate.slt, at, reg.value_of(end)),
            )
            parts.append(arith.select(seen, reg.i32(mask), reg.i32(0)))
        masks.append(arith.ori(*parts))
    return masks


class _ScaleRows:
    """FP4's scales of neighbouring tokens: four scales to a word."""

    def __init__(self, ref, row: ir.Value, count: int, storage: reg.Storage):
        self.size, self.count = storage.dim // reg.SCALE_BLOCK // 4, count
        i32 = ir.IntegerType.get_signless(32)
        offset = arith.muli(row, reg.i32(4 * self.size))
        self.base = arith.addi(llvm.ptrtoint(i32, utils.memref_ptr(ref)), offset)
        # All at once where registers suffice.
        self.loaded = reg.shared_words(self.base, 0, self.size * count) if self.size <= 2 else None

    def words(self, index: int) -> list[ir.Value]:
        """This word of each token."""
        places = [self.size * i + index for i in range(self.count)]
        if self.loaded is not None:
            return [self.loaded[at] for at in places]
        return [reg.shared_words(self.base, 4 * at, 1)[0] for at in places]


class _KeyScales:
    """FP4's scales of the token whose keys a thread decodes, of one block of tokens."""

    def __init__(self, ref, block: int, storage: reg.Storage):
        row = arith.addi(
            arith.muli(reg.warp(), reg.i32(storage.tokens)),
            arith.addi(arith.divui(reg.lane(), reg.i32(4)), reg.i32(8 * block)),
        )
        self.rows = _ScaleRows(ref, row, 1, storage)
        # A chunk has two blocks of 16 channels, each decoded by two threads of four.
        half = arith.remui(arith.divui(reg.lane(), reg.i32(2)), reg.i32(2))
        self.selectors = [
            arith.muli(arith.addi(half, reg.i32(2 * odd)), reg.i32(0x11)) for odd in range(2)
        ]

    def of_chunk(self, chunk: int) -> ir.Value:
        """The scale, twice, in float16."""
        (word,) = self.rows.words(chunk // 2)
        return reg.widen_pair(_select(word, word, self.selectors[chunk % 2]))


class _ValueScales:
    """FP4's scales of the two tokens whose values a thread decodes, of one block of tokens; zero if not seen."""

    def __init__(self, ref, block: int, mask: ir.Value, storage: reg.Storage):
        row = arith.addi(
            arith.muli(reg.warp(), reg.i32(storage.tokens)),
            arith.addi(
                arith.muli(arith.remui(reg.lane(), reg.i32(4)), reg.i32(2)), reg.i32(8 * block)
            ),
        )
        self.rows, self.mask = _ScaleRows(ref, row, 2, storage), mask
        half = arith.divui(reg.lane(), reg.i32(16))
        self.selectors = [
            arith.addi(arith.muli(half, reg.i32(0x11)), reg.i32(0x40 + 0x22 * odd))
            for odd in range(2)
        ]

    def of_chunk(self, chunk: int) -> ir.Value:
        """The two scales in float16."""
        first, second = self.rows.words(chunk // 2)
        selected = _select(first, second, self.selectors[chunk % 2])
        return arith.andi(reg.widen_pair(selected), self.mask)


class _Tile:
    """Addresses of a tile's 8x8 matrices of 16-bit units (16 bytes of 8 tokens), as ldmatrix takes them."""

    def __init__(self, ref, storage: reg.Storage):
        self.swizzle, self.chunks = storage.swizzle, 32 // storage.tokens
        lane = reg.lane()
        row, bit = lane, None
        if self.chunks == 2:  # two blocks of tokens, of each two chunks
            row = arith.addi(
                arith.muli(arith.divui(lane, reg.i32(16)), reg.i32(8)),
                arith.remui(lane, reg.i32(8)),
            )
            bit = arith.remui(arith.divui(lane, reg.i32(8)), reg.i32(2))
        row = arith.addi(arith.muli(reg.warp(), reg.i32(storage.tokens)), row)
        inner = arith.remui(row, reg.i32(8))
        outer = arith.divui(row, reg.i32(8))
        offset = arith.addi(
            arith.muli(outer, reg.i32(8 * storage.row_bytes)),
            arith.muli(inner, reg.i32(self.swizzle if self.swizzle > 16 else storage.row_bytes)),
        )
        if self.swizzle > 16:
            turn = arith.muli(arith.divui(inner, reg.i32(128 // self.swizzle)), reg.i32(16))
            if bit is not None:
                turn = arith.xori(turn, arith.muli(bit, reg.i32(16)))
            offset = arith.addi(offset, turn)
        i32 = ir.IntegerType.get_signless(32)
        self.base = arith.addi(llvm.ptrtoint(i32, utils.memref_ptr(ref)), offset)

    def load(self, chunk: int, *, transposed: bool) -> list[ir.Value]:
        """Four matrices: a chunk of 16 bytes of four token blocks, or two chunks of two."""
        if self.swizzle > 16:
            per_column = self.swizzle // 16
            column, inner = divmod(chunk, per_column)
            at = arith.xori(self.base, reg.i32(16 * inner)) if inner else self.base
            at = arith.addi(at, reg.i32(column * 8 * self.swizzle)) if column else at
        else:
            at = arith.addi(self.base, reg.i32(16 * chunk))
        i32 = ir.IntegerType.get_signless(32)
        kind = ".trans" if transposed else ""
        found = utils.inline_ptx(
            f"ldmatrix.sync.aligned.m8n8.x4{kind}.shared.b16 {{$0, $1, $2, $3}}, [$4];",
            at,
            result_types=[i32] * 4,
            has_side_effects=True,
            convergent=True,
        )
        return list(found)


def _decode(word: ir.Value, storage: reg.Storage, scale: ir.Value | None = None) -> list[ir.Value]:
    """Pairs of 16-bit operands: of 16-bit numbers, of bytes 0-1 and 2-3, or of nibbles 0-2, 1-3, 4-6 and 5-7."""
    if storage.bits == 16:
        return [word]
    if storage.bits == 8:
        return reg.widen_bytes(word, storage.dtype)
    i32 = ir.IntegerType.get_signless(32)
    assert scale is not None

    def e4m3(top: ir.Value, rest: ir.Value) -> ir.Value:
        # Sign to sign, exponent and mantissa to the lowest of e4m3's exponent and its highest of mantissa.
        sign = arith.andi(top, reg.i32(-0x7F7F7F80))
        return arith.ori(sign, arith.andi(rest, reg.i32(0x1C1C1C1C)))

    even = e4m3(arith.shli(word, reg.i32(4)), arith.shli(word, reg.i32(2)))
    odd = e4m3(word, arith.shrui(word, reg.i32(2)))
    # Neighbours in this order: low halves, then high ones.
    halves = zip(*(reg.widen_bytes(w, "float8_e4m3fn") for w in (even, odd)), strict=True)
    # Exact: a product is a multiple of 2^-16 and has at most six significant bits.
    return [
        utils.inline_ptx("mul.rn.f16x2 $0, $1, $2;", bits, scale, result_types=i32)
        for half in halves
        for bits in half
    ]


def _transposed(word: ir.Value) -> ir.Value:
    """Of a warp's 8x8 matrix of 16-bit numbers, a row's two neighbours to a thread."""
    return utils.inline_ptx(
        "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;",
        word,
        result_types=ir.IntegerType.get_signless(32),
        convergent=True,
    )


def _select(first: ir.Value, second: ir.Value, selector: ir.Value) -> ir.Value:
    """Bytes of two words by the nibbles of a selector."""
    i32 = ir.IntegerType.get_signless(32)
    return utils.inline_ptx("prmt.b32 $0, $1, $2, $3;", first, second, selector, result_types=i32)


def _permute(word: ir.Value) -> ir.Value:
    """Bytes 0, 2, 1, 3."""
    i32 = ir.IntegerType.get_signless(32)
    return utils.inline_ptx("prmt.b32 $0, $1, $1, 0x3120;", word, result_types=i32)
