"""Sharpness-aware gradients per example or group, slow and obvious: each by itself under vmap."""

import jax
import jax.numpy as jnp


def per_example_gradient(objective, params, rho, *, evaluation="full", group_size=1, mask=None):
    """``(loss, perturbed loss, gradients, clean gradients)``, each a mean over the groups."""
    if mask is None:
        mask = jax.tree.map(lambda _: True, params)
    plain = objective.replace(microbatch_size=None, loss_scale=None)
    grouped = plain.groups(group_size)

    def one(inputs, labels, weights):
        group = plain.replace(inputs=inputs, labels=labels, weights=weights)

        def loss_at(params):
            return group.loss_from_logits(group.logits(params))

        loss, clean = jax.value_and_grad(loss_at, allow_int=True)(params)
        clean = _without_float0(clean, params)
        climbed = jax.tree.map(lambda keep, g: g if keep else jnp.zeros_like(g), mask, clean)
        norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(climbed)))
        scale = jnp.where(norm > 0, rho / jnp.where(norm > 0, norm, 1), 0)
        perturbed = jax.tree.map(lambda p, g: (p + scale * g).astype(p.dtype), params, climbed)
        if evaluation == "full":
            perturbed_loss, gradients = jax.value_and_grad(loss_at, allow_int=True)(perturbed)
            return loss, perturbed_loss, _without_float0(gradients, params), clean
        terms_at, jacobian_at = {
            "jacobian_only": (params, perturbed),
            "logit_only": (perturbed, params),
        }[evaluation]
        term = jax.grad(group.loss_from_logits)(group.logits(terms_at))

        def contracted(params):
            logits = group.logits(params)
            products = jax.tree.map(lambda t, z: jnp.sum(t * z), term, logits)
            return sum(jax.tree.leaves(products))

        gradients = jax.grad(contracted, allow_int=True)(jacobian_at)
        return loss, loss_at(perturbed), _without_float0(gradients, params), clean

    results = jax.vmap(one)(grouped.inputs, grouped.labels, grouped.weights)
    if objective.weights is None:
        return jax.tree.map(lambda value: jnp.mean(value, axis=0), results)
    totals = objective.weights.reshape(objective.batch_size // group_size, -1).sum(axis=1)
    shares = totals / totals.sum()
    return jax.tree.map(lambda value: jnp.tensordot(shares, value, 1), results)


def _without_float0(gradients, params):
    return jax.tree.map(
        lambda g, p: jnp.zeros(p.shape) if g.dtype == jax.dtypes.float0 else g, gradients, params
    )
