"""A network of many leaves compiles in about the time of the step by hand: it has the same kernels."""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import optax
import pytest

import optax_sam
from optax_sam import _norms

LEAVES = 24
PARAMS = {f"layer_{index}": jnp.full((3, 3), 0.4) for index in range(LEAVES)}


def loss_fn(params):
    x = jnp.ones((2, 3))
    for weights in params.values():
        x = jnp.tanh(x @ weights)
    return jnp.mean(x**2)


def by_hand(params):
    gradients = jax.grad(loss_fn)(params)
    length = optax.tree.norm(gradients)
    perturbed = jax.tree.map(lambda w, g: w + 0.05 * g / length, params, gradients)
    return jax.tree.map(lambda w, g: w - 0.1 * g, params, jax.grad(loss_fn)(perturbed))


@functools.cache
def operations_by_hand():
    return operations(by_hand, PARAMS)


def operations(step, *arguments):
    text = jax.jit(step).lower(*arguments).compile().as_text()
    return collections.Counter(re.findall(r"= \S+ ([a-z-]+)\(", text))


@pytest.mark.parametrize("rho", [0.05, optax.constant_schedule(0.05)], ids=["number", "schedule"])
def test_a_step_has_the_kernels_of_the_step_by_hand(rho):
    """‖g‖ and ‖ε‖ of the metrics cost no pass over the leaves that SAM does not need."""
    tx = optax.chain(optax_sam.sam(rho), optax.sgd(0.1))

    def step(params, state):
        updates, state = tx.update(jax.grad(loss_fn)(params), state, params, loss_fn=loss_fn)
        return optax.apply_updates(params, updates), state

    ours, reference = operations(step, PARAMS, tx.init(PARAMS)), operations_by_hand()
    assert ours["reduce"] <= reference["reduce"] + 2
    assert ours["dot"] == reference["dot"]
    assert ours["fusion"] <= 1.05 * reference["fusion"] + 5


@pytest.mark.parametrize("gradients", [[3.0, 4.0], [0.0, 0.0], [1e-30, 0.0], [jnp.nan, 1.0]])
@pytest.mark.parametrize("rho", [0.5, 0.0, lambda step: -0.25 * (step + 1)])
def test_the_known_length_is_the_length(gradients, rho):
    stage = optax_sam.normalized(rho)
    state = stage.init(PARAMS)
    gradients = jnp.array(gradients)
    epsilon, _ = stage.update(gradients, state)
    length = stage.length(state, _norms.norm(gradients))
    assert jnp.allclose(length, _norms.norm(epsilon), rtol=1e-6, equal_nan=True)


def test_what_changes_the_perturbation_is_measured():
    """A wrapper, a chain or a mask around the stage: ‖ε‖ is what was taken."""
    gradients = jax.jit(jax.grad(loss_fn))(PARAMS)
    stage = optax_sam.normalized(0.5)
    twice = optax.chain(optax_sam.normalized(0.5), optax.scale(2.0))
    in_steps = optax_sam.in_steps(optax_sam.normalized(0.5), 2)
    for perturbation, expected in (stage, 0.5), (twice, 1.0), (in_steps, None):
        tx = optax_sam.sharpness_aware(perturbation)
        _, state = tx.update(gradients, tx.init(PARAMS), PARAMS, loss_fn=loss_fn)
        if expected is None:
            epsilon, _ = in_steps.update(gradients, in_steps.init(PARAMS), PARAMS, loss_fn=loss_fn)
            expected = optax.tree.norm(epsilon)
        assert jnp.allclose(state.metrics.perturbation_norm, expected, rtol=1e-6)
