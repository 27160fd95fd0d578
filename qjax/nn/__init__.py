"""Flax NNX layers over plain and quantized weights, sharded by rules."""

from qjax.nn._attention import Attention, HeadSharding, Tokens, attend
from qjax.nn._causal_lm import CausalLM, Decoder, quantizable, resolve
from qjax.nn._latent_attention import LatentAttention
from qjax.nn._linear import Embedding, Linear, RMSNorm, sharded_dot
from qjax.nn._mlp import GatedMLP
from qjax.nn._moe import ExpertLinear, Experts, MoE, gated_mlp
from qjax.nn._params import (
    ActivationScale,
    Adapter,
    Context,
    FakeQuantizer,
    KVScale,
    QuantizedParam,
    abstract_param,
    abstract_weight,
    initialize,
    modules,
)
from qjax.nn._prepack import prepack
from qjax.nn._rope import Rope, yarn_mscale
from qjax.nn._router import Router, Routing, route

__all__ = [
    "ActivationScale",
    "Adapter",
    "Attention",
    "CausalLM",
    "Context",
    "Decoder",
    "Embedding",
    "ExpertLinear",
    "Experts",
    "FakeQuantizer",
    "GatedMLP",
    "HeadSharding",
    "KVScale",
    "LatentAttention",
    "Linear",
    "MoE",
    "QuantizedParam",
    "RMSNorm",
    "Rope",
    "Router",
    "Routing",
    "Tokens",
    "abstract_param",
    "abstract_weight",
    "attend",
    "gated_mlp",
    "initialize",
    "modules",
    "prepack",
    "quantizable",
    "resolve",
    "route",
    "sharded_dot",
    "yarn_mscale",
]
