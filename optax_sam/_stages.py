"""The states of methods and their wrappers, and what can stand in the place of a stage or a method."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from optax_sam import _tree
from optax_sam._checks import state_of_another


class SharpnessAwareMetrics(NamedTuple):
    """What the last step with a second gradient saw, for logging; nothing is computed from it.

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


class AlongPreviousState(NamedTuple):
    """State of :func:`optax_sam.along_previous`.

    Attributes:
      direction: pytree like the parameters, the method's last direction; zeros before the first step.
      method: the state of the method.
    """

    direction: optax.Updates
    method: optax.OptState


class SometimesState(NamedTuple):
    """State of :func:`optax_sam.sometimes`.

    Attributes:
      step: int32 count of all updates, or empty where only ``when`` decides.
      method: the state of the method, which sees only its own steps.
      otherwise: the state of what stands in between; empty without one.
      when: the state of the condition; empty without one.
    """

    step: optax.OptState
    method: optax.OptState
    otherwise: optax.OptState
    when: optax.OptState


class KnownLength(optax.GradientTransformation):  # type: ignore[misc]  # optax has no types
    """A first stage whose ε has a length that follows from the gradient's, without another pass.

    Attributes:
      length: from the stage's state and the norm of its updates to ‖ε‖.
    """

    length: Callable[[optax.OptState, jax.Array], jax.Array] | None = None

    def __new__(
        cls,
        init: optax.TransformInitFn,
        update: optax.TransformUpdateFn,
        length: Callable[[optax.OptState, jax.Array], jax.Array] | None = None,
    ) -> "KnownLength":
        """Only this stage itself: whatever is chained or wrapped around it may change ε.

        A copy that JAX or ``_replace`` makes of the named tuple has no length.
        """
        self: KnownLength = super().__new__(cls, init, update)
        self.length = length
        return self


_EXAMPLES = {
    "perturbation": "optax_sam.normalized(rho=0.05)",
    "combination": "optax_sam.down_weight(0.5)",
    "compensation": "optax_sam.add_noise_compensation(0.1, flip_ratio=0.4)",
    "preconditioner": "optax_sam.scale_by_second_moment()",
    "otherwise": "optax_sam.reuse_orthogonal(0.7)",
    "base": "optax.trace(0.9)",
}


def as_stage(name: str, stage: Any) -> optax.GradientTransformationExtraArgs:
    """A stage that accepts every extra argument; a whole method is refused when it is initialized."""
    if not isinstance(stage, optax.GradientTransformation):
        raise TypeError(
            f"{name} must be an optax.GradientTransformation, got {stage!r}. For example "
            f"{name}={_EXAMPLES[name]}."
        )
    accepting = optax.with_extra_args_support(stage)

    def init(params: optax.Params) -> optax.OptState:
        state = accepting.init(params)
        if contains_method(state):
            raise TypeError(
                f"{name} is a stage of a method, but it was given a whole method (optax_sam.sam, "
                "saner, ...). Pass a stage, such as perturbation=optax_sam.normalized(rho) or "
                "combination=optax_sam.down_weight(alpha) for SANER on top of another method."
            )
        if name == "perturbation" and isinstance(state, optax.ConditionallyTransformState):
            raise ValueError(
                "perturbation is an optax.conditionally_transform: where its condition does not hold, "
                "it returns the whole gradient as ε. Use optax.conditionally_mask, which makes ε = 0, "
                "or start_step, every_k or when of the method, which save the second gradient."
            )
        return state

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        try:
            result: Any = accepting.update(updates, state, params, **extra_args)
        except (AttributeError, TypeError, ValueError) as error:
            if params is not None and not _belongs(state, accepting, params):
                raise TypeError(state_of_another(name, state)) from error
            raise
        if not isinstance(result, tuple) or len(result) != 2:
            raise TypeError(
                f"the update of {name} must return (updates, state), got {type(result).__name__}. "
                "Return the state too, also where there is none: return updates, state."
            )
        new_updates, new_state = result
        new_updates = _tree.keep_integers(new_updates, updates, updates)
        return new_updates, _tree.keep_integers(new_state, state, updates)

    return optax.GradientTransformationExtraArgs(init, update)


def _belongs(state: Any, stage: optax.GradientTransformation, params: Any) -> bool:
    """Whether a state has the structure that the stage gives it."""
    own: Any = jax.tree.structure(jax.eval_shape(stage.init, params))
    return bool(jax.tree.structure(state) == own)


def as_method(method: Any) -> optax.GradientTransformationExtraArgs:
    """A method that accepts every extra argument."""
    if not isinstance(method, optax.GradientTransformation):
        raise TypeError(
            "method must be a sharpness-aware method such as optax_sam.sam(rho=0.05), got "
            f"{method!r}."
        )
    return optax.with_extra_args_support(method)


def check_ends_with_method(name: str, state: optax.OptState) -> None:
    """Raises unless the state is that of a method, or of a chain with a method at its end.

    An optimizer there would turn its direction into a step, and the clean gradient on the steps in
    between, which no optimizer has seen, would be added to the parameters as it is. Wrappers whose
    state is a named tuple are not looked into.
    """
    last: Any = state
    while last and (isinstance(last, dict) or type(last) is tuple):  # the states of a chain's links
        last = [*last.values()][-1] if isinstance(last, dict) else last[-1]
    if not contains_method(last):
        raise TypeError(
            f"{name} takes a sharpness-aware method, but what it was given "
            + (
                "has another transformation (an optimizer, clipping) behind the method, which the "
                "steps in between would not meet. Put it behind the result: "
                f"optax.chain({name}(method, ...), optimizer)."
                if contains_method(state)
                else f"is none. Pass e.g. {name}(optax_sam.sam(0.05), ...)."
            )
        )


def contains_method(state: optax.OptState) -> bool:
    """Whether the state of a sharpness-aware method, or of a wrapper of methods, is in this one."""

    def is_method(leaf: Any) -> bool:
        return isinstance(leaf, SharpnessAwareState | AlongPreviousState | SometimesState)

    return any(is_method(leaf) for leaf in jax.tree.leaves(state, is_leaf=is_method))


def check_perturbation(epsilon: Any, gradients: Any, perturbed: Any) -> None:
    """Raises if ε is the gradient itself on some leaves only."""
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
            f"the perturbation passes on the gradient of {', '.join(untouched)} as it is, as "
            "optax.masked does where its mask is False, so that the step there would be the whole "
            "gradient. To leave these parameters unperturbed pass mask= to the method; for another "
            "radius there use optax.partition with two perturbations."
        )
