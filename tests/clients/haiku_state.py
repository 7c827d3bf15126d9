"""Haiku with state: batch normalization and dropout in a transformed function."""

import haiku as hk
import jax
import optax

import optax_sam
from tests.clients import by_hand
from tests.clients.by_hand import RHO
from tests.problems import examples

STEPS = 3
inputs, labels = examples()
optimizer = optax.adam(1e-2)


@hk.transform_with_state
def network(x):
    x = hk.BatchNorm(True, True, 0.9)(hk.Linear(16, with_bias=False)(x), is_training=True)
    x = hk.dropout(hk.next_rng_key(), 0.3, jax.nn.relu(x))
    return hk.Linear(3)(x)


def loss_fn(params, state, key, x, y):
    logits, state = network.apply(params, state, key, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), state


def with_library():
    tx = optax.chain(optax_sam.sam(rho=RHO), optimizer)

    @jax.jit
    def update(params, state, opt_state, key, x, y):
        gradient = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, new_state), grads = gradient(params, state, key, x, y)
        loss_of_params = lambda params: loss_fn(params, state, key, x, y)  # noqa: E731
        updates, opt_state = tx.update(grads, opt_state, params, loss_fn=loss_of_params)
        return optax.apply_updates(params, updates), new_state, opt_state, loss

    return train(update, tx)


def with_sam_by_hand():
    @jax.jit
    def update(params, state, opt_state, key, x, y):
        loss_of_params = lambda params: loss_fn(params, state, key, x, y)  # noqa: E731
        (loss, new_state), grads = by_hand.sam(loss_of_params, params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), new_state, opt_state, loss

    return train(update, optimizer)


def train(update, tx):
    params, state = jax.jit(network.init)(jax.random.key(0), inputs)
    opt_state, losses = tx.init(params), []
    for step in range(STEPS):
        key = jax.random.fold_in(jax.random.key(1), step)
        params, state, opt_state, loss = update(params, state, opt_state, key, inputs, labels)
        losses.append(loss)
    return params, state, losses
