"""The tokenizer in a GGUF file's metadata.

Keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The patterns are those of the models'
own tokenizer.json files, under the names that llama.cpp gives them (`tokenizer.ggml.pre`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

# Values of tokenizer.ggml.token_type.
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4

_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LOWER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
_UPPER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
_SLASH_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTIONS}|{_WORD}|\p{{N}}|{_REST}"
_GPT4O = rf"{_LOWER}{_CONTRACTIONS}?|{_UPPER}{_CONTRACTIONS}?|\p{{N}}{{1,3}}|{_SLASH_REST}"
_TEKKEN = rf"{_LOWER}|{_UPPER}|\p{{N}}|{_SLASH_REST}"
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)

_PATTERNS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral"), (_LLAMA3,)),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe"), (_LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "hunyuan"), (_QWEN2,)),
    **dict.fromkeys(("gpt-4o", "llama4"), (_GPT4O,)),
    "tekken": (_TEKKEN,),
    "deepseek-v3": _DEEPSEEK3,
}
# Split as GPT-2 does, the second group with every digit apart.
_GPT2 = ("default", "gpt-2", "phi-2", "mpt", "olmo", "jina-es", "jina-de", "trillion")
_GPT2_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
# A piece that is a token as a whole is not built up by merges.
_WHOLE_PIECES = (
    "llama3",
    "llama-v3",
    "llama-bpe",
    "falcon3",
    "pixtral",
    "tekken",
    "gpt-4o",
    "llama4",
)
_ADD_BOS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "tekken")

# Control tokens that end a turn or a text; files name only one of them as eos.
_END_TOKENS = frozenset(
    ("<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<end_of_turn>", "<|endoftext|>",
     "<|eom_id|>", "<|end_of_text|>", "<EOT>", "<｜end▁of▁sentence｜>")
)  # fmt: skip


def build_backend(metadata: Mapping[str, Any]) -> Backend:
    """The tokenizer that a file's metadata describes, without its beginning and end tokens.

    Raises:
        ValueError: If there is none, or it is of a kind that is not supported.
    """
    kind = metadata.get("tokenizer.ggml.model")
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not tokens:
        raise ValueError("GGUF: tokenizer.ggml.tokens is missing; the file carries no tokenizer")
    if kind == "gpt2":
        backend = _byte_level(metadata, tokens)
    elif kind == "llama":
        backend = _sentencepiece(metadata, tokens)
    else:
        raise ValueError(
            f"GGUF: tokenizer.ggml.model {kind!r} is not supported; use 'gpt2' or 'llama'"
        )
    types = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    for special, wanted in ((True, _CONTROL), (False, _USER_DEFINED)):
        added = [
            AddedToken(text, special=special, normalized=False)
            for text, found in zip(tokens, types, strict=True)
            if found == wanted and text
        ]
        backend.add_special_tokens(added) if special else backend.add_tokens(added)
    return backend


def adds_bos(metadata: Mapping[str, Any]) -> bool:
    """Whether texts begin with the beginning token, by the file or as its kind does by default."""
    default = (
        metadata.get("tokenizer.ggml.model") == "llama"
        or metadata.get("tokenizer.ggml.pre") in _ADD_BOS
    )
    return bool(metadata.get("tokenizer.ggml.add_bos_token", default))


def end_ids(metadata: Mapping[str, Any]) -> set[int]:
    """Every token that ends generation: those declared, and control tokens of well-known names."""
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    declared = (metadata.get(f"tokenizer.ggml.{key}") for key in keys)
    tokens = metadata["tokenizer.ggml.tokens"]
    types = metadata.get("tokenizer.ggml.token_type") or []
    known = {i for i, kind in enumerate(types) if kind == _CONTROL and tokens[i] in _END_TOKENS}
    return known | {i for i in declared if i is not None}


def _byte_level(metadata: Mapping[str, Any], tokens: Sequence[str]) -> Backend:
    pre = metadata.get("tokenizer.ggml.pre", "default")
    merges = [tuple(merge.split(" ", 1)) for merge in metadata.get("tokenizer.ggml.merges", ())]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    backend = Backend(models.BPE(vocabulary, merges, ignore_merges=pre in _WHOLE_PIECES))
    if pre in _GPT2 or pre in _GPT2_DIGITS:
        digits = [pre_tokenizers.Digits(individual_digits=True)] if pre in _GPT2_DIGITS else []
        steps = [*digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    elif pre in _PATTERNS:
        splits = [pre_tokenizers.Split(Regex(p), "isolated") for p in _PATTERNS[pre]]
        steps = [*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    else:
        supported = sorted({*_PATTERNS, *_GPT2, *_GPT2_DIGITS})
        raise ValueError(
            f"GGUF: tokenizer.ggml.pre {pre!r} is not supported; supported: {', '.join(supported)}"
        )
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(metadata: Mapping[str, Any], tokens: Sequence[str]) -> Backend:
    """SentencePiece BPE: the pair whose union scores highest is merged first (arXiv:1808.06226)."""
    scores = metadata.get("tokenizer.ggml.scores")
    if scores is None:
        raise ValueError("GGUF: tokenizer.ggml.scores is missing; a 'llama' tokenizer needs them")
    types = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    merges = []
    for token, score, kind in zip(tokens, scores, types, strict=True):
        if kind != 1:
            continue
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in vocabulary and right in vocabulary:
                merges.append((-score, vocabulary[left], vocabulary[right], left, right))
    unknown = next((t for t, kind in zip(tokens, types, strict=True) if kind == _UNKNOWN), None)
    model = models.BPE(
        vocabulary,
        [merge[-2:] for merge in sorted(merges)],
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=True,
    )
    backend = Backend(model)
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    steps = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    decoder = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        decoder.append(decoders.Strip(" ", 1, 0))
    backend.decoder = decoders.Sequence(decoder)
    return backend
