"""The module that a layer holds while it is trained to be quantized: grids, learned parameters, schedule."""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jax import Array

from qjax.formats import ActivationFormat, QFormat
from qjax.nn import FakeQuantizer
from qjax.ops import straight_through
from qjax.qarray import QArray
from qjax.qat._fake_quant import fake_quant, stored_scale
from qjax.quantization import Grid, compute_grid, quantize, quantize_activation


class Step(nnx.Variable):
    """The training step that schedules count, int32: a traced value, so that no step compiles anew."""


class LearnedScale(nnx.Param):
    """Scales of a weight's blocks that are trained (arXiv:1902.08153), float32."""


class LearnedRounding(nnx.Param):
    """Offsets of a weight before it is rounded that are trained (arXiv:2309.05516), in [-0.5, 0.5] scales."""


class GridConstant(nnx.Variable):
    """What a learned grid keeps as it was at first: zero points, minimums, the global scale."""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """When quantization sets in.

    The forward pass uses ``w + strength * (quantized(w) - w)``; gradients are mixed in the same way.

    Attributes:
        start_step: Steps before it run unquantized.
        ramp_steps: Steps over which the strength then grows linearly to 1; 0 is at once.
        stages: ((step, format), ...) in rising order: wider formats that weights pass through before the
            recipe's own, each until the step it names (progressive quantization).

    Raises:
        ValueError: If a number is negative or the stages do not rise.
    """

    start_step: int = 0
    ramp_steps: int = 0
    stages: tuple[tuple[int, QFormat], ...] = ()

    def __post_init__(self):
        steps = [step for step, _ in self.stages]
        if self.start_step < 0 or self.ramp_steps < 0:
            raise ValueError(f"Schedule: steps can't be negative; found {self}")
        if steps != sorted(set(steps)) or (steps and steps[0] <= self.start_step):
            raise ValueError(
                f"Schedule: stages must end at rising steps after start_step={self.start_step}; found {steps}"
            )

    @property
    def counts(self) -> bool:
        """Whether it depends on the step at all."""
        return bool(self.start_step or self.ramp_steps or self.stages)

    def strength(self, step: Array) -> Array:
        """0 before the start, 1 after the ramp, float32."""
        done = (step - self.start_step + 1).astype(jnp.float32)
        return jnp.clip(done / (self.ramp_steps + 1), 0.0, 1.0)

    def mix(self, x: Array, quantized: Array, step: Array | None) -> Array:
        """x on its way to its quantized value."""
        if not (self.start_step or self.ramp_steps) or step is None:
            return quantized
        strength = self.strength(step)
        mixed = x + strength.astype(x.dtype) * (quantized - x)
        # At full strength the sum would be rounded: codes must be the converted model's.
        return jnp.where(strength == 1.0, quantized, mixed)


@dataclasses.dataclass(frozen=True)
class Training:
    """How grids are trained.

    Attributes:
        clip: Whether values beyond the grid get no gradient.
        learn_scale: Whether the weights' scales are trained, with the paper's gradient factor
            1 / sqrt(elements of a block * end of the grid).
        learn_rounding: Whether rounding offsets are trained.
        schedule: When quantization sets in.
    """

    clip: bool = False
    learn_scale: bool = False
    learn_rounding: bool = False
    schedule: Schedule = dataclasses.field(default_factory=Schedule)


class GridQuantizer(FakeQuantizer):
    """Fake quantization of a layer's weight and input by formats of `qjax.formats`."""

    def __init__(
        self,
        weights: QFormat | None,
        activations: ActivationFormat | None,
        training: Training,
        step: Step | None,
        weight: Array | None = None,
    ):
        """Builds it.

        Args:
            weights: The weight's format, None leaves it.
            activations: The input's, None leaves it.
            training: What is trained, and when.
            step: The model's step, None if the schedule does not count.
            weight: The weight [..., N, K], from which learned grids start.
        """
        self.weights, self.activations, self.training = weights, activations, training
        self.step = nnx.data(step)
        self.scale: LearnedScale | None = nnx.data(None)
        self.rounding: LearnedRounding | None = nnx.data(None)
        self.zero_point: GridConstant | None = nnx.data(None)
        self.minimum: GridConstant | None = nnx.data(None)
        self.global_scale: GridConstant | None = nnx.data(None)
        if weights is None or weight is None:
            return
        if training.learn_scale:
            grid = compute_grid(weight, weights)
            self.scale = LearnedScale(grid.scale.astype(jnp.float32))
            for name in ("zero_point", "minimum", "global_scale"):
                part = getattr(grid, name)
                setattr(self, name, None if part is None else GridConstant(part))
        if training.learn_rounding:
            self.rounding = LearnedRounding(jnp.zeros(weight.shape, jnp.float32))

    def _grid(self, shape: tuple[int, ...]) -> Grid | None:
        """The learned grid, None where scales follow the weight."""
        if self.scale is None:
            return None
        assert self.weights is not None
        scale = self.scale.get_value()
        block, element = self.weights.block_size(shape), self.weights.spec
        factor = (block[0] * block[1] * element.max) ** -0.5
        parts = (self.zero_point, self.minimum, self.global_scale)
        constants = (None if p is None else p.get_value() for p in parts)
        return Grid(straight_through(factor * scale, scale), *constants)

    def _offsets(self) -> Array | None:
        return None if self.rounding is None else jnp.clip(self.rounding.get_value(), -0.5, 0.5)

    def weight(self, w: Array) -> Array:
        """The weight as the forward pass uses it at this step."""
        if self.weights is None:
            return w
        schedule = self.training.schedule
        step = None if self.step is None else self.step.get_value()
        y = fake_quant(
            w,
            self.weights,
            grid=self._grid(w.shape),
            rounding=self._offsets(),
            clip=self.training.clip,
        )
        for until, format in reversed(schedule.stages):
            assert step is not None
            y = jnp.where(step < until, fake_quant(w, format, clip=self.training.clip), y)
        return schedule.mix(w, y, step)

    def input(self, x: Array) -> Array:
        """The layer's input [..., K] as the forward pass uses it at this step."""
        if self.activations is None:
            return x
        rows = quantize_activation(x.reshape(-1, x.shape[-1]), self.activations)
        y = straight_through(x, rows.dequantize(x.dtype).reshape(x.shape))
        step = None if self.step is None else self.step.get_value()
        return self.training.schedule.mix(x, y, step)

    def quantized(self, w: Array) -> QArray:
        """The weight as it is stored after training, on the grid that `weight` has at full strength."""
        assert self.weights is not None
        grid = self._grid(w.shape)
        if grid is not None:
            grid = grid._replace(scale=stored_scale(grid.scale, self.weights.scale_dtype))
        return quantize(w, self.weights, grid=grid, rounding=self._offsets())
