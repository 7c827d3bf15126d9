"""The loss along lines and on planes through the parameters."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from optax_sam import _tree
from optax_sam._checks import check_leaves, check_like
from optax_sam._loss_checks import call_loss, split_loss_and_aux
from optax_sam.convolutions import inside_control_flow
from optax_sam.diagnostics._compiled import compiled_for_loss


def filter_normalized(
    direction: chex.ArrayTree, params: chex.ArrayTree, *, filter_axis: int = -1
) -> chex.ArrayTree:
    r"""A direction whose filters are as long as those of the parameters.

    .. math:: d_f \leftarrow \frac{\lVert w_f \rVert}{\lVert d_f \rVert} \, d_f

    Without it, slices of networks that differ in the scale of their weights cannot be compared. A
    filter is all that belongs to one output: of a kernel of Flax, one index of its last axis. Leaves
    with fewer than two axes (biases, scales of normalization layers) stay as they are in the slice:
    their direction is zero.

    Args:
      direction: a pytree like ``params``, for example ``optax.tree.random_like(key, params)``.
      params: the parameters w.
      filter_axis: the axis of the outputs; 0 for Equinox and PyTorch.

    Returns:
      The direction, a pytree like ``params``.

    Raises:
      ValueError: if ``direction`` is not like ``params``.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_sam.diagnostics import filter_normalized
      >>> direction = {"kernel": jnp.array([[1.0, 1.0], [0.0, 0.0]]), "bias": jnp.ones(2)}
      >>> params = {"kernel": jnp.array([[3.0, 0.0], [4.0, 1.0]]), "bias": jnp.ones(2)}
      >>> filter_normalized(direction, params)["kernel"].tolist()
      [[5.0, 1.0], [0.0, 0.0]]

    References:
      Li et al., Visualizing the Loss Landscape of Neural Nets, NeurIPS 2018, arXiv 1712.09913,
      section 4.
    """
    direction = _as_direction("direction", direction, params)
    if filter_axis not in (0, -1):
        raise ValueError(
            f"filter_axis must be -1 (Flax) or 0 (Equinox, PyTorch), got {filter_axis!r}."
        )

    def one(d: jax.Array, w: jax.Array) -> jax.Array:
        if d.ndim < 2:
            return jnp.zeros_like(d)
        axes = tuple(range(1, d.ndim)) if filter_axis == 0 else tuple(range(d.ndim - 1))
        dtype = _tree.accumulation_dtype(d)
        lengths = [jnp.linalg.norm(_flat(x.astype(dtype), axes), axis=0) for x in (w, d)]
        factors = jnp.expand_dims(_tree.divide_or_zero(*lengths), axes)
        return d.astype(dtype) * factors

    return _tree.map_floating(one, direction, _tree.as_arrays(params))


def loss_line(
    loss_fn: Callable[..., Any],
    params: chex.ArrayTree,
    direction: chex.ArrayTree,
    positions: ArrayLike,
) -> jax.Array:
    r"""The loss along a line, :math:`L(w + a \, d)`.

    A forward pass per position, one after the other in one compiled program.

    Args:
      loss_fn: ``params -> loss`` or ``(loss, aux)``, or an :class:`optax_sam.Objective`. A plain
        function is compiled anew in each call, an ``Objective`` or a ``jax.tree_util.Partial`` once.
      params: the parameters w.
      direction: d, a pytree like ``params``: filter-normalized, a gradient, a perturbation, an
        eigenvector, or the way to another network.
      positions: the a, shape ``(k,)``.

    Returns:
      The losses, shape ``(k,)``.

    Raises:
      ValueError: if ``direction`` is not like ``params``, or ``positions`` do not have one axis.
      TypeError: if ``loss_fn`` does not return a scalar loss.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_sam.diagnostics import loss_line
      >>> loss_line(lambda w: w @ w, jnp.ones(2), jnp.array([1.0, 0.0]), jnp.arange(3.0)).tolist()
      [2.0, 5.0, 10.0]

    References:
      Goodfellow et al., Qualitatively Characterizing Neural Network Optimization Problems, ICLR 2015,
      arXiv 1412.6544.
    """
    direction = _as_direction("direction", direction, params)
    along = _check_positions("positions", positions)
    losses: jax.Array = _losses(loss_fn, params, [direction], along[:, None])
    return losses


def loss_plane(
    loss_fn: Callable[..., Any],
    params: chex.ArrayTree,
    first: chex.ArrayTree,
    second: chex.ArrayTree,
    first_positions: ArrayLike,
    second_positions: ArrayLike,
) -> jax.Array:
    r"""The loss on a plane, :math:`L(w + a \, d_1 + b \, d_2)`.

    A forward pass per point, one after the other in one compiled program.

    Args:
      loss_fn: ``params -> loss`` or ``(loss, aux)``, or an :class:`optax_sam.Objective`. A plain
        function is compiled anew in each call, an ``Objective`` or a ``jax.tree_util.Partial`` once.
      params: the parameters w.
      first: :math:`d_1`, a pytree like ``params``.
      second: :math:`d_2`, likewise.
      first_positions: the a, shape ``(k,)``.
      second_positions: the b, shape ``(m,)``.

    Returns:
      The losses, shape ``(k, m)``.

    Raises:
      ValueError: if a direction is not like ``params``, or positions do not have one axis.
      TypeError: if ``loss_fn`` does not return a scalar loss.

    Example:
      >>> import jax.numpy as jnp
      >>> from optax_sam.diagnostics import loss_plane
      >>> e = jnp.eye(2)
      >>> loss_plane(lambda w: w[0] - w[1], jnp.zeros(2), e[0], e[1], [0.0, 1.0], [0.0, 2.0]).tolist()
      [[0.0, -2.0], [1.0, -1.0]]

    References:
      Li et al., NeurIPS 2018, arXiv 1712.09913, section 3.
    """
    first = _as_direction("first", first, params)
    second = _as_direction("second", second, params)
    a = _check_positions("first_positions", first_positions)
    b = _check_positions("second_positions", second_positions)
    grid = jnp.stack(jnp.meshgrid(a, b, indexing="ij"), axis=-1).reshape(-1, 2)
    losses: jax.Array = _losses(loss_fn, params, [first, second], grid)
    return losses.reshape(a.size, b.size)


def _loss_at_points(
    loss_fn: Callable[..., Any],
    params: chex.ArrayTree,
    directions: list[chex.ArrayTree],
    points: jax.Array,
) -> jax.Array:
    params = _tree.as_arrays(params)

    def loss_at(point: jax.Array) -> jax.Array:
        moved = params
        for coordinate, direction in zip(point, directions, strict=True):
            moved = _tree.add(moved, _tree.scale(direction, coordinate))
        return split_loss_and_aux(call_loss(loss_fn, moved), moved)[0]

    losses: jax.Array = lax.map(inside_control_flow(loss_at), points)
    return losses


_losses = compiled_for_loss(_loss_at_points)


def _flat(leaf: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    kept = next(axis for axis in range(leaf.ndim) if axis not in axes)
    return jnp.moveaxis(leaf, kept, -1).reshape(-1, leaf.shape[kept])


def _as_direction(name: str, direction: chex.ArrayTree, params: chex.ArrayTree) -> Any:
    """The direction; integers, too, are numbers along a line."""
    check_leaves(params)
    check_like(name, direction, params, of="params", remedy="It is a direction in parameter space.")
    return _tree.as_floating(_tree.as_arrays(direction), _tree.as_arrays(params))


def _check_positions(name: str, positions: ArrayLike) -> jax.Array:
    array = jnp.asarray(positions, float)
    if array.ndim != 1 or not array.size:
        raise ValueError(
            f"{name} must have shape (k,) with k of at least 1, got {array.shape}. Write e.g. "
            "jnp.linspace(-1, 1, 51)."
        )
    return array
