"""Run one tiny model with transformers and store its config, tensor shapes and outputs.

Used by make_llama_family.py and make_moe_families.py, in an environment with torch and
transformers (made with torch 2.13 on CPU and transformers 5.23); tests never import it.

A case is two files. <case>.json: `config` (what save_pretrained writes), `legacy_config` (some
cases: the same model in the vocabulary of transformers 4 checkpoints), `tensors` {name: shape} in
checkpoint naming, `seed` of random_weights.model_tensors. <case>.npz: `input_ids` int32 [2, T],
`logits` float32 [2, T, V], and for i in 0, 1 a prompt `prompt_i` int32 [P_i], run alone without
padding, its greedy continuation `greedy_i` int32 [12] and `greedy_margin_i` float32 [12], the
logit gap between first and second choice at each step.
"""

import json
import re
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedConfig

from references.random_weights import model_tensors, token_ids

GREEDY_TOKENS = 12
SMALLEST_MARGIN = 1e-3  # of greedy logits: far above the float32 error of any implementation
SMALLEST_ROUTER_MARGIN = 1e-4
SMALLEST_EFFECT = 1e-2


@dataclass(frozen=True)
class Case:
    """One tiny model.

    `ablations` are config changes that must move the logits: they prove that the case tests the
    feature it is named after. `legacy_changes` turns the config into its transformers 4 form.
    """

    name: str
    config: PreTrainedConfig
    seq_len: int = 32
    prompt_lengths: tuple[int, int] = (5, 11)
    ablations: tuple[dict[str, Any], ...] = ()
    legacy: dict[str, Any] | None = None
    written_changes: dict[str, Any] = field(default_factory=dict)


def _write_checkpoint(directory: Path, config: dict, shapes: dict, seed: int) -> None:
    (directory / "config.json").write_text(json.dumps(config))
    save_file(
        model_tensors(shapes, seed=seed), directory / "model.safetensors", metadata={"format": "pt"}
    )


def _load(directory: Path):
    model, info = AutoModelForCausalLM.from_pretrained(
        directory,
        dtype=torch.float32,
        attn_implementation="eager",
        experts_implementation="eager",
        output_loading_info=True,
    )
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[key]:
            raise ValueError(f"{directory}: {key}: {sorted(info[key])}")
    return model.eval()


@contextmanager
def _router_margins(margins: list[float]):
    """Record, for every torch.topk (only routers call it), the gap between rank k and k + 1."""
    original = torch.topk

    def topk(x, k, *args, **kwargs):
        if k < x.shape[-1]:
            best = original(x, k + 1, dim=-1).values
            gap = best[..., k - 1] - best[..., k]
            margins.append(float(gap[torch.isfinite(gap)].min()) if gap.numel() else np.inf)
        return original(x, k, *args, **kwargs)

    torch.topk = topk
    try:
        yield
    finally:
        torch.topk = original


def _logits(model, input_ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        # use_cache=False: every step sees the whole sequence anew, so no cache can be at fault.
        out = model(input_ids=torch.from_numpy(input_ids).long(), use_cache=False)
    return out.logits.numpy()


def _greedy(model, prompt: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    ids, margins = prompt[None], []
    for _ in range(GREEDY_TOKENS):
        last = _logits(model, ids)[0, -1]
        order = np.argsort(last)
        margins.append(last[order[-1]] - last[order[-2]])
        ids = np.concatenate([ids, np.array([[order[-1]]], ids.dtype)], axis=1)
    return ids[0, len(prompt) :].astype(np.int32), np.array(margins, np.float32)


def _run(model, case: Case, seed: int) -> tuple[dict[str, np.ndarray], float]:
    vocab = case.config.vocab_size
    arrays = {"input_ids": token_ids("input_ids", (2, case.seq_len), vocab, seed=seed)}
    margins: list[float] = []
    with _router_margins(margins):
        arrays["logits"] = _logits(model, arrays["input_ids"])
        for i, length in enumerate(case.prompt_lengths):
            prompt = token_ids(f"prompt_{i}", (length,), vocab, seed=seed)
            arrays[f"prompt_{i}"] = prompt
            arrays[f"greedy_{i}"], arrays[f"greedy_margin_{i}"] = _greedy(model, prompt)
    return arrays, min(margins, default=np.inf)


def _fragile(case: Case, arrays: dict[str, np.ndarray], router_margin: float) -> bool:
    greedy = min(arrays["greedy_margin_0"].min(), arrays["greedy_margin_1"].min())
    runs = [set(arrays[f"greedy_{i}"].tolist()) for i in (0, 1)]
    eos = set(np.atleast_1d(case.config.eos_token_id).tolist())
    dull = any(len(run) < 4 or run & eos for run in runs)
    return bool(greedy < SMALLEST_MARGIN or router_margin < SMALLEST_ROUTER_MARGIN or dull)


def _check_ablations(case: Case, config: dict, shapes: dict, seed: int, arrays: dict) -> list[str]:
    effects = []
    for change in case.ablations:
        with tempfile.TemporaryDirectory() as name:
            _write_checkpoint(Path(name), {**config, **change}, shapes, seed)
            moved = np.abs(_logits(_load(Path(name)), arrays["input_ids"]) - arrays["logits"]).max()
        if moved < SMALLEST_EFFECT:
            raise ValueError(f"{case.name}: {change} moves the logits by {moved:.2g} only")
        effects.append(f"{'+'.join(change)}: {moved:.2f}")
    return effects


def _describe(case: Case) -> tuple[dict, dict[str, list[int]]]:
    """(config.json, {tensor name: shape}) as save_pretrained writes them."""
    with tempfile.TemporaryDirectory() as name:
        model = AutoModelForCausalLM.from_config(case.config, dtype=torch.bfloat16)
        model.save_pretrained(name)
        config = json.loads((Path(name) / "config.json").read_text())
        stored = load_file(Path(name) / "model.safetensors")
    return config, {key: list(value.shape) for key, value in sorted(stored.items())}


def _on_one_line(numbers: re.Match) -> str:
    return json.dumps(json.loads(numbers[0]))


def write_case(case: Case, directory: Path) -> None:
    """Find a seed without near ties or an early end of text, and write the checked case."""
    torch.set_num_threads(1)
    config, shapes = _describe(case)
    for seed in range(50):
        with tempfile.TemporaryDirectory() as name:
            _write_checkpoint(Path(name), config, shapes, seed)
            arrays, router_margin = _run(_load(Path(name)), case, seed)
        if not _fragile(case, arrays, router_margin):
            break
    else:
        raise ValueError(f"{case.name}: no seed below 50 keeps clear of ties")
    effects = _check_ablations(case, config, shapes, seed, arrays)
    case_json = {"config": {**config, **case.written_changes}}
    if case.legacy is not None:
        with tempfile.TemporaryDirectory() as name:
            _write_checkpoint(Path(name), case.legacy, shapes, seed)
            legacy = _logits(_load(Path(name)), arrays["input_ids"])
        if not np.array_equal(legacy, arrays["logits"]):
            raise ValueError(f"{case.name}: the legacy config gives other logits")
        case_json["legacy_config"] = {**case.legacy, **case.written_changes}
    case_json |= {"seed": seed, "tensors": shapes}
    directory.mkdir(exist_ok=True)
    text = re.sub(r"\[[\s\d,]*\]", _on_one_line, json.dumps(case_json, indent=1))
    (directory / f"{case.name}.json").write_text(text + "\n")
    np.savez_compressed(directory / f"{case.name}.npz", **arrays)
    size = (directory / f"{case.name}.npz").stat().st_size / 1024
    print(
        f"{case.name}: seed {seed}, {len(shapes)} tensors, npz {size:.0f} KiB, "
        f"logit std {arrays['logits'].std():.2f}, router margin {router_margin:.1e}; "
        + ", ".join(effects),
        flush=True,
    )
