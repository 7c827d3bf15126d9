"""What a traced program costs: the multiplications of its matrix products and convolutions."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from optax_sam import _jaxprs

_CALLS = _jaxprs.CALLS | _jaxprs.CUSTOM_DERIVATIVES


class Multiplications(NamedTuple):
    """Of the cheapest and of the dearest way through the branches of a program."""

    least: int
    most: int


def multiplications(jaxpr: Any) -> Multiplications:
    """The multiplications of a program, without those that no output needs.

    The rounds of ``scan`` are counted; those of ``while_loop`` are not known, so its body counts once.
    """
    flat = _jaxprs.with_rule(jaxpr, _open_calls)
    return _count(_jaxprs.without_dead_code(flat))


def _open_calls(equation: Any, values: Sequence[Any]) -> list[Any]:
    """Calls hide what nobody needs of their outputs; their equations do not."""
    if equation.primitive.name in _CALLS:
        return _jaxprs.evaluate(_jaxprs.called(equation), values, _open_calls)
    return _jaxprs.bind(equation, values)


def _count(jaxpr: Any) -> Multiplications:
    program, _ = _jaxprs.open_and_constants(jaxpr)
    counts = [_count_equation(equation) for equation in program.eqns]
    return Multiplications(*(sum(column) for column in zip((0, 0), *counts, strict=True)))


def _count_equation(equation: Any) -> Multiplications:
    name = equation.primitive.name
    if name == "dot_general":
        (contracting, _), _ = equation.params["dimension_numbers"]
        inner = math.prod(equation.invars[0].aval.shape[axis] for axis in contracting)
        return _same(inner * math.prod(equation.outvars[0].aval.shape))
    if name == "conv_general_dilated":
        return _same(_of_convolution(equation))
    inner_counts = [_count(inner) for _, inner in _jaxprs.inner_jaxprs(equation)]
    if not inner_counts:
        return _same(0)
    if platforms := equation.params.get("branches_platforms"):  # one branch is compiled
        return inner_counts[_branch_of_this_platform(platforms)]
    if name == "cond":
        least, most = zip(*inner_counts, strict=True)
        return Multiplications(min(least), max(most))
    rounds = equation.params["length"] if name == "scan" else 1
    return Multiplications(*(rounds * sum(column) for column in zip(*inner_counts, strict=True)))


def _branch_of_this_platform(platforms: Sequence[Sequence[str] | None]) -> int:
    """The place of the branch that names JAX's default backend, or of the one for all others."""
    backend = jax.default_backend()
    own = {"cuda", "rocm"} if backend == "gpu" else {backend}
    here = [names is not None and not own.isdisjoint(names) for names in platforms]
    return here.index(True) if any(here) else len(here) - 1  # where the one for all others stands


def _of_convolution(equation: Any) -> int:
    """What falls on padding and between the pixels of a dilated input is not multiplied."""
    parameters = equation.params
    numbers = parameters["dimension_numbers"]
    inputs, kernel = (variable.aval.shape for variable in equation.invars)
    outputs = equation.outvars[0].aval.shape
    count = (
        outputs[numbers.out_spec[0]] * outputs[numbers.out_spec[1]] * kernel[numbers.rhs_spec[1]]
    )
    for axis in range(len(parameters["window_strides"])):
        length = inputs[numbers.lhs_spec[2 + axis]]
        spread = parameters["lhs_dilation"][axis]
        positions = (
            output * parameters["window_strides"][axis]
            + tap * parameters["rhs_dilation"][axis]
            - parameters["padding"][axis][0]
            for output in range(outputs[numbers.out_spec[2 + axis]])
            for tap in range(kernel[numbers.rhs_spec[2 + axis]])
        )
        count *= sum(p % spread == 0 and 0 <= p // spread < length for p in positions)
    return int(count)


def _same(count: int) -> Multiplications:
    return Multiplications(count, count)
