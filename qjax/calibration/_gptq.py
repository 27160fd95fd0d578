"""GPTQ: columns are rounded in turn, and what each loses is made up for by those after it (arXiv:2210.17323)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from qjax.formats import WHOLE, QFormat
from qjax.qarray import QArray, dequantize_stored, expand_blocks, pack
from qjax.quantization import Grid, compute_grid, quantize, round_to_grid

_STATIC_BLOCK = 128
"""Columns updated at once where the grid does not depend on the updated values."""


@dataclasses.dataclass(frozen=True)
class GPTQ:
    """Options of GPTQ.

    Attributes:
        damp: Added to the Hessian's diagonal, as a fraction of its mean.
        actorder: Order of the columns: None as stored; "weight" by falling diagonal of the Hessian, with
            scales of the unpermuted groups; "group" likewise, with groups of the permuted columns (the
            result carries a column permutation). Formats without groups, or with a global scale, take
            "group" as "weight".
    """

    damp: float = 0.01
    actorder: str | None = "weight"

    def __post_init__(self):
        if self.actorder not in (None, "weight", "group") or not self.damp > 0:
            raise ValueError(
                "GPTQ: damp must be positive and actorder None, 'weight' or 'group'; found "
                f"{self.damp}, {self.actorder!r}"
            )


def gptq(
    w: Float[Array, "N K"],
    hessian: Float[Array, "K K"],
    format: QFormat,
    options: GPTQ,
    *,
    dtype: str,
) -> QArray:
    """Quantizes a weight so that ``(Q - w) H (Q - w).T`` becomes small.

    Args:
        w: The weight.
        hessian: Sum of x x^T over calibration inputs x.
        format: The storage.
        options: Damping and column order.
        dtype: Dtype that the result dequantizes to.
    """
    order = jnp.argsort(-jnp.diagonal(hessian), stable=True).astype(jnp.int32)
    grouped = format.block_shape[0] == 1 and format.block_shape[1] != WHOLE
    if options.actorder is None:
        order = jnp.arange(w.shape[1], dtype=jnp.int32)
    dynamic = grouped and not format.global_scale and options.actorder != "weight"
    permuted = dynamic and options.actorder == "group"
    return _gptq(w, hessian, order, format, options.damp, dynamic, permuted, dtype)


@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6, 7))
def _gptq(w, hessian, order, format, damp, dynamic, permuted, dtype) -> QArray:
    w = w.astype(jnp.float32)
    dead = jnp.diagonal(hessian) == 0  # never active: nothing to make up for
    h = hessian + jnp.diag(jnp.where(dead, 1.0, 0.0))
    h = h + damp * jnp.mean(jnp.diagonal(h)) * jnp.eye(h.shape[0], dtype=jnp.float32)
    w = w[:, order]
    inverse = jnp.linalg.inv(h[order][:, order])
    upper = jnp.linalg.cholesky(inverse, upper=True)
    if dynamic:
        updated, grid = _grouped(w, upper, format)
        codes = round_to_grid(updated, format, grid)
        q = QArray.from_parts(
            format,
            pack(codes, format),
            grid.scale,
            zero_point=grid.zero_point,
            minimum=grid.minimum,
            column_perm=order if permuted else None,
            dtype=dtype,
        )
        return q
    back = jnp.argsort(order)
    grid = compute_grid(w[:, back], format)
    per_column = _expanded(grid, (w.shape[0], w.shape[1]), format, order)
    updated = _columns(w, upper, per_column, format, _STATIC_BLOCK)
    return quantize(updated[:, back], format, grid=grid, dtype=dtype)


def _expanded(grid: Grid, shape: tuple[int, int], format: QFormat, order: Array) -> Grid:
    """The grid with one scale per element, columns in GPTQ's order."""
    block = format.block_size(shape)
    return grid.map_blocks(lambda part: expand_blocks(part, shape, block)[:, order])


def _elementwise(format: QFormat) -> QFormat:
    """The same grid with one scale per element."""
    return dataclasses.replace(format, block_shape=(1, 1))


def _rounded(column: Array, grid: Grid, format: QFormat) -> Array:
    """The values that one column [N] keeps, on its elements' scales [N]."""
    f = _elementwise(format)
    grid = grid.map_blocks(lambda part: part[:, None])
    codes = round_to_grid(column[:, None], f, grid)
    scale = grid.scale.astype(jnp.float32)
    if grid.global_scale is not None:
        scale = scale * grid.global_scale
    if grid.minimum is not None:
        unsigned = codes + 2.0 ** (format.bits - 1)
        return (unsigned * scale + grid.minimum.astype(jnp.float32))[:, 0]
    if grid.zero_point is not None:
        codes = codes - grid.zero_point.astype(jnp.float32)
    return (codes * scale)[:, 0]


def _block(w: Array, upper: Array, grid: Grid, format: QFormat) -> tuple[Array, Array]:
    """Rounds the columns of one block in turn.

    Returns:
        The values that each column had when its turn came, and the errors that later blocks make up for.
    """
    width = w.shape[1]

    def column(j, carry):
        w, errors = carry
        at = grid.map_blocks(lambda part: part[:, j])
        error = (w[:, j] - _rounded(w[:, j], at, format)) / upper[j, j]
        later = jnp.where(jnp.arange(width) > j, upper[j], 0.0)
        return w - error[:, None] * later[None], errors.at[:, j].set(error)

    return jax.lax.fori_loop(0, width, column, (w, jnp.zeros_like(w)))


def _columns(w: Array, upper: Array, grid: Grid, format: QFormat, width: int) -> Array:
    """All columns on a given grid (one scale per element): w as each column's turn found it."""
    blocks = []
    for start in range(0, w.shape[1], width):
        cut = slice(start, min(start + width, w.shape[1]))
        local = grid.map_blocks(functools.partial(_take, cut))
        block, errors = _block(w[:, cut], upper[cut, cut], local, format)
        w = w.at[:, cut.stop :].add(-errors @ upper[cut, cut.stop :])
        blocks.append(block)
    return jnp.concatenate(blocks, axis=1)


def _take(cut: slice, part: Array) -> Array:
    return part[:, cut]


def _grouped(w: Array, upper: Array, format: QFormat) -> tuple[Array, Grid]:
    """All columns, each group on the grid of its values when its turn comes."""
    n, k = w.shape
    group = format.block_shape[1]
    one = dataclasses.replace(format, block_shape=(1, WHOLE))

    def step(w, start):
        cut = jax.lax.dynamic_slice(w, (0, start), (n, group))
        rows = jax.lax.dynamic_slice(upper, (start, 0), (group, k))
        square = jax.lax.dynamic_slice(rows, (0, start), (group, group))
        grid = compute_grid(cut, one)
        wide = grid.map_blocks(lambda part: jnp.broadcast_to(part, (n, group)))
        block, errors = _block(cut, square, wide, format)
        later = jnp.where(jnp.arange(k)[None] >= start + group, rows, 0.0)
        w = jax.lax.dynamic_update_slice(w - errors @ later, block, (0, start))
        return w, grid.map_blocks(lambda part: part[:, 0])

    w, grids = jax.lax.scan(step, w, jnp.arange(0, k, group))
    return w, grids.map_blocks(jnp.transpose)


def output_error(w: Array, q: QArray, hessian: Array) -> Array:
    """Relative error of the layer's output on the calibration inputs: ||(Q - w) x|| / ||w x||."""
    w = w.astype(jnp.float32)
    stored = dequantize_stored(q)
    if q.column_perm is not None:
        stored = stored[:, jnp.argsort(q.column_perm)]
    d = stored - w
    return jnp.sqrt(jnp.sum((d @ hessian) * d) / jnp.sum((w @ hessian) * w))
