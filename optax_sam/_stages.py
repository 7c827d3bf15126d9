"""The state of a method, and what can stand in the place of a stage or a method."""

from typing import Any, NamedTuple

import jax
import optax


class SharpnessAwareMetrics(NamedTuple):
    """What the last step saw, for logging; nothing is computed from it.

    Attributes:
      perturbed_loss: scalar, L(w + ε).
      gradient_norm: scalar, the norm of the gradient that was climbed (perturbed leaves only); with
        groups, and over devices, the mean of the norms.
      perturbation_norm: scalar, ‖ε‖; likewise.
    """

    perturbed_loss: jax.Array
    gradient_norm: jax.Array
    perturbation_norm: jax.Array


class SharpnessAwareState(NamedTuple):
    """State of :func:`optax_sam.sharpness_aware`.

    Attributes:
      perturbation: state of the first stage.
      combination: state of the third stage; empty without one.
      metrics: :class:`SharpnessAwareMetrics` of the last step.
    """

    perturbation: optax.OptState
    combination: optax.OptState
    metrics: SharpnessAwareMetrics


def as_stage(name: str, stage: Any) -> optax.GradientTransformationExtraArgs:
    """A stage that accepts every extra argument; a whole method is refused when it is initialized."""
    if not isinstance(stage, optax.GradientTransformation):
        raise TypeError(
            f"{name} must be an optax.GradientTransformation, got {stage!r}. For example "
            "perturbation=optax_sam.normalized(rho=0.05), combination=optax_sam.down_weight(0.5)."
        )
    accepting = optax.with_extra_args_support(stage)

    def init(params: optax.Params) -> optax.OptState:
        state = accepting.init(params)
        if contains_method(state):
            raise TypeError(
                f"{name} is a stage of a method, but it was given a whole method (optax_sam.sam, "
                "saner, "
                "...). Pass a stage, such as perturbation=optax_sam.normalized(rho) or "
                "combination=optax_sam.down_weight(alpha) for SANER on top of another method."
            )
        return state

    return optax.GradientTransformationExtraArgs(init, accepting.update)


def as_method(method: Any) -> optax.GradientTransformationExtraArgs:
    """A method that accepts every extra argument."""
    if not isinstance(method, optax.GradientTransformation):
        raise TypeError(
            "method must be a sharpness-aware method such as optax_sam.sam(rho=0.05), got "
            f"{method!r}."
        )
    return optax.with_extra_args_support(method)


def contains_method(state: optax.OptState) -> bool:
    """Whether the state of a sharpness-aware method is somewhere in this one."""
    leaves = jax.tree.leaves(state, is_leaf=lambda leaf: isinstance(leaf, SharpnessAwareState))
    return any(isinstance(leaf, SharpnessAwareState) for leaf in leaves)
