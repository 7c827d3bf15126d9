"""A learning rate per layer, and an exponential moving average of the parameters."""

import jax
import jax.numpy as jnp
import optax

import optax_sam
from tests.clients import by_hand
from tests.clients.by_hand import RHO
from tests.problems import apply_mlp, examples, mlp_parameters

STEPS = 3
layers = {"first": "body", "bias": "body", "second": "head"}
optimizer = optax.partition({"body": optax.sgd(0.01), "head": optax.adam(0.1)}, layers)
inputs, labels = examples()


def loss_of(params):
    logits = apply_mlp(params, inputs)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), logits


def with_library():
    tx = optax.chain(optax_sam.sam(rho=RHO), optimizer)

    @jax.jit
    def train_step(params, average, opt_state):
        (loss, _), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params, loss_fn=loss_of)
        params = optax.apply_updates(params, updates)
        return params, optax.incremental_update(params, average, 0.1), opt_state, loss

    return train(train_step, tx)


def with_sam_by_hand():
    @jax.jit
    def step(params, average, opt_state):
        (loss, _), grads = by_hand.sam(loss_of, params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        average = jax.tree.map(lambda new, old: 0.1 * new + 0.9 * old, params, average)
        return params, average, opt_state, loss

    return train(step, optimizer)


def train(train_step, tx):
    params, losses = mlp_parameters(), []
    average, opt_state = jax.tree.map(jnp.copy, params), tx.init(params)
    for _ in range(STEPS):
        params, average, opt_state, loss = train_step(params, average, opt_state)
        losses.append(loss)
    return params, average, losses
