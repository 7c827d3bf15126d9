"""Flax Linen: a train state that hands everything to the optimizer, and the view of a layer."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.core import FrozenDict
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training import train_state

import optax_sam
from optax_sam.linen import TrainState, capture_layer_input

INPUTS, LABELS = jax.random.normal(jax.random.key(0), (8, 4)), jnp.arange(8) % 3


def make_state(tx, model=None, **fields):
    model = nn.Dense(3) if model is None else model
    variables = model.init(jax.random.key(1), INPUTS)
    return TrainState.create(apply_fn=model.apply, params=variables, tx=tx, **fields)


def objective_of(state):
    return optax_sam.Objective(state.apply_fn, INPUTS, LABELS)


def assert_equal(actual, expected, rtol=1e-6):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-7), actual, expected
    )


def recorder(seen):
    """A transformation that writes down the extra arguments of ``update``."""

    def update(updates, state, params=None, **extra_args):
        seen.append(extra_args)
        return updates, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def test_a_step_is_that_of_the_optimizer():
    tx = optax.chain(optax_sam.saner(0.1), optax.adam(0.1))
    state = make_state(tx)
    objective = objective_of(state)
    grads = jax.grad(objective)(state.params)
    updates, opt_state = tx.update(grads, state.opt_state, state.params, loss_fn=objective)
    new = state.apply_gradients(grads=grads, loss_fn=objective)
    assert_equal(new.params, optax.apply_updates(state.params, updates), rtol=0)
    assert_equal(new.opt_state, opt_state, rtol=0)
    assert int(new.step) == 1


def test_every_argument_arrives():
    seen = []
    state = make_state(recorder(seen))
    grads, objective, logits = state.params, objective_of(state), jnp.ones((8, 3))
    state.apply_gradients(
        grads=grads, loss_fn=objective, logits=logits, extra_args={"value": 2.0, "key": 3}
    )
    assert seen == [{"loss_fn": objective, "logits": logits, "value": 2.0, "key": 3}]


def test_nothing_arrives_that_was_not_given():
    """Line searches refuse keywords that they do not know, also those with the value None."""
    seen = []
    state = make_state(recorder(seen))
    state.apply_gradients(grads=state.params)
    assert seen == [{}]


def test_logits_spare_jsam_a_forward_pass():
    """If they are the wrong ones, the result is wrong: they are used."""
    state = make_state(optax_sam.jsam(0.1))
    objective = objective_of(state)
    grads, logits = jax.grad(objective)(state.params), objective.logits(state.params)

    def step(**logits):
        return state.apply_gradients(grads=grads, loss_fn=objective, **logits).params

    assert_equal(step(logits=logits), step())
    with pytest.raises(AssertionError):
        assert_equal(step(logits=2 * logits), step())


def test_other_fields_are_replaced():
    class WithStatistics(TrainState):
        batch_stats: dict

    params = {"w": jnp.ones(3)}
    state = WithStatistics.create(
        apply_fn=None, params=params, tx=optax.sgd(0.1), batch_stats={"mean": jnp.zeros(2)}
    )
    new = state.apply_gradients(grads=params, batch_stats={"mean": jnp.ones(2)})
    assert_equal(new.batch_stats, {"mean": jnp.ones(2)})


def test_an_optimizer_without_extra_arguments():
    """As Flax's own: a base optimizer, compared in the same program, needs no loss."""
    state = make_state(optax.sgd(0.1))
    ours = state.apply_gradients(grads=state.params, loss_fn=objective_of(state))
    flax_state = train_state.TrainState.create(
        apply_fn=state.apply_fn, params=state.params, tx=optax.sgd(0.1)
    )
    assert_equal(ours.params, flax_state.apply_gradients(grads=state.params).params, rtol=0)


def test_multi_steps_has_its_arguments():
    """It is no GradientTransformation, for which Optax would drop them."""
    tx = optax.MultiSteps(optax.chain(optax_sam.sam(0.1), optax.sgd(0.1)), 2)
    state = TrainState.create(apply_fn=None, params={"w": jnp.ones(3)}, tx=tx)
    loss_fn = lambda params: jnp.sum(params["w"] ** 2)  # noqa: E731
    for _ in range(2):
        state = state.apply_gradients(grads=jax.grad(loss_fn)(state.params), loss_fn=loss_fn)
    expected = 1 - 0.1 * 2 * (1 + 0.1 / jnp.sqrt(3.0))
    assert_equal(state.params["w"], jnp.full(3, expected), rtol=1e-6)


@pytest.mark.parametrize("kind", [dict, FrozenDict])
def test_leaves_of_fp8_layers_are_overwritten_and_not_perturbed(kind):
    model = nn.Dense(3, dot_general_cls=nn.Fp8DirectDotGeneralOp, use_bias=False)
    rho, rate = 0.2, 0.1
    tx = optax.chain(optax_sam.sam(rho), optax.sgd(rate))
    state = make_state(tx, model)
    state = TrainState.create(apply_fn=state.apply_fn, params=kind(state.params), tx=tx)
    assert OVERWRITE_WITH_GRADIENT in state.params
    objective = objective_of(state)
    grads = jax.jit(jax.grad(objective))(state.params)
    new = state.apply_gradients(grads=grads, loss_fn=objective)

    ascent = grads["params"]
    scale = rho / optax.tree.norm(ascent)
    perturbed = jax.tree.map(lambda p, g: p + scale * g, state.params["params"], ascent)
    descent = jax.jit(jax.grad(objective))({**state.params, "params": perturbed})["params"]
    expected = jax.tree.map(lambda p, g: p - rate * g, state.params["params"], descent)
    assert_equal(new.params["params"], expected)
    assert_equal(new.params[OVERWRITE_WITH_GRADIENT], grads[OVERWRITE_WITH_GRADIENT], rtol=0)
    # The amax histories changed, so the line above says something.
    changed = jax.tree.map(
        lambda a, b: bool(jnp.any(a != b)),
        new.params[OVERWRITE_WITH_GRADIENT],
        state.params[OVERWRITE_WITH_GRADIENT],
    )
    assert any(jax.tree.leaves(changed))
    assert {*new.params} == {*state.params}
    assert isinstance(new.params, dict)  # as Flax's own


@pytest.mark.parametrize("layer", ["layers_2", "layers_9"])
def test_capture_refuses_a_layer_that_is_not_called_once(layer):
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.Dense(4, name="layers_2")
            return dense(dense(x))

    model = Twice()
    variables = model.init(jax.random.key(0), INPUTS)
    times = 2 if layer == "layers_2" else 0
    with pytest.raises(ValueError, match=rf"'{layer}' was called {times} times.*\['layers_2'\]"):
        capture_layer_input(model, layer)(variables, INPUTS)


def test_capture_gives_the_first_argument_of_the_layer():
    class Scaled(nn.Module):
        @nn.compact
        def __call__(self, x, scale):
            return scale * nn.Dense(3)(x)

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Scaled(name="head")(scale=2.0, x=jnp.tanh(nn.Dense(4)(x)))

    model = Network()
    variables = model.init(jax.random.key(0), INPUTS)
    output, hidden = capture_layer_input(model, "head")(variables, INPUTS)
    first = variables["params"]["Dense_0"]
    assert_equal(hidden, jnp.tanh(INPUTS @ first["kernel"] + first["bias"]), rtol=1e-6)
    assert_equal(output, model.apply(variables, INPUTS))
