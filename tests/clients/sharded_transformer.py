"""A transformer whose parameters are sharded over all devices, with a weight per token (padding)."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_sam
from tests.clients import by_hand
from tests.clients.by_hand import RHO

STEPS = 3
VOCABULARY, WIDTH, LENGTH, BATCH = 12, 8, 6, 8
optimizer = optax.adamw(1e-2)


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(VOCABULARY, WIDTH)(tokens)
        attention = nn.MultiHeadDotProductAttention(num_heads=2, use_bias=False)
        x = x + attention(nn.LayerNorm()(x), mask=nn.make_causal_mask(tokens))
        x = x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(x))))
        return nn.Dense(VOCABULARY)(x)


model = Transformer()
tokens = jax.random.randint(jax.random.key(0), (BATCH, LENGTH + 1), 0, VOCABULARY)
inputs, targets = tokens[:, :-1], tokens[:, 1:]
weights = (jnp.arange(LENGTH) < 1 + jnp.arange(BATCH)[:, None]).astype(jnp.float32)


def shard(tree):
    """Every array cut along its first axis that four devices can share."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))

    def one(x):
        axes = [index for index, size in enumerate(x.shape) if size % 4 == 0][:1]
        spec = P(*("data" if index in axes else None for index in range(x.ndim)))
        return jax.device_put(x, NamedSharding(mesh, spec))

    return jax.tree.map(one, tree)


def with_library():
    tx = optax.chain(optax_sam.sam(rho=RHO), optimizer)

    @jax.jit
    def train_step(params, opt_state, x, y, weights):
        loss_fn = optax_sam.Objective(model.apply, x, y, weights=weights)
        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = tx.update(grads, opt_state, params, loss_fn=loss_fn)
        return optax.apply_updates(params, updates), opt_state, loss

    batch = shard((inputs, targets, weights))
    return train(train_step, tx, shard(initial_params()), batch)


def with_sam_by_hand():
    """On one device."""

    @jax.jit
    def step(params, opt_state, x, y, weights):
        def loss_of(params):
            logits = model.apply(params, x)
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
            return (weights * losses).sum() / weights.sum(), ()

        (loss, _), grads = by_hand.sam(loss_of, params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    return train(step, optimizer, initial_params(), (inputs, targets, weights))


@functools.cache
def initial_params():
    return jax.jit(model.init)(jax.random.key(1), inputs)


def train(train_step, tx, params, batch):
    opt_state, losses = jax.jit(tx.init)(params), []
    for _ in range(STEPS):
        params, opt_state, loss = train_step(params, opt_state, *batch)
        losses.append(loss)
    return params, losses
