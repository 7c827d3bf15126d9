"""What a method adds to the gradient does not go through the momentum: WSAM's decoupled form."""

from typing import Any, NamedTuple

import chex
import jax.numpy as jnp
import optax

from optax_sam import _tree
from optax_sam._stages import as_stage
from optax_sam.combinations._clean_gradients import require_clean_gradients


class DecouplingState(NamedTuple):
    """State of :func:`decouple`.

    Attributes:
      base: the state of the base optimizer.
    """

    base: optax.OptState


def decouple(base: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    r"""Hands the clean gradient to the base optimizer, and adds the sharpness term behind it.

    .. math:: d = \mathrm{base}(g) + (d_0 - g)

    with :math:`d_0` the direction that arrives: g', or what combinations before this one made of it.
    The learning rate stands behind the method, so that it scales both terms. In place of
    ``optax.chain(method, optax.sgd(0.1, momentum=0.9))`` write

    .. code-block:: python

       method = optax_sam.sam(0.05, combination=optax_sam.decouple(optax.trace(0.9)))
       optax.chain(method, optax.scale_by_learning_rate(0.1))

    Args:
      base: the base optimizer without its learning rate: ``optax.trace(0.9)``,
        ``optax.scale_by_adam()``, or a chain with weight decay before it.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` on g'. Its ``update`` needs the extra argument
      ``clean_grads`` (g), and hands all others to ``base``. With :func:`optax_sam.sometimes` it is
      ``otherwise=``, so that the base optimizer sees every step; ``combination=`` is refused there.

    Raises:
      TypeError: if ``base`` is no gradient transformation.
      ValueError: from ``update``, if ``clean_grads`` is missing or not like the updates.

    Example:
      >>> import jax.numpy as jnp, optax, optax_sam
      >>> stage = optax_sam.decouple(optax.scale(10.0))
      >>> g, perturbed = jnp.array([1.0]), jnp.array([3.0])
      >>> stage.update(perturbed, stage.init(g), clean_grads=g)[0].tolist()
      [12.0]

    References:
      Yue et al., Sharpness-Aware Minimization Revisited: Weighted Sharpness as a Regularization Term,
      KDD 2023, arXiv 2305.15817, algorithm 1; ``decouple=True`` in the authors' code.
    """
    optimizer = as_stage("base", base)

    def init(params: optax.Params) -> DecouplingState:
        return DecouplingState(optimizer.init(params))

    def update(
        updates: optax.Updates,
        state: DecouplingState,
        params: optax.Params | None = None,
        *,
        clean_grads: chex.ArrayTree | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, DecouplingState]:
        clean_grads = require_clean_gradients(clean_grads, updates, "decouple")
        step, base_state = optimizer.update(clean_grads, state.base, params, **extra_args)
        one = jnp.ones([], _tree.accumulation_dtype(updates))
        sharpness = _tree.linear(one, updates, -one, clean_grads)
        return _tree.linear(one, step, one, sharpness), DecouplingState(base_state)

    return optax.GradientTransformationExtraArgs(init, update)
