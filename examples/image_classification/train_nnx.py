"""The same training in Flax nnx, on one page: what changes is the training step.

    python -m examples.image_classification.train_nnx
    python -m examples.image_classification.train_nnx --data DIR --method jsam --epochs 30

It takes the data, the methods and the optimizer of train.py. A small network with batch normalization
stands for any nnx model; checkpoints, logs and several devices are train.py's business.
"""

import dataclasses
import itertools
import sys

import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx

import optax_sam.nnx

from .config import Config
from .data import load, mean_and_deviation, noisy_labels, normalize, subset
from .presets import PRESETS
from .train import make_optimizer

# Layer normalization would allow any width and group size: the limits of others are not this page's.
DEFAULTS = dataclasses.replace(PRESETS["digits"][1], width=16, norm="layer")
CHUNK = 1000
ELSEWHERE = (
    *("augmentation", "data_on", "model", "norm", "depth", "precision"),
    *("held_out", "group_size", "parallel", "perturbation", "epoch_loop"),
    *("evaluate_every", "output", "resume", "checkpoint_every", "keep_checkpoints"),
)
"""Settings of train.py that mean nothing here."""


class CNN(nnx.Module):
    """Three 3 × 3 convolutions, each with batch normalization and pooling."""

    def __init__(self, channels: int, width: int, num_classes: int, rngs: nnx.Rngs):
        sizes = [channels, width, 2 * width, 4 * width]
        self.convolutions = nnx.List(
            nnx.Conv(before, after, (3, 3), use_bias=False, rngs=rngs)
            for before, after in itertools.pairwise(sizes)
        )
        self.norms = nnx.List(nnx.BatchNorm(size, momentum=0.9, rngs=rngs) for size in sizes[1:])
        self.head = nnx.Linear(sizes[-1], num_classes, rngs=rngs)

    def __call__(self, x):
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = nnx.relu(norm(convolution(x)))
            if min(x.shape[1:3]) >= 2:
                x = nnx.max_pool(x, (2, 2), (2, 2))
        return self.head(x.mean(axis=(1, 2)))


def loss_of(model, images, labels):
    """The mean cross-entropy."""
    return optax.softmax_cross_entropy_with_integer_labels(model(images), labels).mean()


@nnx.jit
def train_step(model, optimizer, images, labels):
    """One step of any method: the clean pass alone changes the batch statistics."""
    objective = optax_sam.nnx.objective(model, images, labels)  # a snapshot, so before that pass
    loss, grads = nnx.value_and_grad(loss_of)(model, images, labels)
    optimizer.update(model, grads, loss_fn=objective)
    return loss


@nnx.jit
def predict(model, images):
    """The classes."""
    return model(images).argmax(axis=-1)


def predictions(model, images):
    """The classes, in chunks."""
    chunks = range(0, len(images), CHUNK)
    return np.concatenate([predict(model, images[start : start + CHUNK]) for start in chunks])


def main(config: Config) -> float:
    """Trains, prints a line per epoch and returns the last test accuracy."""
    for name in ELSEWHERE:
        if getattr(config, name) != getattr(DEFAULTS, name):
            flag = "--" + name.replace("_", "-")
            raise ValueError(f"{flag} has no effect on this page: leave it out, or run train.py.")
    data = load(config.data, config.human_labels)
    if config.subset is not None:
        data = subset(data, config.subset, config.seed)
    noisy = noisy_labels(data, config.noise, config.noise_rate, config.seed)
    moments = mean_and_deviation(data.images)
    images, test_images = (normalize(x, *moments) for x in (data.images, data.test_images))
    steps = len(images) // config.batch_size
    if not steps:
        raise ValueError(f"--batch-size: {config.batch_size} is more than {len(images)} examples.")

    model = CNN(images.shape[-1], config.width, data.num_classes, nnx.Rngs(config.seed))
    wrong = float(noisy.changed.mean())
    tx = make_optimizer(config, steps, None, wrong)  # one device
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    order = np.random.default_rng(config.seed)
    accuracy = 0.0
    for epoch in range(1, config.epochs + 1):
        model.train()
        batches = order.permutation(len(images))[: steps * config.batch_size].reshape(steps, -1)
        losses = [
            train_step(model, optimizer, images[batch], jnp.asarray(noisy.labels[batch]))
            for batch in batches
        ]
        model.eval()
        accuracy = np.mean(predictions(model, test_images) == data.test_labels)
        fitted = predictions(model, images) == noisy.labels
        memorized = 100 * fitted[noisy.changed].mean() if noisy.changed.any() else np.nan
        print(
            f"epoch {epoch}  loss {np.mean(losses):.3f}  test {100 * accuracy:.1f} %  "
            f"memorized {memorized:.1f} %"
        )
    return float(accuracy)


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, default=DEFAULTS, description=__doc__))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
