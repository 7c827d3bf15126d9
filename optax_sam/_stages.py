"""The state of a method, and what can stand in the place of a stage or a method."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_sam import _tree


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
        if name == "perturbation" and isinstance(state, optax.ConditionallyTransformState):
            raise ValueError(
                "perturbation is an optax.conditionally_transform: where its condition does not hold, "
                "it hands on the whole gradient as ε. Use optax.conditionally_mask, which makes ε = 0, "
                "or start_step, every_k or when of the method, which save the second gradient."
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


def check_tree(name: str, result: Any, params: optax.Params) -> None:
    """Raises unless what a stage returned is a tree like the parameters."""
    expected: Any = jax.tree.structure(params)
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(params)]
    got: Any = jax.tree.structure(result)
    got_shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(result)]
    if got != expected or got_shapes != shapes:
        raise ValueError(
            f"{name} must return a tree like the parameters, {expected} of shapes {shapes}, but "
            f"returned {got} of shapes {got_shapes}. A transformation that takes gradients per "
            "example, or returns a measurement, cannot be a stage."
        )


def check_perturbation(epsilon: Any, gradients: Any, params: optax.Params, perturbed: Any) -> None:
    """Raises if ε is not like the parameters, or is the gradient itself on some leaves only."""
    check_tree("perturbation", epsilon, params)
    leaves = [
        (path, after is before)
        for (path, before), after, is_perturbed in zip(
            jax.tree_util.tree_leaves_with_path(gradients),
            jax.tree.leaves(epsilon),
            jax.tree.leaves(perturbed),
            strict=True,
        )
        if is_perturbed and _tree.is_floating(before)
    ]
    untouched = [jax.tree_util.keystr(path) for path, is_untouched in leaves if is_untouched]
    if untouched and len(untouched) < len(leaves):
        raise ValueError(
            f"the perturbation hands on the gradient of {', '.join(untouched)} as it is, as "
            "optax.masked does where its mask is False, so that the step there would be the whole "
            "gradient. To leave these parameters unperturbed pass mask= to the method; for another "
            "radius there use optax.partition with two perturbations."
        )
