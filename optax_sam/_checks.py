"""Checks of arguments that are functions, trees, arrays or switches; each error says the remedy."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

# Larger arrays stay on their device unread.
_SMALL = 2**16


def check_callable(name: str, value: Any, remedy: str) -> Callable[..., Any]:
    """Returns ``value`` if it can be called, and raises with the remedy otherwise."""
    if not callable(value):
        raise TypeError(f"{name} must be callable, got {show(value)}. {remedy}")
    function: Callable[..., Any] = value
    return function


def call(
    name: str, function: Callable[..., Any], *args: Any, takes: str, remedy: str, **kwargs: Any
) -> Any:
    """Calls a function of the user; says what it must take if its signature is another one."""
    try:
        return function(*args, **kwargs)
    except TypeError as error:
        problem = _why_not_callable_with(function, args, kwargs)
        if not problem:
            raise
        raise TypeError(
            f"{name} must take {takes}, but {function!r} does not: {problem}. {remedy}"
        ) from error


def _why_not_callable_with(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str:
    """What a signature lacks or has too much; empty if it fits or cannot be read."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return ""
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        return str(error)
    return ""


def check_bool(name: str, value: Any) -> bool:
    """The Python bool that ``value`` is; raises unless it is one."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(f"{name} must be True or False, got {value!r}.")
    return bool(value)


def check_leaves(params: Any, name: str = "params") -> None:
    """Refuses parameters among which there are functions, strings and the like."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not hasattr(leaf, "dtype") and not isinstance(leaf, bool | int | float | complex):
            raise TypeError(
                f"{name}{jax.tree_util.keystr(path)} must be an array, got {leaf!r}. Pass the "
                "parameters only: eqx.filter(model, eqx.is_inexact_array) in Equinox, "
                "nnx.state(model, nnx.Param) in Flax nnx."
            )


def check_all_parameters(params: Any, owner: str, remedy: str) -> None:
    """Refuses parameters of which a wrapper hides some, where the loss needs all."""

    def is_hidden(leaf: Any) -> bool:
        return isinstance(leaf, optax.MaskedNode)

    leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_hidden)
    hidden = [jax.tree_util.keystr(path) for path, leaf in leaves if is_hidden(leaf)]
    if hidden:
        raise TypeError(
            f"{owner} evaluates the loss, which needs all parameters, but optax.masked or "
            f"optax.partition around it hides some of params: {', '.join(hidden)}. {remedy}"
        )


def check_parameters_given(params: Any, stage: str, call: str) -> None:
    """Refuses a call of a stage without parameters."""
    if params is None:
        raise ValueError(
            f"{stage} needs the parameters, but params is None: call {call}. If you did, a wrapper "
            "around this stage drops them, as optax.contrib.scale_by_galore does to its "
            "base_optimizer: leave that out."
        )


def check_like(name: str, tree: Any, reference: Any, *, of: str, remedy: str) -> None:
    """Raises unless a tree has the structure and the shapes of another one."""
    structure: Any = jax.tree.structure(tree)
    expected: Any = jax.tree.structure(reference)
    if structure != expected:
        raise ValueError(
            f"{name} must have the tree structure of {of}, {expected}, got {structure}. {remedy}"
        )
    leaves = jax.tree.leaves(tree)
    for (path, wanted), leaf in zip(
        jax.tree_util.tree_leaves_with_path(reference), leaves, strict=True
    ):
        if shape_of(leaf) != shape_of(wanted):
            place = jax.tree_util.keystr(path)
            raise ValueError(
                f"{name}{place} must have the shape {shape_of(wanted)} of {of}{place}, got "
                f"{shape_of(leaf)}. {remedy}"
            )


def check_state(state: Any, kind: type, owner: str) -> None:
    """Refuses the state of another optimizer."""
    if not isinstance(state, kind):
        raise TypeError(state_of_another(owner, state))


def state_of_another(owner: str, state: Any) -> str:
    """What is wrong with a state that another optimizer made."""
    return (
        f"the optimizer state does not belong to {owner}: it is {type(state).__name__}. Make it "
        "with tx.init(params) of the same tx; a state saved with another optimizer cannot be "
        "continued."
    )


def shape_of(value: Any) -> Any:
    """The shape of an array or a number; of anything else its type."""
    if hasattr(value, "shape"):
        return tuple(value.shape)
    return () if isinstance(value, bool | int | float | complex) else type(value).__name__


def show(value: Any) -> str:
    """A value for a message; of arrays only their types and shapes."""
    if isinstance(value, Iterator):  # JAX would warn that it does not look inside
        return repr(value)
    has_arrays = any(getattr(leaf, "shape", ()) for leaf in jax.tree.leaves(value))
    return str(kinds(value)) if has_arrays else repr(value)


def kinds(tree: Any) -> Any:
    """Types and shapes of the leaves, for messages: ``float32[8, 3]``."""

    def one(leaf: Any) -> str:
        if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
            return type(leaf).__name__
        return f"{leaf.dtype}{list(leaf.shape)}"

    return jax.tree.map(one, tree, is_leaf=lambda leaf: leaf is None)


def is_array_of(value: Any, kind: Any) -> bool:
    """Whether a value is an array whose dtype is of this kind, such as ``jnp.floating``."""
    return hasattr(value, "shape") and bool(jnp.issubdtype(value.dtype, kind))


def known_values(array: Any) -> np.ndarray[Any, Any] | None:
    """The values of an array that can be read without waiting for a device; None otherwise.

    A traced array has none, and a large one is not fetched.
    """
    if isinstance(array, np.ndarray):
        return array
    is_known = isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer)
    if not is_known or array.size > _SMALL or not array.is_fully_addressable:
        return None
    if not array.is_ready():
        return None
    return np.asarray(array)
