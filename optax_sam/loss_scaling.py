"""Loss scaling for half precision: gradients that neither underflow on the way nor come out scaled."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp

from optax_sam import _tree
from optax_sam._checks import check_callable
from optax_sam._hyperparameters import check_number
from optax_sam._loss_checks import call_loss


def loss_scaled(loss_fn: Callable[..., Any], scale: chex.Numeric) -> Callable[..., Any]:
    r"""The same loss, whose derivatives are computed scaled and handed out unscaled.

    In float16 small derivatives vanish on their way back through the network. Multiplying the loss by
    a large scale keeps them alive, but then gradients come out scaled. This loss multiplies the
    derivative by ``scale`` where it enters at the loss, and divides it by ``scale`` where it leaves at
    the parameters: value and gradients are those of ``loss_fn``. Give it to a method, which takes the
    perturbed gradient; for the clean gradient keep what you have (Flax's ``DynamicScale``, jmp), or
    differentiate this loss there too.

    A finite clean gradient does not mean that the perturbed one is finite. Put
    ``optax.apply_if_finite`` *behind* the method: its ``last_finite`` is about the perturbed gradient.
    It does not undo what the method itself keeps, such as the averages of VaSSO and Friendly-SAM.
    Around the whole chain it would, but there it looks at the clean gradient.

    Args:
      loss_fn: ``params -> loss`` or ``(loss, aux)``, **without** a scale in it; or an
        :class:`optax_sam.Objective`, which stays one.
      scale: a positive scalar, static or traced (dynamic), typically :math:`2^{10}` to :math:`2^{16}`.

    Returns:
      A loss function of the same kind. It can be differentiated in reverse mode only.

    Raises:
      TypeError: if ``loss_fn`` is not callable or ``scale`` is not a number.
      ValueError: if ``scale`` is not positive and finite.

    Example:
      >>> import jax, jax.numpy as jnp, optax_sam
      >>> loss_fn = lambda w: jnp.sum(1e-4 * w.astype(jnp.float16)).astype(jnp.float32) * 1e-4
      >>> w = jnp.ones(1)
      >>> float(jax.grad(loss_fn)(w)[0]) == 0  # underflows in float16
      True
      >>> round(float(jax.grad(optax_sam.loss_scaled(loss_fn, 2.0**15))(w)[0]) * 1e8, 2)
      1.0

    References:
      Micikevicius et al., Mixed Precision Training, ICLR 2018, arXiv 1710.03740, section 3.2.
    """
    check_callable("loss_fn", loss_fn, "Pass the loss as a function of the parameters.")
    check_scale("scale", scale)
    if hasattr(loss_fn, "loss_scale"):  # an Objective, which this file must not import
        objective: Any = loss_fn
        scaled_objective: Callable[..., Any] = objective.replace(loss_scale=scale)
        return scaled_objective

    def scaled(params: chex.ArrayTree) -> Any:
        output = call_loss(loss_fn, scale_cotangents(params, scale, "divide"))
        if isinstance(output, tuple):
            loss, *others = output
            return scale_cotangents(loss, scale, "multiply"), *others
        return scale_cotangents(output, scale, "multiply")

    return scaled


def check_scale(name: str, scale: chex.Numeric) -> None:
    """Raises unless a loss scale is a positive number; of a traced one only the shape is checked."""
    check_number(
        name,
        scale,
        minimum=0,
        exclusive_minimum=True,
        remedy="It multiplies the loss, typically by 2**10 to 2**16.",
    )


def scale_cotangents(
    tree: chex.ArrayTree, scale: chex.Numeric | None, how: Literal["multiply", "divide"]
) -> Any:
    """The tree itself, whose derivative is multiplied or divided by the scale (None: left alone)."""
    if scale is None:
        return tree
    return _scale_cotangents(how, tree, jnp.asarray(scale, float))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scale_cotangents(how: str, tree: chex.ArrayTree, scale: jax.Array) -> chex.ArrayTree:
    del how, scale
    return tree


def _forward(how: str, tree: chex.ArrayTree, scale: jax.Array) -> tuple[chex.ArrayTree, jax.Array]:
    del how
    return tree, scale


def _backward(
    how: str, scale: jax.Array, cotangents: chex.ArrayTree
) -> tuple[chex.ArrayTree, jax.Array]:
    def one(cotangent: Any) -> Any:
        if getattr(cotangent, "dtype", None) == jax.dtypes.float0 or not _tree.is_floating(
            cotangent
        ):
            return cotangent
        dtype = _tree.accumulation_dtype(cotangent)
        wide, by = cotangent.astype(dtype), scale.astype(dtype)
        return (wide * by if how == "multiply" else wide / by).astype(cotangent.dtype)

    return jax.tree.map(one, cotangents), jnp.zeros_like(scale)


_scale_cotangents.defvjp(_forward, _backward)

__all__ = ["loss_scaled"]
