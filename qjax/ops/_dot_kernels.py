"""Which GPU kernel computes a product, what it takes, and its gradient."""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from qjax.formats import WHOLE, ActivationFormat, QFormat
from qjax.ops._dispatch import choose, device_reason, num_sms
from qjax.pallas_kernels import (
    fp8_quantize_sm90,
    mixed_gemm_sm80,
    mixed_gemm_sm90,
    w4a8_gemm_sm90,
)
from qjax.pallas_kernels import fp8_rowwise_gemm_sm90 as fp8_gemm
from qjax.pallas_kernels.fp8_block_gemm_sm90 import fp8_block_gemm
from qjax.qarray import QArray, decode_scale, to_wgmma
from qjax.quantization import quantize_activation

Kernel = Literal["fp8_block", "fp8_row", "mixed", "w4a8"]

AMPERE = ("8.0", "8.6", "8.7", "8.9")
"""Compute capabilities whose GPUs have `mixed_gemm_sm80` for weights with 16-bit inputs."""

_ROWS, _TENSOR = (1, WHOLE), (WHOLE, WHOLE)


def kernel_of(
    x: Array | QArray,
    w: Array | QArray,
    activation_format: ActivationFormat | None,
    out_dtype: DTypeLike,
) -> tuple[Kernel | None, str]:
    """The kernel that takes the product of x [M, K] and w [N, K], or None and why none does."""
    if not isinstance(w, QArray):
        return None, f"no kernel for a plain weight of {w.dtype}: XLA's product is the fast one"
    (m, k), n = x.shape, w.shape[0]
    act = x.format if isinstance(x, QArray) else activation_format and activation_format.format
    if w.format.storage == "wgmma":
        return _mixed_kernel(m, n, k, x, w, act, out_dtype)
    if w.format.storage == "wgmma8":
        return _w4a8_kernel(m, n, k, w, act, out_dtype)
    if act is None and prepackable(w):
        return None, "the weight has a checkpoint's layout: qjax.prepack(w) once for the kernel"
    if prepackable(w, act):
        return None, (
            "the weight has a checkpoint's layout: qjax.prepack(w, activation) once for the kernel"
        )
    if w.format.element.startswith("float8"):
        kernel = fp8_pair(w.format, act)
        if kernel is None or act is None:
            return None, f"no kernel for {describe(w.format)} weights with {describe(act)} inputs"
        reason = fp8_gemm.unsupported_reason(
            m, n, k, x_dtype=act.element, w_dtype=w.format.element, out_dtype=out_dtype
        )
        return (None, reason) if reason else (kernel, "")
    return None, f"no kernel for {describe(w.format)} weights with {describe(act)} inputs"


def fp8_pair(weights: QFormat, inputs: QFormat | None) -> Kernel | None:
    """The FP8 product of these formats: scales for blocks, or for rows of both operands."""
    if inputs is None or not inputs.element.startswith("float8") or weights.global_scale:
        return None
    if (weights.block_shape, inputs.block_shape) == ((128, 128), (1, 128)):
        return "fp8_block"
    pairs = (_ROWS, _TENSOR)
    if weights.block_shape in pairs and inputs.block_shape in pairs:
        return "fp8_row"
    return None


def _mixed_kernel(m, n, k, x, w: QArray, act, out_dtype) -> tuple[Kernel | None, str]:
    if act is not None:
        return None, f"no kernel for {describe(w.format)} weights with {describe(act)} inputs"
    if jnp.dtype(out_dtype) != x.dtype:
        return None, f"the kernel's output has x's dtype {x.dtype}; found {jnp.dtype(out_dtype)}"
    reason = mixed_gemm_sm90.unsupported_reason(
        m,
        n,
        k,
        group_size=w.format.block_size(w.shape)[1],
        element=_stored_element(w.format),
        x_dtype=x.dtype,
        scale_dtype=w.scale.dtype,
    )
    return (None, reason) if reason else ("mixed", "")


def _w4a8_kernel(m, n, k, w: QArray, act, out_dtype) -> tuple[Kernel | None, str]:
    if not w4a8_pair(w.format, act, k):
        return None, f"no kernel for {describe(w.format)} weights with {describe(act)} inputs"
    assert act is not None
    reason = w4a8_gemm_sm90.unsupported_reason(
        m,
        n,
        k,
        group_size=w.format.block_size(w.shape)[1],
        x_dtype=act.element,
        scale_dtype=w.scale.dtype,
        out_dtype=out_dtype,
    )
    return (None, reason) if reason else ("w4a8", "")


def w4a8_pair(weights: QFormat, inputs: QFormat | None, k: int) -> bool:
    """Whether INT4 weights [N, k] meet int8 or e4m3 inputs, whose scales are those of tokens or one for all."""
    if inputs is None or inputs.element not in w4a8_gemm_sm90.X_DTYPES:
        return False
    return (
        weights.element == "int4"
        and weights.offset != "minimum"
        and inputs.block_shape[0] in (1, WHOLE)
        and inputs.block_shape[1] in (WHOLE, k)
        and inputs.offset is None
        and not inputs.global_scale
    )


def _stored_element(format: QFormat) -> str:
    """What the codes of "wgmma" storage are, whose width may be greater than the element's."""
    return format.element if format.spec.is_float else f"int{format.stored_bits}"


def describe(format: QFormat | None) -> str:
    """A format in messages."""
    return "16-bit" if format is None else f"{format.element} {format.block_shape}"


@dataclasses.dataclass(frozen=True)
class _Static:
    """What a product's trace depends on beside its arrays."""

    kernel: Kernel
    activation_format: ActivationFormat | None
    out_dtype: str


def product(
    kernel: Kernel,
    x: Array | QArray,
    w: QArray,
    bias: Array | None,
    *,
    activation_format: ActivationFormat | None,
    activation_scale: Array | None,
    out_dtype: DTypeLike,
    operand: tuple[Array, Array] | None = None,
) -> Array:
    """y [M, N] by this kernel, differentiable with respect to x and bias; quantization of x as the identity.

    With `operand`, x's codes and scales as `quantized_operand` gives them, nothing reads x's values.
    """
    static = _Static(kernel, activation_format, jnp.dtype(out_dtype).name)
    if isinstance(x, QArray):
        return _run(static, x, w, bias, activation_scale, operand)
    return _differentiable(static, x, w, bias, activation_scale, operand)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(static: _Static, x, w, bias, activation_scale, operand):
    return _run(static, x, w, bias, activation_scale, operand)


def _forward(static, x, w, bias, activation_scale, operand):
    like = jnp.zeros((0,), x.dtype), None if bias is None else jnp.zeros((0,), bias.dtype)
    return _run(static, x, w, bias, activation_scale, operand), (w, like)


def _backward(static, residuals, g):
    """dx = g @ w on weights of 16 bits that XLA writes first, and the bias's gradient.

    There is no kernel for it, because writing them costs little where gradients are wanted. XLA does it in one fusion:
    1 byte of an FP8 code read and 2 written, then 2 read again by a product that it runs at its full rate. At an
    H200's 4.3 TB/s the fusion's 3 bytes take 0.7 ps a weight. The product takes 2 * M FLOP a weight, 10.2 ps at
    M = 4096 tokens and 800 TFLOP/s: 7% of overhead, 3% at 8192. A kernel that dequantizes in registers could save
    no more. It would read the storage transposed: what is summed over, N, is not what lies contiguous.
    """
    w, (x_like, bias_like) = residuals
    # Values of 16 bits, summed in float32: what a product with an unquantized weight would get.
    dx = jax.lax.dot_general(
        g.astype(x_like.dtype),
        w.dequantize(x_like.dtype),
        (((1,), (0,)), ((), ())),
        preferred_element_type=jnp.float32,
    ).astype(x_like.dtype)
    d_bias = None
    if bias_like is not None:
        d_bias = jnp.sum(g.astype(jnp.float32), axis=0).astype(bias_like.dtype)
    return dx, None, d_bias, None, None


_differentiable.defvjp(_forward, _backward)


def _run(static: _Static, x, w: QArray, bias, activation_scale, operand) -> Array:
    if static.kernel == "mixed":
        unsigned = w.format.offset == "minimum"  # its codes count from 0
        gemm = mixed_gemm_sm80 if device_reason(*AMPERE) is None else mixed_gemm_sm90
        return gemm.mixed_gemm(
            x,
            w.qvalue,
            w.scale,
            w.zero_point,
            n=w.shape[0],
            group_size=w.format.block_size(w.shape)[1],
            element=_stored_element(w.format),
            minimum=w.minimum,
            zero=-(2 ** (w.format.bits - 1)) if unsigned else 0,
            bias=bias,
            num_sms=num_sms(),
        )
    m = x.shape[0]
    if operand is None and static.kernel == "w4a8" and isinstance(x, QArray):
        operand = x.qvalue, decode_scale(x.scale)
    elif operand is None:
        operand = quantized_operand(x, static.activation_format, activation_scale)
    codes, x_scale = operand
    if static.kernel == "w4a8":
        return w4a8_gemm_sm90.w4a8_gemm(
            codes,
            x_scale.reshape(-1),  # groups of all K columns have one row of scales
            w.qvalue,
            w.scale,
            w.zero_point,
            n=w.shape[0],
            group_size=w.format.block_size(w.shape)[1],
            m=m,
            bias=bias,
            out_dtype=static.out_dtype,
            num_sms=num_sms(),
        )
    w_scale = decode_scale(w.scale)
    if static.kernel == "fp8_row":
        w_scale = w_scale.reshape(-1)
    gemm = fp8_block_gemm if static.kernel == "fp8_block" else fp8_gemm.fp8_rowwise_gemm
    return gemm(
        codes,
        x_scale,
        w.qvalue,
        w_scale,
        m=m,
        bias=bias,
        out_dtype=static.out_dtype,
        num_sms=num_sms(),
    )


def quantized_operand(
    x: Array | QArray,
    activation: ActivationFormat | None,
    scale,
    *,
    implementation: str | None = None,
):
    """Codes [M', K] and scales as the 8-bit products read them; `implementation` "xla" uses no kernel.

    Integers have no kernel: XLA fuses their quantization into one for the scales and one for the codes.
    """
    if not isinstance(x, QArray) and activation is not None and not activation.format.spec.is_float:
        x = quantize_activation(x, activation, scale=scale)
    if not isinstance(x, QArray):
        assert activation is not None
        m, k = x.shape
        format = activation.format
        per_token = format.block_shape == _ROWS
        reason = fp8_quantize_sm90.unsupported_reason(m, k, x_dtype=x.dtype, per_token=per_token)
        if format.block_shape == _TENSOR and not activation.static:
            reason = "one dynamic scale for all tokens needs a pass of its own"
        if format.scale_dtype != "float32":
            reason = f"scales of {format.scale_dtype} are rounded by XLA"
        reason = device_reason("9.0") or reason
        wanted = "xla" if implementation == "xla" else None
        where = choose("quantize_activation", wanted, reason)
        low, high = activation.amax_min, activation.amax_max
        if where == "pallas_mosaic_gpu":
            if per_token:
                return fp8_quantize_sm90.fp8_quantize_per_token(
                    x, dtype=format.element, amax_min=low, amax_max=high
                )
            if format.block_shape == (1, 128):
                return fp8_quantize_sm90.fp8_quantize_1x128(
                    x, dtype=format.element, amax_min=low, amax_max=high
                )
            scale = scale.astype(jnp.float32).reshape(1)
            return fp8_quantize_sm90.fp8_quantize_static(x, scale, dtype=format.element), scale
        x = quantize_activation(x, activation, scale=scale)
    x_scale = decode_scale(x.scale)
    if x.format.block_shape in (_ROWS, _TENSOR):
        return x.qvalue, x_scale.reshape(-1)
    return x.qvalue, jnp.pad(x_scale.T, ((0, 0), (0, -x.shape[0] % 4)))


def prepack(
    w: QArray, activation: ActivationFormat | None = None, *, pairs: bool = False
) -> QArray:
    """The weight in the layout of the kernel that multiplies it, done once where a model is loaded.

    Integers of 2 to 8 bits, FP8 and MXFP4 in groups of 32, 64, a multiple of 128 or all columns get "wgmma" storage if
    N and K are multiples of 64; of experts [E, N, K], MXFP4 ("wgmma8") and symmetric INT4 do. Other arrays are
    returned as they are. The values are the same. Weights that meet quantized inputs keep their layout, but for
    experts of MXFP4 (don't prepack others) and INT4 that meets `activation`.

    Args:
        w: [..., N, K].
        activation: What x is quantized to, if the weight has two axes: with int8 or e4m3 and a scale for each token,
            or one, INT4 gets "wgmma8" storage; with others, weights stay as they are.
        pairs: The even rows are a gate's, the odd ones what it gates: MXFP4 experts get "wgmma8_pairs" storage for
            `gated_ragged_dot` if N is a multiple of 128.
    """
    if activation is not None and w.ndim == 2:
        return to_wgmma(w, eight_bit=True) if prepackable(w, activation.format) else w
    return to_wgmma(w, pairs=pairs and w.shape[-2] % 128 == 0) if prepackable(w) else w


def prepackable(w: QArray, inputs: QFormat | None = None) -> bool:
    """Whether `prepack` re-lays this array out: for 16-bit inputs, or INT4 for `inputs`."""
    if inputs is not None:
        pair = w.ndim == 2 and w4a8_pair(w.format, inputs, w.shape[1])
        return pair and w.format.scale_dtype in w4a8_gemm_sm90.SCALE_DTYPES and prepackable(w)
    f, (n, k) = w.format, w.shape[-2:]
    block_k = f.block_shape[1]
    if w.ndim > 2:
        scales = {"float4_e2m1fn": ("float8_e8m0fnu",), "int4": ("bfloat16", "float16")}
        fits = f.offset is None and w.column_perm is None and block_k != WHOLE
        if not fits or f.scale_dtype not in scales.get(f.element, ()):
            return False
    return (
        not f.ordered
        and not f.global_scale
        and f.scale_dtype in (*mixed_gemm_sm90.SCALE_DTYPES, "float8_e8m0fnu")
        and (block_k in (32, 64, WHOLE) or block_k % 128 == 0)
        and n % 64 == 0
        and k % 64 == 0
    )


def unsupported_reason(
    x: Array | QArray,
    w: Array | QArray,
    *,
    activation_format: ActivationFormat | None = None,
    out_dtype: DTypeLike | None = None,
) -> str | None:
    """Why no kernel takes this product of x [M, K] and w [N, K] on the default device, None if one does."""
    out_dtype = x.dtype if out_dtype is None else out_dtype
    kernel, reason = kernel_of(x, w, activation_format, out_dtype)
    capabilities = ("9.0", *AMPERE) if kernel in ("mixed", None) else ("9.0",)
    return device_reason(*capabilities) or (None if kernel else reason)
