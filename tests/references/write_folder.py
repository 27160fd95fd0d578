"""Write the Hugging Face folder of a reference case: config.json and safetensors files.

    case = load_case("qwen2_yarn")
    write_folder(case, tmp_path, dtype="float32", shards=3)

Needs numpy, ml_dtypes and safetensors only. The weights are bfloat16-representable, so both dtypes
hold the same model and give case.arrays["logits"].
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from references.random_weights import model_tensors

FAMILIES = ("llama_family", "moe_families")
_DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


@dataclass(frozen=True)
class ReferenceCase:
    """One tiny model; the layout of its files is described in transformers_reference.py."""

    name: str
    config: dict[str, Any]
    legacy_config: dict[str, Any] | None
    shapes: dict[str, list[int]]
    seed: int
    arrays: dict[str, np.ndarray]

    def weights(self) -> dict[str, np.ndarray]:
        """{checkpoint name: float32 array}."""
        return model_tensors(self.shapes, seed=self.seed)


def case_names(family: str | None = None) -> list[str]:
    """The names of all cases, or of one family's."""
    here = Path(__file__).parent
    families = FAMILIES if family is None else (family,)
    return [path.stem for f in families for path in sorted((here / f).glob("*.json"))]


def load_case(name: str) -> ReferenceCase:
    """Read a case by its name."""
    for family in FAMILIES:
        path = Path(__file__).parent / family / f"{name}.json"
        if path.exists():
            stored = json.loads(path.read_text())
            with np.load(path.with_suffix(".npz")) as npz:
                arrays = dict(npz)
            return ReferenceCase(
                name=name,
                config=stored["config"],
                legacy_config=stored.get("legacy_config"),
                shapes=stored["tensors"],
                seed=stored["seed"],
                arrays=arrays,
            )
    raise ValueError(f"no reference case {name!r}; there are {case_names()}")


def write_folder(
    case: ReferenceCase | str,
    directory: Path,
    *,
    dtype: str = "bfloat16",
    shards: int = 1,
    legacy: bool = False,
) -> Path:
    """Write config.json and model.safetensors (or `shards` files and their index).

    `dtype` is "bfloat16" or "float32"; e_score_correction_bias is float32 in both, as DeepSeek
    stores it. `legacy` writes the transformers 4 form of the config, which some cases have.
    Returns the folder.
    """
    case = load_case(case) if isinstance(case, str) else case
    config = case.legacy_config if legacy else case.config
    if config is None:
        raise ValueError(f"reference case {case.name!r} has no legacy config")
    config = {**config, "torch_dtype" if legacy else "dtype": dtype}
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {
        name: value.astype(np.float32 if name.endswith("correction_bias") else _DTYPES[dtype])
        for name, value in case.weights().items()
    }
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    else:
        _write_shards(tensors, directory, shards)
    return directory


def _write_shards(tensors: dict[str, np.ndarray], directory: Path, shards: int) -> None:
    """Deal the tensors out in turn, so that every layer is spread over several files."""
    weight_map = {}
    names = sorted(tensors)
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        save_file(part, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
