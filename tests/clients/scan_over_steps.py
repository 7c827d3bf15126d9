"""A whole epoch as one ``lax.scan`` over its batches."""

import jax
import jax.numpy as jnp
import optax

import optax_sam
from tests.clients import by_hand
from tests.clients.by_hand import RHO
from tests.problems import apply_mlp, examples, mlp_parameters

optimizer = optax.sgd(optax.linear_schedule(0.1, 0.0, 4), momentum=0.9)
batches = jax.tree.map(lambda *x: jnp.stack(x), *(examples(seed) for seed in range(4)))


def loss_of(params, batch):
    inputs, labels = batch
    logits = apply_mlp(params, inputs)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), logits


def with_library():
    tx = optax.chain(optax_sam.sam(rho=RHO), optimizer)

    def train_step(carry, batch):
        params, opt_state = carry
        (loss, _), grads = jax.value_and_grad(loss_of, has_aux=True)(params, batch)
        loss_fn = lambda params: loss_of(params, batch)  # noqa: E731
        updates, opt_state = tx.update(grads, opt_state, params, loss_fn=loss_fn)
        return (optax.apply_updates(params, updates), opt_state), loss

    @jax.jit
    def train_epoch(params, opt_state):
        return jax.lax.scan(train_step, (params, opt_state), batches)

    params = mlp_parameters()
    (params, _), losses = train_epoch(params, tx.init(params))
    return params, losses


def with_sam_by_hand():
    @jax.jit
    def step(params, opt_state, batch):
        (loss, _), grads = by_hand.sam(lambda params: loss_of(params, batch), params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    params, losses = mlp_parameters(), []
    opt_state = optimizer.init(params)
    for index in range(4):
        batch = jax.tree.map(lambda x, i=index: x[i], batches)
        params, opt_state, loss = step(params, opt_state, batch)
        losses.append(loss)
    return params, jnp.stack(losses)
