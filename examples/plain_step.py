"""The plain training step with a sharpness-aware method, on digits with wrong labels.

    python examples/plain_step.py
    python examples/plain_step.py --epochs 5

Two things differ from a step with `optax.sgd` alone: the method stands in front of it in the chain,
and `tx.update` receives the loss, which the method evaluates again at the perturbed parameters.
"""

import flax.linen as nn
import jax
import numpy as np
import optax
import tyro
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import optax_sam

model = nn.Sequential([nn.Dense(256), nn.relu, nn.Dense(256), nn.relu, nn.Dense(10)])
tx = optax.chain(optax_sam.saner(rho=0.3), optax.sgd(0.1))


@jax.jit
def train_step(params, opt_state, inputs, labels):
    objective = optax_sam.Objective(model.apply, inputs, labels)
    loss, grads = jax.value_and_grad(objective)(params)
    updates, opt_state = tx.update(grads, opt_state, params, loss_fn=objective)
    return optax.apply_updates(params, updates), opt_state, loss


@jax.jit
def accuracy(params, inputs, labels):
    return (model.apply(params, inputs).argmax(axis=-1) == labels).mean()


def main(epochs: int = 60, batch_size: int = 64, seed: int = 0) -> None:
    """Trains a network on digits, 40 % of whose training labels are wrong.

    Args:
      epochs: passes over the training set.
      batch_size: examples per step.
      seed: of the wrong labels, the initial weights and the order of the data.
    """
    inputs, labels = load_digits(return_X_y=True)
    inputs = ((inputs - inputs.mean()) / inputs.std()).astype(np.float32)
    inputs, test_inputs, labels, test_labels = train_test_split(
        inputs, labels, test_size=500, stratify=labels, random_state=0
    )
    if not 1 <= batch_size <= len(inputs):
        raise SystemExit(f"--batch-size: {batch_size} is not valid. It lies in [1, {len(inputs)}].")
    noisy = optax_sam.label_noise.symmetric(labels, rate=0.4, num_classes=10, seed=seed)

    params = model.init(jax.random.key(seed), inputs[:1])
    opt_state = tx.init(params)
    order = np.random.default_rng(seed)
    for epoch in range(1, epochs + 1):
        examples = order.permutation(len(inputs))
        for start in range(0, len(examples) - batch_size + 1, batch_size):
            batch = examples[start : start + batch_size]
            params, opt_state, loss = train_step(
                params, opt_state, inputs[batch], noisy.labels[batch]
            )
        test_accuracy = accuracy(params, test_inputs, test_labels)
        print(f"epoch {epoch:3}  loss {loss:.3f}  test accuracy {test_accuracy:.1%}")


if __name__ == "__main__":
    tyro.cli(main)
