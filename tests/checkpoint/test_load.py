"""Loading: exact values, slices per device, memory, and every way in which a folder can be broken."""

import json
import shutil
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from references.write_folder import load_case, write_folder
from safetensors.numpy import load_file, save_file

from qjax import QArray, Sharding, make_mesh
from qjax.checkpoint import default_model_path, load, resolve
from qjax.nn import QuantizedParam

CASE = "llama3_2_tied"


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_folder(CASE, tmp_path / "model", dtype="float32")


def parameters(model) -> dict[str, jax.Array]:
    state = nnx.state(model, nnx.Param)
    return {".".join(map(str, p)): v.get_value() for p, v in nnx.to_flat_state(state)}


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("shards", [1, 3])
def test_values(tmp_path, stored, shards):
    case = load_case("qwen2")
    path = write_folder(case, tmp_path / "model", dtype=stored, shards=shards)
    found = parameters(load(path, dtype="float32", progress=False).model)
    weights = case.weights()
    assert set(found) == set(weights)
    for name, value in found.items():
        np.testing.assert_array_equal(value, weights[name], err_msg=name)
    half = parameters(load(path, progress=False).model)
    assert all(v.dtype == ml_dtypes.bfloat16 for v in half.values())


def test_generation_config_and_tokenizer_come_along(folder):
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    loaded = load(folder, progress=False)
    assert loaded.generation_config == {"eos_token_id": [2, 7]} and loaded.tokenizer == folder
    assert loaded.config["model_type"] == "llama" and loaded.recipe.kv_cache is None


@pytest.mark.parametrize("mesh", ["tensor=2", "tensor=4,data=2"])
@pytest.mark.parametrize("recipe", [None, "W4A16_G32", "FP8_BLOCK"])
def test_each_device_gets_its_slice(tmp_path, mesh, recipe):
    path = write_folder("llama3_1_rope", tmp_path / "model", dtype="float32")
    one = load(path, recipe=recipe, dtype="float32", progress=False).model
    many = load(
        path, recipe=recipe, dtype="float32", sharding=Sharding(make_mesh(mesh)), progress=False
    ).model
    kinds = (nnx.Param, QuantizedParam)
    cut = 0
    for (name, a), (_, b) in zip(
        nnx.to_flat_state(nnx.state(one, nnx.Any(*kinds))),
        nnx.to_flat_state(nnx.state(many, nnx.Any(*kinds))),
        strict=True,
    ):
        a, b = a.get_value(), b.get_value()
        dense = [
            np.asarray(x.dequantize("float32") if isinstance(x, QArray) else x) for x in (a, b)
        ]
        np.testing.assert_array_equal(*dense, err_msg=str(name))
        first = jax.tree.leaves(b)[0]
        assert len(first.sharding.device_set) == make_mesh(mesh).size
        cut += first.addressable_shards[0].data.size < first.size
    assert cut > 10


def test_default_model_stays_packed():
    """The GGUF file's INT4 weights take their four bits on the device, within 3% of the file's own size."""
    path = default_model_path()
    model = load(path, dtype="bfloat16", progress=False).model
    formats = {
        v.get_value().format.element for _, v in nnx.to_flat_state(nnx.state(model, QuantizedParam))
    }
    assert formats == {"int4", "int8"}
    leaves = jax.tree.leaves(nnx.state(model, nnx.Any(nnx.Param, QuantizedParam)))
    packed = 106_168_320 // 2 + 28_311_552  # linear layers at 4 bits, the embedding at 8
    scales = 106_168_320 // 32 * 2 * 2 + 28_311_552 // 32 * 2
    assert abs(sum(leaf.nbytes for leaf in leaves) / (packed + scales) - 1) < 0.03


def test_resolved_table_of_the_default_model():
    rows = {row.path: row for row in resolve(default_model_path(), progress=False)}
    down = rows["model.layers.29.mlp.down_proj"]
    assert down.shape == (576, 1536) and "int4" in down.weights and down.activations == "-"
    assert down.nbytes == 576 * 1536 // 2 + 576 * 48 * 4
    recipe = {r.path: r for r in resolve(default_model_path(), recipe="FP8_BLOCK", progress=False)}
    assert "float8_e4m3fn (1, 128)" in recipe["model.layers.0.mlp.up_proj"].activations


# -- broken folders


def refused(path, *parts, **options):
    with pytest.raises(ValueError) as error:
        load(path, progress=False, **options)
    for part in parts:
        assert part in str(error.value)
    return str(error.value)


def edit_config(folder, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **fields}))


def test_no_config(folder):
    (folder / "config.json").unlink()
    refused(folder, "no config.json")


def test_not_there(tmp_path):
    refused(tmp_path / "nowhere", "no such file or folder")


@pytest.mark.parametrize("keep", [4, 60, -8])
def test_truncated_safetensors(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(folder, "model.safetensors", "no valid safetensors file")


def test_truncated_gguf(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(default_model_path().read_bytes()[:5_000_000])
    refused(path, "model.gguf", "truncated")


def test_absent_shard(tmp_path):
    path = write_folder(CASE, tmp_path / "model", shards=3)
    (path / "model-00002-of-00003.safetensors").unlink()
    refused(
        path, "model-00002-of-00003.safetensors", "named in model.safetensors.index.json but absent"
    )


def test_index_that_names_other_tensors(tmp_path):
    path = write_folder(CASE, tmp_path / "model", shards=2)
    index = path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.extra.weight"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    refused(path, "has no tensor 'model.extra.weight'")


def test_unknown_model_type_and_quant_method(folder):
    edit_config(folder, model_type="gpt5")
    refused(folder, "model_type 'gpt5' is not supported")
    edit_config(folder, model_type="llama", quantization_config={"quant_method": "magic"})
    refused(folder, "quant_method 'magic' is not supported")


def test_unsupported_fields_are_named(folder):
    edit_config(folder, residual_multiplier=2.0)
    refused(folder, "unsupported fields ['residual_multiplier']")


def test_all_wrong_tensors_are_listed_at_once(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name][:-1].copy()
    tensors["model.layers.0.mlp.side_proj.weight"] = np.zeros((2, 2), np.float32)
    save_file(tensors, folder / "model.safetensors")
    message = refused(folder, "3 tensors are wrong")
    assert "model.norm.weight: missing" in message
    assert f"{name}: must have shape" in message
    assert "model.layers.0.mlp.side_proj.weight: the model has no such parameter" in message


def test_recipes_are_checked(folder):
    refused(folder, "unknown recipe 'W5'", recipe="W5")
    refused(folder, "unknown KV-cache format", kv_cache="int1")
    from qjax import QuantSpec, Recipe, Rule, qformat

    rule = Rule(("model.layers.9.mlp.up_proj",), QuantSpec(qformat("int8_channel")))
    refused(folder, "match no module of this model", recipe=Recipe((rule,)))
    fixed = Recipe((Rule(("Linear",), QuantSpec(qformat("int4_1x40"))),))
    refused(folder, "divides K", recipe=fixed)


def test_names_that_no_model_uses_are_accepted_exactly(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(8, np.float32)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()  # tied: ignored
    save_file(tensors, folder / "model.safetensors")
    load(folder, progress=False)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_corrupted_headers_raise_and_never_crash(tmp_path, data):
    source = tmp_path / "source"
    if not source.exists():
        write_folder(CASE, source, dtype="float32")
    broken = tmp_path / "broken"
    shutil.rmtree(broken, ignore_errors=True)
    shutil.copytree(source, broken)
    raw = bytearray((broken / "model.safetensors").read_bytes())
    (length,) = struct.unpack("<Q", raw[:8])
    at = data.draw(st.integers(0, 7 + length))
    value = data.draw(st.integers(0, 255))
    if raw[at] == value:
        return
    changed = raw[at]
    raw[at] = value
    (broken / "model.safetensors").write_bytes(raw)
    try:
        loaded = load(broken, dtype="float32", progress=False)
    except ValueError as error:
        assert str(broken) in str(error)
        return
    # What loads must be what was written: only metadata or spaces can have changed.
    expected = load_case(CASE).weights()
    for name, value in parameters(loaded.model).items():
        np.testing.assert_array_equal(value, expected[name], err_msg=f"{name} {at} {changed}")


_VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 10**12), st.floats(), st.text(max_size=5),
    st.lists(st.integers(), max_size=3), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)  # fmt: skip


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_corrupted_configs_raise_and_never_crash(tmp_path, data):
    source = tmp_path / "source"
    if not source.exists():
        write_folder("qwen3_yarn_bias", source, dtype="float32")
    config = json.loads((source / "config.json").read_text())
    field = data.draw(st.sampled_from(sorted(config)))
    value = data.draw(_VALUES)
    broken = tmp_path / "broken"
    shutil.rmtree(broken, ignore_errors=True)
    shutil.copytree(source, broken)
    (broken / "config.json").write_text(json.dumps({**config, field: value}))
    try:
        load(broken, dtype="float32", progress=False)
    except ValueError as error:
        assert "config.json" in str(error) or str(broken) in str(error)


PACKED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "ignore": [],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32},
        }
    },
}


def packed(name: str, shape: tuple[int, int]) -> dict[str, np.ndarray]:
    """One INT4 weight as compressed-tensors packs it."""
    n, k = shape
    base = name.removesuffix("weight")
    return {
        f"{base}weight_packed": np.full((n, k // 8), 0x12345678, np.int32),
        f"{base}weight_scale": np.ones((n, k // 32), ml_dtypes.bfloat16),
        f"{base}weight_shape": np.array(shape, np.int64),
    }


@pytest.mark.parametrize("quantized", [False, True])
def test_peak_host_memory_stays_below_twice_the_largest_tensor(tmp_path, quantized):
    """Beyond the model itself, at most two tensors at a time; of a packed one no wider copy exists."""
    script = textwrap.dedent(
        """
        import json, sys, threading, time
        import jax, numpy as np
        from safetensors.numpy import save_file
        from qjax.checkpoint import load
        folder = sys.argv[1]
        load(folder + "/warm", dtype="float32", progress=False)  # imports and compiled functions

        def resident():
            fields = dict(l.split(":") for l in open("/proc/self/status") if l.startswith("RssAnon"))
            return int(fields["RssAnon"].split()[0]) * 1024

        peak, done, base = [0], threading.Event(), resident()

        def watch():
            while not done.is_set():
                peak[0] = max(peak[0], resident())
                time.sleep(0.001)

        watcher = threading.Thread(target=watch)
        watcher.start()
        model = load(folder + "/big", dtype="float32", progress=False).model
        done.set(); watcher.join()
        from flax import nnx
        size = sum(x.nbytes for x in jax.tree.leaves(nnx.state(model)))
        print(json.dumps({"extra": peak[0] - base - size, "model": size}))
        """
    )
    config = {
        "model_type": "llama", "hidden_size": 1024, "intermediate_size": 8192,
        "num_attention_heads": 8, "num_key_value_heads": 8, "num_hidden_layers": 2,
        "vocab_size": 64, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }  # fmt: skip
    if quantized:
        config["quantization_config"] = PACKED
    for name, width in (("warm", 64), ("big", 16384)):
        folder = tmp_path / name
        folder.mkdir()
        sizes = {**config, "intermediate_size": width}
        (folder / "config.json").write_text(json.dumps(sizes))
        d = config["hidden_size"]
        tensors = {"model.embed_tokens.weight": (64, d), "model.norm.weight": (d,)}
        for i in range(2):
            p = f"model.layers.{i}."
            tensors |= {p + f"self_attn.{n}_proj.weight": (d, d) for n in "qkvo"}
            tensors |= {p + f"mlp.{n}_proj.weight": (width, d) for n in ("gate", "up")}
            tensors |= {p + "mlp.down_proj.weight": (d, width)}
            tensors |= {p + f"{n}_layernorm.weight": (d,) for n in ("input", "post_attention")}
        arrays = {}
        for tensor, shape in tensors.items():
            pack = quantized and "_proj" in tensor
            plain = {tensor: np.ones(shape, ml_dtypes.bfloat16)}
            arrays |= packed(tensor, shape) if pack else plain
        save_file(arrays, folder / "model.safetensors")
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout)
    # Plain: as float32, the dtype that it is loaded in. A bfloat16 copy of a packed one would be 64 MiB.
    largest = 16384 * 2048 // 2 if quantized else 16384 * 2048 * 4
    assert found["extra"] < 2 * largest, found
