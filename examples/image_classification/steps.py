"""The training step, the epoch, and the evaluation."""

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_sam
from optax_sam.diagnostics import coordinate_shares

from .config import Config
from .data import augment, draw, normalize
from .devices import Devices, mean, to_varying


class TrainState(NamedTuple):
    """What a training step changes."""

    params: Any
    batch_stats: Any
    opt_state: optax.OptState


class Source(NamedTuple):
    """What the steps of an epoch draw their batches from.

    Attributes:
      images: uint8, shape ``(n, height, width, channels)``.
      labels: int32, shape ``(n,)``, noisy.
      mean: float32, shape ``(channels,)``, of the training images.
      deviation: likewise.
    """

    images: Any
    labels: Any
    mean: Any
    deviation: Any


def make_train_step(
    model: nn.Module,
    tx: optax.GradientTransformationExtraArgs,
    axis_name: str | None,
    local_perturbation: bool,
) -> Callable:
    """``train_step(state, images, labels) -> (state, metrics)``, the same for every method.

    Args:
      model: the network; ``model.apply`` takes ``training=``.
      tx: method and optimizer.
      axis_name: the mapped axis, if the step sees one device's share of the batch only.
      local_perturbation: hand the method each device's own gradients, so that each climbs its own
        loss; the method averages what it returns.

    Returns:
      The step; the metrics are averages over the whole batch.
    """

    def forward(batch_stats, params, images):
        variables = {"params": params, "batch_stats": batch_stats}
        logits, updated = model.apply(variables, images, training=True, mutable=["batch_stats"])
        return logits, (logits, updated.get("batch_stats", {}))

    def train_step(state, images, labels):
        apply_fn = jax.tree_util.Partial(forward, state.batch_stats)
        objective = optax_sam.Objective(apply_fn, images, labels, has_aux=True)
        gradient = jax.value_and_grad(objective, has_aux=True)
        (loss, (logits, batch_stats)), grads = gradient(to_varying(state.params, axis_name))
        if not local_perturbation:
            grads = mean(grads, axis_name)
        updates, opt_state = tx.update(
            grads, state.opt_state, state.params, loss_fn=objective, logits=logits
        )
        if local_perturbation:  # else the network has averaged them itself
            batch_stats = mean(batch_stats, axis_name)
        accuracy = (logits.argmax(axis=-1) == labels).mean()
        metrics = mean({"loss": loss, "train_accuracy": accuracy}, axis_name)
        fraction = optax.tree.get(opt_state, "down_weighted_fraction")
        if fraction is not None:
            metrics["down_weighted"] = fraction
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, batch_stats, opt_state), metrics

    return train_step


class Epochs:
    """Runs epochs of a training step, as one program or as a loop of compiled steps.

    The order of the data and the augmentation are functions of the seed, the epoch and the step, so
    there is no generator whose state could be lost.

    Attributes:
      input_seconds: time that the last epoch spent on preparing batches outside of the device.
      traces: how often the step has been traced; it grows with every recompilation.
    """

    def __init__(self, config: Config, data: Source, devices: Devices, train_step: Callable):
        kinds, seed, batch_size = config.augmentation, config.seed, config.batch_size

        def step(state, source, indices, epoch, number):
            self.traces += 1
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), epoch), number)
            draws = draw(key, batch_size, kinds, source.images.shape[1:3])  # of the whole batch
            indices, draws = devices.share((indices, draws))
            images = normalize(source.images[indices], source.mean, source.deviation)
            return train_step(state, augment(images, draws, kinds), source.labels[indices])

        def epoch(state, source, batches, epoch):
            def one(state, numbered):
                number, indices = numbered
                return step(state, source, indices, epoch, number)

            numbers = jnp.arange(batches.shape[0], dtype=jnp.int32)
            if jax.default_backend() == "cpu":  # where convolutions in a loop are slow as they are
                return jax.lax.scan(
                    optax_sam.canonical_convolutions(one), state, (numbers, batches)
                )
            return jax.lax.scan(one, state, (numbers, batches))

        self._step, self._epoch = devices.spread(step), devices.spread(epoch)
        self._seed, self._batch_size, self._devices = seed, batch_size, devices
        self._on_host = config.data_on == "host"
        self._data = data if self._on_host else devices.replicate(data)
        loop = config.epoch_loop
        if loop == "auto":
            loop = "python" if jax.default_backend() == "cpu" or self._on_host else "compiled"
        self._compiled = loop == "compiled"
        self._count = len(data.labels)
        self.input_seconds = 0.0
        self.traces = 0

    def batches(self, epoch: int) -> np.ndarray:
        """Indices of the examples of every step, shape ``(steps, batch_size)``."""
        order = np.random.default_rng([self._seed, epoch]).permutation(self._count)
        steps = self._count // self._batch_size
        return order[: steps * self._batch_size].astype(np.int32).reshape(steps, -1)

    def run(self, state: TrainState, epoch: int) -> Iterator[tuple[TrainState, dict]]:
        """Trains for an epoch, whose number begins at 1; the given state is used up.

        Yields:
          The new state and the metrics, after every step or, compiled, once after the last with a
          leading axis of steps.
        """
        self.input_seconds = 0.0
        epoch = np.int32(epoch)
        if self._compiled:
            yield self._epoch(state, self._data, self.batches(epoch), epoch)
            return
        for number, indices in enumerate(self.batches(epoch)):
            start = time.perf_counter()
            source = self._data
            if self._on_host:
                batch = Source(source.images[indices], source.labels[indices], *source[2:])
                source, indices = (
                    self._devices.replicate(batch),
                    np.arange(len(indices), dtype=np.int32),
                )
            self.input_seconds += time.perf_counter() - start
            state, metrics = self._step(state, source, indices, epoch, np.int32(number))
            yield state, metrics


class Evaluator:
    """The network's predictions on fixed images, in inference mode, in chunks of one size."""

    def __init__(self, model: nn.Module, devices: Devices, data: Source, on_host: bool):
        def predict(state, images):
            variables = {"params": state.params, "batch_stats": state.batch_stats}
            images = normalize(images, data.mean, data.deviation)
            return model.apply(variables, images, training=False).argmax(axis=-1)

        self._predict = devices.evaluated(predict)
        self._devices = devices
        self._on_host = on_host
        self._chunk = -(-1000 // devices.count) * devices.count  # every device gets the same share

    def chunks(self, images: np.ndarray) -> list[Any]:
        """Cuts images up for :meth:`predictions`; the last chunk is filled up.

        They wait on the devices, if the training images do.
        """
        size = min(self._chunk, -(-len(images) // self._devices.count) * self._devices.count)
        missing = -len(images) % size
        filled = images
        if missing:
            filled = np.concatenate([images, images[np.arange(missing) % len(images)]])
        return [
            filled[start : start + size]
            if self._on_host
            else self._devices.spread_images(filled[start : start + size])
            for start in range(0, len(filled), size)
        ]

    def predictions(self, state: TrainState, chunks: list[Any], count: int) -> np.ndarray:
        """The predicted classes of the first ``count`` images, int32, shape ``(count,)``."""
        state = self._devices.for_evaluation(state)
        if self._on_host:
            chunks = map(self._devices.spread_images, chunks)
        predicted = [self._predict(state, chunk) for chunk in chunks]
        return np.concatenate([np.asarray(p.addressable_data(0)) for p in predicted])[:count]


def make_coordinate_probe(model: nn.Module, devices: Devices, data: Source, rho: float) -> Callable:
    """``probe(state, images, labels)``: the shares of the SANER paper's sets of coordinates.

    r = g'/g with the gradient g of the probe's batch and g' at SAM's perturbed point: A is r ≥ 1, B,
    which SANER down-weights, 0 < r < 1, and C the rest.
    """
    climb = optax_sam.normalized(rho)

    def probe(state, images, labels):
        def loss_fn(params):
            variables = {"params": params, "batch_stats": state.batch_stats}
            x = normalize(images, data.mean, data.deviation)
            logits, _ = model.apply(variables, x, training=True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        clean = jax.grad(loss_fn)(state.params)
        perturbation, _ = climb.update(clean, climb.init(state.params))
        _, perturbed = optax_sam.perturb_then_evaluate(loss_fn, state.params, perturbation)
        return coordinate_shares(clean, perturbed)._asdict()

    return jax.jit(probe)
