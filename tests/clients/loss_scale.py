"""Float16 with a dynamic loss scale, Flax's and jmp's: both passes are scaled, and ε is not."""

import jax
import jax.numpy as jnp
import jmp
import optax
from flax.training.dynamic_scale import DynamicScale

import optax_sam
from tests.clients.by_hand import RHO
from tests.problems import apply_mlp, examples, mlp_parameters

STEPS = 4  # the scale overflows, falls, and grows again
TINY = 2.0**-17  # a loss whose unscaled gradients underflow
optimizer = optax.sgd(0.1 / TINY, momentum=0.9)
inputs, labels = examples()
SCALE = jnp.float32(2.0**17 / TINY)


def loss_fn(params):
    half = jax.tree.map(lambda x: x.astype(jnp.float16), params)
    logits = apply_mlp(half, inputs.astype(jnp.float16))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return TINY * losses.astype(jnp.float32).mean()


def with_flax(tx):
    @jax.jit
    def train_step(params, opt_state, dynamic_scale):
        scaled = optax_sam.loss_scaled(loss_fn, dynamic_scale.scale)
        dynamic_scale, finite, loss, grads = dynamic_scale.value_and_grad(loss_fn)(params)
        updates, new_opt_state = tx.update(grads, opt_state, params, loss_fn=scaled)
        new = optax.apply_updates(params, updates), new_opt_state
        params, opt_state = jmp.select_tree(finite, new, (params, opt_state))
        return params, opt_state, dynamic_scale, (loss, dynamic_scale.scale)

    return run(train_step, tx, DynamicScale(growth_interval=0, scale=SCALE))


def with_jmp(tx):
    @jax.jit
    def train_step(params, opt_state, loss_scale):
        loss, grads = jax.value_and_grad(lambda w: loss_scale.scale(loss_fn(w)))(params)
        loss, grads = loss_scale.unscale((loss, grads))
        scaled = optax_sam.loss_scaled(loss_fn, loss_scale.loss_scale)
        updates, new_opt_state = tx.update(grads, opt_state, params, loss_fn=scaled)
        new, finite = (optax.apply_updates(params, updates), new_opt_state), jmp.all_finite(grads)
        params, opt_state = jmp.select_tree(finite, new, (params, opt_state))
        loss_scale = loss_scale.adjust(finite)
        return params, opt_state, loss_scale, (loss, loss_scale.loss_scale)

    return run(train_step, tx, jmp.DynamicLossScale(SCALE, period=1))


def run(train_step, tx, scale):
    params, records = mlp_parameters(), []
    opt_state = tx.init(params)
    for _ in range(STEPS):
        params, opt_state, scale, record = train_step(params, opt_state, scale)
        records.append(record)
    return params, records


def with_library():
    tx = optax.chain(optax_sam.sam(rho=RHO), optimizer)
    return with_flax(tx), with_jmp(tx)


def with_sam_by_hand():
    @jax.jit
    def step(params, opt_state, scale):
        def scaled_gradients(params):
            grads = jax.grad(lambda w: scale * loss_fn(w))(params)
            return jax.tree.map(lambda g: g / scale, grads)

        clean = scaled_gradients(params)
        norm = optax.tree.norm(clean)
        perturbed = jax.tree.map(lambda w, g: w + RHO * g / norm, params, clean)
        updates, new_opt_state = optimizer.update(scaled_gradients(perturbed), opt_state, params)
        new = optax.apply_updates(params, updates), new_opt_state
        loss, finite = loss_fn(params), jnp.isfinite(norm)
        params, opt_state = jmp.select_tree(finite, new, (params, opt_state))
        scale = jnp.where(finite, 2 * scale, scale / 2)
        return params, opt_state, scale, (loss, scale)

    result = run(step, optimizer, SCALE)
    return result, result
