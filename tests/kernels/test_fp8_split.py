"""Two FP8 terms of bfloat16 rows: bits in interpret mode, what they hold, ptxas, a GPU where there is one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import testing
from qjax.pallas_kernels.fp8_split_sm90 import PAST, fp8_split, fp8_split_reference

ROWS = np.array([4, 0, 1, 2, 3, 4, 4, 0, 2])


def activations(rows, k):
    x = jax.random.normal(jax.random.key(9), (rows, k)).astype(jnp.bfloat16)
    # An outlier, zeros, an infinity, NaN.
    x = x.at[0, 3].set(500).at[1].set(0).at[2, 5].set(jnp.inf).at[3, 1].set(jnp.nan)
    return x.at[4].multiply(2.0**-120)


def check(found, x, rows):
    expected = [np.asarray(part, np.float32)[rows] for part in fp8_split_reference(x)]
    found = [np.asarray(part, np.float32)[: len(rows)] for part in found]
    np.testing.assert_array_equal(found[2], expected[2])
    finite = np.isfinite(expected[2])  # a NaN scale makes whatever terms NaN
    for one, other in zip(found[:2], expected[:2], strict=True):
        np.testing.assert_array_equal(one[finite], other[finite])


@pytest.mark.parametrize("k", [128, 192, 2880])
def test_numbers(k):
    x = activations(5, k)
    with testing.interpret():
        found = fp8_split(x, jnp.asarray(ROWS, jnp.int32))
    assert [f.shape for f in found] == [(16, k), (16, k), (9 + PAST,)]
    check(found, x, ROWS)
    with testing.interpret():
        check(fp8_split(x), x, np.arange(5))
        places = np.random.default_rng(k).permutation(10)
        found = fp8_split(x, places=jnp.asarray(places, jnp.int32))
    check(found, x, np.argsort(places) // 2)


def test_terms_hold_bfloat16():
    x = activations(64, 512)[5:].at[:, 0].multiply(300)  # outliers
    first, rest, scale = (np.asarray(part, np.float32) for part in fp8_split_reference(x))
    found = (first + rest) * scale[:, None]
    exact = np.asarray(x, np.float32)
    largest = np.abs(exact).max(axis=1, keepdims=True)
    assert (np.abs(found - exact) <= 2.0**-21 * largest).all()
    large = np.abs(exact) >= 2.0**-13 * largest
    np.testing.assert_array_equal(found[large], exact[large])


def test_rows_that_are_not_finite():
    first, rest, scale = fp8_split_reference(activations(5, 128))
    assert (
        np.isnan(np.asarray(scale))[[2, 3]].all()
        and np.isfinite(np.asarray(scale))[[0, 1, 4]].all()
    )
    zeros = [np.asarray(part, np.float32)[1] for part in (first, rest)]
    assert not np.any(zeros)


def test_bad_arguments_are_named():
    x = jnp.zeros((2, 192), jnp.bfloat16)
    for wrong, message in (
        (x.astype(jnp.float16), "x must be bfloat16; found float16"),
        (x[:, :96], "K must be a multiple of 64 from 128 to 16384; found 96"),
        (x[:0], "not empty"),
        (x[0], r"x must be \[T, K\]"),
    ):
        with pytest.raises(ValueError, match=f"fp8_split: .*{message}"):
            fp8_split(wrong)
    with pytest.raises(ValueError, match="as many for each row of x; found 3 for 2"):
        fp8_split(x, places=jnp.arange(3))


@pytest.mark.skipif(not testing.ptxas_available(), reason="needs the aot extra")
def test_ptxas_does_not_spill():
    rows = jax.ShapeDtypeStruct((256,), jnp.int32)
    shapes = [jax.ShapeDtypeStruct((64, k), jnp.bfloat16) for k in (2880, 16384)]
    jobs = [(fp8_split, (x, rows)) for x in shapes]
    jobs += [(lambda x, places: fp8_split(x, places=places), (x, rows)) for x in shapes]
    for (report,) in testing.ptxas_reports(jobs):
        report.check()
        assert report.stack_bytes == 0


@pytest.mark.gpu
@pytest.mark.parametrize("k", [128, 192, 2880, 7168])
def test_gpu_has_the_same_bits(k):
    x = activations(300, k)
    rows = np.random.default_rng(0).integers(0, 300, 1001)
    check(jax.jit(fp8_split)(x, jnp.asarray(rows, jnp.int32)), x, rows)
    places = np.random.default_rng(1).permutation(1200)
    found = jax.jit(lambda x, places: fp8_split(x, places=places))(x, jnp.int32(places))
    check(found, x, np.argsort(places) // 4)
