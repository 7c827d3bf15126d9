"""Boolean masks over the leaves of the parameters."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import numpy as np

Mask = Any  # a pytree of bools, or a prefix of one


def resolve_mask(
    name: str, mask: Mask | Callable[[chex.ArrayTree], Mask] | None, params: chex.ArrayTree
) -> Mask:
    """A bool per leaf of ``params``, from a mask, a prefix, a function, or None for all."""
    if callable(mask):
        mask = mask(params)
    if mask is None:
        return jax.tree.map(lambda _: True, params)

    def spread(flag, subtree):
        if not isinstance(flag, bool | np.bool_):
            raise TypeError(
                f"{name} must be a pytree of Python bools, got a leaf {flag!r}. Masks are part of the "
                "program, not of the data: build them outside of jit."
            )
        return jax.tree.map(lambda _: bool(flag), subtree)

    try:
        return jax.tree.map(spread, mask, params)
    except ValueError as error:
        raise ValueError(
            f"{name} does not match the parameters: it needs their tree structure "
            f"{jax.tree.structure(params)} or a prefix of it, got {jax.tree.structure(mask)}."
        ) from error


def keep_where(mask: Mask, tree: chex.ArrayTree) -> chex.ArrayTree:
    """The tree with zeros in the leaves where the mask is False."""
    return jax.tree.map(lambda keep, leaf: leaf if keep else jax.numpy.zeros_like(leaf), mask, tree)


def freeze_where_not(mask: Mask, tree: chex.ArrayTree) -> chex.ArrayTree:
    """The tree with the leaves where the mask is False made constant to differentiation."""
    return jax.tree.map(
        lambda keep, leaf: leaf if keep else jax.lax.stop_gradient(leaf), mask, tree
    )
