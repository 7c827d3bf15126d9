"""Compiles what has a function of the user as its first argument."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from optax_sam._checks import check_callable
from optax_sam.evaluations import is_traced
from optax_sam.objectives import is_pytree


def compiled_for_loss(function: Callable[..., Any], *static: str) -> Callable[..., Any]:
    """``jit`` of ``function(loss_fn, *arrays, **static)``, with the loss as :func:`bind` has it.

    Inside a caller's ``jit`` a second boundary would buy nothing.
    """
    compiled = jax.jit(function, static_argnames=static)

    @functools.wraps(function)
    def call(loss_fn: Any, *arrays: Any, **options: Any) -> Any:
        check_callable("loss_fn", loss_fn, "Pass the loss as a function of the parameters.")
        if is_traced((loss_fn, arrays)):
            return function(loss_fn, *arrays, **options)
        return bind(compiled, loss_fn, **options)(*arrays)

    return call


def bind(compiled: Any, user_function: Callable[..., Any], **static: Any) -> Callable[..., Any]:
    """A function under ``jit`` with its first argument, which is a function, and its static ones.

    A pytree (``Objective``, ``Partial``) is an argument of one compiled program. Any other function is
    compiled anew, as what it closes over may have changed since the last time; nothing is kept of it.
    """
    if is_pytree(user_function):
        return functools.partial(compiled, user_function, **static)
    return jax.jit(functools.partial(compiled.__wrapped__, user_function, **static))
