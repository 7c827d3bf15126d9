"""Networks with loops and shared weights, wide enough that Gram matrices are cheap."""

import functools

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import nnx
from jax import lax

from optax_sam import Objective
from tests.per_example.networks import CLASSES, example_inputs, initial

WIDTH = 20


def stack(params, x, block, **options):
    """A stem, equal layers in a loop, and a head."""
    x = jnp.tanh(x.reshape(x.shape[0], -1) @ params["stem"])
    x, _ = lax.scan(lambda x, weights: (block(weights, x), None), x, params["layers"], **options)
    return x @ params["head"]


def residual(weights, x):
    return x + jnp.tanh(x @ weights["up"] + weights["bias"]) @ weights["down"].T


STACK = {
    "stem": (108, WIDTH),
    "layers": {"up": (3, WIDTH, 24), "bias": (3, 24), "down": (3, WIDTH, 24)},
    "head": (WIDTH, CLASSES),
}


def group_of_layers(weights, x):
    """A loop in the loop, over layers of layers."""
    return lax.scan(lambda x, w: (jax.checkpoint(residual)(w, x), None), x, weights)[0]


def recurrent(params, x):
    """Layers of recurrent cells: a layer's weights are the same in all steps of time."""
    x = x.reshape(x.shape[0], -1, 54).swapaxes(0, 1) @ params["stem"]

    def layer(x, weights):
        def cell(state, step):
            state = jnp.tanh(state @ weights["recurrent"] + step @ weights["input"])
            return state, state

        return lax.scan(cell, jnp.zeros_like(x[0]), x)[1], None

    x, _ = lax.scan(layer, x, params["layers"])
    return x[-1] @ params["head"]


RECURRENT = {
    "stem": (54, WIDTH),
    "layers": {"recurrent": (2, WIDTH, WIDTH), "input": (2, WIDTH, WIDTH)},
    "head": (WIDTH, CLASSES),
}


def repeated_stack(params, x):
    """The same three layers twice over, in a loop without weights of its own."""
    x = jnp.tanh(x.reshape(x.shape[0], -1) @ params["stem"])

    def layer(x, weights):
        return x + jnp.tanh(x @ weights["square"]), None

    def round_(x, _):
        return lax.scan(layer, x, params["layers"])[0], None

    x, _ = lax.scan(round_, x, None, 2)
    return x @ params["head"]


REPEATED = {"stem": (108, 24), "layers": {"square": (3, 24, 24)}, "head": (24, CLASSES)}


def tied_autoencoder(params, x):
    """The same weights forwards and, transposed, backwards; and reshaped on the way."""
    x = x.reshape(x.shape[0], -1)
    hidden = jnp.tanh(x @ params["both"].reshape(108, WIDTH))
    decoded = jnp.einsum("bh,dch->bdc", hidden, params["both"])
    return jnp.tanh(decoded).reshape(x.shape[0], -1) @ params["head"]


def language_model(params, tokens):
    """Blocks of attention and a perceptron in a rematerialized loop; the embedding is tied."""
    x = params["embedding"][tokens] + params["positions"]
    x, _ = lax.scan(lambda x, w: (jax.checkpoint(block)(w, x), None), x, params["layers"])
    return normalized(x, params["scale"]) @ params["embedding"].T


def normalized(x, scale):
    x = x - x.mean(-1, keepdims=True)
    return scale * x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)


def block(weights, x):
    y = normalized(x, weights["scale"])
    queries, keys, values = (
        jnp.einsum("btd,dhk->bhtk", y, weights[name]) for name in ("queries", "keys", "values")
    )
    attention = jnp.where(jnp.tri(x.shape[1]) > 0, queries @ keys.swapaxes(2, 3), -1e9)
    mixed = jax.nn.softmax(attention) @ values
    x = x + jnp.einsum("bhtk,hkd->btd", mixed, weights["out"])
    return x + jax.nn.gelu(x @ weights["up"]) @ weights["down"]


HEADS = (2, WIDTH, 2, WIDTH // 2)
LANGUAGE_MODEL = {
    "embedding": (30, WIDTH),
    "positions": (3, WIDTH),
    "layers": {
        "queries": HEADS,
        "keys": HEADS,
        "values": HEADS,
        "out": (2, 2, WIDTH // 2, WIDTH),
        "up": (2, WIDTH, 40),
        "down": (2, 40, WIDTH),
        "scale": (2, WIDTH),
    },
    "scale": (WIDTH,),
}


class LinenLayer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(WIDTH)(nn.tanh(nn.Dense(24)(nn.LayerNorm()(x)))), None


class LinenStack(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(WIDTH)(x.reshape(x.shape[0], -1))
        layers = nn.scan(
            nn.remat(LinenLayer),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        return nn.Dense(CLASSES)(layers()(x, None)[0])


def linen():
    model = LinenStack()
    shapes = jax.eval_shape(model.init, jax.random.key(0), example_inputs())["params"]
    params = initial(jax.tree.map(lambda leaf: leaf.shape, shapes))
    return (lambda params, x: model.apply({"params": params}, x)), params


class NnxLayer(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(WIDTH, 24, rngs=rngs)
        self.down = nnx.Linear(24, WIDTH, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.tanh(self.up(x)))


def nnx_stack():
    make = nnx.split_rngs(splits=3)(nnx.vmap(NnxLayer, in_axes=0, out_axes=0))
    graphdef, state = nnx.split(make(nnx.Rngs(0)), nnx.Param)
    layers = initial(jax.tree.map(lambda leaf: leaf.shape, state))
    forward = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)

    def apply(params, x):
        x = x.reshape(x.shape[0], -1) @ params["stem"]
        return forward(x, nnx.merge(graphdef, params["layers"])) @ params["head"]

    ends = initial({"stem": (108, WIDTH), "head": (WIDTH, CLASSES)})
    return apply, ends | {"layers": layers}


def _plain(apply, shapes):
    return lambda: (apply, initial(shapes))


LOOPS = {
    "layers": _plain(functools.partial(stack, block=residual), STACK),
    "layers, rematerialized": _plain(
        functools.partial(stack, block=jax.checkpoint(residual), unroll=2), STACK
    ),
    "layers of layers, last one first": _plain(
        functools.partial(stack, block=group_of_layers, reverse=True),
        STACK | {"layers": {n: (2, *shape) for n, shape in STACK["layers"].items()}},
    ),
    "recurrent layers": _plain(recurrent, RECURRENT),
    "layers repeated": _plain(repeated_stack, REPEATED),
    "tied autoencoder": _plain(tied_autoencoder, {"both": (12, 9, WIDTH), "head": (108, CLASSES)}),
    "language model": _plain(language_model, LANGUAGE_MODEL),
    "Linen": linen,
    "nnx": nnx_stack,
}


def problem(name, batch=4):
    """``(objective, params)`` of a network, in the default float dtype."""
    apply, params = LOOPS[name]()
    is_text = name == "language model"
    inputs = example_inputs(is_text, batch)[:, :3] if is_text else example_inputs(False, batch)
    labels = inputs if is_text else jnp.arange(batch) % CLASSES
    return Objective(apply, inputs, labels), params
