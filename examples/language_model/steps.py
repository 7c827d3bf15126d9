"""The training step, the loss of a text, and how sharp the minimum is."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

import optax_sam

from .config import Config
from .data import Batch
from .devices import fetch, shardings, spread
from .model import Transformer

POWER_ITERATIONS = 10
DIFFERENCE = 0.01
"""Half the distance between the two gradients whose difference is a product with the Hessian."""


class TrainState(NamedTuple):
    """Everything that a run has to keep.

    Attributes:
      params: what is trained: the network, or its adapters.
      frozen: the rest of the network.
      opt_state: of method and optimizer.
    """

    params: Any
    frozen: Any
    opt_state: optax.OptState


class Trainer:
    """The compiled functions of a run.

    Args:
      config: the settings.
      tx: method and optimizer.
      mesh: the devices.

    Attributes:
      like: the state's shapes and shardings, as ``jax.ShapeDtypeStruct``.
    """

    def __init__(self, config: Config, tx: optax.GradientTransformationExtraArgs, mesh: Mesh):
        self.mesh = mesh
        trained = nnx.Param if config.adapter_rank is None else nnx.LoRAParam
        in_float32 = dataclasses.replace(config, precision="float32")
        graphdef, wide = (
            nnx.split(nnx.eval_shape(lambda c=c: Transformer(c, nnx.Rngs(0))), trained, ...)[0]
            for c in (config, in_float32)
        )

        def initial_state(seed: jax.Array) -> TrainState:
            model = Transformer(config, nnx.Rngs(jax.random.key(seed)))
            _, params, frozen = nnx.split(model, trained, ...)
            params, frozen = nnx.as_pure(params), nnx.as_pure(frozen)
            return TrainState(params, frozen, tx.init(params))

        def forward(graphdef, frozen, params, tokens):
            logits = nnx.merge(graphdef, params, frozen)(tokens)
            return logits, logits

        def objective_of(
            state: TrainState, batch: Batch, graphdef: Any = graphdef
        ) -> optax_sam.Objective:
            apply_fn = jax.tree_util.Partial(functools.partial(forward, graphdef), state.frozen)
            return optax_sam.Objective(
                apply_fn, batch.inputs, batch.labels, weights=batch.weights, has_aux=True
            )

        def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
            objective = objective_of(state, batch)
            (loss, logits), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
            updates, opt_state = tx.update(
                grads, state.opt_state, state.params, loss_fn=objective, logits=logits
            )
            params = optax.apply_updates(state.params, updates)
            metrics = {"loss": loss, "gradient_norm": optax.tree.norm(grads)}
            return TrainState(params, state.frozen, opt_state), metrics

        def loss_and_weight(state: TrainState, batch: Batch) -> tuple[jax.Array, jax.Array]:
            objective = objective_of(state, batch)
            return objective(state.params)[0], objective.total_weight

        shapes = jax.eval_shape(initial_state, 0)
        cut = shardings(shapes, mesh)
        self.like = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            shapes,
            cut,
        )
        self.initial_state = self._compiled(initial_state, out_shardings=cut)
        self.step = self._compiled(train_step, out_shardings=(cut, None), donate_argnums=0)
        self._loss_and_weight = self._compiled(loss_and_weight)

        def along(state: TrainState, batch: Batch, direction: Any, lengths: jax.Array) -> Any:
            objective = objective_of(state, batch, wide)
            norm = optax.tree.norm(direction)

            def at(length):
                params = optax.tree.add_scale(state.params, length / norm, direction)
                return jax.value_and_grad(lambda params: objective(params)[0])(params)

            losses, gradients = jax.lax.map(at, lengths)
            first = jax.tree.map(lambda g: g[0], gradients)
            difference = jax.tree.map(lambda g: g[0] - g[1], gradients)
            return losses, norm, first, difference

        self._along = self._compiled(along)

    def _compiled(self, function: Callable, **options: Any) -> Callable:
        """The function, traced and run with the mesh that the network's activations are cut over."""
        compiled = jax.jit(function, **options)

        def run(*arguments):
            with jax.set_mesh(self.mesh):
                return compiled(*arguments)

        return run

    def loss(self, state: TrainState, batches: list[Batch]) -> float:
        """The mean loss of all bytes of the batches, in nats per byte."""
        pairs = [fetch(self._loss_and_weight(state, spread(batch, self.mesh))) for batch in batches]
        return float(sum(loss * weight for loss, weight in pairs) / sum(w for _, w in pairs))

    def sharpness(self, state: TrainState, batch: Batch, radius: float) -> dict[str, float]:
        """How steeply the loss of a batch rises around the parameters; computed in float32.

        Args:
          state: where.
          batch: of text.
          radius: how far to climb.

        Returns:
          ``rise``: L(w + ε) − L(w) with SAM's ε of length ``radius`` along the gradient.
          ``eigenvalue``: the largest absolute value of an eigenvalue of the Hessian, by the power
          method on central differences of the gradient.
        """
        batch = spread(batch, self.mesh)
        zeros, both = jnp.zeros(2), jnp.array([DIFFERENCE, -DIFFERENCE])
        _, _, gradient, _ = self._along(state, batch, state.params, zeros)
        losses, _, _, vector = self._along(state, batch, gradient, zeros.at[0].set(radius))
        for _ in range(POWER_ITERATIONS):
            _, norm, _, vector = self._along(state, batch, vector, both)
        losses, norm = fetch((losses, norm))
        return {
            "rise": float(losses[0] - losses[1]),
            "eigenvalue": float(norm) / (2 * DIFFERENCE),
        }
