"""One cell of the matrix: a transformation of optax in one place with one method, and by hand."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import optax

import optax_sam
from tests.composition.by_hand import (
    LEARNING_RATE,
    METHODS,
    RHO,
    Applied,
    ByHand,
    Step,
    WithCleanGradient,
    descend,
    distance,
    flat,
    steps,
    unflat,
    updates_of,
    with_perturbation,
)
from tests.composition.inventory import ROWS, SCHEDULES, Row
from tests.references.coordinates import down_weighted

POSITIONS = ("before", "behind", "around", "stage 1", "combination")
SCHEDULED = ("rho", "strength", "injected rho", "learning rate behind")

TOLERANCE = 1e-5

Cell = tuple[list[Any], list[Any]]


class Result(NamedTuple):
    """What came of a cell: the largest relative difference to the step by hand, or an error."""

    difference: float = float("inf")
    error: Exception | None = None


def evaluate(name: str, position: str, method: str) -> Result | None:
    """One cell; None where the position does not exist."""
    if name in SCHEDULES:
        if position == "strength" and method not in STRENGTHS:
            return None
        return _compared(_SCHEDULED[position], SCHEDULES[name](), method, slow=False)
    row = ROWS[name]
    if position == "around" and row.kind != "wrapper":
        return None
    if name == "MultiSteps" and position != "around":
        return None  # it is no gradient transformation; MultiSteps.gradient_transformation is
    return _compared(_CELLS[position], name, method, slow=is_slow(name))


def is_slow(name: str) -> bool:
    """Whether it branches or loops, and compiles anew for each cell."""
    return name.split(" ")[0] in _BRANCHING


def turns_around(name: str) -> bool:
    """Whether what a transformation makes of the gradients points away from them."""
    row, along = ROWS[name], 0.0
    step, apply = _at(0), Applied(row.make(), _start())
    for _ in range(2):  # schedule_free also answers to parameters that move
        gradients = step.gradients_per_example if row.per_example else step.gradients
        updates = apply(gradients, step.params, **_extra(row, step))
        along += float(jnp.vdot(flat(updates), flat(step.gradients)))
    return along < 0


def _compared(cell: Callable[[Any, str], Cell], subject: Any, method: str, slow: bool) -> Result:
    # Branches and loops run in Python: compiling them for each cell would take minutes.
    with jax.disable_jit(slow or method == "looksam"):
        try:
            actual, expected = cell(subject, method)
        except Exception as error:
            return Result(error=error)
    return Result(distance(actual, expected))


_BRANCHING = (
    *("apply_if_finite", "conditionally_mask", "conditionally_transform", "MultiSteps"),
    *("MultiSteps.gradient_transformation", "lbfgs", "scale_by_lbfgs", "contrib.reduce_on_plateau"),
    *("scale_by_zoom_linesearch", "scale_by_backtracking_linesearch", "contrib.muon"),
    *("contrib.scale_by_muon", "contrib.galore", "contrib.scale_by_galore", "contrib.mechanize"),
    *("contrib.sophia", "contrib.hutchinson_estimator_diag_hessian"),
)


def _inside(row: Row) -> Any:
    """The transformation; a wrapper goes around a momentum."""
    return row.make(optax.trace(0.9)) if row.kind == "wrapper" else row.make()


def _extra(row: Row, step: Step) -> dict[str, Any]:
    return {"loss_fn": step.objective} | step.extra(row.extra)


def _params_for(name: str) -> Callable[[Step], Any]:
    """The parameters as ``optax.lookahead`` wants them, and a copy otherwise."""
    if name == "lookahead":
        return lambda step: optax.LookaheadParams.init_synced(step.params)
    return lambda step: jax.tree.map(jnp.array, step.params)


def _start() -> Any:
    return steps()[0].params


def _before(name: str, method: str) -> Cell:
    """``chain(x, method, sgd)``: x shapes the gradient along which the method climbs."""
    row = ROWS[name]

    def gradients(step: Step) -> Any:
        return step.gradients_per_example if row.per_example else step.gradients

    tx = optax.chain(_inside(row), METHODS[method](RHO), optax.sgd(LEARNING_RATE))
    actual = updates_of(tx, row.extra, gradients=gradients, params=_params_for(name))
    hand, apply = ByHand(method), Applied(_inside(row), _start())
    expected = []
    for step in steps():
        clean = apply(gradients(step), step.params, **_extra(row, step))
        expected.append(descend(hand.direction(step, clean)))
    return actual, expected


def _behind(name: str, method: str) -> Cell:
    """``chain(method, x)``: x acts on the method's direction."""
    row = ROWS[name]
    tx = optax.chain(METHODS[method](RHO), _inside(row))
    actual = updates_of(tx, row.extra, params=_params_for(name))
    hand, apply = ByHand(method), Applied(_inside(row), _start())
    expected = [apply(hand.direction(step), step.params, **_extra(row, step)) for step in steps()]
    return actual, expected


def _stage_1(name: str, method: str) -> Cell:
    """``chain(perturbation, x)``, or the wrapper around it, ``x(perturbation)``."""
    row = ROWS[name]
    wraps = row.kind == "wrapper"
    around: Callable[[Any], Any] = row.make if wraps else lambda s: optax.chain(s, row.make())
    tx = optax.chain(with_perturbation(method, around), optax.sgd(LEARNING_RATE))
    actual = updates_of(tx, row.extra, params=_params_for(name))

    hand = ByHand(method)
    now = [_at(0)]
    climb = hand.climb

    def update(updates: Any, state: Any, params: Any = None) -> Any:
        """The method's own perturbation of whatever the wrapper shows it, by hand."""
        vector, unravel = jax.flatten_util.ravel_pytree(updates)
        if method == "msam":  # its momentum is of the leaves that it sees
            hand.reference.previous = vector
        w = jnp.zeros_like(vector) if params is None else flat(params)
        return unravel(climb(WithCleanGradient(now[0].problem, w, vector), w)), state

    stand_in = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    apply = Applied(around(stand_in), _start())

    def climb_in_between(problem: Any, w: Any) -> Any:
        gradients = getattr(hand.reference, "previous", None) if method == "msam" else None
        gradients = problem.grad(w) if gradients is None else gradients + 0 * w
        extra = {"logits": None} | _extra(row, now[0])
        return flat(apply(unflat(gradients), now[0].params, **extra))

    hand.climb = climb_in_between
    expected = []
    for step in steps():
        now[0] = step
        expected.append(descend(hand.direction(step)))
    return actual, expected


def _at(index: int) -> Step:
    return steps()[index]


def _combination(name: str, method: str) -> Cell:
    """``method(combination=x)``; a wrapper goes around SANER's, ``x(down_weight(0.5))``."""
    row = ROWS[name]
    wraps = row.kind == "wrapper"
    stage = row.make(optax_sam.down_weight(0.5)) if wraps else row.make()
    tx = optax.chain(METHODS[method](RHO, combination=stage), optax.sgd(LEARNING_RATE))
    actual = updates_of(tx, row.extra, params=_params_for(name))

    def update(updates: Any, state: Any, params: Any = None, *, clean_grads: Any, **_: Any) -> Any:
        """SANER's combination of the leaves that a wrapper shows, by hand."""
        del params
        vector, unravel = jax.flatten_util.ravel_pytree(updates)
        seen = [
            clean_grads[key] for key in updates if not isinstance(updates[key], optax.MaskedNode)
        ]
        return unravel(jnp.asarray(down_weighted(flat(seen), vector, 0.5))), state

    stand_in = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    hand = ByHand(method)
    apply = Applied(row.make(stand_in) if wraps else row.make(), _start())
    expected = []
    for step in steps():
        extra = {"logits": None, "clean_grads": step.gradients} | _extra(row, step)
        direction = apply(hand.direction(step), step.params, **extra)
        expected.append(descend(direction))
        if method == "msam":  # it climbs along its own last direction, combination included
            hand.reference.previous = flat(direction)
    return actual, expected


def _around(name: str, method: str) -> Cell:
    """``x(chain(method, sgd))``, by hand without optax's wrapper where that is short."""
    row = ROWS[name]
    tx = row.make(optax.chain(METHODS[method](RHO), optax.sgd(LEARNING_RATE)))
    if name == "MultiSteps":
        return _accumulated(tx, method)
    actual = updates_of(tx, params=_params_for(name))
    hand = ByHand(method)
    if name.startswith("conditionally"):  # the condition holds from the second step on
        second = descend(hand.direction(_at(1)))
        first = _at(0).gradients
        if name == "conditionally_mask":
            first = jax.tree.map(jnp.zeros_like, first)
        return actual, [first, second]
    if name == "contrib.mechanize":
        return actual, _with_direction_from_outside(row, hand)
    expected = [descend(hand.direction(step)) for step in steps()]
    if name == "contrib.schedule_free":
        expected = _schedule_free(expected)
    return actual, expected


def _accumulated(tx: Any, method: str) -> Cell:
    """MultiSteps around a method: a step of the whole batch, if ``loss_fn`` is of the whole batch."""
    parts = [Step(step.index, _start(), step.inputs, step.labels) for step in steps()]
    whole = Step(
        0,
        _start(),
        jnp.concatenate([part.inputs for part in parts]),
        jnp.concatenate([part.labels for part in parts]),
    )
    apply = Applied(tx, _start())
    actual = [apply(part.gradients, part.params, loss_fn=whole.objective) for part in parts]
    nothing = jax.tree.map(jnp.zeros_like, whole.gradients)
    return actual, [nothing, descend(ByHand(method).direction(whole))]


def _schedule_free(updates: list[Any], b1: float = 0.9) -> list[Any]:
    """Defazio et al., The Road Less Scheduled, with a constant learning rate: c = 1 / t."""
    z, results = flat(_start()), []
    for step, update in zip(steps(), updates, strict=True):
        y = flat(step.params)
        x = (y - (1 - b1) * z) / b1
        z = z + flat(update)
        c = 1 / (step.index + 1)
        x = (1 - c) * x + c * z
        results.append(unflat(b1 * x + (1 - b1) * z - y))
    return results


def _with_direction_from_outside(row: Row, hand: ByHand) -> list[Any]:
    """The wrapper around SGD, fed with the directions that are computed by hand."""
    now = [_at(0)]

    def update(updates: Any, state: Any, params: Any = None, **_: Any) -> Any:
        del params
        return hand.direction(now[0], updates), state

    stand_in = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    apply = Applied(row.make(optax.chain(stand_in, optax.sgd(LEARNING_RATE))), _start())
    expected = []
    for step in steps():
        now[0] = step
        expected.append(apply(step.gradients, step.params))
    return expected


_CELLS: dict[str, Callable[[str, str], Cell]] = {
    "before": _before,
    "behind": _behind,
    "around": _around,
    "stage 1": _stage_1,
    "combination": _combination,
}


# --- schedules -------------------------------------------------------------------------------------

Schedule = Callable[[int], Any]

# The strength of each method that has one: the keyword, and the attribute of its reference.
STRENGTHS = {
    "saner": ("alpha", "strength"),
    "gsam": ("alpha", "alpha"),
    "looksam": ("alpha", "alpha"),
    "wsam": ("gamma", "gamma"),
}


def _scheduled_by_hand(method: str, attribute: str, schedule: Schedule) -> list[Any]:
    hand, expected = ByHand(method), []
    for step in steps():
        setattr(hand.reference, attribute, float(schedule(step.index)))
        expected.append(descend(hand.direction(step)))
    return expected


def _rho(schedule: Schedule, method: str) -> Cell:
    tx = optax.chain(METHODS[method](schedule), optax.sgd(LEARNING_RATE))
    return updates_of(tx), _scheduled_by_hand(method, "rho", schedule)


def _strength(schedule: Schedule, method: str) -> Cell:
    keyword, attribute = STRENGTHS[method]
    tx = optax.chain(METHODS[method](RHO, **{keyword: schedule}), optax.sgd(LEARNING_RATE))
    return updates_of(tx), _scheduled_by_hand(method, attribute, schedule)


def _injected_rho(schedule: Schedule, method: str) -> Cell:
    def build(rho: Any) -> optax.GradientTransformation:
        return optax.chain(METHODS[method](rho), optax.sgd(LEARNING_RATE))

    tx = optax.inject_hyperparams(build)(rho=schedule)
    return updates_of(tx), _scheduled_by_hand(method, "rho", schedule)


def _learning_rate(schedule: Schedule, method: str) -> Cell:
    hand = ByHand(method)
    expected = [optax.tree.scale(-schedule(step.index), hand.direction(step)) for step in steps()]
    return updates_of(optax.chain(METHODS[method](RHO), optax.sgd(schedule))), expected


_SCHEDULED: dict[str, Callable[[Schedule, str], Cell]] = {
    "rho": _rho,
    "strength": _strength,
    "injected rho": _injected_rho,
    "learning rate behind": _learning_rate,
}
