"""Generation with a tiny random model: against a plain loop without a cache, and what ends a completion."""

import dataclasses
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from qjax import Sharding, make_mesh, nn
from qjax.generation import Completion, Generator
from qjax.generation._schedule import bucket, run
from qjax.generation._sequence import Sequence
from qjax.models import llama
from qjax.recipe import QuantSpec, recipe
from qjax.sampling import SamplingArrays, SamplingParams, sample
from qjax.tokenizer import Tokenizer

CONFIG = {
    "model_type": "llama",
    "vocab_size": 272,
    "hidden_size": 64,
    "intermediate_size": 128,  # two shards of whole groups
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 320,
    "tie_word_embeddings": True,
}
EOS = 257


@cache
def tiny(mesh: str | None = None, scheme: str = "bf16"):
    """Random weights large enough that greedy continuations do not settle on one token."""
    config = llama.Config.from_hf(CONFIG)
    sharding = Sharding(make_mesh(mesh)) if mesh else Sharding()
    kinds = nn.quantizable(llama.Model(config, dtype="float32"))
    specs: dict[str, QuantSpec] = recipe(scheme).resolve(kinds)
    model = llama.Model(config, specs=specs, dtype="float32", sharding=sharding)
    nn.initialize(model, jax.random.key(3), scale=0.3)
    return model


@cache
def tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True) for t in ("<s>", "</s>")])
    return Tokenizer(
        backend,
        bos_id=256,
        eos_ids={EOS},
        chat_template="<s>{% for m in messages %}{{ m['content'] }}{% endfor %}",
    )


def generator(**options) -> Generator:
    return Generator(tiny(), tokenizer(), **options)


@cache
def shared() -> Generator:
    return generator(batch_size=4)


@cache
def next_logits(width: int = 128):
    run = jax.jit(lambda ids, n: tiny()(ids, None, n, last_token_only=True)[0][0])
    return lambda ids: run(jnp.asarray([ids + [0] * (width - len(ids))]), jnp.asarray([len(ids)]))


draw = jax.jit(sample)


def plain_loop(prompt: list[int], params: SamplingParams) -> list[int]:
    """The definition: the whole sequence through the model for every token, one prompt at a time."""
    ids = list(prompt)
    arrays = jax.tree.map(jnp.asarray, SamplingArrays.of([params]))
    for _ in range(params.max_new_tokens):
        logits = next_logits()(ids)[None]
        seen = np.zeros(logits.shape, bool)
        seen[0, ids] = True
        position = jnp.asarray([len(ids)], jnp.int32)
        ids.append(int(draw(logits, arrays, position, jnp.asarray(seen))[0]))
    return ids[len(prompt) :]


PROMPTS = [[5, 9, 200, 3], [17], list(range(40, 75)), [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]]
GREEDY = SamplingParams(max_new_tokens=40, ignore_eos=True)
DRAWN = SamplingParams(
    temperature=0.9,
    top_k=50,
    top_p=0.95,
    repetition_penalty=1.2,
    max_new_tokens=40,
    ignore_eos=True,
)


@pytest.mark.parametrize("params", [GREEDY, DRAWN], ids=["greedy", "drawn"])
def test_batches_generate_what_a_plain_loop_does(params):
    rows = [dataclasses.replace(params, seed=i) for i in range(len(PROMPTS))]
    got = shared().generate(PROMPTS, rows)
    for prompt, row, completion in zip(PROMPTS, rows, got, strict=True):
        expected = plain_loop(prompt, row)
        assert len(set(expected)) > 10  # it does not repeat one token
        assert list(completion.token_ids) == expected
        assert (completion.prompt_tokens, completion.new_tokens) == (len(prompt), 40)
        assert completion.finish_reason == "length"
        assert completion.ttft_s > 0 and completion.tokens_per_s > 0


def test_tokens_do_not_depend_on_the_batch_around_them():
    rows = [dataclasses.replace(DRAWN, seed=i, max_new_tokens=20) for i in range(len(PROMPTS))]
    together = shared().generate(PROMPTS, rows)
    alone = [shared().generate([p], r)[0] for p, r in zip(PROMPTS, rows, strict=True)]
    crowd = shared().generate(PROMPTS[::-1] + PROMPTS, rows[::-1] + rows)
    for i, completion in enumerate(together):
        assert alone[i].token_ids == completion.token_ids
        assert crowd[3 - i].token_ids == crowd[4 + i].token_ids == completion.token_ids


@pytest.mark.parametrize("tokens_per_call", [1, 4])
def test_more_prompts_than_slots_take_over_freed_slots(tokens_per_call):
    g = generator(batch_size=2, tokens_per_call=tokens_per_call)
    rows = [dataclasses.replace(GREEDY, max_new_tokens=n) for n in (3, 30, 1, 12, 7)]
    prompts = [*PROMPTS, PROMPTS[0]]
    got = g.generate(prompts, rows)
    assert [c.new_tokens for c in got] == [3, 30, 1, 12, 7]
    for prompt, row, completion in zip(prompts, rows, got, strict=True):
        assert list(completion.token_ids) == plain_loop(prompt, row)


def test_two_functions_are_traced_once_over_three_prompts_and_a_hundred_tokens():
    g = generator(batch_size=3)
    params = SamplingParams(max_new_tokens=100, ignore_eos=True)
    g.generate([[1, 2, 3], [4] * 9, [5] * 16], params)
    assert g.steps.trace_counts == {"prefill": 1, "decode": 1}
    drawn = dataclasses.replace(params, temperature=1.0, top_p=0.5, seed=9, max_new_tokens=90)
    g.generate([[7] * 12, [8], [9, 10]], drawn)
    assert g.steps.trace_counts == {"prefill": 1, "decode": 1}
    assert g.steps._prefill._cache_size() == g.steps._decode._cache_size() == 1
    g.generate([[7] * 20, [8], [9, 10]], drawn)  # the next bucket of prompt lengths
    assert g.steps.trace_counts == {"prefill": 2, "decode": 1}


def test_long_prompts_are_prefilled_in_parts():
    prompts = [PROMPTS[2], [7] * 8, PROMPTS[3] * 5, [3]]
    got = generator(batch_size=4, prefill_chunk=16).generate(prompts, GREEDY)
    for prompt, completion in zip(prompts, got, strict=True):
        assert list(completion.token_ids) == plain_loop(prompt, GREEDY)


@pytest.mark.parametrize(("mesh", "scheme"), [("data=4", "bf16"), ("tensor=2,data=2", "W4A16_G32")])
def test_meshes_generate_the_same_tokens(mesh, scheme):
    """Five prompts over few slots: slots of every data shard are freed and taken again."""
    prompts, rows = [*PROMPTS, [99, 98]], []
    for i, n in enumerate((25, 6, 14, 25, 9)):
        params = DRAWN if i % 2 else GREEDY
        rows.append(dataclasses.replace(params, seed=i, max_new_tokens=n))
    expected = Generator(tiny(None, scheme), tokenizer()).generate(prompts, rows)
    g = Generator(tiny(mesh, scheme), tokenizer(), batch_size=4, tokens_per_call=3)
    assert [c.token_ids for c in g.generate(prompts, rows)] == [c.token_ids for c in expected]
    assert g.steps._decode._cache_size() == g.steps.trace_counts["decode"] == 1


def test_end_tokens_and_stop_tokens_end_a_completion():
    greedy = plain_loop(PROMPTS[0], GREEDY)
    at = next(i for i in range(5, 40) if greedy[i] not in greedy[:i])
    stopping = dataclasses.replace(GREEDY, stop_token_ids=(greedy[at],))
    (c,) = shared().generate([PROMPTS[0]], stopping)
    assert list(c.token_ids) == greedy[: at + 1] and c.finish_reason == "stop"
    assert c.text == tokenizer().decode(greedy[:at])
    ends = Tokenizer(tokenizer().backend, eos_ids={greedy[at]})
    g = Generator(tiny(), ends)
    (c,) = g.generate([PROMPTS[0]], dataclasses.replace(GREEDY, ignore_eos=False))
    assert list(c.token_ids) == greedy[: at + 1] and c.finish_reason == "stop"
    (c,) = g.generate([PROMPTS[0]], GREEDY)
    assert list(c.token_ids) == greedy


SCRIPTS = (
    "né 🙂!",
    "a🙂",
    "one two END three",
    "one EN two",
    "aXbaab",
    "abab",
    "x🙂y",
)


class Scripted(nn.CausalLM):
    """Puts a fixed token at each position, so that the length of a prompt chooses its continuation."""

    def __init__(self):
        texts = [[*tokenizer().encode(text), EOS] for text in SCRIPTS]
        self.starts = dict(zip(SCRIPTS, 1 + np.cumsum([0, *map(len, texts)]), strict=False))
        self.at = jnp.asarray(np.concatenate([[0], *texts]), jnp.int32)
        self.config = llama.Config.from_hf(CONFIG)
        self.vocab_size, self.sharding = CONFIG["vocab_size"], Sharding()
        self.init_cache = tiny().init_cache

    def __call__(self, input_ids, cache=None, num_tokens=None, *, last_token_only=False):
        lengths = cache.lengths + num_tokens
        logits = jax.nn.one_hot(self.at[lengths], self.vocab_size)
        return logits, dataclasses.replace(cache, lengths=lengths)


@cache
def scripted_generator() -> Generator:
    return Generator(Scripted(), tokenizer())


def scripted(text: str, **params) -> tuple[Completion, list[str]]:
    g = scripted_generator()
    prompt = [1] * int(g.steps._model.starts[text])
    steps = list(g.stream([prompt], SamplingParams(**params)))
    (completion,) = [s.completion for s in steps if s.completion is not None]
    assert steps[-1].completion is completion
    assert [s.token_id for s in steps] == list(completion.token_ids)
    assert "".join(s.text for s in steps) == completion.text
    return completion, [s.text for s in steps]


def test_text_streams_by_whole_characters():
    c, pieces = scripted("né 🙂!")
    assert pieces == ["n", "", "é", " ", "", "", "", "🙂", "!", ""]
    assert c.text == "né 🙂!" and c.finish_reason == "stop" and c.token_ids[-1] == EOS


def test_an_unfinished_character_is_shown_at_the_end():
    c, pieces = scripted("a🙂", max_new_tokens=3)
    assert (c.text, pieces, c.finish_reason) == ("a\ufffd", ["a", "", "\ufffd"], "length")


def test_stop_texts_are_left_out_and_never_streamed():
    c, pieces = scripted("one two END three", stop=["END"])
    assert (c.text, c.finish_reason, c.new_tokens) == ("one two ", "stop", 11)
    assert pieces[-4:] == [" ", "", "", ""]
    c, pieces = scripted("one EN two", stop=["END"])  # what was held back comes after all
    assert c.text == "one EN two" and pieces[4:7] == ["", "", "EN "]
    c, _ = scripted("aXbaab", stop=["aab", "bX", "Xb"])  # the first one that is complete
    assert c.text == "a"
    c, _ = scripted("abab", stop="bb", max_new_tokens=4)  # held back, and then it is the end
    assert (c.text, c.finish_reason) == ("abab", "length")
    c, _ = scripted("x🙂y", stop=["🙂"])
    assert c.text == "x"


def test_a_full_context_ends_a_completion():
    g = generator(max_len=32)
    (c,) = g.generate([[3] * 30], dataclasses.replace(GREEDY, max_new_tokens=10))
    assert (c.new_tokens, c.finish_reason) == (2, "length")
    assert list(c.token_ids) == plain_loop([3] * 30, dataclasses.replace(GREEDY, max_new_tokens=2))


def test_prompts_are_texts_tokens_or_chats():
    messages = [{"role": "user", "content": "hi"}]
    text_ids = tokenizer().encode("hi")
    prompts = ["hi", text_ids, np.array(text_ids), messages, [256, *text_ids]]
    got = shared().generate(prompts, dataclasses.replace(GREEDY, max_new_tokens=12))
    assert got[0].token_ids == got[1].token_ids == got[2].token_ids
    assert got[3].token_ids == got[4].token_ids != got[0].token_ids
    assert got[3].prompt_tokens == 3
    assert got[0].text == tokenizer().decode(got[0].token_ids)
    assert shared().generate([]) == []


def test_without_a_tokenizer_there_are_tokens_alone():
    g = Generator(tiny())
    (c,) = g.generate([PROMPTS[0]], GREEDY)
    assert list(c.token_ids) == plain_loop(PROMPTS[0], GREEDY) and c.text == ""
    with pytest.raises(ValueError, match="without a tokenizer"):
        g.generate(["hi"])
    with pytest.raises(ValueError, match="stop texts need a tokenizer"):
        g.generate([[1]], SamplingParams(stop=["x"]))


def test_quantized_caches_generate():
    """fp8 keys and values change the logits a little: the first tokens stay those of the float cache."""
    (c,) = generator(kv_cache="fp8_e4m3_token_head").generate([PROMPTS[2]], GREEDY)
    assert list(c.token_ids[:3]) == plain_loop(PROMPTS[2], GREEDY)[:3]
    assert c.new_tokens == 40


def test_streams_may_interleave():
    a, b = (shared().stream([p], GREEDY) for p in PROMPTS[:2])
    tokens = [(x.token_id, y.token_id) for x, y in zip(a, b, strict=True)]
    assert [x for x, _ in tokens] == plain_loop(PROMPTS[0], GREEDY)
    assert [y for _, y in tokens] == plain_loop(PROMPTS[1], GREEDY)


@pytest.mark.parametrize(
    ("prompts", "params", "message"),
    [
        ([[1], []], {}, "prompt 1 is empty"),
        ([""], {}, "prompt 0 is empty"),
        ([[1] * 320], {}, "prompt 0 has 320 tokens; .* context of 320"),
        ([[1, 272]], {}, r"token ids must be in 0\.\.271.*found \[272\]"),
        ([[-1]], {}, r"found \[-1\]"),
        ([[1]], {"stop_token_ids": [300]}, r"found \[300\]"),
        ("text", {}, "prompts must be a list of prompts"),
    ],
)
def test_bad_prompts_are_refused_before_anything_runs(prompts, params, message):
    with pytest.raises(ValueError, match=f"generate: .*{message}"):
        shared().stream(prompts, SamplingParams(**params))


def test_a_sequence_that_may_outgrow_its_pages_is_refused():
    short, long = (Sequence(i, [1] * n, GREEDY, 9, None) for i, n in enumerate((7, 8)))
    with pytest.raises(ValueError, match=r"prompt 1 has 8 tokens and may get 9 more, .* hold 16"):
        next(run(shared().steps, [short, long], 2, 16, 8))


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="params must be one, or one per prompt; found 1 for 2"):
        shared().generate([[1], [2]], [GREEDY])
    with pytest.raises(
        ValueError, match=r"max_len must be in 2\.\.320, the model's context; found 321"
    ):
        generator(max_len=321)
    with pytest.raises(ValueError, match="batch_size must be positive; found 0"):
        generator(batch_size=0)
    with pytest.raises(ValueError, match="unknown KV-cache format 'int3'"):
        generator(kv_cache="int3")
    big = Backend(models.BPE({str(i): i for i in range(300)}, []))
    with pytest.raises(
        ValueError, match="the tokenizer has 300 tokens, the model's vocabulary only 272"
    ):
        Generator(tiny(), Tokenizer(big))


def test_buckets():
    assert [bucket(n, 16) for n in (1, 16, 17, 24, 25, 33, 49, 100)] == [
        16,
        16,
        24,
        24,
        32,
        48,
        64,
        128,
    ]
    assert [bucket(n, 1) for n in (1, 2, 3, 4, 5, 7, 9)] == [1, 2, 3, 4, 6, 8, 12]
