"""Strict reading of config.json: every field is used, known to be harmless, or an error."""

import math
from collections.abc import Mapping
from typing import Any

# Fields that do not change what a model computes, as transformers 4 and 5 and exporters write them.
_HARMLESS = frozenset(
    """
    _name_or_path _attn_implementation _attn_implementation_autoset _commit_hash add_cross_attention
    architectures attention_dropout attn_implementation auto_map bad_words_ids begin_suppress_tokens bos_token_id
    chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype
    early_stopping embd_pdrop encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty
    finetuning_task forced_bos_token_id forced_eos_token_id hidden_dropout hidden_dropout_prob id2label
    initializer_range is_decoder is_encoder_decoder label2id length_penalty max_length max_window_layers min_length
    model_type name_or_path no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_attentions
    output_hidden_states output_router_logits output_scores pad_token_id prefix pretraining_tp problem_type
    pruned_heads quantization_config remove_invalid_values repetition_penalty resid_pdrop return_dict
    return_dict_in_generate rope_parameters rope_scaling rope_theta router_aux_loss_coef sep_token_id
    suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder tie_word_embeddings
    tokenizer_class top_k top_p torch_dtype torchscript transformers_version typical_p unsloth_fixed
    unsloth_version use_bfloat16 use_cache use_mrope
    """.split()
)


class Fields:
    """The fields of one config.json, taken one by one."""

    def __init__(self, config: Mapping[str, Any]):
        """Starts with nothing taken."""
        self._config = config
        self._taken: set[str] = set()

    def integer(
        self, name: str, default: int | None = None, *, minimum: int = 1, maximum: int = 2**31 - 1
    ) -> int:
        """An integer field; without a default it must be there.

        Raises:
            ValueError: If it is missing, no integer or out of range.
        """
        value = self._take(name, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"config.json: {name} must be an integer; found {value!r}")
        if not minimum <= value <= maximum:
            raise ValueError(
                f"config.json: {name} must be within {minimum} and {maximum}; found {value!r}"
            )
        return value

    def layers(self) -> int:
        """num_hidden_layers, bounded: each layer is an object before any tensor is looked at."""
        return self.integer("num_hidden_layers", maximum=1024)

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number.

        Raises:
            ValueError: If it is missing or not one.
        """
        value = self._take(name, default)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 < value < math.inf:
            raise ValueError(f"config.json: {name} must be a positive number; found {value!r}")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """A boolean field.

        Raises:
            ValueError: If it is neither true nor false.
        """
        value = self._take(name, default)
        if not isinstance(value, bool):
            raise ValueError(f"config.json: {name} must be true or false; found {value!r}")
        return value

    def optional_integer(
        self, name: str, missing: int | None = None, *, minimum: int = 1
    ) -> int | None:
        """An integer field, None where it is null, `missing` where it is not there."""
        self._taken.add(name)
        if self._config.get(name) is None:
            return None if name in self._config else missing
        return self.integer(name, minimum=minimum)

    def choice(self, name: str, allowed: tuple, default: Any = None) -> Any:
        """A field that must have one of these values.

        Raises:
            ValueError: If it has another.
        """
        value = self._take(name, default)
        if value not in allowed:
            raise ValueError(
                f"config.json: {name} = {value!r} is not supported; supported: {list(allowed)}"
            )
        return value

    def raw(self, name: str) -> Any:
        """A field as it stands, None where it is missing."""
        self._taken.add(name)
        return self._config.get(name)

    def finish(self) -> None:
        """Ends the reading.

        Raises:
            ValueError: If a field is left that nobody took and that may change the model.
        """
        left = sorted(
            name
            for name, value in self._config.items()
            if name not in self._taken and name not in _HARMLESS and value is not None
        )
        if left:
            raise ValueError(f"config.json: unsupported fields {left}")

    def _take(self, name: str, default: Any) -> Any:
        self._taken.add(name)
        value = self._config.get(name)
        if value is None:
            value = default
        if value is None:
            raise ValueError(f"config.json: {name} is missing")
        return value
