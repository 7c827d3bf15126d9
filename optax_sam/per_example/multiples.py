r"""Perturbations that are multiples of the gradient: :math:`\epsilon_l = c_l \, g_l` for each leaf l.

The fast path for groups never forms a group's gradient where it can do without; it knows the squared
norms :math:`\lVert g_l \rVert^2` of its leaves. That is enough for a first stage whose perturbation of
each leaf is a multiple of the leaf's gradient, with a factor that follows from these norms:
``normalized``, and all that optax chains, scales, clips or partitions around it. Whether a stage is of
this kind is read off its own traced program, so no wrapper can hide it: the program is evaluated with
:class:`Multiple` in place of the gradients.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_sam import _jaxprs, _tree


class NotAMultipleError(Exception):
    """The perturbation of a leaf is no multiple of the leaf's gradient; says why."""


@dataclasses.dataclass(frozen=True)
class Multiple:
    """``factor * gradient of a leaf``, elementwise."""

    leaf: int
    factor: jax.Array


@dataclasses.dataclass(frozen=True)
class Square:
    """``factor * (gradient of a leaf)²``, elementwise."""

    leaf: int
    factor: jax.Array


@dataclasses.dataclass(frozen=True)
class Repeated:
    """One number in every element of an array."""

    number: jax.Array
    shape: tuple[int, ...]
    depends: bool

    @property
    def array(self) -> jax.Array:
        """The array itself."""
        return jnp.broadcast_to(self.number, self.shape)


@dataclasses.dataclass(frozen=True)
class Number:
    """An array computed from the norms of the gradients."""

    array: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Multiples:
    """The factors of a first stage as a function of the squared norms of a group's gradient.

    Attributes:
      constants: arrays that the program closes over (ρ, step counts, parameters).
      program: the traced ``update`` of the stage.
      floating: which leaves are floating.
    """

    constants: list[Any]
    program: Any = dataclasses.field(metadata={"static": True})
    floating: tuple[bool, ...] = dataclasses.field(metadata={"static": True})

    def __call__(self, squared_norms: Sequence[jax.Array]) -> tuple[list[jax.Array], list[Any]]:
        """``(a factor per leaf, leaves of the stage's next state)``; see :func:`multiples_of`."""
        dtype = squared_norms[0].dtype
        opened, _ = _jaxprs.open_and_constants(self.program)
        shapes = [variable.aval.shape for variable in opened.invars]
        gradients = [
            Multiple(index, jnp.ones([], dtype)) if is_floating else jnp.zeros(shape, jnp.int32)
            for index, (is_floating, shape) in enumerate(zip(self.floating, shapes, strict=True))
        ]
        evaluator = _Evaluator(list(squared_norms))
        outputs = evaluator.run(self.program, gradients, self.constants)
        count = len(self.floating)
        factors = [
            _factor(output, index, dtype) if is_floating else jnp.zeros([], dtype)
            for index, (output, is_floating) in enumerate(
                zip(outputs[:count], self.floating, strict=True)
            )
        ]
        return factors, [_independent(output) for output in outputs[count:]]


def multiples_of(
    stage: optax.GradientTransformationExtraArgs,
    state: optax.OptState,
    params: Any,
    extra_args: dict[str, Any],
) -> tuple[Multiples, optax.OptState]:
    """The factors of a first stage, and its state after the step.

    Raises:
      NotAMultipleError: if its perturbation is something else.
    """
    leaves, treedef = jax.tree.flatten(params)
    structure: list[Any] = []

    def update(gradients: list[jax.Array]) -> list[Any]:
        tree = jax.tree.unflatten(treedef, gradients)
        epsilon, new_state = stage.update(tree, state, params, **extra_args)
        state_leaves, state_treedef = jax.tree.flatten(new_state)
        structure.append(state_treedef)
        return [*jax.tree.leaves(epsilon), *state_leaves]

    multiples = _traced(update, [jnp.asarray(leaf) for leaf in leaves])
    dtype = _tree.accumulation_dtype(params)
    _, new_leaves = multiples([jnp.ones([], dtype)] * len(leaves))
    return multiples, jax.tree.unflatten(structure[-1], new_leaves)


def _traced(update: Callable[[list[jax.Array]], list[Any]], leaves: Sequence[jax.Array]) -> Multiples:
    types = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    program = _jaxprs.without_dead_code(jax.make_jaxpr(update)(types))
    _, constants = _jaxprs.open_and_constants(program)
    return Multiples(list(constants), program, tuple(_tree.is_floating(leaf) for leaf in leaves))


def _factor(output: Any, leaf: int, dtype: Any) -> jax.Array:
    if isinstance(output, Repeated) and _is_zero(output.number):
        return jnp.zeros([], dtype)
    if not isinstance(output, Multiple) or output.leaf != leaf:
        raise NotAMultipleError("it does not come from the gradient of the same parameter alone")
    return output.factor.astype(dtype)


def _independent(output: Any) -> Any:
    """A part of the state: it must be the same for all groups."""
    if isinstance(output, Repeated) and not output.depends:
        return output.array
    if isinstance(output, Multiple | Square | Repeated | Number):
        raise NotAMultipleError("the stage remembers gradients of earlier steps")
    return output


def _is_zero(number: Any) -> bool:
    return not isinstance(number, jax.core.Tracer) and float(number) == 0


_SAME = {"convert_element_type", "copy", "copy_p", "reduce_precision", "optimization_barrier"}
_CALLS = _jaxprs.CALLS | _jaxprs.REMATERIALIZATION | _jaxprs.CUSTOM_DERIVATIVES


class _Evaluator:
    """Evaluates a program in which some values are multiples of gradients."""

    def __init__(self, squared_norms: list[jax.Array]):
        self.squared_norms = squared_norms

    def run(
        self, program: Any, arguments: Sequence[Any], constants: Sequence[Any] | None = None
    ) -> list[Any]:
        """The outputs of a program."""
        return _jaxprs.evaluate(program, arguments, self.equation, constants)

    def equation(self, equation: Any, values: Sequence[Any]) -> list[Any]:
        name = equation.primitive.name
        if name in _CALLS and any(_is_marked(value) for value in values):
            return self.run(_jaxprs.inner_jaxprs(equation)[0][1], values)
        if name == "broadcast_in_dim":
            repeated = _repeat(equation, values[0])
            if repeated is not None:
                return [repeated]
        if any(isinstance(value, Multiple | Square) for value in values):
            return [self.of_gradient(name, equation, values)]
        depends = any(isinstance(v, Number) or (isinstance(v, Repeated) and v.depends) for v in values)
        plain = [value.array if isinstance(value, Number | Repeated) else value for value in values]
        outputs = _jaxprs.bind(equation, plain)
        return [Number(output) for output in outputs] if depends else outputs

    def of_gradient(self, name: str, equation: Any, values: Sequence[Any]) -> Any:
        """The output of an equation with at least one value that comes from gradients."""
        first = values[0]
        if name in _SAME and isinstance(first, Multiple | Square):
            return first
        if name == "neg" and isinstance(first, Multiple | Square):
            return dataclasses.replace(first, factor=-first.factor)
        if name in ("mul", "div"):
            product = self.product(name, *values)
            if product is not None:
                return product
        if name == "square" or (name == "integer_pow" and equation.params["y"] == 2):
            return self.product("mul", first, first) if isinstance(first, Multiple) else self.refuse(equation)
        if name in ("add", "sub", "add_any") and _same_leaf(values):
            sign = -1 if name == "sub" else 1
            return Multiple(first.leaf, first.factor + sign * values[1].factor)
        if name == "reduce_sum" and isinstance(first, Square):
            if len(equation.params["axes"]) == len(equation.invars[0].aval.shape):
                return Number(self.norm(first, equation))
        if name == "dot_general" and _same_leaf(values) and equation.outvars[0].aval.shape == ():
            return Number(self.norm(self.product("mul", *values), equation))
        if name == "select_n":
            chosen = self.select(values)
            if chosen is not None:
                return chosen
        return self.refuse(equation)

    def refuse(self, equation: Any) -> Any:
        raise NotAMultipleError(
            f"`{equation.primitive.name}` at {_jaxprs.source_line(equation)} makes it something else than a "
            "multiple of the gradient"
        )

    def norm(self, square: Square, equation: Any) -> jax.Array:
        total = square.factor * self.squared_norms[square.leaf]
        return total.astype(equation.outvars[0].aval.dtype)

    def product(self, name: str, left: Any, right: Any) -> Any:
        if isinstance(left, Multiple) and isinstance(right, Multiple):
            if name == "mul" and left.leaf == right.leaf:
                return Square(left.leaf, left.factor * right.factor)
            return None
        if name == "mul" and isinstance(right, Multiple | Square):
            left, right = right, left
        number = _number(right)
        if not isinstance(left, Multiple | Square) or number is None:
            return None
        number = number.astype(left.factor.dtype)
        factor = left.factor * number if name == "mul" else left.factor / number
        return dataclasses.replace(left, factor=factor)

    def select(self, values: Sequence[Any]) -> Any:
        which, *cases = values
        predicate = _number(which)
        leaves = {case.leaf for case in cases if isinstance(case, Multiple)}
        if predicate is None or len(leaves) != 1:
            return None
        factors = []
        for case in cases:
            if isinstance(case, Multiple):
                factors.append(case.factor)
            elif isinstance(case, Repeated) and _is_zero(case.number):
                factors.append(jnp.zeros([], jnp.float32))
            else:
                return None
        dtype = jnp.result_type(*factors)
        factors = [factor.astype(dtype) for factor in factors]
        return Multiple(leaves.pop(), jax.lax.select_n(predicate, *factors))


def _is_marked(value: Any) -> bool:
    return isinstance(value, Multiple | Square | Repeated | Number)


def _same_leaf(values: Sequence[Any]) -> bool:
    return (
        all(isinstance(value, Multiple) for value in values)
        and len({value.leaf for value in values}) == 1
    )


def _number(value: Any) -> jax.Array | None:
    """The scalar that a value is in each of its elements, if it is one."""
    if isinstance(value, Repeated):
        return value.number
    array = value.array if isinstance(value, Number) else value
    if isinstance(array, Multiple | Square) or math.prod(jnp.shape(array)) != 1:
        return None
    return jnp.reshape(jnp.asarray(array), ())


def _repeat(equation: Any, value: Any) -> Repeated | None:
    number = _number(value) if not isinstance(value, Multiple | Square) else None
    if number is None:
        return None
    depends = isinstance(value, Number) or (isinstance(value, Repeated) and value.depends)
    return Repeated(number, equation.outvars[0].aval.shape, depends)
