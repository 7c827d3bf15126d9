"""The tree algebra of the package, written once.

Only inexact (floating) leaves take part: integer leaves, ``float0`` gradients and
``None`` pass through every function untouched or count as nothing.
"""

import math
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp


def is_floating(leaf: Any) -> bool:
    """Whether a leaf is a real floating array, the only kind that can be perturbed."""
    return jnp.issubdtype(jnp.result_type(leaf), jnp.floating)


def floating_leaves(tree: chex.ArrayTree) -> list[jax.Array]:
    """The floating leaves of a tree, in order."""
    return [leaf for leaf in jax.tree.leaves(tree) if is_floating(leaf)]


def size(tree: chex.ArrayTree) -> int:
    """The number of floating coordinates of a tree."""
    return sum(math.prod(jnp.shape(leaf)) for leaf in floating_leaves(tree))


def accumulation_dtype(tree: chex.ArrayTree) -> jnp.dtype:
    """At least float32, and float64 as soon as one leaf is float64.

    Half-precision leaves would overflow (float16) or lose bits (bfloat16) when squared.
    """
    wide = any(jnp.result_type(leaf) == jnp.float64 for leaf in floating_leaves(tree))
    dtype: jnp.dtype = jnp.dtype(jnp.float64 if wide else jnp.float32)
    return dtype


def dot(left: chex.ArrayTree, right: chex.ArrayTree, factor: jax.Array | None = None) -> jax.Array:
    """The inner product over all floating leaves, accumulated in at least float32.

    ``factor`` multiplies ``right`` before the products, which could overflow or vanish without it.
    """
    dtype = accumulation_dtype(left)
    products = []
    for a, b in zip(floating_leaves(left), floating_leaves(right), strict=True):
        b = b.astype(dtype) if factor is None else b.astype(dtype) * factor
        products.append(jnp.sum(a.astype(dtype) * b))
    return sum(products, jnp.zeros([], dtype))


def divide_or_zero(numerator: jax.Array, denominator: jax.Array) -> jax.Array:
    """``numerator / denominator``, and 0 where the denominator is 0 or subnormal; NaN is passed on."""
    zero = is_zero(denominator)
    return jnp.where(zero, 0, numerator / jnp.where(zero, 1, denominator))


def is_zero(number: jax.Array) -> jax.Array:
    """Whether it is 0 or subnormal.

    A quotient by a subnormal number may be infinite. CPUs take it for 0 by themselves, GPUs do not.
    """
    smallest = jnp.finfo(number.dtype).tiny  # type: ignore[no-untyped-call]
    return jnp.less(jnp.abs(number), smallest)


def scale(tree: chex.ArrayTree, factor: jax.Array) -> chex.ArrayTree:
    """``factor * tree``, multiplied in the factor's dtype and kept in each leaf's dtype."""
    return map_floating(lambda leaf: leaf.astype(factor.dtype) * factor, tree)


def map_floating(
    function: Callable[..., jax.Array], tree: chex.ArrayTree, *rest: chex.ArrayTree
) -> chex.ArrayTree:
    """Like ``jax.tree.map`` on the floating leaves; keeps the dtype and leaves the others alone."""

    def one(leaf: Any, *others: Any) -> Any:
        if not is_floating(leaf):
            return leaf
        return function(leaf, *others).astype(jnp.result_type(leaf))

    return jax.tree.map(one, tree, *rest)


def add(params: chex.ArrayTree, perturbation: chex.ArrayTree) -> chex.ArrayTree:
    """``params + perturbation`` in the dtype of the parameters."""
    return map_floating(lambda p, e: p + e.astype(p.dtype), params, perturbation)


def linear(
    left_factor: jax.Array, left: chex.ArrayTree, right_factor: jax.Array, right: chex.ArrayTree
) -> chex.ArrayTree:
    """``left_factor * left + right_factor * right`` in each left leaf's dtype."""
    dtype = left_factor.dtype
    return map_floating(
        lambda a, b: left_factor * a.astype(dtype) + right_factor.astype(dtype) * b.astype(dtype),
        left,
        right,
    )


def as_arrays(tree: chex.ArrayTree) -> chex.ArrayTree:
    """The tree with arrays in place of Python floats."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf) if isinstance(leaf, float) else leaf, tree)


def as_gradients(gradients: chex.ArrayTree, params: chex.ArrayTree) -> chex.ArrayTree:
    """Gradients that an optimizer can take: zeros for the leaves that have none.

    Differentiation gives ``float0`` for integer leaves, with which nothing can be computed.
    """

    def one(gradient: Any, param: Any) -> jax.Array:
        dtype = jnp.result_type(param)
        # Not zeros_like: under shard_map that would inherit the mark of a varying parameter.
        return (
            jnp.asarray(gradient).astype(dtype)
            if is_floating(param)
            else jnp.zeros(jnp.shape(param), dtype)
        )

    return jax.tree.map(one, gradients, params)


def as_floating(tree: chex.ArrayTree, like: chex.ArrayTree) -> chex.ArrayTree:
    """The tree with integers as floating numbers where ``like`` has them."""

    def one(leaf: Any, like: Any) -> Any:
        if is_floating(leaf) or not is_floating(like):
            return leaf
        return jnp.asarray(leaf, jnp.result_type(like))

    return jax.tree.map(one, tree, like)


def keep_integers(
    tree: chex.ArrayTree, before: chex.ArrayTree, like: chex.ArrayTree
) -> chex.ArrayTree:
    """The tree with integers where ``before`` has them, in all parts that are built like ``like``.

    A moment of an integer leaf, of optax.trace for example, is an integer in the first state and a
    floating number after the first step.
    """
    structures: list[Any] = [jax.tree.structure(part) for part in (tree, before, like)]

    def is_alike(part: Any) -> bool:
        return bool(jax.tree.structure(part) == structures[2])

    def one(leaf: Any, before: Any, like: Any) -> Any:
        is_moment = is_floating(leaf) and not is_floating(like)
        return leaf.astype(jnp.result_type(before)) if is_moment else leaf

    if structures[0] != structures[1] or all(map(is_floating, jax.tree.leaves(like))):
        return tree
    return jax.tree.map(
        lambda part, before: jax.tree.map(one, part, before, like) if is_alike(part) else part,
        tree,
        before,
        is_leaf=is_alike,
    )


def zeros_like(tree: chex.ArrayTree) -> chex.ArrayTree:
    """Fresh zeros: never an alias of the tree's buffers."""
    return jax.tree.map(jnp.zeros_like, tree)
