"""Trains several runs side by side in one compiled program, one epoch per call.

A *lane* is one run: its own radius, decay, learning rate, initial weights and order of the data. The
lanes of a program are vectorized, an epoch is one compiled loop, and the features stay as compact as
they are in the file: each batch is standardized when it is needed.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_sam

from . import networks
from .compensations import READINGS, strength_at
from .data import Features
from .losses import LOSSES
from .recipes import Knobs, Recipe

PREDICT_ROWS = 4096
ELR_MEMORY = 0.7


class Lane(NamedTuple):
    """One run: its settings and its seed, which fixes the initial weights and the order."""

    knobs: Knobs
    seed: int


class State(NamedTuple):
    """What training changes, every leaf with a leading axis of lanes.

    Attributes:
      params: the weights.
      opt_state: of the method and the momentum.
      average: of the weights, where the recipe asks for it.
      past: average of past predictions of every row, for ELR.
    """

    params: Any
    opt_state: Any
    average: Any
    past: Any

    @property
    def predictor(self) -> networks.Params:
        """The weights that predict."""
        predictor: networks.Params = self.params if self.average is None else self.average
        return predictor


class Table(NamedTuple):
    """The data on the device.

    Attributes:
      inputs: compact, shape ``(n, d)``.
      labels: int32, shape ``(n,)``, or float32 shares, shape ``(n, classes)``.
      mean, deviation: shape ``(d,)``.
    """

    inputs: jax.Array
    labels: jax.Array
    mean: jax.Array
    deviation: jax.Array


def standardize(inputs: jax.Array, mean: jax.Array, deviation: jax.Array) -> jax.Array:
    """Columns with mean 0 and deviation 1."""
    return (inputs.astype(jnp.float32) - mean) / deviation


def _optimizer(
    recipe: Recipe, rho: Any, decay: Any, strength: Any
) -> optax.GradientTransformationExtraArgs:
    return optax.with_extra_args_support(
        optax.chain(
            recipe.build(rho, strength),
            optax.add_decayed_weights(decay),
            optax.trace(recipe.momentum),
        )
    )


def _init(recipe: Recipe, knobs: Knobs, seeds: list[int], data: Features) -> State:
    features, rows = data.inputs.shape[1], len(data.inputs)
    lanes = [
        networks.init(seed, recipe.head, features, recipe.hidden, data.num_classes)
        for seed in seeds
    ]
    params = jax.tree.map(lambda *leaves: jnp.stack(leaves), *lanes)
    opt_state = jax.vmap(lambda p, k: _optimizer(recipe, k.rho, k.decay, k.strength).init(p))(
        params, knobs
    )
    past, average = None, None
    if recipe.loss == "elr":
        past = jnp.full((len(seeds), rows, data.num_classes), 1 / data.num_classes)
    if recipe.weight_average:
        average = params
    # No buffer twice: all are donated.
    return State(*jax.tree.map(jnp.array, (params, opt_state, average, past)))


def rate_left(recipe: Recipe, progress: Any) -> Any:
    """The share of the first learning rate that is left at a progress in [0, 1)."""
    if recipe.step_decay:
        return jnp.where(progress < 0.5, 1.0, jnp.where(progress < 0.75, 0.1, 0.01))
    return 0.5 * (1 + jnp.cos(jnp.pi * progress))


@functools.cache
def _epoch_program(recipe: Recipe, classes: int) -> Callable[..., Any]:
    """``epoch(state, knobs, seeds, table, order, clock) -> (state, mean loss)`` of all lanes.

    ``order`` has shape ``(lanes, steps, batch)``, of which ``clock[1]`` steps are done; ``clock`` is
    (first step, steps, all steps). A dynamic number of steps keeps subsets in one program.
    """

    def step(
        state: State,
        knobs: Knobs,
        seed: jax.Array,
        table: Table,
        rows: jax.Array,
        now: jax.Array,
        total: jax.Array,
    ) -> tuple[State, jax.Array]:
        key = jax.random.fold_in(jax.random.key(seed), now)
        inputs = standardize(table.inputs[rows], table.mean, table.deviation)
        labels = table.labels[rows]
        if not recipe.integer_labels and labels.ndim == 1:
            labels = jax.nn.one_hot(labels, classes)
        if recipe.mixup:
            weight_key, pair_key, key = jax.random.split(key, 3)
            weight = jax.random.beta(weight_key, knobs.strength, knobs.strength)
            pair = jax.random.permutation(pair_key, len(rows))
            inputs = weight * inputs + (1 - weight) * inputs[pair]
            labels = weight * labels + (1 - weight) * labels[pair]
        apply_fn = functools.partial(networks.apply, dropout=recipe.dropout, key=key)
        past = state.past
        if past is not None:
            p = jax.nn.softmax(apply_fn(state.params, inputs))
            past = past.at[rows].set(ELR_MEMORY * past[rows] + (1 - ELR_MEMORY) * p)
            labels = jnp.concatenate([labels, past[rows]], axis=-1)
        if labels.ndim == 1:
            loss_fn = optax.softmax_cross_entropy_with_integer_labels
        else:
            loss_fn = LOSSES[recipe.loss].build(knobs.strength)
        objective = optax_sam.Objective(apply_fn, inputs, labels, loss_fn)

        def penalized(params: networks.Params) -> jax.Array:
            if not recipe.penalty:
                return objective(params)
            return objective(params) + optax_sam.last_layer_penalty(
                networks.last_inputs(params, inputs),
                params["kernel"],
                activation_coefficient=knobs.strength,
                weight_coefficient=knobs.strength,
            )

        loss, grads = jax.value_and_grad(penalized)(state.params)
        progress = now / total
        rho = jnp.where(progress < recipe.start, 0.0, knobs.rho)
        strength = knobs.strength
        if recipe.reading is not None:
            strength = strength_at(READINGS[recipe.reading], strength, progress)
        updates, opt_state = _optimizer(recipe, rho, knobs.decay, strength).update(
            grads, state.opt_state, state.params, loss_fn=objective
        )
        rate = knobs.rate * rate_left(recipe, progress)
        params = jax.tree.map(lambda p, u: p - rate * u, state.params, updates)
        average = state.average
        if average is not None:
            decay = jnp.minimum(recipe.weight_average or 0.0, (1 + now) / (10 + now))
            average = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, params)
        return State(params, opt_state, average, past), loss

    lanes = jax.vmap(step, in_axes=(0, 0, 0, None, 0, None, None))

    @functools.partial(jax.jit, donate_argnums=0)
    def epoch(
        state: State,
        knobs: Knobs,
        seeds: jax.Array,
        table: Table,
        order: jax.Array,
        clock: jax.Array,
    ) -> tuple[State, jax.Array]:
        first, steps, total = clock

        def body(i: jax.Array, carry: tuple[State, jax.Array]) -> tuple[State, jax.Array]:
            state, sums = carry
            state, losses = lanes(state, knobs, seeds, table, order[:, i], first + i, total)
            return state, sums + losses

        state, sums = jax.lax.fori_loop(0, steps, body, (state, jnp.zeros(len(seeds))))
        return state, sums / steps

    return epoch


@jax.jit
def _logits(
    params: networks.Params, inputs: jax.Array, mean: jax.Array, deviation: jax.Array
) -> jax.Array:
    inputs = standardize(inputs, mean, deviation)
    return jax.vmap(networks.apply, in_axes=(0, None))(params, inputs)


def predict(
    params: Mapping[str, Any], inputs: np.ndarray, mean: np.ndarray, deviation: np.ndarray
) -> np.ndarray:
    """Logits of all lanes, in blocks of rows.

    Args:
      params: with a leading axis of lanes.
      inputs: compact, shape ``(n, d)``.
      mean: of the columns that were trained on, shape ``(d,)``.
      deviation: likewise.

    Returns:
      float32, shape ``(lanes, n, classes)``.
    """
    blocks = []
    size = min(PREDICT_ROWS, len(inputs))
    for start in range(0, len(inputs), size):
        block = inputs[start : start + size]
        padded = np.pad(block, ((0, size - len(block)), (0, 0)))
        blocks.append(np.asarray(_logits(params, padded, mean, deviation))[:, : len(block)])
    return np.concatenate(blocks, axis=1)


def predicted(logits: np.ndarray) -> np.ndarray:
    """The class with the largest logit; -1, no class, where a network that diverged has none."""
    classes: np.ndarray = np.where(np.isfinite(logits).all(axis=-1), logits.argmax(axis=-1), -1)
    return classes


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Softmax over the last axis."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    shares: np.ndarray = powers / powers.sum(axis=-1, keepdims=True)
    return shares


class Trainer:
    """Trains lanes on (parts of) one data set.

    Args:
      data: the data set.
      labels: what is trained on: int32, shape ``(n,)``, or shares, shape ``(n, classes)``.
      batch_size: examples per step; the incomplete last batch of an epoch is left out.
    """

    def __init__(self, data: Features, labels: np.ndarray, batch_size: int):
        self.data = data
        self.batch_size = min(batch_size, len(labels))
        self._table = Table(*map(jnp.asarray, (data.inputs, labels, data.mean, data.deviation)))

    def epochs(
        self, recipe: Recipe, lanes: list[Lane], rows: np.ndarray, epochs: int
    ) -> Iterator[tuple[State, np.ndarray]]:
        """Trains; yields the state and the mean loss of every lane after each epoch.

        The state that was yielded is used up when the next one is asked for.
        """
        columns = zip(*(lane.knobs for lane in lanes), strict=True)
        knobs = Knobs(*(jnp.asarray(column, jnp.float32) for column in columns))
        state = _init(recipe, knobs, [lane.seed for lane in lanes], self.data)
        seeds = jnp.asarray([lane.seed for lane in lanes], jnp.uint32)
        program = _epoch_program(recipe, self.data.num_classes)
        size = len(self.data.labels)
        batch = min(self.batch_size, len(rows))
        steps = len(rows) // batch
        order = np.zeros((len(lanes), size // batch, batch), np.int32)
        for epoch in range(epochs):
            for index, lane in enumerate(lanes):
                shuffled = np.random.default_rng([lane.seed, epoch]).permutation(rows)
                order[index, :steps] = shuffled[: steps * batch].reshape(steps, batch)
            clock = jnp.array([epoch * steps, steps, epochs * steps])
            state, losses = program(state, knobs, seeds, self._table, order, clock)
            yield state, np.asarray(losses)

    def predict(self, state: State, inputs: np.ndarray) -> np.ndarray:
        """Logits of all lanes, shape ``(lanes, n, classes)``."""
        return predict(state.predictor, inputs, self.data.mean, self.data.deviation)
