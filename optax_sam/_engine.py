"""The engine behind :func:`optax_sam.sharpness_aware`: init and update."""

import contextvars
import dataclasses
import difflib
import functools
import warnings
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from optax_sam import _axes, _norms, _tree
from optax_sam._checks import (
    call,
    check_all_parameters,
    check_leaves,
    check_like,
    check_state,
    kinds,
    shape_of,
)
from optax_sam._gradients import as_gradients
from optax_sam._hyperparameters import check_integer
from optax_sam._loss_checks import note_where_flattened
from optax_sam._masks import Mask, MaskOrFunction, freeze_where_not, keep_where, resolve_mask
from optax_sam._stages import (
    SharpnessAwareMetrics,
    SharpnessAwareState,
    check_perturbation,
)
from optax_sam.evaluations import (
    Evaluation,
    full_gradient,
    jacobian_only,
    logit_only,
    value_and_gradients,
)
from optax_sam.groups import mean_over_groups
from optax_sam.independence import check_independence, warn_if_unproved
from optax_sam.objectives import device_share, require_objective, with_parameters
from optax_sam.per_example.descent import Evaluation as PerExampleEvaluation
from optax_sam.per_example.gradient import gradient_of_groups, is_worthwhile
from optax_sam.per_example.multiples import NotAMultipleError, multiples_of

# The evaluations that the fast path for groups knows.
_PER_EXAMPLE: dict[Any, PerExampleEvaluation] = {
    full_gradient: "full",
    jacobian_only: "jacobian_only",
    logit_only: "logit_only",
}


class Step(NamedTuple):
    """The arguments of one update, as the parts of the engine need them."""

    gradients: chex.ArrayTree
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


class Decision(NamedTuple):
    """How an engine takes its groups, for :func:`optax_sam.explain`."""

    engine: "Engine"
    mask: Mask
    reason: str  # why not by the fast path; empty if by it


# Where explain asks for the decisions of a step that it traces.
decisions: contextvars.ContextVar[list[Decision] | None] = contextvars.ContextVar(
    "decisions", default=None
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Engine:
    """The arguments of :func:`optax_sam.sharpness_aware`, checked, and what is done with them.

    ``length`` is that of a first stage of :class:`KnownLength`, and None for all others.
    """

    perturbation: optax.GradientTransformationExtraArgs
    length: Callable[[optax.OptState, jax.Array], jax.Array] | None
    evaluation: Evaluation
    combination: optax.GradientTransformationExtraArgs | None
    mask: MaskOrFunction
    group_size: int | None
    axis_name: _axes.AxisName

    def __post_init__(self) -> None:
        _axes.check_axis_name(self.axis_name)
        if self.group_size is not None:
            check_integer("group_size", self.group_size, minimum=1)

    def init(self, params: chex.ArrayTree) -> SharpnessAwareState:
        """The state before the first step."""
        check_leaves(params)
        _refuse_complex(params)
        dtype = _tree.accumulation_dtype(params)
        return SharpnessAwareState(
            perturbation=self.perturbation.init(params),
            combination=() if self.combination is None else self.combination.init(params),
            metrics=SharpnessAwareMetrics(*(jnp.zeros([], dtype) for _ in range(3))),
        )

    def update(
        self,
        updates: optax.Updates,
        state: SharpnessAwareState,
        params: optax.Params | None = None,
        *,
        loss_fn: Callable[..., Any] | None = None,
        logits: chex.ArrayTree | None = None,
        clean_grads: optax.Updates | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, SharpnessAwareState]:
        """One step of optax's contract; see :func:`optax_sam.sharpness_aware`."""
        _require(params, loss_fn, state, extra_args)
        check_leaves(params)
        _refuse_complex(params)
        params = _tree.as_arrays(params)
        _axes.require_axis_name(self.axis_name)
        if clean_grads is None:  # along_previous says that it chose the direction
            _warn_of_second_method(updates)
        gradients = as_gradients("updates", updates, params)
        step = Step(
            gradients=gradients,
            clean_grads=(
                gradients
                if clean_grads is None
                else as_gradients("clean_grads", clean_grads, params)
            ),
            params=params,
            local_params=_axes.to_varying(params, self.axis_name),
            perturbed_leaves=self._perturbed_leaves(params),
            loss_fn=loss_fn,  # type: ignore[arg-type]  # required above
            extra_args={"logits": logits} | extra_args,
            state=state,
        )
        # A stage's state may have seen the device's own gradients. Its average stays replicated, and
        # is what averaged gradients would have given if it is linear in them, as moving averages are.
        share = device_share(loss_fn, self.axis_name)
        with note_where_flattened(params, "the method", _NOT_FLATTENED):
            ascent = self._ascend(step)
        direction = _axes.mean(ascent.perturbed_grads, self.axis_name, share)
        state = state._replace(
            perturbation=self._mean_of_state(ascent.perturbation_state, state.perturbation, share),
            metrics=_axes.mean(ascent.metrics, self.axis_name, share),
        )
        if self.combination is None:
            _remember_direction(direction)
            return direction, state  # no all-reduce of gradients nobody looks at
        direction, combination_state = self.combination.update(
            direction,
            state.combination,
            params,
            clean_grads=_axes.mean(ascent.clean_grads, self.axis_name, share),
            loss_fn=loss_fn,
            **step.extra_args,
        )
        _remember_direction(direction)
        check_like("combination's update", direction, params, of="params", remedy=_THIRD_STAGE)
        return direction, state._replace(combination=combination_state)

    def _perturbed_leaves(self, params: chex.ArrayTree) -> Mask:
        mask = resolve_mask("mask", self.mask, params)
        if self.mask is not None and not any(jax.tree.leaves(mask)):
            raise ValueError(
                "mask excludes every parameter, so nothing would be perturbed. Set it to True "
                "where a leaf is to be perturbed; without perturbation use the optimizer alone."
            )
        return mask

    def _ascend(self, step: Step) -> Ascent:
        """Climbs and evaluates, once for the batch or once for each group."""
        reason = self._why_not_fast(step)
        made = decisions.get()
        if made is not None:
            made.append(Decision(self, step.perturbed_leaves, reason))
        if not reason:
            return self._ascend_fast(step)
        if self.group_size is None:
            return self._climb_and_evaluate(step)
        if reason == ONE_GROUP:
            return self._climb_and_evaluate(self._with_own_gradients(step))
        objective = require_objective(step.loss_fn, "group_size")
        if reason != _FASTER_BY_ITSELF:
            warnings.warn(
                f"group_size={self.group_size} differentiates every group by itself, which is "
                "exact but may take 3 to 26 times as long as one perturbation for the batch: "
                f"{reason}. optax_sam.explain(tx, objective, params) tells more.",
                stacklevel=2,
            )
        if self.group_size == 1:
            warn_if_unproved("group_size=1", check_independence(objective, step.params))
        old = step.state.perturbation

        def of_group(group: Any, logits: Any) -> tuple[Ascent, Any]:
            arguments = step.extra_args | {"logits": logits}
            own_step = step._replace(loss_fn=group, extra_args=arguments)
            ascent = self._climb_and_evaluate(self._with_own_gradients(own_step))
            return ascent, _moved(ascent.perturbation_state, old)

        logits = step.extra_args["logits"]
        ascent, moved = mean_over_groups(
            of_group, objective, self.group_size, step.local_params, logits=logits
        )
        state = _where_moved(ascent.perturbation_state, moved, old)
        return ascent._replace(perturbation_state=state)  # type: ignore[no-any-return]

    def _why_not_fast(self, step: Step) -> str:
        """Why the fast path for groups cannot be taken; empty if it can."""
        if self.group_size is None:
            return ONE_GROUP
        objective = require_objective(step.loss_fn, "group_size")
        if step.clean_grads is not step.gradients:
            raise ValueError(
                "with group_size each group climbs along its own gradient and compares with it, so it "
                "cannot be combined with clean_grads=, nor with a wrapper that chooses the direction, "
                "such as optax_sam.along_previous (Momentum-SAM). Leave one of them out."
            )
        if self.group_size == objective.batch_size:
            return ONE_GROUP
        if self.evaluation not in _PER_EXAMPLE:
            return f"the evaluation {self.evaluation!r} is not one of this package"
        if objective.penalty is not None:
            return "the objective has a penalty, whose gradient every group takes at its own point"
        try:
            multiples_of(
                self.perturbation,
                step.state.perturbation,
                step.params,
                step.extra_args,
                step.perturbed_leaves,
            )
        except NotAMultipleError as error:
            return f"the first stage {error}"
        if self.group_size > 1 and not is_worthwhile(
            objective, step.params, step.perturbed_leaves, self.group_size
        ):
            return _FASTER_BY_ITSELF
        return ""

    def _ascend_fast(self, step: Step) -> Ascent:
        """All groups by the fast path."""
        assert self.group_size is not None
        dtype = _tree.accumulation_dtype(step.params)
        result, perturbation_state = gradient_of_groups(
            require_objective(step.loss_fn, "group_size"),
            step.local_params,
            self.perturbation,
            step.state.perturbation,
            extra_args={k: v for k, v in step.extra_args.items() if k != "logits"},
            evaluation=_PER_EXAMPLE[self.evaluation],
            group_size=self.group_size,
            mask=step.perturbed_leaves,
        )
        _axes.check_averaged(result.perturbed_loss, step.local_params, self.axis_name)
        metrics = SharpnessAwareMetrics(
            perturbed_loss=result.perturbed_loss.astype(dtype),
            gradient_norm=result.gradient_norm.astype(dtype),
            perturbation_norm=result.perturbation_norm.astype(dtype),
        )
        return Ascent(result.clean_gradients, result.gradients, perturbation_state, metrics)

    def _mean_of_state(self, state: Any, old: Any, share: jax.Array | None) -> Any:
        """A first stage's state, averaged over the devices."""
        if not _axes.names_of(self.axis_name):
            return state
        mean, moved = _axes.mean((state, _moved(state, old)), self.axis_name, share)
        return _where_moved(mean, moved, old)

    def _with_own_gradients(self, step: Step) -> Step:
        """The step of one group, whose clean gradient is its own."""
        _, gradients = value_and_gradients(step.loss_fn, step.local_params)
        return step._replace(gradients=gradients, clean_grads=gradients)

    def _climb_and_evaluate(self, step: Step) -> Ascent:
        """Stages 1 and 2."""
        gradients = keep_where(step.perturbed_leaves, step.gradients)
        epsilon, perturbation_state = self.perturbation.update(
            gradients,
            step.state.perturbation,
            step.local_params,
            loss_fn=_freeze(step.loss_fn, step.perturbed_leaves),
            **step.extra_args,
        )
        check_like("perturbation's update", epsilon, step.params, of="params", remedy=_FIRST_STAGE)
        check_perturbation(epsilon, gradients, step.perturbed_leaves)
        epsilon = keep_where(step.perturbed_leaves, epsilon)
        loss, perturbed_grads = self._evaluate(step, epsilon)
        _axes.check_averaged(loss, step.local_params, self.axis_name)
        gradient_norm = _climbed_norm(perturbation_state, gradients)
        metrics = SharpnessAwareMetrics(
            perturbed_loss=loss.astype(_tree.accumulation_dtype(step.params)),
            gradient_norm=gradient_norm,
            # Of a thousand leaves, another sum of squares takes a third of the compilation.
            perturbation_norm=_norms.norm(epsilon)
            if self.length is None
            else self.length(step.state.perturbation, gradient_norm),
        )
        return Ascent(step.clean_grads, perturbed_grads, perturbation_state, metrics)

    def _evaluate(self, step: Step, epsilon: chex.ArrayTree) -> tuple[jax.Array, chex.ArrayTree]:
        """Stage 2, whose result is checked where it is the user's own."""
        result = call(
            "evaluation",
            self.evaluation,
            step.loss_fn,
            step.local_params,
            epsilon,
            logits=step.extra_args["logits"],
            takes="(loss_fn, params, perturbation, *, logits)",
            remedy="See optax_sam.Evaluation.",
        )
        remedy = "An evaluation returns (loss, gradients): a scalar, and a tree like params."
        if not isinstance(result, tuple) or len(result) != 2 or shape_of(result[0]) != ():
            raise TypeError(f"evaluation returned {kinds(result)}. {remedy}")
        loss, gradients = result
        check_like("evaluation's gradient", gradients, step.params, of="params", remedy=remedy)
        return jnp.asarray(loss), gradients


_FIRST_STAGE = "The first stage returns one perturbation for every gradient that it is given."
_NOT_FLATTENED = "put the method in front of it, optax.chain(method, optax.flatten(optimizer))"
ONE_GROUP = "the batch is one group"
_THIRD_STAGE = "The third stage returns one direction for every perturbed gradient."
_FASTER_BY_ITSELF = "groups of this size are faster differentiated by themselves"


def _climbed_norm(state: Any, gradients: Any) -> jax.Array:
    """The norm of the gradient that was climbed, which may be a part of the batch's.

    The state of :func:`optax_sam.on_first` knows it. Reading the incoming gradient there would keep
    ``jit`` from removing its computation.
    """
    for _, norm in optax.tree.get_all_with_path(state, "climbed_norm"):
        return norm  # type: ignore[no-any-return]
    return _norms.norm(gradients)


def _moved(state: Any, old: Any) -> list[jax.Array]:
    """For each floating scalar of a stage's state: 1 if a step has changed it, 0 if not."""
    own: Any = jax.tree.structure(state)
    if own != jax.tree.structure(old):  # a stage of the user's own
        return []
    pairs = zip(jax.tree.leaves(state), jax.tree.leaves(old), strict=True)
    return [jnp.asarray(new != before, jnp.float32) for new, before in pairs if _is_scalar(new)]


def _where_moved(mean: Any, moved: list[jax.Array], old: Any) -> Any:
    """The mean of a stage's states over groups or devices, with the scalars that nobody changed.

    A radius is the same for all of them. A mean, which is a sum of rounded shares, would be another
    number, and drift from step to step.
    """
    if not moved:
        return mean
    leaves, treedef = jax.tree.flatten(mean)
    flags = iter(moved)
    kept = [
        jnp.where(next(flags) == 0, before, leaf) if _is_scalar(leaf) else leaf
        for leaf, before in zip(leaves, jax.tree.leaves(old), strict=True)
    ]
    return jax.tree.unflatten(treedef, kept)


def _is_scalar(leaf: Any) -> bool:
    return jnp.ndim(leaf) == 0 and _tree.is_floating(leaf)


def _require(params: Any, loss_fn: Any, state: Any, extra_args: dict[str, Any]) -> None:
    if params is None:
        raise ValueError(
            "a sharpness-aware method perturbs the parameters, but params is None: call "
            "tx.update(grads, opt_state, params, loss_fn=loss_fn). If you did, something in between "
            "drops them, as optax.contrib.galore does to its base_optimizer: put the method in "
            "front of it in optax.chain."
        )
    check_all_parameters(
        params,
        "a sharpness-aware method",
        "To perturb some leaves only, pass mask= to the method; to train some only, put "
        "optax.masked(optax.set_to_zero(), frozen) behind the optimizer in the chain.",
    )
    for name in extra_args:
        # Extra arguments belong to other links, so only a near match is taken for a typing mistake.
        cutoff = 0.75 if loss_fn is None else 0.9
        known = ("loss_fn", "logits", "clean_grads")
        close = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
        if close:
            raise TypeError(f"update got an unknown argument {name}=; did you mean {close[0]}=?")
    if loss_fn is None:
        raise TypeError(
            "a sharpness-aware method evaluates the loss again, but loss_fn is None: call "
            "tx.update(grads, opt_state, params, loss_fn=loss_fn). If you did, something in "
            "between drops extra arguments: with Flax's TrainState use optax_sam.linen.TrainState and "
            "state.apply_gradients(grads=grads, loss_fn=loss_fn); with nnx pass loss_fn= to "
            "nnx.Optimizer.update; optax.MultiSteps(...).gradient_transformation(), "
            "optax.lookahead and optax.contrib.split_real_and_imaginary drop them too: put the "
            "method in front of them in optax.chain."
        )
    if not callable(loss_fn):
        raise TypeError(
            f"loss_fn must be a function of the parameters, got {loss_fn!r}. Pass the function "
            "itself, not the value of the loss."
        )
    check_state(state, SharpnessAwareState, "this sharpness-aware method")


def _refuse_complex(params: Any) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        dtype = jnp.result_type(leaf)
        if jnp.issubdtype(dtype, jnp.complexfloating):
            raise TypeError(
                f"parameter {jax.tree_util.keystr(path)} is complex ({dtype}); the ascent "
                "direction of a complex gradient depends on a convention. Store its real and "
                "imaginary parts as two real parameters."
            )


_last_direction: contextvars.ContextVar[weakref.ref[Any] | None] = contextvars.ContextVar(
    "last_direction", default=None
)


def _remember_direction(direction: Any) -> None:
    """Keeps a weak reference to what the last method gave, for the next function."""
    leaves = [leaf for leaf in jax.tree.leaves(direction) if isinstance(leaf, jax.Array)]
    _last_direction.set(weakref.ref(leaves[0]) if leaves else None)


def _warn_of_second_method(updates: Any) -> None:
    """Warns where the updates are what another method has just given.

    Two methods in one chain: the second climbs along the first one's direction and replaces it.
    """
    last = _last_direction.get()
    direction = None if last is None else last()
    if direction is not None and any(leaf is direction for leaf in jax.tree.leaves(updates)[:1]):
        warnings.warn(
            "a sharpness-aware method got another one's direction as its gradients, as in "
            "optax.chain(sam(...), saner(...)): it climbs along it and replaces it by its own. Use one "
            "method; SANER on top of another is combination=optax_sam.down_weight(0.5).",
            stacklevel=4,
        )


def _freeze(loss_fn: Callable[..., Any], mask: Mask) -> Callable[..., Any]:
    """The loss with no gradient for the leaves that may not be perturbed.

    A perturbation that differentiates the loss itself then respects the mask by construction.
    """
    if all(jax.tree.leaves(mask)):
        return loss_fn
    return with_parameters(loss_fn, functools.partial(freeze_where_not, mask))
