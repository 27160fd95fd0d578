"""The product of weights of 2 to 8 bits with mma.sync: numbers, waits, inlined instructions, ptxas, and the GPU."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import mixed_gemm_cases
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from mixed_gemm_cases import SIZES, TOLERANCE, every_code, operands, reference, relative_error
from ptx_emulator import Emulated, swizzled

from qjax import testing
from qjax.pallas_kernels import _async_copy_sm80, _mixed_gemm_sm80, _mma_sm80
from qjax.pallas_kernels._mixed_gemm_registers_sm90 import UNITS, dequantize
from qjax.pallas_kernels.mixed_gemm_sm80 import (
    ELEMENTS,
    LEAST_SMEM,
    TileConfig,
    choose_tiles,
    mixed_gemm,
    repack,
)

run = functools.partial(mixed_gemm_cases.run, mixed_gemm)


def interpreted(args, group, config=None, element="int4", zero=0):
    with testing.interpret(detect_races=False):  # a CTA is one warpgroup
        return run(args, group, config, element=element, zero=zero)


def case(element, shape, config, **options):
    return element, shape, options, config


# All numbers of tokens, one and two blocks of rows with a tile past the last row, groups below, at and above a stage's
# columns, one group a row, splits, all kinds of offsets and of dtypes, two to five stages, more stages than steps.
CASES = [
    case("int4", (1, 576, 576, 64), TileConfig(8, 2, 128, 3)),
    case("int4", (3, 64, 576, 128), TileConfig(8, 1, 64, 4, 2), offset="zero_point"),
    case("int4", (17, 72, 1536, 128), TileConfig(32, 2, 128, 2, 3), dtype="float16"),
    case(
        "int4",
        (100, 64, 200, 32),
        TileConfig(64, 1, 128, 3),
        offset="zero_point",
        scale_dtype="float32",
    ),
    case(
        "int4",
        (17, 136, 328, 128),
        TileConfig(32, 2, 64, 3, 2),
        offset="minimum",
        scale_dtype="float16",
    ),
    case("int4", (9, 64, 576, 576), TileConfig(16, 1, 64, 3, 3), offset="minimum"),
    case("int8", (17, 192, 576, 576), TileConfig(32, 2, 64, 5, 2), offset="zero_point"),
    case("int8", (3, 64, 192, 32), TileConfig(8, 1, 128, 3)),
    case("float8_e4m3fn", (17, 64, 576, 128), TileConfig(32, 1, 128, 3), scale_dtype="float32"),
]


@pytest.mark.parametrize(("element", "shape", "options", "config"), CASES, ids=str)
def test_numbers(element, shape, options, config):
    args = operands(*shape, element=element, **options)
    zero = -(2 ** (ELEMENTS[element] - 1)) if options.get("offset") == "minimum" else 0
    out = interpreted(args, shape[-1], config, element, zero)
    assert out.dtype == args[0].dtype
    assert out.shape == (shape[0], shape[1])
    assert relative_error(out, reference(*args, shape[-1], element, zero)) <= TOLERANCE


def test_every_code_is_exact():
    args, expected = every_code("int8", "bfloat16")
    out = interpreted(args, 128, TileConfig(64, 1, 64, 3), "int8")
    np.testing.assert_array_equal(np.asarray(out, np.float32), expected)


def test_a_wait_too_short_is_seen(monkeypatch):
    args = operands(3, 64, 576, 64)
    config, expected = TileConfig(8, 1, 64, 3), reference(*args, 64)
    assert relative_error(interpreted(args, 64, config), expected) <= TOLERANCE
    short = lambda pending: _async_copy_sm80.wait_copies(pending + 1)  # noqa: E731
    monkeypatch.setattr(_mixed_gemm_sm80, "wait_copies", short)
    with pytest.raises(AssertionError, match="asynchronous copies not waited for"):
        interpreted(args, 64, config)


def emulated(monkeypatch, **options) -> Emulated:
    emulator = Emulated(**options)
    monkeypatch.setattr(plgpu, "inline_mgpu", emulator)
    return emulator


@pytest.mark.parametrize(("rows", "columns", "is_swizzled"), [(8, 64, 1), (64, 128, 1), (2, 64, 0)])
@pytest.mark.parametrize(("row", "column"), [(0, 0), (64, 128), (88, 128)])
def test_copied_tiles(monkeypatch, rows, columns, is_swizzled, row, column):
    """Every chunk at its place, zeros past the edges."""
    source = jax.random.normal(jax.random.key(0), (90, 200)).astype(jnp.bfloat16)
    target = np.zeros((rows, columns), jnp.bfloat16)
    emulator = emulated(monkeypatch)
    emulator.layouts[id(target)] = lambda tile: (
        swizzled(tile, 128) if is_swizzled else np.ascontiguousarray(tile).view(np.uint8)
    )
    _async_copy_sm80.copy_tile(
        source, target, np.int32(row), np.int32(column), swizzled=bool(is_swizzled)
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("columns", [8, 16, 64])
def test_products_of_fragments(monkeypatch, columns, dtype):
    """ldmatrix finds the swizzled tokens, mma the weights' fragments."""
    keys = jax.random.split(jax.random.key(columns), 3)
    tokens = np.asarray(jax.random.normal(keys[0], (columns, 128)).astype(dtype))
    weights = [jax.random.normal(key, (64, 64)).astype(dtype) for key in keys[1:]]
    emulated(monkeypatch, images={id(tokens): swizzled(tokens, 128)})
    sums = _mma_sm80.products(weights, tokens, first=64)
    _mma_sm80.products(weights, tokens, sums, first=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_stored_columns(monkeypatch, dtype):
    sums = jax.random.normal(jax.random.key(0), (64, 16)).astype(dtype)
    out = np.asarray(jnp.full((30, 200), 7, dtype))
    emulator = emulated(monkeypatch)
    emulator.layouts[id(out)] = lambda values: np.ascontiguousarray(values).view(np.uint8)
    for row, column, end in ((0, 0, 30), (192, 16, 27)):
        _mma_sm80.store_columns(sums, out, np.int32(row), np.int32(column), np.int32(end))


@pytest.mark.parametrize("element", ELEMENTS)
def test_instructions_of_compute_capability_8(monkeypatch, element):
    emulated(monkeypatch)
    bits, rng = ELEMENTS[element], np.random.default_rng(0)
    shape = (4, bits * UNITS[bits] // 128, 256)
    codes = rng.integers(0, 256, (4 * np.prod(shape),), np.uint8)
    if element.startswith("float8"):
        codes[(codes & 0x7C) == 0x7C] ^= 0x40
    words = jnp.asarray(codes.view(np.int32).reshape(shape))
    zero_points = [None]
    if element.startswith("int"):
        limit = 2 ** (bits - 1)
        zero_points.append(jnp.asarray(rng.integers(-limit, limit + 1, (64,)).astype(np.float32)))
    for zero_point in zero_points:
        dequantize(words, element, "bfloat16", zero_point, first=32, width=32, ampere=True)


def test_chosen_tiles_fit():
    for n, k in [*SIZES, (192, 576), (2880, 2880)]:
        for m in (1, 8, 17, 32, 64, 100, 256, 4096):
            for bits in (2, 4, 8):
                size: dict[str, Any] = dict(bits=bits, group_size=32, row_bytes=8, sums=True)
                tiles = choose_tiles(m, n, k, num_sms=108, **size)
                assert tiles.smem_bytes(**size) <= LEAST_SMEM
                assert tiles.splits == 1 or m <= 128
    few = choose_tiles(1, 4096, 4096, num_sms=108)
    assert 4096 // few.rows * few.splits >= 2 * 108
    many = choose_tiles(4096, 4096, 4096, num_sms=108)
    assert (many.blocks, many.columns, many.splits) == (2, 64, 1)


COMPILED = {  # element, M, group, offset
    "8.0": [
        ("int4", 1, 128, None),
        ("int4", 64, 32, "zero_point"),
        ("int8", 4096, 4096, None),
        ("float8_e4m3fn", 4096, 128, None),
    ],
    "9.0": [("int4", 64, 32, "zero_point")],
}


def ptxas_job(element, m, group, offset, n=4096, k=4096):
    """A function of the arrays and their shapes, for `testing.ptxas_reports`."""
    zero = -(2 ** (ELEMENTS[element] - 1)) if offset == "minimum" else 0
    make = lambda: operands(m, n, k, group, element=element, offset=offset)  # noqa: E731
    leaves, tree = jax.tree.flatten(jax.eval_shape(make))

    def product(*leaves):
        return run(jax.tree.unflatten(tree, leaves), group, None, 108, element, zero)

    return product, leaves


@pytest.mark.skipif(not testing.ptxas_available(), reason="needs the aot extra")
@pytest.mark.parametrize("capability", COMPILED)
def test_ptxas_keeps_sums_in_registers(capability):
    jobs = [ptxas_job(*case) for case in COMPILED[capability]]
    for (report,) in testing.ptxas_reports(jobs, capability=capability):
        assert report.kernel == "mixed_gemm_sm80"
        report.check()


def test_bad_arguments_are_named():
    x, codes, scale, _, bias = operands(4, 128, 256, 64)
    packed, scale, _ = repack(codes, scale, group_size=64)
    with pytest.raises(ValueError, match=r"codes must be int32\[2, 4, 2, 256\]; found uint8"):
        mixed_gemm(x, codes, scale, n=128, group_size=64)
    with pytest.raises(ValueError, match=r"x must be one of .* found float32"):
        mixed_gemm(x.astype(jnp.float32), packed, scale, n=128, group_size=64)
    with pytest.raises(ValueError, match=r"bias must be float32\[128\]; found float32\[5\]"):
        mixed_gemm(x, packed, scale, n=128, group_size=64, bias=bias[:5])
    with pytest.raises(ValueError, match="zero must be 0 with float8_e5m2"):
        x, codes, scale, _, _ = operands(4, 128, 256, 64, element="float8_e5m2")
        packed, scale, _ = repack(codes, scale, group_size=64, element="float8_e5m2")
        mixed_gemm(x, packed, scale, n=128, group_size=64, element="float8_e5m2", zero=3)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("element", ["int2", "int4", "int8", "float8_e4m3fn"])
def test_gpu_makes_every_code_exactly(element, dtype):
    args, expected = every_code(element, dtype)
    out = jax.jit(run, static_argnums=(1, 2, 3, 4))(args, 128, None, None, element)
    np.testing.assert_array_equal(np.asarray(out, np.float32), expected)


@pytest.mark.gpu
@pytest.mark.parametrize(("element", "shape", "options", "config"), CASES, ids=str)
def test_gpu_numbers(element, shape, options, config):
    args = operands(*shape, element=element, **options)
    zero = -(2 ** (ELEMENTS[element] - 1)) if options.get("offset") == "minimum" else 0
    out = jax.jit(run, static_argnums=(1, 2, 3, 4, 5))(args, shape[-1], config, 2, element, zero)
    assert relative_error(out, reference(*args, shape[-1], element, zero)) <= TOLERANCE


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 17, 100, 4096])
@pytest.mark.parametrize(("n", "k"), [(4096, 4096), (192, 576)])
def test_gpu_matches_the_reference(m, n, k):
    for element, group, offset in (
        ("int4", 128, None),
        ("int4", 32, "zero_point"),
        ("float8_e4m3fn", k, None),
    ):
        args = operands(m, n, k, group, element=element, offset=offset)
        product = jax.jit(run, static_argnums=(1, 2, 3, 4))
        expected = reference(*args, group, element)
        out = product(args, group, None, None, element)
        for _ in range(3):  # a race would show in some run
            again = product(args, group, None, None, element)
            np.testing.assert_array_equal(np.asarray(again), np.asarray(out))
        assert relative_error(out, expected) <= TOLERANCE
