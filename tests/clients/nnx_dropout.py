"""Flax nnx with batch normalization, and dropout whose random keys the step is given."""

import jax
import optax
from flax import nnx

import optax_sam.nnx
from tests.clients.by_hand import RHO
from tests.problems import examples

STEPS = 3
inputs, labels = examples()


class Network(nnx.Module):
    def __init__(self, rngs):
        self.hidden, self.head = (
            nnx.Linear(4, 16, use_bias=False, rngs=rngs),
            nnx.Linear(16, 3, rngs=rngs),
        )
        self.norm, self.dropout = nnx.BatchNorm(16, rngs=rngs), nnx.Dropout(0.3)

    def __call__(self, x, rngs):
        return self.head(self.dropout(nnx.relu(self.norm(self.hidden(x))), rngs=rngs))


def loss_fn(model, x, y, rngs):
    losses = optax.softmax_cross_entropy_with_integer_labels(model(x, rngs), y)
    return losses.mean()


@nnx.jit
def train_step(model, optimizer, x, y, rngs):
    loss_of_params = optax_sam.nnx.loss_function(model, loss_fn, x, y, rngs)
    loss, grads = nnx.value_and_grad(loss_fn)(model, x, y, rngs)
    optimizer.update(model, grads, loss_fn=loss_of_params)
    return loss


@nnx.jit
def train_step_with_objective(model, optimizer, x, y, rngs):
    objective = optax_sam.nnx.objective(model, x, y, args=(rngs,))
    loss, grads = nnx.value_and_grad(loss_fn)(model, x, y, rngs)
    optimizer.update(model, grads, loss_fn=objective)
    return loss


@nnx.jit
def train_step_by_hand(model, optimizer, x, y, rngs):
    perturbed, same_rngs = nnx.clone((model, rngs))
    loss, grads = nnx.value_and_grad(loss_fn)(model, x, y, rngs)
    grads = nnx.as_pure(grads)
    scale = RHO / optax.tree.norm(grads)
    params = nnx.as_pure(nnx.state(perturbed, nnx.Param))
    nnx.update(perturbed, jax.tree.map(lambda w, g: w + scale * g, params, grads))
    optimizer.update(model, nnx.grad(loss_fn)(perturbed, x, y, same_rngs))
    return loss


def train(step, tx):
    model, rngs = Network(nnx.Rngs(0)), nnx.Rngs(dropout=1)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    losses = [step(model, optimizer, inputs, labels, rngs) for _ in range(STEPS)]
    state = nnx.as_pure(nnx.state((model, rngs), nnx.Not(nnx.RngKey)))
    return nnx.to_pure_dict(nnx.State(state)), losses


def with_library():
    tx = optax.chain(optax_sam.sam(rho=RHO), optax.adam(1e-2))
    return train(train_step, tx), train(train_step_with_objective, tx)


def with_sam_by_hand():
    result = train(train_step_by_hand, optax.adam(1e-2))
    return result, result
