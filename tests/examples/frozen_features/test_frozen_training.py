"""The lanes of a program, the recipes, the losses and the networks."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_sam
from examples.frozen_features import networks
from examples.frozen_features.losses import LOSSES
from examples.frozen_features.methods import METHODS
from examples.frozen_features.recipes import Knobs, Recipe
from examples.frozen_features.sets import SETS
from examples.frozen_features.studies import STUDIES, TRIALS, schedule, trials
from examples.frozen_features.train import Lane, Trainer, rate_left
from tests.examples.frozen_features.frozen_data import features

TINY = Recipe(hidden=4)


def train(recipe, lanes, epochs=2, rows=None, labels=None):
    data = features()
    labels = data.labels if labels is None else labels
    trainer = Trainer(data, labels, batch_size=16)
    rows = np.arange(len(data.labels)) if rows is None else rows
    *_, (state, losses) = trainer.epochs(recipe, lanes, rows, epochs)
    return state, losses


def by_hand(method, knobs, seed, epochs=2):
    """One run in plain optax, step by step."""
    data = features()
    params = networks.init(seed, "mlp", data.inputs.shape[1], 4, data.num_classes)
    tx = optax.chain(
        optax.with_extra_args_support(method),
        optax.add_decayed_weights(knobs.decay),
        optax.trace(0.9),
    )
    state, now, total = tx.init(params), 0, epochs * (len(data.labels) // 16)
    inputs = (data.inputs - data.mean) / data.deviation

    @jax.jit
    def step(params, state, x, y, rate):
        objective = optax_sam.Objective(networks.apply, x, y)
        updates, state = tx.update(jax.grad(objective)(params), state, params, loss_fn=objective)
        return jax.tree.map(lambda p, u: p - rate * u, params, updates), state

    for epoch in range(epochs):
        order = np.random.default_rng([seed, epoch]).permutation(len(data.labels))
        for batch in order[: len(order) // 16 * 16].reshape(-1, 16):
            rate = knobs.rate * 0.5 * (1 + np.cos(np.pi * now / total))
            params, state = step(params, state, inputs[batch], data.labels[batch], rate)
            now += 1
    return params


@pytest.mark.programs
@pytest.mark.parametrize(
    ("name", "build"), [("sgd", lambda rho: optax.identity()), ("saner", optax_sam.saner)]
)
def test_every_lane_is_the_run_that_it_would_be_alone(name, build):
    lanes = [Lane(Knobs(0.2, 1e-2, 0.1), 3), Lane(Knobs(0.05, 0.0, 0.02), 1)]
    state, losses = train(dataclasses.replace(TINY, method=name), lanes)
    assert losses.shape == (2,)
    for index, lane in enumerate(lanes):
        expected = by_hand(build(lane.knobs.rho), lane.knobs, lane.seed)
        for key, value in expected.items():
            np.testing.assert_allclose(state.params[key][index], value, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_zero_radius_is_sgd(method):
    knobs = Knobs(0.0, 1e-2, 0.05)
    plain, _ = train(TINY, [Lane(knobs, 0)])
    state, losses = train(dataclasses.replace(TINY, method=method), [Lane(knobs, 0)])
    assert np.isfinite(losses).all()
    for key, value in plain.params.items():
        if method != "ncsam":  # its compensation does not go away with ρ
            np.testing.assert_allclose(state.params[key], value, rtol=1e-3, atol=1e-4)


def test_a_late_start_is_sgd_until_then():
    lanes = [Lane(Knobs(0.5, 0.0, 0.05), 0)]
    plain, _ = train(TINY, [Lane(Knobs(0.0, 0.0, 0.05), 0)])
    never, _ = train(dataclasses.replace(TINY, method="sam", start=1.0), lanes)
    half, _ = train(dataclasses.replace(TINY, method="sam", start=0.5), lanes)
    np.testing.assert_allclose(never.params["kernel"], plain.params["kernel"], rtol=1e-4, atol=1e-5)
    # NCSAM's compensation is projected to a ball of radius 0 until then.
    lanes = [Lane(Knobs(0.5, 0.0, 0.05, strength=1.0), 0)]
    never, _ = train(dataclasses.replace(TINY, reading="paper", start=1.0), lanes)
    np.testing.assert_allclose(never.params["kernel"], plain.params["kernel"], rtol=1e-4, atol=1e-5)
    assert np.abs(half.params["kernel"] - plain.params["kernel"]).max() > 1e-3


def test_the_learning_rate_falls_along_a_cosine_or_in_steps():
    progress = jnp.array([0.0, 0.49, 0.5, 0.74, 0.75, 0.99])
    falls = rate_left(Recipe(step_decay=True), progress)
    np.testing.assert_allclose(falls, [1, 1, 0.1, 0.1, 0.01, 0.01], rtol=1e-6)
    np.testing.assert_allclose(rate_left(Recipe(), jnp.array([0.0, 0.5])), [1, 0.5], rtol=1e-6)
    lanes = [Lane(Knobs(0.0, 0.0, 0.05), 0)]
    trained = [
        train(dataclasses.replace(TINY, step_decay=steps), lanes)[0] for steps in (False, True)
    ]
    assert np.abs(trained[0].params["kernel"] - trained[1].params["kernel"]).max() > 1e-3


def test_only_the_given_rows_are_trained_on():
    data = features()
    rows = np.arange(0, 120, 2)
    other = data.labels.copy()
    other[1::2] = 0
    first, _ = train(TINY, [Lane(Knobs(), 0)], rows=rows)
    second, _ = train(TINY, [Lane(Knobs(), 0)], rows=rows, labels=other)
    np.testing.assert_array_equal(first.params["kernel"], second.params["kernel"])


def test_the_average_of_the_weights_predicts():
    recipe = dataclasses.replace(TINY, weight_average=0.999)
    state, _ = train(recipe, [Lane(Knobs(rate=0.2), 0)])
    assert state.predictor is state.average
    assert np.abs(state.average["kernel"] - state.params["kernel"]).max() > 1e-3
    plain, _ = train(TINY, [Lane(Knobs(rate=0.2), 0)])
    np.testing.assert_array_equal(state.params["kernel"], plain.params["kernel"])


def test_past_predictions_are_averaged_for_the_rows_that_were_seen():
    recipe = dataclasses.replace(TINY, loss="elr")
    state, _ = train(recipe, [Lane(Knobs(strength=3.0), 0)], rows=np.arange(32))
    seen, unseen = state.past[0, :32], state.past[0, 32:]
    np.testing.assert_allclose(unseen, 1 / 3, rtol=1e-6)
    assert np.abs(seen - 1 / 3).max() > 1e-3
    np.testing.assert_allclose(seen.sum(-1), 1, rtol=1e-5)


@pytest.mark.parametrize("change", [{"mixup": True}, {"dropout": 0.5}])
def test_mixup_and_dropout_change_the_training_and_come_from_the_seed(change):
    lanes = [Lane(Knobs(strength=1.0), 0), Lane(Knobs(strength=1.0), 0)]
    state, _ = train(dataclasses.replace(TINY, **change), lanes)
    plain, _ = train(TINY, lanes)
    np.testing.assert_array_equal(*state.params["kernel"])
    assert np.abs(state.params["kernel"] - plain.params["kernel"]).max() > 1e-3


def test_the_losses_by_hand():
    logits, labels = jnp.log(jnp.array([[0.5, 0.3, 0.2]])), jnp.array([[0.0, 1.0, 0.0]])

    def value(name, strength, labels=labels):
        return float(LOSSES[name].build(strength)(logits, labels)[0])

    assert value("cross_entropy", 0.0) == pytest.approx(-np.log(0.3))
    smooth = 0.7 * -np.log(0.3) + 0.1 * -np.log([0.5, 0.3, 0.2]).sum()
    assert value("label_smoothing", 0.3) == pytest.approx(smooth, rel=1e-5)
    assert value("gce", 0.5) == pytest.approx((1 - 0.3**0.5) / 0.5, rel=1e-5)
    assert value("gce", 1.0) == pytest.approx(0.7, rel=1e-5)
    powers = 1 - np.array([0.5, 0.3, 0.2]) ** 0.5
    smooth = (0.8 * powers[1] + 0.2 / 3 * powers.sum()) / 0.5
    assert value("smooth_gce", 0.5) == pytest.approx(smooth, rel=1e-5)
    assert value("sce", 0.1) == pytest.approx(0.1 * -np.log(0.3) + 4 * 0.7, rel=1e-5)
    past = jnp.concatenate([labels, jnp.array([[0.6, 0.4, 0.0]])], axis=-1)
    expected = -np.log(0.3) + 3 * np.log(1 - (0.5 * 0.6 + 0.3 * 0.4))
    assert value("elr", 3.0, past) == pytest.approx(expected, rel=1e-5)


def test_all_contenders_have_the_same_number_of_trials_and_are_scheduled():
    contenders = [contender for study in STUDIES.values() for contender in study]
    assert {len(contender.trials) for contender in contenders} == {TRIALS}
    assert len({contender.name for contender in contenders}) == len(contenders)
    planned = schedule()
    assert len(set(planned)) == len(planned)
    assert {c.name for _, c in planned} == {c.name for c in contenders}
    assert {name for name, _ in planned} == set(SETS)
    for contender in contenders:
        for trial in contender.trials:
            trial.recipe.build(trial.knobs.rho, trial.knobs.strength)


def test_a_data_set_scales_the_decays_of_the_trials():
    sgd = STUDIES["methods"][0]
    plain, scaled = trials(sgd, "cifar10n_worse"), trials(sgd, "news_reduced")
    assert plain == sgd.trials
    assert [t.knobs.decay for t in scaled] == pytest.approx([4 * t.knobs.decay for t in plain])
    assert [t.knobs.rate for t in scaled] == [t.knobs.rate for t in plain]


def test_the_penalty_pulls_on_the_last_layer_and_its_inputs():
    """One step from the same weights: the difference to SGD is the penalty's gradient."""
    data = features()
    recipe = dataclasses.replace(TINY, momentum=0.0)
    lanes = [Lane(Knobs(0.0, 0.0, 0.1, 0.3), 0)]
    rows = np.arange(16)
    plain, _ = train(recipe, lanes, epochs=1, rows=rows)
    state, _ = train(dataclasses.replace(recipe, penalty=True), lanes, epochs=1, rows=rows)
    params = networks.init(0, "mlp", 5, 4, 3)
    x = (data.inputs[rows] - data.mean) / data.deviation

    def penalty(params):
        hidden = jnp.maximum(x @ params["hidden_kernel"] + params["hidden_bias"], 0)
        return 0.3 * (jnp.mean(jnp.sum(hidden**2, -1)) + jnp.sum(params["kernel"] ** 2))

    gradient = jax.grad(penalty)(jax.tree.map(jnp.asarray, params))
    for key, value in gradient.items():
        moved = (plain.params[key] - state.params[key])[0]
        np.testing.assert_allclose(moved, 0.1 * value, rtol=1e-4, atol=1e-6)
