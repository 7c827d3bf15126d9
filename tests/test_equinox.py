"""Equinox: models whose leaves are not all parameters, keys, and stateful layers."""

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_sam
from optax_sam.equinox import loss_function, objective

INPUTS, LABELS = jax.random.normal(jax.random.key(0), (8, 4)), jnp.arange(8) % 3
RHO = 0.3


class Network(eqx.Module):
    """Batch normalization, dropout, an activation function and a counter among the leaves."""

    hidden: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    dropout: eqx.nn.Dropout
    head: eqx.nn.Linear
    version: jax.Array

    def __init__(self, key):
        keys = jax.random.split(key)
        self.hidden = eqx.nn.Linear(4, 8, key=keys[0])
        self.norm = eqx.nn.BatchNorm(8, axis_name="batch", mode="batch")
        self.dropout = eqx.nn.Dropout(0.5)
        self.head = eqx.nn.Linear(8, 3, key=keys[1])
        self.version = jnp.array(7)

    def __call__(self, x, key, state):
        x, state = self.norm(self.hidden(x), state)
        return self.head(self.dropout(jax.nn.relu(x), key=key)), state


def logits_of(model, inputs, state):
    x, keys = inputs
    batched = jax.vmap(model, axis_name="batch", in_axes=(0, 0, None), out_axes=(0, None))
    return batched(x, keys, state)


def loss_of(model, inputs, labels, state):
    logits, state = logits_of(model, inputs, state)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), state


def inputs_with_keys():
    return INPUTS, jax.random.split(jax.random.key(5), 8)


def gradients_by_hand(model, state):
    (value, new_state), grads = eqx.filter_value_and_grad(loss_of, has_aux=True)(
        model, inputs_with_keys(), LABELS, state
    )
    scale = RHO / optax.tree.norm(grads)
    moved = eqx.apply_updates(model, jax.tree.map(lambda g: scale * g, grads))
    perturbed, _ = eqx.filter_grad(loss_of, has_aux=True)(moved, inputs_with_keys(), LABELS, state)
    return value, new_state, perturbed


def function_of(model, state):
    return loss_function(model, loss_of, inputs_with_keys(), LABELS, state)


def objective_of(model, state):
    def call(model, inputs):
        return logits_of(model, inputs, state)

    return objective(model, inputs_with_keys(), LABELS, call=call, has_aux=True)


@pytest.mark.parametrize("make_loss", [function_of, objective_of])
def test_sam_of_a_network_with_state_and_keys(make_loss):
    model, state = eqx.nn.make_with_state(Network)(jax.random.key(0))
    params = eqx.filter(model, eqx.is_inexact_array)
    method = optax_sam.sam(RHO)

    @eqx.filter_jit
    def step(model, opt_state, state):
        (value, new_state), grads = eqx.filter_value_and_grad(loss_of, has_aux=True)(
            model, inputs_with_keys(), LABELS, state
        )
        params = eqx.filter(model, eqx.is_inexact_array)
        loss_fn = make_loss(model, state)
        updates, _ = method.update(grads, opt_state, params, loss_fn=loss_fn)
        return value, new_state, updates

    actual = step(model, method.init(params), state)
    expected = eqx.filter_jit(gradients_by_hand)(model, state)
    assert jax.tree.structure(actual[2]) == jax.tree.structure(params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), actual, expected
    )


def test_a_state_that_may_be_used_once():
    """Equinox invalidates a state that was set: both passes need one."""

    class Counter(eqx.Module):
        weight: jax.Array
        index: eqx.nn.StateIndex

        def __init__(self):
            self.weight, self.index = jnp.ones(3), eqx.nn.StateIndex(jnp.array(1.0))

        def __call__(self, state):
            count = state.get(self.index)
            return count * self.weight, state.set(self.index, count + 1)

    model, state = eqx.nn.make_with_state(Counter)()

    def loss(model, state):
        return model(state)[0].sum()

    loss_fn = loss_function(model, loss, state)
    params = eqx.filter(model, eqx.is_inexact_array)
    assert loss_fn(params) == loss_fn(params) == 3.0


def test_objective_calls_the_model_on_every_example():
    model = eqx.nn.MLP(4, 3, 8, 1, key=jax.random.key(0))
    params = eqx.filter(model, eqx.is_inexact_array)
    expected = jax.vmap(model)(INPUTS)
    np.testing.assert_allclose(objective(model, INPUTS, LABELS).logits(params), expected, rtol=1e-6)


def test_groups_of_an_equinox_model():
    """AUDIT 1.12: a module is a callable pytree, and none of its parts may be called by mistake."""
    model = eqx.nn.MLP(4, 3, 8, 1, key=jax.random.key(0))
    params = eqx.filter(model, eqx.is_inexact_array)
    method = optax_sam.sam(RHO, group_size=2)
    whole = objective(model, INPUTS, LABELS)
    grads, _ = method.update(jax.grad(whole)(params), method.init(params), params, loss_fn=whole)
    expected = jax.tree.map(jnp.zeros_like, params)
    for start in range(0, 8, 2):
        part = whole.subset(slice(start, start + 2))
        ascent = jax.grad(part)(params)
        scale = RHO / optax.tree.norm(ascent)
        descent = jax.grad(part)(jax.tree.map(lambda p, g, s=scale: p + s * g, params, ascent))
        expected = jax.tree.map(lambda a, b: a + b / 4, expected, descent)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grads, expected
    )


def test_wrt_chooses_the_parameters():
    """The usual way to freeze: a tree of bools, the same for the filter and for the loss."""
    model = eqx.nn.MLP(4, 3, 8, 1, key=jax.random.key(0))
    spec = jax.tree.map(lambda _: False, model)
    spec = eqx.tree_at(lambda m: m.layers[-1].weight, spec, True)
    params = eqx.filter(model, spec)

    def loss(model, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(jax.vmap(model)(x), y).mean()

    expected = eqx.filter(eqx.filter_grad(loss)(model, INPUTS, LABELS), spec)
    for loss_fn in (
        loss_function(model, loss, INPUTS, LABELS, wrt=spec),
        objective(model, INPUTS, LABELS, wrt=spec),
    ):
        grads = jax.grad(loss_fn)(params)
        assert [leaf.shape for leaf in jax.tree.leaves(grads)] == [(3, 8)]
        chex.assert_trees_all_close(grads, expected, rtol=1e-5, atol=1e-7)
