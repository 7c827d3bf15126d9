"""Evaluating traced programs with another meaning for some of their equations.

What depends on how JAX builds a traced program, which has drifted between versions 0.10 and 0.12, is
in this file. The names of single primitives are also in the rules that handle them, in
``convolutions`` and ``per_example``. Nothing here imports a private module.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core, source_info_util
from jax.interpreters import partial_eval

# Primitives that run a program inside as it is. JAX has renamed them: only one name of each is current.
CALLS = frozenset({"jit", "pjit", "closed_call", "core_call"})
REMATERIALIZATION = frozenset({"checkpoint", "remat", "remat2"})
CUSTOM_DERIVATIVES = frozenset({"custom_jvp_call", "custom_vjp_call"})

Rule = Callable[[Any, list[Any]], Sequence[Any]]  # of an equation and its inputs


class CannotFollowError(Exception):
    """A traced program has a form that is not known here; says which."""


def open_and_constants(jaxpr: Any) -> tuple[core.Jaxpr, Sequence[Any]]:
    """A jaxpr, closed or not, as its equations and the values of its constants.

    JAX 0.12 has one class for both; 0.10 has two, and ``remat`` holds the open one.
    """
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def bind(equation: core.JaxprEqn, values: Sequence[Any]) -> list[Any]:
    """The outputs of an equation for other inputs, as ``jax.core.eval_jaxpr`` computes them."""
    primitive: Any = equation.primitive
    parameters = primitive.get_bind_params(equation.params)
    context = getattr(equation, "ctx", None)  # e.g. the 32/64-bit mode it was traced in
    with context.manager if context is not None else contextlib.nullcontext():
        outputs = primitive.bind(*values, **parameters)
    return list(outputs) if primitive.multiple_results else [outputs]


def evaluate(
    jaxpr: Any,
    arguments: Sequence[Any],
    rule: Rule = bind,
    constants: Sequence[Any] | None = None,
) -> list[Any]:
    """Runs a jaxpr, asking ``rule(equation, values)`` for the outputs of every equation.

    The values may be of any kind that the rule understands. ``constants`` replaces the jaxpr's own.
    """
    program, own = open_and_constants(jaxpr)
    constants = own if constants is None else constants
    variables = [*program.constvars, *program.invars]
    environment = dict(zip(variables, [*constants, *arguments], strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else environment[atom]

    for equation in program.eqns:
        outputs = rule(equation, [read(atom) for atom in equation.invars])
        environment.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in program.outvars]


def without_dead_code(jaxpr: Any) -> Any:
    """The same program without the equations that no output needs."""
    program, constants = open_and_constants(jaxpr)
    live, _ = partial_eval.dce_jaxpr(program, [True] * len(program.outvars), instantiate=True)
    return core.ClosedJaxpr(live, constants)


def depends_on_inputs(jaxpr: Any, count: int) -> bool:
    """Whether any output depends on any of the last ``count`` inputs."""
    program, _ = open_and_constants(jaxpr)
    _, used = partial_eval.dce_jaxpr(program, [True] * len(program.outvars), instantiate=False)
    return any(used[len(used) - count :])


def with_rule(jaxpr: Any, rule: Rule) -> Any:
    """A jaxpr of the same signature in which ``rule`` has rewritten the equations."""
    program, _ = open_and_constants(jaxpr)
    closed = jax.make_jaxpr(lambda *arguments: evaluate(jaxpr, arguments, rule))(
        *(variable.aval for variable in program.invars)
    )
    if isinstance(jaxpr, core.ClosedJaxpr):
        return closed
    return open_and_constants(closed)[0]


def parameter(equation: core.JaxprEqn, name: str) -> Any:
    """A parameter of an equation, by the name it has in the known versions of JAX."""
    if name not in equation.params:
        raise CannotFollowError(
            f"JAX {jax.__version__} writes `{equation.primitive.name}` in a form that is not known: "
            f"without {name!r}"
        )
    return equation.params[name]


def scan_split(equation: core.JaxprEqn) -> tuple[int, int]:
    """The number of constants and of carried values among the inputs of a ``scan``."""
    if "num_consts" in equation.params:
        return parameter(equation, "num_consts"), parameter(equation, "num_carry")
    # JAX 0.12 keeps three flat trees: constants, carry, scanned.
    constants, carry, _ = parameter(equation, "ft_in").unpack()
    return len(constants), len(carry)


def called(equation: core.JaxprEqn) -> Any:
    """The program that a call runs."""
    found = inner_jaxprs(equation)
    if len(found) != 1:
        name = equation.primitive.name
        raise CannotFollowError(f"`{name}` holds {len(found)} programs, where a call has one")
    return found[0][1]


def inner_jaxprs(equation: core.JaxprEqn) -> list[tuple[str, Any]]:
    """``(parameter name, jaxpr)`` for the programs inside an equation; branches come one by one."""
    found = []
    for name, value in equation.params.items():
        for candidate in value if isinstance(value, tuple) else (value,):
            if isinstance(candidate, core.Jaxpr | core.ClosedJaxpr):
                found.append((name, candidate))
    return found


def rematerializes(jaxpr: Any) -> bool:
    """Whether anything in a program, at any depth, is computed again in its backward pass."""
    program, _ = open_and_constants(jaxpr)
    return any(
        equation.primitive.name in REMATERIALIZATION
        or any(rematerializes(inner) for _, inner in inner_jaxprs(equation))
        for equation in program.eqns
    )


def source_line(equation: core.JaxprEqn) -> str:
    """Where the user's program made an equation: ``file:line (function)``; empty if JAX did."""
    return source_info_util.summarize(equation.source_info)


def name_and_line(equation: core.JaxprEqn) -> str:
    """An equation for a message: its primitive, and where it was made if that is known."""
    line = source_line(equation)
    return f"`{equation.primitive.name}`" + (f" at {line}" if line else "")
