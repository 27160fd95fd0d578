"""Recipes: which module is quantized how, resolved once from rules to {path: spec}.

The preset names are the words of compressed-tensors' schemes (W4A16, FP8_DYNAMIC, ...).
"""

import dataclasses
import functools
import logging
import math
import re
from collections.abc import Mapping
from types import MappingProxyType

from qjax.formats import WHOLE, ActivationFormat, QFormat, integer_format, qformat

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class QuantSpec:
    """How one module is quantized.

    Attributes:
        weights: Storage of the weight, None for a plain array.
        activations: Run-time quantization of the input, None for none.
    """

    weights: QFormat | None = None
    activations: ActivationFormat | None = None


@dataclasses.dataclass(frozen=True)
class KVCacheFormat:
    """Storage of a KV cache's pages.

    Attributes:
        element: "bfloat16", "float32", "float16", or quantized: "float8_e4m3fn", "float8_e5m2", "nvfp4".
        scale: "tensor" or "head" (loaded or 1.0) or "token_head" (computed when a token is written).
            NVFP4 has a scale per 16 channels beside it; "tensor" is then its global scale.
    """

    element: str = "bfloat16"
    scale: str = "tensor"

    def __post_init__(self):
        elements = ("bfloat16", "float32", "float16", "float8_e4m3fn", "float8_e5m2", "nvfp4")
        if self.element not in elements or self.scale not in ("tensor", "head", "token_head"):
            raise ValueError(
                f"KVCacheFormat: element must be one of {elements} and scale one of 'tensor', 'head', "
                f"'token_head'; found {self.element!r}, {self.scale!r}"
            )
        if self.scale == "token_head" and not self.element.startswith("float8"):
            raise ValueError(f"KVCacheFormat: {self.element} pages take no per-token scales")

    @property
    def calibrated(self) -> bool:
        """Whether checkpoints hold scales for these pages."""
        return self.element in ("float8_e4m3fn", "nvfp4") and self.scale != "token_head"

    @property
    def quantized(self) -> bool:
        """Whether pages hold quantized codes."""
        return self.element in ("float8_e4m3fn", "float8_e5m2", "nvfp4")


KV_CACHE_FORMATS: Mapping[str, KVCacheFormat] = MappingProxyType(
    {
        "bfloat16": KVCacheFormat("bfloat16"),
        "float16": KVCacheFormat("float16"),
        "float32": KVCacheFormat("float32"),
        "fp8_e4m3": KVCacheFormat("float8_e4m3fn"),
        "fp8_e4m3_head": KVCacheFormat("float8_e4m3fn", "head"),
        "fp8_e4m3_token_head": KVCacheFormat("float8_e4m3fn", "token_head"),
        "fp8_e5m2": KVCacheFormat("float8_e5m2"),
        "nvfp4": KVCacheFormat("nvfp4"),
    }
)
"""The names that `--kv-cache` takes."""


def kv_cache_format(name: str | KVCacheFormat) -> KVCacheFormat:
    """The KV-cache format of this name.

    Raises:
        ValueError: If there is none.
    """
    if isinstance(name, KVCacheFormat):
        return name
    if name not in KV_CACHE_FORMATS:
        raise ValueError(f"unknown KV-cache format {name!r}: use one of {sorted(KV_CACHE_FORMATS)}")
    return KV_CACHE_FORMATS[name]


@dataclasses.dataclass(frozen=True)
class Rule:
    """Modules and what happens to them.

    Attributes:
        targets: Exact module paths, class words ("Linear", "Experts", "Embedding"), or ``re:`` patterns that
            match a whole path.
        spec: The quantization.
    """

    targets: tuple[str, ...]
    spec: QuantSpec


def matches(target: str, path: str, kind: str) -> bool:
    """Whether a target names this module.

    Args:
        target: Module path, class word or ``re:`` pattern (full match).
        path: The module's path, as in Hugging Face checkpoints.
        kind: The module's class word.
    """
    if target.startswith("re:"):
        return re.fullmatch(target[3:], path) is not None
    return target in (path, kind)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Rules (the first match wins), modules left alone, and the KV cache's storage.

    Attributes:
        rules: Tried in order.
        ignore: Targets that stay unquantized whatever the rules say.
        kv_cache: Storage of the KV cache, None for the compute dtype.
        optional: Targets that may match nothing: exporters' generic ignore lists name modules that only
            some models have.
    """

    rules: tuple[Rule, ...] = ()
    ignore: tuple[str, ...] = ()
    kv_cache: KVCacheFormat | None = None
    optional: frozenset[str] = frozenset()

    def resolve(self, modules: Mapping[str, str]) -> dict[str, QuantSpec]:
        """The spec of every quantized module.

        Args:
            modules: {path: class word} of all modules with a weight that may be quantized.

        Raises:
            ValueError: If a rule or an ignore entry matches no module.
        """
        specs: dict[str, QuantSpec] = {}
        unmatched = {t for rule in self.rules for t in rule.targets} | set(self.ignore)
        for path, kind in modules.items():
            hits = [t for t in unmatched if matches(t, path, kind)]
            unmatched.difference_update(hits)
            if any(matches(t, path, kind) for t in self.ignore):
                continue
            for rule in self.rules:
                if any(matches(t, path, kind) for t in rule.targets):
                    specs[path] = rule.spec
                    break
        unmatched -= self.optional
        if unmatched:
            examples = ", ".join(list(modules)[:3])
            raise ValueError(
                f"recipe: {sorted(unmatched)} match no module of this model "
                f"({len(modules)} modules, e.g. {examples}); fix the target or remove it"
            )
        return specs


SMALLEST_GROUP = 16
"""Groups that `fit_group` makes smaller than asked for are no smaller than this."""


def fit_group(spec: QuantSpec, k: int, path: str) -> QuantSpec:
    """The spec with the largest group that divides both the one asked for and K.

    Group sizes such as 128 do not divide every model's K (576 = 4.5 * 128): such a module gets a smaller
    group, as its format can state, and one log line says so. Groups that belong to the format
    (MXFP4's 32, NVFP4's 16) stay.

    Args:
        spec: The quantization asked for.
        k: Columns of the module's weight.
        path: The module's name, for messages.

    Raises:
        ValueError: If no group of at least 16 columns does, or a fixed group does not divide K.
    """
    format = spec.weights
    if format is None or format.block_shape[0] != 1 or format.block_shape[1] in (1, WHOLE):
        return spec
    asked = format.block_shape[1]
    group = math.gcd(asked, k)
    if group == asked:
        return spec
    if format.spec.is_float or group < SMALLEST_GROUP:
        raise ValueError(
            f"{path}: no group of {asked} columns, or a divisor of at least {SMALLEST_GROUP}, divides "
            f"K = {k}; ignore the module or use a channel scheme"
        )
    _log_group(asked, k, group)
    return dataclasses.replace(spec, weights=dataclasses.replace(format, block_shape=(1, group)))


@functools.cache
def _log_group(asked: int, k: int, group: int) -> None:
    _log.info("groups of %d do not divide K = %d: groups of %d there", asked, k, group)


def _token(name: str, **bounds) -> ActivationFormat:
    return ActivationFormat(qformat(name), **bounds)


def _group_int(bits: int, group: int, **kwargs) -> QFormat:
    return integer_format(bits, (1, group), scale_dtype="bfloat16", **kwargs)


def _schemes() -> dict[str, QuantSpec]:
    int8_token = _token("int8_channel")
    fp8_token = _token("fp8_e4m3_channel")
    channel_int8 = integer_format(8, (1, WHOLE), scale_dtype="bfloat16")
    nvfp4 = qformat("nvfp4")
    return {
        "W4A16": QuantSpec(_group_int(4, 128)),
        "W4A16_G32": QuantSpec(_group_int(4, 32)),
        "W4A16_G64": QuantSpec(_group_int(4, 64)),
        "W4A16_ASYM": QuantSpec(_group_int(4, 128, offset="zero_point")),
        "W3A16": QuantSpec(_group_int(3, 128)),
        "W2A16": QuantSpec(_group_int(2, 64)),
        "W8A16": QuantSpec(_group_int(8, 128)),
        "W4A8": QuantSpec(_group_int(4, 128), int8_token),
        "W4AFP8": QuantSpec(_group_int(4, 128), fp8_token),
        "INT8": QuantSpec(channel_int8, int8_token),
        "W8A8": QuantSpec(channel_int8, int8_token),
        "FP8_BLOCK": QuantSpec(
            qformat("fp8_e4m3_128x128"), _token("fp8_e4m3_1x128", amax_min=1e-4)
        ),
        "FP8_DYNAMIC": QuantSpec(qformat("fp8_e4m3_channel"), fp8_token),
        "FP8": QuantSpec(qformat("fp8_e4m3_tensor"), _token("fp8_e4m3_tensor", static=True)),
        "MXFP4A16": QuantSpec(qformat("mxfp4")),
        "MXFP4": QuantSpec(qformat("mxfp4"), _token("mxfp4")),
        "MXFP8": QuantSpec(qformat("mxfp8"), _token("mxfp8")),
        "NVFP4A16": QuantSpec(nvfp4),
        "NVFP4": QuantSpec(nvfp4, ActivationFormat(nvfp4)),
    }


FBGEMM_AMAX_MAX = 1200.0
"""Upper bound of a token's amax in FBGEMM's recipe (activation_scale_ub)."""

SCHEMES: Mapping[str, QuantSpec] = MappingProxyType(_schemes())
"""compressed-tensors' scheme words and what they mean here."""


EXPERTS = r"re:.*\.mlp\.experts\..*"
"""Every expert's linear layers, stored one by one or stacked."""

PUBLISHED = ("KIMI_K2_INT4", "GPT_OSS_MXFP4", "LLAMA_FP8")
"""Recipes that model families were published with."""


def recipe(
    name: str,
    *,
    ignore: tuple[str, ...] = ("lm_head",),
    kv_cache: str | KVCacheFormat | None = None,
    num_layers: int | None = None,
) -> Recipe:
    """A recipe by name: one scheme for every linear layer and expert, or one that was published.

    - A scheme of `SCHEMES`: every linear layer and expert.
    - KIMI_K2_INT4: the experts in symmetric INT4 groups of 32, bfloat16 scales; all else stays (Kimi K2
      Thinking's quantization-aware training).
    - GPT_OSS_MXFP4: the experts in MXFP4; attention, router, embeddings and head stay (GPT-OSS model card).
    - LLAMA_FP8: the feed-forward layers in FP8 per channel with inputs per token, amax at most 1200; attention,
      the first and the last layer and the head stay (Llama 3.1 405B FP8, FBGEMM).

    Args:
        name: The word, case-insensitive; "bf16" or "none" quantizes nothing.
        ignore: Modules left alone; a tied lm_head need not exist.
        kv_cache: Name or format of the KV cache.
        num_layers: Layers of the model, which LLAMA_FP8 needs to know the last.

    Raises:
        ValueError: If the word is unknown, or needs `num_layers`.
    """
    cache = None if kv_cache is None else kv_cache_format(kv_cache)
    word = name.upper()
    if word in ("BF16", "NONE"):
        return Recipe(kv_cache=cache)
    if word in PUBLISHED:
        return _published(word, ignore, cache, num_layers)
    if word not in SCHEMES:
        known = ", ".join((*SCHEMES, *PUBLISHED))
        raise ValueError(f"unknown recipe {name!r}: use 'bf16' or one of {known}")
    rule = Rule(("Linear", "Experts"), SCHEMES[word])
    return Recipe((rule,), ignore, cache, frozenset(("Linear", "Experts", *ignore)))


def _published(
    word: str, ignore: tuple[str, ...], cache: KVCacheFormat | None, num_layers: int | None
) -> Recipe:
    optional = frozenset(ignore)
    if word == "KIMI_K2_INT4":
        return Recipe((Rule((EXPERTS,), SCHEMES["W4A16_G32"]),), ignore, cache, optional)
    if word == "GPT_OSS_MXFP4":
        return Recipe((Rule((EXPERTS,), SCHEMES["MXFP4A16"]),), ignore, cache, optional)
    if num_layers is None:
        raise ValueError(f"recipe {word} leaves the last layer alone: pass num_layers")
    ends = rf"re:model\.layers\.(0|{num_layers - 1})\..*"
    spec = QuantSpec(
        qformat("fp8_e4m3_channel"), _token("fp8_e4m3_channel", amax_max=FBGEMM_AMAX_MAX)
    )
    rule = Rule((r"re:.*\.mlp\..*_proj",), spec)
    return Recipe((rule,), (ends, *ignore), cache, optional)
