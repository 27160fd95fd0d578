"""Rotary embedding, quantization and the scatter into a paged cache in one pass, for Hopper.

A CTA is a warpgroup with one token: all loads are issued first, then every piece is finished in registers and
stored where it belongs. Queries, keys and values of a token are read once and written once; pools are written in
place, and no page is read but for its scale::

    load q, k, v [heads, piece]; cos, sin [piece]  -> registers
    q, k: (a, b) = (a cos - b sin, b cos + a sin)  in float32, rounded to their dtype
    q -> memory
    k, v: plain:        -> pool[page, :, slot]
          static scale: k / scale[page, head]                    -> codes
          token_head:   amax over the head -> scale, k / scale   -> codes, scale
          token_block:  likewise over 128 channels of one head: blocks are taken for heads
          NVFP4:        amax over 16 channels -> e4m3 scale      -> codes, scales

A piece is the widest power of two of channels that divides both the rotated halves and a head, so that a
head's pieces have one register layout; heads are taken in powers of two. Where a token has more than fits
registers, several CTAs share it.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from qjax.pallas_kernels import _kv_cache_encode_sm90 as encode
from qjax.pallas_kernels import _quantize_sm90 as tools

IN_DTYPES = ("bfloat16", "float16")
CODE_DTYPES = ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "uint8")
BLOCK = 16  # channels of an NVFP4 scale
TOKEN_BLOCK = 128  # channels of a float32 scale where a token's head has several
UNIT = 1024  # elements of one register array: 8 to a thread
MOST = 8192  # elements of a CTA's token


class Pool(NamedTuple):
    """Pages of keys or of values; what they hold follows from dtypes and shapes.

    Attributes:
        codes: [P, K, page_size, H] in bfloat16, float16, float8_e4m3fn or float8_e5m2; or NVFP4's packed uint8
            [P, K, page_size, H/2].
        scale: None for 16-bit pages; float32 [P, K, 1, 1], a given scale of a page's head; float32
            [P, K, page_size, 1], written; float32 [P, 1, page_size, H/128] of FP8 latents, written; or
            float8_e4m3fn [P, K, page_size, H/16] of NVFP4, written.
        global_scale: NVFP4's, float32 [P, K, 1, 1].
    """

    codes: Array
    scale: Array | None = None
    global_scale: Array | None = None

    @property
    def head_dim(self) -> int:
        """H."""
        return self.codes.shape[-1] * (2 if self.codes.dtype == jnp.uint8 else 1)

    @property
    def scaling(self) -> str:
        """ "none", "static", "token_head", "token_block" or "nvfp4"."""
        if self.scale is None:
            return "none"
        if self.global_scale is not None:
            return "nvfp4"
        if self.scale.shape[3] > 1:
            return "token_block"
        return "static" if self.scale.shape[2] == 1 else "token_head"


def unsupported_reason(
    key_pool: Pool,
    value_pool: Pool | None,
    *,
    x_dtype: DTypeLike = "bfloat16",
    rotary_dim: int = 0,
) -> str | None:
    """Why the kernel can't write to these pools (arrays or their shapes), None if it can.

    Args:
        key_pool: The keys' pages.
        value_pool: The values' pages, None where keys are all that is cached.
        x_dtype: Dtype of queries, keys and values.
        rotary_dim: Channels of queries and keys to rotate, the first of a head; 0 for none.
    """
    if jnp.dtype(x_dtype).name not in IN_DTYPES:
        return f"keys must be one of {IN_DTYPES}; found {jnp.dtype(x_dtype).name}"
    if rotary_dim % 32 or rotary_dim > key_pool.head_dim:
        return (
            f"rotated channels must be a multiple of 32 up to a head's {key_pool.head_dim}; "
            f"found {rotary_dim}"
        )
    kinds = [key_pool.scaling, *([] if value_pool is None else [value_pool.scaling])]
    if len(set(kinds)) > 1 and kinds != ["token_block", "none"]:
        return f"keys and values must have pages of one kind; found {kinds[0]} and {kinds[1]}"
    if "token_block" in kinds:
        heads, wanted = key_pool.codes.shape[1], key_pool.head_dim / TOKEN_BLOCK
        scales = 0 if key_pool.scale is None else key_pool.scale.shape[3]
        if heads != 1 or scales != wanted or rotary_dim or kinds[0] != "token_block":
            return (
                f"scales of blocks must be of {TOKEN_BLOCK} channels of one head of keys, rotated before; found "
                f"{heads} heads of {key_pool.head_dim} channels with {scales} scales, {rotary_dim} "
                "channels to rotate"
            )
    for pool in (key_pool, value_pool):
        if pool is None:
            continue
        if pool.codes.dtype.name not in CODE_DTYPES:
            return f"pages must be one of {CODE_DTYPES}; found {pool.codes.dtype.name}"
        if pool.head_dim % BLOCK:
            return f"head_dim must be a multiple of {BLOCK}; found {pool.head_dim}"
        if math.prod(pool.codes.shape) >= 2**31:
            return f"a pool must have less than 2**31 elements; found {list(pool.codes.shape)}"
        rotated = rotary_dim if pool is key_pool else 0
        piece = _piece(pool.head_dim, rotated)
        if piece > UNIT:
            return f"head_dim must have a factor of 2 to the {UNIT.bit_length() - 1} at most; found {pool.head_dim}"
    return None


def _piece(head_dim: int, rotary_dim: int) -> int:
    both = math.gcd(head_dim, rotary_dim // 2)
    return both & -both


def _powers(n: int, most: int) -> list[tuple[int, int]]:
    """(first, size) of parts of 0..n-1 whose sizes are powers of two up to `most`."""
    parts, done = [], 0
    while done < n:
        size = min(most, 1 << ((n - done).bit_length() - 1))
        parts.append((done, size))
        done += size
    return parts


def kv_cache_write(
    query: Array | None,
    key: Array,
    value: Array | None,
    slots: Array,
    key_pool: Pool,
    value_pool: Pool | None,
    *,
    cos: Array | None = None,
    sin: Array | None = None,
) -> tuple[Array | None, Pool, Pool | None]:
    """Rotates queries and keys, and writes keys and values into their pages.

    The pools' buffers are reused: under ``jit`` without a copy where they are donated or intermediate.

    Args:
        query: [T, N, H], bfloat16 or float16; None if there is nothing to rotate.
        key: [T, K, H] in that dtype.
        value: [T, K, Hv] likewise; None where only keys are cached.
        slots: int32 [T]: page * page_size + place of each token in the pools; negative: not written.
        key_pool: The keys' pages.
        value_pool: The values' pages.
        cos: float32 [T, R/2]: each token's, for channel pairs (i, i + R/2); the channels from R on stay.
        sin: Likewise.

    Returns:
        The rotated queries (None without), and the pools.

    Raises:
        ValueError: If `unsupported_reason` has a reason, or shapes don't agree.
    """
    rotary_dim = 0 if cos is None else 2 * cos.shape[-1]
    if rotary_dim == 0:
        query = None
    inputs = {"query": query, "key": key, "value": value}
    inputs = {name: x for name, x in inputs.items() if x is not None}
    pools = {"key": key_pool} | ({} if value_pool is None else {"value": value_pool})
    _check(inputs, slots, pools, cos, sin)
    reason = unsupported_reason(
        key_pool,
        value_pool,
        x_dtype=key.dtype,
        rotary_dim=rotary_dim,
    )
    if reason:
        raise ValueError(f"kv_cache_write: {reason}")
    tensors = {}
    for name, x in inputs.items():
        rotated = 0 if name == "value" else rotary_dim
        scaling = pools["key" if name == "query" else name].scaling
        if scaling == "token_block":
            inputs[name] = x = x.reshape(x.shape[0], -1, TOKEN_BLOCK)
        tensors[name] = _Tensor(x.shape[1], x.shape[2], rotated, scaling == "nvfp4")
    operands = {name: t.by_blocks(inputs[name]) for name, t in tensors.items()}
    operands |= {"slots": slots}
    if cos is not None and sin is not None and rotary_dim:
        operands |= {"cos": tensors["key"].by_blocks(cos), "sin": tensors["key"].by_blocks(sin)}
    refs = {}
    for name, pool in pools.items():
        codes, scale = tensors[name].by_blocks(pool.codes), pool.scale
        if pool.scaling == "token_block":
            codes = codes.reshape(codes.shape[0], codes.shape[2], -1, TOKEN_BLOCK)
            scale = scale.reshape(codes.shape[:3])
        parts = {"codes": codes, "scale": scale, "global_scale": pool.global_scale}
        written = {"none": ("codes",), "static": ("codes",)}.get(pool.scaling, ("codes", "scale"))
        for part, array in parts.items():
            if array is None:
                continue
            full = f"{name}_{part}"
            if part in written:
                refs[full] = jax.new_ref(array)
            else:
                operands[full] = array
    plans = _plans(tensors)
    names = (*operands, *refs, *(["rotated_query"] if query is not None else []))
    rotated = [] if query is None else [jax.ShapeDtypeStruct(operands["query"].shape, query.dtype)]
    out = plgpu.kernel(
        functools.partial(
            _kernel,
            names=names,
            tensors=tensors,
            scalings={name: pool.scaling for name, pool in pools.items()},
            dtypes={name: pool.codes.dtype for name, pool in pools.items()},
            page_size=key_pool.codes.shape[2],
            plans=plans,
        ),
        out_type=tuple(rotated),
        # Tokens last: only CUDA's x axis may be longer than 65535.
        grid=(len(plans), slots.shape[0]),
        grid_names=("part", "token"),
        num_threads=1,
        thread_name="wg",
        kernel_name="kv_cache_write",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )(*operands.values(), *refs.values())

    def result(name: str) -> Pool:
        pool, new = pools[name], {}
        for part in ("codes", "scale"):
            old = getattr(pool, part)
            if f"{name}_{part}" in refs:
                new[part] = jax.freeze(refs[f"{name}_{part}"]).reshape(old.shape)
        return pool._replace(**new)

    return (
        None if query is None else out[0].reshape(query.shape),
        result("key"),
        None if value_pool is None else result("value"),
    )


def _check(inputs, slots, pools, cos, sin) -> None:
    key = inputs["key"]
    for name, x in inputs.items():
        if x.ndim != 3 or x.dtype != key.dtype or x.shape[0] != key.shape[0]:
            raise ValueError(
                f"kv_cache_write: {name} must be {key.dtype}[{key.shape[0]}, heads, channels]; found "
                f"{x.dtype}{list(x.shape)}"
            )
    if slots.shape != key.shape[:1] or slots.dtype != jnp.int32:
        raise ValueError(
            f"kv_cache_write: slots must be int32[{key.shape[0]}]; found {slots.dtype}{list(slots.shape)}"
        )
    for name, pool in pools.items():
        x = inputs.get(name)
        wanted = (*pools["key"].codes.shape[:3], None if x is None else x.shape[2])
        found = (*pool.codes.shape[:3], pool.head_dim)
        if x is None or found != wanted or x.shape[1] != found[1]:
            raise ValueError(
                f"kv_cache_write: {name}s {None if x is None else list(x.shape)} don't fit pages {list(found)}"
            )
    if (cos is None) != (sin is None) or (
        cos is not None
        and not (cos.shape == sin.shape and cos.shape[:-1] == slots.shape and cos.ndim == 2)
    ):
        raise ValueError(
            "kv_cache_write: cos and sin must both be float32 [T, R/2] or None; found "
            f"{None if cos is None else cos.shape}, {None if sin is None else sin.shape}"
        )


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """Queries, keys or values of a token: how they are cut into register arrays.

    Attributes:
        heads: Heads.
        head_dim: Channels.
        rotary_dim: The first of them that are rotated.
        blocks: Whether arrays have an axis of NVFP4's blocks.
    """

    heads: int
    head_dim: int
    rotary_dim: int
    blocks: bool

    @property
    def piece(self) -> int:
        return _piece(self.head_dim, self.rotary_dim)

    def by_blocks(self, array: Array) -> Array:
        """[..., H] as [..., H/16, 16], packed ones as [..., H/16, 8]."""
        if not self.blocks:
            return array
        *lead, width = array.shape
        block = BLOCK // 2 if array.dtype == jnp.uint8 else BLOCK
        return array.reshape(*lead, width // block, block)

    def channels(self, piece: int):
        """Where a piece lies on the axis of channels, or of blocks."""
        size = self.piece // BLOCK if self.blocks else self.piece
        return pl.ds(piece * size, size)

    def layout(self, heads: int, *, packed: bool = False):
        """The registers of a piece of some heads."""
        size = heads * self.piece
        # Conversions to FP8 and stores want vectors.
        per_thread = max(size // tools.THREADS, 4)
        if not self.blocks:
            return tools.row_major_layout((heads, self.piece), per_thread=per_thread)
        shape = (heads, self.piece // BLOCK, BLOCK // 2 if packed else BLOCK)
        return tools.row_major_layout(shape, per_thread=per_thread // (2 if packed else 1))


def _plans(tensors) -> list[list[tuple[str, int, int]]]:
    """What each of a token's CTAs takes: (tensor, first head, heads)."""
    plans, left = [], 0
    for name, tensor in tensors.items():
        for first, heads in _powers(tensor.heads, UNIT // tensor.piece):
            size = heads * tensor.head_dim
            if size > left:
                plans.append([])
                left = MOST
            plans[-1].append((name, first, heads))
            left -= size
    return plans


def _kernel(*refs, names, tensors, scalings, dtypes, page_size, plans):
    gmem = dict(zip(names, refs, strict=True))
    token = lax.axis_index("token")

    def run(plan):
        loaded = []
        for name, first, heads in plan:
            tensor = tensors[name]
            at = (token, pl.ds(first, heads))
            loaded.append(
                [
                    _load(gmem[name].at[(*at, tensor.channels(i))], tensor.layout(heads))
                    for i in range(tensor.head_dim // tensor.piece)
                ]
            )
        slot = gmem["slots"][token]
        angles = {}
        for (name, first, heads), pieces in zip(plan, loaded, strict=True):
            tensor = tensors[name]
            pieces = _rotate(gmem, token, tensor, heads, pieces, angles)
            if name == "query":
                for i, piece in enumerate(pieces):
                    gmem["rotated_query"][token, pl.ds(first, heads), tensor.channels(i)] = piece
                continue

            @pl.when(slot >= 0)
            def _(name=name, first=first, heads=heads, pieces=pieces, tensor=tensor):
                page, place = lax.div(slot, page_size), lax.rem(slot, page_size)
                where = _Where(page, pl.ds(first, heads), place)
                pool = {
                    part: gmem[f"{name}_{part}"]
                    for part in ("codes", "scale", "global_scale")
                    if f"{name}_{part}" in gmem
                }
                _store(pool, where, tensor, heads, pieces, scalings[name], dtypes[name])

    part = lax.axis_index("part")
    for i, plan in enumerate(plans):
        if len(plans) == 1:
            run(plan)
        else:
            pl.when(part == i)(functools.partial(run, plan))


class _Where(NamedTuple):
    page: Array
    heads: pl.Slice
    place: Array


def _load(ref, layout) -> Array:
    # "optimized" transfers are those of shared memory
    return plgpu.load(ref, layout=layout, optimized=False)


def _rotate(gmem, token, tensor, heads, pieces, angles) -> list[Array]:
    """The pieces with pairs (i, i + rotary_dim / 2) of channels rotated, in their dtype."""
    half = tensor.rotary_dim // 2 // tensor.piece
    layout = tensor.layout(heads)
    out = list(pieces)
    across = tuple(range(1, pieces[0].ndim))
    for i in range(half):
        at = (token, tensor.channels(i))
        if (i, layout) not in angles:
            angles[i, layout] = tuple(
                lax.broadcast_in_dim(
                    _load(gmem[name].at[at], layout.reduce(0)), pieces[0].shape, across
                )
                for name in ("cos", "sin")
            )
        cos, sin = angles[i, layout]
        a, b = (pieces[j].astype(jnp.float32) for j in (i, i + half))
        rotated = (
            encode.multiply_add(a, cos, -(b * sin), layout),
            encode.multiply_add(b, cos, a * sin, layout),
        )
        for j, x in zip((i, i + half), rotated, strict=True):
            out[j] = x.astype(pieces[0].dtype)
    return out


def _store(pool, where, tensor, heads, pieces, scaling, dtype) -> None:
    """Quantizes a token's pieces of some heads and stores them in its page."""
    layout = tensor.layout(heads)
    codes, page, at_heads, place = pool["codes"], *where
    at = (page, place, at_heads) if scaling == "token_block" else (page, at_heads, place)
    if scaling == "none":
        for i, x in enumerate(pieces):
            codes[*at, tensor.channels(i)] = x.astype(jnp.float32).astype(dtype)
        return
    pieces = [x.astype(jnp.float32) for x in pieces]
    if scaling == "nvfp4":
        _store_nvfp4(pool, where, tensor, heads, pieces)
        return
    if scaling == "static":
        scale = _load(pool["scale"].at[page, at_heads, 0, 0], layout.reduce(1))
    else:
        amaxes = [jnp.max(tools.finite_magnitude(x), axis=1) for x in pieces]
        scale = tools.scale_of(functools.reduce(jnp.maximum, amaxes), tools.largest(dtype))
        pool["scale"].at[at if scaling == "token_block" else (*at, 0)][...] = scale
    scale = lax.broadcast_in_dim(scale, pieces[0].shape, (0,))
    for i, x in enumerate(pieces):
        codes[*at, tensor.channels(i)] = tools.quantize(x, scale, dtype, layout)


def _store_nvfp4(pool, where, tensor, heads, pieces) -> None:
    layout, packed = tensor.layout(heads), tensor.layout(heads, packed=True)
    page, at_heads, place = where
    global_scale = _load(pool["global_scale"].at[page, at_heads, 0, 0], layout.reduce((1, 2)))
    for i, x in enumerate(pieces):
        amax = jnp.max(tools.finite_magnitude(x), axis=2)
        by_block = lax.broadcast_in_dim(global_scale, amax.shape, (0,))
        codes, scale = encode.e4m3_block_scale(amax, by_block, layout.reduce(2))
        channels = tensor.channels(i)
        scales = lax.bitcast_convert_type(codes, jnp.float8_e4m3fn)
        pool["scale"].at[page, at_heads, place, channels][...] = scales
        scale = lax.broadcast_in_dim(scale * by_block, x.shape, (0, 1))
        quotient = tools.quantize(x, scale, jnp.float32, layout)
        pool["codes"][page, at_heads, place, channels] = encode.encode_e2m1(
            quotient, layout, packed
        )
