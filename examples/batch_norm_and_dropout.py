"""Flax Linen with BatchNorm and dropout, trained with J-SAM on digits with wrong labels.

    python examples/batch_norm_and_dropout.py
    python examples/batch_norm_and_dropout.py --epochs 5

Three rules, all of them in `forward` and `train_step`:

* The new batch statistics and the loss come from the clean pass, the step's own `value_and_grad`.
  The method discards those of the perturbed pass.
* Both passes use the same dropout mask: the objective carries one key per step.
* `jax.tree_util.Partial` binds what varies from step to step (statistics, key) to the forward pass,
  so that the objective stays a function of the parameters and the inputs.

The clean pass also hands its logits on: J-SAM needs them, and they spare it a forward pass.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
import optax
import tyro
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import optax_sam


class Network(nn.Module):
    """Two hidden layers of 256 units with batch normalization and dropout."""

    @nn.compact
    def __call__(self, x, training: bool):
        for _ in range(2):
            x = nn.Dense(256, use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not training, momentum=0.9)(x))
            x = nn.Dropout(0.2, deterministic=not training)(x)
        return nn.Dense(10)(x)


class TrainState(NamedTuple):
    """What a training step changes."""

    params: Any
    batch_stats: Any
    opt_state: optax.OptState


model = Network()
tx = optax.chain(optax_sam.jsam(rho=0.2), optax.sgd(0.1))


def forward(batch_stats, dropout_key, params, inputs):
    logits, updated = model.apply(
        {"params": params, "batch_stats": batch_stats},
        inputs,
        training=True,
        rngs={"dropout": dropout_key},
        mutable=["batch_stats"],
    )
    return logits, (logits, updated["batch_stats"])


@jax.jit
def train_step(state, dropout_key, inputs, labels):
    apply_fn = jax.tree_util.Partial(forward, state.batch_stats, dropout_key)
    objective = optax_sam.Objective(apply_fn, inputs, labels, has_aux=True)
    (loss, aux), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
    logits, batch_stats = aux
    updates, opt_state = tx.update(
        grads, state.opt_state, state.params, loss_fn=objective, logits=logits
    )
    return TrainState(optax.apply_updates(state.params, updates), batch_stats, opt_state), loss


@jax.jit
def accuracy(state, inputs, labels):
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    return (model.apply(variables, inputs, training=False).argmax(axis=-1) == labels).mean()


def main(epochs: int = 30, batch_size: int = 64, seed: int = 0) -> None:
    """Trains a network on digits, 40 % of whose training labels are wrong.

    Args:
      epochs: passes over the training set.
      batch_size: examples per step.
      seed: of the wrong labels, the initial weights, the dropout masks and the order of the data.
    """
    inputs, labels = load_digits(return_X_y=True)
    inputs = ((inputs - inputs.mean()) / inputs.std()).astype(np.float32)
    inputs, test_inputs, labels, test_labels = train_test_split(
        inputs, labels, test_size=500, stratify=labels, random_state=0
    )
    if not 1 <= batch_size <= len(inputs):
        raise SystemExit(f"--batch-size: {batch_size} is not valid. It lies in [1, {len(inputs)}].")
    noisy = optax_sam.label_noise.symmetric(labels, rate=0.4, num_classes=10, seed=seed)

    init_key, dropout_key = jax.random.split(jax.random.key(seed))
    variables = model.init(init_key, inputs[:1], training=False)
    state = TrainState(variables["params"], variables["batch_stats"], tx.init(variables["params"]))
    order = np.random.default_rng(seed)
    step = 0
    for epoch in range(1, epochs + 1):
        examples = order.permutation(len(inputs))
        for start in range(0, len(examples) - batch_size + 1, batch_size):
            batch = examples[start : start + batch_size]
            state, loss = train_step(
                state, jax.random.fold_in(dropout_key, step), inputs[batch], noisy.labels[batch]
            )
            step += 1
        test_accuracy = accuracy(state, test_inputs, test_labels)
        print(f"epoch {epoch:3}  loss {loss:.3f}  test accuracy {test_accuracy:.1%}")


if __name__ == "__main__":
    tyro.cli(main)
