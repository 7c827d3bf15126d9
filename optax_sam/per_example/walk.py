"""Following the parameters through a traced program.

A traced program is a list of equations. Walking it means evaluating it while the values that come
linearly from one parameter leaf are marked (:class:`ParameterValue`), until they meet the data: in a
matrix product, a convolution or a row lookup (a *site*), or in any other operation. What happens
there is the business of a :class:`Visitor`: the plan counts the uses, the first pass records a site's
inputs, the second pass applies the perturbed weights.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from optax_sam import _jaxprs
from optax_sam.per_example.places import OUTSIDE, Path, Place, Sliced

# Rearrangements: the norm of the gradient is the same before and after, and their transpose is
# their inverse. (A cast changes it by rounding only, a broadcast counts if it repeats nothing.)
_REARRANGEMENTS = {
    "transpose",
    "reshape",
    "squeeze",
    "expand_dims",
    "rev",
    "copy",
    "copy_p",
    "name",
    "convert_element_type",
    "broadcast_in_dim",
}
# Linear in their first operand, and their other operands are indices at most.
_LINEAR = _REARRANGEMENTS | {"slice", "split", "dynamic_slice", "gather", "neg", "reduce_sum"}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ParameterValue:
    """A value that depends linearly on one parameter leaf, and on nothing else.

    Attributes:
      clean: the value at the parameters w.
      perturbed: the value at w + ε_j; None where the perturbation is not applied to the weights.
      gradient: g_j where ε_j is still to be added, as an array like the value or in thin matrices.
      factor: ε_j / g_j.
      leaf: index of the leaf.
      path: the way that leads here from the leaf; None once the norm may have changed.
    """

    clean: jax.Array
    perturbed: jax.Array | None = None
    gradient: Any = None  # an array, or a tuple of terms
    factor: jax.Array | None = None
    leaf: int = dataclasses.field(default=0, metadata={"static": True})
    path: Path | None = dataclasses.field(default=(), metadata={"static": True})

    @property
    def value(self) -> jax.Array:
        """The value the program goes on with."""
        settled = self.settled()
        return settled.clean if settled.perturbed is None else settled.perturbed

    def settled(self) -> "ParameterValue":
        """With ε_j added, if g_j is an array.

        Not before it is needed: a loop over layers has then perturbed weights of one layer at a time.
        """
        if self.factor is None or not isinstance(self.gradient, jax.Array):
            return self
        epsilon = self.factor * self.gradient.astype(self.factor.dtype)
        perturbed = self.clean + epsilon.astype(self.clean.dtype)
        return dataclasses.replace(self, perturbed=perturbed, gradient=None)


class Visitor(Protocol):
    """What is done where parameters meet data.

    Attributes:
      captured: what the visits leave behind. The bodies of loops and rematerialized blocks return it,
        and loops stack it.
    """

    captured: dict[Place, jax.Array]

    def given(self, loop: Place) -> dict[Place, jax.Array]:
        """What the visits inside a loop need, a slice of it in each round."""

    def branch(self, given: dict[Place, jax.Array]) -> "Visitor":
        """A visitor with nothing captured yet, for the inside of a loop or a rematerialized block."""

    def at_site(
        self,
        place: Place,
        equation: Any,
        position: int,
        inputs: jax.Array,
        parameter: ParameterValue,
    ) -> jax.Array:
        """The output of a linear operation on ``inputs`` with weights at operand ``position``."""

    def resolve(self, parameter: ParameterValue, reason: str) -> jax.Array:
        """The plain array, for an operation nothing is known about."""


def walk(
    jaxpr: Any, arguments: Sequence[Any], visitor: Visitor, place: Place = OUTSIDE
) -> list[Any]:
    """Evaluates a jaxpr whose arguments are arrays or :class:`ParameterValue`.

    Raises:
      CannotFollowError: if an equation has a form that is not known here.
    """
    if not any(isinstance(argument, ParameterValue) for argument in arguments):
        return _jaxprs.evaluate(jaxpr, arguments)
    numbers = itertools.count()

    def rule(equation: Any, values: list[Any]) -> Sequence[Any]:
        number = next(numbers)
        if not any(isinstance(value, ParameterValue) for value in values):
            return _jaxprs.bind(equation, values)
        return _visit(equation, values, visitor, place.inside(number))

    return _jaxprs.evaluate(jaxpr, arguments, rule)


def resolve_all(values: Sequence[Any], visitor: Visitor, reason: str) -> list[Any]:
    """Plain arrays, whatever the values are."""
    return [
        visitor.resolve(value, reason) if isinstance(value, ParameterValue) else value
        for value in values
    ]


def _visit(equation: Any, values: list[Any], visitor: Visitor, place: Place) -> Sequence[Any]:
    name = equation.primitive.name
    position = _site_position(equation, values)
    if position is not None:
        inputs, parameter = values[1 - position], values[position]
        return [visitor.at_site(place, equation, position, inputs, parameter)]
    if name in _LINEAR and _only_first_is_parameter(values) and _stays_real(equation):
        return _apply_linear(equation, values)
    if name in _jaxprs.CALLS:
        return walk(_jaxprs.called(equation), values, visitor, place)
    if name in _jaxprs.REMATERIALIZATION:
        return _rematerialize(equation, values, visitor, place)
    if name == "scan":
        return _scan(equation, values, visitor, place)
    return _jaxprs.bind(equation, resolve_all(values, visitor, f"used by `{name}`"))


def _site_position(equation: Any, values: Sequence[Any]) -> int | None:
    """Which of the two operands holds the weights, if the equation is a site."""
    if len(values) != 2:
        return None
    first, second = (isinstance(value, ParameterValue) for value in values)
    if first == second:
        return None  # parameter times parameter
    match equation.primitive.name:
        case "dot_general":
            return int(second)
        case "conv_general_dilated":
            return 1 if second else None
        case "gather":
            return 0 if first and looks_up_rows(equation) else None
    return None


def looks_up_rows(equation: Any) -> bool:
    """Whether a ``gather`` takes whole rows along axis 0: ``table[indices]``."""
    numbers = equation.params["dimension_numbers"]
    table, indices = (variable.aval for variable in equation.invars)
    return bool(
        numbers.collapsed_slice_dims == (0,)
        and numbers.start_index_map == (0,)
        and not numbers.operand_batching_dims
        and indices.shape[-1:] == (1,)
        and tuple(equation.params["slice_sizes"]) == (1, *table.shape[1:])
    )


def _only_first_is_parameter(values: Sequence[Any]) -> bool:
    return isinstance(values[0], ParameterValue) and not any(
        isinstance(value, ParameterValue) for value in values[1:]
    )


def _stays_real(equation: Any) -> bool:
    """A cast to integers has no derivative."""
    return jnp.issubdtype(equation.outvars[0].aval.dtype, jnp.floating)


def _apply_linear(equation: Any, values: Sequence[Any]) -> list[ParameterValue]:
    parameter, *others = values
    parameter = parameter.settled()
    clean = _jaxprs.bind(equation, [parameter.clean, *others])
    perturbed: list[Any] = [None] * len(clean)
    if parameter.perturbed is not None:
        perturbed = _jaxprs.bind(equation, [parameter.perturbed, *others])
    path = _extend(parameter.path, equation)
    return [
        dataclasses.replace(parameter, clean=c, perturbed=p, path=path)
        for c, p in zip(clean, perturbed, strict=True)
    ]


def _extend(path: Path | None, equation: Any) -> Path | None:
    source, target = equation.invars[0].aval, equation.outvars[0].aval
    repeats = math.prod(source.shape) != math.prod(target.shape)
    if path is None or repeats or equation.primitive.name not in _REARRANGEMENTS:
        return None
    return (*path, equation)


def _rematerialize(equation: Any, values: list[Any], visitor: Visitor, place: Place) -> list[Any]:
    """The block stays rematerialized; what was captured inside becomes an output of it."""
    inner = _jaxprs.parameter(equation, "jaxpr")
    captured = _Captured()

    def block(values: list[Any]) -> tuple[list[Any], list[jax.Array]]:
        branch = visitor.branch({})
        outputs = walk(inner, values, branch, place)
        outputs = resolve_all(outputs, branch, "leaves a rematerialized block")
        return outputs, captured.arrays(branch)

    checkpoint: Callable[..., Any] = jax.checkpoint(
        block,
        policy=_jaxprs.parameter(equation, "policy"),
        prevent_cse=_jaxprs.parameter(equation, "prevent_cse"),
    )
    outputs, arrays = checkpoint(values)
    visitor.captured.update(captured.by_place(arrays))
    return list(outputs)


def _scan(equation: Any, values: list[Any], visitor: Visitor, place: Place) -> list[Any]:
    """The loop is kept, and its body walked. Of a stack of weights it takes a slice in each round."""
    count, carried = _jaxprs.scan_split(equation)
    inner = _jaxprs.parameter(equation, "jaxpr")
    options = {name: _jaxprs.parameter(equation, name) for name in ("length", "reverse", "unroll")}
    inside = place.loop(options["length"])
    constants = [c.settled() if isinstance(c, ParameterValue) else c for c in values[:count]]
    stacks = values[count + carried :]
    carry = resolve_all(values[count : count + carried], visitor, "carried by `scan`")
    captured = _Captured()

    def body(carry: list[Any], slices: Any) -> tuple[list[Any], Any]:
        sliced, given = slices
        branch = visitor.branch(given)
        scanned = [
            _slice_of(stack, slice_, len(place.rounds))
            for stack, slice_ in zip(stacks, sliced, strict=True)
        ]
        outputs = walk(inner, [*constants, *carry, *scanned], branch, inside)
        outputs = resolve_all(outputs, branch, "leaves a `scan`")
        return outputs[:carried], (outputs[carried:], captured.arrays(branch))

    slices = ([*map(_arrays_of, stacks)], visitor.given(inside))
    carry, (stacked, arrays) = lax.scan(body, carry, slices, **options)
    visitor.captured.update(captured.by_place(arrays))
    return [*carry, *stacked]


def _arrays_of(stack: Any) -> Any:
    """What a loop has to slice."""
    if isinstance(stack, ParameterValue):
        return stack.clean, stack.perturbed, stack.gradient
    return stack


def _slice_of(stack: Any, slice_: Any, loop: int) -> Any:
    if not isinstance(stack, ParameterValue):
        return slice_
    clean, perturbed, gradient = slice_
    path = None if stack.path is None else (*stack.path, Sliced(loop))
    return dataclasses.replace(
        stack, clean=clean, perturbed=perturbed, gradient=gradient, path=path
    )


class _Captured:
    """What was captured inside a program, as outputs of it: each array once.

    Queries, keys and values are computed from the same array, which a loop would stack three times.
    """

    def __init__(self) -> None:
        self.numbers: dict[Place, int] = {}

    def arrays(self, visitor: Visitor) -> list[jax.Array]:
        """The different arrays that a visitor has captured."""
        unique = {id(array): array for array in visitor.captured.values()}
        order = {key: number for number, key in enumerate(unique)}
        self.numbers = {place: order[id(array)] for place, array in visitor.captured.items()}
        return list(unique.values())

    def by_place(self, arrays: Sequence[jax.Array]) -> dict[Place, jax.Array]:
        """The arrays where they were captured, from the outputs of the program."""
        return {place: arrays[number] for place, number in self.numbers.items()}
