"""The clean gradient that every combination compares with."""

import contextlib
from typing import Any

import chex
import jax
import optax

from optax_sam._checks import check_like


def require_clean_gradients(
    clean_grads: chex.ArrayTree | None, updates: chex.ArrayTree, name: str
) -> chex.ArrayTree:
    """The clean gradient of the leaves that a combination sees; says what is missing otherwise.

    Under ``optax.masked`` and ``optax.partition`` a combination sees some leaves only.
    """
    if clean_grads is None:
        raise ValueError(
            f"{name} compares with the gradient at the unperturbed parameters, but clean_grads is "
            "None: pass clean_grads=, or use it as combination= of optax_sam.sharpness_aware, which "
            "does. If it is one, a wrapper around it drops extra arguments: leave that out."
        )
    remedy = (
        f"{name} compares the two, so they must be gradients of the same parameters. A wrapper "
        "around it, such as optax.flatten, changes the updates only: leave it out."
    )

    def is_hidden(leaf: Any) -> bool:
        return isinstance(leaf, optax.MaskedNode)

    seen = clean_grads
    with contextlib.suppress(ValueError):
        seen = jax.tree.map(
            lambda update, clean: update if is_hidden(update) else clean,
            updates,
            clean_grads,
            is_leaf=is_hidden,
        )
    check_like("clean_grads", seen, updates, of="updates", remedy=remedy)
    return seen
