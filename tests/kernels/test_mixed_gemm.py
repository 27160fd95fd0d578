"""Weights of 2, 4 and 8 bits in wgmma's order: repacking, numbers, every tiling through ptxas, and the GPU."""

import functools
import math

import jax
import jax.numpy as jnp
import mixed_gemm_cases
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from mixed_gemm_cases import SIZES, TOLERANCE, every_code, operands, reference, relative_error
from ptx_emulator import Emulated

from qjax import testing
from qjax.formats import qformat
from qjax.pallas_kernels._mixed_gemm_registers_sm90 import UNITS, dequantize
from qjax.pallas_kernels.mixed_gemm_sm90 import (
    ELEMENTS,
    MAX_SCALE_BYTES,
    MAX_SMEM,
    TileConfig,
    choose_tiles,
    mixed_gemm,
    repack,
    unsupported_reason,
)
from qjax.quantization import quantize


def config(columns, blocks, parts, depth=128, splits=1, tail=False, **options):
    return TileConfig(columns, blocks, parts, depth, 2, splits, tail, **options)


# Group sizes below, at and above a block, zero points, short tiles in M, N and K, short groups, several tiles a CTA,
# sums within a CTA and within a cluster, of all tiles or the last (none); mma.sync; x by multicast, an odd number of
# row tiles and of steps.
CASES = [
    ((3, 192, 256, 64), {}, config(8, 1, 1, mma=True)),
    ((1, 320, 576, 128), {"offset": "zero_point"}, config(8, 2, 2)),
    ((5, 200, 328, 32), {"offset": "zero_point", "scale_dtype": "float32"}, config(8, 1, 2)),
    ((17, 192, 512, 256), {"offset": "zero_point"}, config(32, 2, 1, splits=2)),
    ((9, 128, 512, 512), {"offset": "zero_point", "dtype": "float16"}, config(16, 2, 2)),
    (
        (100, 128, 256, 128),
        {"dtype": "float16", "scale_dtype": "float16"},
        config(128, 1, 1, splits=2, share=True),
    ),
    ((3, 192, 512, 128), {}, config(8, 1, 2, splits=2)),
    ((9, 320, 512, 128), {}, config(16, 1, 2, splits=2, tail=True)),
    ((60, 128, 512, 128), {"offset": "zero_point"}, config(64, 1, 4, 64)),
    ((20, 320, 640, 64), {}, config(16, 1, 1, splits=2, tail=True, share=True)),
]


run = functools.partial(mixed_gemm_cases.run, mixed_gemm)


def check(shape, options, tiles, element, zero=0):
    args = operands(*shape, element=element, **options)
    with testing.interpret():
        out = run(args, shape[-1], tiles, element=element, zero=zero)
    assert out.dtype == args[0].dtype
    assert relative_error(out, reference(*args, shape[-1], element, zero)) <= TOLERANCE


@pytest.mark.parametrize(("shape", "options", "tiles"), CASES, ids=str)
def test_numbers(shape, options, tiles):
    check(shape, options, tiles, "int4")


EIGHT_BITS = [
    ("int8", (3, 192, 256, 32), {}, config(8, 1, 2, mma=True)),
    ("int8", (17, 192, 512, 512), {}, config(32, 2, 1, 256, splits=2)),
    ("int8", (5, 64, 192, 64), {"offset": "zero_point"}, config(8, 1, 1)),
    ("int8", (5, 64, 192, 192), {"offset": "zero_point", "dtype": "float16"}, config(8, 1, 1)),
    ("float8_e4m3fn", (9, 128, 328, 128), {"scale_dtype": "float32"}, config(16, 2, 2)),
    ("float8_e4m3fn", (60, 64, 512, 128), {}, config(64, 1, 4, 64)),
    ("float8_e5m2", (9, 128, 328, 128), {"dtype": "float16"}, config(16, 2, 2)),
]


@pytest.mark.parametrize(("element", "shape", "options", "tiles"), EIGHT_BITS, ids=str)
def test_eight_bits(element, shape, options, tiles):
    check(shape, options, tiles, element)


TWO_BITS = [
    ((3, 192, 256, 128), {}, config(8, 1, 2)),
    ((9, 128, 328, 32), {"offset": "zero_point", "dtype": "float16"}, config(16, 2, 1, 256)),
]


@pytest.mark.parametrize(("shape", "options", "tiles"), TWO_BITS, ids=str)
def test_two_bits(shape, options, tiles):
    check(shape, options, tiles, "int2")


def test_four_bit_floats():
    check((9, 128, 328, 32), {"dtype": "float16"}, config(16, 2, 2), "float4_e2m1fn")


# Groups in shared memory and one a row; sums of fewer and of more tokens than TMA's smallest box.
MINIMUMS = [
    ((3, 192, 256, 32), {}, config(8, 1, 2), "int4", -8),
    ((50, 128, 456, 128), {"scale_dtype": "float16"}, config(64, 2, 1, splits=2), "int4", -8),
    ((9, 64, 192, 192), {"dtype": "float16"}, config(16, 1, 1), "int2", -2),
    ((3, 64, 256, 64), {}, config(8, 1, 1), "int8", -128),
    ((60, 64, 512, 32), {}, config(64, 1, 4, 64), "int4", -8),
    ((60, 64, 512, 128), {}, config(64, 1, 4, 64), "int4", -8),  # parts share groups
]


@pytest.mark.parametrize(("shape", "options", "tiles", "element", "zero"), MINIMUMS, ids=str)
def test_minimums(shape, options, tiles, element, zero):
    check(shape, {"offset": "minimum", **options}, tiles, element, zero)


@pytest.mark.parametrize("name", ["int4_1x128", "int4_1x64_asym", "int4_channel"])
def test_it_repacks_the_packages_own_storage(name):
    m, n, k = 9, 128, 256
    w = quantize(jax.random.normal(jax.random.key(0), (n, k)), qformat(name))
    x = jax.random.normal(jax.random.key(1), (m, k), jnp.bfloat16)
    group = w.format.block_size(w.shape)[1]
    with testing.interpret():
        out = run((x, w.qvalue, w.scale, w.zero_point, jnp.zeros(n)), group, config(16, 2, 1))
    expected = np.asarray(x, np.float32) @ np.asarray(w.dequantize(jnp.float32)).T
    assert relative_error(out, expected) <= TOLERANCE


def test_every_code_goes_to_its_thread():
    n, k = 72, 136
    codes = np.asarray(jax.random.bits(jax.random.key(0), (n, k // 2), jnp.uint8))
    words, scale, _ = repack(jnp.asarray(codes), jnp.ones((n, 3)), group_size=64)
    assert words.shape == (2, 3, 2, 256)
    assert scale.shape == (2, 3, 64)
    words = np.asarray(words).view(np.uint32).reshape(2, 3, 128, 4)
    for row, column in np.random.default_rng(0).integers(0, (n, k), (200, 2)):
        w, h, r = row % 64 // 16, row % 16 // 8, row % 8
        j, p, q, e = column % 64 // 16, column % 16 // 8, column % 8 // 2, column % 2
        word = words[row // 64, column // 64, 32 * w + 4 * r + q, j]
        expected = codes[row, column // 2] >> (4 * e) & 15
        assert word >> (16 * e + 8 * p + 4 * h) & 15 == expected
    np.testing.assert_array_equal(np.asarray(scale[1, :, 8:]), 0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("element", ELEMENTS)
def test_instructions(monkeypatch, element, dtype):
    """Emulated thread by thread, they make what interpret mode takes for granted."""
    monkeypatch.setattr(plgpu, "inline_mgpu", Emulated())
    bits, rng = ELEMENTS[element], np.random.default_rng(0)
    shape = (4, bits * UNITS[bits] // 128, 256)
    codes = rng.integers(0, 256, (4 * math.prod(shape),), np.uint8)
    if element.startswith("float8"):
        codes[(codes & 0x7C) == 0x7C] ^= 0x40
    words = jnp.asarray(codes.view(np.int32).reshape(shape))
    options = [(None, 0)]
    if element.startswith("int"):
        limit = 2 ** (bits - 1)
        zeros = rng.integers(-limit, limit + 1, (64,)).astype(np.float32)
        options += [(None, -limit), (jnp.asarray(zeros), 0)]
    for zero_point, zero in options:
        for first, width in ((0, 64), (32, 32)):
            dequantize(words, element, dtype, zero_point, first=first, width=width, zero=zero)


def test_chosen_tiles_fit():
    for n, k in [*SIZES, (192, 576), (2880, 2880)]:
        for m in (1, 8, 17, 32, 64, 100, 256, 4096):
            tiles = choose_tiles(m, n, k, num_sms=132)
            assert tiles.smem_bytes(MAX_SCALE_BYTES) <= MAX_SMEM
            assert tiles.stages >= 2
    small = choose_tiles(1, 4096, 4096, num_sms=132)
    assert 4096 // small.rows * small.splits == 128


def ptxas_job(m, k, group, tiles, element="int4", offset=None):
    """A function of the arrays and their shapes, for `testing.ptxas_reports`."""
    n = 4096

    def make():
        x, codes, scale, offsets, bias = operands(m, n, k, group, element=element, offset=offset)
        return x, repack(codes, scale, offsets, group_size=group, element=element), bias

    def product(x, weight, bias):
        codes, scale, offsets = weight
        return mixed_gemm(
            x,
            codes,
            scale,
            offsets if offset == "zero_point" else None,
            minimum=offsets if offset == "minimum" else None,
            n=n,
            group_size=group,
            element=element,
            bias=bias,
            config=tiles,
            num_sms=132,
        )

    leaves, tree = jax.tree.flatten(jax.eval_shape(make))
    return lambda *leaves: product(*jax.tree.unflatten(tree, leaves)), leaves


@pytest.mark.skipif(not testing.ptxas_available(), reason="needs the aot extra")
def test_ptxas_keeps_codes_in_registers():
    jobs = []
    for element, offset, group in (
        ("int4", None, 128),
        ("int4", "zero_point", 32),
        ("int4", "minimum", 32),
        ("int2", "zero_point", 64),
        ("int8", None, 4096),
        ("int8", "zero_point", 32),
        ("float4_e2m1fn", None, 32),
        ("float8_e4m3fn", None, 128),
    ):
        for m in (16, 64, 256):
            size = dict(bits=ELEMENTS[element], sums=1 / group if offset == "minimum" else 0)
            tiles = choose_tiles(m, 4096, 4096, num_sms=132, scale_bytes=4 / group, **size)
            jobs.append(ptxas_job(m, 4096, group, tiles, element, offset))
    for (report,) in testing.ptxas_reports(jobs):
        assert not report.serialized_wgmma
        # Four math warpgroups of 64 tokens lack a few registers, which costs less than fewer warpgroups.
        assert report.spill_bytes <= 128, report


def test_bad_arguments_are_named():
    x, codes, scale, zero_point, bias = operands(4, 128, 256, 64, offset="zero_point")
    with pytest.raises(ValueError, match=r"codes must be uint8\[128, 128\]; found int8"):
        repack(codes.astype(jnp.int8), scale, group_size=64)
    with pytest.raises(ValueError, match=r"scale must be bfloat16\[128, 2\]; found .*\[128, 4\]"):
        repack(codes, scale, group_size=128)
    with pytest.raises(ValueError, match=r"groups must be of 32, 64.*found 16"):
        repack(codes, scale, group_size=16)
    packed, scale, zero_point = repack(codes, scale, zero_point, group_size=64)
    assert zero_point is not None
    with pytest.raises(ValueError, match=r"codes must be int32\[2, 4, 2, 256\]; found uint8"):
        mixed_gemm(x, codes, scale, n=128, group_size=64)
    with pytest.raises(ValueError, match=r"zero_point must be bfloat16\[2, 4, 64\]; found"):
        mixed_gemm(x, packed, scale, zero_point[:, :2], n=128, group_size=64)
    with pytest.raises(ValueError, match=r"bias must be float32\[128\]; found float32\[5\]"):
        mixed_gemm(x, packed, scale, n=128, group_size=64, bias=bias[:5])
    with pytest.raises(ValueError, match=r"x must be one of .* found float32"):
        mixed_gemm(x.astype(jnp.float32), packed, scale, n=128, group_size=64)
    assert unsupported_reason(4, 128, 256, group_size=64) is None
    assert "multiples of 8" in (unsupported_reason(4, 100, 256, group_size=64) or "")


@pytest.mark.parametrize("element", ["int2", "int8", "float4_e2m1fn", "float8_e4m3fn"])
def test_every_code_is_exact(element):
    args, expected = every_code(element, "bfloat16")
    with testing.interpret():
        out = run(args, 128, config(128, 1, 1), element=element)
    np.testing.assert_array_equal(np.asarray(out, np.float32), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("element", ELEMENTS)
def test_gpu_makes_every_code_exactly(element, dtype):
    args, expected = every_code(element, dtype)
    out = jax.jit(run, static_argnums=(1, 2, 3, 4))(args, 128, None, None, element)
    np.testing.assert_array_equal(np.asarray(out, np.float32), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("element", ELEMENTS)
@pytest.mark.parametrize("offset", [None, "zero_point", "minimum"])
def test_gpu_takes_every_element(element, offset):
    if offset and not element.startswith("int"):
        pytest.skip("only integers have offsets")
    zero = -(2 ** (ELEMENTS[element] - 1)) if offset == "minimum" else 0
    product = jax.jit(run, static_argnums=(1, 2, 3, 4, 5))
    for m, n, k, group in ((1, 192, 576, 32), (17, 320, 1024, 1024), (300, 4096, 512, 128)):
        for dtype in ("bfloat16", "float16"):
            args = operands(m, n, k, group, element=element, offset=offset, dtype=dtype)
            out = product(args, group, None, None, element, zero)
            assert relative_error(out, reference(*args, group, element, zero)) <= TOLERANCE


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 3, 17, 64, 100, 4096])
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (28672, 4096), (192, 576), (2880, 2880)])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_gpu_matches_the_reference(m, n, k, group):
    for offset in (None, "zero_point"):
        args = operands(m, n, k, group, offset=offset)
        out = jax.jit(run, static_argnums=(1, 2, 3))(args, group, None, None)
        assert relative_error(out, reference(*args, group)) <= TOLERANCE
