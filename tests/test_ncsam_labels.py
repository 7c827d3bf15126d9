"""NCSAM with labels that are no plain class numbers, and with weights: g* by hand."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_sam
from optax_sam import Objective
from tests.problems import apply_mlp, examples, mlp_parameters

STRENGTH = 0.7
CHOSEN = 4  # half of eight


def class_losses(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def of_dictionary(logits, labels):
    """Class numbers and a target of another kind beside them."""
    return class_losses(logits, labels["class"]) + (logits[:, 0] - labels["value"]) ** 2


def of_two(logits, labels):
    """Two candidates for the classes."""
    return class_losses(logits, labels["fine"]) + 0.1 * labels["source"].astype(logits.dtype)


INPUTS, CLASSES = examples()
VALUES = jnp.linspace(-1, 1, 8)
WEIGHTS = jnp.array([0.0, 1.0, 2.0, 0.5, 1.0, 3.0, 0.25, 1.0])
SOFT = 0.8 * jax.nn.one_hot(CLASSES, 3) + 0.2 / 3

# name: (objective, NCSAM's options, the flipped objective of chosen examples with new classes)
CASES = {
    "soft": (
        Objective(apply_mlp, INPUTS, SOFT, optax.softmax_cross_entropy),
        {},
        lambda i, c: Objective(
            apply_mlp, INPUTS[i], jax.nn.one_hot(c, 3), optax.softmax_cross_entropy
        ),
    ),
    "pytree": (
        Objective(apply_mlp, INPUTS, {"class": CLASSES, "value": VALUES}, of_dictionary),
        {},
        lambda i, c: Objective(
            apply_mlp, INPUTS[i], {"class": c, "value": VALUES[i]}, of_dictionary
        ),
    ),
    "named": (
        Objective(apply_mlp, INPUTS, {"fine": CLASSES, "source": CLASSES % 2}, of_two),
        {"label_of": lambda labels: labels["fine"]},
        lambda i, c: Objective(apply_mlp, INPUTS[i], {"fine": c, "source": CLASSES[i] % 2}, of_two),
    ),
    "weighted": (
        Objective(apply_mlp, INPUTS, CLASSES, weights=WEIGHTS),
        {},
        lambda i, c: Objective(apply_mlp, INPUTS[i], c, weights=WEIGHTS[i]),
    ),
    "penalty": (
        Objective(apply_mlp, INPUTS, CLASSES, penalty=lambda p: jnp.sum(p["first"] ** 2)),
        {},
        lambda i, c: Objective(
            apply_mlp, INPUTS[i], c
        ),  # g* is about labels, not about the penalty
    ),
    "microbatches": (
        Objective(apply_mlp, INPUTS, CLASSES, microbatch_size=2),
        {},
        lambda i, c: Objective(apply_mlp, INPUTS[i], c),
    ),
}


def compensation_by_hand(flipped):
    """s g*: the gradient on the examples with the smallest gaps and their likeliest other class."""
    params = mlp_parameters()
    logits = np.asarray(apply_mlp(params, INPUTS))
    gaps = np.sort(logits)[:, -1] - np.sort(logits)[:, -2]
    chosen = np.argsort(gaps, kind="stable")[:CHOSEN]
    classes = []
    for i in chosen:
        others = [c for c in range(3) if c != int(CLASSES[i])]
        classes.append(max(others, key=lambda c, i=i: logits[i, c]))
    gradient = jax.grad(flipped(chosen, jnp.array(classes)))(params)
    return jax.tree.map(lambda g: STRENGTH * g, gradient)


@pytest.mark.parametrize(
    ("give_logits", "by_weights"), [(False, False), (True, False), (True, True)]
)
@pytest.mark.parametrize("name", CASES)
def test_the_compensation_is_that_of_flipped_labels(name, give_logits, by_weights):
    objective, options, flipped = CASES[name]
    options = options | {"deterministic": True, "by_weights": by_weights}
    stage = optax_sam.add_noise_compensation(STRENGTH, 0.5, **options)
    params = mlp_parameters()
    zeros = jax.tree.map(jnp.zeros_like, params)
    logits = apply_mlp(params, INPUTS) if give_logits else None
    actual, _ = stage.update(zeros, stage.init(params), params, loss_fn=objective, logits=logits)
    chex.assert_trees_all_close(actual, compensation_by_hand(flipped), rtol=1e-4, atol=1e-6)


def test_a_compiled_step_closes_over_numpy_data():
    """NumPy's labels have 64 bits, and NumPy cannot take indices that are traced."""
    objective = Objective(apply_mlp, np.asarray(INPUTS), np.asarray(CLASSES, np.int64))
    stage = optax_sam.add_noise_compensation(STRENGTH, 0.5, deterministic=True)
    params = mlp_parameters()

    @jax.jit
    def compensation(params):
        zeros = jax.tree.map(jnp.zeros_like, params)
        return stage.update(zeros, stage.init(params), params, loss_fn=objective)[0]

    expected = compensation_by_hand(lambda i, c: Objective(apply_mlp, INPUTS[i], c))
    chex.assert_trees_all_close(compensation(params), expected, rtol=1e-4, atol=1e-6)


def test_a_method_takes_label_of():
    objective, options, flipped = CASES["named"]
    tx = optax_sam.ncsam(
        0.3, kappa=STRENGTH, flip_ratio=0.5, deterministic=True, projection=False, **options
    )
    params = mlp_parameters()
    grads = jax.grad(objective)(params)
    actual, _ = tx.update(grads, tx.init(params), params, loss_fn=objective)
    norm = optax.tree.norm(grads)
    moved = jax.tree.map(
        lambda p, g, c: p + 0.3 * g / norm + c, params, grads, compensation_by_hand(flipped)
    )
    chex.assert_trees_all_close(actual, jax.grad(objective)(moved), rtol=1e-4, atol=1e-5)


def refused(objective, message, **options):
    tx, params = optax_sam.ncsam(0.3, flip_ratio=0.5, **options), mlp_parameters()
    with pytest.raises(TypeError, match=message):
        tx.update(params, tx.init(params), params, loss_fn=objective)


def test_audit_2_labels_that_cannot_be_flipped():
    """The error names the labels that it found, and how to point at the right ones."""
    objective, _, _ = CASES["named"]
    refused(objective, r"one array of integer labels.*'fine': 'int32\[8\]'.*label_of=lambda")
    refused(objective, "one array of integer labels", label_of=lambda labels: labels["fine"] + 0)
    regression = Objective(apply_mlp, INPUTS, VALUES, lambda z, y: (z[:, 0] - y) ** 2)
    refused(regression, r"soft labels like the logits, \(8, 3\); got labels float32\[8\]")
    tokens = Objective(apply_mlp, INPUTS[:, None], CLASSES[:, None])
    refused(
        tokens, r"needs logits of shape \(B, classes\), got float32\[8, 1, 3\].*map the network"
    )
