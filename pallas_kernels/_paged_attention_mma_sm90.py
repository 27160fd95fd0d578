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

_PTX_TYPES = {"bfloat16": "bf16", "float16": "f16"}
_CVT_TYPES = {"float8_e4m3fn": "e4m3x2", "float8_e5m2": "e5m2x2"}


def logits(query: Array, key, *, storage: reg.Storage) -> Array:
    """Each warp's queries times its tokens' keys.

    Args:
        query: [64, H] from `queries`, in ``storage.operand``.
        key: Shared memory [storage.tile, H] with ``storage.transforms``.
        storage: Of the pages.

    Returns:
        float32 [64, storage.tokens].
    """
    n, dim = storage.tokens, storage.dim

    def product(ctx, query, key):
        del ctx
        address = _Tile(key, storage)
        words = [utils.bitcast(r, ir.IntegerType.get_signless(32)) for r in query.registers.flat]
        sums = [[utils.c(0.0, ir.F32Type.get())] * 4 for _ in range(n // 8)]
        steps = []  # of 16 channels: the right operand for each block of tokens
        for chunk in range(0, storage.row_bytes // 16, 32 // n):
            found = address.load(chunk, transposed=False)
            if storage.bits == 16:
                steps.append([found[0:2], found[2:4]])
            elif n == 16:
                steps += [[_widen(found[i + j], storage) for i in (0, 2)] for j in range(2)]
            else:
                steps.append([_widen(r, storage) for r in found])
        for step, right in enumerate(steps):
            left = words[4 * step : 4 * step + 4]
            for block in range(n // 8):
                sums[block] = _mma(storage.operand, left, right[block], sums[block])
        return reg.array(_pairs(sums), n)

    def reference(query, key):
        q = query.astype(jnp.float32).reshape(reg.WARPS, reg.ROWS, dim)
        k = key[:, storage.key_order()].astype(jnp.float32).reshape(reg.WARPS, n, dim)
        return jnp.einsum("wrd,wnd->wrn", q, k, precision="highest").reshape(64, n)

    product.interpret_impl = reference  # pyright: ignore[reportFunctionMemberAccess]
    kinds = (plgpu.Layout.WGMMA, reg.tiled(storage))
    return reg.inline(product, kinds, (64, n), jnp.float32)(query, key)


def add_values(p: Array, value, out: Array, begin, end, *, storage: reg.Storage) -> Array:
    """out + each warp's weights times its tokens' values.

    Args:
        p: [64, storage.tokens], in ``storage.operand``; zero for tokens that are not to be seen.
        value: Shared memory [storage.tile, H] with ``storage.transforms``.
        out: float32 [64, H], columns in ``storage.value_order``.
        begin: Tokens of the tile before this one count as zeros, whatever the page holds.
        end: So do those from this one on.
        storage: Of the pages.
    """
    n, dim = storage.tokens, storage.dim

    def product(ctx, p, value, out, begin, end):
        del ctx
        i32 = ir.IntegerType.get_signless(32)
        address = _Tile(value, storage)
        words = [utils.bitcast(r, i32) for r in p.registers.flat]
        sums = [[] for _ in range(dim // 8)]
        for i, r in enumerate(out.registers.flat):
            sums[i // 2] += [vector.extract(r, [], [j]) for j in range(2)]
        token = arith.addi(
            arith.muli(reg.warp(), reg.i32(n)),
            arith.muli(arith.remui(reg.lane(), reg.i32(4)), reg.i32(2)),
        )
        masks = []
        for block in range(n // 8):
            parts = []
            for j, mask in enumerate((0x0000FFFF, -0x10000)):
                at = arith.addi(token, reg.i32(8 * block + j))
                seen = arith.andi(
                    arith.cmpi(arith.CmpIPredicate.sge, at, reg.value_of(begin)),
                    arith.cmpi(arith.CmpIPredicate.slt, at, reg.value_of(end)),
                )
                parts.append(arith.select(seen, reg.i32(mask), reg.i32(0)))
            masks.append(arith.ori(*parts))
        if storage.bits == 16:
            for chunk in range(0, dim // 8, 2):
                found = address.load(chunk, transposed=True)
                # Matrices: tokens 0-7 and 8-15 (outer), two blocks of 8 channels (inner).
                found = [arith.andi(r, masks[i // 2]) for i, r in enumerate(found)]
                for j in range(2):
                    right = [found[j], found[2 + j]]
                    sums[chunk + j] = _mma(storage.operand, words[:4], right, sums[chunk + j])
        else:
            chunks = 32 // n
            for first in range(0, dim // 16, chunks):
                found = address.load(first, transposed=True)
                # A word holds two channels of one token, then of the next: pair tokens instead.
                found = [
                    _widen(_permute(arith.andi(r, masks[i // chunks])), storage)
                    for i, r in enumerate(found)
                ]
                for c in range(chunks):
                    blocks = found[c::chunks]
                    for j in range(2):
                        tile = 2 * (first + c) + j
                        for step in range(n // 16):
                            right = [blocks[2 * step][j], blocks[2 * step + 1][j]]
                            left = words[4 * step : 4 * step + 4]
                            sums[tile] = _mma(storage.operand, left, right, sums[tile])
        return reg.array(_pairs(sums), dim)

    def reference(p, value, out, begin, end):
        token = jnp.arange(storage.tile)
        seen = (token >= begin) & (token < end)
        v = jnp.where(seen[:, None], value.astype(jnp.float32), 0)[:, storage.value_order()]
        p = p.astype(jnp.float32).reshape(reg.WARPS, reg.ROWS, n)
        part = jnp.einsum("wrn,wnd->wrd", p, v.reshape(reg.WARPS, n, dim), precision="highest")
        return out + part.reshape(64, dim)

    product.interpret_impl = reference  # pyright: ignore[reportFunctionMemberAccess]
    registers, scalar = plgpu.Layout.WGMMA, reg.SCALAR
    kinds = (registers, reg.tiled(storage), registers, scalar, scalar)
    return reg.inline(product, kinds, (64, dim), jnp.float32)(p, value, out, begin, end)


class _Tile:
    """Addresses of a tile's 8x8 matrices of 16-bit units (16 bytes of 8 tokens), as ldmatrix takes them."""

    def __init__(self, ref, storage: reg.Storage):
        self.swizzle, self.paired = storage.swizzle, storage.tokens == 16
        lane = reg.lane()
        row, bit = lane, None
        if self.paired:  # two blocks of tokens, of each two chunks
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


def _mma(dtype: str, left, right, sums) -> list[ir.Value]:
    kind = _PTX_TYPES[dtype]
    found = utils.inline_ptx(
        f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
        *left,
        *right,
        *sums,
        result_types=[ir.F32Type.get()] * 4,
        convergent=True,
    )
    return list(found)


def _widen(word: ir.Value, storage: reg.Storage) -> list[ir.Value]:
    """Four 8-bit numbers as two pairs of float16."""
    kind = _CVT_TYPES[storage.dtype]
    i32 = ir.IntegerType.get_signless(32)
    found = utils.inline_ptx(
        "{ .reg .b16 low, high; mov.b32 {low, high}, $2; "
        f"cvt.rn.f16x2.{kind} $0, low; cvt.rn.f16x2.{kind} $1, high; }}",
        word,
        result_types=[i32] * 2,
    )
    return list(found)


def _permute(word: ir.Value) -> ir.Value:
    """Bytes 0, 2, 1, 3."""
    i32 = ir.IntegerType.get_signless(32)
    return utils.inline_ptx("prmt.b32 $0, $1, $1, 0x3120;", word, result_types=i32)


def _pairs(sums) -> list[ir.Value]:
    vec = ir.VectorType.get((2,), ir.F32Type.get())
    return [vector.from_elements(vec, part[i : i + 2]) for part in sums for i in (0, 2)]
