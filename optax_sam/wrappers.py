"""Wrappers that add one idea in one place: how ε is climbed, and when there is a second gradient.

:func:`in_steps` and :func:`on_first` go around the first stage, :func:`along_previous` and
:func:`sometimes` around a method.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import chex
import jax
import jax.numpy as jnp
import optax

from optax_sam import _axes, _batches, _norms, _tree
from optax_sam._checks import call, check_state, kinds, shape_of
from optax_sam._gradients import as_gradients
from optax_sam._hyperparameters import Hyperparameter, ScheduleState, check_integer, check_number
from optax_sam._loss_checks import evaluating_the_loss
from optax_sam._stages import (
    AlongPreviousState,
    SometimesState,
    as_method,
    as_stage,
    check_ends_with_method,
)
from optax_sam.combinations.decoupling import DecouplingState
from optax_sam.convolutions import inside_control_flow
from optax_sam.evaluations import value_and_gradients
from optax_sam.objectives import device_share, require_objective, with_parameters


def in_steps(
    perturbation: optax.GradientTransformation, steps: int
) -> optax.GradientTransformationExtraArgs:
    r"""Climbs in n steps of an n-th of the perturbation each, with a new gradient after each step.

    .. math::
       \epsilon_{k+1} = \epsilon_k + \tfrac{1}{n} \, \mathrm{perturbation}(\nabla L(w + \epsilon_k))

    Costs n − 1 more gradients. Only the first step advances the perturbation's state. Under a mapped
    axis the further gradients are those of the device's own shard.

    Args:
      perturbation: the first stage that says where to climb.
      steps: n ≥ 1; 1 is the perturbation itself.

    Returns:
      A first stage; its ``update`` needs ``params`` and ``loss_fn``, which a method passes on.

    Raises:
      TypeError: if ``perturbation`` is no gradient transformation or ``steps`` no integer.
      ValueError: if ``steps`` is below 1; from ``update``, without ``params`` or ``loss_fn``.

    Example:
      >>> import optax, optax_sam
      >>> ascent = optax_sam.in_steps(optax_sam.normalized(0.05), steps=3)
      >>> tx = optax.chain(optax_sam.sharpness_aware(ascent), optax.sgd(0.1))

    References:
      Foret et al., Sharpness-Aware Minimization, ICLR 2021, arXiv 2010.01412, appendix C.3.
    """
    stage = as_stage("perturbation", perturbation)
    check_integer("steps", steps, minimum=1)

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        loss_fn: Callable[..., Any] | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        if params is None or loss_fn is None:
            missing = "params" if params is None else "loss_fn"
            raise ValueError(
                f"in_steps(...) takes further gradients, but {missing} is None: call "
                "update(updates, state, params, loss_fn=loss_fn)."
            )
        arguments = {"loss_fn": loss_fn} | extra_args
        climbed, new_state = stage.update(updates, state, params, **arguments)
        climbed = _tree.as_floating(climbed, updates)  # integers, too, have n-th parts
        share = jnp.asarray(1 / steps, _tree.accumulation_dtype(climbed))
        epsilon = _tree.scale(climbed, share) if steps > 1 else climbed
        for _ in range(steps - 1):
            # The stage may differentiate the loss itself (on_first, NCSAM): it must do so at w + ε.
            moved = with_parameters(loss_fn, functools.partial(_tree.add, perturbation=epsilon))
            with evaluating_the_loss("in_steps", params):
                _, gradients = value_and_gradients(moved, params)
            arguments |= {"loss_fn": moved, "logits": None}
            climbed, _ = stage.update(gradients, state, params, **arguments)
            climbed = _tree.as_floating(climbed, gradients)
            epsilon = _tree.linear(jnp.ones_like(share), epsilon, share, climbed)
        return epsilon, new_state

    return optax.GradientTransformationExtraArgs(stage.init, update)


class OnFirstState(NamedTuple):
    """State of :func:`on_first`.

    Attributes:
      perturbation: the state of the inner stage.
      climbed_norm: scalar, the norm of the gradient that was climbed at the last step.
    """

    perturbation: optax.OptState
    climbed_norm: jax.Array


def on_first(
    perturbation: optax.GradientTransformation, fraction: float
) -> optax.GradientTransformationExtraArgs:
    r"""Climbs along the gradient of the first ⌊qB⌋ examples of the batch (at least one).

    The incoming gradient is not used; if nothing else uses it, ``jit`` removes its computation, and the
    two gradients of a step cost 1 + q. Under a mapped axis the examples are those of the device's own
    shard.

    Args:
      perturbation: the first stage that says where to climb.
      fraction: q, 0 < q ≤ 1.

    Returns:
      A first stage; its ``update`` needs ``params`` and an :class:`optax_sam.Objective` as ``loss_fn``,
      which a method passes on.

    Raises:
      TypeError: if ``perturbation`` is no gradient transformation; from ``update``, if ``loss_fn`` is
        no ``Objective``.
      ValueError: if ``fraction`` is outside (0, 1]; from ``update``, without ``params``.

    Example:
      >>> import optax, optax_sam
      >>> ascent = optax_sam.on_first(optax_sam.normalized(0.05), fraction=0.25)
      >>> tx = optax.chain(optax_sam.sharpness_aware(ascent), optax.sgd(0.1))

    References:
      Du et al., Efficient Sharpness-aware Minimization, ICLR 2022, arXiv 2110.03141, discuss ascent on
      a part of the batch.
    """
    stage = as_stage("perturbation", perturbation)
    check_ascent_fraction("fraction", fraction)

    def update(
        updates: optax.Updates,
        state: OnFirstState,
        params: optax.Params | None = None,
        *,
        loss_fn: Callable[..., Any] | None = None,
        logits: chex.ArrayTree | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, OnFirstState]:
        objective = require_objective(loss_fn, "ascent on a part of the batch (ascent_fraction)")
        if params is None:
            raise ValueError(
                "on_first(...) takes another gradient, but params is None: call "
                "update(updates, state, params, loss_fn=objective)."
            )
        # 0.2 * 5 is 1 example, also in floating point.
        count = max(1, math.floor(fraction * objective.batch_size + 1e-9))
        part = objective.subset(slice(0, count))
        with evaluating_the_loss("on_first", params):
            _, gradients = value_and_gradients(part, params)
        first = jax.tree.map(lambda leaf: leaf[:count], _batches.gathered(logits))
        epsilon, inner_state = stage.update(
            gradients, state.perturbation, params, loss_fn=part, logits=first, **extra_args
        )
        return epsilon, OnFirstState(inner_state, _norms.norm(gradients))

    def init(params: optax.Params) -> OnFirstState:
        return OnFirstState(stage.init(params), jnp.zeros([], _tree.accumulation_dtype(params)))

    return optax.GradientTransformationExtraArgs(init, update)


def check_ascent_fraction(name: str, fraction: Any) -> None:
    """Raises unless the fraction is a Python number in (0, 1]."""
    check_number(name, fraction, minimum=0, maximum=1)
    if not isinstance(fraction, int | float) or fraction == 0:
        raise ValueError(
            f"{name} must lie in (0, 1] and be a Python number, got {fraction!r}. It decides how "
            "many examples are computed."
        )


def along_previous(
    method: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    """Lets a method climb along its own last direction in place of the clean gradient.

    A step then costs one gradient: under ``jit`` the clean one is computed only if a combination uses
    it. The first step does not climb: there is no direction yet. Momentum-SAM is such a method.

    Args:
      method: a sharpness-aware method without ``group_size`` (there each group climbs along its own
        gradient).

    Returns:
      A method; its ``update`` takes what the inner one takes.

    Raises:
      TypeError: if ``method`` is no gradient transformation; from ``init``, if no method stands at its
        end.

    Example:
      >>> import optax, optax_sam
      >>> inner = optax_sam.sharpness_aware(
      ...     optax.chain(optax.trace(0.9), optax_sam.normalized(3.0), optax.scale(-1.0)))
      >>> tx = optax.chain(optax_sam.along_previous(inner), optax.sgd(0.1, momentum=0.9))

    References:
      Becker, Altrock, Risse, Momentum-SAM, 2024, arXiv 2401.12033.
    """
    inner = as_method(method)

    def init(params: optax.Params) -> AlongPreviousState:
        state = inner.init(params)
        check_ends_with_method("along_previous", state)
        return AlongPreviousState(_tree.zeros_like(params), state)

    def update(
        updates: optax.Updates,
        state: AlongPreviousState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, AlongPreviousState]:
        check_state(state, AlongPreviousState, "along_previous (Momentum-SAM)")
        arguments = {"clean_grads": updates} | without_none(extra_args, "clean_grads")
        direction, method_state = inner.update(state.direction, state.method, params, **arguments)
        return direction, AlongPreviousState(direction, method_state)

    return optax.GradientTransformationExtraArgs(init, update)


def without_none(extra_args: dict[str, Any], name: str) -> dict[str, Any]:
    """The arguments without one that is None, which says as little as leaving it out."""
    return {key: value for key, value in extra_args.items() if key != name or value is not None}


class When(Protocol):
    """A condition for :func:`sometimes`: is this a step with a second gradient?"""

    def init(self, params: optax.Params) -> optax.OptState:
        """The state before the first step."""

    def update(
        self, gradients: optax.Updates, state: optax.OptState, params: optax.Params
    ) -> tuple[jax.Array, optax.OptState]:
        """A bool scalar and the next state, from the clean gradient averaged over all devices."""


class GradientNormState(NamedTuple):
    """State of :func:`gradient_norm_is_large`.

    Attributes:
      mean: scalar, the moving mean of ‖g‖².
      variance: scalar, the moving mean of its squared deviation.
      deviations: empty, or the step count of a schedule.
    """

    mean: jax.Array
    variance: jax.Array
    deviations: optax.OptState


class _GradientNormIsLarge:
    def __init__(self, deviations: optax.ScalarOrSchedule, decay: float):
        self.deviations = Hyperparameter("deviations", deviations)
        check_number("decay", decay, minimum=0, maximum=1, exclusive_maximum=True)
        self.decay = decay

    def init(self, params: optax.Params) -> GradientNormState:
        dtype = _tree.accumulation_dtype(params)  # two arrays: a state may be donated
        return GradientNormState(jnp.zeros([], dtype), jnp.zeros([], dtype), self.deviations.init())

    def update(
        self, gradients: optax.Updates, state: GradientNormState, params: optax.Params
    ) -> tuple[jax.Array, GradientNormState]:
        del params
        squared = jnp.square(_norms.norm(gradients)).astype(state.mean.dtype)
        decay = jnp.asarray(self.decay, state.mean.dtype)
        mean = decay * state.mean + (1 - decay) * squared
        variance = decay * state.variance + (1 - decay) * jnp.square(squared - mean)
        deviations, deviations_state = self.deviations.read(state.deviations, mean.dtype)
        is_large = squared >= mean + deviations * jnp.sqrt(variance)
        # One gradient that overflowed would make the averages infinite, and every later answer a no.
        is_finite = jnp.isfinite(variance)
        mean = jnp.where(is_finite, mean, state.mean)
        variance = jnp.where(is_finite, variance, state.variance)
        return is_large | ~is_finite, GradientNormState(mean, variance, deviations_state)


def gradient_norm_is_large(deviations: optax.ScalarOrSchedule = 0.0, decay: float = 0.9) -> When:
    r"""AE-SAM's condition: the gradient is long for this stage of the training.

    .. math::
       \lVert g \rVert^2 \ge \mu + c \, \sigma, \qquad
       \mu \leftarrow \delta \mu + (1 - \delta) \lVert g \rVert^2, \qquad
       \sigma^2 \leftarrow \delta \sigma^2 + (1 - \delta) (\lVert g \rVert^2 - \mu)^2

    Mean and deviation include the current gradient. After a gradient that is not finite they stay as
    they were, and the step has a second gradient.

    Args:
      deviations: c; a number or a schedule of the step. The authors lower it linearly from 1 to −1, so
        that second gradients become more frequent.
      decay: δ, 0 ≤ δ < 1.

    Returns:
      A condition for ``when=`` of :func:`sometimes` and of every method.

    Raises:
      ValueError: if ``decay`` is outside [0, 1).

    Example:
      >>> import optax, optax_sam
      >>> when = optax_sam.gradient_norm_is_large(optax.linear_schedule(1.0, -1.0, 10_000))
      >>> tx = optax.chain(optax_sam.sam(0.05, when=when), optax.sgd(0.1))

    References:
      Jiang et al., An Adaptive Policy to Employ Sharpness-Aware Minimization, ICLR 2023, arXiv
      2304.14647, equations (7) to (9).
    """
    return _GradientNormIsLarge(deviations, decay)


class _StatelessWhen:
    """A plain function ``(gradients, params) -> bool`` as a condition."""

    def __init__(self, function: Callable[[Any, Any], Any]):
        self.function = function

    def init(self, params: optax.Params) -> optax.OptState:
        return optax.EmptyState()

    def update(
        self, gradients: optax.Updates, state: optax.OptState, params: optax.Params
    ) -> tuple[jax.Array, optax.OptState]:
        holds = call(
            "when",
            self.function,
            gradients,
            params,
            takes="(gradients, params)",
            remedy="For a condition on the step use every_k, start_step and stop_step.",
        )
        return holds, state


def sometimes(
    method: optax.GradientTransformation,
    *,
    every_k: int | None = None,
    start_step: int | None = None,
    stop_step: int | None = None,
    when: When | Callable[[optax.Updates, optax.Params], Any] | None = None,
    otherwise: optax.GradientTransformation | None = None,
    axis_name: _axes.AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Takes the second gradient on some steps only, and really skips it on the others.

    A step is one of the method if all given conditions hold. On the others the direction is the clean
    gradient g, or what ``otherwise`` makes of it.

    Args:
      method: a sharpness-aware method.
      every_k: every k-th step, counted from ``start_step``; None is every step.
      start_step: the first step of the method (late SAM); None is step 0.
      stop_step: from this step on there is no second gradient any more; None never stops.
      when: a condition that depends on the data: :func:`gradient_norm_is_large`, an object with
        ``init`` and ``update`` (see :class:`When`), or a function ``(gradients, params) -> bool``.
      otherwise: what the direction is in between, e.g. :func:`optax_sam.reuse_orthogonal`, and also
        before ``start_step`` and from ``stop_step`` on. A transformation whose ``update`` gets the
        extra arguments ``clean_grads`` (g) and ``is_ascent_step``; on the method's own steps it sees
        the method's direction and may keep what it needs. None descends along g.
      axis_name: the mapped axis, as for the method: on the steps in between nobody else averages g.

    Returns:
      A method; its ``update`` takes what the inner one takes.

    Raises:
      ValueError: if a number is out of range, or no condition is given.
      TypeError: if ``method`` or ``otherwise`` is no gradient transformation; from ``init``, if no
        method stands at the end of ``method``; from ``update``, if ``when`` does not return one bool.

    Example:
      >>> import optax, optax_sam
      >>> late = optax_sam.sometimes(optax_sam.sam(0.05), start_step=1000)
      >>> tx = optax.chain(late, optax.sgd(0.1))
    """
    inner = as_method(method)
    stand_in = None if otherwise is None else as_stage("otherwise", otherwise)
    _axes.check_axis_name(axis_name)
    condition = _as_condition(when)
    counted = not (every_k is None and start_step is None and stop_step is None)
    if not counted and condition is None:
        raise ValueError("sometimes needs a condition: every_k, start_step, stop_step or when.")
    k = 1 if every_k is None else every_k
    start = 0 if start_step is None else start_step
    check_integer("every_k", k, minimum=1)
    check_integer("start_step", start, minimum=0)
    if stop_step is not None:
        check_integer("stop_step", stop_step, minimum=start)

    def init(params: optax.Params) -> SometimesState:
        count = ScheduleState(jnp.zeros([], jnp.int32)) if counted else optax.EmptyState()
        method_state = inner.init(params)
        check_ends_with_method("sometimes", method_state)
        _refuse_decoupling(method_state)
        return SometimesState(
            step=count,
            method=method_state,
            otherwise=optax.EmptyState() if stand_in is None else stand_in.init(params),
            when=optax.EmptyState() if condition is None else condition.init(params),
        )

    def is_due(step: Any) -> tuple[Any, optax.OptState]:
        if not counted:
            return jnp.asarray(True), step
        check_state(step, ScheduleState, "sometimes, whose condition counts steps")
        count = step.count
        due = (count >= start) & ((count - start) % k == 0)
        if stop_step is not None:
            due &= count < stop_step
        return due, ScheduleState(optax.safe_increment(count))

    def update(
        updates: optax.Updates,
        state: SometimesState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, SometimesState]:
        _axes.require_axis_name(axis_name)
        check_state(state, SometimesState, "sometimes (every_k, start_step, stop_step, when)")
        if params is None:
            raise ValueError(
                "sometimes(...) needs the parameters, but params is None: call "
                "update(grads, state, params, loss_fn=loss_fn)."
            )
        updates = as_gradients("updates", updates, params)
        extra_args = without_none(extra_args, "clean_grads")
        if (clean_grads := extra_args.get("clean_grads")) is not None:
            extra_args["clean_grads"] = as_gradients("clean_grads", clean_grads, params)
        share = device_share(extra_args.get("loss_fn"), axis_name)
        due, step = is_due(state.step)
        when_state = state.when
        if condition is not None:
            averaged = _axes.mean(updates, axis_name, share)
            holds, when_state = condition.update(averaged, state.when, params)
            due &= _one_bool(holds)

        def reuse(direction: Any, is_ascent_step: bool) -> tuple[Any, optax.OptState]:
            if stand_in is None:
                return direction, state.otherwise
            clean = _axes.mean(extra_args.get("clean_grads", updates), axis_name, share)
            arguments = extra_args | {"clean_grads": clean, "is_ascent_step": is_ascent_step}
            direction, otherwise_state = stand_in.update(
                direction, state.otherwise, params, **arguments
            )
            return direction, otherwise_state

        def ascent_step() -> Any:
            direction, method_state = inner.update(updates, state.method, params, **extra_args)
            direction, otherwise_state = reuse(direction, True)
            return _axes.to_varying_like((direction, method_state, otherwise_state), params)

        def step_between() -> Any:
            clean = extra_args.get("clean_grads", updates)
            direction, otherwise_state = reuse(_axes.mean(clean, axis_name, share), False)
            # Where each device has parameters of its own, the other branch's state differs too.
            return _axes.to_varying_like((direction, state.method, otherwise_state), params)

        direction, method_state, otherwise_state = jax.lax.cond(
            due, inside_control_flow(ascent_step), step_between
        )
        return direction, SometimesState(step, method_state, otherwise_state, when_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _refuse_decoupling(state: optax.OptState) -> None:
    """Refuses a base optimizer inside the method, which would miss the steps in between."""

    def decouples(leaf: Any) -> bool:
        return isinstance(leaf, DecouplingState)

    if any(decouples(leaf) for leaf in jax.tree.leaves(state, is_leaf=decouples)):
        raise ValueError(
            "method has optax_sam.decouple(...) as its combination, whose base optimizer would miss "
            "the steps in between. Pass otherwise=optax_sam.decouple(base) to sometimes, or base= to "
            "optax_sam.wsam, which does."
        )


def _as_condition(when: Any) -> When | None:
    if when is None or (
        hasattr(when, "init") and hasattr(when, "update") and not isinstance(when, type)
    ):
        return when
    if not callable(when) or isinstance(when, type) or when is gradient_norm_is_large:
        raise TypeError(
            f"when must be a condition such as optax_sam.gradient_norm_is_large(), or a function "
            f"(gradients, params) -> bool, got {when!r}."
        )
    return _StatelessWhen(when)


def _one_bool(holds: Any) -> jax.Array:
    if shape_of(holds) != () or jnp.result_type(holds) != jnp.bool_:
        raise TypeError(
            f"when must return one bool, got {kinds(holds)}. Compare with a number, and reduce "
            "with jnp.any or jnp.all."
        )
    return jnp.asarray(holds)
