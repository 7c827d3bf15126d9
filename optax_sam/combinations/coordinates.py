"""The SANER paper's ablations: SAM on some sets of coordinates, SGD on the others."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_sam import _tree
from optax_sam._hyperparameters import check_number
from optax_sam.combinations._clean_gradients import require_clean_gradients
from optax_sam.combinations._coordinates import coordinate_sets


def restrict_to_coordinates(
    sets: str, ratio_epsilon: float | None = None
) -> optax.GradientTransformationExtraArgs:
    r"""Takes the perturbed gradient g' in the named sets only, and the clean g elsewhere.

    With :math:`r = g'/g` a coordinate is in set A if r ≥ 1, in B if 0 < r < 1, in C if r ≤ 0.
    ``"B"`` is the paper's "SAM only on B", ``"AC"`` its "SGD on B".

    Args:
      sets: the sets that keep SAM's gradient: any of the letters A, B and C.
      ratio_epsilon: None decides the sets without a division; ``1e-8`` as in the authors' code.
        See :func:`optax_sam.down_weight`.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` on g'. Its ``update`` needs the extra argument
      ``clean_grads`` (g); others are accepted and ignored.

    Raises:
      ValueError: if ``sets`` has other letters or ``ratio_epsilon`` is negative; from ``update``, if
        ``clean_grads`` is missing or not like the updates.

    Example:
      >>> import jax.numpy as jnp, optax_sam
      >>> stage = optax_sam.restrict_to_coordinates("B")
      >>> g, perturbed = jnp.array([1.0, 1.0, 1.0]), jnp.array([2.0, 0.5, -1.0])
      >>> stage.update(perturbed, stage.init(g), clean_grads=g)[0].tolist()
      [1.0, 0.5, 1.0]

    References:
      Luong et al., arXiv 2411.17132, section 4 (which set gives SAM its robustness).
    """
    if not isinstance(sets, str) or not set(sets.upper()) <= set("ABC"):
        raise ValueError(f"sets must be letters out of 'ABC', such as 'B' or 'AC', got {sets!r}.")
    if ratio_epsilon is not None:
        check_number("ratio_epsilon", ratio_epsilon, minimum=0)
    letters = set(sets.lower())

    def init(params: optax.Params) -> optax.OptState:
        del params
        return optax.EmptyState()

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        clean_grads: optax.Updates | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del params, extra_args
        clean_grads = require_clean_gradients(clean_grads, updates, "restrict_to_coordinates")

        def choose(perturbed: jax.Array, clean: jax.Array) -> jax.Array:
            masks = coordinate_sets(clean, perturbed, ratio_epsilon)._asdict()
            keep = jnp.zeros(perturbed.shape, bool)
            for letter in letters:
                keep |= masks[letter]
            return jnp.where(keep, perturbed, clean)

        return _tree.map_floating(choose, updates, clean_grads), state

    return optax.GradientTransformationExtraArgs(init, update)
