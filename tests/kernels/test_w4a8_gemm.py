"""INT4 weights with int8 and FP8 activations: repacking, instructions, numbers, tilings through ptxas, and the GPU."""

import concurrent.futures
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm
from ptx_emulator import Emulated

from qjax import testing
from qjax.pallas_kernels import w4a8_gemm_sm90
from qjax.pallas_kernels._mixed_gemm_registers_sm90 import words_layout
from qjax.pallas_kernels._mixed_gemm_tiles_sm90 import MAX_SMEM
from qjax.pallas_kernels._w4a8_registers_sm90 import COLUMNS, MAGIC, decoding, eight_bit_weights
from qjax.pallas_kernels.w4a8_gemm_sm90 import (
    TileConfig,
    WideTileConfig,
    candidate_tiles,
    choose_tiles,
    costs,
    repack,
    unsupported_reason,
    w4a8_gemm,
)

TOLERANCE = 2e-3
INT8, FP8 = w4a8_gemm_sm90.X_DTYPES


def operands(m, n, k, group, *, x_dtype, zeros=False, scale_dtype="bfloat16", out_dtype="bfloat16"):
    """x, its scales, codes as checkpoints store them, scales, zero points (the two farthest, too) or None, bias."""
    rng = np.random.default_rng(m + n + k)
    x = jnp.asarray(40 * rng.standard_normal((m, k)), jnp.float32)
    x = jnp.clip(jnp.round(x), -128, 127).astype(INT8) if x_dtype == INT8 else x.astype(FP8)
    codes = jnp.asarray(rng.integers(0, 256, (n, k // 2)), jnp.uint8)
    groups = -(-k // group)
    scale = jnp.asarray(0.1 * rng.standard_normal((n, groups)), jnp.float32).astype(scale_dtype)
    zero_point = rng.choice([-8, 8, 0, 3], (n, groups), p=[0.3, 0.3, 0.2, 0.2]).astype(np.int8)
    x_scale = jnp.asarray(rng.uniform(1e-3, 0.02, m), jnp.float32)
    bias = jnp.asarray(rng.standard_normal(n), jnp.float32)
    return x, x_scale, codes, scale, jnp.asarray(zero_point) if zeros else None, bias


def weights(codes, scale, zero_point, group):
    """(q - zero_point) * scale in float32."""
    fields = np.stack([np.asarray(codes) & 15, np.asarray(codes) >> 4], axis=-1)
    q = fields.reshape(codes.shape[0], -1).astype(np.float32) - 8

    def spread(values):
        return np.repeat(np.asarray(values, np.float32), group, axis=1)[:, : q.shape[1]]

    return (q - (0 if zero_point is None else spread(zero_point))) * spread(scale)


def reference(x, x_scale, codes, scale, zero_point, bias, group):
    x = np.asarray(x, np.float32) * np.asarray(x_scale)[:, None]
    product = jnp.matmul(x, weights(codes, scale, zero_point, group).T, precision="highest")
    return np.asarray(product) + np.asarray(bias)


def run(args, group, tiles=None, out_dtype="bfloat16", num_sms=2):
    x, x_scale, codes, scale, zero_point, bias = args
    n = codes.shape[0]
    codes, scale, zero_point = repack(codes, scale, zero_point, group_size=group)
    return w4a8_gemm(
        x,
        x_scale,
        codes,
        scale,
        zero_point,
        n=n,
        group_size=group,
        bias=bias,
        out_dtype=out_dtype,
        config=tiles,
        num_sms=num_sms,
    )


def relative_error(out, expected):
    return np.linalg.norm(np.asarray(out, np.float32) - expected) / np.linalg.norm(expected)


def config(columns, blocks, parts, splits=1, tail=False):
    return TileConfig(columns, blocks, parts, 128, 2, splits, tail)


# Short tiles in M, N and K, short groups, several tiles a CTA, few tokens and many, sums within a CTA and a cluster, of
# all tiles or the last; int32 sums of whole rows, zero points of rows and of groups.
CASES = [
    (INT8, (1, 192, 576, 128), {}, config(8, 1, 4)),
    (INT8, (3, 192, 320, 32), {"zeros": True, "scale_dtype": "float32"}, config(8, 2, 1)),
    (INT8, (17, 192, 512, 512), {"out_dtype": "float16"}, config(32, 2, 1, splits=2)),
    (INT8, (100, 192, 192, 64), {"zeros": True, "scale_dtype": "float16"}, WideTileConfig(64, 2)),
    (INT8, (3, 64, 1536, 256), {}, config(8, 1, 4)),
    (FP8, (1, 2880, 128, 64), {}, config(8, 4, 1)),
    (FP8, (3, 192, 576, 32), {"zeros": True}, config(8, 1, 2, splits=2)),
    (FP8, (17, 128, 320, 320), {"zeros": True, "out_dtype": "float16"}, config(32, 2, 2)),
    (FP8, (50, 320, 320, 128), {}, WideTileConfig(16, 2, cluster=2)),
    (FP8, (100, 320, 256, 128), {"scale_dtype": "float32"}, config(128, 2, 1, 2, tail=True)),
]


@pytest.mark.parametrize(("x_dtype", "shape", "options", "tiles"), CASES, ids=str)
def test_numbers(x_dtype, shape, options, tiles):
    args = operands(*shape, x_dtype=x_dtype, **options)
    out_dtype = options.get("out_dtype", "bfloat16")
    with testing.interpret():
        out = run(args, shape[-1], tiles, out_dtype)
    assert out.dtype == jnp.dtype(out_dtype)
    assert relative_error(out, reference(*args, shape[-1])) <= TOLERANCE


def every_code(x_dtype):
    """All codes with all zero points, as the product with an identity finds them, and what they are."""
    n, k, group = 64, 128, 32
    codes = jnp.arange(n * k // 2).astype(jnp.uint8).reshape(n, -1)
    zero_point = jnp.asarray(np.arange(n * 4).reshape(n, 4) % 17 - 8, jnp.int8)
    scale = jnp.asarray(np.exp2(np.arange(n * 4).reshape(n, 4) % 11 - 5), jnp.bfloat16)
    x = jnp.eye(k, dtype=jnp.float32).astype(x_dtype)
    args = x, jnp.full((1,), 2.0, jnp.float32), codes, scale, zero_point, jnp.zeros(n)
    return args, group, 2 * weights(codes, scale, zero_point, group).T


def test_every_code_and_zero_point_is_exact():
    args, group, expected = every_code(FP8)
    with testing.interpret():
        out = run(args, group, config(64, 1, 1))
    np.testing.assert_array_equal(np.asarray(out, np.float32), expected)


def extreme(x_dtype, m=5, n=64, k=256, group=64):
    """Scales of tokens and groups over sixteen powers of ten, and the largest activations of the type."""
    x, _, codes, scale, zero_point, _ = operands(m, n, k, group, x_dtype=x_dtype, zeros=True)
    rng = np.random.default_rng(0)
    x_scale = jnp.asarray(10 ** rng.uniform(-8, 8, m), jnp.float32)
    scale = jnp.asarray(10 ** rng.uniform(-8, 8, scale.shape), jnp.float32) * jnp.sign(
        scale.astype(jnp.float32)
    )
    largest = jnp.asarray(127 if x_dtype == INT8 else 448, x.dtype)
    x = jnp.where(jnp.arange(m)[:, None] == 1, largest, x)
    return (x, x_scale, codes, scale, zero_point, jnp.zeros(n)), group


def assert_close(out, args, group):
    """To what bfloat16 rounds the output, and float32 the terms of each sum."""
    x, x_scale, codes, scale, zero_point, _ = args
    w = weights(codes, scale, zero_point, group)
    terms = np.abs(np.asarray(x, np.float32)) @ np.abs(w).T * np.asarray(x_scale)[:, None]
    wrong = np.abs(np.asarray(out, np.float32) - reference(*args, group))
    assert (wrong <= 2**-8 * np.abs(reference(*args, group)) + 2**-11 * terms).all()


def test_extreme_scales():
    args, group = extreme(FP8)
    with testing.interpret():
        out = run(args, group, config(8, 1, 2))
    assert_close(out, args, group)


def decoded(words, dtype, zero_point, *, first, width):
    """`eight_bit_weights` by the kernel's instructions."""

    def emit(ctx, words, *offset):
        del ctx
        made = decoding(words, *(offset or (None,)), dtype, first=first, width=width)
        quad = ir.VectorType.get((4,), ir.IntegerType.get_signless(8))
        if dtype == FP8:
            quad = ir.VectorType.get((4,), ir.Float8E4M3FNType.get())
        i32, registers = ir.IntegerType.get_signless(32), []
        kind = llvm.StructType.get_literal([i32] * 2)
        constraints = ",".join(["=&r"] * 2 + ["r"] * len(made.inputs))
        names = [f"${2 + i}" for i in range(len(made.inputs))]
        for chunk in range(width // COLUMNS):
            halves = [
                llvm.inline_asm(kind, [*made.inputs], ptx, constraints)
                for ptx in made.lines(chunk, ["$0", "$0", "$1", "$1"], names)
            ]
            for i in (0, 1):
                registers += [utils.bitcast(llvm.extractvalue(i32, h, [i]), quad) for h in halves]
        shape = fa.WGMMA_LAYOUT_8BIT.registers_shape((64, width))
        return fa.FragmentedArray(
            _registers=np.array(registers, dtype=object).reshape(shape),
            _layout=fa.WGMMA_LAYOUT_8BIT,
            _is_signed=True if dtype == INT8 else None,
        )

    def reference(words, *offset):
        zeros = offset[0] - (MAGIC + 8) if offset else None
        return eight_bit_weights(words, dtype, zeros, first=first, width=width)

    emit.interpret_impl = reference
    offset = () if zero_point is None else (zero_point + (MAGIC + 8),)
    layouts = words_layout(words.shape), *(plgpu.Layout.WGMMA.reduce(1) for _ in offset)
    out = plgpu.ShapeDtypeStruct((64, width), jnp.dtype(dtype), layout=plgpu.Layout.WGMMA_8BIT)
    return plgpu.inline_mgpu(arg_types=layouts, return_type=out)(emit)(words, *offset)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("x_dtype", [INT8, FP8])
def test_instructions(monkeypatch, x_dtype, zeros):
    """Emulated thread by thread, they make what interpret mode takes for granted."""
    monkeypatch.setattr(plgpu, "inline_mgpu", Emulated())
    rng, shape = np.random.default_rng(0), (2, 2, 256)
    words = rng.integers(0, 256, (4 * math.prod(shape),), np.uint8).view(np.int32).reshape(shape)
    zero_point = jnp.asarray(np.arange(64) % 17 - 8, jnp.float32) if zeros else None
    for first, width in ((0, 128), (32, 64), (96, 32)):
        decoded(jnp.asarray(words), x_dtype, zero_point, first=first, width=width)


def test_every_code_goes_to_its_thread():
    n, k = 72, 144
    codes = np.random.default_rng(0).integers(0, 256, (n, k // 2), np.uint8)
    words, scale, _ = repack(jnp.asarray(codes), jnp.ones((n, 3)), group_size=64)
    assert words.shape == (2, 3, 2, 256) and scale.shape == (2, 3, 64)
    words = np.asarray(words).view(np.uint32).reshape(2, 3, 128, 4)
    for row, column in np.random.default_rng(1).integers(0, (n, k), (200, 2)):
        w, h, r = row % 64 // 16, row % 16 // 8, row % 8
        j, p, q, i = column % 64 // 32, column % 32 // 16, column % 16 // 4, column % 4
        word = words[row // 64, column // 64, 32 * w + 4 * r + q, 2 * j + h]
        assert word >> (8 * i + 4 * p) & 15 == codes[row, column // 2] >> (4 * (column % 2)) & 15


def kinds():
    """Kinds of operands: x's dtype, group size, zero points."""
    return [(x, g, z) for x in (INT8, FP8) for g, z in ((128, False), (32, True), (4096, False))]


def test_chosen_tiles_fit():
    for x_dtype, group, zeros in kinds():
        cost = costs(4096, group, integers=x_dtype == INT8, zeros=zeros, scale_bytes=4)
        for m in (1, 8, 17, 32, 64, 100, 256, 4096):
            for tiles in candidate_tiles(m, 4096, cost):
                wide = isinstance(tiles, WideTileConfig)
                size = {} if wide else {"x_bytes": 1}
                assert tiles.smem_bytes(cost.scale_bytes, **size) <= MAX_SMEM
                assert tiles.stages >= 2 and (wide or tiles.blocks * tiles.parts <= 4)
            assert choose_tiles(m, 4096, 4096, cost, num_sms=132) in candidate_tiles(m, 4096, cost)
    # Enough loads in flight where a few rows meet few tokens: every SM has a part of K.
    cost = costs(4096, 128, integers=True, zeros=False, scale_bytes=2)
    small = choose_tiles(1, 4096, 4096, cost, num_sms=132)
    assert 4096 // small.rows * small.splits == 128


@pytest.mark.skipif(not testing.ptxas_available(), reason="needs the aot extra")
def test_ptxas_keeps_numbers_in_registers():
    n = 4096
    jobs = []
    for (x_dtype, group, zeros), m in zip(kinds(), (1000, 64, 256, 4096, 3, 256), strict=True):
        k = 2880 if m in (1000, 3) else 4096  # TMA's rules know K, interpret mode does not
        cost = costs(k, group, integers=x_dtype == INT8, zeros=zeros, scale_bytes=2)
        tiles = choose_tiles(m, n, k, cost, num_sms=132)

        def product(*args, group=group, tiles=tiles):
            return w4a8_gemm(*args, n=n, group_size=group, config=tiles, num_sms=132)

        scale = jax.ShapeDtypeStruct((n // 64, -(-k // group), 64), jnp.bfloat16)
        shapes = ((m, k), x_dtype), ((m,), "float32"), ((n // 64, k // 64, 2, 256), "int32")
        args = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in shapes]
        jobs.append((product, [*args, scale, *([scale] if zeros else [])]))
    for (report,) in testing.ptxas_reports(jobs):
        report.check()


def test_bad_arguments_are_named():
    x, x_scale, codes, scale, zero_point, bias = operands(4, 128, 256, 64, x_dtype=INT8, zeros=True)
    packed, scales, zeros = repack(codes, scale, zero_point, group_size=64)
    options = dict(n=128, group_size=64)
    with pytest.raises(ValueError, match=r"codes must be int32\[2, 4, 2, 256\]; found uint8"):
        w4a8_gemm(x, x_scale, codes, scales, **options)
    with pytest.raises(ValueError, match=r"zero_point must be bfloat16\[2, 4, 64\]; found int8"):
        w4a8_gemm(x, x_scale, packed, scales, zero_point, **options)
    with pytest.raises(ValueError, match=r"x must be one of .* found bfloat16"):
        w4a8_gemm(x.astype(jnp.bfloat16), x_scale, packed, scales, zeros, **options)
    with pytest.raises(ValueError, match=r"x_scale must be float32 .* \[4\] scales; .*\[3\]"):
        w4a8_gemm(x, x_scale[:3], packed, scales, zeros, **options)
    with pytest.raises(ValueError, match=r"the output must be one of .* found float32"):
        w4a8_gemm(x, x_scale, packed, scales, zeros, out_dtype="float32", **options)
    with pytest.raises(ValueError, match=r"bias must be float32\[128\]; found float32\[5\]"):
        w4a8_gemm(x, x_scale, packed, scales, zeros, bias=bias[:5], **options)
    with pytest.raises(ValueError, match=r"x has 4 rows, fewer than the 5 tokens"):
        w4a8_gemm(x, x_scale, packed, scales, zeros, m=5, **options)
    assert unsupported_reason(4, 128, 256, group_size=64) is None
    assert "below 131072" in (unsupported_reason(4, 128, 1 << 17, group_size=64) or "")
    assert "groups must be of 32" in (unsupported_reason(4, 128, 256, group_size=48) or "")


@pytest.mark.gpu
@pytest.mark.parametrize("x_dtype", [INT8, FP8])
def test_gpu_makes_every_code_exactly(x_dtype):
    args, group, expected = every_code(x_dtype)
    out = jax.jit(run, static_argnums=(1, 2, 3, 4))(args, group, None, "bfloat16", None)
    np.testing.assert_array_equal(np.asarray(out, np.float32), expected)
    args, group = extreme(x_dtype)
    assert_close(jax.jit(run, static_argnums=(1,))(args, group), args, group)


def errors(jobs):
    """The relative error of each (shape, options of `operands`, tiling, SMs); compiled in parallel."""

    def job(shape, options, tiles, num_sms):
        args, group = operands(*shape, **options), shape[-1]
        fn = jax.jit(run, static_argnums=(1, 2, 3, 4))
        return fn.lower(args, group, tiles, "bfloat16", num_sms).compile(), args, group

    with concurrent.futures.ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda j: job(*j), jobs))
    return [
        relative_error(product(args), reference(*args, group)) for product, args, group in found
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("x_dtype", [INT8, FP8])
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (192, 576), (2880, 1536), (576, 2880)])
def test_gpu_matches_the_reference(x_dtype, n, k):
    groups = {4096: (128, 32), 576: (64, 576), 1536: (128, 256), 2880: (32, 2880)}[k]
    jobs = [
        ((m, n, k, groups[i % 2]), {"x_dtype": x_dtype, "zeros": zeros}, None, None)
        for i, m in enumerate((1, 3, 17, 64, 100, 1000))
        for zeros in (False, True)
    ]
    for job, error in zip(jobs, errors(jobs), strict=True):
        assert error <= TOLERANCE, job


@pytest.mark.gpu
@pytest.mark.parametrize("x_dtype", [INT8, FP8])
def test_gpu_runs_every_tiling(x_dtype):
    n, k, group = 1344, 2880, 128
    cost = costs(k, group, integers=x_dtype == INT8, zeros=True, scale_bytes=2)
    jobs = [
        ((m, n, k, group), {"x_dtype": x_dtype, "zeros": True}, tiles, num_sms)
        for m in (5, 250)
        for tiles in candidate_tiles(m, k, cost)
        for num_sms in (132, 12)  # a tile or two for each CTA, and many
    ]
    for job, error in zip(jobs, errors(jobs), strict=True):
        assert error <= TOLERANCE, job
