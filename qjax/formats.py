"""Quantization formats as data: element types, scale layouts, packing.

A `QFormat` says everything about how a weight is stored; no other module branches on a format's name.
The integer and floating grids follow compressed-tensors, the OCP Microscaling specification v1.0 (MXFP4,
MXFP8), NVIDIA's NVFP4 and the DeepSeek-V3 report (128x128 blocks).
"""

import dataclasses
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, get_args

import jax.numpy as jnp

from qjax import wgmma_layout

WHOLE = -1
"""Block size that means "the whole axis" in `QFormat.block_shape`."""

Offset = Literal["zero_point", "minimum"]
Storage = Literal["plain", "packed", "wgmma", "wgmma8", "wgmma8_pairs"]
ScaleRule = Literal["amax", "mx"]


@dataclasses.dataclass(frozen=True)
class Element:
    """One element type of a quantized array.

    Attributes:
        name: The field's standard name; the JAX dtype's name where JAX has one.
        bits: Width of a stored code.
        min: Smallest finite value of the grid.
        max: Largest finite value of the grid.
        mantissa_bits: Explicit mantissa bits of a floating element, None for integers.
        min_exponent: Exponent of the smallest normal value of a floating element.
    """

    name: str
    bits: int
    min: float
    max: float
    mantissa_bits: int | None = None
    min_exponent: int | None = None

    @property
    def is_float(self) -> bool:
        """Whether the grid is a floating one."""
        return self.mantissa_bits is not None


def _integer(bits: int) -> Element:
    return Element(f"int{bits}", bits, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


ELEMENTS: Mapping[str, Element] = MappingProxyType(
    {e.name: e for e in map(_integer, range(2, 9))}
    | {
        "float8_e4m3fn": Element("float8_e4m3fn", 8, -448.0, 448.0, 3, -6),
        "float8_e5m2": Element("float8_e5m2", 8, -57344.0, 57344.0, 2, -14),
        "float4_e2m1fn": Element("float4_e2m1fn", 4, -6.0, 6.0, 1, 0),
    }
)

SCALE_DTYPES = ("float32", "bfloat16", "float16", "float8_e8m0fnu", "float8_e4m3fn")


_WGMMA_GROUPS = (32, 64, 128, WHOLE)
_WGMMA_SCALES = {
    "wgmma": ("float32", "bfloat16", "float16", "float8_e8m0fnu"),
    "wgmma8": ("float32", "bfloat16", "float16"),
}


@dataclasses.dataclass(frozen=True)
class QFormat:
    """How a quantized array's last two axes (N, K) are stored.

    The dequantized value is ``(q - zero_point) * scale * global_scale``, or with ``offset="minimum"``
    ``u * scale + minimum`` where u = q + 2**(bits-1) is the unsigned code.

    Attributes:
        element: Key of `ELEMENTS`.
        block_shape: (block_n, block_k) rows and columns that share one scale; `WHOLE` is the whole axis.
            The last block of an axis may be short; block sizes are never inferred from shapes.
        scale_dtype: One of `SCALE_DTYPES`.
        offset: None (symmetric), "zero_point" (integer, in q's units) or "minimum" (in w's units).
        global_scale: Whether one more float32 multiplier covers the whole (N, K) matrix (NVFP4).
        scale_rule: "amax" maps a block's amax to the grid's end; "mx" floors its exponent as the
            Microscaling formats do, after rounding amax up from 1.75 * 2**e.
        storage: "plain" (one array item per element), "packed" (uint8: a little-endian bit stream
            along K; integer codes biased by 2**(bits-1), float4 codes raw) or one that is no checkpoint's (int32:
            codes in the order of `wgmma_layout`, scales and offsets of every row likewise; N and K multiples of
            64): "wgmma" (codes of 3 bits take 4, those of 5 to 7 take 8); "wgmma8", for products with 8-bit inputs
            (INT4; or MXFP4, whose scales are relative to the largest, which is the global scale); or
            "wgmma8_pairs" (MXFP4 likewise, and of each 128 rows the even ones before the odd ones: gate and up of
            experts whose rows alternate).

    Raises:
        ValueError: If a field is out of its set or the fields contradict each other.
    """

    element: str
    block_shape: tuple[int, int]
    scale_dtype: str = "float32"
    offset: Offset | None = None
    global_scale: bool = False
    scale_rule: ScaleRule = "amax"
    storage: Storage = "plain"

    def __post_init__(self):
        def refuse(constraint: str, found: object):
            raise ValueError(f"QFormat: {constraint}; found {found!r}")

        if self.element not in ELEMENTS:
            refuse(f"element must be one of {sorted(ELEMENTS)}", self.element)
        if len(self.block_shape) != 2 or any(b != WHOLE and b < 1 for b in self.block_shape):
            refuse(
                "block_shape must be two positive sizes, or -1 for a whole axis", self.block_shape
            )
        if self.scale_dtype not in SCALE_DTYPES:
            refuse(f"scale_dtype must be one of {SCALE_DTYPES}", self.scale_dtype)
        if self.offset not in (None, "zero_point", "minimum"):
            refuse("offset must be None, 'zero_point' or 'minimum'", self.offset)
        if self.offset and self.spec.is_float:
            refuse("only integer elements take an offset", self.element)
        if self.scale_rule not in ("amax", "mx"):
            refuse("scale_rule must be 'amax' or 'mx'", self.scale_rule)
        if self.scale_rule == "mx" and self.scale_dtype != "float8_e8m0fnu":
            refuse("the 'mx' rule makes float8_e8m0fnu scales", self.scale_dtype)
        if self.storage not in get_args(Storage):
            refuse(f"storage must be one of {get_args(Storage)}", self.storage)
        if not self.ordered and self.storage != _unordered(self.spec):
            refuse(
                "8-bit elements are stored 'plain', narrower ones 'packed', both also 'wgmma'",
                (self.element, self.storage),
            )
        mxfp4 = ("float4_e2m1fn", (1, 32), "float8_e8m0fnu", True)
        found = (self.element, self.block_shape, self.scale_dtype, self.global_scale)
        if not self.ordered or (self.eight_bit and found == mxfp4):
            return
        if self.eight_bit and (
            self.storage == "wgmma8_pairs" or self.element != "int4" or self.offset == "minimum"
        ):
            int4 = "" if self.storage == "wgmma8_pairs" else "int4 without minimums, and "
            refuse(f"{self.storage!r} stores {int4}{mxfp4}", (*found, self.offset))
        scales = _WGMMA_SCALES[self.storage]
        if (
            self.block_shape[1] not in _WGMMA_GROUPS
            or self.scale_dtype not in scales
            or self.global_scale
        ):
            refuse(
                f"{self.storage!r} stores groups of {_WGMMA_GROUPS} columns with scales of {scales}, without a "
                "global scale",
                found[1:],
            )

    @property
    def spec(self) -> Element:
        """The element type."""
        return ELEMENTS[self.element]

    @property
    def bits(self) -> int:
        """Bits of one stored element."""
        return self.spec.bits

    @property
    def ordered(self) -> bool:
        """Whether codes are in the order of `wgmma_layout`, which no checkpoint has."""
        return self.storage == "wgmma" or self.eight_bit

    @property
    def eight_bit(self) -> bool:
        """Whether codes are in the order of 8-bit operands: "wgmma8" storage, or "wgmma8_pairs"."""
        return self.storage in ("wgmma8", "wgmma8_pairs")

    @property
    def row_multiple(self) -> int:
        """N must be a multiple of this, so that the storage's blocks of rows are whole."""
        if not self.ordered:
            return 1
        return wgmma_layout.BLOCK * (2 if self.storage == "wgmma8_pairs" else 1)

    @property
    def in_checkpoints(self) -> "QFormat":
        """The same format in the storage of checkpoints, "plain" or "packed"."""
        global_scale = self.global_scale and not self.eight_bit
        return dataclasses.replace(self, storage=_unordered(self.spec), global_scale=global_scale)

    @property
    def stored_bits(self) -> int:
        """Bits that a code takes."""
        return wgmma_layout.width_of(self.bits) if self.ordered else self.bits

    @property
    def storage_dtype(self) -> jnp.dtype:
        """Dtype of `QArray.qvalue`."""
        names = {"plain": self.element, "packed": "uint8"}
        return jnp.dtype(names.get(self.storage, "int32"))

    @property
    def zero_point_dtype(self) -> jnp.dtype:
        """Dtype of `QArray.zero_point`: one code wider than q, since GPTQ's zero may be 2**bits."""
        if self.ordered:
            return jnp.dtype("bfloat16")  # as the kernel subtracts it; integers up to 256 are exact
        return jnp.dtype("int16" if self.bits == 8 else "int8")

    @property
    def stored_scale_dtype(self) -> jnp.dtype:
        """Dtype of `QArray.scale`: `scale_dtype`, but bfloat16 for float8_e8m0fnu in "wgmma" storage."""
        e8m0 = self.storage == "wgmma" and self.scale_dtype == "float8_e8m0fnu"
        return jnp.dtype("bfloat16" if e8m0 else self.scale_dtype)

    def block_size(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Rows and columns of a block in an array of this logical shape ([..., N, K])."""
        (bn, bk), (n, k) = self.block_shape, shape[-2:]
        return (n if bn == WHOLE else bn, k if bk == WHOLE else bk)

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the scales of an array of this logical shape: [..., ceil(N/bn), ceil(K/bk)].

        Of ordered storage: [..., N/64, ceil(K/bk), 64], whatever bn is.
        """
        blocks = (
            -(-n // b) if n else 0 for n, b in zip(shape[-2:], self.block_size(shape), strict=True)
        )
        rows, groups = blocks
        if self.ordered:
            return (*shape[:-2], shape[-2] // wgmma_layout.BLOCK, groups, wgmma_layout.BLOCK)
        return (*shape[:-2], rows, groups)

    @property
    def k_multiple(self) -> int:
        """K must be a multiple of this, so that each row's bit stream is whole bytes."""
        if self.ordered:
            return wgmma_layout.BLOCK
        return 1 if self.storage == "plain" else {2: 4, 4: 2}.get(self.bits, 8)

    def storage_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of `QArray.qvalue` for this logical shape.

        Raises:
            ValueError: If K does not fill whole bytes.
        """
        if self.storage == "plain":
            return tuple(shape)
        if shape[-1] % self.k_multiple:
            raise ValueError(
                f"{self.element} packs K in whole bytes: K must be a multiple of "
                f"{self.k_multiple}; found shape {tuple(shape)}; pad K"
            )
        if self.ordered:
            if shape[-2] % self.row_multiple:
                raise ValueError(
                    f"{self.storage!r} storage: N must be a multiple of {self.row_multiple}; found {tuple(shape)}"
                )
            n, k = shape[-2:]
            return (*shape[:-2], *wgmma_layout.codes_shape(n, k, self.stored_bits))
        return (*shape[:-1], shape[-1] * self.bits // 8)

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of codes, scales and offsets of an array of this logical shape."""

        def count(s: tuple[int, ...]) -> int:
            total = 1
            for n in s:
                total *= n
            return total

        scales = count(self.scale_shape(shape))
        size = count(self.storage_shape(shape)) * self.storage_dtype.itemsize
        size += scales * self.stored_scale_dtype.itemsize
        if self.offset == "zero_point":
            size += scales * self.zero_point_dtype.itemsize
        if self.offset == "minimum":
            size += scales * self.stored_scale_dtype.itemsize
        if self.global_scale:
            size += 4 * count(shape[:-2])
        return size


@dataclasses.dataclass(frozen=True)
class ActivationFormat:
    """How a layer quantizes its input at run time.

    Attributes:
        format: Grid and block of the quantized activation [tokens, K]: (1, -1) is per token, (1, 128)
            per token and 128 columns, (-1, -1) one scale for all.
        static: The scale (for NVFP4: the global scale) is a loaded parameter, not computed.
        amax_min: Floor of amax, in x's units (DeepSeek-V3: 1e-4).
        amax_max: Upper bound of amax, in x's units (FBGEMM's activation_scale_ub).
    """

    format: QFormat
    static: bool = False
    amax_min: float = 0.0
    amax_max: float | None = None


def _unordered(element: Element) -> Storage:
    return "plain" if element.bits == 8 else "packed"


def integer_format(
    bits: int,
    block_shape: tuple[int, int],
    *,
    offset: Offset | None = None,
    scale_dtype: str = "float32",
) -> QFormat:
    """The `QFormat` of a `bits`-wide integer element."""
    storage = "plain" if bits == 8 else "packed"
    return QFormat(f"int{bits}", block_shape, scale_dtype, offset, storage=storage)


def _presets() -> dict[str, QFormat]:
    e4m3, e5m2, e2m1, e8m0 = "float8_e4m3fn", "float8_e5m2", "float4_e2m1fn", "float8_e8m0fnu"
    presets = {
        "mxfp4": QFormat(e2m1, (1, 32), e8m0, scale_rule="mx", storage="packed"),
        "mxfp8": QFormat(e4m3, (1, 32), e8m0, scale_rule="mx"),
        "nvfp4": QFormat(e2m1, (1, 16), e4m3, global_scale=True, storage="packed"),
    }
    blocks = {
        "tensor": (WHOLE, WHOLE),
        "channel": (1, WHOLE),
        "1x128": (1, 128),
        "128x128": (128, 128),
    }
    for name, element in (("fp8_e4m3", e4m3), ("fp8_e5m2", e5m2)):
        for block, shape in blocks.items():
            presets[f"{name}_{block}"] = QFormat(element, shape)
            presets[f"{name}_{block}_ue8m0"] = QFormat(element, shape, e8m0)
    return presets


_PRESETS = _presets()
_INTEGER_NAME = re.compile(r"int([2-8])_(?:(\d+)x(\d+)|(channel)|(tensor))(_asym|_min)?")


def qformat(name: str | QFormat) -> QFormat:
    """The format of this name: a preset of `FORMATS`, or any ``int{2-8}_{1xG|BNxBK|channel|tensor}[_asym|_min]``.

    Scales are float32; use `dataclasses.replace` for another scale dtype.

    Raises:
        ValueError: If the name is neither.
    """
    if isinstance(name, QFormat):
        return name
    if name in _PRESETS:
        return _PRESETS[name]
    match = _INTEGER_NAME.fullmatch(name)
    if not match:
        raise ValueError(
            f"unknown format {name!r}: use one of {sorted(_PRESETS)} or "
            "int{2-8}_{1xG|channel|tensor} with an optional _asym or _min"
        )
    bits, rows, cols, channel, tensor, suffix = match.groups()
    block = (1, WHOLE) if channel else (WHOLE, WHOLE) if tensor else (int(rows), int(cols))
    offset = {None: None, "_asym": "zero_point", "_min": "minimum"}[suffix]
    return integer_format(int(bits), block, offset=offset)


FORMATS: Mapping[str, QFormat] = MappingProxyType(
    _PRESETS
    | {
        name: qformat(name)
        for bits in (2, 3, 4, 8)
        for block in ("1x32", "1x64", "1x128", "channel", "tensor")
        for suffix in ("", "_asym")
        for name in (f"int{bits}_{block}{suffix}",)
    }
)
"""The named formats; `qformat` also builds any other integer group size."""
