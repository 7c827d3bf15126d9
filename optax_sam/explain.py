"""What a sharpness-aware method will do with a network and a batch, for reading."""

import functools
import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import chex
import jax
import optax

from optax_sam import _cost, _tree
from optax_sam._checks import check_callable
from optax_sam._engine import ONE_GROUP, Decision, Engine, decisions
from optax_sam.evaluations import value_and_gradients
from optax_sam.independence import check_independence
from optax_sam.objectives import Objective
from optax_sam.per_example.plan import make_plan
from optax_sam.per_example.table import table
from optax_sam.per_example.trace import trace

_WIDTH = 17
_SHOWN = 4


def explain(
    tx: optax.GradientTransformation,
    objective: Callable[..., Any],
    params: chex.ArrayTree,
    **extra_args: Any,
) -> str:
    """Says what one step of an optimizer with a sharpness-aware method will do, and what it costs.

    The step is traced, nothing is computed: ``params`` and ``objective`` may be large, and their values
    do not matter. The text names the stages, the parameters that are perturbed, what a step costs,
    and for ``group_size`` whether the groups take the fast path or are differentiated one by one, and
    why.

    The cost counts the multiplications of matrix products and convolutions, and compares them with one
    gradient of the loss; the loss at w, which a training step may report beside the gradient, is not
    counted, nor is what XLA merges with it (J-SAM's logits at w).

    With the fast path there is a table of the parameters. Its columns: the operation in which the
    parameter meets the data, with its positions T per group, inputs K and outputs O; how its
    perturbation is computed; multiplications of both passes in this operation as a multiple of those
    of an SGD step (SAM: 2.0), both without what rematerialization repeats; how many numbers are in
    copies of this parameter, for each group; and why it has no fast form. "6 layers of" stands for a
    stack of weights that a ``lax.scan`` takes apart; the positions of a loop that uses the same
    weights in all rounds are those of all rounds; and a sum stands for weights that are used in several
    places. Above the table, "kept" counts the inputs and output derivatives of these operations that
    the groups at once keep. The methods:

    * ``Gram matrices``: from T × T inner products; no copy of the weights.
    * ``own kernel``: a gradient and perturbed weights for each group of a microbatch.
    * ``own gradient``: ordinary differentiation of each group. Exact for everything; cheap for small
      parameters such as biases and scales.

    With ``axis_name`` call it where the step runs: inside the function that ``shard_map`` maps.

    Args:
      tx: the optimizer: a method, or anything with a method inside (``optax.chain``,
        ``optax.inject_hyperparams``, ``optax.MultiSteps``, :func:`optax_sam.sometimes`, ...).
      objective: the loss that the training step passes as ``loss_fn``.
      params: pytree of parameters; arrays or their shapes.
      **extra_args: what else the training step hands to ``update``, such as ``second_moment``.

    Returns:
      A text to print.

    Raises:
      TypeError: if ``tx`` is no gradient transformation.
      ValueError: if there is no sharpness-aware method in ``tx``; and whatever ``update`` raises, such
        as for a network that mixes the examples of the batch with ``group_size=1``.

    Example:
      >>> import jax.numpy as jnp, optax, optax_sam
      >>> objective = optax_sam.Objective(
      ...     lambda p, x: x @ p["w"] + p["b"], jnp.ones((4, 30)), jnp.zeros(4, jnp.int32))
      >>> tx = optax.chain(optax_sam.sam(rho=0.05, group_size=1), optax.sgd(0.1))
      >>> text = optax_sam.explain(tx, objective, {"w": jnp.ones((30, 20)), "b": jnp.ones(20)})
      >>> "by the fast path" in text and "Gram matrices" in text
      True
    """
    if not (callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", None))):
        raise TypeError(
            "tx must be an optimizer, e.g. optax.chain(optax_sam.sam(0.05), optax.sgd(0.1)), got "
            f"{tx!r}."
        )
    check_callable(
        "objective", objective, "Pass the loss of the step, e.g. optax_sam.Objective(...)."
    )
    update = tx.update
    if isinstance(tx, optax.GradientTransformation):
        update = optax.with_extra_args_support(tx).update

    def gradient(params: Any, objective: Any) -> Any:
        return value_and_gradients(objective, params)[1]

    def step(params: Any, objective: Any) -> Any:
        gradients = _tree.as_gradients(gradient(params, objective), params)
        return update(gradients, tx.init(params), params, loss_fn=objective, **extra_args)

    # Any other function of the parameters is no argument that can be traced.
    fixed = {} if isinstance(objective, Objective) else {"objective": objective}
    arguments = (params,) if fixed else (params, objective)
    found: list[Decision] = []
    token = decisions.set(found)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            program = jax.make_jaxpr(functools.partial(step, **fixed))(*arguments)
    finally:
        decisions.reset(token)
    if not found:
        raise ValueError(
            f"there is no sharpness-aware method in tx, which is {_describe(tx)}. Put one in front of "
            "the optimizer: optax.chain(optax_sam.sam(rho=0.05), optax.sgd(0.1))."
        )
    cost = _cost.multiplications(program)
    one_gradient = jax.make_jaxpr(functools.partial(gradient, **fixed))(*arguments)
    base = _cost.multiplications(one_gradient).most
    lines = [_line("optimizer", _describe(tx)), _line("cost", _relative(cost, base))]
    once = {id(decision.engine): decision for decision in found}  # some wrappers trace twice
    for decision in once.values():
        lines += _of_method(decision, objective, params)
    lines += [f"warning: {entry.message}" for entry in caught if not _is_told(entry)]
    return "\n".join(lines)


def _is_told(entry: warnings.WarningMessage) -> bool:
    """Warnings about groups repeat what the text says."""
    return str(entry.message).startswith("group_size=")


def _relative(cost: _cost.Multiplications, base: int) -> str:
    if not base:
        return "not counted: the loss has no matrix products"
    least, most = cost.least / base, cost.most / base
    if f"{least:.2f}" == f"{most:.2f}":
        return f"{most:.2f} gradients a step (SGD: 1)"
    return f"{least:.2f} to {most:.2f} gradients, depending on the step (SGD: 1)"


def _line(title: str, text: str) -> str:
    return f"{title + ':':{_WIDTH}}{text}"


def _of_method(decision: Decision, objective: Any, params: Any) -> Iterator[str]:
    engine = decision.engine
    combination = engine.combination
    yield _line("perturbation", _describe(engine.perturbation))
    yield _line("evaluation", _name(engine.evaluation))
    yield _line("combination", "none" if combination is None else _describe(combination))
    yield _line("perturbed", _perturbed(decision, params))
    yield from _groups(decision, objective, params)


def _perturbed(decision: Decision, params: Any) -> str:
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    flags = [
        flag and _tree.is_floating(leaf)
        for flag, leaf in zip(jax.tree.leaves(decision.mask), jax.tree.leaves(params), strict=True)
    ]
    if all(flags):
        return "all parameters"
    left_out = [name for name, flag in zip(names, flags, strict=True) if not flag]
    shown = ", ".join([*left_out[:_SHOWN], "..."] if len(left_out) > _SHOWN else left_out)
    return f"{sum(flags)} of {len(flags)} parameters, without {shown}"


def _groups(decision: Decision, objective: Any, params: Any) -> Iterator[str]:
    size = decision.engine.group_size
    if size is None or not isinstance(objective, Objective):
        yield _line("groups", "none: one perturbation for the batch")
        return
    if decision.reason == ONE_GROUP:
        yield _line("groups", f"one: group_size={size} is the batch")
        return
    count = objective.batch_size // size
    examples = "1 example" if size == 1 else f"{size} examples"
    how = f"each by itself: {decision.reason}" if decision.reason else "by the fast path"
    yield _line("groups", f"{count} of {examples}, {how}")
    if size == 1:
        yield _line("independence", check_independence(objective, params))
    if decision.reason:
        return
    traced = trace(objective, params, size)
    plan = make_plan(traced, jax.tree.leaves(params), jax.tree.leaves(decision.mask))
    at_once = plan.groups_at_once(traced.count, size, objective.microbatch_size)
    if plan.failure:
        yield _line("not followed", plan.failure)
    yield _line("at once", f"{at_once * size} of {objective.batch_size} examples")
    yield _line("copies", f"{at_once * plan.copied_size} numbers in copies of weights")
    recorded = at_once * (plan.kept_size - plan.copied_size)
    yield _line("kept", f"{recorded} numbers in inputs and output derivatives")
    yield ""
    yield table(plan)


def _describe(transformation: Any) -> str:
    """The name of a transformation and of those inside, as far as its functions tell."""
    update = transformation.update
    owner = getattr(update, "__self__", None)
    if isinstance(owner, Engine):
        return "sharpness_aware"
    name = _name(update) if owner is None else type(owner).__name__
    held = _held(update if owner is None else owner)
    inner = [_describe(part) for part in _transformations(held)]
    if (
        "inner_factory" in held
    ):  # of optax.inject_hyperparams, which makes the inner one in each step
        inner.append(_name(held["inner_factory"]))
    if name in _TRANSPARENT and len(inner) == 1:
        return inner[0]
    return f"{name}({', '.join(inner)})" if inner else name


# They change what a transformation accepts, not what it does.
_TRANSPARENT = {"with_extra_args_support", "as_stage", "as_method"}


def _name(function: Any) -> str:
    name: str = getattr(function, "__qualname__", type(function).__name__)
    return name.split(".<locals>")[0]


def _held(holder: Any) -> dict[str, Any]:
    """What a function closes over, or what an object holds."""
    if inspect.isfunction(holder):
        return dict(inspect.getclosurevars(holder).nonlocals)
    return dict(getattr(holder, "__dict__", {}))


def _transformations(held: dict[str, Any]) -> Iterator[Any]:
    for value in held.values():
        several = value.values() if isinstance(value, dict) else value
        parts = several if isinstance(value, dict | tuple | list) else ()
        if isinstance(value, optax.GradientTransformation):
            parts = (value,)
        for part in parts:
            if isinstance(part, optax.GradientTransformation):
                yield part
            elif inspect.isroutine(part) and "update" in getattr(part, "__name__", ""):
                # optax.chain keeps the functions only.
                yield optax.GradientTransformation(lambda params: None, part)
