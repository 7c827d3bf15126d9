"""Co-teaching (Han et al. 2018): each network learns from the examples on which the other one's loss
is small. The choice is a weight per example."""

import jax
import jax.numpy as jnp
import optax

import optax_sam
from tests.clients import by_hand
from tests.clients.by_hand import RHO
from tests.problems import apply_mlp, examples, mlp_parameters

STEPS = 3
KEPT = 5  # of 8 examples
optimizer = optax.sgd(0.1, momentum=0.9)
inputs, labels = examples()


def losses_of(params):
    logits = apply_mlp(params, inputs)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def small_losses(params):
    """1 for the examples that this network would choose, 0 for the others."""
    return (jnp.argsort(jnp.argsort(losses_of(params))) < KEPT).astype(jnp.float32)


def with_library():
    tx = optax.chain(optax_sam.sam(rho=RHO), optimizer)

    def step(params, opt_state, chosen):
        objective = optax_sam.Objective(apply_mlp, inputs, labels, weights=chosen)
        loss, grads = jax.value_and_grad(objective)(params)
        updates, opt_state = tx.update(grads, opt_state, params, loss_fn=objective)
        return optax.apply_updates(params, updates), opt_state, loss

    return train(step, tx)


def with_sam_by_hand():
    def step(params, opt_state, chosen):
        def loss_of(params):
            return (chosen * losses_of(params)).sum() / chosen.sum(), ()

        (loss, _), grads = by_hand.sam(loss_of, params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return train(step, optimizer)


def train(step, tx):
    @jax.jit
    def both(networks, opt_states):
        chosen = [small_losses(params) for params in networks]
        results = map(step, networks, opt_states, reversed(chosen))
        networks, opt_states, losses = zip(*results, strict=True)
        return networks, opt_states, (losses, chosen)

    networks, records = (mlp_parameters(0), mlp_parameters(1)), []
    opt_states = tuple(map(tx.init, networks))
    for _ in range(STEPS):
        networks, opt_states, record = both(networks, opt_states)
        records.append(record)
    return networks, records
