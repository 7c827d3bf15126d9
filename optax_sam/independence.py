"""Whether a network treats the examples of a batch independently of each other.

Tracing a network on a batch of one never fails: BatchNorm silently becomes instance norm. So the
network is traced on the real batch as well, and the batch axis is followed from the inputs to the
losses through the shapes of the traced program. Nothing is executed, so parameters and inputs may be
tracers, and the answer does not depend on their values.
"""

import dataclasses
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import chex
import jax

from optax_sam import _batch_axis, _jaxprs
from optax_sam._batch_axis import BatchAxis

if TYPE_CHECKING:
    from optax_sam.objectives import Objective

_CALLS = _jaxprs.CALLS | _jaxprs.REMATERIALIZATION | _jaxprs.CUSTOM_DERIVATIVES


@dataclasses.dataclass(frozen=True)
class _Unknown:
    """A value that depends on the examples in a way that could not be followed."""

    reason: str


Place = BatchAxis | _Unknown | None

_PER_EXAMPLE = (
    "A perturbation per example needs a loss per example: mix examples (mixup) before they become "
    "inputs, replace BatchNorm in batch mode by GroupNorm or LayerNorm (or run it with its stored "
    "statistics), or use groups of several examples."
)


def check_independence(
    objective: "Objective", params: chex.ArrayTree, remedy: str = _PER_EXAMPLE
) -> str:
    """Refuses a network whose loss for one example depends on the others.

    What cannot be followed is let through: an operation without a rule (a custom kernel, a scatter),
    a permutation by an array of indices, a loop over the examples. The returned text says so. A loss
    that is deliberately defined over pairs of examples is refused like BatchNorm.

    Args:
      objective: the objective, with its full batch.
      params: the parameters; only their types matter.
      remedy: what the error advises, beside mapping over the examples.

    Returns:
      ``"proved"``, or why it could not be proved.

    Raises:
      TypeError: if it is no objective.
      ValueError: with the operation that mixes the examples, its source line, and the remedy.
    """
    from optax_sam.objectives import require_objective  # which needs this module for microbatches

    objective = require_objective(objective, "check_independence")
    if objective.batch_size < 2:
        return "proved"  # there is nothing to mix

    def losses(params: chex.ArrayTree, examples: Any) -> jax.Array:
        inputs, labels = examples
        batch = objective.replace(inputs=inputs, labels=labels)
        return batch.losses_from_logits(batch.logits_and_aux(params)[0])

    examples = (objective.inputs, objective.labels)
    jaxpr = _jaxprs.without_dead_code(jax.make_jaxpr(losses)(params, examples))
    batch_axis = BatchAxis(0, tuple(range(objective.batch_size)))
    places: list[Place] = [None] * len(jax.tree.leaves(params))
    places += [batch_axis] * len(jax.tree.leaves(examples))
    try:
        (place,) = _follow(jaxpr, places)
    except _MixedError as error:
        raise ValueError(f"{error} {remedy} {_MAP_OVER_EXAMPLES}") from None
    if isinstance(place, BatchAxis) and sorted(place.examples) != list(batch_axis.examples):
        return "the losses are not those of all examples"
    return place.reason if isinstance(place, _Unknown) else "proved"


def warn_if_unproved(argument: str, answer: str) -> None:
    """Warns where :func:`check_independence` could not prove that the examples stay apart."""
    if answer != "proved":
        warnings.warn(
            f"{argument} needs examples that do not influence each other, which could not be proved: "
            f"{answer}. If they are mixed (mixup inside the network, x[0], a loop over examples), the "
            f"result is wrong. {_MAP_OVER_EXAMPLES}",
            stacklevel=2,
        )


class _MixedError(Exception):
    """Says which operation mixes the examples, and where."""


_MAP_OVER_EXAMPLES = (
    "If the examples are independent all the same, say so by mapping over them: apply_fn=lambda "
    "params, inputs: jax.vmap(lambda x: apply(params, x[None])[0])(inputs)."
)


def _follow(jaxpr: Any, places: Sequence[Place]) -> list[Place]:
    program, _ = _jaxprs.open_and_constants(jaxpr)
    known: dict[Any, Place] = dict(zip(program.invars, places, strict=True))
    for equation in program.eqns:
        # A literal is no key: it does not depend on the examples.
        inputs = [None if hasattr(atom, "val") else known.get(atom) for atom in equation.invars]
        known.update(zip(equation.outvars, _outputs(equation, inputs), strict=True))
    return [None if hasattr(atom, "val") else known.get(atom) for atom in program.outvars]


def _outputs(equation: Any, places: Sequence[Any]) -> list[Any]:
    count = len(equation.outvars)
    if all(place is None for place in places):
        return [None] * count
    unknown = [place for place in places if isinstance(place, _Unknown)]
    if unknown:
        return [unknown[0]] * count
    name = equation.primitive.name
    try:
        if name in _CALLS:
            return _follow(_jaxprs.called(equation), places)
        if name == "cond":
            return _follow_branches(equation, places)
        if name == "scan":
            return _follow_scan(equation, places)
        return _batch_axis.place(equation, places)
    except _batch_axis.UnknownError as error:
        return [_Unknown(f"{_jaxprs.name_and_line(equation)}: {error}")] * count
    except _batch_axis.ExamplesAreMixedError as error:
        raise _MixedError(
            "the examples of the batch are not independent: "
            f"{_jaxprs.name_and_line(equation)} {error}."
        ) from None


def _follow_branches(equation: Any, places: Sequence[Place]) -> list[Place]:
    predicate, *operands = places
    if predicate is not None:
        raise _batch_axis.UnknownError("the branch depends on the examples")
    branches = [_follow(branch, operands) for branch in equation.params["branches"]]
    return [_join(candidates) for candidates in zip(*branches, strict=True)]


def _join(candidates: Sequence[Place]) -> Place:
    found = {candidate for candidate in candidates if candidate is not None}
    unknown = [place for place in found if isinstance(place, _Unknown)]
    if unknown:
        return unknown[0]
    if len(found) > 1:
        return _Unknown("it leaves the examples along different axes, or in another order")
    return found.pop() if found else None


def _follow_scan(equation: Any, places: Sequence[Place]) -> list[Place]:
    """Repeats the body until the carry's batch axes are settled; a loop over examples is unknown."""
    count, carried = _jaxprs.scan_split(equation)
    constants, carry = list(places[:count]), list(places[count : count + carried])
    scanned = [_step_of(place) for place in places[count + carried :]]
    while True:
        outputs = _follow(equation.params["jaxpr"], [*constants, *carry, *scanned])
        joined = [_join(pair) for pair in zip(carry, outputs[:carried], strict=True)]
        if joined == carry:
            break
        carry = joined
    return [*carry, *map(_stack_of, outputs[carried:])]


def _step_of(place: Place) -> Place:
    if not isinstance(place, BatchAxis):
        return place
    if place.axis == 0:
        raise _batch_axis.UnknownError("it loops over the examples")
    return place.moved_to(place.axis - 1)


def _stack_of(place: Place) -> Place:
    return place.moved_to(place.axis + 1) if isinstance(place, BatchAxis) else place
