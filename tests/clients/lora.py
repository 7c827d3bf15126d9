"""Frozen layers with low-rank adapters (LoRA): only the adapters are perturbed, and only they move."""

import jax
import jax.numpy as jnp
import optax

import optax_sam
from tests.clients import by_hand
from tests.clients.by_hand import RHO
from tests.problems import apply_mlp, examples, mlp_parameters

STEPS = 3
inputs, labels = examples()


def adapted(params):
    """The network's parameters: first + down @ up."""
    frozen, adapter = params["frozen"], params["adapter"]
    return frozen | {"first": frozen["first"] + adapter["down"] @ adapter["up"]}


def loss_of(params):
    logits = apply_mlp(adapted(params), inputs)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), logits


def trainable(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: path[0].key == "adapter", params)


def frozen(params):
    return jax.tree.map(lambda flag: not flag, trainable(params))


optimizer = optax.chain(optax.adam(0.1), optax.masked(optax.set_to_zero(), frozen))


def with_library():
    tx = optax.chain(optax_sam.sam(rho=RHO, mask=trainable), optimizer)

    @jax.jit
    def train_step(params, opt_state):
        (loss, _), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params, loss_fn=loss_of)
        return optax.apply_updates(params, updates), opt_state, loss

    return train(train_step, tx, initial())


def with_sam_by_hand():
    """The adapters are the only parameters there are."""
    constant = initial()["frozen"]
    tx = optax.adam(0.1)

    @jax.jit
    def step(adapter, opt_state):
        (loss, _), grads = by_hand.sam(
            lambda adapter: loss_of({"frozen": constant, "adapter": adapter}), adapter
        )
        updates, opt_state = tx.update(grads, opt_state)
        return optax.apply_updates(adapter, updates), opt_state, loss

    adapter, losses = train(step, tx, initial()["adapter"])
    return {"frozen": constant, "adapter": adapter}, losses


def initial():
    down = jax.random.normal(jax.random.key(3), (4, 2))
    return {
        "frozen": mlp_parameters(),
        "adapter": {"down": down, "up": jnp.full((2, 6), 0.1, jnp.float32)},
    }


def train(train_step, tx, params):
    opt_state, losses = tx.init(params), []
    for _ in range(STEPS):
        params, opt_state, loss = train_step(params, opt_state)
        losses.append(loss)
    return params, losses
