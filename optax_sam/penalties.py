"""The J-SAM paper's cheap alternative: penalties in place of a perturbation."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from optax_sam import _tree
from optax_sam._checks import is_array_of, kinds
from optax_sam._hyperparameters import check_number


def last_layer_penalty(
    activations: jax.Array,
    kernel: jax.Array,
    *,
    activation_coefficient: float,
    weight_coefficient: float,
) -> jax.Array:
    r"""An L2 penalty on the last hidden activations and the last layer's weights.

    .. math:: \frac{\gamma_z}{B} \sum_i \lVert z_i \rVert^2 + \gamma_v \lVert v \rVert^2

    In a two-layer linear network J-SAM makes exactly these two norms smaller. Added to the loss of
    plain SGD, the penalty keeps much of J-SAM's robustness to wrong labels at the cost of SGD.
    :func:`optax_sam.linen.capture_layer_input` and :func:`optax_sam.nnx.capture_layer_input` get the
    activations out of any Flax model.

    Args:
      activations: z, the input of the last layer, shape ``(B, ...)``.
      kernel: v, the last layer's weights, any shape.
      activation_coefficient: :math:`\gamma_z \ge 0`, per squared unit of the activations.
      weight_coefficient: :math:`\gamma_v \ge 0`, per squared unit of the weights.

    Returns:
      The penalty, a scalar in at least float32.

    Raises:
      ValueError: if a coefficient is a negative number, or ``activations`` has no examples.
      TypeError: if ``activations`` or ``kernel`` is no array of numbers.

    Example:
      >>> import jax.numpy as jnp, optax_sam
      >>> z, v = jnp.array([[3.0, 4.0], [0.0, 0.0]]), jnp.ones((2, 3))
      >>> float(optax_sam.last_layer_penalty(
      ...     z, v, activation_coefficient=0.5, weight_coefficient=1.0))
      12.25

    References:
      Baek, Kolter, Raghunathan, Why is SAM Robust to Label Noise?, ICLR 2024, arXiv 2405.03676,
      section 4.3. The authors published no code.
    """
    check_number("activation_coefficient", activation_coefficient, minimum=0)
    check_number("weight_coefficient", weight_coefficient, minimum=0)
    check_last_layer(activations, kernel)

    def sum_of_squares(array: jax.Array) -> jax.Array:
        wide = array.astype(_tree.accumulation_dtype(array))
        return jnp.sum(jnp.square(wide))

    mean_square = sum_of_squares(activations) / activations.shape[0]
    return activation_coefficient * mean_square + weight_coefficient * sum_of_squares(kernel)


def check_last_layer(activations: jax.Array, kernel: jax.Array) -> None:
    """Refuses what is no input of a layer with examples, and no array of weights."""
    arrays = {"activations": activations, "kernel": kernel}
    for name, array in arrays.items():
        if not is_array_of(array, jnp.floating) and not is_array_of(array, jnp.integer):
            raise TypeError(
                f"{name} must be an array of numbers, got {kinds(array)}. Pass one layer's array; "
                "optax_sam.nnx.capture_layer_input yields a list with one for each call."
            )
    if not activations.shape or not activations.shape[0]:
        raise ValueError(
            f"activations must have shape (B, ...) with B of at least 1, got {activations.shape}. "
            "It is a mean over the examples."
        )


def layer_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Any]:
    """What a layer was given, in a list: its first argument, or the first array of the named ones."""
    if args:
        return [args[0]]
    return [value for value in kwargs.values() if isinstance(value, jax.Array)][:1]
