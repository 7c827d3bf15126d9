"""Wrong calls over the whole public API, and what the message of each must contain.

Each row stands under the name of the public callable that it is about. ``call`` makes the mistake; the
message must name the ``argument``, echo the ``value`` (or its shape, dtype or type) and contain the
``remedy``, or the range or form that is asked for.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from flax.training import train_state

import optax_sam
import optax_sam.equinox
import optax_sam.linen
import optax_sam.nnx
from optax_sam import Objective, diagnostics, label_noise, per_example
from optax_sam.convolutions import canonical_convolutions
from optax_sam.independence import check_independence


@dataclasses.dataclass(frozen=True)
class Row:
    """A wrong call, and three things that its message says."""

    mistake: str
    call: Callable[[], Any]
    error: type[Exception]
    argument: str
    value: str
    remedy: str


# The valid world around the mistakes: a linear network with 3 classes on 6 examples.
PARAMS = {"w": jnp.asarray(np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3))}
GRADS = {"w": jnp.asarray(np.ones((4, 3), np.float32))}
INPUTS = jnp.asarray(np.linspace(0, 1, 24, dtype=np.float32).reshape(6, 4))
LABELS = jnp.asarray(np.array([0, 1, 2, 0, 1, 2], np.int32))
LOGITS = jnp.asarray(np.zeros((6, 3), np.float32))
NAN, INF = float("nan"), float("inf")


def apply_fn(params, inputs):
    return inputs @ params["w"]


def loss_fn(params):
    return jnp.sum(params["w"] ** 2)


def objective(apply=apply_fn, inputs=INPUTS, labels=LABELS, *args, **options):
    return Objective(apply, inputs, labels, *args, **options)


def update(tx, grads=GRADS, params=PARAMS, loss_fn=loss_fn, state=None, **extra_args):
    """One step of an optimizer, with the mistake in one of the arguments."""
    state = tx.init(PARAMS) if state is None else state
    return tx.update(grads, state, params, loss_fn=loss_fn, **extra_args)


def stage(transformation, updates=GRADS, params=PARAMS, state=None, **extra_args):
    """One step of a stage by itself."""
    state = transformation.init(PARAMS) if state is None else state
    return transformation.update(updates, state, params, **extra_args)


def traced(function):
    """Calls a function with a traced scalar."""
    return jax.eval_shape(function, jax.ShapeDtypeStruct((), jnp.float32))


def sgd_state():
    return optax.adam(0.1).init(PARAMS)


def number(name, argument, outside, interval, call):
    """Two rows about one number: out of range, and of another type."""
    return {
        name: [
            Row(
                f"{argument}={outside!r}",
                lambda: call(outside),
                ValueError,
                argument,
                repr(outside).removeprefix("np.float64(").removesuffix(")"),
                interval,
            ),
            Row(f"{argument}='0.1'", lambda: call("0.1"), TypeError, argument, "'0.1'", "a number"),
        ]
    }
