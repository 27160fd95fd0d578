"""Grouped products with 4-bit weights: numbers in interpret mode, ptxas of every tiling, a GPU where there is one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qjax import testing, wgmma_layout
from qjax.pallas_kernels.mixed_grouped_gemm_sm90 import (
    MAX_SMEM,
    FP8Rows,
    GatedActivation,
    GroupedWeights,
    MixedTileConfig,
    choose_tiles,
    mixed_gated_grouped_gemm,
    mixed_grouped_gemm,
    unsupported_reason,
)

# bf16 rounding of the output is about 1.7e-3; INT4 also rounds each weight times its scale.
TOLERANCE = {"float4_e2m1fn": 2e-3, "int4": 2.6e-3}
MODEST = (122, 126)  # codes of scales whose products neither saturate nor vanish in an activation
LEVELS = np.float32([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])
GPT_OSS = GatedActivation(alpha=1.702, offset=1.0, limit=7.0)


def weights(
    groups,
    n,
    k,
    *,
    element="float4_e2m1fn",
    group_size=32,
    dtype="bfloat16",
    seed=0,
    scales=(112, 128),
):
    """Weights as the kernel takes them, and their values, float32 [E, N, K]."""
    keys = jax.random.split(jax.random.key(seed), 3)
    codes = jax.random.bits(keys[0], (groups, n, k // 2), jnp.uint8)
    u = np.stack([np.asarray(codes) & 15, np.asarray(codes) >> 4], axis=-1).reshape(groups, n, k)
    counts = (groups, n, -(-k // group_size))
    if element == "int4":
        scale = jax.random.normal(keys[1], counts).astype(dtype) / 64
        values, stored = u.astype(np.float32) - 8, scale
        if group_size > 128:
            stored = jnp.repeat(scale, group_size // 128, axis=-1)[..., : -(-k // 128)]
    else:
        scale = jax.random.randint(keys[1], counts, *scales).astype(jnp.uint8)
        scale = jax.lax.bitcast_convert_type(scale, jnp.float8_e8m0fnu)
        values, stored = LEVELS[u], scale
    factor = np.repeat(np.asarray(scale, np.float32), group_size, axis=-1)[..., :k]
    bias = jax.random.normal(keys[2], (groups, n)).astype(dtype)
    blocks = wgmma_layout.to_row_blocks(stored)
    if element == "int4":
        return GroupedWeights(wgmma_layout.to_words(codes), blocks, None, bias), values * factor
    powers = 2.0 ** -jnp.arange(3.0, 3.0 + groups)  # what the scales are relative to
    factor = factor * np.asarray(powers)[:, None, None]
    words = wgmma_layout.to_words8(codes)
    return GroupedWeights(words, blocks, powers, bias), values * factor


def of_pairs(both, values):
    """(gate's, up's) values and biases of weights that hold both."""
    blocks = values.reshape(values.shape[0], -1, 2, 64, values.shape[2])
    values = [blocks[:, :, i].reshape(values.shape[0], -1, values.shape[2]) for i in (0, 1)]
    return values, (both.bias[:, ::2], both.bias[:, 1::2])


def reference(x, values, bias, sizes):
    """float32 products of each group's rows; zeros past the groups."""
    out = np.zeros((x.shape[0], values.shape[1]), np.float32)
    ends = np.cumsum(sizes)
    for e, end in enumerate(ends):
        mine = slice(end - sizes[e], end)
        out[mine] = np.asarray(x[mine], np.float32) @ values[e].T + np.asarray(bias[e], np.float32)
    return out


def gated_reference(gate, up, activation, inside):
    if activation.limit is not None:
        gate, up = (
            np.minimum(gate, activation.limit),
            np.clip(up, -activation.limit, activation.limit),
        )
    hidden = gate / (1 + np.exp(-activation.alpha * gate)) * (up + activation.offset)
    return np.where(inside, hidden, 0)


def relative_error(out, expected):
    return np.linalg.norm(np.asarray(out, np.float32) - expected) / np.linalg.norm(expected)


def activations(rows, k, dtype="bfloat16"):
    return jax.random.normal(jax.random.key(9), (rows, k)).astype(dtype)


# Empty groups, one huge group, sums below T, short tiles, K and N that no tile divides, both dtypes, every kind.
CASES = [
    ((3, 0, 1, 4), 192, 320, {}, MixedTileConfig(8, 1, 4, 1, 128, 2)),
    ((0, 17, 9), 128, 192, {}, MixedTileConfig(16, 1, 2, 2, 128, 2)),
    ((33, 0, 70), 192, 192, {}, MixedTileConfig(64, 2, 1, 2, 128, 2)),
    (
        (5, 40),
        64,
        256,
        dict(element="int4", dtype="float16"),
        MixedTileConfig(32, 1, 1, 1, 64, 2),
    ),
    (
        (130, 2),
        128,
        384,
        dict(element="int4", group_size=128),
        MixedTileConfig(128, 2, 1, 1, 128, 2),
    ),
    ((11,), 64, 512, dict(element="int4", group_size=256), MixedTileConfig(16, 1, 2, 1, 128, 2)),
    ((7, 2), 64, 128, dict(element="int4", group_size=64), MixedTileConfig(8, 1, 1, 1, 64, 3)),
]


def options(kind):
    return dict(element=kind.get("element", "float4_e2m1fn"), group_size=kind.get("group_size", 32))


@pytest.mark.parametrize(("sizes", "n", "k", "kind", "config"), CASES, ids=str)
def test_numbers(sizes, n, k, kind, config):
    parts, values = weights(len(sizes), n, k, **kind)
    x = activations(sum(sizes) + 2, k, kind.get("dtype", "bfloat16"))
    with testing.interpret():
        out = mixed_grouped_gemm(
            x, parts, jnp.int32(sizes), out_dtype=x.dtype, config=config, num_sms=3, **options(kind)
        )
    assert out.dtype == x.dtype
    element = options(kind)["element"]
    assert relative_error(out, reference(x, values, parts.bias, sizes)) <= TOLERANCE[element]
    assert (np.asarray(out)[sum(sizes) :] == 0).all()


GATED = [
    ((3, 0, 6), GPT_OSS, MixedTileConfig(8, 1, 2, 2, 128, 2), False),
    ((70, 20), GatedActivation(), MixedTileConfig(64, 2, 1, 2, 128, 2), True),
]


@pytest.mark.parametrize(("sizes", "activation", "config", "together"), GATED, ids=str)
def test_gated_numbers(sizes, activation, config, together):
    n, k, groups = 128, 192, len(sizes)
    x = activations(sum(sizes) + 1, k)
    if together:
        gate, both = weights(groups, 2 * n, k, scales=MODEST)
        up, (values, biases) = None, of_pairs(gate, both)
    else:
        (gate, first), (up, second) = (weights(groups, n, k, seed=s, scales=MODEST) for s in (1, 2))
        values, biases = (first, second), (gate.bias, up.bias)
    run = functools.partial(
        mixed_gated_grouped_gemm,
        x,
        gate,
        up,
        jnp.int32(sizes),
        activation=activation,
        config=config,
        num_sms=3,
        **options({}),
    )
    with testing.interpret():
        out = run()
    products = [reference(x, v, b, sizes) for v, b in zip(values, biases, strict=True)]
    inside = (np.arange(x.shape[0]) < sum(sizes))[:, None]
    expected = gated_reference(*products, activation, inside)
    if activation.limit is not None:  # a second time, as FP8 terms
        with testing.interpret():
            terms, scale = run(fp8_terms=True)
        assert (out.shape[0] + 7) // 8 * 8 == terms[0].shape[0]
        whole = sum(np.asarray(t, np.float32) for t in terms)[: out.shape[0]] * scale
        error = np.abs(whole - expected)
        assert (error <= 2.0**-8 * np.abs(expected) + 2e-5 * np.abs(expected).max()).all()
        assert (whole[sum(sizes) :] == 0).all()
    rounding = 2.0**-8 * np.abs(expected)  # of bf16; a few large numbers dominate the norm here
    error = np.abs(np.asarray(out, np.float32) - expected)
    assert (error <= rounding + 2e-5 * np.abs(expected).max()).all()
    assert (np.asarray(out)[sum(sizes) :] == 0).all()


def test_fp4_words_come_back():
    codes = jax.random.bits(jax.random.key(0), (3, 128, 96), jnp.uint8)
    words = wgmma_layout.to_words8(codes)
    assert words.shape == (3, 2, 3, 2, 256)
    np.testing.assert_array_equal(wgmma_layout.from_words8(words), codes)


def test_one_fp8_term():
    sizes, k = (3, 6), 256
    parts, values = weights(2, 64, k)
    codes = activations(9, k).astype(jnp.float8_e4m3fn)
    scale = jnp.linspace(0.1, 3, 9)
    config = MixedTileConfig(8, 1, 2, 1, 128, 2)
    with testing.interpret():
        out = mixed_grouped_gemm(
            FP8Rows((codes,), scale),
            parts,
            jnp.int32(sizes),
            config=config,
            num_sms=2,
            **options({}),
        )
    x = np.asarray(codes, np.float32) * np.asarray(scale)[:, None]
    assert relative_error(out, reference(x, values, parts.bias, sizes)) <= 2e-3


BENCHMARKED = [1, 16, 32, 128, 512]  # rows of a group


@pytest.mark.skipif(not testing.ptxas_available(), reason="needs the aot extra")
def test_ptxas_neither_spills_nor_serializes():
    jobs = {}
    for rows in BENCHMARKED:
        for gated in (False, True):
            for kind in ("one", "two", "int4") if rows == 128 else ("two", "int4"):
                element = "int4" if kind == "int4" else "float4_e2m1fn"
                config = choose_tiles(rows, element=element, gated=gated)
                n = 5760 if gated and kind != "int4" else 2880
                jobs[config, gated, kind] = job(rows, n, 2880, kind, gated=gated)
    for reports in testing.ptxas_reports(list(jobs.values())):
        (report,) = reports
        report.check()
        assert report.stack_bytes == 0


def job(rows, n, k, kind, *, gated):
    """A function and its arguments' shapes, as models call it."""
    groups, tokens, element = 4, 4 * rows, "int4" if kind == "int4" else "float4_e2m1fn"

    def arguments():
        x = jnp.zeros((tokens, k), jnp.bfloat16)
        if kind != "int4":
            terms = (x.astype(jnp.float8_e4m3fn), x.astype(jnp.float8_e5m2))
            x = FP8Rows(terms[: 1 if kind == "one" else 2], jnp.ones(tokens + 128))
        w = GroupedWeights(
            jnp.zeros((groups, *wgmma_layout.codes_shape(n, k)), jnp.int32),
            jnp.zeros(
                (groups, n // 64, k // 32, 64), "bfloat16" if kind == "int4" else "float8_e8m0fnu"
            ),
            None if kind == "int4" else jnp.ones(groups),
            jnp.zeros((groups, n), jnp.bfloat16),
        )
        return x, w, jnp.zeros(groups, jnp.int32)

    keep = dict(element=element, group_size=32, num_sms=132)
    tree = jax.tree.structure(jax.eval_shape(arguments))

    def run(*leaves):
        x, w, sizes = jax.tree.unflatten(tree, leaves)
        if gated:  # FP4 weights as GPT-OSS has them, INT4 ones as Kimi K2
            up, terms = w if kind == "int4" else None, kind == "two"
            out = mixed_gated_grouped_gemm(
                x, w, up, sizes, activation=GPT_OSS, fp8_terms=terms, **keep
            )
            return out.terms if isinstance(out, FP8Rows) else out
        return mixed_grouped_gemm(x, w, sizes, **keep)

    return run, jax.tree.leaves(jax.eval_shape(arguments))


def test_chosen_tiles_fit():
    for rows in BENCHMARKED:
        for gated in (False, True):
            for element in TOLERANCE:
                config = choose_tiles(rows, element=element, gated=gated)
                assert config.smem_bytes() <= MAX_SMEM
                assert config.stages >= 3
                assert config.columns >= min(rows, 72)


def test_bad_arguments_are_named():
    w, _ = weights(2, 64, 128)
    x, sizes = activations(8, 128), jnp.int32([3, 5])
    run = functools.partial(mixed_grouped_gemm, element="float4_e2m1fn", group_size=32)
    with pytest.raises(ValueError, match=r"codes must be int32 \[2, 1, 2, 2, 256\]"):
        run(x, w._replace(codes=w.codes.astype(jnp.uint32)), sizes)
    with pytest.raises(ValueError, match=r"scale must be float8_e8m0fnu \[2, 1, 4, 64\]"):
        run(x, w._replace(scale=w.scale[:, :, :3]), sizes)
    with pytest.raises(ValueError, match=r"bias must be \[2, 64\]; found bfloat16 \[2, 63\]"):
        run(x, w._replace(bias=w.bias[:, :63]), sizes)
    with pytest.raises(ValueError, match="and no others, have a global_scale"):
        run(x, w._replace(global_scale=None), sizes)
    with pytest.raises(ValueError, match=r"codes must be int32 \[1, 1"):
        run(x, w, sizes[:1])
    with pytest.raises(ValueError, match="need bfloat16 x"):
        run(x.astype(jnp.float16), w, sizes)
    with pytest.raises(ValueError, match="one or two terms of FP8"):
        run(FP8Rows((x,), jnp.ones(8)), w, sizes)
    keep = dict(element="float4_e2m1fn", group_size=32, activation=GPT_OSS)
    with pytest.raises(ValueError, match="and 2 pieces"):
        config = MixedTileConfig(8, 1, 1, 1, 128, 2)
        mixed_gated_grouped_gemm(x, w, w, sizes, config=config, **keep)
    with pytest.raises(ValueError, match="must be pairs of 64 rows; found 64"):
        mixed_gated_grouped_gemm(x, w, None, sizes, **keep)
    reason = functools.partial(unsupported_reason, element="int4", scale_dtype="bfloat16")
    assert reason(64, 128, group_size=32) is None
    assert "multiples of 64" in reason(72, 128, group_size=32)
    assert "groups must be" in reason(64, 128, group_size=48)
    assert "scales of its dtype" in reason(64, 128, group_size=32, x_dtype="float16")
    assert "float4_e2m1fn or int4" in unsupported_reason(64, 64, element="int8", group_size=32)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "n", "k"),
    [*((rows, 576, 1472) for rows in (1, 3, 10, 25, 100, 300)), (2, 192, 192), (100, 192, 128)],
)
@pytest.mark.parametrize("element", list(TOLERANCE))
def test_gpu_matches_the_reference(rows, n, k, element):
    groups = 6
    sizes = np.random.default_rng(1).multinomial(groups * rows, [0.3, 0, 0.5, 0.05, 0.05, 0.1])
    x = activations(groups * rows + 3, k)
    parts, values = weights(groups, 2 * n, k, element=element, scales=MODEST)
    keep = dict(element=element, group_size=32, expected_rows=rows)
    expected = reference(x, values, parts.bias, sizes)
    out = jax.jit(functools.partial(mixed_grouped_gemm, **keep))(x, parts, jnp.int32(sizes))
    assert relative_error(out, expected) <= TOLERANCE[element]
    run = functools.partial(mixed_gated_grouped_gemm, **keep, activation=GPT_OSS)
    out = jax.jit(run)(x, parts, None, jnp.int32(sizes))
    inside = (np.arange(x.shape[0]) < sum(sizes))[:, None]
    products = (reference(x, v, b, sizes) for v, b in zip(*of_pairs(parts, values), strict=True))
    expected = gated_reference(*products, GPT_OSS, inside)
    assert relative_error(out, expected) <= TOLERANCE[element]
    if element == "float4_e2m1fn":
        terms, scale = jax.jit(functools.partial(run, fp8_terms=True))(
            x, parts, None, jnp.int32(sizes)
        )
        out = sum(np.asarray(t, np.float32) for t in terms)[: x.shape[0]] * scale
        assert relative_error(out, expected) <= TOLERANCE[element]
