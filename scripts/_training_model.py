"""The model of a training run: prepared for the step, converted for use, exported."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import _training_step as training_step
import jax
import jax.numpy as jnp
import optax
from flax import nnx

from qjax import checkpoint, qat
from qjax.formats import FORMATS, qformat
from qjax.nn import CausalLM, QuantizedParam
from qjax.qarray import QArray
from qjax.recipe import QuantSpec, Recipe, Rule, recipe


def chosen_recipe(args: argparse.Namespace, layers: int) -> Recipe | None:
    """What --recipe names, for a model of so many layers; None for weights that are not fake quantized."""
    if args.recipe in ("stored", "none"):
        return None
    if args.recipe not in FORMATS:
        found = recipe(args.recipe, ignore=tuple(args.ignore), num_layers=layers)
        return found if found.rules else None
    kinds = ("Linear", "Experts")
    rule = Rule(kinds, QuantSpec(qformat(args.recipe)))
    return Recipe((rule,), tuple(args.ignore), None, frozenset((*kinds, *args.ignore)))


@dataclasses.dataclass
class Training:
    """A model on its way: its parts as the step takes them."""

    args: argparse.Namespace
    recipe: Recipe | None
    transform: optax.GradientTransformation
    graphdef: nnx.GraphDef
    state: training_step.TrainState
    frozen: nnx.State
    trainable: type[nnx.Variable]

    def model(self) -> CausalLM:
        """The model with the parameters of now; the next step takes their buffers away."""
        return training_step.unstacked(nnx.merge(self.graphdef, self.state.params, self.frozen))

    def take(self, model: CausalLM, optimizer: Any, step: int) -> None:
        """Goes on with this model's parameters and this state of the optimizer."""
        _, params, self.frozen = nnx.split(training_step.stacked(model), self.trainable, ...)
        taken = jax.device_put(jnp.asarray(step, jnp.int32), self.state.step.sharding)
        self.state = training_step.TrainState(params, optimizer, taken)

    def converted(self) -> CausalLM:
        """The model as it is used after training: adapters merged, weights quantized."""
        model = self.model()
        if self.args.lora_rank:
            qat.merge_lora(model)
        return model if self.recipe is None else qat.convert(model)


def prepared(args: argparse.Namespace, model: CausalLM, dtype: str) -> Training:
    """The model with fake quantization and adapters, its trainable parameters float32."""
    wanted = chosen_recipe(args, len(model.model.layers))
    if wanted is not None:
        model = qat.prepare(
            model,
            wanted,
            clip=args.clip_grid,
            learn_scale=args.learn_scale,
            start_step=args.start_step,
            ramp_steps=args.ramp_steps,
        )
    if args.fp8_training:
        element = {"e4m3": "float8_e4m3fn", "e5m2": "float8_e5m2"}[args.fp8_training]
        qat.fp8_training(model, gradient_element=element, ignore=args.ignore)
    model.model.embed_tokens.dtype = dtype
    trainable: type[nnx.Variable] = nnx.Param
    if args.lora_rank:
        key = jax.random.key(args.seed)
        qat.add_lora(model, args.lora_rank, args.lora_alpha, key=key, ignore=args.ignore)
        trainable = nnx.LoRAParam
    graphdef, state = nnx.split(model)
    model = nnx.merge(graphdef, training_step.fully_sharded(state, model.sharding))
    runs = training_step.stacked(model)
    graphdef, params, frozen = nnx.split(runs, trainable, ...)
    transform = training_step.optimizer(
        learning_rate(args),
        betas=tuple(args.betas),
        weight_decay=args.weight_decay,
        clip=args.clip,
        decays=training_step.matrices(params, runs.layer_runs),
    )
    state = training_step.start(params, transform)
    return Training(args, wanted, transform, graphdef, state, frozen, trainable)


def learning_rate(args: argparse.Namespace) -> optax.Schedule:
    """The learning rate of each step, counted from 0."""
    return training_step.schedule(args.schedule, args.lr, args.steps, args.warmup, args.final_lr)


def copied(model: CausalLM, dtype: str) -> tuple[nnx.GraphDef, nnx.State]:
    """The model with its float32 matrices in `dtype`: the teacher, in buffers of its own."""
    graphdef, state = nnx.split(model)

    def copy(x):
        narrowed = x.ndim >= 2 and x.dtype == jnp.float32
        return jnp.array(x, dtype if narrowed else x.dtype, copy=True)

    teacher = nnx.merge(graphdef, jax.tree.map(copy, state))
    teacher.model.embed_tokens.dtype = dtype
    graphdef, state = nnx.split(teacher)
    state = training_step.fully_sharded(state, model.sharding)
    return nnx.split(training_step.stacked(nnx.merge(graphdef, state)))


def exported(training: Training, loaded: checkpoint.LoadedModel) -> Path:
    """Writes --export: what is not quantized becomes bfloat16, but for what the family keeps float32."""
    args = training.args
    model = training.converted()
    model.dtype = "bfloat16"
    plain = {path: v.get_value().dtype for path, v in nnx.to_flat_state(nnx.state(model.like({})))}
    for path, variable in nnx.to_flat_state(nnx.state(model, (nnx.Param, QuantizedParam))):
        value = variable.get_value()
        if isinstance(value, QArray):
            variable.set_value(dataclasses.replace(value, dtype="bfloat16"))
        else:
            variable.set_value(value.astype(plain[path]))
    quantized = args.recipe != "none" and any(
        isinstance(v, QuantizedParam) for _, v in nnx.to_flat_state(nnx.state(model))
    )
    format = args.export_format or ("compressed-tensors" if quantized else "bf16")
    return checkpoint.export(model, args.export, format=format, source=loaded, progress=False)
