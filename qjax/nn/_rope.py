"""Rotary position embedding (arXiv:2104.09864) and its context extensions."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from qjax.ops import rotate

_KINDS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "yarn": ("factor",),
}
_OPTIONAL = {
    "yarn": (
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "original_max_position_embeddings",
        "truncate",
    ),
    # Phi-style exporters repeat the trained length for every kind; only yarn and llama3 use it.
    "dynamic": ("original_max_position_embeddings",),
    "linear": ("original_max_position_embeddings",),
}


@dataclasses.dataclass(frozen=True)
class Rope:
    """Rotary frequencies of `dim` channels.

    Attributes:
        dim: Rotated channels of a head.
        theta: Base.
        kind: "default", "linear", "dynamic" (NTK), "llama3" or "yarn" (arXiv:2309.00071).
        max_position: Length that the model's config names.
        parameters: The kind's own (name, value) pairs, as in config.json.
        interleaved: Channel pairs are (2i, 2i+1) instead of (i, i + dim/2).
    """

    dim: int
    theta: float
    kind: str = "default"
    max_position: int = 0
    parameters: tuple[tuple[str, float | bool], ...] = ()
    interleaved: bool = False

    @classmethod
    def from_hf(
        cls, config: Mapping[str, Any], dim: int, *, interleaved: bool = False, theta: float = 1e4
    ) -> "Rope":
        """Reads rope_parameters, or rope_theta and rope_scaling, of a config.json.

        Raises:
            ValueError: If a kind or a field is not supported.
        """
        fields = config.get("rope_parameters") or {}
        scaling = config.get("rope_scaling") or {}
        if not isinstance(fields, Mapping) or not isinstance(scaling, Mapping):
            raise ValueError("config.json: rope_parameters and rope_scaling must be objects")
        fields = {**scaling, **fields}
        kind = fields.pop("rope_type", fields.pop("type", "default"))
        fields.pop("type", None)
        theta = fields.pop("rope_theta", config.get("rope_theta") or theta)
        if fields.pop("partial_rotary_factor", 1.0) not in (None, 1, 1.0):
            raise ValueError("config.json: partial_rotary_factor is not supported")
        if not isinstance(kind, str) or kind not in _KINDS:
            raise ValueError(
                f"config.json: rope_type {kind!r} is not supported; use one of {sorted(_KINDS)}"
            )
        missing = [name for name in _KINDS[kind] if fields.get(name) is None]
        extra = sorted(set(fields) - set(_KINDS[kind]) - set(_OPTIONAL.get(kind, ())))
        if missing or extra:
            raise ValueError(
                f"config.json: rope_type {kind!r} lacks {missing} or has unsupported fields {extra}"
            )
        values = {**fields, "rope_theta": theta}
        stated = {n: v for n, v in values.items() if n != "truncate" and v is not None}
        numbers = all(isinstance(v, int | float) and v >= 0 for v in stated.values())
        if not numbers or not theta > 0 or fields.get("factor", 1) <= 0:
            raise ValueError(f"config.json: rope fields must be positive numbers; found {values}")
        return cls(
            dim,
            float(theta),
            kind,
            int(config.get("max_position_embeddings") or 0),
            tuple(sorted((k, v) for k, v in fields.items() if v is not None)),
            interleaved,
        )

    @property
    def attention_factor(self) -> float:
        """Factor on cos and sin (YaRN's temperature); 1 for the other kinds."""
        if self.kind != "yarn":
            return 1.0
        p = dict(self.parameters)
        if "attention_factor" in p:
            return float(p["attention_factor"])
        if p.get("mscale") and p.get("mscale_all_dim"):
            return yarn_mscale(p["factor"], p["mscale"]) / yarn_mscale(
                p["factor"], p["mscale_all_dim"]
            )
        return yarn_mscale(p["factor"])

    def frequencies(self) -> np.ndarray:
        """Angular step per position of each channel pair, float32 [dim/2] ("dynamic": within the context)."""
        exponent = np.arange(0, self.dim, 2, dtype=np.float32) / np.float32(self.dim)
        inv = (1.0 / (np.float32(self.theta) ** exponent)).astype(np.float32)
        p = dict(self.parameters)
        if self.kind == "linear":
            return inv / np.float32(p["factor"])
        if self.kind == "llama3":
            return _llama3(inv, p)
        if self.kind == "yarn":
            return self._yarn(inv, p)
        return inv

    def _yarn(self, inv: np.ndarray, p: dict) -> np.ndarray:
        trained = p.get("original_max_position_embeddings") or self.max_position

        def channel(rotations: float) -> float:
            return (
                self.dim
                * math.log(trained / (rotations * 2 * math.pi))
                / (2 * math.log(self.theta))
            )

        low, high = channel(p.get("beta_fast") or 32), channel(p.get("beta_slow") or 1)
        if p.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.dim - 1)
        if low == high:
            high += 0.001
        ramp = np.clip((np.arange(self.dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
        return (inv / np.float32(p["factor"]) * ramp + inv * (1 - ramp)).astype(np.float32)

    def angles(
        self, positions: Int[Array, "B T"], lengths: Int[Array, " B"]
    ) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
        """(cos, sin) of each position, float32, times the attention factor.

        Args:
            positions: Token positions.
            lengths: Sequence lengths with these tokens; only "dynamic" depends on them.
        """
        p = positions.astype(jnp.float32)[..., None]
        if self.kind == "dynamic":
            angle = p * self._dynamic(lengths)[:, None, :]
        else:
            angle = p * self.frequencies()[None, None, :]
        return jnp.cos(angle) * self.attention_factor, jnp.sin(angle) * self.attention_factor

    def _dynamic(self, lengths: Array) -> Array:
        """The base grows with the sequence beyond the trained length."""
        factor = float(dict(self.parameters)["factor"])
        length = jnp.maximum(lengths, self.max_position).astype(jnp.float32)
        stretch = factor * length / self.max_position - (factor - 1)
        base = self.theta * stretch ** (self.dim / (self.dim - 2))
        exponent = np.arange(0, self.dim, 2, dtype=np.float32) / np.float32(self.dim)
        return 1.0 / base[:, None] ** exponent[None]

    def rotate(
        self,
        x: Float[Array, "B T N H"],
        cos: Float[Array, "B T half"],
        sin: Float[Array, "B T half"],
    ) -> Float[Array, "B T N H"]:
        """x with each channel pair rotated by its position's angle, computed in float32."""
        if not self.interleaved:
            return rotate(x, cos, sin)
        f = x.astype(jnp.float32)
        cos, sin = cos[:, :, None], sin[:, :, None]
        a, b = f[..., 0::2], f[..., 1::2]
        rotated = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(f.shape)
        return rotated.astype(x.dtype)


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """YaRN's temperature for a context `factor` times longer."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _llama3(inv: np.ndarray, p: dict) -> np.ndarray:
    """Long wavelengths are stretched, short ones kept, those between are blended."""
    trained, low, high = (
        p["original_max_position_embeddings"],
        p["low_freq_factor"],
        p["high_freq_factor"],
    )
    wavelength = 2 * math.pi / inv
    stretched = np.where(wavelength > trained / low, inv / p["factor"], inv)
    blend = (trained / wavelength - low) / (high - low)
    blended = (1 - blend) * stretched / p["factor"] + blend * stretched
    between = (wavelength >= trained / high) & (wavelength <= trained / low)
    return np.where(between, blended, stretched).astype(np.float32)
