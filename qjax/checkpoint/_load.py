"""Loading: a model built abstractly from its config, filled tensor by tensor, each device with its slice."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from qjax.checkpoint._fill import Checkpoint, Loader, Plan
from qjax.checkpoint._gguf import GGUFFile
from qjax.checkpoint._gpt_oss_original import OriginalGptOss, is_original
from qjax.checkpoint._progress import progress_bar
from qjax.checkpoint._read_folder import Folder, download, read_json
from qjax.nn import (
    CausalLM,
    Embedding,
    ExpertLinear,
    Linear,
    modules,
    quantizable,
)
from qjax.nn import prepack as prepack_model
from qjax.nn import resolve as resolve_recipe
from qjax.ops import AMPERE, device_reason
from qjax.qarray import QArray
from qjax.recipe import KVCacheFormat, QuantSpec, Recipe, kv_cache_format
from qjax.recipe import recipe as named_recipe
from qjax.registry import model_module
from qjax.sharding import Sharding


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A loaded model and what came with it.

    Attributes:
        model: The model.
        config: config.json, or its equivalent of a GGUF file.
        generation_config: generation_config.json, empty where there is none.
        tokenizer: Folder or GGUF file that has the tokenizer.
        recipe: What the weights are quantized by, and the KV cache's storage.
    """

    model: CausalLM
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    tokenizer: Path
    recipe: Recipe

    @property
    def kv_cache(self) -> KVCacheFormat | None:
        """Storage of the KV cache that was asked for, None for the compute dtype."""
        return self.recipe.kv_cache


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the resolved table: a weight, how it is stored and what it takes on the devices."""

    path: str
    shape: tuple[int, ...]
    weights: str
    activations: str
    nbytes: int


def open_checkpoint(path: str | Path, *, progress: bool = True) -> Checkpoint:
    """A folder, a GGUF file or a hub id, its headers read.

    Raises:
        ValueError: If it is none of them, or is damaged.
    """
    local = Path(path)
    if local.is_dir():
        ggufs = sorted(local.glob("*.gguf"))
        if len(ggufs) == 1 and not (local / "config.json").exists():
            return GGUFFile(ggufs[0])
        return _folder(local)
    if local.is_file():
        if local.suffix != ".gguf":
            raise ValueError(f"{path}: a model is a folder, a .gguf file or a hub id")
        return GGUFFile(local)
    if len(local.parts) > 2 or local.is_absolute() or str(path).startswith("."):
        raise ValueError(f"{path}: no such file or folder")
    return _folder(download(str(path), progress=progress))


def _folder(path: Path) -> Folder:
    config = path / "config.json"
    original = config.is_file() and is_original(read_json(config))
    return OriginalGptOss(path) if original else Folder(path)


def load(
    path: str | Path,
    *,
    recipe: str | Recipe | None = None,
    dtype: str = "bfloat16",
    sharding: Sharding | None = None,
    kv_cache: str | KVCacheFormat | None = None,
    implementation: str | None = None,
    prepack: bool | None = None,
    progress: bool = True,
) -> LoadedModel:
    """Loads a model, its quantized weights packed as the checkpoint has them or as kernels want them.

    Args:
        path: A Hugging Face folder, a GGUF file, or a hub id.
        recipe: Quantizes the weights anew while loading, one at a time; None keeps the checkpoint's own
            quantization, "bf16" dequantizes.
        dtype: Of plain parameters and activations.
        sharding: Mesh and rules; each device gets its slice only.
        kv_cache: Storage of the KV cache, default what recipe or checkpoint say.
        implementation: Which implementation the ops use, see `qjax.ops`.
        prepack: Whether weights are re-laid out for the kernels (`qjax.nn.prepack`); None: where the device
            runs them.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: If the checkpoint can't be loaded; all faulty tensors are named at once.
    """
    checkpoint = open_checkpoint(path, progress=progress)
    plan = _plan(checkpoint, recipe, dtype, sharding or Sharding(), implementation)
    loader = Loader(checkpoint, plan)
    loader.check()
    with progress_bar("loading", loader.total_bytes, enabled=progress) as advance:
        loader.fill(advance)
    if device_reason("9.0", *AMPERE) is None if prepack is None else prepack:
        prepack_model(plan.model)
    used = plan.recipe
    if kv_cache is not None:
        used = dataclasses.replace(used, kv_cache=kv_cache_format(kv_cache))
    elif used.kv_cache is None and checkpoint.kv_cache is not None:
        used = dataclasses.replace(used, kv_cache=checkpoint.kv_cache)
    return LoadedModel(
        plan.model, checkpoint.config, checkpoint.generation_config, checkpoint.tokenizer, used
    )


def resolve(
    path: str | Path,
    *,
    recipe: str | Recipe | None = None,
    dtype: str = "bfloat16",
    progress: bool = True,
) -> list[Row]:
    """The table path -> scheme that `load` would follow; no weight is read.

    Raises:
        ValueError: As `load` does, but for faults inside tensors.
    """
    checkpoint = open_checkpoint(path, progress=progress)
    plan = _plan(checkpoint, recipe, dtype, Sharding(), None)
    Loader(checkpoint, plan).check()
    rows = []
    for name, module in modules(plan.model):
        if not isinstance(module, Linear | Embedding | ExpertLinear):
            continue
        value = module.weight.get_value()
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(value))
        stored, act = dtype, "-"
        if isinstance(value, QArray):
            stored = f"{value.format.element} {value.format.block_shape} {value.format.scale_dtype}"
        if not isinstance(module, Embedding) and module.activation_format is not None:
            f = module.activation_format.format
            act = f"{f.element} {f.block_shape}"
        rows.append(Row(name, tuple(value.shape), stored, act, size))
    return rows


def _plan(
    checkpoint: Checkpoint,
    recipe: str | Recipe | None,
    dtype: str,
    sharding: Sharding,
    implementation: str | None,
) -> Plan:
    module = model_module(checkpoint.config.get("model_type"))
    config = module.Config.from_hf(checkpoint.config)
    build = functools.partial(
        module.Model, config, dtype=dtype, sharding=sharding, implementation=implementation
    )
    plain = build()
    groups = checkpoint.groups(quantizable(plain))
    if recipe is None:
        specs = {
            path: dataclasses.replace(group.spec, weights=checkpoint.format(path, group))
            for path, group in groups.items()
            if group.spec is not None
        }
        stored = getattr(checkpoint, "quantization", None)
        used = Recipe() if stored is None else stored.recipe
    else:
        used = named_recipe(recipe) if isinstance(recipe, str) else recipe
        specs = resolve_recipe(used, plain)
    model = build(specs=specs)
    _check_experts(model, specs)
    unused = frozenset(getattr(module.Model, "unused_tensor_names", lambda _: ())(config))
    return Plan(model, groups, specs, recipe is not None, used, unused)


def _check_experts(model: CausalLM, specs: Mapping[str, QuantSpec]) -> None:
    for path, module in modules(model):
        if isinstance(module, ExpertLinear):
            found = {specs.get(name) for name in module.checkpoint_paths(path)}
            if len(found) > 1:
                raise ValueError(f"{path}: experts of one layer must share a scheme; found {found}")
