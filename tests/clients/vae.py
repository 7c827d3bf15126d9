"""A variational autoencoder: no labels, and a random key in the loss."""

import jax
import jax.numpy as jnp
import optax

import optax_sam
from tests.clients import by_hand
from tests.clients.by_hand import RHO
from tests.problems import examples

STEPS = 3
optimizer = optax.adam(1e-2)
inputs, _ = examples()


def loss_of(params, key):
    """The negative evidence lower bound, and its two parts."""
    mean, log_variance = jnp.split(jnp.tanh(inputs @ params["encoder"]), 2, axis=-1)
    latent = mean + jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)
    reconstruction = optax.squared_error(latent @ params["decoder"], inputs).sum(-1).mean()
    divergence = 0.5 * (jnp.exp(log_variance) + mean**2 - 1 - log_variance).sum(-1).mean()
    return reconstruction + divergence, (reconstruction, divergence)


def with_library():
    tx = optax.chain(optax_sam.sam(rho=RHO), optimizer)

    @jax.jit
    def train_step(params, opt_state, key):
        def loss_fn(params):
            return loss_of(params, key)

        (loss, parts), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params, loss_fn=loss_fn)
        return optax.apply_updates(params, updates), opt_state, (loss, parts)

    return train(train_step, tx)


def with_sam_by_hand():
    @jax.jit
    def step(params, opt_state, key):
        value, grads = by_hand.sam(lambda params: loss_of(params, key), params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    return train(step, optimizer)


def train(train_step, tx):
    keys = jax.random.split(jax.random.key(0), 2 + STEPS)
    params = {
        "encoder": 0.5 * jax.random.normal(keys[0], (4, 4)),
        "decoder": jax.random.normal(keys[1], (2, 4)),
    }
    opt_state, records = tx.init(params), []
    for key in keys[2:]:
        params, opt_state, record = train_step(params, opt_state, key)
        records.append(record)
    return params, records
