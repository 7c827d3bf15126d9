"""Flax Linen's TrainState with BatchNorm, data parallel by ``pmap``."""

import functools
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax

import optax_sam.linen
from tests.clients import by_hand
from tests.clients.by_hand import RHO
from tests.problems import examples

DEVICES = 2
STEPS = 3


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False)(nn.Dense(8, use_bias=False)(x))
        return nn.Dense(3)(nn.relu(x))


class TrainState(optax_sam.linen.TrainState):
    batch_stats: Any


model = Network()
optimizer = optax.sgd(0.1, momentum=0.9)
inputs, labels = jax.tree.map(lambda x: x.reshape(DEVICES, -1, *x.shape[1:]), examples())


def create_train_state(tx):
    variables = jax.jit(model.init)(jax.random.key(0), inputs[0])
    return TrainState.create(
        apply_fn=model.apply,
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        tx=tx,
    )


def loss_of(params, batch_stats, x, y):
    variables = {"params": params, "batch_stats": batch_stats}
    logits, updated = model.apply(variables, x, mutable=["batch_stats"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
    return losses.mean(), updated["batch_stats"]


@functools.partial(jax.pmap, axis_name="batch")
def train_step(state, x, y):
    def loss_fn(params):
        return loss_of(params, state.batch_stats, x, y)

    (loss, batch_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    grads = jax.lax.pmean(grads, axis_name="batch")
    state = state.apply_gradients(grads=grads, batch_stats=batch_stats, loss_fn=loss_fn)
    return state, jax.lax.pmean(loss, axis_name="batch")


def with_library():
    tx = optax.chain(optax_sam.sam(rho=RHO, axis_name="batch"), optimizer)
    state = create_train_state(tx)
    state = jax.tree.map(lambda x: np.stack([x] * DEVICES), state)
    losses = []
    for _ in range(STEPS):
        state, loss = train_step(state, inputs, labels)
        losses.append(loss[0])
    jax.tree.map(lambda x: by_hand.assert_same(x[0], x[1]), state.params)
    return jax.tree.map(lambda x: x[0], state.params), state.batch_stats, losses


def with_sam_by_hand():
    """On one device: the mean of both halves' losses, each with statistics of its own."""
    state = create_train_state(optimizer)
    params, opt_state = state.params, state.opt_state
    batch_stats = jax.tree.map(lambda x: np.stack([x] * DEVICES), state.batch_stats)

    def loss_fn(params, batch_stats):
        halves = jax.vmap(loss_of, in_axes=(None, 0, 0, 0))
        losses, batch_stats = halves(params, batch_stats, inputs, labels)
        return losses.mean(), batch_stats

    @jax.jit
    def step(params, batch_stats, opt_state):
        loss_of_params = functools.partial(loss_fn, batch_stats=batch_stats)
        (loss, batch_stats), grads = by_hand.sam(loss_of_params, params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), batch_stats, opt_state, loss

    losses = []
    for _ in range(STEPS):
        params, batch_stats, opt_state, loss = step(params, batch_stats, opt_state)
        losses.append(loss)
    return params, batch_stats, losses
