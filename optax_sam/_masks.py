"""Boolean masks over the leaves of the parameters."""

from collections.abc import Callable, Iterator
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from optax_sam._checks import call, show

Mask = Any  # a pytree of bools, or a prefix of one
MaskOrFunction = Mask | Callable[[Any], Mask] | None


def resolve_mask(name: str, mask: MaskOrFunction, params: chex.ArrayTree) -> Mask:
    """A bool per leaf of ``params``, from a mask, a prefix, a function, or None for all."""
    if mask is None:
        return jax.tree.map(lambda _: True, params)
    if callable(mask) and jax.tree_util.treedef_is_leaf(jax.tree.structure(mask)):
        # A module is callable too, but it is a pytree.
        mask = call(
            name,
            mask,
            params,
            takes="the parameters and nothing else",
            remedy="For paths and leaves use jax.tree_util.tree_map_with_path inside it.",
        )
    if isinstance(mask, bool) and jax.tree_util.treedef_is_leaf(jax.tree.structure(params)):
        return mask  # of parameters that are one array
    if isinstance(mask, bool | np.bool_ | jax.Array | np.ndarray | str | Iterator):
        raise TypeError(
            f"{name} must be a pytree of Python bools like the parameters, got {mask!r}. To take "
            "all leaves leave it out. If you passed a function under optax.inject_hyperparams, it "
            "was taken for a schedule and called with the step: name it in "
            f"static_args=({name!r},)."
        )

    def spread(flag: Any, subtree: Any) -> Any:
        if not isinstance(flag, bool | np.bool_):
            raise TypeError(
                f"{name} must be a pytree of Python bools, got a leaf {show(flag)}. Masks are part "
                "of the program, not of the data: build them outside of jit, and under "
                f"optax.inject_hyperparams name them in static_args=({name!r},)."
            )
        return jax.tree.map(lambda _: bool(flag), subtree)

    try:
        return jax.tree.map(spread, mask, params)
    except ValueError as error:
        raise ValueError(
            f"{name} does not match the parameters: it needs their tree structure "
            f"{jax.tree.structure(params)} or a prefix of it, got {jax.tree.structure(mask)}."
        ) from error


def keep_where(mask: Mask, tree: Any) -> Any:
    """The tree with zeros in the leaves where the mask is False."""
    return jax.tree.map(lambda keep, leaf: leaf if keep else jnp.zeros_like(leaf), mask, tree)


def freeze_where_not(mask: Mask, tree: Any) -> Any:
    """The tree with the leaves where the mask is False made constant to differentiation."""
    return jax.tree.map(
        lambda keep, leaf: leaf if keep else jax.lax.stop_gradient(leaf), mask, tree
    )
