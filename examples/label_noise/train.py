"""One training step, one epoch, and the comparison of several methods."""

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from config import Config
from data import Data
from methods import METHODS, Problem
from models import LAST_LAYER, MODELS

import optax_sam
from optax_sam.linen import capture_layer_input


class TrainState(NamedTuple):
    """What a training step changes."""

    params: Any
    opt_state: optax.OptState


class Epoch(NamedTuple):
    """What one epoch of one method gave.

    Attributes:
      method: key of ``METHODS``.
      number: the epoch, from 1.
      seconds: wall clock of the training steps of all seeds, without compilation or evaluation.
      measures: name -> one value per seed, shape ``(seeds,)``: ``loss`` (mean of the epoch's
        training losses), and after the epoch those of :func:`evaluate`.
    """

    method: str
    number: int
    seconds: float
    measures: dict[str, np.ndarray]


def make_optimizer(
    method: str, config: Config, total_steps: int
) -> optax.GradientTransformationExtraArgs:
    """The method, then SGD: weight decay and momentum act on the method's gradient."""
    problem = Problem(
        config.rho_of(method), config.alpha, config.kappa, config.noise_rate, total_steps
    )
    return optax.with_extra_args_support(
        optax.chain(
            METHODS[method].build(problem),
            optax.add_decayed_weights(config.weight_decay),
            optax.sgd(config.learning_rate, config.momentum),
        )
    )


def make_train_step(model: nn.Module, tx: optax.GradientTransformationExtraArgs) -> Callable:
    """``train_step(state, inputs, labels) -> (state, loss)``, the same for every transformation."""

    def apply_fn(params, inputs):
        logits = model.apply(params, inputs)
        return logits, logits  # as auxiliary output too: the methods take them from the clean pass

    def train_step(state, inputs, labels):
        objective = optax_sam.Objective(apply_fn, inputs, labels, has_aux=True)
        (loss, logits), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
        updates, opt_state = tx.update(
            grads, state.opt_state, state.params, loss_fn=objective, logits=logits
        )
        return TrainState(optax.apply_updates(state.params, updates), opt_state), loss

    return train_step


def make_penalized_step(
    model: nn.Module, last_layer: str, coefficient: float, tx: optax.GradientTransformation
) -> Callable:
    """The training step of J-SAM's cheap stand-in: plain SGD with an L2 penalty in the loss."""
    apply_fn = capture_layer_input(model, last_layer)

    def train_step(state, inputs, labels):
        def loss_fn(params):
            logits, hidden = apply_fn(params, inputs)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean() + optax_sam.last_layer_penalty(
                hidden,
                params["params"][last_layer]["kernel"],
                activation_coefficient=coefficient,
                weight_coefficient=coefficient,
            )

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        return TrainState(optax.apply_updates(state.params, updates), opt_state), loss

    return train_step


def make_train_epoch(train_step: Callable, batch_size: int, compiled: bool) -> Callable:
    """``train_epoch(state, key, inputs, labels) -> (state, mean loss)``.

    Args:
      train_step: the training step.
      batch_size: examples per step; the incomplete last batch is left out.
      compiled: the whole epoch as one program, or a Python loop of jitted steps, since a CPU runs
        convolutions inside a compiled loop many times slower.

    Returns:
      The function; the key decides the order of the examples.
    """

    def batches_of(key, labels):
        count = labels.shape[0] // batch_size
        return jax.random.permutation(key, labels.shape[0])[: count * batch_size].reshape(count, -1)

    def step_on(state, batch, inputs, labels):
        return train_step(state, inputs[batch], labels[batch])

    @jax.jit
    def compiled_epoch(state, key, inputs, labels):
        state, losses = jax.lax.scan(
            lambda state, batch: step_on(state, batch, inputs, labels),
            state,
            batches_of(key, labels),
        )
        return state, losses.mean()

    jitted_batches, jitted_step = jax.jit(batches_of), jax.jit(step_on)

    def looped_epoch(state, key, inputs, labels):
        losses = []
        for batch in np.asarray(jitted_batches(key, labels)):
            state, loss = jitted_step(state, batch, inputs, labels)
            losses.append(loss)
        return state, jnp.stack(losses).mean()

    return compiled_epoch if compiled else looped_epoch


def evaluate(predictions, labels, changed, test_predictions, test_labels) -> dict[str, float]:
    """Measures robustness from the predicted classes.

    Args:
      predictions: of the training examples, shape ``(n,)``.
      labels: noisy training labels, shape ``(n,)``.
      changed: True where the training label is wrong, shape ``(n,)``.
      test_predictions: shape ``(m,)``.
      test_labels: shape ``(m,)``.

    Returns:
      ``test_accuracy``; ``clean_fit``, the share of the correct training labels that the network
      predicts; ``memorized``, the share of the wrong ones that it predicts. The share of no
      examples is NaN.
    """
    fitted = predictions == labels
    return {
        "test_accuracy": np.mean(test_predictions == test_labels),
        "clean_fit": fitted[~changed].mean() if not changed.all() else np.nan,
        "memorized": fitted[changed].mean() if changed.any() else np.nan,
    }


def compare(config: Config, data: Data) -> Iterator[Epoch]:
    """Trains all methods side by side, epoch by epoch.

    The methods take turns after every epoch, so a drift of the machine's speed meets all alike. At
    the same seed they share the initial weights, the wrong labels and the order of the data.

    Args:
      config: the settings.
      data: one noisy training set per seed.

    Yields:
      What each epoch of each method gave.
    """
    model = MODELS[config.model]()
    compiled = config.model == "mlp" or jax.default_backend() != "cpu"
    inputs, test_inputs = jnp.asarray(data.inputs), jnp.asarray(data.test_inputs)
    labels = jnp.asarray(data.labels)
    total_steps = config.epochs * (len(inputs) // config.batch_size)
    keys = [jax.random.key(seed) for seed in config.seeds]
    init = jax.jit(model.init)

    @jax.jit
    def predict(params, inputs):
        return model.apply(params, inputs).argmax(axis=-1)

    train_epochs, states = {}, {}
    for method in config.methods:
        tx = make_optimizer(method, config, total_steps)
        if METHODS[method].penalized:
            last_layer = LAST_LAYER[config.model]
            train_step = make_penalized_step(model, last_layer, config.rho_of(method), tx)
        else:
            train_step = make_train_step(model, tx)
        train_epochs[method] = make_train_epoch(train_step, config.batch_size, compiled)
        all_params = [init(key, inputs[:1]) for key in keys]
        states[method] = [TrainState(params, tx.init(params)) for params in all_params]
        # An epoch whose result is thrown away: no timed epoch contains compilation.
        train_epochs[method](states[method][0], keys[0], inputs, labels[0])

    for number in range(1, config.epochs + 1):
        for method in config.methods:
            start = time.perf_counter()
            results = [
                train_epochs[method](state, jax.random.fold_in(key, number), inputs, noisy)
                for state, key, noisy in zip(states[method], keys, labels, strict=True)
            ]
            jax.block_until_ready(results)
            seconds = time.perf_counter() - start
            states[method] = [state for state, _ in results]
            measures = [
                {"loss": float(loss)}
                | evaluate(
                    np.asarray(predict(state.params, inputs)),
                    data.labels[index],
                    data.changed[index],
                    np.asarray(predict(state.params, test_inputs)),
                    data.test_labels,
                )
                for index, (state, loss) in enumerate(results)
            ]
            yield Epoch(
                method,
                number,
                seconds,
                {name: np.array([one[name] for one in measures]) for name in measures[0]},
            )
