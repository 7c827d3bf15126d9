"""Following the parameters through a traced program.

A traced program is a list of equations. Walking it means evaluating it while the values that come
linearly from one parameter leaf are marked (:class:`ParameterValue`), until they meet the data: in a
matrix product, a convolution or a row lookup (a *site*), or in any other operation. What happens
there is the business of a :class:`Visitor`: the plan counts the uses, the first pass records a site's
inputs, the second pass applies the perturbed weights.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from optax_sam import _jaxprs

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


Path = tuple[Any, ...]  # equations


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ParameterValue:
    """A value that depends linearly on one parameter leaf, and on nothing else.

    Attributes:
      clean: the value at the parameters w.
      perturbed: the value at w + ε_j; None where the perturbation is not applied to the weights.
      leaf: index of the leaf.
      path: the rearrangements that lead here from the leaf; None once the norm may have changed.
    """

    clean: jax.Array
    perturbed: jax.Array | None = None
    leaf: int = dataclasses.field(default=0, metadata={"static": True})
    path: Path | None = dataclasses.field(default=(), metadata={"static": True})

    @property
    def value(self) -> jax.Array:
        """The value the program goes on with."""
        return self.clean if self.perturbed is None else self.perturbed


class Visitor(Protocol):
    """What is done where parameters meet data.

    Attributes:
      captured: what the visits leave behind; the outputs of a rematerialized block.
      enters_loops: whether the bodies of ``lax.scan`` are walked; otherwise all parameters are
        resolved before the loop.
    """

    captured: dict[int, jax.Array]
    enters_loops: bool

    def branch(self) -> "Visitor":
        """A visitor with nothing captured yet, for the inside of a rematerialized block."""

    def at_site(
        self, equation: Any, position: int, inputs: jax.Array, parameter: ParameterValue
    ) -> jax.Array:
        """The output of a linear operation on ``inputs`` with weights at operand ``position``."""

    def resolve(self, parameter: ParameterValue, reason: str) -> jax.Array:
        """The plain array, for an operation nothing is known about."""


def walk(jaxpr: Any, arguments: Sequence[Any], visitor: Visitor) -> list[Any]:
    """Evaluates a jaxpr whose arguments are arrays or :class:`ParameterValue`.

    Raises:
      CannotFollowError: if an equation has a form that is not known here.
    """
    if not any(isinstance(argument, ParameterValue) for argument in arguments):
        return _jaxprs.evaluate(jaxpr, arguments)

    def rule(equation: Any, values: list[Any]) -> Sequence[Any]:
        if not any(isinstance(value, ParameterValue) for value in values):
            return _jaxprs.bind(equation, values)
        return _visit(equation, values, visitor)

    return _jaxprs.evaluate(jaxpr, arguments, rule)


def resolve_all(values: Sequence[Any], visitor: Visitor, reason: str) -> list[Any]:
    """Plain arrays, whatever the values are."""
    return [
        visitor.resolve(value, reason) if isinstance(value, ParameterValue) else value
        for value in values
    ]


def apply_path(path: Path, leaf: jax.Array) -> jax.Array:
    """The rearrangements that lead from a leaf to its site."""
    for equation in path:
        (leaf,) = _jaxprs.bind(equation, [leaf])
    return leaf


def _visit(equation: Any, values: list[Any], visitor: Visitor) -> Sequence[Any]:
    name = equation.primitive.name
    position = _site_position(equation, values)
    if position is not None:
        return [visitor.at_site(equation, position, values[1 - position], values[position])]
    if name in _LINEAR and _only_first_is_parameter(values) and _stays_real(equation):
        return _apply_linear(equation, values)
    if name in _jaxprs.CALLS:
        return walk(_jaxprs.called(equation), values, visitor)
    if name in _jaxprs.REMATERIALIZATION:
        return _rematerialize(equation, values, visitor)
    if name == "scan" and visitor.enters_loops:
        return _scan(equation, values, visitor)
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
    clean = _jaxprs.bind(equation, [parameter.clean, *others])
    perturbed: list[Any] = [None] * len(clean)
    if parameter.perturbed is not None:
        perturbed = _jaxprs.bind(equation, [parameter.perturbed, *others])
    path = _extend(parameter.path, equation)
    return [
        ParameterValue(c, p, leaf=parameter.leaf, path=path)
        for c, p in zip(clean, perturbed, strict=True)
    ]


def _extend(path: Path | None, equation: Any) -> Path | None:
    source, target = equation.invars[0].aval, equation.outvars[0].aval
    repeats = math.prod(source.shape) != math.prod(target.shape)
    if path is None or repeats or equation.primitive.name not in _REARRANGEMENTS:
        return None
    return (*path, equation)


def _rematerialize(equation: Any, values: list[Any], visitor: Visitor) -> list[Any]:
    """The block stays rematerialized; what was captured inside becomes an output of it."""
    inner = _jaxprs.parameter(equation, "jaxpr")

    def block(values: list[Any]) -> tuple[list[Any], dict[int, jax.Array]]:
        branch = visitor.branch()
        outputs = walk(inner, values, branch)
        return resolve_all(outputs, branch, "leaves a rematerialized block"), branch.captured

    checkpoint: Callable[..., Any] = jax.checkpoint(
        block,
        policy=_jaxprs.parameter(equation, "policy"),
        prevent_cse=_jaxprs.parameter(equation, "prevent_cse"),
    )
    outputs, captured = checkpoint(values)
    visitor.captured.update(captured)
    return list(outputs)


def _scan(equation: Any, values: list[Any], visitor: Visitor) -> list[Any]:
    """The loop is kept, and its body walked."""
    count, carried = _jaxprs.scan_split(equation)
    inner = _jaxprs.parameter(equation, "jaxpr")
    constants, scanned = values[:count], values[count + carried :]
    carry = resolve_all(values[count : count + carried], visitor, "carried by `scan`")

    def body(carry: list[Any], scanned: list[Any]) -> tuple[list[Any], list[Any]]:
        outputs = walk(inner, [*constants, *carry, *scanned], visitor)
        outputs = resolve_all(outputs, visitor, "leaves a `scan`")
        return outputs[:carried], outputs[carried:]

    options = {name: _jaxprs.parameter(equation, name) for name in ("length", "reverse", "unroll")}
    carry, stacked = lax.scan(body, carry, scanned, **options)
    return [*carry, *stacked]
