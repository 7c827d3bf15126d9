"""The engine behind :func:`optax_sam.sharpness_aware`: state, init, update."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optax_sam import _axes, _tree
from optax_sam._ascent_schedule import AscentSchedule
from optax_sam._hyperparameters import (
    Hyperparameter,
    ScheduleState,
    check_integer,
    check_number,
)
from optax_sam._masks import Mask, freeze_where_not, keep_where, resolve_mask
from optax_sam.evaluations import (
    Evaluation,
    full_gradient,
    jacobian_only,
    logit_only,
    value_and_gradients,
)
from optax_sam.groups import gradients_in_slices, mean_over_groups, mean_over_slices
from optax_sam.objectives import Objective, require_objective, with_parameters
from optax_sam.per_example.descent import Evaluation as PerExampleEvaluation
from optax_sam.per_example.gradient import is_worthwhile, per_example_gradient

# The evaluations that the fast path for perturbations per example or group knows.
_PER_EXAMPLE: dict[Any, PerExampleEvaluation] = {
    full_gradient: "full",
    jacobian_only: "jacobian_only",
    logit_only: "logit_only",
}


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
    """State of :func:`optax_sam.sharpness_aware`; parts that are not in use are empty.

    Attributes:
      step: the number of updates so far, where ``every_k``, ``start_step`` or ``stop_step`` needs it.
      perturbation: state of the first stage.
      previous_gradients: the last g', where ``climb="previous"`` climbs along it.
      reuse: state of what stands in for g' on the steps without a second gradient.
      combination: state of the third stage.
      metrics: :class:`SharpnessAwareMetrics` of the last step with a second gradient.
    """

    step: optax.EmptyState | ScheduleState
    perturbation: optax.OptState
    previous_gradients: chex.ArrayTree
    reuse: optax.OptState
    combination: optax.OptState
    metrics: SharpnessAwareMetrics


class Step(NamedTuple):
    """The arguments of one update, as the parts of the engine need them."""

    clean_grads: chex.ArrayTree
    params: chex.ArrayTree
    local_params: chex.ArrayTree  # differentiating them gives the device's own gradients
    perturbed_leaves: Mask
    loss_fn: Callable[..., Any]
    extra_args: dict[str, Any]
    state: SharpnessAwareState


class Ascent(NamedTuple):
    """What a climb and the evaluation at its end give."""

    clean_grads: chex.ArrayTree
    perturbed_grads: chex.ArrayTree
    perturbation_state: optax.OptState
    metrics: SharpnessAwareMetrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class Engine:
    """The arguments of :func:`optax_sam.sharpness_aware`, checked, and what is done with them."""

    perturbation: optax.GradientTransformationExtraArgs
    evaluation: Evaluation
    combination: optax.GradientTransformationExtraArgs | None
    mask: Mask | Callable[[chex.ArrayTree], Mask] | None
    axis_name: _axes.AxisName
    has_aux: bool
    climb: Literal["clean", "previous"]
    ascent_steps: int | None
    ascent_fraction: float | None
    group_size: int | None
    microbatch_size: int | None
    radius: Hyperparameter | None  # of a perturbation that is the normalized gradient and no more
    schedule: AscentSchedule
    reuse: optax.GradientTransformationExtraArgs | None

    def __post_init__(self):
        if self.climb not in ("clean", "previous"):
            raise ValueError(f"climb must be 'clean' or 'previous', got {self.climb!r}.")
        for name in ("ascent_steps", "group_size", "microbatch_size"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), minimum=1)
        if self.ascent_fraction is not None:
            check_number("ascent_fraction", self.ascent_fraction, minimum=0, maximum=1)
        if self.group_size is not None:
            if self.climb == "previous" or self.ascent_fraction is not None:
                raise ValueError(
                    "group_size gives each group a perturbation from its own gradient; it cannot be "
                    "combined with climb='previous' (Momentum-SAM) or ascent_fraction."
                )
            if self.microbatch_size is not None and self.microbatch_size % self.group_size:
                raise ValueError(
                    f"microbatch_size={self.microbatch_size} must be a multiple of "
                    f"group_size={self.group_size}."
                )

    def init(self, params: chex.ArrayTree) -> SharpnessAwareState:
        """The state before the first step."""
        _refuse_complex(params)
        dtype = _tree.accumulation_dtype(params)
        return SharpnessAwareState(
            step=self.schedule.init(),
            perturbation=self.perturbation.init(params),
            previous_gradients=_tree.zeros_like(params) if self.climb == "previous" else (),
            reuse=() if self.reuse is None else self.reuse.init(params),
            combination=() if self.combination is None else self.combination.init(params),
            metrics=SharpnessAwareMetrics(*(jnp.zeros([], dtype) for _ in range(3))),
        )

    def update(
        self, updates, state, params=None, *, loss_fn=None, logits=None, **extra_args
    ) -> tuple[optax.Updates, SharpnessAwareState]:
        """One step of optax's contract; see :func:`optax_sam.sharpness_aware`."""
        _require(params, loss_fn)
        _refuse_complex(params)
        step = Step(
            clean_grads=_tree.as_gradients(updates, params),
            params=params,
            local_params=_axes.to_varying(params, self.axis_name),
            perturbed_leaves=resolve_mask("mask", self.mask, params),
            loss_fn=loss_fn,
            extra_args={"logits": logits, "has_aux": self.has_aux} | extra_args,
            state=state,
        )
        (direction, state), count = self.schedule.choose(
            state.step, lambda: self._ascent_step(step), lambda: self._step_between(step)
        )
        return direction, state._replace(step=count)

    def _ascent_step(self, step: Step) -> tuple[optax.Updates, SharpnessAwareState]:
        """A step with a second gradient."""
        # A stage's state may have seen the device's own gradients. Its average is what averaged
        # gradients would have given (moving averages are linear), and it stays replicated.
        ascent = self._ascend(step)
        clean_grads, averaged = ascent.clean_grads, ascent._replace(clean_grads=())
        averaged = _axes.mean(averaged, self.axis_name)
        state = step.state._replace(
            perturbation=averaged.perturbation_state,
            previous_gradients=averaged.perturbed_grads if self.climb == "previous" else (),
            metrics=averaged.metrics,
        )
        if self.combination is None and self.reuse is None:
            return averaged.perturbed_grads, state  # no all-reduce of gradients nobody looks at
        step = step._replace(clean_grads=_axes.mean(clean_grads, self.axis_name), state=state)
        return self._combine(averaged.perturbed_grads, step, is_ascent_step=True)

    def _step_between(self, step: Step) -> tuple[optax.Updates, SharpnessAwareState]:
        """A step without a second gradient: along g, or along what ``reuse`` makes of it."""
        clean_grads = _axes.mean(step.clean_grads, self.axis_name)
        if self.reuse is None:
            return clean_grads, step.state
        step = step._replace(clean_grads=clean_grads)
        return self._combine(clean_grads, step, is_ascent_step=False)

    def _combine(
        self, gradients: chex.ArrayTree, step: Step, is_ascent_step: bool
    ) -> tuple[optax.Updates, SharpnessAwareState]:
        """Stage 3, and what stands in for g' before it."""
        arguments = {"clean_grads": step.clean_grads, "loss_fn": step.loss_fn} | step.extra_args
        state = step.state
        if self.reuse is not None:
            gradients, reuse_state = self.reuse.update(
                gradients, state.reuse, step.params, is_ascent_step=is_ascent_step, **arguments
            )
            state = state._replace(reuse=reuse_state)
        if self.combination is not None:
            gradients, combination_state = self.combination.update(
                gradients, state.combination, step.params, **arguments
            )
            state = state._replace(combination=combination_state)
        return gradients, state

    def _ascend(self, step: Step) -> Ascent:
        """Climbs and evaluates, once for the batch or once for each group."""
        if self.group_size is None:
            return self._climb_and_evaluate(self._gradients_to_climb(step), step)
        if self.radius is not None and self._follows_the_groups(step, self.group_size):
            return self._ascend_fast(step, self.radius, self.group_size)
        return mean_over_groups(
            lambda objective, logits: self._ascend_group(
                step._replace(loss_fn=objective, extra_args=step.extra_args | {"logits": logits})
            ),
            require_objective(step.loss_fn, "group_size"),
            self.group_size,
            logits=step.extra_args["logits"],
            examples_at_once=self.microbatch_size,
            axis_name=self.axis_name,
        )

    def _follows_the_groups(self, step: Step, group_size: int) -> bool:
        """Whether the fast path knows the method and is worth its while."""
        if self.ascent_steps is not None or self.evaluation not in _PER_EXAMPLE:
            return False
        objective = require_objective(step.loss_fn, "group_size")
        if group_size == 1:
            return True
        return group_size < objective.batch_size and is_worthwhile(
            objective, step.params, step.perturbed_leaves, group_size
        )

    def _ascend_fast(self, step: Step, radius: Hyperparameter, group_size: int) -> Ascent:
        """All groups by the fast path."""
        dtype = _tree.accumulation_dtype(step.params)
        rho, perturbation_state = radius.read(step.state.perturbation, dtype)
        result = per_example_gradient(
            require_objective(step.loss_fn, "group_size"),
            step.local_params,
            rho,
            evaluation=_PER_EXAMPLE[self.evaluation],
            group_size=group_size,
            chunk_size=self.microbatch_size,
            mask=step.perturbed_leaves,
        )
        _axes.check_averaged(result.perturbed_loss, self.axis_name)
        metrics = SharpnessAwareMetrics(
            perturbed_loss=result.perturbed_loss.astype(dtype),
            gradient_norm=result.gradient_norm.astype(dtype),
            perturbation_norm=result.perturbation_norm.astype(dtype),
        )
        return Ascent(result.clean_gradients, result.gradients, perturbation_state, metrics)

    def _ascend_group(self, step: Step) -> Ascent:
        _, gradients = value_and_gradients(step.loss_fn, step.local_params)
        return self._climb_and_evaluate(gradients, step)._replace(clean_grads=gradients)

    def _gradients_to_climb(self, step: Step) -> chex.ArrayTree:
        if self.climb == "previous":
            return step.state.previous_gradients
        if self.ascent_fraction is None:
            return step.clean_grads
        part = _first_part(step.loss_fn, self.ascent_fraction)
        return self._own_gradients(part, step.local_params)

    def _own_gradients(self, loss_fn: Callable[..., Any], params: chex.ArrayTree):
        """Gradients for the climb that the engine takes itself."""
        return gradients_in_slices(
            loss_fn, params, self._slice, has_aux=self.has_aux, axis_name=self.axis_name
        )

    @property
    def _slice(self) -> int | None:
        """Examples in a slice of what is one pass over the batch, or over one group."""
        return None if self.group_size is not None else self.microbatch_size

    def _climb_and_evaluate(self, gradients: chex.ArrayTree, step: Step) -> Ascent:
        """Stages 1 and 2."""
        gradients = keep_where(step.perturbed_leaves, gradients)
        epsilon, perturbation_state = self._climb(gradients, step)
        loss, perturbed_grads = self._evaluate(step.loss_fn, step, epsilon)
        _axes.check_averaged(loss, self.axis_name)
        gradient_norm = _tree.norm(gradients)
        metrics = SharpnessAwareMetrics(
            perturbed_loss=loss.astype(_tree.accumulation_dtype(step.params)),
            gradient_norm=gradient_norm,
            perturbation_norm=self._norm_of(epsilon, gradient_norm, step),
        )
        return Ascent(step.clean_grads, perturbed_grads, perturbation_state, metrics)

    def _norm_of(self, epsilon: chex.ArrayTree, gradient_norm: jax.Array, step: Step) -> jax.Array:
        """‖ε‖; where it is known, without another pass over all parameters, which a step would feel."""
        if self.radius is None or self.ascent_steps is not None:
            return _tree.norm(epsilon)
        rho, _ = self.radius.read(step.state.perturbation, gradient_norm.dtype)
        return _tree.divide_or_zero(rho * gradient_norm, gradient_norm)

    def _climb(
        self, gradients: chex.ArrayTree, step: Step
    ) -> tuple[chex.ArrayTree, optax.OptState]:
        """Stage 1, in one climb or several."""
        loss_fn = _freeze(step.loss_fn, step.perturbed_leaves)

        def perturbation_of(gradients):
            return self.perturbation.update(
                gradients,
                step.state.perturbation,
                step.local_params,
                loss_fn=loss_fn,
                microbatch_size=self._slice,
                axis_name=self.axis_name,
                **step.extra_args,
            )

        epsilon, state = perturbation_of(gradients)
        if self.ascent_steps is None:
            return epsilon, state
        share = jnp.asarray(1 / self.ascent_steps, _tree.accumulation_dtype(epsilon))
        epsilon = _tree.scale(epsilon, share)
        for _ in range(self.ascent_steps - 1):
            perturbed = _tree.add(step.local_params, epsilon)
            gradients = self._own_gradients(loss_fn, perturbed)
            climb, _ = perturbation_of(gradients)
            epsilon = _tree.linear(jnp.ones_like(share), epsilon, share, climb)
        return epsilon, state

    def _evaluate(
        self, loss_fn: Callable[..., Any], step: Step, epsilon: chex.ArrayTree
    ) -> tuple[jax.Array, chex.ArrayTree]:
        """Stage 2, at once or in slices of the batch."""

        def evaluate(loss_fn, logits):
            return self.evaluation(
                loss_fn, step.local_params, epsilon, logits=logits, has_aux=self.has_aux
            )

        logits = step.extra_args["logits"]
        if self._slice is None:
            return evaluate(loss_fn, logits)
        return mean_over_slices(
            evaluate,
            require_objective(loss_fn, "microbatch_size"),
            self._slice,
            logits=logits,
            axis_name=self.axis_name,
        )


def as_stage(name: str, stage: Any) -> optax.GradientTransformationExtraArgs:
    """A stage that accepts every extra argument."""
    if not isinstance(stage, optax.GradientTransformation):
        raise TypeError(
            f"{name} must be an optax.GradientTransformation, got {stage!r}. For example "
            "perturbation=optax_sam.normalized(rho=0.05), combination=optax_sam.down_weight(0.5)."
        )
    return optax.with_extra_args_support(stage)


def _first_part(loss_fn: Any, fraction: float) -> Objective:
    objective = require_objective(loss_fn, "ascent_fraction")
    # 0.2 * 5 is 1 example, also in floating point.
    count = math.floor(fraction * objective.batch_size + 1e-9)
    return objective.subset(slice(0, max(1, count)))


def _require(params: Any, loss_fn: Any) -> None:
    if params is None:
        raise ValueError(
            "a sharpness-aware method perturbs the parameters: call "
            "tx.update(grads, opt_state, params, loss_fn=loss_fn)."
        )
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode))
    if any(isinstance(leaf, optax.MaskedNode) for leaf in leaves):
        raise TypeError(
            "a sharpness-aware method evaluates the loss, which needs all parameters, but optax.masked "
            "or optax.partition around it hides some. To perturb some leaves only, pass mask= to the "
            "method; to train some only, mask the optimizer behind it in the chain."
        )
    if loss_fn is None:
        raise TypeError(
            "a sharpness-aware method evaluates the loss again: call tx.update(grads, opt_state, "
            "params, loss_fn=loss_fn). If you did, a wrapper in between drops extra arguments, as "
            "optax.MultiSteps(...).gradient_transformation() around the method does."
        )


def _refuse_complex(params: chex.ArrayTree) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        dtype = jnp.result_type(leaf)
        if jnp.issubdtype(dtype, jnp.complexfloating):
            raise TypeError(
                f"parameter {jax.tree_util.keystr(path)} is complex ({dtype}); the ascent direction "
                "of a complex gradient depends on a convention. Store its real and imaginary parts "
                "as two real parameters."
            )


def _freeze(loss_fn: Callable[..., Any], mask: Mask) -> Callable[..., Any]:
    """The loss with no gradient for the leaves that may not be perturbed.

    A perturbation that differentiates the loss itself then respects the mask by construction.
    """
    if all(jax.tree.leaves(mask)):
        return loss_fn
    return with_parameters(loss_fn, functools.partial(freeze_where_not, mask))
