"""Compiles instruments whose first argument is a loss function."""

import functools
from collections.abc import Callable
from typing import Any

import jax

from optax_sam._checks import check_callable
from optax_sam.evaluations import is_traced
from optax_sam.objectives import is_pytree


def compiled_for_loss(function: Callable[..., Any], *static: str) -> Callable[..., Any]:
    """``jit`` of ``function(loss_fn, *arrays, **static)``.

    A loss that is a pytree (``Objective``, ``Partial``) is an argument, any other a part of the key.
    Inside a caller's ``jit`` a second boundary would buy nothing.
    """
    with_argument = jax.jit(function, static_argnames=static)
    with_static = jax.jit(function, static_argnums=0, static_argnames=static)

    @functools.wraps(function)
    def call(loss_fn: Any, *arrays: Any, **options: Any) -> Any:
        check_callable("loss_fn", loss_fn, "Pass the loss as a function of the parameters.")
        if is_traced((loss_fn, arrays)):
            return function(loss_fn, *arrays, **options)
        compiled = with_argument if is_pytree(loss_fn) else with_static
        return compiled(loss_fn, *arrays, **options)

    return call
