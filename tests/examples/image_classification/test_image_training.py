"""The training step of the image program: the same numbers on every kind of device layout."""

import dataclasses
import functools
import inspect
import types

import jax
import numpy as np
import pytest

import optax_sam
from examples.image_classification import logs, train
from examples.image_classification.config import Config
from examples.image_classification.methods import METHODS
from examples.image_classification.models import make_model
from examples.image_classification.presets import PRESETS
from examples.image_classification.steps import Evaluator
from examples.image_classification.train import Run, make_optimizer

TINY = Config(
    subset=64,
    batch_size=32,
    width=16,
    norm="batch",
    method="saner",
    augmentation=("crop", "flip", "cutout"),
    epochs=2,
    learning_rate=0.01,
)
LOCAL = dataclasses.replace(TINY, norm="group", perturbation="per_device")


@pytest.fixture(autouse=True, scope="module")
def small_network():
    """Two convolutions, the second behind the normalization of the first, compile faster than three."""

    def make_small_model(config, *arguments):
        return make_model(config, *arguments).clone(factors=(1, 2))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_model", make_small_model)
        yield


@functools.cache
def trained(config, devices=4):
    """State, last row, predictions and the number of traces after each of two epochs."""
    run = Run(config, jax.devices()[:devices])
    state = run.devices.replicate(run.initial_state())
    traces = []
    with logs.terminal(1, 0, visible=False) as terminal:
        for epoch in (1, 2):
            state, row = run.train_epoch(state, epoch, terminal)
            traces.append(run.epochs.traces)
    accuracies, predicted = run.evaluate(state)
    return run.devices.fetch(state), row | accuracies, predicted, traces


def assert_same(actual, expected):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), actual[0], expected[0])
    for name in ("loss", "train_accuracy", "down_weighted"):
        np.testing.assert_allclose(actual[1][name], expected[1][name], rtol=1e-4)
    np.testing.assert_array_equal(actual[2], expected[2])


@pytest.mark.programs
@pytest.mark.parametrize(
    ("mode", "loop"),
    [("jit", "python"), ("jit", "compiled"), ("pmap", "python"), ("shard_map", "compiled")],
)
def test_four_devices_give_the_result_of_one(mode, loop):
    """With batch normalization, SANER's sign test and augmentation, all of the whole batch."""
    actual = trained(dataclasses.replace(TINY, parallel=mode, epoch_loop=loop))
    assert_same(actual, trained(TINY, devices=1))
    first, second = actual[3]
    assert second == first >= 1, "something was compiled after the first epoch"


@pytest.mark.programs
@pytest.mark.parametrize("mode", ["pmap", "shard_map"])
def test_a_perturbation_per_device_is_one_per_group(mode):
    grouped = dataclasses.replace(LOCAL, perturbation="global", group_size=8)
    actual = trained(dataclasses.replace(LOCAL, parallel=mode))
    assert_same(actual, trained(grouped, devices=1))


def test_images_on_the_host_give_the_same_run():
    assert_same(trained(dataclasses.replace(TINY, data_on="host")), trained(TINY, devices=1))


def test_images_on_the_host_stay_there():
    for where, kind in [("host", np.ndarray), ("device", jax.Array)]:
        run = Run(dataclasses.replace(TINY, data_on=where), jax.devices()[:1])
        held = [run.epochs._data.images, *run.train_chunks, *run.test_chunks]
        assert all(isinstance(images, kind) for images in held)


def test_half_precision_computes_in_bfloat16_and_keeps_float32():
    config = dataclasses.replace(TINY, precision="bfloat16")
    state, row, _, _ = trained(config, devices=1)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {np.dtype("float32")}
    assert row["loss"] != trained(TINY, devices=1)[1]["loss"]
    assert abs(row["loss"] - trained(TINY, devices=1)[1]["loss"]) < 0.05


def test_what_devices_cannot_do_alike_is_refused():
    devices = jax.devices()
    ncsam = dataclasses.replace(TINY, method="ncsam", parallel="pmap")
    with pytest.raises(ValueError, match="under pmap, each device would estimate NCSAM's"):
        Run(ncsam, devices)
    Run(ncsam, devices[:1])
    with pytest.raises(ValueError, match="every device would compute the perturbations of all"):
        Run(LOCAL, devices)


def test_the_order_of_the_data_is_the_seeds_and_the_epochs():
    run = Run(TINY, jax.devices()[:1])
    first, second = run.epochs.batches(1), run.epochs.batches(2)
    assert first.shape == (2, 32)
    assert sorted(first.ravel()) == list(range(64))
    assert (first != second).any()
    np.testing.assert_array_equal(first, run.epochs.batches(1))


def test_evaluation_ignores_the_filling_of_the_last_chunk():
    run = Run(dataclasses.replace(TINY, norm="group"), jax.devices())
    run.evaluator._chunk = 24  # 64 images: the last chunk holds 16
    state = run.devices.replicate(run.initial_state())
    whole = run.evaluate(state)[1]
    chunks = run.evaluator.chunks(run.data.images)
    assert [chunk.shape[0] for chunk in chunks] == [24, 24, 24]
    np.testing.assert_array_equal(run.evaluator.predictions(state, chunks, 64), whole)


def test_fewer_images_than_devices_are_evaluated():
    devices = types.SimpleNamespace(count=8, evaluated=lambda function: function)
    images = np.arange(3)[:, None]
    evaluator = Evaluator(None, devices, None, on_host=True)
    (chunk,) = evaluator.chunks(images)
    assert chunk.ravel().tolist() == [0, 1, 2, 0, 1, 2, 0, 1]


@pytest.mark.programs
@pytest.mark.parametrize("model", ["preact_resnet18", "preact_resnet34", "wide_resnet"])
@pytest.mark.parametrize("norm", ["batch", "group", "layer"])
def test_published_networks_have_their_published_size(model, norm):
    config = Config(model=model, norm=norm, width=160 if model == "wide_resnet" else 64)
    network = make_model(config, num_classes=10)
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), np.float32)
    variables = jax.eval_shape(lambda x: network.init(jax.random.key(0), x, training=False), images)
    count = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    published = {"preact_resnet18": 11.17e6, "preact_resnet34": 21.28e6, "wide_resnet": 36.48e6}
    assert count == pytest.approx(published[model], rel=2e-3)
    assert ("batch_stats" in variables) == (norm == "batch")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_builds_with_its_options(method):
    config = dataclasses.replace(
        TINY, method=method, down_weight=None if method == "sgd" else 0.5, method_starts=0.5
    )
    tx = make_optimizer(config, 4, None, 0.4)
    assert jax.tree.leaves(jax.eval_shape(tx.init, {"kernel": np.ones((2, 3), np.float32)}))


def test_the_methods_are_those_of_the_library():
    """But for Functional-SAM, which is J-SAM without a preconditioner, and two makers of methods."""
    functions = {name: getattr(optax_sam, name) for name in optax_sam.__all__}
    taking_options = {
        name
        for name, function in functions.items()
        if inspect.isfunction(function) and "axis_name" in inspect.signature(function).parameters
    }
    others = {"functional_sam", "sharpness_aware", "sometimes"}
    assert taking_options - METHODS.keys() == others


def test_alpha_grows_over_the_warm_up():
    """A quarter of 8 epochs at 10 steps: half the strength in the first, all from the second."""
    config = dataclasses.replace(TINY, epochs=8, down_weight=0.5, down_weight_warmup=0.25)
    tx = make_optimizer(config, 10, None, 0.4)
    params = {"w": np.ones(3, np.float32)}
    state = tx.init(params)
    directions = []

    def loss_fn(p):
        return 0.9 * p["w"].sum()  # g' = 0.9 where g = 1: down-weighted

    for _ in range(11):
        updates, state = tx.update(
            {"w": np.ones(3, np.float32)},
            state,
            params,
            loss_fn=loss_fn,
        )
        directions.append(float(updates["w"][0]))
    without = 0.9 + config.weight_decay
    rates = -np.array(directions)
    # Momentum adds up earlier steps, so the first step and the change at the eleventh are compared.
    np.testing.assert_allclose(rates[0], 0.01 * (0.75 * 0.9 + config.weight_decay), rtol=1e-4)
    assert rates[0] < 0.01 * without
    velocity = rates[9] / _cosine(9, 80)
    step = rates[10] / _cosine(10, 80) - 0.9 * velocity
    np.testing.assert_allclose(step, 0.01 * (0.5 * 0.9 + config.weight_decay), rtol=1e-3)


def _cosine(step, total):
    return 0.5 * (1 + np.cos(np.pi * step / total))


def test_presets_carry_the_papers_settings():
    saner = PRESETS["saner-cifar10"][1]
    assert (saner.epochs, saner.batch_size, saner.rho) == (200, 128, 0.1)
    assert (saner.learning_rate, saner.momentum, saner.weight_decay) == (0.1, 0.9, 5e-4)
    assert round(saner.down_weight_warmup * saner.epochs) == 50
    ncsam = PRESETS["ncsam-cifar100"][1]
    assert (ncsam.learning_rate, ncsam.weight_decay, ncsam.rho) == (0.05, 1e-3, 0.05)
    assert round(ncsam.method_starts * ncsam.epochs) == 50
    jsam = PRESETS["jsam-cifar10"][1]
    assert (jsam.group_size, jsam.rho, jsam.learning_rate, jsam.norm) == (1, 0.01, 0.01, "layer")
    for name, (_, config) in PRESETS.items():
        if f"{name}-short" in PRESETS:
            assert PRESETS[f"{name}-short"][1] == dataclasses.replace(config, epochs=20)
