"""Weights that are a pure function of their name: numpy only, the same in every environment.

A fixture then needs to store the shapes and the reference outputs of a model, not its weights. The
generator is splitmix64 written out in uint64 arithmetic, so that no numpy release can change it,
and every value is representable in bfloat16, so that a bfloat16 and a float32 checkpoint of the
same model are equal.
"""

import math
import zlib

import numpy as np

# The finalizer of splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators).
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def random_bits(name: str, count: int, seed: int = 0) -> np.ndarray:
    """uint64 [count]: the random words of stream `name`."""
    start = np.uint64(zlib.crc32(f"{seed}:{name}".encode()) << 32)
    with np.errstate(over="ignore"):
        z = (start + np.arange(1, count + 1, dtype=np.uint64)) * _GOLDEN
        z = (z ^ (z >> np.uint64(30))) * _MIX_1
        z = (z ^ (z >> np.uint64(27))) * _MIX_2
    return z ^ (z >> np.uint64(31))


def round_to_bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 -> the nearest bfloat16 value (ties to even), kept in float32. Finite values only."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    bits = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return (bits & np.uint32(0xFFFF0000)).view(np.float32)


def tensor(
    name: str, shape: tuple[int, ...], scale: float, *, mean: float = 0.0, seed: int = 0
) -> np.ndarray:
    """float32 [*shape]: nearly normal values (sum of four uniforms) of the given mean and scale.

    `scale` is the standard deviation; no value is further than 2 sqrt(3) of them from the mean.
    """
    bits = random_bits(name, math.prod(shape), seed)
    total = np.zeros(bits.shape, np.int64)
    for i in range(4):
        total += ((bits >> np.uint64(16 * i)) & np.uint64(0xFFFF)).astype(np.int64)
    normal = (total - 2 * 0xFFFF).astype(np.float64) * (math.sqrt(3.0) / 65536.0)
    return round_to_bfloat16((mean + scale * normal).astype(np.float32)).reshape(shape)


def model_tensor(name: str, shape: tuple[int, ...], *, seed: int = 0) -> np.ndarray:
    """float32 [*shape]: the tensor `name` of a checkpoint, with mean and scale fit for its role."""
    if name.endswith("norm.weight"):
        return tensor(name, shape, 0.1, mean=1.0, seed=seed)
    if name.endswith(("bias", "e_score_correction_bias")):
        return tensor(name, shape, 0.1, seed=seed)
    if name.endswith("embed_tokens.weight"):
        # Small beside the layers' outputs, or a model with tied embeddings repeats its last token.
        return tensor(name, shape, 0.25, seed=seed)
    if name.endswith("self_attn.sinks"):
        return tensor(name, shape, 1.0, seed=seed)
    # gpt-oss stores its experts as [E, in, out]; everything else is [out, in].
    fan_in = shape[-2] if len(shape) == 3 else shape[-1]
    if name.endswith("lm_head.weight"):
        gain = 4.0
    elif name.endswith(("mlp.gate.weight", "mlp.router.weight")):
        gain = 2.0  # routes must not hang on the last bits of a logit
    elif name.endswith("experts.gate_up_proj"):
        gain = 4.0  # gpt-oss clamps at 7: some activations must get there
    elif name.endswith("experts.down_proj"):
        gain = 0.2
    else:
        gain = 1.0
    return tensor(name, shape, gain / math.sqrt(fan_in), seed=seed)


def model_tensors(shapes: dict[str, list[int]], *, seed: int = 0) -> dict[str, np.ndarray]:
    """Every tensor of a checkpoint: {name: shape} -> {name: float32 array}."""
    return {name: model_tensor(name, tuple(shape), seed=seed) for name, shape in shapes.items()}


def token_ids(name: str, shape: tuple[int, ...], vocab_size: int, *, seed: int = 0) -> np.ndarray:
    """int32 [*shape]: token ids of a random text."""
    bits = random_bits(name, math.prod(shape), seed) >> np.uint64(32)
    return (bits % np.uint64(vocab_size)).astype(np.int32).reshape(shape)
