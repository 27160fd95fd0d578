"""The benchmark scripts, as far as a CPU can tell: cases, their checks, records, tables and the plot."""

from pathlib import Path

import bench_kernels as bench
import jax
import pytest
import render_benchmarks as render

from qjax import testing
from qjax.ops._dispatch import simulate_gpu

ROOT = Path(__file__).parents[2]


PEERS = ROOT / "benchmarks" / "peers.jsonl"
STAMP = {"date": "2026-11-23", "commit": "abc", "gpu": "NVIDIA H200"}
CEILINGS = {"bf16": 800.0, "fp8": 1500.0, "copy": 4300.0}


@pytest.fixture
def on_cpu(monkeypatch):
    """Kernels run in interpret mode on two SMs, and every call takes 10 us."""
    monkeypatch.setattr(bench.testing, "measure_kernel_us", lambda fn, sets, calls: 10.0)
    monkeypatch.setattr(bench.testing, "rotate_inputs", lambda args: [args])
    device = jax.devices()[0]
    monkeypatch.setattr(jax, "devices", lambda *a: [Device(device)])


class Device:
    core_count = 2
    device_kind = "NVIDIA H200"

    def __init__(self, device):
        self._device = device

    def __getattr__(self, name):
        return getattr(self._device, name)


@pytest.mark.parametrize("op", ["fp8_block_gemm", "fp8_rowwise_gemm"])
def test_a_products_record(op, on_cpu):
    case = bench.fp8_gemm_case(op, 16, 136, 256)
    with testing.interpret(detect_races=False):
        record = bench.measure(case, CEILINGS, {}, STAMP, calls=3)
    assert 0 < record.error <= 2e-3
    assert record.tflops == pytest.approx(2 * 16 * 136 * 256 / 10 * 1e-6)
    scales = 4 * (16 + 136) if op == "fp8_rowwise_gemm" else 4 * (2 * 16 + 2 * 2)
    expected_bytes = 16 * 256 + 136 * 256 + 2 * 16 * 136 + scales
    assert record.gb_s == pytest.approx(expected_bytes / 10 * 1e-3)
    assert record.ceiling_fraction == pytest.approx(record.gb_s / 4300)
    assert record.peer is None


@pytest.mark.parametrize(("format", "nbytes"), [("bf16", 1152), ("fp8_e4m3_1x128", 656)])
def test_a_record_of_latent_attention(format, nbytes, on_cpu):
    case = bench.Case(**bench.latent.decode_case(format, 1, 64, 8))
    with testing.interpret(detect_races=False), simulate_gpu(num_sms=2):
        record = bench.measure(case, CEILINGS, {}, STAMP, calls=3)
    assert 0 < record.error <= 5e-3
    assert record.gb_s == pytest.approx((64 * nbytes + 8 * 2176) / 10 * 1e-3)


def test_a_record_of_the_caches_write(on_cpu):
    case = bench.Case(**bench.cache_write.write_case("fp8_e4m3", 1, 2))
    with testing.interpret(detect_races=False), simulate_gpu(num_sms=2):
        record = bench.measure(case, CEILINGS, {}, STAMP, calls=3)
    assert record.error < 1e-3
    assert record.gb_s == pytest.approx(2 * (16384 + 16 * 384 + 512) / 10 * 1e-3)


@pytest.mark.parametrize("gated", [True, False])
def test_a_record_of_experts(gated, on_cpu):
    case = bench.Case(**bench.experts.grouped_case("mxfp4", 4, 2, 64, 128, 3, gated=gated))
    with testing.interpret(detect_races=False), simulate_gpu(num_sms=2):
        record = bench.measure(case, CEILINGS, {}, STAMP, calls=3)
    assert 0 < record.error <= 2.5e-3
    assert record.tflops == pytest.approx(2 * (1 + gated) * 6 * 64 * 128 / 10 * 1e-6)


def test_records_of_training(on_cpu):
    cases = [
        bench.training.wgrad_case(32, 64, 128, add=True),
        bench.training.quantize_case(32, 64),
        bench.training.weight_case(64, 128),
    ]
    with testing.interpret(detect_races=False):
        records = [bench.measure(bench.Case(**c), CEILINGS, {}, STAMP, calls=3) for c in cases]
    wgrad, *quantizers = records
    assert 0 < wgrad.error <= 1e-5
    assert wgrad.tflops == pytest.approx(2 * 32 * 64 * 128 / 10 * 1e-6)
    scales = 4 * (64 + 128)
    assert wgrad.gb_s == pytest.approx((32 * (64 + 128) + scales + 8 * 64 * 128) / 10 * 1e-3)
    assert all(0.01 < quantizer.error < 0.03 for quantizer in quantizers)


def test_a_record_of_the_ampere_product(on_cpu):
    case = bench.Case(**bench.ampere.ampere_case("int4_1x32_min", 3, 64, 128))
    with testing.interpret(detect_races=False):
        record = bench.measure(case, CEILINGS, {}, STAMP, calls=3)
    assert record.op == "mixed_gemm_sm80" and 0 < record.error <= 2e-3


@pytest.mark.parametrize("name", bench.w4a8.X_DTYPES)
def test_a_w4a8_products_record(name, on_cpu):
    case = bench.Case(**bench.w4a8.product_case(name, 3, 64, 256))
    with testing.interpret(detect_races=False):
        record = bench.measure(case, CEILINGS, {}, STAMP, calls=3)
    assert 0 < record.error <= 2e-3
    expected_bytes = 64 * 128 + 2 * 64 * 2 + 3 * (256 + 2 * 64 + 4)
    assert record.gb_s == pytest.approx(expected_bytes / 10 * 1e-3)
    tilings = bench.w4a8.tilings(name, 16, 4096, 4096, num_sms=132)
    assert len(tilings) > 3 and all(us > 3 for us, _ in tilings)


def test_records_of_the_indexers_logits(on_cpu):
    makers = (
        (bench.indexer.prefill_case, (16, 200, 64, True)),
        (bench.indexer.paged_case, (1, 1, 64)),
    )
    for (make, sizes), seen in zip(makers, (185 * 16 + 120, 64), strict=True):
        case = bench.Case(**make(*sizes))
        with testing.interpret(detect_races=False), simulate_gpu(num_sms=2):
            record = bench.measure(case, CEILINGS, {}, STAMP, calls=3)
        assert record.error <= 1e-5
        assert record.tflops == pytest.approx(2 * 64 * 128 * seen / 10 * 1e-6)


@pytest.mark.parametrize("op", ["fp8_quantize_1x128", "fp8_quantize_per_token"])
def test_a_quantizers_record(op, on_cpu):
    with testing.interpret(detect_races=False):
        record = bench.measure(bench.quantize_case(op, 8, 512), CEILINGS, {}, STAMP, calls=3)
    assert 0.01 < record.error < 0.03
    assert record.tflops is None


def test_peers_are_found_by_op_format_and_shape():
    peers = testing.read_peers(PEERS)
    assert len(peers) > 400
    fastest = testing.fastest_peer(
        peers, "fp8_block_gemm", "fp8_e4m3_128x128", {"m": 4096, "n": 7168, "k": 16384}
    )
    assert (fastest.peer, fastest.time_us) == ("DeepGEMM", 682.0)
    for op, fmt in {(p.op, p.format) for p in peers}:
        assert testing.fastest_peer(peers, op, fmt, {"m": 3}) is None


def test_every_op_has_its_cases():
    one, two = bench.makers((16,)), bench.makers((1, 16))
    assert tuple(one) == bench.OPS and all(one.values())
    by_tokens = {op for op in one if len(one[op]) < len(two[op])}
    assert by_tokens == {
        *("fp8_block_gemm", "fp8_rowwise_gemm", "int4_gemm", "mixed_gemm"),
        *("mixed_gemm_sm80", "fp8_quantize_1x128", "fp8_quantize_per_token"),
    }
    assert len(two["int4_gemm"]) == 2 * 6 * 2
    assert len(two["fp8_block_grouped_gemm"]) == 8 + 5
    assert len(two["paged_attention"]) == 4 * 13


def test_makers_make_the_case_that_was_named():
    cases = bench.makers((3,))
    case = cases["fp8_quantize_per_token"][0]()
    assert case.op == "fp8_quantize_per_token" and case.shape == {"m": 3, "k": 2048}
    case = cases["int4_gemm"][1]()
    assert (case.format, case.shape) == ("int4_1x32", {"m": 3, "n": 4096, "k": 4096})


def test_an_int4_products_record(on_cpu):
    case = bench.int4_case(4, 128, 256, 64)
    with testing.interpret(detect_races=False):
        record = bench.measure(case, CEILINGS, {}, STAMP, calls=3)
    assert 0 < record.error <= 2e-3
    assert record.format == "int4_1x64"
    expected_bytes = 128 * 128 + 2 * (4 * 256 + 4 * 128 + 128 * 4)
    assert record.gb_s == pytest.approx(expected_bytes / 10 * 1e-3)


@pytest.mark.parametrize(("format", "nbytes"), [("fp8_e4m3_tensor", 128), ("nvfp4", 72)])
def test_a_decode_steps_record(format, nbytes, on_cpu):
    case = bench.Case(**bench.decode.decode_case(format, 1, 64))
    with testing.interpret(detect_races=False):
        record = bench.measure(case, CEILINGS, {}, STAMP, calls=3)
    assert 0 < record.error <= 3e-3
    assert record.gb_s == pytest.approx((2 * 64 * 8 * nbytes + 4 * 32 * 128) / 10 * 1e-3)


def test_it_refuses_to_run_without_a_gpu():
    if jax.default_backend() == "gpu":
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit, match="needs a Hopper GPU; JAX's default device is a cpu"):
        bench.main([])


def records():
    fields = {"op": "fp8_block_gemm", "format": "fp8_e4m3_128x128", **STAMP}
    old = testing.BenchmarkRecord(**fields, shape={"m": 1, "n": 2, "k": 3}, time_us=99.0)
    new = testing.BenchmarkRecord(
        **fields,
        shape={"m": 1, "n": 2, "k": 3},
        time_us=8.0,
        tflops=100.0,
        gb_s=4000.0,
        ceiling_fraction=0.93,
        error=1.7e-3,
        peer="DeepGEMM",
        peer_time_us=12.0,
    )
    return [old, new]


def test_tables_show_the_latest_record():
    text = render.tables(records())
    row = "| 1 | 2 | 3 | 8.0 | 100 | 4000 | 93% | 1.7e-03 | DeepGEMM | 12.0 | 1.50 |"
    assert row in text
    assert "99.0" not in text
    assert "Geometric mean of the ratios: 1.50; least: 1.50." in text


def test_the_plot_is_a_picture(tmp_path):
    path = tmp_path / "roofline.png"
    render.plot_roofline(records(), path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert [p.name for p in tmp_path.iterdir()] == ["roofline.png"]
