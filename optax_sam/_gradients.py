"""Gradients as a method needs them: checked to be like the parameters."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_sam import _tree
from optax_sam._checks import check_like, is_array_of


def as_gradients(name: str, gradients: Any, params: Any) -> Any:
    """The gradients, with zeros for the leaves that have none; raises unless they are like params."""
    if isinstance(params, optax.LookaheadParams):
        raise TypeError(
            "params is optax.LookaheadParams, which holds two sets of parameters, and the loss needs "
            "one. Update the method by itself with params.fast, and pass its direction to "
            "optax.lookahead(optimizer, ...).update."
        )
    remedy = (
        "Per-example gradients (as differentially private training takes them) must be averaged "
        "first: a method needs one gradient of the whole batch."
    )
    expected: Any = jax.tree.structure(params)
    if jax.tree.structure(gradients) != expected:
        remedy = "Pass the gradients of the loss in these params."
        if isinstance(gradients, tuple) and len(gradients) == 2:
            remedy = "Did you pass (value, gradients)? Unpack jax.value_and_grad's result first."
    check_like(name, gradients, params, of="params", remedy=remedy)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        if is_array_of(leaf, jnp.complexfloating):
            raise TypeError(
                f"{name}{jax.tree_util.keystr(path)} must be real, got {leaf.dtype}. The loss must "
                "be real, and so are its gradients in real params."
            )
    return _tree.as_gradients(gradients, params)
