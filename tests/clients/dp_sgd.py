"""Differential privacy: an example's perturbation may depend on that example only (1-SAM)."""

import jax
import jax.numpy as jnp
import optax

import optax_sam
from tests.clients import by_hand
from tests.clients.by_hand import RHO
from tests.problems import apply_mlp, examples, mlp_parameters

STEPS = 3
inputs, labels = examples(batch_size=4)
optimizer = optax.chain(
    optax.contrib.differentially_private_aggregate(l2_norm_clip=0.5, noise_multiplier=0.1, key=0),
    optax.sgd(0.1),
)


def loss_of(params, x, y):
    logits = apply_mlp(params, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y), logits


def with_library():
    method = optax_sam.sam(rho=RHO)

    @jax.jit
    def train_step(params, opt_state):
        def gradient(x, y):
            (loss, _), grads = jax.value_and_grad(loss_of, has_aux=True)(params, x, y)
            loss_fn = lambda params: loss_of(params, x, y)  # noqa: E731
            return loss, method.update(grads, method.init(params), params, loss_fn=loss_fn)[0]

        losses, grads = jax.vmap(gradient)(inputs, labels)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, losses

    return train(train_step)


def with_sam_by_hand():
    """Example after example, each gradient clipped by hand; the same noise."""

    @jax.jit
    def step(params, opt_state):
        gradients, losses = [], []
        for x, y in zip(inputs, labels, strict=True):
            (loss, _), grads = by_hand.sam(lambda w, x=x, y=y: loss_of(w, x, y), params)
            gradients.append(grads)
            losses.append(loss)
        stacked = jax.tree.map(lambda *g: jnp.stack(g), *gradients)
        updates, opt_state = optimizer.update(stacked, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, jnp.stack(losses)

    return train(step)


def train(train_step):
    params, records = mlp_parameters(), []
    opt_state = optimizer.init(params)
    for _ in range(STEPS):
        params, opt_state, losses = train_step(params, opt_state)
        records.append(losses)
    return params, records
