"""The network, traced once on a single example."""

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp

from optax_sam import _jaxprs
from optax_sam.objectives import Objective


@dataclasses.dataclass(frozen=True)
class Trace:
    """One example's logits as a jaxpr of (parameter leaves, leaves of the example).

    Attributes:
      objective: what was traced.
      jaxpr: the program, without dead code.
      paths: name of each parameter leaf.
      treedef: structure of the parameters.
      logits_treedef: structure of the logits.
    """

    objective: Objective
    jaxpr: Any
    paths: tuple[str, ...]
    treedef: Any
    logits_treedef: Any

    @functools.cached_property
    def examples(self) -> chex.ArrayTree:
        """``(inputs, labels)`` cut into batches of one example, shapes (B, 1, ...)."""
        return split(self.objective)

    def logits(self, outputs: list[jax.Array]) -> chex.ArrayTree:
        """The logits, from the outputs of the program."""
        return jax.tree.unflatten(self.logits_treedef, outputs)

    def loss(self, logits: chex.ArrayTree, example: chex.ArrayTree) -> jax.Array:
        """The loss of one example, given its logits."""
        return on_example(self.objective, example).loss_from_logits(logits)

    def logit_term(self, logits: chex.ArrayTree, example: chex.ArrayTree) -> chex.ArrayTree:
        """The derivative of one example's loss in its logits."""
        return on_example(self.objective, example).logit_gradient(logits)


def trace(objective: Objective, params: chex.ArrayTree) -> Trace:
    """Traces the logits of one example. Arrays that ``apply_fn`` closes over become constants."""
    with_paths, treedef = jax.tree_util.tree_flatten_with_path(params)
    leaves = [leaf for _, leaf in with_paths]

    def logits(leaves, example):
        return on_example(objective, example).logits(jax.tree.unflatten(treedef, leaves))

    jaxpr, shape = jax.make_jaxpr(logits, return_shape=True)(leaves, first_example(objective))
    return Trace(
        objective=objective,
        jaxpr=_jaxprs.without_dead_code(jaxpr),
        paths=tuple(jax.tree_util.keystr(path) for path, _ in with_paths),
        treedef=treedef,
        logits_treedef=jax.tree.structure(shape),
    )


def split(objective: Objective) -> chex.ArrayTree:
    """``(inputs, labels)`` with one more leading axis, the examples: shapes (B, 1, ...)."""
    arrays = jax.tree.map(jnp.asarray, (objective.inputs, objective.labels))
    single = objective.replace(inputs=arrays[0], labels=arrays[1]).groups(1)
    return single.inputs, single.labels


def first_example(objective: Objective) -> chex.ArrayTree:
    """``(inputs, labels)`` of a batch of one; tracing needs its type, with all that belongs to it."""
    return jax.tree.map(lambda leaf: leaf[0], split(objective))


def on_example(objective: Objective, example: chex.ArrayTree) -> Objective:
    """The objective of a batch of one example."""
    inputs, labels = example
    return objective.replace(inputs=inputs, labels=labels)
