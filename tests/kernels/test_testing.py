"""The kernel-testing tools themselves: each must catch what it is there to catch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from qjax import testing
from qjax.pallas_kernels._async_copy_sm80 import commit_copies, copy_tile, wait_copies
from qjax.testing.ptxas import parse_ptxas
from qjax.testing.timing import sum_calls

needs_ptxas = pytest.mark.skipif(
    not testing.ptxas_available(), reason="compiling without a GPU needs the aot extra"
)


def register_matmul(a, b, *, synchronize=True):
    """bf16 [64, 64] @ [64, 64] with `a` doubled in registers, the left operand of wgmma."""

    def double(ctx, x):
        return x + x

    double.interpret_impl = lambda x: x + x
    inline = plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA,),
        return_type=plgpu.ShapeDtypeStruct((64, 64), jnp.bfloat16, layout=plgpu.Layout.WGMMA),
    )(double)

    def kernel(a_gmem, b_gmem, out_gmem, a_smem, b_smem, out_smem, barrier):
        plgpu.copy_gmem_to_smem(a_gmem, a_smem, barrier)
        plgpu.copy_gmem_to_smem(b_gmem, b_smem, barrier)
        if synchronize:
            plgpu.barrier_wait(barrier)

        def multiply(acc):
            plgpu.wgmma(acc, inline(plgpu.load(a_smem, layout=plgpu.Layout.WGMMA)), b_smem)
            plgpu.wgmma_wait(0)
            return acc[...]

        out_smem[...] = pl.run_scoped(multiply, plgpu.ACC((64, 64), jnp.float32))
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(out_smem, out_gmem)
        plgpu.wait_smem_to_gmem(0)
        if not synchronize:
            plgpu.barrier_wait(barrier)

    tile = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    return plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((64, 64), jnp.float32),
        num_threads=1,
        thread_name="wg",
        scratch_types=[
            plgpu.SMEM((64, 64), jnp.bfloat16, transforms=tile),
            plgpu.SMEM((64, 64), jnp.bfloat16, transforms=tile),
            plgpu.SMEM((64, 64), jnp.float32),
            plgpu.Barrier(num_arrivals=2),
        ],
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    )(a, b)


def operands():
    return [jax.random.normal(jax.random.key(i), (64, 64), jnp.bfloat16) for i in range(2)]


def test_interpret_multiplies_registers_and_runs_inlined_references():
    a, b = operands()
    with testing.interpret():
        out = register_matmul(a, b)
    expected = 2 * np.asarray(a, np.float32) @ np.asarray(b, np.float32)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_interpret_finds_a_missing_wait_and_recovers():
    a, b = operands()
    with pytest.raises(AssertionError, match="data races"), testing.interpret():
        jax.block_until_ready(register_matmul(a, b, synchronize=False))
    with testing.interpret():
        out = register_matmul(a, b)
    assert np.isfinite(out).all()


def test_lowering_reports_too_much_shared_memory():
    def kernel(x_gmem, out_gmem, smem):
        smem[...] = x_gmem[...]
        out_gmem[...] = smem[...]

    def run(x):
        return plgpu.kernel(
            kernel,
            out_type=x,
            num_threads=1,
            thread_name="wg",
            scratch_types=[plgpu.SMEM(x.shape, x.dtype)],
        )(x)

    small, large = (jax.ShapeDtypeStruct((128 * n,), jnp.float32) for n in (8, 512))
    assert "mosaic_gpu" in testing.lower_for_gpu(run, small)
    with pytest.raises(ValueError, match="exceeds available shared memory"):
        testing.lower_for_gpu(run, large)


@needs_ptxas
def test_ptxas_reports_registers():
    (reports,) = testing.ptxas_reports([(register_matmul, operands())])
    (report,) = reports
    report.check()
    assert report.kernel == "kernel"
    assert 24 <= report.registers <= 255


@needs_ptxas
def test_ptxas_errors_carry_the_compilers_output(monkeypatch):
    monkeypatch.setattr(testing.ptxas, "_environment", lambda: {"PATH": ""})
    with pytest.raises(RuntimeError, match="the GPU compiler failed"):
        testing.ptxas_reports([(register_matmul, operands())])


def test_missing_extra_is_named(monkeypatch):
    monkeypatch.setattr(testing.ptxas, "_missing", lambda: ["jax_cuda13_plugin"])
    assert not testing.ptxas_available()
    with pytest.raises(ModuleNotFoundError, match=r"jax_cuda13_plugin.*qjax\[aot\]"):
        testing.ptxas_reports([])


PTXAS_OUTPUT = """\
ptxas info    : (C7512) Potential Performance Loss: wgmma.mma_async instructions are serialized due to \
insufficient register resources for the function 'gemm_mosaic_gpu_kernel'
ptxas warning : Registers are spilled to local memory in function 'gemm_mosaic_gpu_kernel', \
1600 bytes spill stores, 1300 bytes spill loads
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'gemm_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for gemm_mosaic_gpu_kernel
    944 bytes stack frame, 1600 bytes spill stores, 1300 bytes spill loads
ptxas info    : Used 168 registers, used 16 barriers, 944 bytes cumulative stack size, 1 bytes smem
ptxas info    : Compile time = 227.051 ms
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'reduce_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for reduce_mosaic_gpu_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 1 bytes smem
ptxas info    : Compile time = 3.1 ms
"""


def test_ptxas_output_is_attributed_to_its_kernel():
    spilled, clean = parse_ptxas(PTXAS_OUTPUT)
    assert (spilled.kernel, spilled.registers) == ("gemm", 168)
    assert (spilled.spill_bytes, spilled.stack_bytes) == (2900, 944)
    assert len(spilled.serialized_wgmma) == 1
    with pytest.raises(AssertionError, match="2900"):
        spilled.check()
    assert (clean.kernel, clean.registers, clean.spill_bytes) == ("reduce", 40, 0)
    clean.check()


def record(**changes):
    fields = dict(
        date="2026-11-23",
        commit="0" * 7,
        gpu="NVIDIA H200",
        op="fp8_block_gemm",
        format="fp8_e4m3_128x128",
        shape={"m": 1, "n": 2, "k": 3},
        time_us=8.0,
    )
    return testing.BenchmarkRecord(**fields | changes)


def test_records_round_trip_and_append(tmp_path):
    path = tmp_path / "new" / "h200.jsonl"
    first, second = record(), record(peer="deepgemm", peer_time_us=12.0, gb_s=4300.0)
    testing.append_records(path, [first])
    testing.append_records(path, [second])
    assert testing.read_records(path) == [first, second]
    assert second.peer_ratio == 1.5
    assert [p.name for p in path.parent.iterdir()] == ["h200.jsonl"]


@pytest.mark.parametrize("waits_first", [True, False])
def test_asynchronous_copies_arrive_when_waited_for(waits_first):
    x = jnp.arange(1024, dtype=jnp.float32).reshape(8, 128)

    def kernel(x_gmem, out_gmem, smem):
        copy_tile(x_gmem, smem, jnp.int32(0), jnp.int32(0))
        commit_copies()
        if waits_first:
            wait_copies(0)
        out_gmem[...] = smem[...]
        wait_copies(0)

    scratch = dict(smem=plgpu.SMEM((8, 128), jnp.float32))
    with testing.interpret(detect_races=False):
        out = plgpu.kernel(kernel, out_type=x, scratch_types=scratch)(x)
    np.testing.assert_array_equal(out, x if waits_first else jnp.full_like(x, jnp.nan))


def test_unknown_gpus_are_refused():
    with pytest.raises(ValueError, match=r"capability must be one of .* found '7\.5'"):
        testing.ptxas_reports([], capability="7.5")


def test_bad_records_are_refused(tmp_path):
    with pytest.raises(ValueError, match="time_us must be positive"):
        record(time_us=float("nan"))
    path = tmp_path / "bad.jsonl"
    testing.append_records(path, [record()])
    path.write_text(path.read_text() + '{"op": "dot"}\n')
    with pytest.raises(ValueError, match=r"bad.jsonl, line 2"):
        testing.read_records(path)
    with pytest.raises(dataclasses.FrozenInstanceError):
        record().time_us = 1.0


def test_rotated_inputs_exceed_the_cache():
    args = [jnp.ones((256, 1024), jnp.float32), jnp.zeros((4,), jnp.int8)]
    sets = testing.rotate_inputs(args, cache_bytes=2**20)
    assert sum(a.nbytes for s in sets for a in s) >= 3 * 2**20
    assert len({s[0].unsafe_buffer_pointer() for s in sets}) == len(sets)
    np.testing.assert_array_equal(sets[-1][0], args[0])


def test_kernel_times_are_summed_by_call():
    assert sum_calls([1.0, 2.0, 3.0, 4.0], 2) == [3.0, 7.0]
    with pytest.raises(RuntimeError, match="equally many"):
        sum_calls([1.0, 2.0, 3.0], 2)
    if jax.default_backend() != "gpu":
        with pytest.raises(RuntimeError, match="need an NVIDIA GPU"):
            testing.measure_kernel_us(lambda x: x, [(jnp.ones(1),)])
