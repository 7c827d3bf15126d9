r"""Perturbations that are multiples of the gradient: :math:`\epsilon_l = c_l \, g_l` for each leaf l.

The fast path for groups never forms a group's gradient where it can do without; it knows the squared
norms :math:`\lVert g_l \rVert^2` of its leaves. That is enough for a first stage whose perturbation of
each leaf is a multiple of the leaf's gradient, with a factor that follows from these norms:
``normalized``, and all that optax chains, scales, clips by a norm or partitions around it. Whether a
stage is of this kind is read off its own traced program, so no wrapper can hide it: the program is
evaluated with :class:`Multiple` in place of the gradients.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_sam import _jaxprs, _tree
from optax_sam._axes import to_varying_like
from optax_sam._stages import check_perturbation
from optax_sam.objectives import Objective


class NotAMultipleError(Exception):
    """A perturbation is no multiple of the gradient; the message goes on after "the first stage"."""


@dataclasses.dataclass(frozen=True)
class Multiple:
    """``factor * gradient of a leaf``, elementwise, in the order of the leaf's elements."""

    leaf: int
    factor: jax.Array


@dataclasses.dataclass(frozen=True)
class Square:
    """``factor * other * (gradient of a leaf)²``, elementwise.

    The factors stay apart: their product may overflow where the sum of squares does not.
    """

    leaf: int
    factor: jax.Array
    other: jax.Array


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


_OfGradient = Multiple | Square
_Marked = Multiple | Square | Repeated | Number


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Multiples:
    """The factors of a first stage as a function of the squared norms of a group's gradient.

    Attributes:
      constants: arrays that the program closes over (ρ, step counts, parameters).
      program: the traced ``update`` of the stage.
      leaves: shape and dtype of the parameters' leaves.
    """

    constants: list[Any]
    program: Any = dataclasses.field(metadata={"static": True})
    leaves: tuple[jax.ShapeDtypeStruct, ...] = dataclasses.field(metadata={"static": True})

    def __call__(self, squared_norms: Sequence[jax.Array]) -> tuple[list[jax.Array], list[Any]]:
        """``(a factor per leaf, leaves of the stage's next state)``; see :func:`multiples_of`."""
        dtype = _tree.accumulation_dtype(self.leaves)
        floating = [_tree.is_floating(leaf) for leaf in self.leaves]
        gradients = [
            Multiple(index, jnp.ones([], dtype)) if floats else jnp.zeros(leaf.shape, leaf.dtype)
            for index, (leaf, floats) in enumerate(zip(self.leaves, floating, strict=True))
        ]
        evaluator = _Evaluator(list(squared_norms))
        outputs = evaluator.run(self.program, gradients, self.constants)
        factors = [
            _factor(output, index, dtype) if floats else jnp.zeros([], dtype)
            for index, (output, floats) in enumerate(zip(outputs, floating, strict=False))
        ]
        return factors, [_independent(output) for output in outputs[len(self.leaves) :]]


class _OfGroup(Objective):
    """Stands for the loss and the logits of a group: a stage may not look at them."""

    def __init__(self) -> None:
        pass

    def __getattribute__(self, name: str) -> Any:
        raise NotAMultipleError("evaluates the loss, of which every group has its own")

    def __call__(self, params: Any) -> Any:
        """As :meth:`__getattribute__`."""
        return self.apply_fn

    def __getitem__(self, index: Any) -> Any:
        return self.apply_fn


def multiples_of(
    stage: optax.GradientTransformationExtraArgs,
    state: optax.OptState,
    params: Any,
    extra_args: dict[str, Any],
    perturbed: Any = None,
) -> tuple[Multiples, optax.OptState]:
    """The factors of a first stage, and its state after the step.

    Args:
      stage: the first stage.
      state: its state.
      params: the parameters w.
      extra_args: further arguments of its ``update``; loss and logits are replaced by objects that
        refuse to be looked at.
      perturbed: which leaves are perturbed; if given, a gradient that is handed on is refused as in
        :func:`optax_sam._stages.check_perturbation`.

    Raises:
      NotAMultipleError: if its perturbation is something else.
    """
    logits = None if extra_args.get("logits") is None else _OfGroup()
    extra_args = extra_args | {"loss_fn": _OfGroup(), "logits": logits}
    leaves, treedef = jax.tree.flatten(params)
    types = tuple(_type_of(leaf) for leaf in leaves)
    structure: list[Any] = []

    def update(gradients: list[jax.Array]) -> list[Any]:
        tree = jax.tree.unflatten(treedef, gradients)
        epsilon, new_state = stage.update(tree, state, params, **extra_args)
        if perturbed is not None:
            check_perturbation(epsilon, tree, perturbed)
        state_leaves, state_treedef = jax.tree.flatten(new_state)
        structure.append(state_treedef)
        return [*jax.tree.leaves(epsilon), *state_leaves]

    program = _jaxprs.without_dead_code(jax.make_jaxpr(update)(list(types)))
    _, constants = _jaxprs.open_and_constants(program)
    multiples = Multiples(list(constants), program, types)
    ones = [jnp.ones([], _tree.accumulation_dtype(params))] * len(leaves)
    _, new_leaves = multiples(ones)
    return multiples, jax.tree.unflatten(structure[-1], new_leaves)


def _type_of(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf))  # type: ignore[no-untyped-call]


def _factor(output: Any, leaf: int, dtype: Any) -> jax.Array:
    if _is_zero(output):
        return jnp.zeros([], dtype)
    if not isinstance(output, Multiple):
        raise NotAMultipleError("perturbs along something else than the group's own gradient")
    if output.leaf != leaf:
        raise NotAMultipleError("perturbs a parameter along the gradient of another one")
    return output.factor.astype(dtype)


def _independent(output: Any) -> Any:
    """A part of the state: it must be the same for all groups."""
    if isinstance(output, Repeated) and not output.depends:
        return output.array
    if isinstance(output, _Marked):
        raise NotAMultipleError(
            "has a state that depends on the gradients (a moving average, momentum), of which there is "
            "one for all groups"
        )
    return output


_SAME = {
    "convert_element_type",
    "copy",
    "copy_p",
    "expand_dims",
    "reduce_precision",
    "reshape",
    "squeeze",
}
# What is done to every element, of constants that optax makes of zeros.
_OF_EACH: dict[str, Callable[[Any, Any], Any]] = {
    "convert_element_type": lambda number, parameters: number.astype(parameters["new_dtype"]),
    "integer_pow": lambda number, parameters: number ** parameters["y"],
    "neg": lambda number, parameters: -number,
    "square": lambda number, parameters: number * number,
}
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
        """The outputs of an equation."""
        name = equation.primitive.name
        if not any(isinstance(value, _Marked) for value in values):
            repeated = _repeat(equation, values[0]) if name == "broadcast_in_dim" else None
            return _unmarked(equation, values) if repeated is None else [repeated]
        if name in _CALLS:
            return self.run(_jaxprs.called(equation), values)
        if name == "optimization_barrier":
            return list(values)
        if name == "cond":
            return self.branches(equation, values)
        if name == "while":
            return self.loop(equation, values)
        if name == "broadcast_in_dim" and not isinstance(values[0], _OfGradient):
            repeated = _repeat(equation, values[0])
            if repeated is not None:
                return [repeated]
        if name in _OF_EACH and isinstance(values[0], Repeated):
            (number,) = _unmarked(equation, [values[0].number])
            return [dataclasses.replace(values[0], number=number)]
        if any(isinstance(value, _OfGradient) for value in values):
            output = self.of_gradient(equation, values)
            if output is None:
                raise NotAMultipleError(_why_not(equation))
            return [output]
        depends = any(_depends(value) for value in values)
        if not depends:
            return _jaxprs.bind(equation, [_plain(value) for value in values])
        arrays = [
            jnp.asarray(_plain(value), variable.aval.dtype)
            for value, variable in zip(values, equation.invars, strict=True)
        ]
        # The program was traced without shard_map's marks, which the norms of a device have.
        outputs = _jaxprs.bind(equation, to_varying_like(arrays, arrays))
        return [Number(output) for output in outputs]

    def of_gradient(self, equation: Any, values: Sequence[Any]) -> Any:
        """The output of an equation with a value that comes from gradients; None if it has no name."""
        name, first = equation.primitive.name, values[0]
        if name in _SAME:
            return first
        if name == "neg":
            return dataclasses.replace(first, factor=-first.factor)
        if name in ("mul", "div"):
            return _product(name, *values)
        if name == "square" or (name == "integer_pow" and equation.params["y"] == 2):
            return _product("mul", first, first)
        if name in ("add", "sub", "add_any"):
            return _sum(first, values[1], -1 if name == "sub" else 1)
        if name == "reduce_sum" and equation.outvars[0].aval.shape == ():
            return self.norm(first, equation)
        if name == "dot_general" and _multiplies_elements(equation):
            return self.norm(_product("mul", *values), equation)
        if name == "select_n":
            return _select(values[0], values[1:])
        return None

    def norm(self, square: Any, equation: Any) -> Number | None:
        if not isinstance(square, Square):
            return None
        total = square.factor * self.squared_norms[square.leaf] * square.other
        return Number(total.astype(equation.outvars[0].aval.dtype))

    def branches(self, equation: Any, values: Sequence[Any]) -> list[Any]:
        """The outputs of a ``cond``; its branches cost next to nothing, so all are evaluated."""
        which, *operands = values
        outputs = [self.run(branch, operands) for branch in equation.params["branches"]]
        chosen = [_select(which, cases) for cases in zip(*outputs, strict=True)]
        if any(value is None for value in chosen):
            raise NotAMultipleError(_why_not(equation))
        return chosen

    def loop(self, equation: Any, values: Sequence[Any]) -> list[Any]:
        """The outputs of a ``while`` whose carry is computed from norms, like the norm's own."""
        parameters = equation.params
        first, count = parameters["cond_nconsts"], parameters["body_nconsts"]
        of_condition, of_body = values[:first], values[first : first + count]
        carry = [_plain(value) for value in values[first + count :]]
        if any(isinstance(value, _OfGradient) for value in carry):
            raise NotAMultipleError(_why_not(equation))

        def condition(carry: list[jax.Array]) -> Any:
            numbers = [Number(value) for value in carry]
            return _plain(self.run(parameters["cond_jaxpr"], [*of_condition, *numbers])[0])

        def body(carry: list[jax.Array]) -> list[jax.Array]:
            numbers = [Number(value) for value in carry]
            outputs = self.run(parameters["body_jaxpr"], [*of_body, *numbers])
            if any(isinstance(output, _OfGradient) for output in outputs):
                raise NotAMultipleError(_why_not(equation))
            arrays: list[jax.Array] = to_varying_like([*map(_plain, outputs)], carry)
            return arrays

        arrays = to_varying_like(carry, [*carry, *self.squared_norms])
        return [Number(value) for value in jax.lax.while_loop(condition, body, arrays)]


def _multiplies_elements(equation: Any) -> bool:
    """Whether a product sums what stands at the same place: not the trace of g g, for example."""
    (left, right), _ = equation.params["dimension_numbers"]
    return equation.outvars[0].aval.shape == () and tuple(left) == tuple(right)


def _unmarked(equation: Any, values: Sequence[Any]) -> list[Any]:
    """The outputs of an equation that has nothing to do with gradients."""
    of_each = _OF_EACH.get(equation.primitive.name)
    if of_each is not None and _is_known(values[0]):
        with np.errstate(all="ignore"):  # infinities are passed on
            return [of_each(_scalar(values[0]), equation.params)]
    return _jaxprs.bind(equation, values)


def _why_not(equation: Any) -> str:
    name = equation.primitive.name
    if name in ("mul", "div"):
        what = "gives every coordinate of the gradient a factor of its own"
    elif name in ("add", "sub", "add_any"):
        what = "adds something to the gradient (a moving average, parameters, noise)"
    elif name.startswith(("reduce_", "arg", "dot_general", "cum")):
        what = f"needs more of a gradient than its norm (`{name}`)"
    elif name == "while":
        what = "carries the gradient through a loop"
    elif name in ("select_n", "cond"):
        what = "chooses between the gradient and something else"
    else:
        what = f"applies `{name}` to the gradient"
    line = _jaxprs.source_line(equation)
    return f"{what}, at {line}" if line else what


def _product(name: str, left: Any, right: Any) -> _OfGradient | None:
    if isinstance(left, Multiple) and isinstance(right, Multiple):
        if name == "mul" and left.leaf == right.leaf:
            return Square(left.leaf, left.factor, right.factor)
        return None
    if name == "mul" and isinstance(right, _OfGradient):
        left, right = right, left
    number = _number(right)
    if not isinstance(left, _OfGradient) or number is None:
        return None
    number = number.astype(left.factor.dtype)
    factor = left.factor * number if name == "mul" else left.factor / number
    return dataclasses.replace(left, factor=factor)


def _sum(left: Any, right: Any, sign: int) -> _OfGradient | None:
    if _is_zero(right):
        right = dataclasses.replace(left, factor=jnp.zeros_like(left.factor))
    if _is_zero(left):
        left = dataclasses.replace(right, factor=jnp.zeros_like(right.factor))
    if type(left) is not type(right) or left.leaf != right.leaf:
        return None
    if isinstance(left, Square):
        total = left.factor * left.other + sign * right.factor * right.other
        return Square(left.leaf, total, jnp.ones_like(total))
    return Multiple(left.leaf, left.factor + sign * right.factor)


def _select(which: Any, cases: Sequence[Any]) -> Any:
    """The chosen case, if it is a multiple of one gradient in all of them, or none depends on one."""
    predicate = _number(which)
    if not any(isinstance(case, _OfGradient) for case in cases):
        arrays = [_plain(value) for value in (which, *cases)]
        chosen = jax.lax.select_n(*to_varying_like(arrays, arrays))
        return Number(chosen) if any(map(_depends, (which, *cases))) else chosen
    multiples = [case for case in cases if isinstance(case, Multiple)]
    leaves = {case.leaf for case in multiples}
    if (
        predicate is None
        or len(leaves) != 1
        or not all(isinstance(case, Multiple) or _is_zero(case) for case in cases)
    ):
        return None
    dtype = jnp.result_type(*(case.factor for case in multiples))
    factors = [
        case.factor.astype(dtype) if isinstance(case, Multiple) else jnp.zeros([], dtype)
        for case in cases
    ]
    scalars = [predicate, *factors]
    return Multiple(leaves.pop(), jax.lax.select_n(*to_varying_like(scalars, scalars)))


def _depends(value: Any) -> bool:
    """Whether a value depends on the norms of gradients."""
    return isinstance(value, Number) or (isinstance(value, Repeated) and value.depends)


def _plain(value: Any) -> Any:
    return value.array if isinstance(value, Number | Repeated) else value


def _is_zero(value: Any) -> bool:
    """Whether it is known while tracing that a value is zero everywhere."""
    if not isinstance(value, Repeated) or isinstance(value.number, jax.core.Tracer):
        return False
    return float(value.number) == 0


def _number(value: Any) -> jax.Array | None:
    """The scalar that a value is in each of its elements, if it is one."""
    if isinstance(value, Repeated):
        return value.number
    if isinstance(value, _OfGradient) or math.prod(jnp.shape(_plain(value))) != 1:
        return None
    number: jax.Array = _scalar(_plain(value))
    return number


def _is_known(value: Any) -> bool:
    """Whether a value is one plain number, known while tracing."""
    is_traced = isinstance(value, jax.core.Tracer)
    return not is_traced and jnp.shape(value) == () and not _is_key(value)


def _is_key(value: Any) -> bool:
    return bool(jnp.issubdtype(jnp.result_type(value), jax.dtypes.extended))


def _scalar(array: Any) -> Any:
    """The number in an array; what is known while tracing stays so, and no device computes it."""
    if isinstance(array, jax.core.Tracer):
        return jnp.reshape(array, ())
    return np.asarray(array, jnp.result_type(array)).reshape(())


def _repeat(equation: Any, value: Any) -> Repeated | None:
    array = _plain(value)
    if math.prod(jnp.shape(array)) != 1 or _is_key(array):
        return None
    number = value.number if isinstance(value, Repeated) else _scalar(array)
    return Repeated(number, equation.outvars[0].aval.shape, _depends(value))
