"""Exported folders: their tensors and configs against plain NumPy, and what cannot be exported."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoint.exported import decode, read_tensors
from flax import nnx
from references.write_exports import CONFIG, build, cases, int_spec

from qjax import nn
from qjax.checkpoint import _encode, _export, _export_config, _model_tensors
from qjax.checkpoint._export import export
from qjax.checkpoint._safetensors import SafetensorsFile
from qjax.checkpoint.schemes import parse_quantization
from qjax.formats import FORMATS, qformat
from qjax.qarray import QArray
from qjax.quantization import quantize
from qjax.recipe import SCHEMES, QuantSpec, Recipe, Rule, kv_cache_format
from qjax.sharding import Sharding, make_mesh

CASES = cases()
SMALL = {**CONFIG, "num_hidden_layers": 1, "vocab_size": 64}


def linear_recipe(spec: QuantSpec) -> Recipe:
    return Recipe((Rule(("Linear",), spec),), ("lm_head",))


def quantized_weights(model: nnx.Module) -> dict[str, QArray]:
    found = {}
    for path, module in nn.modules(model):
        weight = getattr(module, "weight", None)
        if isinstance(weight, nn.QuantizedParam):
            found[path] = weight.get_value()
    return found


def parts_of(tensors: dict, path: str) -> dict:
    prefix = f"{path}."
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


@pytest.mark.parametrize("name", [n for n in CASES if n != "ct_mixed"])
def test_exported_tensors_decode_to_the_same_weights(tmp_path, name):
    format, recipe = CASES[name]
    model = build(SMALL, recipe)
    folder = export(
        model, tmp_path / "x", format=format, source=SMALL, kv_cache=recipe.kv_cache, progress=False
    )
    tensors = read_tensors(folder)
    config = json.loads((folder / "config.json").read_text())
    weights = quantized_weights(model)
    assert len(weights) == 7
    for path, w in weights.items():
        got = decode(parts_of(tensors, path), config["quantization_config"])
        np.testing.assert_array_equal(got, w.dequantize("float32"), err_msg=path)
    plain = model.model.norm.weight.get_value()
    np.testing.assert_array_equal(tensors["model.norm.weight"], plain)
    assert tensors["lm_head.weight"].shape == (64, 256)
    assert {k: v for k, v in config.items() if k not in ("quantization_config", "dtype")} == SMALL


@pytest.mark.parametrize("name", list(CASES))
def test_the_packages_own_parsers_read_the_same_parts(tmp_path, name):
    """Bit for bit: codes, scales, zero points, and the spec that the config states."""
    format, recipe = CASES[name]
    model = build(CONFIG, recipe)
    folder = export(
        model,
        tmp_path / "x",
        format=format,
        source=CONFIG,
        kv_cache=recipe.kv_cache,
        progress=False,
    )
    tensors, file = read_tensors(folder), SafetensorsFile(folder / "model.safetensors")
    stated = json.loads((folder / "config.json").read_text())["quantization_config"]
    quantization = parse_quantization(stated, "config.json")
    assert quantization.kv_cache == recipe.kv_cache
    groups = quantization.resolve(nn.quantizable(model))
    weights = quantized_weights(model)
    assert groups.keys() == weights.keys()
    for path, w in weights.items():
        group = groups[path]
        names = group.codec.tensor_names(path, tensors)
        infos = {short: file.infos[full] for short, full in names.items()}
        complete = group.codec.complete(group.spec.weights, infos, path)
        assert complete == w.format, path
        mine = {short: tensors[full] for short, full in names.items()}
        parts = group.codec.decode(mine, complete, w.shape)
        layer = dict(nn.modules(model))[path]
        scale = parts.pop("activation_scale", None)
        assert (scale is None) == (layer.activation_scale is None)
        activations = layer.activation_format
        if activations is not None:  # the floor of amax is the library's own, no config states it
            activations = dataclasses.replace(activations, amax_min=group.spec.activations.amax_min)
        assert group.spec.activations == activations
        want = {part: getattr(w, part) for part in _model_tensors.PARTS}
        want = {part: np.asarray(x) for part, x in want.items() if x is not None}
        assert parts.keys() == want.keys()
        for part, x in want.items():
            assert parts[part].dtype == x.dtype and parts[part].shape == x.shape, (path, part)
            assert parts[part].tobytes() == x.tobytes(), (path, part)


def test_config_groups_name_the_smaller_sets_first():
    format, recipe = CASES["ct_mixed"]
    assert format == "compressed-tensors"
    specs = {p: s for p, s in recipe.resolve(nn.quantizable(build(CONFIG, Recipe()))).items()}
    kinds = dict.fromkeys(specs, "Linear") | {
        "lm_head": "Linear",
        "model.embed_tokens": "Embedding",
    }
    config = _export_config.compressed_tensors_config(specs, kinds, [], None)
    first, last = config["config_groups"].values()
    assert config["format"] == "mixed-precision"
    assert first["format"] == "float-quantized" and last["format"] == "pack-quantized"
    assert first["targets"] == [
        "model.layers.0.self_attn.o_proj",
        "model.layers.1.mlp.down_proj",
        "model.layers.1.mlp.gate_proj",
        "model.layers.1.mlp.up_proj",
    ]
    assert last["targets"] == ["Linear"] and config["ignore"] == ["lm_head"]
    assert last["weights"]["symmetric"] is False and last["weights"]["group_size"] == 128
    assert first["input_activations"]["strategy"] == "token"


def test_targets_are_few_and_exact():
    experts = [f"model.layers.{i}.mlp.experts.{e}.up_proj" for i in (1, 2) for e in range(64)]
    rest = ["model.layers.0.mlp.up_proj", "lm_head"]
    every = r"re:model\.layers\.\d+\.mlp\.experts\.\d+\.up_proj$"
    assert _export_config.compress_targets(experts, rest) == [every]
    one_layer = _export_config.compress_targets(experts[:64], experts[64:])
    assert one_layer == [r"re:model\.layers\.1\.mlp\.experts\.\d+\.up_proj$"]
    assert _export_config.compress_targets(experts[:2], experts[2:]) == experts[:2]


def test_activations_are_described():
    args = {
        n: _export_config.activation_args(s.activations, "x")
        for n, s in SCHEMES.items()
        if s.activations
    }
    assert args["FP8_BLOCK"]["group_size"] == 128 and args["FP8_BLOCK"]["dynamic"] is True
    assert args["FP8"]["strategy"] == "tensor" and args["FP8"]["dynamic"] is False
    assert args["MXFP8"]["scale_dtype"] == "torch.uint8"
    assert args["W4A8"] == args["INT8"] and args["INT8"]["type"] == "int"
    static = dataclasses.replace(SCHEMES["NVFP4"].activations, static=True)
    assert _export_config.activation_args(static, "x")["dynamic"] == "local"


def test_shards_hold_at_most_their_size_and_an_index(tmp_path):
    model = build(SMALL, linear_recipe(SCHEMES["W4A16"]))
    folder = export(model, tmp_path / "x", source=SMALL, max_shard_bytes=100_000, progress=False)
    files = sorted(folder.glob("model-*.safetensors"))
    assert len(files) > 2 and files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    whole = export(model, tmp_path / "y", source=SMALL, progress=False)
    one, many = read_tensors(whole), read_tensors(folder)
    assert one.keys() == many.keys()
    assert all(one[n].tobytes() == many[n].tobytes() for n in one)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in one.values())
    assert index["weight_map"].keys() == one.keys()
    assert max(f.stat().st_size for f in files) <= 100_000 + 20_000


def test_only_one_tensor_is_on_the_host_at_a_time(tmp_path, monkeypatch):
    """Nothing is encoded before its turn, and nothing is kept after it."""
    alive, most = [0], [0]
    make = _export._write

    def counting(writer, units, *rest):
        for unit in units:
            original = unit.make

            def tracked(original=original):
                arrays = original()
                most[0] = max(most[0], sum(a.nbytes for a in arrays.values()))
                return arrays

            object.__setattr__(unit, "make", tracked)
        make(writer, units, *rest)

    monkeypatch.setattr(_export, "_write", counting)
    model = build(SMALL, linear_recipe(SCHEMES["W4A16"]))
    export(model, tmp_path / "x", source=SMALL, progress=False)
    largest = SMALL["hidden_size"] * SMALL["vocab_size"] * 4
    assert 0 < most[0] <= largest and not alive[0]


@pytest.mark.parametrize("scheme", ["FP8_BLOCK", "W4A16"])
def test_blocks_that_a_mesh_refined_are_merged(tmp_path, scheme):
    recipe = linear_recipe(SCHEMES[scheme])
    whole = build(SMALL, recipe)
    from qjax.checkpoint._orbax import restore, save

    save(tmp_path / "c", whole)
    sharded = restore(tmp_path / "c", sharding=Sharding(make_mesh("tensor=2"))).model
    down = sharded.model.layers[0].mlp.down_proj.weight.get_value()
    assert down.format.block_shape[1] == 64 and len(down.qvalue.addressable_shards) == 2
    a = export(whole, tmp_path / "a", source=SMALL, progress=False)
    b = export(sharded, tmp_path / "b", source=SMALL, progress=False)
    assert (a / "config.json").read_bytes() == (b / "config.json").read_bytes()
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()


class Experts(nnx.Module):
    """A model of one stack of experts, a router and nothing else."""

    def __init__(self, spec: QuantSpec, *, stacked: bool, mesh: str | None = None):
        name = "gate_up_proj" if stacked else "gate_proj"
        path = f"experts.{name}"
        self.sharding = Sharding() if mesh is None else Sharding(make_mesh(mesh))
        paths = [path] if stacked else [f"experts.{e}.{name}" for e in range(4)]
        context = nn.Context(dict.fromkeys(paths, spec), "bfloat16", self.sharding)
        layer = nn.ExpertLinear(
            4, 64, 32, path, context, use_bias=True, stacked_in_checkpoint=stacked, transposed_in_checkpoint=stacked,
            expert_axis=self.sharding.axis("expert", 4),
        )  # fmt: skip
        self.experts = nnx.Dict({name: layer})
        self.gate = nnx.Dict(
            {"weight": nn.abstract_param((4, 64), "bfloat16", self.sharding, (None, None))}
        )
        self.dtype = "bfloat16"
        nn.initialize(self, jax.random.key(0))


@pytest.mark.parametrize("mesh", [None, "expert=2,tensor=2"])
def test_experts_are_written_one_by_one(tmp_path, mesh):
    model = Experts(SCHEMES["W4A16_G32"], stacked=False, mesh=mesh)
    folder = export(model, tmp_path / "x", source={"model_type": "x"}, progress=False)
    tensors = read_tensors(folder)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    w = model.experts["gate_proj"].weight.get_value().dequantize("float32")
    for e in range(4):
        got = decode(parts_of(tensors, f"experts.{e}.gate_proj"), config)
        np.testing.assert_array_equal(got, w[e])
        assert tensors[f"experts.{e}.gate_proj.bias"].shape == (32,)
    assert config["config_groups"]["group_0"]["targets"] == ["Linear"]


def test_gpt_oss_experts_are_written_as_blocks(tmp_path):
    model = Experts(SCHEMES["MXFP4A16"], stacked=True)
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj: .* one tensor per expert"):
        export(model, tmp_path / "x", source={"model_type": "x"}, progress=False)
    folder = export(
        model, tmp_path / "x", format="mxfp4", source={"model_type": "x"}, progress=False
    )
    tensors = read_tensors(folder)
    blocks, scales = tensors["experts.gate_up_proj_blocks"], tensors["experts.gate_up_proj_scales"]
    assert blocks.shape == (4, 32, 2, 16) and scales.shape == (4, 32, 2)
    assert tensors["experts.gate_up_proj_bias"].shape == (4, 32)
    w = model.experts["gate_up_proj"].weight.get_value()
    assert blocks.tobytes() == np.asarray(w.qvalue).tobytes()
    assert scales.dtype == np.uint8 and scales.tobytes() == np.asarray(w.scale).tobytes()
    plain = export(model, tmp_path / "y", format="f32", source={"model_type": "x"}, progress=False)
    got = read_tensors(plain)["experts.gate_up_proj"]
    np.testing.assert_array_equal(got.swapaxes(1, 2), w.dequantize("float32"))


@pytest.mark.parametrize("format", ["bf16", "f16", "f32"])
def test_plain_export_dequantizes(tmp_path, format):
    model = build(SMALL, linear_recipe(SCHEMES["W4A16"]), dtype="bfloat16")
    folder = export(model, tmp_path / "x", format=format, source=SMALL, progress=False)
    config = json.loads((folder / "config.json").read_text())
    dtype = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}[format]
    assert config["dtype"] == dtype and "quantization_config" not in config
    tensors = read_tensors(folder)
    assert {t.dtype.name for t in tensors.values()} == {dtype}
    for path, w in quantized_weights(model).items():
        np.testing.assert_array_equal(
            tensors[f"{path}.weight"], w.dequantize("float32").astype(dtype)
        )


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq"])
def test_act_order_is_kept(tmp_path, format):
    model = build(SMALL, linear_recipe(int_spec(4, 64)))
    for layer in quantized_weights(model):
        module = dict(nn.modules(model))[layer]
        w = module.weight.get_value()
        order = np.random.default_rng(1).permutation(w.shape[1]).astype(np.int32)
        module.weight.set_value(dataclasses.replace(w, column_perm=jnp.asarray(order)))
    folder = export(model, tmp_path / "x", format=format, source=SMALL, progress=False)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    if format == "gptq":
        assert config["desc_act"] is True and config["checkpoint_format"] == "gptq"
    else:
        assert config["config_groups"]["group_0"]["weights"]["actorder"] == "group"
    tensors = read_tensors(folder)
    for path, w in quantized_weights(model).items():
        got = decode(parts_of(tensors, path), config)
        np.testing.assert_array_equal(got, w.dequantize("float32"))


def test_gptq_zero_of_zero_needs_version_2(tmp_path):
    model = build(SMALL, linear_recipe(int_spec(4, 64, asym=True)))
    path = "model.layers.0.self_attn.q_proj"
    module = dict(nn.modules(model))[path]
    w = module.weight.get_value()
    module.weight.set_value(dataclasses.replace(w, zero_point=jnp.full_like(w.zero_point, -8)))
    folder = export(model, tmp_path / "x", format="gptq", source=SMALL, progress=False)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["checkpoint_format"] == "gptq_v2"
    got = decode(parts_of(read_tensors(folder), path), config)
    np.testing.assert_array_equal(got, module.weight.get_value().dequantize("float32"))
    module.weight.set_value(
        dataclasses.replace(w, zero_point=w.zero_point.at[0, 0].set(8).at[1, 0].set(-8))
    )
    with pytest.raises(ValueError, match=r"q_proj: a zero point of .*16 is outside"):
        export(model, tmp_path / "y", format="gptq", source=SMALL, progress=False)
    assert not (tmp_path / "y").exists() and len(list(tmp_path.iterdir())) == 1


def test_mixed_gptq_states_every_exception(tmp_path):
    rules = (
        Rule((r"re:.*\.o_proj",), int_spec(8, 64, asym=True)),
        Rule((r"re:.*self_attn.*",), int_spec(4, 64)),
        Rule((r"re:.*(up|gate)_proj",), int_spec(4, 64)),
    )
    model = build(CONFIG, Recipe(rules, ("lm_head",)))
    folder = export(model, tmp_path / "x", format="gptq", source=CONFIG, progress=False)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (config["bits"], config["group_size"], config["sym"]) == (4, 64, True)
    assert config["dynamic"] == {
        r"+:model\.layers\.\d+\.self_attn\.o_proj$": {
            "bits": 8, "group_size": 64, "sym": False, "desc_act": False,
        },
        r"-:model\.layers\.\d+\.mlp\.down_proj$": {},
    }  # fmt: skip


@pytest.mark.parametrize("multiplier", [1.0, 0.75, 3e-5, 1.0001, 7.1e-4, 0.9999999])
def test_divisor_is_exact_wherever_one_exists(multiplier):
    one = np.float32(1)
    d = np.float32(one / np.float32(multiplier))
    reachable = one / d  # some float's reciprocal
    assert one / _encode.divisor(np.array([reachable]))[0] == reachable


def test_divisor_of_a_float_that_is_no_reciprocal_is_the_nearest_and_warned(caplog):
    m = np.float32(1.5)
    while True:
        m = np.nextafter(m, np.float32(2))
        near = [np.nextafter(1 / m, np.float32(b)) for b in (0, 1)] + [1 / m]
        if all(np.float32(1) / np.float32(d) != m for d in near):
            break
    d = _encode.divisor(np.array([m], np.float32))
    assert "no reciprocal" in caplog.text
    assert abs(1 / np.float64(d[0]) - m) <= np.spacing(m)


def test_kv_scales(tmp_path):
    model = build(SMALL, Recipe())
    attention = model.model.layers[0].self_attn
    attention.k_scale.set_value(jnp.array([0.5, 0.25], jnp.float32))
    head = kv_cache_format("fp8_e4m3_head")
    folder = export(model, tmp_path / "x", source=SMALL, kv_cache=head, progress=False)
    tensors = read_tensors(folder)
    prefix = "model.layers.0.self_attn"
    assert tensors[f"{prefix}.k_scale"].tolist() == [[[0.5]], [[0.25]]]
    assert tensors[f"{prefix}.v_scale"].tolist() == [[[1.0]], [[1.0]]]
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["format"] == "dense" and config["config_groups"] == {}
    assert config["kv_cache_scheme"]["strategy"] == "attn_head"
    with pytest.raises(ValueError, match="k_scale differs between heads"):
        tensor = kv_cache_format("fp8_e4m3")
        export(model, tmp_path / "y", source=SMALL, kv_cache=tensor, progress=False)
    with pytest.raises(ValueError, match="kv_cache_scheme holds fp8_e4m3"):
        nvfp4 = kv_cache_format("nvfp4")
        export(model, tmp_path / "y", source=SMALL, kv_cache=nvfp4, progress=False)


def test_tied_head_is_not_written(tmp_path):
    config = {**SMALL, "tie_word_embeddings": True}
    recipe = Recipe((Rule(("Linear",), SCHEMES["W4A16"]),))
    tensors = read_tensors(
        export(build(config, recipe), tmp_path / "x", source=config, progress=False)
    )
    assert "model.embed_tokens.weight" in tensors and "lm_head.weight" not in tensors


def test_files_are_carried_over(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json", "merges.txt",
                 "quantize_config.json", "model.safetensors", "model.safetensors.index.json"):  # fmt: skip
        (source / name).write_text(name)
    (source / "config.json").write_text(json.dumps({**SMALL, "torch_dtype": "float16"}))
    folder = export(
        build(SMALL, Recipe()), tmp_path / "x", format="f32", source=source, progress=False
    )
    names = {f.name for f in folder.iterdir()}
    carried = {"tokenizer.json", "chat_template.jinja", "generation_config.json", "merges.txt"}
    assert names == {"config.json", "model.safetensors", *carried}
    assert json.loads((folder / "config.json").read_text())["torch_dtype"] == "float32"


MINIMUM = QuantSpec(qformat("int4_1x32_min"))


@pytest.mark.parametrize(
    ("format", "spec", "message"),
    [
        ("ct", SCHEMES["W4A16"], "unknown format 'ct'"),
        ("compressed-tensors", MINIMUM, r"_proj: .* no minimum per group .* requantize"),
        ("compressed-tensors", QuantSpec(FORMATS["fp8_e5m2_channel"]), "no float8_e5m2 weights"),
        ("gptq", SCHEMES["FP8_BLOCK"], r"_proj: format 'gptq' needs \(2, 3, 4, 8\)-bit integers"),
        ("gptq", SCHEMES["W4A8"], "unquantized activations"),
        ("gptq", QuantSpec(FORMATS["int4_1x64"]), "float16 or bfloat16 scales"),
        ("awq", int_spec(8, 64), r"format 'awq' needs \(4,\)-bit"),
        ("fp8", SCHEMES["FP8_DYNAMIC"], "128x128 blocks or per tensor"),
        ("fp8", QuantSpec(FORMATS["fp8_e4m3_128x128"]), "needs float8_e4m3fn activations"),
        ("mxfp4", SCHEMES["MXFP4A16"], "GPT-OSS's stacked experts"),
    ],
)
def test_unfit_formats_are_refused_with_module_and_fix(tmp_path, format, spec, message):
    model = build(SMALL, linear_recipe(spec))
    with pytest.raises(ValueError, match=message):
        export(model, tmp_path / "x", format=format, source=SMALL, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_other_mistakes_are_named(tmp_path):
    model = build(SMALL, Recipe())
    with pytest.raises(ValueError, match="no module of this one is quantized"):
        export(model, tmp_path / "x", source=SMALL)
    with pytest.raises(ValueError, match=r"config\.json has to come from"):
        export(model, tmp_path / "x", format="bf16")
    with pytest.raises(ValueError, match=r"has no config\.json"):
        export(model, tmp_path / "x", format="bf16", source=tmp_path)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "keep").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not empty"):
        export(model, tmp_path / "x", format="bf16", source=SMALL, progress=False)
    assert (tmp_path / "x" / "keep").read_text() == "mine"
    export(model, tmp_path / "x", format="bf16", source=SMALL, overwrite=True, progress=False)
    assert {f.name for f in (tmp_path / "x").iterdir()} == {"config.json", "model.safetensors"}
    assert [f.name for f in tmp_path.iterdir()] == ["x"]


def test_a_failure_leaves_nothing(tmp_path, monkeypatch):
    model = build(SMALL, linear_recipe(SCHEMES["W4A16"]))
    monkeypatch.setattr(_export, "write_config", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(model, tmp_path / "x", source=SMALL, progress=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bits", range(2, 9))
def test_unsigned_codes_are_those_of_the_quantizer(bits):
    w = quantize(jax.random.normal(jax.random.key(bits), (5, 64)), f"int{bits}_1x32")
    codes = _encode.unsigned_codes(jax.tree.map(np.asarray, w)).astype(np.float32) - 2 ** (bits - 1)
    scale = np.repeat(np.asarray(w.scale), 32, axis=1)
    np.testing.assert_array_equal(codes * scale, w.dequantize("float32"))
    words = _encode.pack_words(_encode.unsigned_codes(jax.tree.map(np.asarray, w)), bits)
    assert words.shape == (5, 2 * bits) and words.dtype == np.int32
