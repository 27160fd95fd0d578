"""QArray: what stored bytes mean, by an independent reading in NumPy; its life as a pytree."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qjax import QArray, QFormat, qformat, quantize
from qjax.formats import WHOLE, integer_format
from qjax.qarray import dequantize_stored, expand_blocks

N, K = 5, 48
E8M0, E4M3 = "float8_e8m0fnu", "float8_e4m3fn"
KINDS = {
    "int2": integer_format(2, (1, 16)),
    "int3 bfloat16 scales": integer_format(3, (2, 24), scale_dtype="bfloat16"),
    "int4": integer_format(4, (1, 16)),
    "int4 asymmetric": integer_format(4, (1, 16), offset="zero_point", scale_dtype="float16"),
    "int4 minimum": integer_format(4, (1, 16), offset="minimum", scale_dtype="float16"),
    "int5 asymmetric": integer_format(5, (WHOLE, 16), offset="zero_point"),
    "int6": integer_format(6, (1, WHOLE)),
    "int7": integer_format(7, (WHOLE, WHOLE)),
    "int8": integer_format(8, (1, WHOLE)),
    "int8 asymmetric": integer_format(8, (1, 16), offset="zero_point"),
    "fp8 blocks cut short": QFormat("float8_e4m3fn", (2, 32)),
    "fp8 e5m2, power-of-two scales": QFormat("float8_e5m2", (1, 16), E8M0),
    "mxfp4": QFormat("float4_e2m1fn", (1, 16), E8M0, scale_rule="mx", storage="packed"),
    "nvfp4": qformat("nvfp4"),
}


def random_array(format: QFormat, *, permuted=False, seed=0) -> QArray:
    """Any bytes are codes (but NaN); scales of either sign where their dtype has one."""
    rng = np.random.default_rng(seed)
    stored = rng.integers(0, 256, format.storage_shape((N, K)), dtype=np.uint8)
    if format.storage == "plain":
        stored = stored.view(format.storage_dtype)
        if format.spec.is_float:
            finite = np.isfinite(stored.astype(np.float32))
            stored = np.where(finite, stored, np.ones((), stored.dtype))
    shape = format.scale_shape((N, K))
    signs = 1 if format.scale_dtype == E8M0 else rng.choice([-1.0, 1.0], shape)
    scale = (signs * 2.0 ** rng.integers(-4, 5, shape)).astype(format.scale_dtype)
    if format.scale_dtype == "float32":
        scale = scale * rng.normal(size=shape).astype(np.float32)
    half = 2 ** (format.bits - 1)
    zero = rng.integers(-half, half + 1, shape).astype(format.zero_point_dtype)
    minimum = rng.normal(size=shape).astype(format.scale_dtype)
    return QArray.from_parts(
        format,
        jnp.asarray(stored),
        jnp.asarray(scale),
        zero_point=jnp.asarray(zero) if format.offset == "zero_point" else None,
        minimum=jnp.asarray(minimum) if format.offset == "minimum" else None,
        global_scale=jnp.full((1, 1), 0.37, jnp.float32) if format.global_scale else None,
        column_perm=jnp.asarray(rng.permutation(K), jnp.int32) if permuted else None,
        dtype="float32",
    )


def read(w: QArray) -> np.ndarray:
    """The float64 values, element by element from the bits."""
    f, stored = w.format, np.asarray(w.qvalue)
    if f.storage == "plain":
        codes = stored.astype(np.float64)
    else:
        bits = np.unpackbits(stored, axis=-1, bitorder="little").reshape(N, K, f.bits)
        unsigned = (bits * (1 << np.arange(f.bits))).sum(-1)
        half = 2 ** (f.bits - 1)
        if f.spec.is_float:
            codes = unsigned.astype(np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
        else:
            codes = unsigned.astype(np.float64) - half
    rows, cols = (b if b != WHOLE else n for b, n in zip(f.block_shape, (N, K), strict=True))

    def block(part):
        return np.asarray(part).astype(np.float64)[
            np.arange(N)[:, None] // rows, np.arange(K) // cols
        ]

    if w.minimum is not None:
        values = (codes + 2 ** (f.bits - 1)) * block(w.scale) + block(w.minimum)
    else:
        values = (codes - (0 if w.zero_point is None else block(w.zero_point))) * block(w.scale)
    if w.global_scale is not None:
        values = values * np.asarray(w.global_scale, np.float64)
    if w.column_perm is None:
        return values
    logical = np.empty_like(values)
    logical[:, np.asarray(w.column_perm)] = values
    return logical


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_stored_bits_have_their_meaning(kind, permuted):
    w = random_array(KINDS[kind], permuted=permuted, seed=len(kind))
    assert w.shape == (N, K) and w.ndim == 2
    values = jax.jit(QArray.dequantize)(w)
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values, read(w), rtol=3e-7, atol=1e-6)


def test_the_default_dtype_is_the_array_s_own():
    w = dataclasses.replace(random_array(KINDS["int4"]), dtype="bfloat16")
    assert w.dequantize().dtype == jnp.bfloat16
    assert w.dequantize("float16").dtype == jnp.float16
    np.testing.assert_array_equal(w.dequantize(), dequantize_stored(w).astype(jnp.bfloat16))


def test_bytes_are_those_of_the_parts():
    w = random_array(KINDS["int4 asymmetric"], permuted=True)
    blocks = N * K // 16
    assert w.nbytes == N * K // 2 + blocks * (2 + 1) + 4 * K
    assert w.nbytes == w.format.nbytes((N, K)) + 4 * K
    eight = random_array(KINDS["int8 asymmetric"])  # zero points of 8-bit codes are int16
    assert eight.nbytes == N * K + blocks * (4 + 2) == eight.format.nbytes((N, K))


def test_transformations_see_a_pytree_whose_shape_follows_its_parts():
    """scan and vmap drop the leading axis: a stored shape would go stale."""
    x = jax.random.normal(jax.random.key(0), (3, N, K))
    stack = quantize(x, "int3_1x16", dtype="float32")
    assert stack.shape == (3, N, K)
    values = np.asarray(stack.dequantize())

    def body(total, w):
        assert isinstance(w, QArray) and w.shape == (N, K)
        return total + w.dequantize(), w

    total, again = jax.lax.scan(body, jnp.zeros((N, K)), stack)
    np.testing.assert_allclose(total, values.sum(0), rtol=1e-6, atol=1e-6)
    assert again.shape == (3, N, K) and again.format == stack.format
    np.testing.assert_array_equal(again.qvalue, stack.qvalue)
    np.testing.assert_array_equal(jax.vmap(lambda w: w.dequantize())(stack), values)
    np.testing.assert_array_equal(jax.jit(lambda w: w)(stack).dequantize(), values)
    one = jax.tree.map(lambda part: part[1], stack)
    assert one.shape == (N, K)
    np.testing.assert_array_equal(one.dequantize(), values[1])
    abstract = jax.eval_shape(lambda x: quantize(x, "nvfp4"), x)
    assert abstract.shape == (3, N, K) and abstract.global_scale.shape == (3, 1, 1)


def test_equal_formats_share_a_compiled_function():
    traces = []

    @jax.jit
    def f(w):
        traces.append(w.format)
        return w.dequantize()

    for seed in range(3):
        f(random_array(KINDS["int4"], seed=seed))
    assert len(traces) == 1
    f(random_array(KINDS["int2"]))
    assert len(traces) == 2


def test_misuse_as_an_array_raises():
    w = random_array(KINDS["int4"])
    for misuse in (lambda: w + 1, lambda: 2.0 * w, lambda: w @ w, lambda: w[0],
                   lambda: jnp.sin(w), lambda: jnp.ones((1, K)) @ w):  # fmt: skip
        with pytest.raises(TypeError):
            misuse()
    with pytest.raises(TypeError):
        jax.grad(lambda w: w.dequantize().sum())(w)


def parts_of(w: QArray) -> dict:
    names = ("qvalue", "scale", "zero_point", "minimum", "global_scale", "column_perm")
    return {name: getattr(w, name) for name in names}


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("int4", {"scale": jnp.ones((N, 2))}, r"scale must be float32\[5, 3\]; found float32\[5, 2\]"),
        ("int4", {"scale": jnp.ones((N, 3), jnp.bfloat16)}, r"found bfloat16\[5, 3\]"),
        ("int4", {"qvalue": jnp.ones((24,), jnp.uint8)}, r"at least two axes; found \[24\]"),
        ("int4", {"qvalue": jnp.ones((N, 24), jnp.int8)}, r"qvalue must be uint8\[5, 24\]; found int8"),
        ("int8", {"qvalue": jnp.ones((N, K), jnp.uint8)}, r"qvalue must be int8\[5, 48\]"),
        ("int4", {"minimum": jnp.ones((N, 3))}, "minimum must be None"),
        ("int4 minimum", {"minimum": None}, "minimum must be present"),
        ("int4 minimum", {"minimum": jnp.ones((N, 3))}, r"minimum must be float16\[5, 3\]"),
        ("int4 asymmetric", {"zero_point": None}, "zero_point must be present"),
        ("int4 asymmetric", {"zero_point": jnp.ones((N, 3), jnp.uint8)}, r"zero_point must be int8\[5, 3\]"),
        ("int8 asymmetric", {"zero_point": jnp.ones((N, 3), jnp.int8)}, r"zero_point must be int16\[5, 3\]"),
        ("nvfp4", {"global_scale": jnp.ones(())}, r"global_scale must be float32\[1, 1\]; found float32\[\]"),
        ("int4", {"column_perm": jnp.arange(24)}, r"column_perm must be int32\[48\]; found int32\[24\]"),
    ],
)  # fmt: skip
def test_every_part_is_validated(kind, changes, message):
    w = random_array(KINDS[kind])
    with pytest.raises(ValueError, match=message):
        QArray.from_parts(w.format, **{**parts_of(w), **changes})


def test_blocks_expand_to_their_elements():
    blocks = jnp.arange(6.0).reshape(2, 3)
    expanded = expand_blocks(blocks, (3, 10), (2, 4))
    rows, cols = np.arange(3) // 2, np.arange(10) // 4
    np.testing.assert_array_equal(expanded, np.asarray(blocks)[rows[:, None], cols])
