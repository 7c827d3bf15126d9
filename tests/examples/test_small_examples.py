"""The one-page examples: they run, they learn, and they do what their comments promise."""

import functools
import importlib.util
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_sam

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name):
    """A fresh copy of an example, so that a test can replace its optimizer before it is traced."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.programs
@pytest.mark.parametrize("name", ["plain_step", "batch_norm_and_dropout"])
def test_it_learns_and_is_deterministic(name, capsys):
    example = load(name)
    for size in (0, 2000):
        with pytest.raises(SystemExit, match=rf"--batch-size: {size} is .* in \[1, 1297\]"):
            example.main(batch_size=size)
    example.main(epochs=4)
    first = capsys.readouterr().out
    accuracies = [float(found) for found in re.findall(r"test accuracy ([\d.]+)%", first)]
    assert len(accuracies) == 4
    assert accuracies[-1] > 85
    example.main(epochs=4)
    assert capsys.readouterr().out == first


@functools.cache
def problem():
    """Inputs, labels, and the first variables of the network."""
    inputs = jax.random.normal(jax.random.key(1), (32, 64))
    initialize = jax.jit(load("batch_norm_and_dropout").model.init, static_argnames="training")
    return inputs, jnp.arange(32) % 10, initialize(jax.random.key(0), inputs, training=False)


def first_step(tx):
    example = load("batch_norm_and_dropout")
    example.tx = tx
    inputs, labels, variables = problem()
    params, batch_stats = variables["params"], variables["batch_stats"]
    state = example.TrainState(params, batch_stats, tx.init(params))
    return example, state, example.train_step(state, jax.random.key(2), inputs, labels)[0]


@functools.cache
def first_step_of_sgd():
    return first_step(optax.with_extra_args_support(optax.sgd(0.1)))[-1]


@pytest.mark.parametrize("method", [optax_sam.sam, optax_sam.jsam])
def test_the_batch_statistics_are_those_of_the_clean_pass(method):
    tx = optax.chain(method(rho=5.0), optax.sgd(0.1))
    example, state, after = first_step(tx)
    forward = jax.jit(example.forward)
    _, (_, clean) = forward(state.batch_stats, jax.random.key(2), state.params, problem()[0])
    for got, expected, before in zip(
        *map(jax.tree.leaves, (after.batch_stats, clean, state.batch_stats)), strict=True
    ):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
        assert not np.allclose(got, before)


@pytest.mark.parametrize("method", [optax_sam.sam, optax_sam.jsam])
def test_both_passes_use_the_same_dropout_mask(method):
    # With rho = 0 the perturbed pass is the clean one, unless it draws another mask.
    expected = first_step_of_sgd()
    *_, after = first_step(optax.chain(method(rho=0.0), optax.sgd(0.1)))
    for got, wanted in zip(
        jax.tree.leaves(after.params), jax.tree.leaves(expected.params), strict=True
    ):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
