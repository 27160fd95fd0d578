"""Training and evaluation steps: the forward pass over scanned layers, the losses, the optimizer."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from _training_data import Windows
from flax import nnx
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from qjax import qat
from qjax.nn import CausalLM, Tokens
from qjax.sharding import Sharding

LOGITS_BYTES = 2**30
"""Of float32 logits at a time: those of a whole batch may be larger than the model."""


Stacked = Any
"""A `CausalLM` that `stacked` made: its layers are runs of equal ones, `layer_runs` has their lengths."""


class TrainState(NamedTuple):
    """What a step changes, donated to it: float32 parameters, the optimizer's state, steps taken."""

    params: Any
    optimizer: Any
    step: Array


@dataclasses.dataclass(frozen=True)
class Objective:
    """What is minimized.

    Attributes:
        distill: Weight of the divergence from the teacher; the text's likelihood has the rest.
        temperature: Of the divergence.
        direction: "forward" or "backward"; see `qjax.qat.distillation_loss`.
        remat: Whether each layer's activations are computed again for its gradient.
    """

    distill: float = 0.0
    temperature: float = 1.0
    direction: str = "forward"
    remat: bool = False


def stacked(model: CausalLM) -> Stacked:
    """A copy of the model for `hidden_states`: runs of equal layers as one, their arrays [layers, ...].

    What is compiled does not grow with the layers then, and the optimizer has few arrays to go through.
    Neighbouring layers are equal if they differ in nothing but the values of their parameters.
    """
    runs = _equal_layers(list(model.model.layers))
    whole: Stacked = nnx.merge(*nnx.split(model))
    whole.layer_runs = tuple(len(states) for _, states in runs)

    def stack(*parts):
        own = parts[0].sharding
        array = jnp.stack(parts)
        if not isinstance(own, NamedSharding):
            return array
        return jax.device_put(array, NamedSharding(own.mesh, PartitionSpec(None, *own.spec)))

    whole.model.layers = nnx.List(
        [
            nnx.merge(graphdef, states[0] if len(states) == 1 else jax.tree.map(stack, *states))
            for graphdef, states in runs
        ]
    )
    return whole


def unstacked(model: Stacked) -> CausalLM:
    """A copy of a `stacked` model with its layers one by one."""
    model = nnx.merge(*nnx.split(model))
    layers = []
    for layer, count in zip(model.model.layers, model.layer_runs, strict=True):
        graphdef, state = nnx.split(layer)
        parts = [state] if count == 1 else [_part(state, i) for i in range(count)]
        layers += [nnx.merge(graphdef, part) for part in parts]
    model.model.layers = nnx.List(layers)
    del model.layer_runs
    return model


def _part(state: nnx.State, i: int) -> nnx.State:
    def take(x):
        own = x.sharding
        if not isinstance(own, NamedSharding):
            return x[i]
        return jax.device_put(x[i], NamedSharding(own.mesh, PartitionSpec(*own.spec[1:])))

    return jax.tree.map(take, state)


def hidden_states(model: Stacked, ids: Array, *, remat: bool = False) -> Array:
    """Normed hidden states [B, T, D] of whole sequences by a `stacked` model."""
    b, t = ids.shape
    positions = jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32)[None], (b, t))
    tokens = Tokens(positions, jnp.ones((b, t), bool), jnp.full((b,), t, jnp.int32))
    x = model.model.embed_tokens(ids)
    for template, count in zip(model.model.layers, model.layer_runs, strict=True):
        graphdef, state = nnx.split(template)

        def layer(x, state, graphdef=graphdef):
            return nnx.merge(graphdef, state)(x, tokens, None)[0], None

        body = jax.checkpoint(layer) if remat else layer
        x = (body(x, state) if count == 1 else jax.lax.scan(body, x, state))[0]
    return model.model.norm(x)


def _equal_layers(layers: list[nnx.Module]) -> list[tuple[nnx.GraphDef, list[nnx.State]]]:
    """Runs of neighbouring layers that are the same function of their state."""
    runs: list[tuple[Any, nnx.GraphDef, list[nnx.State]]] = []
    for layer in layers:
        graphdef, state = nnx.split(layer)
        leaves, structure = jax.tree.flatten(state)
        kind = (graphdef, structure, [(x.shape, x.dtype) for x in leaves])
        if runs and runs[-1][0] == kind:
            runs[-1][2].append(state)
        else:
            runs.append((kind, graphdef, [state]))
    return [(graphdef, states) for _, graphdef, states in runs]


def losses(
    model: Stacked, teacher: Stacked | None, batch: dict[str, Array], objective: Objective
) -> tuple[Array, Array]:
    """Sums over counted targets of the negative log-likelihood and of the divergence, nats.

    Args:
        model: The student; like the teacher, `stacked`.
        teacher: None for no divergence (0).
        batch: "tokens" int32 [B, T + 1], "counted" bool [B, T + 1].
        objective: Temperature, direction, rematerialization.
    """
    ids, targets = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
    counted = batch["counted"][:, 1:]
    hidden = hidden_states(model, ids, remat=objective.remat)
    guide = hidden
    if teacher is not None:
        guide = jax.lax.stop_gradient(hidden_states(teacher, ids))
    chunks = _chunks(ids.shape[0], ids.shape[1], model.vocab_size, model.sharding)

    def chunk(sums, parts):
        hidden, guide, targets, counted = parts
        logits = model.logits(hidden)
        logp = jax.nn.log_softmax(logits, axis=-1)
        nll = -jnp.take_along_axis(logp, targets[..., None], axis=-1)[..., 0]
        nll = jnp.sum(jnp.where(counted, nll, 0.0))
        kl = jnp.zeros((), jnp.float32)
        if teacher is not None:
            kl = qat.distillation_loss(
                logits,
                teacher.logits(guide),
                temperature=objective.temperature,
                mask=counted,
                direction=objective.direction,
            ) * jnp.sum(counted.astype(jnp.float32))
        return (sums[0] + nll, sums[1] + kl), None

    def cut(x):
        parts = x.reshape(x.shape[0], chunks, x.shape[1] // chunks, *x.shape[2:])
        return jnp.moveaxis(parts, 1, 0)

    zero = (jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32))
    parts = jax.tree.map(cut, (hidden, guide, targets, counted))
    # Several parts are there to save memory, so their logits are not kept for the gradient.
    return jax.lax.scan(jax.checkpoint(chunk) if chunks > 1 else chunk, zero, parts)[0]


def _chunks(batch: int, length: int, vocab: int, sharding: Sharding) -> int:
    """Into how many equal parts of a sequence logits are cut, so that one part is LOGITS_BYTES or less."""
    rows = batch // sharding.size(sharding.axis("batch", batch))
    wanted = -(-rows * length * vocab * 4 // LOGITS_BYTES)
    return next(n for n in range(min(max(wanted, 1), length), length + 1) if length % n == 0)


def optimizer(
    schedule: optax.Schedule,
    *,
    betas: tuple[float, float],
    weight_decay: float,
    clip: float,
    decays: Any,
) -> optax.GradientTransformation:
    """AdamW (arXiv:1711.05101) after clipping the gradient's global norm; see `matrices` for `decays`."""
    b1, b2 = betas
    adam = optax.adamw(schedule, b1=b1, b2=b2, weight_decay=weight_decay, mask=decays)
    return optax.chain(optax.clip_by_global_norm(clip), adam) if clip > 0 else adam


def matrices(params: nnx.State, runs: tuple[int, ...]) -> Any:
    """Which parameters decay: weights with two axes, apart from that of stacked layers."""

    def decays(path, variable):
        names = [entry.key for entry in path]
        in_run = names[:2] == ["model", "layers"] and runs[names[2]] > 1
        learned = isinstance(variable, qat.LearnedScale | qat.LearnedRounding)
        return variable.get_value().ndim - in_run >= 2 and not learned

    return jax.tree_util.tree_map_with_path(
        decays, params, is_leaf=lambda x: isinstance(x, nnx.Variable)
    )


def schedule(kind: str, rate: float, steps: int, warmup: int, final: float) -> optax.Schedule:
    """The learning rate: from 0 to `rate` in `warmup` steps, then constant or down to final * rate.

    The last step's rate is the final one.
    """
    rest = max(steps - warmup - 1, 1)
    after = {
        "constant": optax.constant_schedule(rate),
        "linear": optax.linear_schedule(rate, final * rate, rest),
        "cosine": optax.cosine_decay_schedule(rate, rest, final),
    }[kind]
    if warmup == 0:
        return after
    # Step 0 has rate / warmup, not 0: a step without an update would be wasted.
    rise = optax.linear_schedule(rate / warmup, rate, max(warmup - 1, 1))
    return optax.join_schedules([rise, after], [warmup])


def fully_sharded(tree: Any, sharding: Sharding) -> Any:
    """The arrays cut over the mesh's data axis as well, each along its first axis that it divides.

    Matrices only: gathering them when a layer needs them costs less than keeping them (arXiv:1910.02054,
    stage 3).
    """
    mesh = sharding.mesh
    if mesh is None:
        return tree
    size = sharding.size("data")

    def place(x):
        own = getattr(x, "sharding", None)
        spec = tuple(own.spec) if isinstance(own, NamedSharding) else ()
        spec = list(spec + (None,) * (x.ndim - len(spec)))
        if size > 1 and x.ndim >= 2 and jnp.issubdtype(x.dtype, jnp.floating):
            free = [i for i, axis in enumerate(spec) if axis is None and x.shape[i] % size == 0]
            if free:
                spec[free[0]] = "data"
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree.map(place, tree)


def start(params: nnx.State, transform: optax.GradientTransformation) -> TrainState:
    """The state before the first step; the optimizer's arrays lie where their parameters do."""
    shapes = jax.eval_shape(transform.init, params)
    step = jnp.zeros((), jnp.int32)
    mesh = next(
        (x.sharding.mesh for x in jax.tree.leaves(params) if isinstance(x.sharding, NamedSharding)),
        None,
    )
    if mesh is None:
        return TrainState(params, jax.jit(transform.init)(params), step)
    whole = NamedSharding(mesh, PartitionSpec())
    where = jax.tree.map(lambda x: x.sharding, params)
    placed = optax.tree_map_params(
        transform, lambda _, s: s, shapes, where, transform_non_params=lambda _: whole
    )
    made = jax.jit(transform.init, out_shardings=placed)(params)
    return TrainState(params, made, jax.device_put(step, whole))


def train_step(
    graphdef: nnx.GraphDef,
    teacher: nnx.GraphDef | None,
    transform: optax.GradientTransformation,
    objective: Objective,
    state: TrainState,
) -> Callable:
    """The jitted step (state, frozen, teacher's state, batch) -> (state, metrics); state is donated.

    A batch has leading axes [A, B]: gradients of A parts are added up, each part's losses divided by the
    counted tokens of the whole batch, so that the parts do not change the result.

    Args:
        graphdef: The model's, split into trainable parameters and the rest.
        teacher: The teacher's, None for none.
        transform: The optimizer.
        objective: What is minimized.
        state: The first state, whose shardings all later ones keep.
    """
    where = jax.tree.map(lambda x: x.sharding, state)

    def loss(params, frozen, teacher_state, batch, total):
        model = nnx.merge(graphdef, params, frozen)
        guide = None if teacher is None else nnx.merge(teacher, teacher_state)
        nll, kl = losses(model, guide, batch, objective)
        value = (1 - objective.distill) * nll + objective.distill * kl
        parts = {"nll": nll / total}
        return value / total, parts if teacher is None else parts | {"kl": kl / total}

    gradient = jax.value_and_grad(loss, has_aux=True)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, frozen, teacher_state, batch):
        frozen = _at_step(frozen, state.step)
        total = jnp.maximum(jnp.sum(batch["counted"][..., 1:].astype(jnp.float32)), 1.0)

        def part(sums, batch):
            found = gradient(state.params, frozen, teacher_state, batch, total)
            found = (found[0], _keep(found[1], where.params))
            return jax.tree.map(jnp.add, sums, found), None

        if batch["tokens"].shape[0] == 1:
            one = jax.tree.map(lambda x: x[0], batch)
            (value, parts), gradients = gradient(state.params, frozen, teacher_state, one, total)
            gradients = _keep(gradients, where.params)
        else:
            shapes = jax.eval_shape(
                gradient,
                state.params,
                frozen,
                teacher_state,
                jax.tree.map(lambda x: x[0], batch),
                total,
            )
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
            ((value, parts), gradients), _ = jax.lax.scan(part, zeros, batch)
        updates, optimizer_state = transform.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        new = _keep(TrainState(params, optimizer_state, state.step + 1), where)
        return new, {"loss": value, **parts, "grad_norm": optax.tree.norm(gradients)}

    return step


def _at_step(frozen: nnx.State, step: Array) -> nnx.State:
    """The state of a model that knows at which step of its schedule it is; see `qjax.qat.set_step`."""

    def tell(variable):
        if not isinstance(variable, qat.Step):
            return variable
        return variable.replace(jnp.broadcast_to(step, variable.get_value().shape))

    return jax.tree.map(tell, frozen, is_leaf=lambda x: isinstance(x, nnx.Variable))


def _keep(tree: Any, where: Any) -> Any:
    """The arrays on the devices that they came from."""

    def keep(x, s):
        return jax.lax.with_sharding_constraint(x, s) if isinstance(s, NamedSharding) else x

    return jax.tree.map(keep, tree, where)


def put(batch: Any, parts: int, sharding: Sharding) -> dict[str, Array]:
    """A batch on the devices as [parts, B / parts, T + 1], its rows over the mesh's data axis."""

    def one(x):
        x = np.asarray(x)
        x = x.reshape(parts, x.shape[0] // parts, *x.shape[1:])
        where = sharding.named(None, sharding.axis("batch", x.shape[1]))
        return jnp.asarray(x) if where is None else jax.device_put(x, where)

    return {name: one(x) for name, x in batch.items()}


@functools.partial(jax.jit, static_argnums=0)
def _score(graphdef: nnx.GraphDef, state: nnx.State, batch: dict[str, Array]) -> Array:
    return losses(nnx.merge(graphdef, state), None, batch, Objective())[0]


def evaluate(model: CausalLM, windows: Windows, batch: int) -> float:
    """Mean negative log-likelihood of the counted targets by a model that is not stacked, nats."""
    graphdef, state = nnx.split(stacked(model))
    total = 0.0
    for first in range(0, len(windows), batch):
        rows = windows.rows(slice(first, first + batch))
        missing = ((0, batch - len(rows)), (0, 0))  # one shape, one compilation
        padded = {
            "tokens": np.pad(rows.tokens, missing),
            "counted": np.pad(rows.counted, missing),
        }
        one = {name: x[0] for name, x in put(padded, 1, model.sharding).items()}
        total += float(_score(graphdef, state, one))
    return total / int(windows.counted[:, 1:].sum())
