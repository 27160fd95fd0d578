"""Training whose products run in FP8, not only through its rounding."""

from collections.abc import Sequence

from flax import nnx

from qjax.nn import Linear, modules
from qjax.ops import GRADIENT_ELEMENTS
from qjax.qarray import QArray
from qjax.recipe import matches


def fp8_training(
    model: nnx.Module,
    *,
    gradient_element: str = "float8_e4m3fn",
    targets: Sequence[str] = ("Linear",),
    ignore: Sequence[str] = ("lm_head",),
) -> list[str]:
    """Makes linear layers multiply in block-scaled FP8, forward and backward, in place; see `qjax.ops.fp8_dot`.

    Parameters stay what they are (float32 masters, as DeepSeek-V3 trains); quantizing them to "fp8_e4m3_128x128"
    afterwards gives the codes that the last forward pass used. Experts, embeddings and norms are left alone.

    Args:
        model: A loaded model.
        gradient_element: FP8 element of gradients: "float8_e4m3fn" or "float8_e5m2".
        targets: Which `qjax.nn.Linear` layers, as in recipes.
        ignore: Targets left alone; they may match nothing.

    Returns:
        Paths of the layers.

    Raises:
        ValueError: If a target matches no layer, or a layer is quantized, prepared or has an adapter.
    """
    if gradient_element not in GRADIENT_ELEMENTS:
        raise ValueError(
            f"fp8_training: gradient_element must be one of {GRADIENT_ELEMENTS}; found {gradient_element!r}"
        )
    layers = {path: module for path, module in modules(model) if isinstance(module, Linear)}
    unmatched = [t for t in targets if not any(matches(t, path, "Linear") for path in layers)]
    if unmatched or not targets:
        raise ValueError(
            f"fp8_training: targets {unmatched} match none of {len(layers)} linear layers"
        )
    chosen = {
        path: layer
        for path, layer in layers.items()
        if any(matches(t, path, "Linear") for t in targets)
        and not any(matches(t, path, "Linear") for t in ignore)
    }
    for path, layer in chosen.items():
        quantized = isinstance(layer.weight.get_value(), QArray)
        if quantized or layer.fake_quant is not None or layer.lora is not None:
            raise ValueError(
                f"fp8_training: {path} needs a plain weight without fake quantization or an adapter"
            )
    for layer in chosen.values():
        layer.fp8_gradients = gradient_element
    return list(chosen)
