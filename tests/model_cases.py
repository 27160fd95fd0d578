"""Models of the reference cases, their parameters filled from `case.weights()` without the loader."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from references.write_folder import ReferenceCase, load_case

from qjax import Sharding
from qjax.nn import CausalLM, Embedding, ExpertLinear, Linear, QuantizedParam, modules
from qjax.qarray import QArray
from qjax.quantization import quantize, refine_blocks
from qjax.recipe import QuantSpec
from qjax.registry import model_module


def build(
    case: ReferenceCase | str,
    *,
    sharding: Sharding | None = None,
    specs: Mapping[str, QuantSpec] | None = None,
    legacy: bool = False,
    dtype: str = "float32",
    dequantized: bool = False,
) -> CausalLM:
    """The case's model; modules with a spec hold their weight rounded to nearest.

    Args:
        case: A reference case or its name.
        sharding: Mesh and rules.
        specs: {module path: quantization}.
        legacy: Read the transformers 4 form of the config.
        dtype: Dtype of plain parameters and activations.
        dequantized: Plain weights with the values that the specs' formats keep.
    """
    case = load_case(case) if isinstance(case, str) else case
    module = model_module(case.config["model_type"])
    config = module.Config.from_hf(case.legacy_config if legacy else case.config)
    built = {} if dequantized else specs
    model = module.Model(config, specs=built, dtype=dtype, sharding=sharding)
    fill(model, case.weights(), specs or {})
    return model


def fill(
    model: CausalLM, weights: dict[str, np.ndarray], specs: Mapping[str, QuantSpec] | None = None
) -> None:
    """Sets every parameter from checkpoint tensors, all of which must be used."""
    weights = dict(weights)
    for path, module in modules(model):
        names = module.checkpoint_paths(path) if isinstance(module, ExpertLinear) else [path]
        spec = (specs or {}).get(names[0], QuantSpec())
        for name, variable in vars(module).items():
            value = variable.get_value() if hasattr(variable, "get_value") else None
            leaves = jax.tree.leaves(value)
            if not leaves or not isinstance(leaves[0], jax.ShapeDtypeStruct):
                continue
            tensor = _take(weights, module, path, name)
            quantized = isinstance(module, Linear | ExpertLinear | Embedding) and name == "weight"
            variable.set_value(_value(tensor, variable, spec if quantized else QuantSpec()))
    assert not weights, f"no parameter took {sorted(weights)}"


def _take(weights: dict, module, path: str, name: str) -> np.ndarray:
    if not isinstance(module, ExpertLinear):
        return weights.pop(f"{path}.{name}")
    if not module.stacked_in_checkpoint:
        return np.stack([weights.pop(f"{p}.{name}") for p in module.checkpoint_paths(path)])
    tensor = weights.pop(path if name == "weight" else f"{path}_{name}")
    return tensor.swapaxes(1, 2) if name == "weight" else tensor


def _value(tensor: np.ndarray, variable, spec: QuantSpec):
    like = variable.get_value()
    value = jnp.asarray(tensor)
    if spec.weights is not None:
        value = quantize(value, spec.weights, dtype=like.dtype)
        if not isinstance(variable, QuantizedParam):
            value = value.dequantize()
        elif value.format != like.format:
            value = refine_blocks(value, like.format.block_size(like.shape))
            assert value.shape == like.shape
            value = QArray.from_parts(
                like.format,
                value.qvalue,
                value.scale,
                zero_point=value.zero_point,
                minimum=value.minimum,
                global_scale=value.global_scale,
                dtype=like.dtype,
            )
    else:
        assert value.shape == like.shape, (value.shape, like.shape)
        value = value.astype(like.dtype)
    return jax.tree.map(
        lambda x, s: x if s.sharding is None else jax.device_put(x, s.sharding), value, like
    )
