"""The network, traced once on a single group of examples: on one example, for 1-SAM."""

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp

from optax_sam import _batches, _jaxprs
from optax_sam.objectives import Objective, gathered


@dataclasses.dataclass(frozen=True)
class Trace:
    """One group's logits as a jaxpr of (parameter leaves, leaves of the group).

    Attributes:
      objective: the batch.
      group_size: m, the number of examples that share a perturbation.
      jaxpr: the program, without dead code.
      paths: name of each parameter leaf.
      treedef: structure of the parameters.
      logits_treedef: structure of the logits.
    """

    objective: Objective
    group_size: int
    jaxpr: Any
    paths: tuple[str, ...]
    treedef: Any
    logits_treedef: Any

    @property
    def count(self) -> int:
        """B / m, the number of groups."""
        return self.objective.batch_size // self.group_size

    @functools.cached_property
    def groups(self) -> Any:
        """``(inputs, labels, weights)`` cut into groups, shapes (B / m, m, ...)."""
        return _split(self.objective, self.group_size)

    @property
    def shares(self) -> jax.Array:
        """What each group counts in the mean over the batch."""
        return _batches.shares(self.groups[2], self.count)

    @property
    def first_group(self) -> Any:
        """The arrays of one group; tracing needs its type, with all that belongs to it."""
        return _first(self.groups)

    def logits(self, outputs: list[jax.Array]) -> chex.ArrayTree:
        """The logits, from the outputs of the program."""
        return jax.tree.unflatten(self.logits_treedef, outputs)

    @property
    def loss_scale(self) -> chex.Numeric:
        """What losses and derivatives are multiplied with on their way; 1 without loss scaling."""
        return 1.0 if self.objective.loss_scale is None else self.objective.loss_scale

    def loss(self, logits: chex.ArrayTree, group: Any) -> jax.Array:
        """The scaled mean loss of one group, given its logits."""
        loss = self.objective.with_examples(group).loss_from_logits(logits)
        return loss if self.objective.loss_scale is None else loss * self.loss_scale


def trace(objective: Objective, params: chex.ArrayTree, group_size: int = 1) -> Trace:
    """Traces the logits of one group. Arrays that ``apply_fn`` closes over become constants."""
    objective = gathered(objective)
    with_paths, treedef = jax.tree_util.tree_flatten_with_path(params)
    leaves = [leaf for _, leaf in with_paths]

    def logits(leaves: list[jax.Array], group: Any) -> chex.ArrayTree:
        group_of = objective.with_examples(group)
        return group_of.logits_and_aux(jax.tree.unflatten(treedef, leaves))[0]

    first_group = _first(_split(objective, group_size))
    jaxpr, shape = jax.make_jaxpr(logits, return_shape=True)(leaves, first_group)
    return Trace(
        objective=objective,
        group_size=group_size,
        jaxpr=_jaxprs.without_dead_code(jaxpr),
        paths=tuple(jax.tree_util.keystr(path) for path, _ in with_paths),
        treedef=treedef,
        logits_treedef=jax.tree.structure(shape),
    )


def _split(objective: Objective, group_size: int) -> Any:
    """The examples with one more leading axis, the groups: shapes (B / m, m, ...)."""
    arrays = jax.tree.map(jnp.asarray, objective.examples)
    return objective.with_examples(arrays).groups(group_size).examples


def _first(groups: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[0], groups)
