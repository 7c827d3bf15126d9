"""Wrong calls over the whole public API, and what the message of each must contain.

``ROWS`` has a list for every public callable. A row is one call with one mistake; its message must name
the argument, echo the value (or its shape, dtype or type), and contain a piece of the remedy, which for
a number is the range or the kind that is asked for.
"""

import dataclasses
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
from optax_sam import Objective, diagnostics, independence, label_noise, per_example, plots


@dataclasses.dataclass(frozen=True)
class Row:
    """A wrong call, the type of its error, and three things that the message says."""

    mistake: str
    call: Callable[[], Any]
    error: type[Exception]
    argument: str
    value: str
    remedy: str


# The valid world around the mistakes: a linear network with 3 classes on 6 examples.
PARAMS = {"w": jnp.asarray(np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3))}
GRADS = {"w": jnp.asarray(np.ones((4, 3), np.float32))}
TWO_SETS = optax.LookaheadParams.init_synced(PARAMS)
OTHER = {"v": GRADS["w"]}  # another structure
HIDDEN = {"v": optax.MaskedNode(), "w": GRADS["w"]}  # as optax.masked shows them to a stage
SHORT = {"w": jnp.asarray(np.ones(3, np.float32))}  # another shape
INPUTS = jnp.asarray(np.linspace(0, 1, 24, dtype=np.float32).reshape(6, 4))
LABELS = jnp.asarray(np.array([0, 1, 2, 0, 1, 2], np.int32))
LOGITS = jnp.asarray(np.zeros((6, 3), np.float32))
NAN, INF = float("nan"), float("inf")
MATRIX = jnp.asarray(np.ones((3, 3), np.float32))
VECTOR = jnp.asarray(np.ones(3, np.float32))


def apply_fn(params, inputs):
    return inputs @ params["w"]


def loss_fn(params):
    return jnp.sum(params["w"] ** 2)


def with_statistics(params, inputs):
    return apply_fn(params, inputs), {"mean": inputs.mean(0)}


def two_arguments(params, batch):
    return jnp.sum(params["w"] * batch)


def objective(apply=apply_fn, inputs=INPUTS, labels=LABELS, **options):
    return Objective(apply, inputs, labels, **options)


def update(tx, grads=GRADS, params=PARAMS, loss_fn=loss_fn, state=None, **extra_args):
    """One step of an optimizer, with the mistake in one of the arguments."""
    state = tx.init(PARAMS) if state is None else state
    return tx.update(grads, state, params, loss_fn=loss_fn, **extra_args)


def sam_on(grads=GRADS, **changes):
    return update(optax_sam.sam(), grads, **changes)


def alone(stage, updates=GRADS, params=PARAMS, **extra_args):
    """One step of a stage by itself."""
    return stage.update(updates, stage.init(PARAMS), params, **extra_args)


def stage_of(function):
    """A first or third stage whose update returns what the function makes of the updates."""
    return optax.GradientTransformation(
        lambda params: optax.EmptyState(), lambda u, state, params=None: function(u, state)
    )


def traced(function, like=0.0):
    """Calls a function with a traced value."""
    return jax.eval_shape(function, like)


def evaluated(result):
    """A step whose evaluation returns something wrong."""
    evaluation = lambda loss_fn, params, perturbation, *, logits: result  # noqa: E731
    return update(optax_sam.sharpness_aware(optax_sam.normalized(0.1), evaluation=evaluation))


def down_weighted_where(mask):
    return update(optax_sam.sam(combination=optax_sam.down_weight(mask=mask)))


def state_of(tx, params=PARAMS):
    return tx.init(params)


def linen_state(own=optax_sam.linen.TrainState):
    return own.create(apply_fn=apply_fn, params=PARAMS, tx=optax_sam.sam())


def nnx_model():
    return nnx.Linear(4, 3, rngs=nnx.Rngs(0))


def nnx_loss(*args, wrt=nnx.Param, model=None):
    return optax_sam.nnx.loss_function(
        nnx_model() if model is None else model, lambda m: jnp.sum(m.kernel[...]), *args, wrt=wrt
    )


def after_the_clean_pass():
    model = nnx.Dropout(0.5, rngs=nnx.Rngs(0))
    layers = nnx.List([model, nnx_model()])

    def loss_of(layers):
        return jnp.sum(layers[0](layers[1](INPUTS)))

    snapshot = optax_sam.nnx.loss_function(layers, loss_of)
    return snapshot(nnx.as_pure(nnx.state(layers, nnx.Param)))


def eqx_model():
    return eqx.nn.Linear(4, 3, key=jax.random.key(0))


def averaged_by_nobody():
    """A loss that differs over the devices of a shard_map, whose gradients would be summed."""

    def step(x):
        tx = optax_sam.sam(axis_name=())
        return update(tx, loss_fn=lambda p: jnp.sum(p["w"] * x))[0]

    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    along, everywhere = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    mapped = jax.shard_map(step, mesh=mesh, in_specs=along, out_specs=everywhere)
    return jax.eval_shape(mapped, jax.ShapeDtypeStruct((4, 1), jnp.float32))


def devices(**options):
    """A step under pmap."""

    def step(x):
        return update(optax_sam.sam(**options), loss_fn=lambda p: jnp.sum(p["w"] * x))[0]

    return jax.pmap(step, axis_name="data").lower(jnp.asarray(np.ones(4, np.float32)))


def injected(method, **arguments):
    return update(optax.inject_hyperparams(method)(**arguments), loss_fn=objective())


def log_softmax_head(params, inputs):
    return jax.nn.log_softmax(inputs @ params["w"])


def negative_log_likelihood(logits, labels):
    return -jnp.take_along_axis(logits, labels[:, None], 1)[:, 0]


def batch_normalized(params, inputs):
    return ((inputs - inputs.mean(0)) / inputs.std(0)) @ params["w"]


def number(argument, outside, interval, call):
    """Two rows about a number: out of its range, and of another type."""
    return [
        Row(f"{argument} = {outside}", lambda: call(outside), ValueError, argument,
            f"got {outside}", interval),
        Row(f"{argument} = '0.1'", lambda: call("0.1"), TypeError, argument, "'0.1'",
            f"{argument} must be a"),
    ]  # fmt: skip


def clean_grads_of(stage):
    """Rows about g, which a third stage compares with."""
    return [
        Row("no clean_grads", lambda: alone(stage), ValueError, "clean_grads", "None",
            "combination= of optax_sam.sharpness_aware"),
        Row("clean_grads of another structure", lambda: alone(stage, clean_grads=OTHER),
            ValueError, "clean_grads", "{'v': *}", "gradients of the same parameters"),
        Row("clean_grads of another shape", lambda: alone(stage, clean_grads=SHORT),
            ValueError, "clean_grads", "(3,)", "gradients of the same parameters"),
    ]  # fmt: skip


def evaluation_of(function, remedy="Where nothing is to be perturbed it has zeros"):
    """Rows that the evaluations share."""
    return [
        Row("ε of another structure", lambda: function(objective(), PARAMS, OTHER), ValueError,
            "perturbation", "{'v': *}", remedy),
        Row("ε that would be broadcast", lambda: function(objective(), PARAMS, SHORT), ValueError,
            "perturbation", "(3,)", remedy),
        Row("ε = None", lambda: function(objective(), PARAMS, None), ValueError,
            "perturbation", "None", remedy),
        Row("a function among the parameters",
            lambda: function(objective(), {"w": jnp.tanh}, GRADS), TypeError,
            "params", "tanh", "Pass the parameters only"),
    ]  # fmt: skip


ROWS: dict[str, list[Row]] = {}

# ----------------------------------------------------------------------------- named methods
ROWS["sam"] = [
    *number("rho", -0.1, "[0, inf)", optax_sam.sam),
    Row("rho = NaN", lambda: optax_sam.sam(NAN), ValueError, "rho", "nan", "[0, inf)"),
    Row("rho = inf", lambda: optax_sam.sam(INF), ValueError, "rho", "inf", "[0, inf)"),
    Row("rho = None", lambda: optax_sam.sam(None), TypeError, "rho", "None", "a schedule"),
    Row("rho = True", lambda: optax_sam.sam(True), TypeError, "rho", "True", "a schedule"),
    Row("rho is a list", lambda: optax_sam.sam([0.1]), TypeError, "rho", "[0.1]", "a schedule"),
    Row("rho is complex", lambda: optax_sam.sam(0.1j), TypeError, "rho", "0.1j", "a schedule"),
    Row("rho per layer", lambda: optax_sam.sam({"w": 0.1}), TypeError, "rho", "{'w': 0.1}",
        "a schedule"),
    Row("rho is a negative JAX scalar", lambda: optax_sam.sam(jnp.float32(-0.5)), ValueError,
        "rho", "-0.5", "[0, inf)"),
    Row("rho is a negative NumPy scalar", lambda: optax_sam.sam(np.float64(-0.5)), ValueError,
        "rho", "-0.5", "[0, inf)"),
    Row("rho is a vector", lambda: optax_sam.sam(VECTOR), ValueError, "rho", "(3,)", "scalar"),
    Row("a schedule without a step", lambda: update(optax_sam.sam(lambda: 0.1)), TypeError,
        "rho", "<lambda>", "optax.linear_schedule"),
    Row("a schedule of two numbers", lambda: update(optax_sam.sam(lambda a, b: 0.1)), TypeError,
        "rho", "<lambda>", "optax.linear_schedule"),
    Row("a schedule that was not made", lambda: update(optax_sam.sam(optax.constant_schedule)),
        TypeError, "rho", "constant_schedule", "maps the step to a number"),
    Row("a schedule that returns None", lambda: update(optax_sam.sam(lambda step: None)),
        TypeError, "rho", "None", "maps the step to a number"),
    Row("a schedule that returns a vector", lambda: update(optax_sam.sam(lambda step: VECTOR)),
        ValueError, "rho", "(3,)", "maps the step to a number"),
    Row("a misspelled option", lambda: optax_sam.sam(roh=0.1), TypeError, "roh", "roh=",
        "group_size, axis_name"),
    Row("combination was not called", lambda: optax_sam.sam(combination=optax_sam.down_weight),
        TypeError, "combination", "function down_weight", "optax_sam.down_weight(0.5)"),
    Row("combination is alpha", lambda: optax_sam.sam(combination=0.5), TypeError, "combination",
        "0.5", "optax_sam.down_weight(0.5)"),
    Row("combination is a list", lambda: optax_sam.sam(combination=[optax_sam.down_weight()]),
        TypeError, "combination", "[GradientTransformation", "optax_sam.down_weight(0.5)"),
    Row("combination is a method", lambda: optax_sam.sam(combination=optax_sam.saner()).init(PARAMS),
        TypeError, "combination", "whole method", "combination=optax_sam.down_weight(alpha)"),
    Row("mask is a name", lambda: update(optax_sam.sam(mask="bias")), TypeError, "mask", "'bias'",
        "pytree of Python bools"),
    Row("mask is a list", lambda: update(optax_sam.sam(mask=[True])), ValueError, "mask",
        "PyTreeDef([*])", "{'w': *}"),
    Row("mask is a generator", lambda: update(optax_sam.sam(mask=(f for f in [True]))), TypeError,
        "mask", "generator", "pytree of Python bools"),
    Row("mask is one bool", lambda: update(optax_sam.sam(mask=True)), TypeError, "mask", "True",
        "To take all leaves leave it out"),
    Row("mask has other names", lambda: update(optax_sam.sam(mask={"b": True})), ValueError,
        "mask", "{'b': *}", "{'w': *}"),
    Row("mask has arrays", lambda: update(optax_sam.sam(mask={"w": np.ones((4, 3), bool)})),
        TypeError, "mask", "bool[4, 3]", "build them outside of jit"),
    Row("mask has numbers", lambda: update(optax_sam.sam(mask={"w": 1})), TypeError, "mask",
        "leaf 1", "Python bools"),
    Row("mask is all False", lambda: update(optax_sam.sam(mask={"w": False})), ValueError, "mask",
        "excludes every parameter", "use the optimizer alone"),
    Row("mask of (path, leaf)", lambda: update(optax_sam.sam(mask=lambda path, leaf: True)),
        TypeError, "mask", "<lambda>", "tree_map_with_path"),
    Row("mask returns None", lambda: update(optax_sam.sam(mask=lambda params: None)), ValueError,
        "mask", "PyTreeDef(None)", "a prefix of it"),
    Row("mask under inject_hyperparams", lambda: injected(optax_sam.sam, rho=0.1, mask=lambda p: p),
        TypeError, "mask", "Array(0", "static_args=('mask',)"),
    *number("group_size", 0, "at least 1", lambda m: optax_sam.sam(group_size=m)),
    Row("group_size = 2.0", lambda: optax_sam.sam(group_size=2.0), TypeError, "group_size", "2.0",
        "an integer"),
    Row("group_size is an array", lambda: optax_sam.sam(group_size=jnp.int32(2)), TypeError,
        "group_size", "Array(2", "int(group_size)"),
    Row("group_size does not divide the batch",
        lambda: update(optax_sam.sam(group_size=4), loss_fn=objective()), ValueError, "group_size",
        "4 must divide the batch of 6", "such as 3"),
    Row("group_size above the batch",
        lambda: update(optax_sam.sam(group_size=16), loss_fn=objective()), ValueError,
        "group_size", "16 must divide the batch of 6", "such as 6"),
    Row("group_size of a plain loss", lambda: update(optax_sam.sam(group_size=2)), TypeError,
        "loss_fn", "function loss_fn", "optax_sam.Objective(apply_fn, inputs, labels)"),
    Row("group_size=1 and BatchNorm",
        lambda: update(optax_sam.sam(group_size=1), loss_fn=objective(batch_normalized)),
        ValueError, "examples", "reduce_sum", "GroupNorm or LayerNorm"),
    Row("groups that climb on a part",
        lambda: optax_sam.sam(group_size=2, ascent_fraction=0.5), ValueError, "ascent_fraction",
        "0.5", "each group climbs along its own gradient"),
    Row("axis_name is a list", lambda: optax_sam.sam(axis_name=["data"]), TypeError, "axis_name",
        "['data']", "axis_name=('hosts', 'devices')"),
    Row("axis_name under jit", lambda: update(optax_sam.sam(axis_name="data")), ValueError,
        "axis_name", "'data'", "leave it out"),
    Row("axis_name is a number", lambda: update(optax_sam.sam(axis_name=3)), ValueError,
        "axis_name", "3", "leave it out"),
    Row("axis_name misspelled", lambda: devices(axis_name="dta"), ValueError, "axis_name", "'dta'",
        "mapped here are ('data',)"),
    Row("axis_name forgotten", lambda: devices(), ValueError, "axis_name", "'data'",
        "axis_name=() if each device"),
    *number("ascent_steps", 0, "at least 1", lambda n: optax_sam.sam(ascent_steps=n)),
    *number("ascent_fraction", 0, "(0, 1]", lambda q: optax_sam.sam(ascent_fraction=q)),
    Row("ascent_steps under inject_hyperparams",
        lambda: injected(optax_sam.sam, rho=0.1, ascent_steps=2), TypeError, "ascent_steps",
        "Array(2", "static_args=('ascent_steps',)"),
    *number("every_k", 0, "at least 1", lambda k: optax_sam.sam(every_k=k)),
    *number("start_step", -1, "at least 0", lambda k: optax_sam.sam(start_step=k)),
    Row("stop_step before start_step", lambda: optax_sam.sam(start_step=5, stop_step=3),
        ValueError, "stop_step", "3", "at least 5"),
    Row("when is a number", lambda: optax_sam.sam(when=0.5), TypeError, "when", "0.5",
        "optax_sam.gradient_norm_is_large()"),
]  # fmt: skip

# What every method says about the arguments of update; sam stands for all of them.
ROWS["sam"] += [
    Row("params of optax.lookahead", lambda: optax_sam.sam().update(
        GRADS, state_of(optax_sam.sam()), TWO_SETS, loss_fn=loss_fn), TypeError, "params",
        "LookaheadParams", "params.fast"),
    Row("hidden parameters", lambda: sam_on(params=HIDDEN), TypeError, "params", "['v']",
        "pass mask= to the method"),
    Row("updates = None", lambda: optax_sam.sam().update(
        None, state_of(optax_sam.sam()), PARAMS, loss_fn=loss_fn), ValueError, "updates",
        "PyTreeDef(None)", "Pass the gradients of the loss"),
    Row("updates = (value, gradients)", lambda: sam_on((1.0, GRADS)), ValueError, "updates",
        "PyTreeDef((*, {'w': *}))", "Unpack jax.value_and_grad"),
    Row("updates is a function", lambda: sam_on(jax.grad(loss_fn)), ValueError, "updates",
        "PyTreeDef(*)", "Pass the gradients of the loss"),
    Row("updates of other parameters", lambda: sam_on(OTHER), ValueError, "updates", "{'v': *}",
        "in these params"),
    Row("updates per example", lambda: sam_on({"w": np.ones((6, 4, 3))}), ValueError, "updates",
        "(6, 4, 3)", "must be averaged first"),
    Row("updates with a string", lambda: sam_on({"w": "x"}), ValueError, "updates", "str",
        "the shape (4, 3)"),
    Row("updates are complex", lambda: sam_on({"w": np.ones((4, 3), complex)}), TypeError,
        "updates", "complex128", "loss must be real"),
    Row("params = None", lambda: sam_on(params=None), ValueError, "params", "None",
        "tx.update(grads, opt_state, params, loss_fn=loss_fn)"),
    Row("params of another structure", lambda: sam_on(params=OTHER), ValueError, "params",
        "{'v': *}", "Pass the gradients of the loss"),
    Row("params and state exchanged", lambda: optax_sam.sam().update(
        GRADS, PARAMS, state_of(optax_sam.sam()), loss_fn=loss_fn), TypeError, "state", "dict",
        "tx.init(params)"),
    Row("params are complex", lambda: optax_sam.sam().init({"w": np.ones(3, complex)}), TypeError,
        "parameter ['w']", "complex64", "as two real parameters"),
    Row("a function among the params", lambda: optax_sam.sam().init({"w": VECTOR, "f": jnp.tanh}),
        TypeError, "params", "tanh", "eqx.filter(model, eqx.is_inexact_array)"),
    Row("a string among the params", lambda: optax_sam.sam().init({"w": VECTOR, "f": "relu"}),
        TypeError, "params", "'relu'", "Pass the parameters only"),
    Row("an Equinox model as params",
        lambda: optax_sam.sam().init(eqx.nn.Lambda(jnp.tanh)), TypeError,
        "params", "params.fn", "eqx.filter(model, eqx.is_inexact_array)"),
    Row("params under optax.masked",
        lambda: update(optax.masked(optax_sam.sam(), {"w": False})), TypeError, "mask",
        "optax.masked", "pass mask= to the method"),
    Row("state = None", lambda: optax_sam.sam().update(GRADS, None, PARAMS, loss_fn=loss_fn),
        TypeError, "state", "NoneType", "tx.init(params)"),
    Row("state of Adam", lambda: sam_on(state=optax.adam(0.1).init(PARAMS)), TypeError, "state",
        "tuple", "cannot be continued"),
    Row("state of the whole chain",
        lambda: sam_on(state=optax.chain(optax_sam.sam(), optax.sgd(0.1)).init(PARAMS)),
        TypeError, "state", "tuple", "tx.init(params) of the same tx"),
    Row("state without the schedule's count",
        lambda: update(optax_sam.sam(optax.constant_schedule(0.1)), state=state_of(optax_sam.sam())),
        TypeError, "state", "EmptyState", "tx.init(params) of the same tx"),
    Row("no loss_fn", lambda: sam_on(loss_fn=None), TypeError, "loss_fn", "None",
        "tx.update(grads, opt_state, params, loss_fn=loss_fn)"),
    Row("loss_fn is the loss", lambda: sam_on(loss_fn=0.5), TypeError, "loss_fn", "0.5",
        "not the value of the loss"),
    Row("loss_fn is a name", lambda: sam_on(loss_fn="mse"), TypeError, "loss_fn", "'mse'",
        "a function of the parameters"),
    Row("loss_fn takes a batch", lambda: sam_on(loss_fn=two_arguments), TypeError, "loss_fn",
        "two_arguments", "loss_fn=lambda params: loss(params, inputs, labels)"),
    Row("loss_fn takes nothing", lambda: sam_on(loss_fn=lambda: 0.0), TypeError, "loss_fn",
        "<lambda>", "the parameters and nothing else"),
    Row("loss_fn is a class", lambda: sam_on(loss_fn=Objective), TypeError, "loss_fn", "Objective",
        "optax_sam.Objective(apply_fn, inputs, labels)"),
    Row("loss_fn is value_and_grad", lambda: sam_on(loss_fn=jax.value_and_grad(loss_fn)),
        TypeError, "loss_fn", "(value, gradients)", "not jax.value_and_grad(loss)"),
    Row("loss_fn is grad", lambda: sam_on(loss_fn=jax.grad(loss_fn)), TypeError, "loss_fn",
        "float32[4, 3]", "must return a scalar loss"),
    Row("loss_fn returns None", lambda: sam_on(loss_fn=lambda p: None), TypeError, "loss_fn",
        "None", "Does it return its value?"),
    Row("loss_fn returns a dictionary", lambda: sam_on(loss_fn=lambda p: {"loss": p["w"]}),
        TypeError, "loss_fn", "'loss'", "a scalar loss"),
    Row("loss_fn returns a vector", lambda: sam_on(loss_fn=lambda p: p["w"][0]), TypeError,
        "loss_fn", "(3,)", "Take the mean over the batch"),
    Row("loss_fn returns an integer", lambda: sam_on(loss_fn=lambda p: 3), TypeError, "loss_fn",
        "3", "a scalar loss"),
    Row("loss_fn returns a bool", lambda: sam_on(loss_fn=lambda p: jnp.any(p["w"] > 0)), TypeError,
        "loss_fn", "bool", "a scalar loss"),
    Row("loss_fn returns a complex number", lambda: sam_on(loss_fn=lambda p: jnp.sum(p["w"]) * 1j),
        TypeError, "loss_fn", "complex64", "a scalar loss"),
    Row("loss_fn returns a generator", lambda: sam_on(loss_fn=lambda p: (x for x in [1.0])),
        TypeError, "loss_fn", "generator", "a scalar loss"),
    Row("loss_fn returns three values", lambda: sam_on(loss_fn=lambda p: (1.0, 2, 3)), TypeError,
        "loss_fn", "tuple of 3", "return loss, {...}"),
    Row("clean_grads of another structure",
        lambda: update(optax_sam.saner(), clean_grads=OTHER), ValueError, "clean_grads",
        "{'v': *}", "in these params"),
    Row("clean_grads of another shape",
        lambda: update(optax_sam.saner(), clean_grads={"w": INPUTS}), ValueError, "clean_grads",
        "(6, 4)", "the shape (4, 3)"),
    Row("logit=", lambda: sam_on(logit=LOGITS), TypeError, "logit", "logit=", "logits=?"),
    Row("two methods in one chain",
        lambda: update(optax.chain(optax_sam.sam(), optax_sam.saner())), UserWarning,
        "gradients", "optax.chain(sam(...), saner(...))", "combination=optax_sam.down_weight(0.5)"),
]  # fmt: skip

ROWS["asam"] = [
    *number("rho", -1, "[0, inf)", optax_sam.asam),
    *number("eta", -0.1, "[0, inf)", lambda eta: optax_sam.asam(eta=eta)),
    Row("scale_mask is a name", lambda: update(optax_sam.asam(scale_mask="kernel")), TypeError,
        "scale_mask", "'kernel'", "pytree of Python bools"),
    Row("scale_mask under inject_hyperparams",
        lambda: injected(optax_sam.asam, rho=0.1, scale_mask=lambda p: p), TypeError, "scale_mask",
        "Array(0", "static_args=('scale_mask',)"),
]  # fmt: skip
ROWS["saner"] = [
    *number("rho", -1, "[0, inf)", optax_sam.saner),
    *number("alpha", 1.5, "0 is SAM, 1 drops set B", lambda a: optax_sam.saner(alpha=a)),
    Row("alpha is a JAX scalar", lambda: optax_sam.saner(0.05, jnp.float32(3)), ValueError,
        "alpha", "3.0", "[0, 1]"),
    *number("ratio_epsilon", -1e-8, "[0, inf)", lambda e: optax_sam.saner(ratio_epsilon=e)),
    Row("state of sam", lambda: update(optax_sam.saner(), state=state_of(optax_sam.sam())),
        TypeError, "state", "tuple", "tx.init(params) of the same tx"),
]  # fmt: skip
ROWS["jsam"] = [
    *number("rho", -1, "[0, inf)", optax_sam.jsam),
    Row("a plain loss", lambda: update(optax_sam.jsam()), TypeError, "loss_fn",
        "function loss_fn", "optax_sam.Objective(apply_fn, inputs, labels)"),
    *[
        Row(f"logits: {what}", lambda z=z: update(optax_sam.jsam(), loss_fn=objective(), logits=z),
            ValueError, "logits", echo, "the training step's own forward pass")
        for what, z, echo in (
            ("of 3 examples", LOGITS[:3], "float32[3, 3]"),
            ("bfloat16", LOGITS.astype(jnp.bfloat16), "bfloat16[6, 3]"),
            ("integers", np.zeros((6, 3), np.int32), "int32[6, 3]"),
            ("a string", "logits", "str"),
            ("a list", [0.0, 1.0], "['float', 'float']"),
        )
    ],
    Row("a network that ends in log_softmax", lambda: update(optax_sam.jsam(), loss_fn=objective(
        log_softmax_head, loss=negative_log_likelihood)), UserWarning, "output", "log_softmax",
        "put the log_softmax into the loss"),
    Row("a network that ends in argmax", lambda: update(optax_sam.jsam(), loss_fn=objective(
        lambda p, x: jnp.argmax(x @ p["w"], -1), loss=lambda z, y: 1.0 * (z - y))), TypeError,
        "logits", "int32[6]", "before any rounding or argmax"),
]  # fmt: skip
ROWS["lsam"] = [
    *number("rho", -1, "[0, inf)", optax_sam.lsam),
    Row("a plain loss", lambda: update(optax_sam.lsam()), TypeError, "loss_fn",
        "function loss_fn", "optax_sam.Objective(apply_fn, inputs, labels)"),
]  # fmt: skip
ROWS["ncsam"] = [
    *number("rho", -1, "[0, inf)", optax_sam.ncsam),
    *number("kappa", -0.1, "[0, inf)", lambda k: optax_sam.ncsam(kappa=k)),
    *number("total_steps", 0, "at least 1", lambda n: optax_sam.ncsam(total_steps=n)),
    *number("flip_ratio", 0, "Without flips use optax_sam.sam",
            lambda r: optax_sam.ncsam(flip_ratio=r)),
    *number("seed", -1, "at least 0", lambda seed: optax_sam.ncsam(seed=seed)),
    Row("kappa is a schedule", lambda: optax_sam.ncsam(kappa=optax.constant_schedule(0.1)),
        TypeError, "kappa", "constant_schedule", "strength= of optax_sam.add_noise_compensation"),
    Row("seed = None", lambda: optax_sam.ncsam(seed=None), TypeError, "seed", "None", "an integer"),
    Row("seed is a key", lambda: optax_sam.ncsam(seed=jax.random.key(0)), TypeError, "seed",
        "key", "an integer"),
    Row("seed is a float array", lambda: optax_sam.ncsam(seed=jnp.float32(1.5)), TypeError, "seed",
        "1.5", "an integer"),
    Row("deterministic is a word", lambda: optax_sam.ncsam(deterministic="no"), TypeError,
        "deterministic", "'no'", "True or False"),
    Row("by_weights is a word", lambda: optax_sam.ncsam(by_weights="no"), TypeError, "by_weights",
        "'no'", "True or False"),
    Row("projection is a word", lambda: optax_sam.ncsam(projection="no"), TypeError, "projection",
        "'no'", "True or False"),
    Row("an unknown warm-up", lambda: optax_sam.ncsam(warmup="adam"), ValueError, "warmup",
        "'adam'", "'sgd' or 'sam'"),
    Row("a warm-up of the whole training",
        lambda: optax_sam.ncsam(total_steps=10, warmup_steps=20), ValueError, "warmup_steps", "20",
        "total_steps counts the whole training"),
    Row("start_step", lambda: optax_sam.ncsam(start_step=3), ValueError, "start_step", "3",
        "warmup_steps"),
    Row("when with total_steps", lambda: optax_sam.ncsam(total_steps=10, when=len), ValueError,
        "when", "total_steps=10", "Leave one of the two out"),
    Row("when with a warm-up by SAM",
        lambda: optax_sam.ncsam(warmup_steps=3, warmup="sam", when=len), ValueError, "when",
        "warmup='sam'", "Leave one of the two out"),
    Row("every_k with a schedule", lambda: optax_sam.ncsam(total_steps=10, every_k="2"), TypeError,
        "every_k", "'2'", "an integer"),
    Row("flip_ratio under inject_hyperparams", lambda: injected(optax_sam.ncsam, rho=0.1),
        TypeError, "flip_ratio", "Array(0.2", "static_args=('flip_ratio',)"),
    Row("a plain loss", lambda: update(optax_sam.ncsam()), TypeError, "loss_fn",
        "function loss_fn", "optax_sam.Objective(apply_fn, inputs, labels)"),
    Row("logits of 10 classes for a network of 3",
        lambda: update(optax_sam.ncsam(), loss_fn=objective(), logits=np.zeros((6, 10))),
        ValueError, "logits", "[6, 10]", "float32[6, 3]"),
    Row("a flip_ratio that chooses nobody",
        lambda: update(optax_sam.ncsam(flip_ratio=0.1), loss_fn=objective()), ValueError,
        "flip_ratio", "0.1", "take a larger ratio, batch or group"),
    Row("one logit for two classes", lambda: update(
        optax_sam.ncsam(), loss_fn=objective(lambda p, x: (x @ p["w"])[:, :1], labels=0 * LABELS)),
        ValueError, "logits", "(6, 1)", "one logit per class"),
    Row("labels that are numbers", lambda: update(optax_sam.ncsam(), loss_fn=objective(
        labels=INPUTS[:, 0], loss=lambda z, y: z[:, 0] - y)), TypeError, "labels", "float32[6]",
        "one array of integer labels"),
    Row("a label per token", lambda: update(optax_sam.ncsam(), loss_fn=objective(
        lambda p, x: jnp.stack([x @ p["w"]] * 2, 1), labels=jnp.stack([LABELS] * 2, 1))),
        TypeError, "logits", "float32[6, 2, 3]", "map the network over tokens"),
    Row("label_of makes new labels", lambda: update(
        optax_sam.ncsam(label_of=lambda y: y["a"] + 1),
        loss_fn=objective(labels={"a": LABELS, "b": LABELS}, loss=lambda z, y: z[:, 0])),
        TypeError, "label_of", "'a': 'int32[6]'", "label_of=lambda labels: labels['...']"),
    Row("label_of is a name", lambda: optax_sam.ncsam(label_of="a"), TypeError, "label_of", "'a'",
        "label_of=lambda labels: labels['...']"),
    Row("state of sam",
        lambda: update(optax_sam.ncsam(), loss_fn=objective(), state=state_of(optax_sam.sam())),
        TypeError, "state", "EmptyState", "tx.init(params) of the same tx"),
]  # fmt: skip
ROWS["gsam"] = [
    *number("rho", -1, "[0, inf)", optax_sam.gsam),
    Row("alpha = NaN", lambda: optax_sam.gsam(alpha=NAN), ValueError, "alpha", "nan", "(-inf, inf)"),
    Row("a combination that is a number", lambda: optax_sam.gsam(combination=0.5), TypeError,
        "combination", "0.5", "optax_sam.down_weight(0.5)"),
]  # fmt: skip
ROWS["friendly_sam"] = [
    *number("rho", -1, "[0, inf)", optax_sam.friendly_sam),
    *number("decay", 1.5, "[0, 1]", lambda d: optax_sam.friendly_sam(decay=d)),
    *number("sigma", INF, "(-inf, inf)", lambda s: optax_sam.friendly_sam(sigma=s)),
]
ROWS["vasso"] = [
    *number("rho", -1, "[0, inf)", optax_sam.vasso),
    *number("theta", 0, "At 0 the average would never change", lambda t: optax_sam.vasso(theta=t)),
    Row("theta = 0 of NumPy", lambda: optax_sam.vasso(theta=np.float32(0)), ValueError, "theta",
        "0.0", "(0, 1]"),
    Row("theta = 0 under inject_hyperparams", lambda: injected(optax_sam.vasso, theta=0.0),
        ValueError, "theta", "0.0", "(0, 1]"),
    Row("state of other parameters",
        lambda: update(optax_sam.vasso(), state=state_of(optax_sam.vasso(), OTHER)), TypeError,
        "state", "tuple", "tx.init(params) of the same tx"),
    Row("state of other shapes",
        lambda: update(optax_sam.vasso(), state=state_of(optax_sam.vasso(), SHORT)), ValueError,
        "the average in the state", "(3,)", "tx.init(params) of the same params"),
]  # fmt: skip
ROWS["wsam"] = [
    *number("rho", -1, "[0, inf)", optax_sam.wsam),
    *number("gamma", 1, "[0, 1)", lambda g: optax_sam.wsam(gamma=g)),
]
ROWS["wsam"] += [
    Row("base was not called", lambda: optax_sam.wsam(base=optax.sgd), TypeError, "base",
        "function sgd", "an optax.GradientTransformation"),
    Row("base is a method", lambda: optax_sam.wsam(base=optax_sam.sam()).init(PARAMS), TypeError,
        "base", "whole method", "Pass a stage"),
]  # fmt: skip
ROWS["functional_sam"] = [
    *number("rho", -1, "[0, inf)", optax_sam.functional_sam),
    Row("preconditioner is a word", lambda: optax_sam.functional_sam(preconditioner="adam"),
        TypeError, "preconditioner", "'adam'", "preconditioner=optax_sam.scale_by_second_moment()"),
    Row("a plain loss", lambda: update(optax_sam.functional_sam()), TypeError, "loss_fn",
        "function loss_fn", "optax_sam.Objective(apply_fn, inputs, labels)"),
]  # fmt: skip
ROWS["stable_sam"] = number("rho", -1, "[0, inf)", optax_sam.stable_sam)
ROWS["le_sam"] = [
    *number("sigma", -0.1, "[0, inf)", lambda s: optax_sam.le_sam(s, 0.5)),
    *number("rho_max", -1, "[0, inf)", lambda rho: optax_sam.le_sam(0.1, rho)),
    *number("sigma", INF, "[0, inf)", lambda s: optax_sam.le_sam(s, 0.5))[:1],
]
ROWS["looksam"] = [
    *number("rho", -1, "[0, inf)", optax_sam.looksam),
    *number("every_k", 0, "at least 1", lambda k: optax_sam.looksam(every_k=k)),
    *number("alpha", -0.7, "[0, inf)", lambda a: optax_sam.looksam(alpha=a)),
    *number("norm_epsilon", -1, "[0, inf)", lambda e: optax_sam.looksam(norm_epsilon=e)),
    Row("every_k under inject_hyperparams", lambda: injected(optax_sam.looksam, rho=0.1), TypeError,
        "every_k", "Array(5", "static_args=('every_k',)"),
    Row("state of sam", lambda: update(optax_sam.looksam(), state=state_of(optax_sam.sam())),
        TypeError, "state", "SharpnessAwareState", "tx.init(params) of the same tx"),
    Row("state of other shapes",
        lambda: update(optax_sam.looksam(), state=state_of(optax_sam.looksam(), SHORT)), ValueError,
        "the orthogonal part in the state", "(3,)", "tx.init(params) of the same params"),
]  # fmt: skip
ROWS["msam"] = [
    *number("rho", -3, "[0, inf)", optax_sam.msam),
    *number("momentum", 1, "[0, 1)", lambda mu: optax_sam.msam(momentum=mu)),
    Row("groups", lambda: optax_sam.msam(group_size=2), ValueError, "group_size", "2",
        "Leave it out"),
    Row("a part of the batch", lambda: optax_sam.msam(ascent_fraction=0.5), ValueError,
        "ascent_fraction", "0.5", "Leave it out"),
    Row("several steps", lambda: optax_sam.msam(ascent_steps=2), ValueError, "ascent_steps", "2",
        "Leave it out"),
    Row("state of sam", lambda: update(optax_sam.msam(), state=state_of(optax_sam.sam())),
        TypeError, "state", "SharpnessAwareState", "tx.init(params) of the same tx"),
]  # fmt: skip

# ------------------------------------------------------------------------------- the engine
SA = optax_sam.sharpness_aware
ROWS["sharpness_aware"] = [
    *[
        Row(f"perturbation: {what}", lambda p=p: SA(p), TypeError, "perturbation", echo,
            "optax_sam.normalized(rho=0.05)")
        for what, p, echo in (
            ("rho", 0.05, "0.05"),
            ("not called", optax_sam.normalized, "function normalized"),
            ("a tuple", (len, len), "built-in function len"),
        )
    ],
    Row("perturbation is a method", lambda: SA(optax_sam.sam()).init(PARAMS), TypeError,
        "perturbation", "whole method", "perturbation=optax_sam.normalized(rho)"),
    Row("perturbation is a wrapper of methods",
        lambda: SA(optax_sam.sometimes(optax_sam.sam(0.1), every_k=2)).init(PARAMS),
        TypeError, "perturbation", "whole method", "perturbation=optax_sam.normalized(rho)"),
    Row("perturbation looks along the previous one",
        lambda: SA(optax_sam.along_previous(optax_sam.sam(0.1))).init(PARAMS), TypeError,
        "perturbation", "whole method", "perturbation=optax_sam.normalized(rho)"),
    Row("perturbation returns None", lambda: update(SA(stage_of(lambda u, s: (None, s)))),
        ValueError, "perturbation", "PyTreeDef(None)", "one perturbation for every gradient"),
    Row("perturbation returns norms",
        lambda: update(SA(stage_of(lambda u, s: (jax.tree.map(jnp.sum, u), s)))), ValueError,
        "perturbation", "()", "one perturbation for every gradient"),
    Row("perturbation returns no state", lambda: update(SA(stage_of(lambda u, s: u))), TypeError,
        "perturbation", "dict", "return updates, state"),
    Row("evaluation is a word", lambda: SA(optax_sam.normalized(0.1), evaluation="full"),
        TypeError, "evaluation", "'full'", "optax_sam.full_gradient"),
    Row("evaluation without logits", lambda: update(
        SA(optax_sam.normalized(0.1), evaluation=lambda loss_fn, params, epsilon: 0)), TypeError,
        "evaluation", "<lambda>", "(loss_fn, params, perturbation, *, logits)"),
    *[
        Row(f"evaluation returns {what}", lambda r=r: evaluated(r), error, "evaluation", echo,
            "returns (loss, gradients)")
        for what, r, error, echo in (
            ("None", None, TypeError, "NoneType"),
            ("gradients", GRADS, TypeError, "float32[4, 3]"),
            ("a vector", (VECTOR, GRADS), TypeError, "float32[3]"),
            ("other gradients", (0.0, OTHER), ValueError, "{'v': *}"),
        )
    ],
    Row("combination returns None", lambda: update(
        SA(optax_sam.normalized(0.1), combination=stage_of(lambda u, s: (None, s)))), ValueError,
        "combination", "PyTreeDef(None)", "one direction for every perturbed gradient"),
    Row("a loss that differs over devices", averaged_by_nobody, ValueError, "axis_name", "'data'",
        "average the loss over the axis"),
]  # fmt: skip
ROWS["get_metrics"] = [
    Row("no state", lambda: optax_sam.get_metrics(None), ValueError, "opt_state", "NoneType",
        "Pass the opt_state"),
    Row("the optimizer", lambda: optax_sam.get_metrics(optax_sam.sam()), ValueError, "opt_state",
        "GradientTransformationExtraArgs", "Pass the opt_state"),
    Row("state of Adam", lambda: optax_sam.get_metrics(optax.adam(0.1).init(PARAMS)), ValueError,
        "opt_state", "found 0", "one method in it"),
    Row("two methods", lambda: optax_sam.get_metrics((state_of(optax_sam.sam()),) * 2),
        ValueError, "opt_state", "found 2", "optax.tree.get_all_with_path"),
]  # fmt: skip

# --------------------------------------------------------------------------------- the loss
LABEL_MISTAKES = (
    ("floats", 1.0 * LABELS, TypeError, "float32", "labels.astype(jnp.int32)"),
    ("bools", LABELS > 0, TypeError, "bool", "labels.astype(jnp.int32)"),
    ("one-hot", jnp.eye(3)[LABELS], TypeError, "(6, 3)", "loss=optax.softmax_cross_entropy"),
    ("(B, 1)", LABELS[:, None], ValueError, "(6, 1)", "labels[..., 0]"),
    ("words", np.array(list("abcabc")), TypeError, "<U1", "a loss= of your own"),
    ("None", None, TypeError, "NoneType", "a loss= of your own"),
    ("a dictionary", {"y": LABELS}, TypeError, "'y': 'int32[6]'", "a loss= of your own"),
    ("-1", np.asarray(LABELS) - 1, ValueError, "-1 to 1", "weight 0 with weights="),
    (
        "too large",
        np.asarray(LABELS) + 1,
        ValueError,
        "1 to 3",
        "Leave examples without a label out",
    ),
)
LOGIT_MISTAKES = (
    ("a dictionary", lambda z: {"z": z}, TypeError, "'z': 'float32[6, 3]'"),
    ("None", lambda z: None, TypeError, "NoneType"),
    ("integers", lambda z: z.astype(jnp.int32), TypeError, "int32[6, 3]"),
    ("complex", lambda z: 1j * z, TypeError, "complex64[6, 3]"),
    ("a scalar", lambda z: jnp.sum(z), ValueError, "shape ()"),
)
LOSS_MISTAKES = (
    ("the mean", lambda z, y: jnp.mean(z), ValueError, "shape ()", "takes the mean itself"),
    ("None", lambda z, y: None, TypeError, "NoneType", "a loss per example"),
    ("class numbers", lambda z, y: y, TypeError, "int32[6]", "have no gradient"),
    ("hits", lambda z, y: jnp.argmax(z, -1) == y, TypeError, "bool[6]", "have no gradient"),
    ("complex", lambda z, y: 1j * z[:, 0], TypeError, "complex64[6]", "a loss per example"),
    (
        "a tuple",
        lambda z, y: (z[:, 0], y),
        TypeError,
        "('float32[6]', 'int32[6]')",
        "one floating array",
    ),
    ("pairs", lambda z, y: z[:, 0] - y[:, None], ValueError, "(6, 6)", "Give both the same shape"),
)
WEIGHT_MISTAKES = (
    ("a list", [1.0] * 6, TypeError, "[1.0, 1.0", "an array of numbers"),
    ("a number", 2.0, TypeError, "2.0", "an array of numbers"),
    ("a function", len, TypeError, "len", "an array of numbers"),
    ("words", np.array(list("abcdef")), TypeError, "'a'", "an array of numbers"),
    ("complex", np.ones(6, complex), TypeError, "1.+0.j", "an array of numbers"),
    ("too few", np.ones(5), ValueError, "(5,)", "one common leading batch axis"),
    ("(B, 1)", np.ones((6, 1)), ValueError, "(6, 1)", "such as (6,)"),
    ("negative", -np.ones(6), ValueError, "-1.0", "0 leaves it out"),
    ("NaN", np.full(6, NAN), ValueError, "nan", "0 leaves it out"),
)
PENALTY_MISTAKES = (
    ("a vector", lambda p: p["w"][0], "float32[3]", "Sum over all parameters"),
    ("a tree", lambda p: p, "'w': 'float32[4, 3]'", "Sum over all parameters"),
    ("None", lambda p: None, "NoneType", "Sum over all parameters"),
    ("of two arguments", two_arguments, "two_arguments", "penalty=lambda params"),
)
INDEX_MISTAKES = (
    ("a word", "first", TypeError, "'first'", "jnp.asarray([...])"),
    ("floats", VECTOR, TypeError, "float32[3]", "jnp.asarray([...])"),
    ("a list", [0, 1], TypeError, "[0, 1]", "jnp.asarray([...])"),
    ("one number", 2, TypeError, "2", "jnp.asarray([...])"),
    ("out of the batch", np.array([7]), ValueError, "7 to 7", "[-6, 6)"),
)
ROWS["Objective"] = [
    *[
        Row(f"apply_fn: {what}", lambda f=f: Objective(f, INPUTS, LABELS), TypeError, "apply_fn",
            echo, "e.g. model.apply")
        for what, f, echo in (
            ("the params", PARAMS, "float32[4, 3]"),
            ("the inputs", INPUTS, "float32[6, 4]"),
            ("None", None, "None"),
            ("a Linen module", nn.Dense(3), "Dense("),
        )
    ],
    Row("apply_fn of the params alone", lambda: objective(lambda p: p)(PARAMS), TypeError,
        "apply_fn", "<lambda>", "(params, inputs)"),
    Row("apply_fn with a key", lambda: objective(lambda p, x, key: x)(PARAMS), TypeError,
        "apply_fn", "missing a required argument: 'key'", "apply_fn=lambda params, inputs"),
    Row("apply_fn is an Equinox model", lambda: objective(eqx_model())(PARAMS), TypeError,
        "apply_fn", "Linear(", "objective(model, inputs, labels)"),
    Row("apply_fn returns (logits, aux)", lambda: objective(lambda p, x: (x @ p["w"], 0))(PARAMS),
        ValueError, "apply_fn", "tuple of 2", "pass has_aux=True"),
    Row("apply_fn returns no aux", lambda: objective(has_aux=True)(PARAMS), ValueError,
        "has_aux", "ArrayImpl", "must return (logits, aux)"),
    Row("has_aux = 1", lambda: objective(has_aux=1), TypeError, "has_aux", "1", "True or False"),
    Row("inputs and labels are None", lambda: objective(inputs=None, labels=None), ValueError,
        "inputs", "None", "one common leading batch axis"),
    Row("fewer labels than inputs", lambda: objective(labels=LABELS[:5]), ValueError, "labels",
        "(5,)", "one common leading batch axis"),
    Row("an empty batch", lambda: objective(inputs=INPUTS[:0], labels=LABELS[:0]), ValueError,
        "inputs", "(0, 4)", "Leave empty batches out"),
    Row("labels: a list", lambda: objective(labels=[0, 1, 2, 0, 1, 2]), ValueError, "labels",
        "[(), ()", "arrays with jnp.asarray"),
    Row("labels: one number", lambda: objective(labels=3), ValueError, "labels", "()",
        "arrays of B rows"),
    Row("labels: a generator", lambda: objective(labels=(y for y in [0, 1])), TypeError, "labels",
        "generator", "jnp.asarray(list(labels))"),
    Row("inputs: an iterator", lambda: objective(inputs=iter([INPUTS])), TypeError, "inputs",
        "list_iterator", "jnp.asarray(list(inputs))"),
    *[
        Row(f"labels: {what}", lambda y=y: objective(labels=y)(PARAMS), error, "labels", echo, remedy)
        for what, y, error, echo, remedy in LABEL_MISTAKES
    ],
    *[
        Row(f"logits: {what}", lambda f=f: objective(lambda p, x: f(x @ p["w"]))(PARAMS), error,
            "logits", echo, "the default loss needs")
        for what, f, error, echo in LOGIT_MISTAKES
    ],
    Row("loss is a word", lambda: objective(loss="mse"), TypeError, "loss", "'mse'",
        "(logits, labels) -> one loss per example"),
    Row("loss of the logits alone", lambda: objective(loss=lambda z: z)(PARAMS), TypeError, "loss",
        "<lambda>", "(logits, labels)"),
    *[
        Row(f"loss returns {what}", lambda f=f: objective(loss=f)(PARAMS), error, "loss", echo, remedy)
        for what, f, error, echo, remedy in LOSS_MISTAKES
    ],
    *[
        Row(f"weights: {what}", lambda v=v: objective(weights=v)(PARAMS), error, "weights", echo,
            remedy)
        for what, v, error, echo, remedy in WEIGHT_MISTAKES
    ],
    Row("penalty is a number", lambda: objective(penalty=0.1), TypeError, "penalty", "0.1",
        "a function params -> scalar"),
    *[
        Row(f"penalty: {what}", lambda f=f: objective(penalty=f)(PARAMS), TypeError, "penalty", echo,
            remedy)
        for what, f, echo, remedy in PENALTY_MISTAKES
    ],
    *number("microbatch_size", 0, "at least 1", lambda m: objective(microbatch_size=m)),
    Row("spmd_axis_name is a number", lambda: objective(spmd_axis_name=0), TypeError,
        "spmd_axis_name", "0", "spmd_axis_name='data'"),
    Row("microbatch_size = 2.0", lambda: objective(microbatch_size=2.0), TypeError,
        "microbatch_size", "2.0", "an integer"),
    Row("microbatch_size does not divide", lambda: objective(microbatch_size=4), ValueError,
        "microbatch_size", "4 must divide the batch of 6", "such as 3"),
    Row("microbatch_size above the batch", lambda: objective(microbatch_size=12), ValueError,
        "microbatch_size", "12 must divide the batch of 6", "such as 6"),
    Row("microbatches and BatchNorm",
        lambda: objective(batch_normalized, microbatch_size=2)(PARAMS), ValueError,
        "microbatch_size", "reduce_sum", "use GroupNorm or LayerNorm"),
    *number("loss_scale", -8.0, "(0, inf)", lambda s: objective(loss_scale=s)),
    Row("groups: no divisor", lambda: objective().groups(4), ValueError, "group_size",
        "4 must divide the batch of 6", "such as 3"),
    *[
        Row(f"subset: {what}", lambda i=i: objective().subset(i), error, "indices", echo, remedy)
        for what, i, error, echo, remedy in INDEX_MISTAKES
    ],
    Row("subset: a mask under jit",
        lambda: traced(lambda mask: objective().subset(mask).labels, np.ones(6, bool)), TypeError,
        "indices", "bool[6]", "a mask of bools is for outside of jit only"),
    Row("subset: nobody", lambda: objective().subset(slice(0, 0)), ValueError, "labels", "(0,)",
        "Leave empty batches out"),
    Row("with_examples: no weights", lambda: objective().with_examples((INPUTS, LABELS)),
        TypeError, "examples", "('float32[6, 4]', 'int32[6]')", "(inputs, labels, None)"),
    Row("with_labels: too few", lambda: objective().with_labels(LABELS[:2]), ValueError, "labels",
        "(2,)", "one common leading batch axis"),
    Row("replace: misspelled", lambda: objective().replace(label=LABELS), TypeError, "label",
        "label=", "apply_fn, inputs, labels"),
    Row("losses_from_logits: too few", lambda: objective().losses_from_logits(LOGITS[:2]),
        ValueError, "labels", "(6,)", "one label per row of the logits"),
    Row("logit_gradient: integers", lambda: objective().logit_gradient(np.zeros((6, 3), int)),
        TypeError, "logits", "int64[6, 3]", "floating logits"),
]  # fmt: skip
ROWS["loss_scaled"] = [
    *[
        Row(f"scale = {s!r}", lambda s=s: optax_sam.loss_scaled(loss_fn, s), error, "scale", echo,
            "typically by 2**10 to 2**16")
        for s, error, echo in (
            (0, ValueError, "0"),
            (-1.0, ValueError, "-1.0"),
            (INF, ValueError, "inf"),
            (NAN, ValueError, "nan"),
            ("8", TypeError, "'8'"),
            (None, TypeError, "None"),
            (True, TypeError, "True"),
        )
    ],
    Row("scale is a vector", lambda: optax_sam.loss_scaled(loss_fn, VECTOR), ValueError, "scale",
        "(3,)", "a scalar"),
    Row("the arguments exchanged", lambda: optax_sam.loss_scaled(8.0, loss_fn), TypeError,
        "loss_fn", "8.0", "a function of the parameters"),
    Row("loss_fn takes a batch", lambda: optax_sam.loss_scaled(two_arguments, 8.0)(PARAMS),
        TypeError, "loss_fn", "two_arguments", "loss_fn=lambda params"),
    Row("an objective with a bad scale", lambda: optax_sam.loss_scaled(objective(), 0.0),
        ValueError, "scale", "0.0", "(0, inf)"),
]  # fmt: skip
ROWS["last_layer_penalty"] = []
for _name in ("activation_coefficient", "weight_coefficient"):
    ROWS["last_layer_penalty"] += number(
        _name, -0.1, "[0, inf)",
        lambda c, name=_name: optax_sam.last_layer_penalty(
            INPUTS, MATRIX,
            **({"activation_coefficient": 0.1, "weight_coefficient": 0.1} | {name: c})),
    )  # fmt: skip
ROWS["last_layer_penalty"] += [
    Row(f"{argument}: {what}", lambda a=a, k=k: optax_sam.last_layer_penalty(
        a, k, activation_coefficient=0.1, weight_coefficient=0.1), error, argument, echo, remedy)
    for argument, what, a, k, error, echo, remedy in (
        ("activations", "a number", 1.0, MATRIX, TypeError, "float", "one layer's array"),
        ("activations", "what nnx captured", [INPUTS], MATRIX, TypeError, "['float32[6, 4]']",
         "a list with one for each call"),
        ("activations", "a scalar", jnp.float32(1.0), MATRIX, ValueError, "()", "(B, ...)"),
        ("activations", "an empty batch", INPUTS[:0], MATRIX, ValueError, "(0, 4)", "at least 1"),
        ("kernel", "None", INPUTS, None, TypeError, "NoneType", "one layer's array"),
        ("kernel", "all parameters", INPUTS, PARAMS, TypeError, "'w': 'float32[4, 3]'",
         "one layer's array"),
    )
]  # fmt: skip

# ----------------------------------------------------------------------- stage 1: perturbations
ROWS["normalized"] = number("rho", -1, "[0, inf)", optax_sam.normalized)
ROWS["project_to_ball"] = number("rho", -1, "[0, inf)", optax_sam.project_to_ball)
ROWS["loss_budget"] = [
    *number("sigma", -1, "[0, inf)", lambda s: optax_sam.loss_budget(s, 0.5)),
    *number("rho_max", NAN, "[0, inf)", lambda rho: optax_sam.loss_budget(0.1, rho)),
]
PRECONDITION = optax_sam.scale_by_second_moment
ROWS["scale_by_second_moment"] = [
    *number("epsilon", 0, "(0, inf)", PRECONDITION),
    Row("second_moment forgotten", lambda: alone(PRECONDITION()), ValueError, "second_moment",
        "None", "second_moment=optax.tree.get(opt_state, 'nu')"),
    Row("second_moment forgotten in a method", lambda: update(
        optax_sam.functional_sam(preconditioner=PRECONDITION()), loss_fn=objective()), ValueError,
        "second_moment", "None", "second_moment=optax.tree.get(opt_state, 'nu')"),
    Row("the second moment of other parameters", lambda: alone(PRECONDITION(), second_moment=OTHER),
        ValueError, "second_moment", "{'v': *}", "second_moment=optax.tree.get(opt_state, 'nu')"),
    Row("the whole state", lambda: alone(
        PRECONDITION(), second_moment=optax.scale_by_adam().init(PARAMS)), ValueError,
        "second_moment", "ScaleByAdamState", "second_moment=optax.tree.get(opt_state, 'nu')"),
]  # fmt: skip
ROWS["adaptive"] = [
    *number("rho", -1, "[0, inf)", optax_sam.adaptive),
    *number("eta", -1, "[0, inf)", lambda eta: optax_sam.adaptive(0.1, eta)),
    Row("no params", lambda: alone(optax_sam.adaptive(0.1), params=None), ValueError, "params",
        "None", "update(updates, state, params)"),
    Row("params dropped by a wrapper", lambda: update(SA(optax.contrib.scale_by_galore(
        rank=1, base_optimizer=optax_sam.adaptive(0.1)))), ValueError, "params", "None",
        "optax.contrib.scale_by_galore does to its base_optimizer"),
    Row("params of another structure", lambda: alone(optax_sam.adaptive(0.1), params=OTHER),
        ValueError, "updates", "{'v': *}", "Pass gradients in params"),
    Row("params that would be broadcast", lambda: alone(optax_sam.adaptive(0.1), params=SHORT),
        ValueError, "updates", "(3,)", "Pass gradients in params"),
    Row("scale_mask of other names",
        lambda: alone(optax_sam.adaptive(0.1, 0.1, {"b": True})), ValueError, "scale_mask",
        "{'b': *}", "a prefix of it"),
]  # fmt: skip
ROWS["moving_average"] = number("theta", 2, "(0, 1]", optax_sam.moving_average)
ROWS["subtract_moving_average"] = [
    *number("sigma", NAN, "(-inf, inf)", optax_sam.subtract_moving_average),
    *number("decay", -0.1, "[0, 1]", lambda d: optax_sam.subtract_moving_average(1.0, d)),
]
NC = optax_sam.add_noise_compensation
ROWS["add_noise_compensation"] = [
    *number("strength", INF, "(-inf, inf)", NC),
    *number("flip_ratio", 1.5, "Without flips use optax_sam.sam", lambda r: NC(0.1, r)),
    *number("start_step", -1, "at least 0", lambda k: NC(0.1, start_step=k)),
    Row("flip_ratio is traced", lambda: traced(lambda r: NC(0.1, r)), TypeError, "flip_ratio",
        "Tracer", "static_args=('flip_ratio',)"),
    Row("seed is a word", lambda: NC(0.1, seed="a"), TypeError, "seed", "'a'", "an integer"),
    Row("deterministic = 1", lambda: NC(0.1, deterministic=1), TypeError, "deterministic", "1",
        "True or False"),
    Row("by_weights = 1", lambda: NC(0.1, by_weights=1), TypeError, "by_weights", "1",
        "True or False"),
    Row("no params", lambda: alone(NC(0.1), params=None, loss_fn=objective()), ValueError,
        "params", "None", "update(perturbation, state, params, loss_fn=objective)"),
    Row("a plain loss", lambda: alone(NC(0.1), loss_fn=loss_fn), TypeError, "loss_fn",
        "function loss_fn", "optax_sam.Objective(apply_fn, inputs, labels)"),
    Row("no loss", lambda: alone(NC(0.1)), TypeError, "loss_fn", "None",
        "optax_sam.Objective(apply_fn, inputs, labels)"),
    Row("the loss dropped by a wrapper",
        lambda: update(SA(optax.contrib.split_real_and_imaginary(NC(0.1))), loss_fn=objective()),
        TypeError, "loss_fn", "None", "optax.contrib.split_real_and_imaginary"),
    Row("params dropped by a wrapper",
        lambda: alone(NC(0.1), params=None, loss_fn=objective()), ValueError, "params", "None",
        "optax.contrib.scale_by_galore does to its base_optimizer"),
    Row("hidden parameters", lambda: alone(NC(0.1), params=HIDDEN, loss_fn=objective()),
        TypeError, "params", "['v']", "pass mask= to the method"),
    Row("updates of another structure", lambda: alone(NC(0.1), OTHER, loss_fn=objective()),
        ValueError, "updates", "{'v': *}", "Pass a perturbation of params"),
]  # fmt: skip
ROWS["noise_compensation_schedule"] = [
    *number("kappa", -1, "[0, inf)", lambda k: optax_sam.noise_compensation_schedule(k, 10)),
    *number("total_steps", 0, "at least 1",
            lambda n: optax_sam.noise_compensation_schedule(0.1, n)),
]  # fmt: skip

# --------------------------------------------------------------------------------- wrappers
ROWS["in_steps"] = [
    *number("steps", 0, "at least 1", lambda n: optax_sam.in_steps(optax_sam.normalized(0.1), n)),
    Row("the arguments exchanged", lambda: optax_sam.in_steps(3, optax_sam.normalized(0.1)),
        TypeError, "perturbation", "3", "optax_sam.normalized(rho=0.05)"),
    Row("around a method", lambda: optax_sam.in_steps(optax_sam.sam(), 3).init(PARAMS), TypeError,
        "perturbation", "whole method", "Pass a stage"),
    Row("without a loss", lambda: alone(optax_sam.in_steps(optax_sam.normalized(0.1), 3)),
        ValueError, "loss_fn", "None", "update(updates, state, params, loss_fn=loss_fn)"),
    Row("hidden parameters", lambda: alone(optax_sam.in_steps(optax_sam.normalized(0.1), 3),
                                           params=HIDDEN, loss_fn=objective()),
        TypeError, "params", "['v']", "pass mask= to the method"),
]  # fmt: skip
ROWS["on_first"] = [
    Row("hidden parameters", lambda: alone(optax_sam.on_first(optax_sam.normalized(0.1), 0.5),
                                           params=HIDDEN, loss_fn=objective()),
        TypeError, "params", "['v']", "pass mask= to the method"),
    *number("fraction", 0, "(0, 1]",
            lambda q: optax_sam.on_first(optax_sam.normalized(0.1), q)),
    Row("fraction = 1.5", lambda: optax_sam.on_first(optax_sam.normalized(0.1), 1.5), ValueError,
        "fraction", "1.5", "[0, 1]"),
    Row("fraction is traced",
        lambda: traced(lambda q: optax_sam.on_first(optax_sam.normalized(0.1), q)), ValueError,
        "fraction", "Tracer", "a Python number"),
    Row("perturbation is a number", lambda: optax_sam.on_first(0.1, 0.5), TypeError,
        "perturbation", "0.1", "optax_sam.normalized(rho=0.05)"),
    Row("a plain loss",
        lambda: update(SA(optax_sam.on_first(optax_sam.normalized(0.1), 0.5))), TypeError,
        "loss_fn", "function loss_fn", "optax_sam.Objective(apply_fn, inputs, labels)"),
    Row("no params", lambda: alone(optax_sam.on_first(optax_sam.normalized(0.1), 0.5), params=None,
        loss_fn=objective()), ValueError, "params", "None", "update(updates, state, params"),
]  # fmt: skip
ROWS["along_previous"] = [
    Row("a number", lambda: optax_sam.along_previous(3), TypeError, "method", "3",
        "optax_sam.sam(rho=0.05)"),
    Row("a method that was not made", lambda: optax_sam.along_previous(optax_sam.sam), TypeError,
        "method", "function sam", "optax_sam.sam(rho=0.05)"),
    Row("groups", lambda: update(optax_sam.along_previous(optax_sam.sam(group_size=2)),
        loss_fn=objective()), ValueError, "group_size", "optax_sam.along_previous",
        "each group climbs along its own gradient"),
    Row("state of the method inside",
        lambda: update(optax_sam.along_previous(optax_sam.sam()), state=state_of(optax_sam.sam())),
        TypeError, "state", "SharpnessAwareState", "tx.init(params) of the same tx"),
]  # fmt: skip


def sometimes(**options):
    return optax_sam.sometimes(optax_sam.sam(), **options)


def holds(when):
    return update(sometimes(when=when))


ROWS["sometimes"] = [
    Row("params of optax.lookahead", lambda: sometimes(every_k=2).update(
        GRADS, state_of(sometimes(every_k=2)), TWO_SETS, loss_fn=loss_fn), TypeError, "params",
        "LookaheadParams", "params.fast"),
    Row("no condition", lambda: sometimes(), ValueError, "sometimes", "needs a condition",
        "every_k, start_step, stop_step or when"),
    Row("a method that was not made", lambda: optax_sam.sometimes(optax_sam.sam, every_k=2),
        TypeError, "method", "function sam", "optax_sam.sam(rho=0.05)"),
    *number("every_k", 0, "at least 1", lambda k: sometimes(every_k=k)),
    *number("start_step", -1, "at least 0", lambda k: sometimes(start_step=k)),
    *number("stop_step", -1, "at least 0", lambda k: sometimes(stop_step=k)),
    Row("every_k is an array", lambda: sometimes(every_k=jnp.int32(2)), TypeError, "every_k",
        "Array(2", "int(every_k)"),
    *[
        Row(f"when: {what}", lambda w=w: sometimes(when=w), TypeError, "when", echo,
            "a function (gradients, params) -> bool")
        for what, w, echo in (
            ("a number", 3, "3"),
            ("a class", optax_sam.When, "optax_sam.wrappers.When"),
            ("not made", optax_sam.gradient_norm_is_large, "function gradient_norm_is_large"),
        )
    ],
    *[
        Row(f"when returns {what}", lambda w=w: holds(w), TypeError, "when", echo,
            "Compare with a number")
        for what, w, echo in (
            ("a number", lambda g, p: jnp.sum(g["w"]), "float32[]"),
            ("bools", lambda g, p: g["w"][0] > 0, "bool[3]"),
            ("a tree", lambda g, p: g, "'w': 'float32[4, 3]'"),
            ("None", lambda g, p: None, "NoneType"),
        )
    ],
    Row("when of the step", lambda: holds(lambda step: step > 5), TypeError, "when", "<lambda>",
        "every_k, start_step and stop_step"),
    Row("a base optimizer inside", lambda: optax_sam.sam(
        every_k=2, combination=optax_sam.decouple(optax.trace(0.9))).init(PARAMS), ValueError,
        "method", "optax_sam.decouple", "otherwise=optax_sam.decouple(base)"),
    Row("otherwise is a number", lambda: sometimes(every_k=2, otherwise=0.7), TypeError,
        "otherwise", "0.7", "an optax.GradientTransformation"),
    Row("otherwise was not made", lambda: sometimes(every_k=2, otherwise=optax_sam.reuse_orthogonal),
        TypeError, "otherwise", "function reuse_orthogonal", "an optax.GradientTransformation"),
    Row("otherwise is a method",
        lambda: sometimes(every_k=2, otherwise=optax_sam.gsam()).init(PARAMS), TypeError,
        "otherwise", "whole method", "Pass a stage"),
    Row("axis_name is a list", lambda: sometimes(every_k=2, axis_name=["data"]), TypeError,
        "axis_name", "['data']", "axis_name=('hosts', 'devices')"),
    Row("axis_name under jit", lambda: update(sometimes(every_k=2, axis_name="data")), ValueError,
        "axis_name", "'data'", "leave it out"),
    Row("(value, gradients)", lambda: update(sometimes(every_k=2), (1.0, GRADS)), ValueError,
        "updates", "PyTreeDef((*, {'w': *}))", "Unpack jax.value_and_grad"),
    Row("no params", lambda: update(sometimes(every_k=2), params=None), ValueError, "params",
        "None", "update(grads, state, params, loss_fn=loss_fn)"),
    Row("no loss", lambda: update(sometimes(every_k=2), loss_fn=None), TypeError, "loss_fn",
        "None", "tx.update(grads, opt_state, params, loss_fn=loss_fn)"),
    Row("state of the method inside",
        lambda: update(sometimes(every_k=2), state=state_of(optax_sam.sam())), TypeError, "state",
        "SharpnessAwareState", "tx.init(params) of the same tx"),
    Row("state of another condition", lambda: update(
        sometimes(every_k=2), state=state_of(sometimes(when=lambda g, p: jnp.bool_(True)))),
        TypeError, "state", "EmptyState", "tx.init(params) of the same tx"),
]  # fmt: skip
ROWS["gradient_norm_is_large"] = [
    *number("deviations", NAN, "(-inf, inf)", optax_sam.gradient_norm_is_large),
    *number("decay", 1, "[0, 1)", lambda d: optax_sam.gradient_norm_is_large(0.0, d)),
]

# -------------------------------------------------------------------------- stage 2: evaluations
ROWS["full_gradient"] = [
    *evaluation_of(optax_sam.full_gradient),
    Row("a number for the loss", lambda: optax_sam.full_gradient(3.0, PARAMS, GRADS), TypeError,
        "loss_fn", "3.0", "a function of the parameters"),
]  # fmt: skip
ROWS["perturb_then_evaluate"] = [
    *evaluation_of(optax_sam.perturb_then_evaluate),
    Row("loss_fn takes a batch",
        lambda: optax_sam.perturb_then_evaluate(two_arguments, PARAMS, GRADS), TypeError,
        "loss_fn", "two_arguments", "loss_fn=lambda params"),
    Row("the arguments exchanged",
        lambda: optax_sam.perturb_then_evaluate(PARAMS, GRADS, loss_fn), TypeError, "loss_fn",
        "float32[4, 3]", "a function of the parameters"),
]  # fmt: skip
ROWS["jacobian_only"] = [
    *evaluation_of(optax_sam.jacobian_only),
    Row("a plain loss", lambda: optax_sam.jacobian_only(loss_fn, PARAMS, GRADS), TypeError,
        "loss_fn", "function loss_fn", "optax_sam.Objective(apply_fn, inputs, labels)"),
    Row("logits of other examples",
        lambda: optax_sam.jacobian_only(objective(), PARAMS, GRADS, logits=LOGITS[:2]), ValueError,
        "logits", "float32[2, 3]", "or none"),
]  # fmt: skip
ROWS["logit_only"] = [
    *evaluation_of(optax_sam.logit_only),
    Row("a plain loss", lambda: optax_sam.logit_only(loss_fn, PARAMS, GRADS), TypeError,
        "loss_fn", "function loss_fn", "optax_sam.Objective(apply_fn, inputs, labels)"),
]  # fmt: skip

# ------------------------------------------------------------------------- stage 3: combinations
ROWS["down_weight"] = [
    *number("alpha", -0.5, "0 is SAM, 1 drops set B", optax_sam.down_weight),
    *number("ratio_epsilon", INF, "[0, inf)", lambda e: optax_sam.down_weight(0.5, e)),
    *clean_grads_of(optax_sam.down_weight()),
    Row("mask is one bool", lambda: down_weighted_where(True), TypeError, "mask", "True",
        "To take all leaves leave it out"),
    Row("mask has other names", lambda: down_weighted_where({"b": True}), ValueError, "mask",
        "{'b': *}", "a prefix of it"),
    Row("mask is all False", lambda: down_weighted_where({"w": False}), ValueError, "mask",
        "excludes every parameter", "leave down_weight out"),
    Row("mask without params", lambda: alone(
        optax_sam.down_weight(mask={"w": True}), params=None, clean_grads=GRADS), ValueError,
        "params", "None", "update(updates, state, params, clean_grads=grads)"),
]  # fmt: skip
ROWS["decouple"] = [
    Row("base is a number", lambda: optax_sam.decouple(0.9), TypeError, "base", "0.9",
        "an optax.GradientTransformation"),
    Row("base is a method", lambda: optax_sam.decouple(optax_sam.sam()).init(PARAMS), TypeError,
        "base", "whole method", "Pass a stage"),
    *clean_grads_of(optax_sam.decouple(optax.trace(0.9))),
]  # fmt: skip
ROWS["renormalize"] = clean_grads_of(optax_sam.renormalize())
ROWS["extrapolate"] = [
    *number("gamma", -0.5, "[0, 1)", optax_sam.extrapolate),
    *clean_grads_of(optax_sam.extrapolate(0.9)),
]
ROWS["subtract_orthogonal"] = [
    *number("alpha", INF, "(-inf, inf)", optax_sam.subtract_orthogonal),
    *clean_grads_of(optax_sam.subtract_orthogonal(0.1)),
]
ROWS["restrict_to_coordinates"] = [
    *[
        Row(f"sets = {sets!r}", lambda s=sets: optax_sam.restrict_to_coordinates(s), ValueError,
            "sets", repr(sets), "such as 'B' or 'AC'")
        for sets in ("D", "B C", ["B"], None)
    ],
    *number("ratio_epsilon", -1, "[0, inf)",
            lambda e: optax_sam.restrict_to_coordinates("B", e)),
    *clean_grads_of(optax_sam.restrict_to_coordinates("B")),
]  # fmt: skip
ROWS["reuse_orthogonal"] = [
    *number("alpha", -0.7, "[0, inf)", optax_sam.reuse_orthogonal),
    *number("norm_epsilon", -1, "[0, inf)", lambda e: optax_sam.reuse_orthogonal(0.7, e)),
    *clean_grads_of(optax_sam.reuse_orthogonal()),
    Row("no is_ascent_step", lambda: alone(optax_sam.reuse_orthogonal(), clean_grads=GRADS),
        TypeError, "is_ascent_step", "None", "otherwise= of optax_sam.sometimes"),
    Row("is_ascent_step is traced", lambda: traced(lambda x: alone(
        optax_sam.reuse_orthogonal(), clean_grads=GRADS, is_ascent_step=x > 0)), TypeError,
        "is_ascent_step", "Tracer", "Pass a Python bool"),
]  # fmt: skip
ROWS["linear_warmup_alpha"] = [
    *number("alpha", 2, "[0, 1]", lambda a: optax_sam.linear_warmup_alpha(a, 5, 10)),
    *number("warmup_epochs", 0, "at least 1", lambda k: optax_sam.linear_warmup_alpha(0.5, k, 10)),
    *number("steps_per_epoch", 0, "at least 1", lambda k: optax_sam.linear_warmup_alpha(0.5, 5, k)),
]
ROWS["canonical_convolutions"] = [
    Row("the result of a call", lambda: optax_sam.canonical_convolutions(MATRIX), TypeError,
        "function", "float32[3, 3]", "before it is called"),
    Row("None", lambda: optax_sam.canonical_convolutions(None), TypeError, "function", "None",
        "the function itself"),
]  # fmt: skip

# ------------------------------------------------------------------------------- label noise
NOISE: dict[str, Callable[..., Any]] = {
    "label_noise.symmetric": label_noise.symmetric,
    "label_noise.pair_flip": label_noise.pair_flip,
    "label_noise.asymmetric": lambda labels, rate, classes, **options: label_noise.asymmetric(
        labels, rate, {0: 1}, classes, **options),
    "label_noise.instance_dependent": lambda labels, rate, classes, **options: (
        label_noise.instance_dependent(np.ones((2, 3)), labels, rate, classes, **options)),
}  # fmt: skip
# The four models share their checks: the first is asked about everything, each about something.
NOISE_MISTAKES = (
    ("rate", "a percentage", ([0, 1], 40, 5), ValueError, "40", "not a percentage"),
    ("labels", "one-hot", (np.eye(3), 0.4, 3), ValueError, "(3, 3)", "take their argmax"),
    ("labels", "-1", ([-1, 0], 0.4, 3), ValueError, "-1 to 0", "[0, 3)"),
    ("num_classes", "1", ([0, 0], 0.4, 1), ValueError, "1", "at least 2"),
    ("rate", "NaN", ([0, 1], NAN, 5), ValueError, "nan", "[0, 1]"),
    ("rate", "None", ([0, 1], None, 5), TypeError, "None", "a number"),
    ("rate", "a JAX scalar", ([0, 1], jnp.float32(40), 5), ValueError, "40.0", "[0, 1]"),
    ("rate", "one per label", ([0, 1], np.ones(2), 5), ValueError, "(2,)", "a scalar"),
    ("rate", "exchanged with the labels", (0.4, [0, 1], 5), TypeError, "[0, 1]", "a share"),
    ("num_classes", "a float", ([0, 1], 0.4, 5.0), TypeError, "5.0", "an integer"),
    ("num_classes", "None", ([0, 1], 0.4, None), TypeError, "None", "an integer"),
    ("labels", "floats", ([0.0, 1.0], 0.4, 5), TypeError, "float64", "Number the classes from 0"),
    ("labels", "bools", ([True, False], 0.4, 5), TypeError, "bool", "Number the classes from 0"),
    ("labels", "words", (["a", "b"], 0.4, 5), TypeError, "<U1", "np.unique"),
    ("labels", "None", (None, 0.4, 5), ValueError, "()", "(n,)"),
    (
        "labels",
        "a generator",
        ((y for y in [0, 1]), 0.4, 5),
        ValueError,
        "()",
        "a list of a generator",
    ),
    ("labels", "ragged", ([[0], [0, 1]], 0.4, 5), ValueError, "list", "different lengths"),
    ("labels", "too large", ([0, 5], 0.4, 5), ValueError, "0 to 5", "raise num_classes"),
    ("labels", "far too large", ([0, 9], 0.4, 5), ValueError, "0 to 9", "raise num_classes"),
    (
        "labels",
        "too small a dtype",
        (np.zeros(2, np.uint8), 0.4, 300),
        ValueError,
        "uint8",
        "300 classes",
    ),
)
SEED_MISTAKES = (
    ("None", None, TypeError, "None", "an integer"),
    ("1.5", 1.5, TypeError, "1.5", "an integer"),
    ("-1", -1, ValueError, "-1", "at least 0"),
    ("a word", "0", TypeError, "'0'", "an integer"),
    ("a key", jax.random.key(0), TypeError, "key", "int(seed)"),
)
for _name, _noise in NOISE.items():
    _mistakes = NOISE_MISTAKES if _name == "label_noise.symmetric" else NOISE_MISTAKES[:4]
    ROWS[_name] = [
        Row(f"{argument}: {what}", lambda noise=_noise, a=args: noise(*a, seed=0), error, argument,
            echo, remedy)
        for argument, what, args, error, echo, remedy in _mistakes
    ]  # fmt: skip
ROWS["label_noise.symmetric"] += [
    *[
        Row(f"seed: {what}", lambda s=seed: label_noise.symmetric([0, 1], 0.4, 5, seed=s), error,
            "seed", echo, remedy)
        for what, seed, error, echo, remedy in SEED_MISTAKES
    ],
    Row("exact is a word", lambda: label_noise.symmetric([0, 1], 0.4, 5, seed=0, exact="no"),
        TypeError, "exact", "'no'", "True or False"),
    Row("labels under jit",
        lambda: traced(lambda y: label_noise.symmetric(y, 0.4, 5, seed=0), LABELS), TypeError,
        "labels", "int32[6]", "before training"),
    Row("rate under jit", lambda: traced(lambda r: label_noise.symmetric([0, 1], r, 5, seed=0)),
        TypeError, "rate", "float32[]", "before training"),
]  # fmt: skip
ROWS["label_noise.asymmetric"] += [
    Row(f"class_map: {what}", lambda m=m: label_noise.asymmetric([0, 1, 2], 0.4, m, 3, seed=0),
        ValueError, "class_map", echo, remedy)
    for what, m, echo, remedy in (
        ("a matrix", np.eye(3), "(3, 3)", "one class for each of the 3 classes"),
        ("None", None, "NoneType", "a dictionary or a sequence"),
        ("too short", [1, 2], "(2,)", "one class for each of the 3 classes"),
        ("a function", lambda y: y, "function", "a dictionary or a sequence"),
        ("pairs", [(0, 1), (1, 2), (2, 0)], "(3, 2)", "a dictionary or a sequence"),
        ("an unknown class", {0: 7}, "0: 7", "[0, 3)"),
        ("words", {"cat": 1}, "'cat': 1", "[0, 3)"),
        ("floats", {0: 1.0}, "0: 1.0", "[0, 3)"),
    )
]  # fmt: skip
ROWS["label_noise.asymmetric"].append(
    Row("the arguments exchanged", lambda: label_noise.asymmetric([0, 1], 0.4, 3, {0: 1}, seed=0),
        TypeError, "num_classes", "{0: 1}", "an integer")
)  # fmt: skip
ROWS["label_noise.instance_dependent"] += [
    Row(f"inputs: {what}", lambda x=x: label_noise.instance_dependent(x, [0, 1, 2], 0.4, 3, seed=0),
        error, "inputs", echo, remedy)
    for what, x, error, echo, remedy in (
        ("too few", np.ones((2, 4)), ValueError, "(2, 4)", "n = 3"),
        ("without an axis of features", np.ones(3), ValueError, "(3,)", "(n, ...)"),
        ("complex", np.ones((3, 4), complex), TypeError, "complex128", "real numbers"),
        ("NaN", np.full((3, 4), NAN), ValueError, "NaN", "clean the data first"),
        ("words", np.array([["a"]] * 3), TypeError, "<U1", "real numbers"),
        ("None", None, TypeError, "object", "real numbers"),
        ("ragged", [[1], [1, 2], [1]], ValueError, "list", "the same shape"),
    )
]  # fmt: skip
ROWS["label_noise.instance_dependent"] += [
    *number("rate_deviation", -0.1, "[0, inf)", lambda d: label_noise.instance_dependent(
        np.ones((2, 3)), [0, 1], 0.4, 3, seed=0, rate_deviation=d)),
    Row("inputs under jit", lambda: traced(
        lambda x: label_noise.instance_dependent(x, [0] * 6, 0.4, 3, seed=0), INPUTS), TypeError,
        "inputs", "float32[6,4]", "before training"),
    Row("inputs and labels exchanged", lambda: label_noise.instance_dependent(
        [0, 1, 2], np.ones((3, 4)), 0.4, 3, seed=0), ValueError, "labels", "(3, 4)", "(n,)"),
]  # fmt: skip

# ------------------------------------------------------------------------------- diagnostics
NOISY = np.array([0, 1, 2, 0, 1, 2])
CHANGED = np.array([True] * 3 + [False] * 3)
SCORES = np.eye(3)[NOISY]
ROWS["diagnostics.memorization"] = [
    Row(f"{argument}: {what}", lambda a=args: diagnostics.memorization(*a), error, argument, echo,
        remedy)
    for argument, what, args, error, echo, remedy in (
        ("logits", "predictions", (NOISY, NOISY, CHANGED), ValueError, "(6,)", "(n, classes)"),
        ("logits", "complex", (1j * SCORES, NOISY, CHANGED), TypeError, "complex", "before argmax"),
        ("changed", "of other examples", (SCORES[:3], NOISY, CHANGED), ValueError, "(6,)", "(3,)"),
        ("changed", "0 and 1", (SCORES, NOISY, 1 * CHANGED), TypeError, "int32", "astype(bool)"),
        ("changed", "(n, 1)", (SCORES, NOISY, CHANGED[:, None]), ValueError, "(6, 1)", "(6,)"),
        ("changed", "indices", (SCORES, NOISY, np.array([0, 1])), ValueError, "(2,)", "(6,)"),
        ("changed", "exchanged", (SCORES, CHANGED, NOISY), TypeError, "int32", "astype(bool)"),
        ("noisy_labels", "(n, 1)", (SCORES, NOISY[:, None], CHANGED), ValueError, "(6, 1)", "(6,)"),
        ("noisy_labels", "one-hot", (SCORES, SCORES, CHANGED), ValueError, "(6, 3)", "argmax"),
        ("noisy_labels", "floats", (SCORES, 1.0 * NOISY, CHANGED), TypeError, "float64", "integers"),
        ("noisy_labels", "names", (SCORES, np.array(["cat", "dog"] * 3), CHANGED), TypeError, "<U3",
         "np.unique"),
        ("noisy_labels", "-1", (SCORES, NOISY - 1, CHANGED), ValueError, "-1 to 1", "[0, 3)"),
        ("noisy_labels", "too large", (SCORES, NOISY + 1, CHANGED), ValueError, "1 to 3",
         "a logit for every class"),
        ("true_labels", "too few", (SCORES, NOISY, CHANGED, NOISY[:3]), ValueError, "(3,)", "(6,)"),
        ("true_labels", "floats", (SCORES, NOISY, CHANGED, 1.0 * NOISY), TypeError, "float64",
         "integers"),
    )
]  # fmt: skip
RECORDING = diagnostics.start_recording(NOISY)
ROWS["diagnostics.start_recording"] = [
    Row(f"labels: {what}", lambda y=labels: diagnostics.start_recording(y), error, "labels", echo,
        remedy)
    for what, labels, error, echo, remedy in (
        ("one-hot", SCORES, ValueError, "(6, 3)", "argmax"),
        ("none", np.zeros(0, int), ValueError, "(0,)", "at least 1"),
        ("floats", 1.0 * NOISY, TypeError, "float64", "integers"),
        ("names", np.array(["cat", "dog"] * 3), TypeError, "<U3", "np.unique"),
        ("-1", NOISY - 1, ValueError, "-1", "Leave examples without a label out"),
    )
]  # fmt: skip
ROWS["diagnostics.record_batch"] = [
    Row(f"{argument}: {what}", lambda a=args: diagnostics.record_batch(*a), error, argument, echo,
        remedy)
    for argument, what, args, error, echo, remedy in (
        ("recording", "labels", (NOISY, SCORES, NOISY), TypeError, "int64[6]", "start_recording"),
        ("logits", "predictions", (RECORDING, NOISY, np.arange(6)), ValueError, "(6,)",
         "(6, classes)"),
        ("logits", "of other examples", (RECORDING, SCORES, np.arange(3)), ValueError, "(6, 3)",
         "(3, classes)"),
        ("logits", "one per example", (RECORDING, SCORES[:, :1], np.arange(6)), ValueError,
         "(6, 1)", "stack zeros and z"),
        ("logits", "bools", (RECORDING, SCORES > 0, np.arange(6)), TypeError, "bool[6, 3]",
         "real numbers"),
        ("logits", "too few classes", (RECORDING, SCORES[:, :2], np.arange(6)), ValueError,
         "(6, 2) have no class 2", "a logit for every class"),
        ("indices", "a mask", (RECORDING, SCORES, CHANGED), TypeError, "bool", "integers"),
        ("indices", "(B, 1)", (RECORDING, SCORES, NOISY[:, None]), ValueError, "(6, 1)", "(B,)"),
        ("indices", "too large", (RECORDING, SCORES, np.arange(6) + 1), ValueError, "1 to 6",
         "[0, 6)"),
        ("indices", "-2", (RECORDING, SCORES, np.arange(6) - 2), ValueError, "-2 to 3", "padding"),
        ("indices", "twice", (RECORDING, SCORES, NOISY), ValueError, "0 twice",
         "one after the other"),
    )
]  # fmt: skip
ROWS["diagnostics.record_epoch"] = [
    Row(f"{argument}: {what}", lambda a=args: diagnostics.record_epoch(*a), error, argument, echo,
        remedy)
    for argument, what, args, error, echo, remedy in (
        ("recording", "None", (None, apply_fn, PARAMS, INPUTS), TypeError, "None",
         "start_recording"),
        ("apply_fn", "logits", (RECORDING, SCORES, PARAMS, INPUTS), TypeError, "float64[6, 3]",
         "(params, inputs) -> logits"),
        ("apply_fn", "of the parameters only", (RECORDING, loss_fn, PARAMS, INPUTS), TypeError,
         "loss_fn", "lambda params, inputs"),
        ("logits", "with batch statistics", (RECORDING, with_statistics, PARAMS, INPUTS), TypeError,
         "float32[6, 3]", "the logits alone"),
        ("logits", "too few classes", (RECORDING, lambda p, x: apply_fn(p, x)[:, :2], PARAMS, INPUTS),
         ValueError, "(6, 2) have no class 2", "a logit for every class"),
        ("logits", "the loss", (RECORDING, two_arguments, PARAMS, INPUTS[:, :1, None]), ValueError,
         "()", "(6, classes)"),
        ("inputs", "too few", (RECORDING, apply_fn, PARAMS, INPUTS[:3]), ValueError,
         "float32[3, 4]", "6 labels"),
        ("inputs", "none", (RECORDING, apply_fn, PARAMS, []), ValueError, "[]", "6 labels"),
    )
]  # fmt: skip
ROWS["diagnostics.record_epoch"] += number(
    "chunk_size", 0, "at least 1",
    lambda c: diagnostics.record_epoch(RECORDING, apply_fn, PARAMS, INPUTS, chunk_size=c),
)  # fmt: skip
ROWS["diagnostics.training_dynamics"] = [
    Row("the labels", lambda: diagnostics.training_dynamics(NOISY), TypeError, "recording",
        "int64[6]", "start_recording"),
]  # fmt: skip
ROWS["diagnostics.rank_suspects"] = [
    Row("by an unknown statistic", lambda: diagnostics.rank_suspects(RECORDING, "aum"), ValueError,
        "by", "'aum'", "'margin'"),
    Row("the statistics", lambda: diagnostics.rank_suspects(
        diagnostics.training_dynamics(RECORDING)), TypeError, "recording", "float32[6]",
        "start_recording"),
]  # fmt: skip
ROWS["diagnostics.auroc"] = [
    Row(what, lambda a=args: diagnostics.auroc(*a), error, argument, echo, remedy)
    for what, args, error, argument, echo, remedy in (
        ("another length", (NOISY, CHANGED[:3]), ValueError, "wrong", "(3,)",
         "wrong[suspects.examples]"),
        ("a matrix", (SCORES, SCORES > 0), ValueError, "scores", "(6, 3)", "(n,)"),
        ("0 and 1", (NOISY, 1 * CHANGED), TypeError, "wrong", "int64", "astype(bool)"),
        ("words", (np.array(["a"] * 6), CHANGED), TypeError, "scores", "<U1", "suspects.scores"),
    )
]  # fmt: skip
DIRECTION_REMEDY = "a direction in parameter space"
SAM = optax_sam.sam()
ROWS["diagnostics.sharpness"] = [
    Row(what, lambda a=args: diagnostics.sharpness(*a), error, argument, echo, remedy)
    for what, args, error, argument, echo, remedy in (
        ("a radius", (0.05, loss_fn, PARAMS), TypeError, "tx", "0.05", "optax_sam.sam(0.05)"),
        ("no method", (optax.sgd(0.1), loss_fn, PARAMS), ValueError, "tx", "tuple",
         "optax_sam.sam(0.05)"),
        ("some steps only", (optax_sam.sam(every_k=2), loss_fn, PARAMS), ValueError, "tx",
         "SometimesState", "Leave out every_k"),
        ("another state", (SAM, loss_fn, PARAMS, optax.adam(0.1).init(PARAMS)), ValueError, "tx",
         "tuple", "optax_sam.sam(0.05)"),
        ("the value of the loss", (SAM, 0.5, PARAMS), TypeError, "loss_fn", "0.5",
         "the loss as a function"),
        ("a loss per example", (SAM, lambda p: p["w"], PARAMS), TypeError, "loss_fn", "(4, 3)",
         "Take the mean"),
    )
]  # fmt: skip
ROWS["diagnostics.sharpness"] += number(
    "group_size", 0, "at least 1",
    lambda m: diagnostics.sharpness(SAM, loss_fn, PARAMS, group_size=m),
)  # fmt: skip
ROWS["diagnostics.hessian_vector_product"] = [
    Row("another structure", lambda: diagnostics.hessian_vector_product(loss_fn, PARAMS, OTHER),
        ValueError, "vector", "{'v': *}", DIRECTION_REMEDY),
    Row("the value of the loss",
        lambda: diagnostics.hessian_vector_product(0.5, PARAMS, GRADS), TypeError, "loss_fn",
        "0.5", "the loss as a function"),
]  # fmt: skip
for NAME, COUNT, LEAST in (
    ("largest_eigenvalue", "steps", 1), ("hessian_trace", "samples", 2),
    ("hessian_spectrum", "samples", 1), ("hessian_spectrum", "steps", 1),
):  # fmt: skip
    FUNCTION = getattr(diagnostics, NAME)
    ROWS.setdefault(f"diagnostics.{NAME}", []).extend([
        *number(COUNT, LEAST - 1, f"at least {LEAST}",
                lambda c, f=FUNCTION, n=COUNT: f(loss_fn, PARAMS, **{n: c})),
        Row(f"a seed beside {COUNT}", lambda f=FUNCTION: f(loss_fn, PARAMS, seed=None), TypeError,
            "seed", "None", "an integer"),
        Row(f"integers beside {COUNT}", lambda f=FUNCTION: f(loss_fn, {"n": LABELS}), ValueError,
            "params", "int32", "real parameters"),
        Row(f"a number beside {COUNT}", lambda f=FUNCTION: f(0.5, PARAMS), TypeError, "loss_fn",
            "0.5", "the loss as a function"),
    ])  # fmt: skip
ROWS["diagnostics.filter_normalized"] = [
    Row("another shape", lambda: diagnostics.filter_normalized(SHORT, PARAMS), ValueError,
        "direction", "(3,)", DIRECTION_REMEDY),
    Row("an axis in between", lambda: diagnostics.filter_normalized(GRADS, PARAMS, filter_axis=1),
        ValueError, "filter_axis", "1", "0 (Equinox, PyTorch)"),
]  # fmt: skip
ROWS["diagnostics.loss_line"] = [
    Row("another structure", lambda: diagnostics.loss_line(loss_fn, PARAMS, OTHER, [0.0, 1.0]),
        ValueError, "direction", "{'v': *}", DIRECTION_REMEDY),
    Row("one position", lambda: diagnostics.loss_line(loss_fn, PARAMS, GRADS, 0.5), ValueError,
        "positions", "()", "jnp.linspace"),
    Row("the value of the loss", lambda: diagnostics.loss_line(0.5, PARAMS, GRADS, [0.0]),
        TypeError, "loss_fn", "0.5", "the loss as a function"),
]  # fmt: skip
PLANE = diagnostics.loss_plane
ROWS["diagnostics.loss_plane"] = [
    Row("the first of another shape", lambda: PLANE(loss_fn, PARAMS, SHORT, GRADS, [0.0], [0.0]),
        ValueError, "first", "(3,)", DIRECTION_REMEDY),
    Row("the second of another shape", lambda: PLANE(loss_fn, PARAMS, GRADS, SHORT, [0.0], [0.0]),
        ValueError, "second", "(3,)", DIRECTION_REMEDY),
    Row("no first position", lambda: PLANE(loss_fn, PARAMS, GRADS, GRADS, [], [0.0]), ValueError,
        "first_positions", "(0,)", "jnp.linspace"),
    Row("a grid", lambda: PLANE(loss_fn, PARAMS, GRADS, GRADS, [0.0], [[0.0]]), ValueError,
        "second_positions", "(1, 1)", "jnp.linspace"),
]  # fmt: skip
for NAME, CALL in (
    (
        "shares_by_label",
        lambda loss, wrong: diagnostics.shares_by_label(loss, PARAMS, GRADS, wrong),
    ),
    ("damping", lambda loss, wrong: diagnostics.damping(SAM, loss, PARAMS, wrong)),
):
    ROWS[f"diagnostics.{NAME}"] = [
        Row("a plain loss", lambda f=CALL: f(loss_fn, CHANGED), TypeError, "loss_fn",
            "function loss_fn", "optax_sam.Objective(apply_fn, inputs, labels)"),
        Row("wrong of other examples", lambda f=CALL: f(objective(), CHANGED[:3]), ValueError,
            "wrong", "(3,)", "(6,)"),
        Row("wrong is 0 and 1", lambda f=CALL: f(objective(), 1 * CHANGED), TypeError, "wrong",
            "int32", "astype(bool)"),
    ]  # fmt: skip
ROWS["diagnostics.shares_by_label"] += [
    Row("ε of another shape", lambda: diagnostics.shares_by_label(
        objective(), PARAMS, SHORT, CHANGED), ValueError, "perturbation", "(3,)", "the ε of the batch"),
    *number("ratio_epsilon", -1, "[0, inf)", lambda e: diagnostics.shares_by_label(
        objective(), PARAMS, GRADS, CHANGED, ratio_epsilon=e)),
]  # fmt: skip
ROWS["diagnostics.damping"] += [
    Row(what, lambda m=method: diagnostics.damping(m, objective(), PARAMS, CHANGED), TypeError,
        "method", echo, "optax_sam.saner(0.05)")
    for what, method, echo in (
        ("a radius", 0.05, "0.05"),
        ("with the optimizer", optax.chain(optax_sam.sam(), optax.sgd(0.1)), "tuple"),
        ("a stage", optax_sam.normalized(0.05), "EmptyState"),
    )
]  # fmt: skip
ROWS["diagnostics.factor_changes"] = [
    Row("a plain loss", lambda: diagnostics.factor_changes(loss_fn, PARAMS, GRADS), TypeError,
        "loss_fn", "function loss_fn", "optax_sam.Objective(apply_fn, inputs, labels)"),
    Row("ε of another structure", lambda: diagnostics.factor_changes(objective(), PARAMS, OTHER),
        ValueError, "perturbation", "{'v': *}", "the ε of the batch"),
]  # fmt: skip
ROWS["diagnostics.last_layer_norms"] = [
    Row("activations in a list", lambda: diagnostics.last_layer_norms([INPUTS], MATRIX), TypeError,
        "activations", "float32[6, 4]", "one layer's array"),
    Row("no example", lambda: diagnostics.last_layer_norms(INPUTS[:0], MATRIX), ValueError,
        "activations", "(0, 4)", "B of at least 1"),
    Row("no kernel", lambda: diagnostics.last_layer_norms(INPUTS, None), TypeError, "kernel",
        "NoneType", "one layer's array"),
]  # fmt: skip
ROWS["diagnostics.angle"] = [
    Row("another structure", lambda: diagnostics.angle(GRADS, OTHER), ValueError, "second",
        "{'v': *}", "vectors in parameter space"),
    Row("another shape", lambda: diagnostics.angle(GRADS, SHORT), ValueError, "second", "(3,)",
        "vectors in parameter space"),
]  # fmt: skip
COMPENSATION = optax_sam.add_noise_compensation(0.1, flip_ratio=0.5)
ROWS["diagnostics.compensation_geometry"] = [
    Row("a plain loss", lambda: diagnostics.compensation_geometry(
        COMPENSATION, 0.1, loss_fn, PARAMS), TypeError, "loss_fn", "function loss_fn",
        "optax_sam.Objective(apply_fn, inputs, labels)"),
    Row("the whole perturbation", lambda: diagnostics.compensation_geometry(
        optax.chain(optax_sam.normalized(0.1), COMPENSATION), 0.1, objective(), PARAMS), TypeError,
        "compensation", "tuple", "this stage alone"),
    Row("a strength", lambda: diagnostics.compensation_geometry(0.1, 0.1, objective(), PARAMS),
        TypeError, "compensation", "0.1", "optax.GradientTransformation"),
    *number("rho", -1, "[0, inf)", lambda rho: diagnostics.compensation_geometry(
        COMPENSATION, rho, objective(), PARAMS)),
]  # fmt: skip
ROWS["diagnostics.coordinate_shares"] = [
    Row(what, lambda a=args: diagnostics.coordinate_shares(*a), error, argument, echo, remedy)
    for what, args, error, argument, echo, remedy in (
        ("another shape", (GRADS, SHORT), ValueError, "perturbed_grads", "(3,)",
         "gradients of the same parameters"),
        ("another structure", (GRADS, OTHER), ValueError, "perturbed_grads", "{'v': *}",
         "gradients of the same parameters"),
        ("None", (GRADS, None), ValueError, "perturbed_grads", "None",
         "gradients of the same parameters"),
        ("another dtype", (GRADS, {"w": GRADS["w"].astype(jnp.bfloat16)}), ValueError,
         "perturbed_grads", "bfloat16", "gradients of the same parameters"),
        ("integers", (LABELS, LABELS), ValueError, "clean_grads", "int32[6]",
         "floating coordinate"),
    )
]  # fmt: skip
ROWS["diagnostics.coordinate_shares"] += number(
    "ratio_epsilon", -1, "[0, inf)", lambda e: diagnostics.coordinate_shares(GRADS, GRADS, e)
)

# ------------------------------------------------------------------------------------- plots
ROWS["plots.curves"] = [
    Row(what, lambda a=args: plots.curves(*a), error, argument, echo, remedy)
    for what, args, error, argument, echo, remedy in (
        ("an array", (NOISY,), TypeError, "series", "ndarray", "names to values"),
        ("nothing", ({},), ValueError, "series", "got 0", "1 to 10"),
        ("too many", ({str(i): NOISY for i in range(11)},), ValueError, "series", "got 11",
         "several axes"),
        ("other lengths", ({"a": NOISY, "b": NOISY[:3]},), ValueError, "series", "'b': (3,)",
         "one k"),
        ("another x", ({"a": NOISY}, NOISY[:3]), ValueError, "series", "(6,)", "of x, (3,)"),
        ("a number", ({"a": np.ones((2, 2, 6))},), ValueError, "series", "(2, 2, 6)", "(runs, k)"),
    )
]  # fmt: skip
DYNAMICS = diagnostics.training_dynamics(RECORDING)
ROWS["plots.data_map"] = [
    Row("the recording", lambda: plots.data_map(RECORDING), TypeError, "dynamics", "Recording",
        "training_dynamics(recording)"),
    Row("indices of wrong labels", lambda: plots.data_map(DYNAMICS, [0, 1]), TypeError,
        "wrong", "int", "astype(bool)"),
    Row("wrong of other examples", lambda: plots.data_map(DYNAMICS, CHANGED[:3]), ValueError,
        "wrong", "(3,)", "(6,)"),
]  # fmt: skip
ROWS["plots.density"] = [
    Row("eigenvalues", lambda: plots.density(NOISY), TypeError, "spectrum", "ndarray",
        "hessian_spectrum"),
    Row("no width", lambda: plots.density(diagnostics.Spectrum(SCORES, SCORES), width=0),
        ValueError, "width", "got 0", "above 0"),
]  # fmt: skip
ROWS["plots.contours"] = [
    Row("exchanged positions", lambda: plots.contours(SCORES, np.arange(3), np.arange(6)),
        ValueError, "losses", "(6, 3)", "of the positions, (3, 6)"),
    Row("one line", lambda: plots.contours(SCORES[:1], np.arange(1), np.arange(3)), ValueError,
        "losses", "(1, 3)", "at least 2"),
    Row("many arrows", lambda: plots.contours(
        SCORES, np.arange(6), np.arange(3), arrows={str(i): (1, 1) for i in range(6)}), ValueError,
        "arrows", "got 6", "at most 5"),
]  # fmt: skip
ROWS["plots.coordinate_bars"] = [
    Row("one share", lambda: plots.coordinate_bars(diagnostics.CoordinateShares(1, 0, 0)),
        TypeError, "shares", "CoordinateShares", "map names"),
    Row("numbers", lambda: plots.coordinate_bars({"all": 0.5}), TypeError, "shares", "dict",
        "names to CoordinateShares"),
    Row("nothing", lambda: plots.coordinate_bars({}), ValueError, "shares", "{}", "at least"),
]  # fmt: skip

# ------------------------------------------------------------------------------- per example
PER_EXAMPLE = per_example.per_example_gradient
ROWS["per_example.per_example_gradient"] = [
    *number("rho", -1, "[0, inf)", lambda rho: PER_EXAMPLE(objective(), PARAMS, rho)),
    Row("rho is a schedule",
        lambda: PER_EXAMPLE(objective(), PARAMS, optax.constant_schedule(0.1)), TypeError, "rho",
        "constant_schedule", "a number"),
    Row("a plain loss", lambda: PER_EXAMPLE(loss_fn, PARAMS, 0.1), TypeError, "loss_fn",
        "function loss_fn", "optax_sam.Objective(apply_fn, inputs, labels)"),
    Row("evaluation is a function", lambda: PER_EXAMPLE(
        objective(), PARAMS, 0.1, evaluation=optax_sam.full_gradient), ValueError, "evaluation",
        "function full_gradient", "'jacobian_only'"),
    Row("evaluation misspelled",
        lambda: PER_EXAMPLE(objective(), PARAMS, 0.1, evaluation="Full"), ValueError, "evaluation",
        "'Full'", "'full'"),
    *number("group_size", 0, "at least 1",
            lambda m: PER_EXAMPLE(objective(), PARAMS, 0.1, group_size=m)),
    Row("group_size does not divide", lambda: PER_EXAMPLE(objective(), PARAMS, 0.1, group_size=4),
        ValueError, "group_size", "4 must divide the batch of 6", "such as 3"),
    Row("mask is one bool", lambda: PER_EXAMPLE(objective(), PARAMS, 0.1, mask=True), TypeError,
        "mask", "True", "To take all leaves leave it out"),
    Row("a penalty", lambda: PER_EXAMPLE(objective(penalty=loss_fn), PARAMS, 0.1), ValueError,
        "penalty", "per_example_gradient takes no penalty", "a method with group_size="),
    Row("BatchNorm", lambda: PER_EXAMPLE(objective(batch_normalized), PARAMS, 0.1), ValueError,
        "examples", "reduce_sum", "GroupNorm or LayerNorm"),
]  # fmt: skip
EXPLAIN = optax_sam.explain
ROWS["explain"] = [
    Row("tx is a number", lambda: EXPLAIN(0.05, objective(), PARAMS), TypeError, "tx", "0.05",
        "optax.chain(optax_sam.sam(0.05), optax.sgd(0.1))"),
    Row("no method in tx", lambda: EXPLAIN(optax.sgd(0.1), objective(), PARAMS), ValueError, "tx",
        "no sharpness-aware method", "Put one in front of"),
    Row("a method that was not made", lambda: EXPLAIN(optax_sam.sam, objective(), PARAMS),
        TypeError, "tx", "function sam", "optax_sam.sam(0.05)"),
    Row("objective and params exchanged", lambda: EXPLAIN(optax_sam.sam(), PARAMS, objective()),
        TypeError, "objective", "float32[4, 3]", "the loss of the step"),
    Row("objective is a number", lambda: EXPLAIN(optax_sam.sam(), 0.5, PARAMS), TypeError,
        "objective", "0.5", "the loss of the step"),
    Row("a plain loss for groups", lambda: EXPLAIN(optax_sam.sam(group_size=2), loss_fn, PARAMS),
        TypeError, "loss_fn", "function loss_fn", "optax_sam.Objective(apply_fn, inputs, labels)"),
    Row("check_independence of a plain loss",
        lambda: independence.check_independence(loss_fn, PARAMS), TypeError, "loss_fn",
        "function loss_fn", "optax_sam.Objective(apply_fn, inputs, labels)"),
    Row("group_size does not divide",
        lambda: EXPLAIN(optax_sam.sam(group_size=4), objective(), PARAMS), ValueError,
        "group_size", "4 must divide the batch of 6", "such as 3"),
]  # fmt: skip

# --------------------------------------------------------------------------------- frameworks
ROWS["linen.TrainState"] = [
    Row("no loss", lambda: linen_state().apply_gradients(grads=GRADS), TypeError, "loss_fn",
        "None", "state.apply_gradients(grads=grads, loss_fn=loss_fn)"),
    Row("Flax's own TrainState", lambda: linen_state(train_state.TrainState).apply_gradients(
        grads=GRADS, loss_fn=loss_fn), TypeError, "loss_fn", "None", "optax_sam.linen.TrainState"),
    Row("(value, gradients)",
        lambda: linen_state().apply_gradients(grads=(1.0, GRADS), loss_fn=loss_fn), ValueError,
        "updates", "PyTreeDef((*, {'w': *}))", "Unpack jax.value_and_grad"),
    Row("logit=", lambda: linen_state().apply_gradients(grads=GRADS, loss_fn=loss_fn, logit=LOGITS),
        TypeError, "logit", "logit=", "extra_args="),
    Row("statistics without a field", lambda: linen_state().apply_gradients(
        grads=GRADS, loss_fn=loss_fn, batch_stats={}), TypeError, "batch_stats", "batch_stats=",
        "the fields step, apply_fn, params"),
    Row("extra_args is a number", lambda: linen_state().apply_gradients(
        grads=GRADS, loss_fn=loss_fn, extra_args=0.5), TypeError, "extra_args", "0.5",
        "extra_args={'value': loss}"),
]  # fmt: skip
ROWS["linen.capture_layer_input"] = [
    Row("a function", lambda: optax_sam.linen.capture_layer_input(apply_fn, "head"), TypeError,
        "module", "apply_fn", "a Linen module"),
    Row("layer is a number", lambda: optax_sam.linen.capture_layer_input(nn.Dense(3), 3),
        TypeError, "layer", "3", "'Dense_2'"),
    Row("no such layer", lambda: optax_sam.linen.capture_layer_input(
        nn.Sequential([nn.Dense(3)]), "head")(
            {"params": {"layers_0": {"kernel": PARAMS["w"], "bias": VECTOR}}}, INPUTS), ValueError,
        "layer", "'head' was called 0 times", "['layers_0']"),
]  # fmt: skip
ROWS["nnx.loss_function"] = [
    Row("loss_fn is a number", lambda: optax_sam.nnx.loss_function(nnx_model(), 3.0), TypeError,
        "loss_fn", "3.0", "(model, *args) -> loss"),
    Row("the arguments exchanged", lambda: optax_sam.nnx.loss_function(len, nnx_model()),
        ValueError, "model", "builtin_function", "the live nnx module first"),
    Row("a state for the model", lambda: nnx_loss(model=PARAMS), ValueError, "model", "dict",
        "the live nnx module first"),
    Row("wrt is a word", lambda: nnx_loss(wrt="params"), ValueError, "wrt", "'params'",
        "the filter of nnx.Optimizer"),
    Row("loss_fn takes more", lambda: optax_sam.nnx.loss_function(nnx_model(), lambda m, x: x)(
        nnx.state(nnx_model(), nnx.Param)), TypeError, "loss_fn", "<lambda>",
        "loss_function(model, loss_fn, x, y)"),
    Row("params of another model", lambda: nnx_loss()(PARAMS), ValueError, "params", "{'w': *}",
        "nnx.state(model, wrt)"),
    Row("params = None", lambda: nnx_loss()(None), ValueError, "params", "NoneType",
        "nnx.state(model, wrt)"),
    Row("after the clean pass", after_the_clean_pass, ValueError, "loss", "count",
        "snapshot before nnx.value_and_grad"),
    Row("a loss of the model in place of it", lambda: nnx.Optimizer(
        nnx_model(), optax_sam.sam(), wrt=nnx.Param).update(
            nnx_model(), nnx.state(nnx_model(), nnx.Param),
            loss_fn=lambda model: jnp.sum(model(INPUTS))), TypeError, "loss_fn", "State",
        "optax_sam.nnx.loss_function(model, loss_fn, *args)"),
]  # fmt: skip
ROWS["nnx.objective"] = [
    Row("call is a number", lambda: optax_sam.nnx.objective(nnx_model(), INPUTS, LABELS, call=3),
        TypeError, "call", "3", "(model, inputs, *args) -> logits"),
    Row("args is no tuple",
        lambda: optax_sam.nnx.objective(nnx_model(), INPUTS, LABELS, args=nnx.Rngs(0)), TypeError,
        "args", "Rngs", "args=(rngs,)"),
    Row("model and inputs exchanged",
        lambda: optax_sam.nnx.objective(INPUTS, nnx_model(), LABELS), ValueError, "model",
        "ArrayImpl", "the live nnx module first"),
    Row("fewer labels than inputs",
        lambda: optax_sam.nnx.objective(nnx_model(), INPUTS, LABELS[:5]), ValueError, "labels",
        "(5,)", "one common leading batch axis"),
]  # fmt: skip
ROWS["nnx.capture_layer_input"] = [
    Row("no such layer",
        lambda: optax_sam.nnx.capture_layer_input(nnx_model(), "head").__enter__(), ValueError,
        "layer", "'head'", "its own layers are []"),
    Row("layer is a number",
        lambda: optax_sam.nnx.capture_layer_input(nnx_model(), 3).__enter__(), TypeError, "layer",
        "3", "'encoder.out'"),
]  # fmt: skip
ROWS["equinox.loss_function"] = [
    Row("loss_fn is a number", lambda: optax_sam.equinox.loss_function(eqx_model(), 3.0),
        TypeError, "loss_fn", "3.0", "(model, *args) -> loss"),
    Row("loss_fn takes more",
        lambda: optax_sam.equinox.loss_function(eqx_model(), lambda m, x: x)(eqx_model()),
        TypeError, "loss_fn", "<lambda>", "loss_function(model, loss_fn, x, y)"),
    Row("params of another model",
        lambda: optax_sam.equinox.loss_function(eqx_model(), lambda m: 0.0)(PARAMS), ValueError,
        "params", "{'w': *}", "eqx.filter(model, wrt)"),
    Row("loss_fn with its decorator", lambda: update(
        optax_sam.sam(), eqx_model(), eqx_model(), state=state_of(optax_sam.sam(), eqx_model()),
        loss_fn=optax_sam.equinox.loss_function(
            eqx_model(), eqx.filter_value_and_grad(lambda m: jnp.sum(m.weight)))), TypeError,
        "loss_fn", "(value, gradients)", "Pass the loss itself"),
]  # fmt: skip
ROWS["equinox.objective"] = [
    Row("call is a number",
        lambda: optax_sam.equinox.objective(eqx_model(), INPUTS, LABELS, call=3), TypeError,
        "call", "3", "(model, inputs) -> logits"),
    Row("params of another model",
        lambda: optax_sam.equinox.objective(eqx_model(), INPUTS, LABELS)(PARAMS), ValueError,
        "params", "{'w': *}", "eqx.filter(model, wrt)"),
]  # fmt: skip
