"""Equinox with batch normalization, a key per example, and leaves that are no parameters."""

import equinox as eqx
import jax
import optax

import optax_sam.equinox
from tests.clients.by_hand import RHO
from tests.problems import examples

STEPS = 3
inputs, labels = examples()
optimizer = optax.adam(1e-2)


class Network(eqx.Module):
    layers: list
    norm: eqx.nn.BatchNorm

    def __init__(self, key):
        keys = jax.random.split(key)
        hidden, head = (
            eqx.nn.Linear(4, 16, use_bias=False, key=keys[0]),
            eqx.nn.Linear(16, 3, key=keys[1]),
        )
        self.layers = [hidden, jax.nn.relu, eqx.nn.Dropout(0.3), head]
        self.norm = eqx.nn.BatchNorm(16, axis_name="batch", mode="batch")

    def __call__(self, x, key, state):
        hidden, activation, dropout, head = self.layers
        x, state = self.norm(hidden(x), state)
        return head(dropout(activation(x), key=key)), state


def loss_fn(model, state, x, y, key):
    batched = jax.vmap(model, axis_name="batch", in_axes=(0, 0, None), out_axes=(0, None))
    logits, state = batched(x, jax.random.split(key, len(x)), state)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean(), state


value_and_grad = eqx.filter_value_and_grad(loss_fn, has_aux=True)


def with_library():
    tx = optax.chain(optax_sam.sam(rho=RHO), optimizer)

    @eqx.filter_jit
    def make_step(model, state, opt_state, x, y, key):
        loss_of_params = optax_sam.equinox.loss_function(model, loss_fn, state, x, y, key)
        (loss, state), grads = value_and_grad(model, state, x, y, key)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, opt_state = tx.update(grads, opt_state, params, loss_fn=loss_of_params)
        return eqx.apply_updates(model, updates), state, opt_state, loss

    return train(make_step, tx)


def with_sam_by_hand():
    @eqx.filter_jit
    def make_step(model, state, opt_state, x, y, key):
        (loss, new_state), grads = value_and_grad(model, state, x, y, key)
        scale = RHO / optax.tree.norm(grads)
        perturbed = eqx.apply_updates(model, jax.tree.map(lambda g: scale * g, grads))
        _, grads = value_and_grad(perturbed, state, x, y, key)
        updates, opt_state = optimizer.update(grads, opt_state)
        return eqx.apply_updates(model, updates), new_state, opt_state, loss

    return train(make_step, optimizer)


def train(make_step, tx):
    model, state = eqx.filter_jit(eqx.nn.make_with_state(Network))(jax.random.key(0))
    opt_state, losses = tx.init(eqx.filter(model, eqx.is_inexact_array)), []
    for step in range(STEPS):
        key = jax.random.fold_in(jax.random.key(1), step)
        model, state, opt_state, loss = make_step(model, state, opt_state, inputs, labels, key)
        losses.append(loss)
    return jax.tree.leaves(eqx.filter(model, eqx.is_array)), jax.tree.leaves(state), losses
