"""An objective computed microbatch by microbatch: value, gradients and logits in the memory of one."""

from typing import TYPE_CHECKING, Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero

from optax_sam import _axes, _batches, _tree
from optax_sam.convolutions import inside_control_flow
from optax_sam.independence import check_independence, warn_if_unproved

if TYPE_CHECKING:
    from optax_sam.objectives import Objective


def loss_and_aux(objective: "Objective", params: chex.ArrayTree) -> tuple[jax.Array, Any]:
    """The mean loss without the penalty, and the auxiliary output."""
    refuse_mixed_examples(objective, params)
    return _loss_and_aux(params, objective.replace(penalty=None))


def logits(objective: "Objective", params: chex.ArrayTree) -> chex.ArrayTree:
    """The logits of the whole batch."""

    def of_part(examples: Any) -> Any:
        return objective.with_examples(examples).logits_and_aux(params)[0]

    parts = jax.lax.map(inside_control_flow(of_part), _cut(objective))
    return jax.tree.map(_joined, parts)


def refuse_mixed_examples(objective: "Objective", params: chex.ArrayTree) -> None:
    """Refuses a network that mixes examples, which a microbatch would compute differently."""
    remedy = (
        "With microbatch_size the statistics would be those of a microbatch: use GroupNorm or "
        "LayerNorm, run BatchNorm with its stored statistics, or leave microbatch_size out."
    )
    warn_if_unproved("microbatch_size", check_independence(objective, params, remedy))


def _cut(objective: "Objective") -> Any:
    """The examples, cut into microbatches along a new leading axis."""
    assert objective.microbatch_size is not None
    return _batches.interleaved(
        objective.examples, objective.batch_size // objective.microbatch_size
    )


def _joined(parts: jax.Array) -> jax.Array:
    """Rows of microbatches, (count, m, ...), back in the order of the batch, (count * m, ...)."""
    return jnp.reshape(jnp.swapaxes(parts, 0, 1), (-1, *parts.shape[2:]))


@jax.custom_jvp
def _loss_and_aux(params: chex.ArrayTree, objective: "Objective") -> tuple[jax.Array, Any]:
    def of_part(part: "Objective") -> tuple[jax.Array, tuple[()], Any]:
        return *_split(part, part(params)), ()

    loss, aux, _ = _over_microbatches(of_part, params, objective)
    return loss, aux


def _loss_and_aux_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    """The tangent of the loss is the inner product with the accumulated gradient.

    It is linear in the tangents, so reverse mode transposes it; the gradient costs the memory of one
    microbatch in both modes. Differentiating the loop would keep what all microbatches need.
    """
    params, objective = primals
    directions = jax.tree.leaves(tangents[0], is_leaf=_is_zero)
    if not all(_is_zero(leaf) for leaf in jax.tree.leaves(tangents[1], is_leaf=_is_zero)):
        # Derivatives in the examples themselves: rare, and exact at the price of the batch's memory.
        def at_once(params: chex.ArrayTree, objective: "Objective") -> tuple[jax.Array, Any]:
            return _split(objective, objective.replace(microbatch_size=None)(params))

        instantiated = jax.tree.map(_instantiate, tangents, is_leaf=_is_zero)
        return jax.jvp(at_once, primals, instantiated)
    # Under shard_map the derivative in a replicated leaf is summed over the devices: once, when
    # the inner product below is transposed.
    leaves, treedef = jax.tree.flatten(_axes.to_varying_like(params, objective))
    active = [i for i, direction in enumerate(directions) if not _is_zero(direction)]

    def of_part(part: "Objective") -> tuple[jax.Array, Any, Any]:
        def loss(chosen: list[jax.Array]) -> tuple[jax.Array, Any]:
            merged = list(leaves)
            for index, leaf in zip(active, chosen, strict=True):
                merged[index] = leaf
            return _split(part, part(jax.tree.unflatten(treedef, merged)))

        (value, aux), gradients = jax.value_and_grad(loss, has_aux=True)(
            [leaves[index] for index in active]
        )
        return value, aux, gradients

    value, aux, gradients = _over_microbatches(of_part, params, objective)
    dtype = _tree.accumulation_dtype(gradients)
    products = [
        jnp.sum(gradient.astype(dtype) * directions[index].astype(dtype))
        for index, gradient in zip(active, gradients, strict=True)
    ]
    tangent = sum(products, jnp.zeros([], dtype)).astype(value.dtype)
    return (value, aux), (tangent, jax.tree.map(_zero_tangent, aux))


_loss_and_aux.defjvp(_loss_and_aux_jvp, symbolic_zeros=True)


def _split(objective: "Objective", output: Any) -> tuple[jax.Array, Any]:
    return output if objective.has_aux else (output, None)


def _is_zero(tangent: Any) -> bool:
    return isinstance(tangent, SymbolicZero)


def _instantiate(tangent: Any) -> Any:
    if not _is_zero(tangent):
        return tangent
    aval = tangent.aval
    if aval.dtype == jax.dtypes.float0:
        return np.zeros(aval.shape, jax.dtypes.float0)
    return jnp.zeros(aval.shape, aval.dtype)


def _zero_tangent(leaf: jax.Array) -> Any:
    if _tree.is_floating(leaf):
        return jnp.zeros_like(leaf)
    return np.zeros(jnp.shape(leaf), jax.dtypes.float0)


def _over_microbatches(of_part: Any, params: Any, objective: "Objective") -> tuple[Any, Any, Any]:
    """``(loss, aux, gradients)`` of the batch from those of its microbatches, one at a time."""
    examples = _cut(objective)
    count = len(jax.tree.leaves(examples)[0])
    parts_shares = _batches.shares(examples[2], count)

    def of_examples(examples: Any) -> Any:
        return of_part(objective.with_examples(examples))

    of_examples = inside_control_flow(of_examples)
    first = jax.tree.map(lambda leaf: leaf[0], examples)
    loss, aux, gradients = jax.eval_shape(of_examples, first)
    means = _AuxiliaryOutput(objective, params, aux, first)

    def wide_zeros(leaf: Any) -> jax.Array:
        return jnp.zeros(leaf.shape, _tree.accumulation_dtype(leaf))

    def step(totals: Any, part: Any) -> tuple[Any, Any]:
        examples, share = part
        loss, aux, gradients = jax.tree.map(jnp.asarray, of_examples(examples))  # numbers, too
        averaged, joined = means.separate(aux)
        new = (loss, averaged, gradients)
        totals = jax.tree.map(
            lambda total, x: total + share.astype(total.dtype) * x.astype(total.dtype), totals, new
        )
        return _axes.to_varying_like(totals, (params, examples)), joined

    averaged, _ = means.separate(aux)
    zeros = jax.tree.map(wide_zeros, (loss, averaged, gradients))
    zeros = _axes.to_varying_like(zeros, (params, examples))
    (total, averaged, summed), joined = jax.lax.scan(step, zeros, (examples, parts_shares))
    summed = jax.tree.map(lambda x, like: x.astype(like.dtype), summed, gradients)
    return total.astype(loss.dtype), means.merge(averaged, joined), summed


class _AuxiliaryOutput:
    """Which leaves of the auxiliary output are per example, and are joined; others are averaged."""

    def __init__(self, objective: "Objective", params: Any, aux: Any, examples: Any):
        self.leaves, self.treedef = jax.tree.flatten(aux)
        self.joined = [False] * len(self.leaves)
        if not self.leaves:
            return
        size = len(jax.tree.leaves(examples)[0])
        whole = jax.eval_shape(
            lambda: objective.replace(microbatch_size=None).logits_and_aux(params)[1]
        )
        for index, (leaf, of_batch) in enumerate(
            zip(self.leaves, jax.tree.leaves(whole), strict=True)
        ):
            if leaf.shape == of_batch.shape and _tree.is_floating(leaf):
                continue
            if leaf.shape[:1] != (size,) or of_batch.shape != (
                objective.batch_size,
                *leaf.shape[1:],
            ):
                raise ValueError(
                    f"auxiliary output of shape {leaf.shape} and dtype {leaf.dtype} cannot be put "
                    "together from microbatches: return one row per example, or a floating mean "
                    "over them."
                )
            self.joined[index] = True

    def separate(self, aux: Any) -> tuple[list[Any], list[Any]]:
        """``(averaged, joined)`` leaves."""
        pairs = list(zip(jax.tree.leaves(aux), self.joined, strict=True))
        return [x for x, joined in pairs if not joined], [x for x, joined in pairs if joined]

    def merge(self, averaged: list[Any], joined: list[Any]) -> Any:
        """The auxiliary output of the batch."""
        means, stacks = iter(averaged), iter(joined)
        leaves = [
            _joined(next(stacks)) if is_joined else next(means).astype(leaf.dtype)
            for leaf, is_joined in zip(self.leaves, self.joined, strict=True)
        ]
        return jax.tree.unflatten(self.treedef, leaves)
