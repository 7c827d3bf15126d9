"""Weight decay inside the loss, as in Flax's ImageNet example: it is perturbed with the loss."""

import jax
import jax.numpy as jnp
import optax

import optax_sam
from tests.clients import by_hand
from tests.clients.by_hand import RHO
from tests.problems import apply_mlp, examples, mlp_parameters

STEPS = 3
optimizer = optax.sgd(0.1, momentum=0.9, nesterov=True)
inputs, labels = examples()


def l2(params):
    return 0.5 * 1e-2 * sum(jnp.sum(w**2) for w in jax.tree.leaves(params) if w.ndim > 1)


def loss_of(params):
    logits = apply_mlp(params, inputs)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean() + l2(params), logits


def train(tx):
    @jax.jit
    def train_step(params, opt_state):
        def loss_fn(params):
            return loss_of(params)

        (loss, logits), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params, loss_fn=loss_fn)
        return optax.apply_updates(params, updates), opt_state, (loss, logits)

    return run(train_step, tx)


def train_with_objective(tx):
    @jax.jit
    def train_step(params, opt_state):
        objective = optax_sam.Objective(apply_mlp, inputs, labels, penalty=l2)
        loss, grads = jax.value_and_grad(objective)(params)
        updates, opt_state = tx.update(grads, opt_state, params, loss_fn=objective)
        return optax.apply_updates(params, updates), opt_state, (loss, objective.logits(params))

    return run(train_step, tx)


def run(train_step, tx):
    params, records = mlp_parameters(), []
    opt_state = tx.init(params)
    for _ in range(STEPS):
        params, opt_state, record = train_step(params, opt_state)
        records.append(record)
    return params, records


def with_library():
    tx = optax.chain(optax_sam.sam(rho=RHO), optimizer)
    return train(tx), train_with_objective(tx)


def with_sam_by_hand():
    @jax.jit
    def step(params, opt_state):
        value, grads = by_hand.sam(loss_of, params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    result = run(step, optimizer)
    return result, result
