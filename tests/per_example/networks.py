"""Small networks, one for every way in which a parameter can meet the data."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_sam import Objective

BATCH = 5
IMAGE = (6, 6, 3)
CLASSES = 3


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x.reshape(x.shape[0], -1)
        return nn.Dense(CLASSES)(jnp.tanh(nn.Dense(7)(x)))


class GroupNormCNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.GroupNorm(2)(nn.Conv(4, (3, 3), use_bias=False)(x)))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.GroupNorm(2)(nn.Conv(8, (3, 3))(x)))
        return nn.Dense(CLASSES)(x.mean((1, 2)))


class GroupNormResNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), use_bias=False)(x)
        for width, stride in ((4, 1), (8, 2)):
            y = nn.Conv(width, (3, 3), (stride, stride), use_bias=False)(x)
            y = nn.GroupNorm(2)(nn.Conv(width, (3, 3))(jnp.tanh(nn.GroupNorm(2)(y))))
            shortcut = x if x.shape == y.shape else nn.Conv(width, (1, 1), (stride, stride))(x)
            x = jnp.tanh(y + shortcut)
        return nn.Dense(CLASSES)(x.mean((1, 2)))


class TinyGPT(nn.Module):
    """Embedding, attention, LayerNorm; tied or untied output."""

    tied: bool = False

    @nn.compact
    def __call__(self, tokens):
        embedding = nn.Embed(11, 8)
        x = embedding(tokens) + self.param("positions", nn.initializers.normal(), (4, 8))
        mask = nn.make_causal_mask(tokens)
        x = x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x), mask=mask)
        x = x + nn.Dense(8)(nn.gelu(nn.Dense(16)(nn.LayerNorm()(x))))
        return embedding.attend(x) if self.tied else nn.Dense(11)(x)


class WeightNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.WeightNorm(nn.Dense(6))(x.reshape(x.shape[0], -1)))
        return nn.Dense(CLASSES)(x)


class RematerializedCNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.remat(nn.Conv)(4, (3, 3))(x))
        x = nn.remat(nn.Dense)(5)(x.mean((1, 2)))
        return nn.Dense(CLASSES)(nn.tanh(x))


def convolution(strides=(1, 1), padding="SAME", groups=1, holes=(1, 1), input_holes=(1, 1)):
    """One convolution of the given geometry in the layout NCHW × OIHW, and a linear layer."""

    def apply(params, x):
        x = x.transpose(0, 3, 1, 2)
        x = jnp.concatenate([x, x[:, :1]], axis=1)  # four channels, so that two groups divide them
        x = lax.conv_general_dilated(
            x,
            params["kernel"],
            strides,
            padding,
            lhs_dilation=input_holes,
            rhs_dilation=holes,
            feature_group_count=groups,
        )
        return jnp.tanh(x).mean((2, 3)) @ params["head"]

    return apply, {"kernel": (6, 4 // groups, 3, 2), "head": (6, CLASSES)}


def convolution_1d(params, x):
    x = x.reshape(x.shape[0], -1, 3)
    x = lax.conv_general_dilated(
        x, params["kernel"], (2,), [(1, 2)], dimension_numbers=("NHC", "HIO", "NHC")
    )
    return jnp.tanh(x).mean(1) @ params["head"]


def scan_over_layers(params, x):
    x = x.reshape(x.shape[0], -1) @ params["stem"]

    def layer(x, weights):
        return jnp.tanh(x @ weights["kernel"] + weights["bias"]), None

    x, _ = lax.scan(layer, x, params["layers"])
    return x @ params["head"]


def shared_in_scan(params, x):
    """A recurrent network: one weight, used in every step of the loop."""
    x = x.reshape(x.shape[0], -1, 6)

    def cell(state, inputs):
        state = jnp.tanh(state @ params["recurrent"] + inputs @ params["input"])
        return state, None

    state, _ = lax.scan(cell, jnp.zeros((x.shape[0], 5), x.dtype), x.swapaxes(0, 1))
    return state @ params["head"]


def tied_layers(params, x):
    x = jnp.tanh(x.reshape(x.shape[0], -1) @ params["stem"])
    return jnp.tanh(x @ params["square"]) @ params["square"].T @ params["head"]


def parameter_times_parameter(params, x):
    """A low-rank weight, formed before it meets the data."""
    return x.reshape(x.shape[0], -1) @ (params["left"] @ params["right"]) + params["bias"]


def sliced_weights(params, x):
    """Queries, keys and values from one matrix; the weight's own shape is not that of its use."""
    x = x.reshape(x.shape[0], -1, 6)
    queries, keys, values = (x @ part for part in jnp.split(params["qkv"], 3, axis=1))
    weights = jax.nn.softmax(queries @ keys.swapaxes(1, 2))
    return (weights @ values).mean(1) @ params["head"].reshape(4, CLASSES)


def repeated_weights(params, x):
    """A column used four times: the norm of its gradient is not that of the matrix."""
    matrix = jnp.broadcast_to(params["column"][:, None], (108, 4))
    return jnp.tanh(x.reshape(x.shape[0], -1) @ matrix) @ params["head"]


def few_positions(params, x):
    """Sites with several positions, few enough for their Gram matrices to be cheap."""
    patches = lax.conv_general_dilated(
        x, params["kernel"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    patches = jnp.tanh(patches).reshape(x.shape[0], 2, 32)
    return jnp.tanh(patches @ params["mixer"]).mean(1) @ params["head"]


def weights_on_the_left(params, x):
    x = jnp.einsum("oi,bpi->obp", params["first"], x.reshape(x.shape[0], -1, 6))
    return jnp.einsum("oc,obp->bc", params["head"], jnp.tanh(x))


def in_cond_and_custom_rules(params, x):
    x = x.reshape(x.shape[0], -1)
    x = lax.cond(params["gate"] > 0, lambda: jnp.tanh(x @ params["first"]), lambda: x[:, :4])
    return jax.nn.silu(x @ params["head"]) * jax.nn.softplus(params["gate"])


def with_other_leaves(params, x):
    """None and integer leaves beside an unused one."""
    x = x.reshape(x.shape[0], -1) @ params["first"]
    return jnp.tanh(x)[:, params["order"]] @ params["head"]


def batched_product(params, x):
    """A product with one weight per position: batch axes on both sides."""
    x = jnp.einsum("bpi,pio->bpo", x.reshape(x.shape[0], -1, 6), params["each"])
    return jnp.tanh(x).mean(1) @ params["head"]


@jax.custom_vjp
def rounded_product(x, weights):
    """Quantized, with a straight-through derivative that no tracing finds."""
    return jnp.round(4 * x @ weights) / 4


rounded_product.defvjp(
    lambda x, weights: (rounded_product(x, weights), (x, weights)),
    lambda kept, g: (g @ kept[1].T, kept[0].T @ g),
)


def custom_derivative(params, x):
    x = jnp.tanh(rounded_product(x.reshape(x.shape[0], -1), params["first"]))
    return x @ params["head"]


def vmap_inside(params, x):
    """Written for one example, with a vector of weights per head."""

    def one(image):
        heads = jax.vmap(lambda w: jnp.tanh(image.reshape(-1) @ w))(params["heads"])
        return heads.reshape(-1) @ params["head"]

    return jax.vmap(one)(x)


def rematerialized_scan(params, x):
    """The usual language model: layers in a loop, each computed again in the backward pass."""
    x = jnp.tanh(x.reshape(x.shape[0], -1) @ params["stem"])

    @jax.checkpoint
    def layer(x, weights):
        return x + jnp.tanh(x @ weights["up"]) @ weights["down"], None

    x, _ = lax.scan(layer, x, params["layers"])
    return x @ params["head"]


def fourier(params, x):
    """Filters in the frequency domain, as in Fourier neural operators: complex in between."""
    spectrum = jnp.fft.rfft(x.reshape(x.shape[0], -1) @ params["first"])
    filtered = spectrum * (params["real"] + 1j * params["imaginary"])
    return jnp.tanh(jnp.fft.irfft(filtered, 8)) @ params["head"]


def mixture_of_experts(params, x):
    """Each example chooses two experts: top-k, weights looked up by what the example says."""
    x = x.reshape(x.shape[0], -1)
    gates, chosen = lax.top_k(jax.nn.softmax(x @ params["router"]), 2)
    hidden = jnp.einsum("bi,bkio->bko", x, params["experts"][chosen])
    return jnp.einsum("bk,bko->bo", gates, jnp.tanh(hidden)) @ params["head"]


def scatter(params, x):
    """Histogram features: written into place, with parameters as values."""
    x = x.reshape(x.shape[0], -1)
    bins = jnp.clip((x + 3).astype(int), 0, 5)
    histogram = jnp.zeros((x.shape[0], 6), x.dtype)
    histogram = histogram.at[jnp.arange(x.shape[0])[:, None], bins].add(params["values"])
    return jnp.tanh(histogram) @ params["head"]


def while_loop(params, x):
    """A loop with a condition on the data, before the parameters: it has no derivative."""
    x = lax.while_loop(lambda x: jnp.max(jnp.abs(x)) > 1, lambda x: x / 2, x)
    return jnp.tanh(x.reshape(x.shape[0], -1) @ params["first"]) @ params["head"]


def switch(params, x):
    """Branches with parameters inside, in a loop."""
    x = jnp.tanh(x.reshape(x.shape[0], -1) @ params["first"])

    def body(i, x):
        branches = [lambda x: jnp.sin(x @ params["square"]), lambda x: x + params["bias"]]
        return lax.switch(i % 2, branches, x)

    return lax.fori_loop(0, 3, body, x) @ params["head"]


def _module(module: nn.Module, tokens: bool = False):
    def build():
        # Only the shapes are traced: running Flax's initializers would take most of a test's time.
        shapes = jax.eval_shape(module.init, jax.random.key(1), example_inputs(tokens))["params"]
        params = initial(jax.tree.map(lambda leaf: leaf.shape, shapes))
        return (lambda params, x: module.apply({"params": params}, x)), params

    return build, tokens


def _plain(apply: Callable, shapes: dict):
    def build():
        return apply, initial(shapes)

    return build, False


def initial(shapes: dict):
    """Random parameters of the given shapes."""
    generator = np.random.default_rng(2)
    return jax.tree.map(
        lambda shape: jnp.asarray(0.5 * generator.standard_normal(shape)),
        shapes,
        is_leaf=lambda shape: isinstance(shape, tuple),
    )


def _other_leaves():
    params = initial({"first": (108, 4), "head": (4, CLASSES), "unused": (2,)})
    return with_other_leaves, params | {"order": jnp.array([2, 0, 1, 3]), "nothing": None}


NETWORKS = {
    "MLP": _module(MLP()),
    "CNN with GroupNorm": _module(GroupNormCNN()),
    "ResNet with GroupNorm": _module(GroupNormResNet()),
    "GPT": _module(TinyGPT(), tokens=True),
    "GPT with tied embedding": _module(TinyGPT(tied=True), tokens=True),
    "weight norm": _module(WeightNorm()),
    "rematerialized": _module(RematerializedCNN()),
    "strided convolution": _plain(*convolution(strides=(2, 1))),
    "padded convolution": _plain(*convolution(padding=[(2, 0), (1, 3)])),
    "dilated convolution": _plain(*convolution(holes=(2, 1), padding="VALID")),
    "input-dilated convolution": _plain(*convolution(input_holes=(2, 3), padding=[(1, 1), (0, 2)])),
    "grouped convolution": _plain(*convolution(groups=2)),
    "1-D convolution": _plain(convolution_1d, {"kernel": (3, 3, 4), "head": (4, CLASSES)}),
    "scan over layers": _plain(
        scan_over_layers,
        {
            "stem": (108, 4),
            "layers": {"kernel": (3, 4, 4), "bias": (3, 4)},
            "head": (4, CLASSES),
        },
    ),
    "recurrent": _plain(
        shared_in_scan, {"recurrent": (5, 5), "input": (6, 5), "head": (5, CLASSES)}
    ),
    "tied layers": _plain(tied_layers, {"stem": (108, 4), "square": (4, 4), "head": (4, CLASSES)}),
    "parameter times parameter": _plain(
        parameter_times_parameter, {"left": (108, 2), "right": (2, CLASSES), "bias": (CLASSES,)}
    ),
    "sliced weights": _plain(sliced_weights, {"qkv": (6, 12), "head": (4 * CLASSES,)}),
    "repeated weights": _plain(repeated_weights, {"column": (108,), "head": (4, CLASSES)}),
    "few positions": _plain(
        few_positions, {"kernel": (5, 5, 3, 16), "mixer": (32, 16), "head": (16, CLASSES)}
    ),
    "weights on the left": _plain(weights_on_the_left, {"first": (4, 6), "head": (4, CLASSES)}),
    "cond and custom rules": _plain(
        in_cond_and_custom_rules, {"first": (108, 4), "head": (4, CLASSES), "gate": ()}
    ),
    "batched product": _plain(batched_product, {"each": (18, 6, 4), "head": (4, CLASSES)}),
    "None, integers, unused": (_other_leaves, False),
    "custom derivative": _plain(custom_derivative, {"first": (108, 4), "head": (4, CLASSES)}),
    "vmap inside": _plain(vmap_inside, {"heads": (3, 108, 4), "head": (12, CLASSES)}),
    "rematerialized scan": _plain(
        rematerialized_scan,
        {
            "stem": (108, 4),
            "layers": {"up": (3, 4, 6), "down": (3, 6, 4)},
            "head": (4, CLASSES),
        },
    ),
    "Fourier": _plain(
        fourier, {"first": (108, 8), "real": (5,), "imaginary": (5,), "head": (8, CLASSES)}
    ),
    "mixture of experts": _plain(
        mixture_of_experts, {"router": (108, 4), "experts": (4, 108, 5), "head": (5, CLASSES)}
    ),
    "switch in a loop": _plain(
        switch, {"first": (108, 4), "square": (4, 4), "bias": (4,), "head": (4, CLASSES)}
    ),
    "scatter": _plain(scatter, {"values": (108,), "head": (6, CLASSES)}),
    "while loop": _plain(while_loop, {"first": (108, 4), "head": (4, CLASSES)}),
}
# In these it cannot be proved that the examples stay apart; the last one's do not.
NOT_PROVED = ("scatter", "while loop")


def example_inputs(tokens: bool = False, batch: int = BATCH) -> jax.Array:
    """Random images, or tokens with repetitions."""
    generator = np.random.default_rng(3)
    if tokens:
        return jnp.asarray(generator.integers(0, 5, (batch, 4)))
    return jnp.asarray(generator.standard_normal((batch, *IMAGE)))


def problem(name: str, batch: int = BATCH):
    """``(objective, params)`` of a network, in the default float dtype."""
    build, tokens = NETWORKS[name]
    apply, params = build()
    inputs = example_inputs(tokens, batch)
    labels = inputs if tokens else jnp.arange(batch) % CLASSES
    return Objective(apply, inputs, labels), params
