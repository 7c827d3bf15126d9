"""Losses that resist wrong labels by themselves, each ``loss(logits, labels)`` per example.

Generalized cross-entropy (Zhang and Sabuncu 2018), symmetric cross-entropy (Wang et al. 2019), label
smoothing, mixup (Zhang et al. 2018), and early-learning regularization (ELR, Liu et al. 2020), whose
targets are a moving average of the network's own predictions.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_sam
from tests.clients import by_hand
from tests.clients.by_hand import RHO
from tests.problems import apply_mlp, examples, mlp_parameters

STEPS = 2
optimizer = optax.sgd(0.1, momentum=0.9)
inputs, labels = examples()
soft_labels = np.eye(3, dtype=np.float32)[labels]


def generalized_cross_entropy(logits, labels, q=0.7):
    chosen = jnp.take_along_axis(jax.nn.softmax(logits), labels[:, None], axis=-1)[:, 0]
    return (1 - chosen**q) / q


def symmetric_cross_entropy(logits, labels, alpha=0.1, beta=1.0):
    one_hot = jax.nn.one_hot(labels, logits.shape[-1])
    reverse = -(jax.nn.softmax(logits) * jnp.log(jnp.clip(one_hot, 1e-4))).sum(-1)
    return alpha * optax.softmax_cross_entropy(logits, one_hot) + beta * reverse


def early_learning(logits, labels_and_targets, strength=3.0):
    labels, targets = labels_and_targets
    agreement = (jax.nn.softmax(logits) * targets).sum(-1)
    regularizer = jnp.log(1 - jnp.clip(agreement, 0, 1 - 1e-4))
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return cross_entropy + strength * regularizer


def new_targets(targets, logits):
    return 0.7 * targets + 0.3 * jax.nn.softmax(logits)


mixed = 0.3 * inputs + 0.7 * inputs[::-1], 0.3 * soft_labels + 0.7 * soft_labels[::-1]
LOSSES = {
    "generalized cross-entropy": (generalized_cross_entropy, inputs, labels),
    "symmetric cross-entropy": (symmetric_cross_entropy, inputs, labels),
    "label smoothing": (
        optax.softmax_cross_entropy, inputs, 0.9 * soft_labels + 0.1 / 3,
    ),
    "mixup": (optax.softmax_cross_entropy, *mixed),
    "early learning": (early_learning, inputs, (labels, np.full((8, 3), 1 / 3, np.float32))),
}  # fmt: skip


def with_library():
    tx = optax.chain(optax_sam.sam(rho=RHO), optimizer)

    def step(loss, params, opt_state, x, y):
        objective = optax_sam.Objective(apply_mlp, x, y, loss)
        value, grads = jax.value_and_grad(objective)(params)
        updates, opt_state = tx.update(grads, opt_state, params, loss_fn=objective)
        return optax.apply_updates(params, updates), opt_state, (value, objective.logits(params))

    return train(step, tx)


def with_sam_by_hand():
    def step(loss, params, opt_state, x, y):
        def loss_of(params):
            logits = apply_mlp(params, x)
            return loss(logits, y).mean(), logits

        value, grads = by_hand.sam(loss_of, params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    return train(step, optimizer)


def train(step, tx):
    @jax.jit
    def train_step(params, opt_states, labels):
        """One step with every loss."""
        new, records = {}, {}
        for name, (loss, x, _) in LOSSES.items():
            y = labels[name]
            *new[name], (records[name], logits) = step(loss, params[name], opt_states[name], x, y)
            if name == "early learning":  # from the clean pass
                labels = labels | {name: (y[0], new_targets(y[1], logits))}
        params, opt_states = ({name: pair[i] for name, pair in new.items()} for i in (0, 1))
        return params, opt_states, labels, records

    params, records = dict.fromkeys(LOSSES, mlp_parameters()), []
    opt_states = {name: tx.init(params[name]) for name in LOSSES}
    labels = {name: y for name, (_, _, y) in LOSSES.items()}
    for _ in range(STEPS):
        params, opt_states, labels, record = train_step(params, opt_states, labels)
        records.append(record)
    return params, records, labels
