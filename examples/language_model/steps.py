"""The training step, the loss of a text, and how sharp the minimum is."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import optax_sam
from optax_sam.diagnostics import largest_eigenvalue, sharpness

from .config import Config
from .data import Batch
from .devices import fetch, shardings, spread
from .model import ClassifierParam, Transformer


class TrainState(NamedTuple):
    """Everything that a run has to keep.

    Attributes:
      params: what is trained: the network, or its adapters and a classifier.
      frozen: the rest of the network.
      opt_state: of method and optimizer.
    """

    params: Any
    frozen: Any
    opt_state: optax.OptState


def _forward(config: Config, trained: nnx.filterlib.Filter, classes: int | None) -> Callable:
    """``forward(frozen, params, tokens) -> (logits, logits)``, the second for the method."""
    network = nnx.eval_shape(lambda: Transformer(config, nnx.Rngs(0), classes))
    graphdef, *_ = nnx.split(network, trained, ...)

    def forward(frozen, params, tokens):
        logits = nnx.merge(graphdef, params, frozen)(tokens)
        return logits, logits

    return forward


class Trainer:
    """The compiled functions of a run.

    Args:
      config: the settings.
      tx: method and optimizer.
      mesh: the devices.
      classes: of the texts; None for a language model.

    Attributes:
      like: the state's shapes and shardings, as ``jax.ShapeDtypeStruct``.
    """

    def __init__(
        self,
        config: Config,
        tx: optax.GradientTransformationExtraArgs,
        mesh: Mesh,
        classes: int | None = None,
    ):
        self.mesh = mesh
        adapters = nnx.Any(nnx.LoRAParam, ClassifierParam)
        trained = nnx.Param if config.adapter_rank is None else adapters
        in_float32 = dataclasses.replace(config, precision="float32")
        forward, wide = (_forward(settings, trained, classes) for settings in (config, in_float32))

        def initial_state(seed: jax.Array) -> TrainState:
            model = Transformer(config, nnx.Rngs(jax.random.key(seed)), classes)
            _, params, frozen = nnx.split(model, trained, ...)
            params, frozen = nnx.as_pure(params), nnx.as_pure(frozen)
            return TrainState(params, frozen, tx.init(params))

        def objective_of(
            state: TrainState, batch: Batch, forward: Callable = forward
        ) -> optax_sam.Objective:
            apply_fn = jax.tree_util.Partial(forward, state.frozen)
            return optax_sam.Objective(
                apply_fn, batch.inputs, batch.labels, weights=batch.weights, has_aux=True
            )

        def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, jax.Array]]:
            objective = objective_of(state, batch)
            (loss, logits), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
            updates, opt_state = tx.update(
                grads,
                state.opt_state,
                state.params,
                loss_fn=objective,
                logits=logits,  # spare Functional-SAM a forward pass
                second_moment=optax.tree.get(state.opt_state, "nu"),  # if it is preconditioned
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
        self._logits = self._compiled(
            lambda state, inputs: forward(state.frozen, state.params, inputs)[0],
            out_shardings=NamedSharding(mesh, PartitionSpec()),  # every process sees all of them
        )

        # In float32: the second derivative of a bfloat16 network is noise, and slow to compile.
        self._in_float32 = lambda state, batch: objective_of(state, batch, wide)

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

    def logits(self, state: TrainState, batches: list[Batch]) -> np.ndarray:
        """The logits of the batches, one behind the other."""
        found = [fetch(self._logits(state, spread(b.inputs, self.mesh))) for b in batches]
        return np.concatenate(found)

    def sharpness(
        self, state: TrainState, batch: Batch, rho: float, curvature: bool
    ) -> dict[str, float]:
        """How steeply the loss of a batch rises around the parameters; computed in float32.

        Args:
          state: where.
          batch: of text.
          rho: radius of SAM's perturbation.
          curvature: whether to find the eigenvalue.

        Returns:
          ``rise``: L(w + ε) − L(w) with SAM's ε; ``eigenvalue``: the largest one of the Hessian.
        """
        with jax.set_mesh(self.mesh):
            objective = self._in_float32(state, spread(batch, self.mesh))
            measured = {"rise": sharpness(optax_sam.sam(rho), objective, state.params).rise}
            if curvature:
                found = largest_eigenvalue(objective, state.params, steps=15)
                measured["eigenvalue"] = found.value
        return {name: float(value) for name, value in fetch(measured).items()}
