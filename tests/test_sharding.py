"""Sharded parameters on eight simulated devices: where everything lies, and what the devices send.

No axis is named: the arrays say how they lie, and XLA does the rest. With explicit axes JAX does it,
and the network says where its parameters are gathered.
"""

import contextlib
import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_sam
from benchmarks.compiled_text import Collective, Program
from optax_sam import Objective
from tests.problems import apply_mlp, examples, mlp_parameters

RHO = 0.3
SIZES = {"features": 8, "classes": 4}


class Layout(NamedTuple):
    """The devices' axes, and which of them cut which axes of the parameters."""

    axes: dict[str, int]
    first: P = P()
    bias: P = P()
    second: P = P()
    kind: AxisType = AxisType.Auto

    @property
    def mesh(self) -> Mesh:
        return jax.make_mesh(
            tuple(self.axes.values()),
            tuple(self.axes),
            axis_types=(self.kind,) * len(self.axes),
        )

    def context(self) -> contextlib.AbstractContextManager:
        """In which JAX knows the explicit axes."""
        return (
            jax.set_mesh(self.mesh) if self.kind == AxisType.Explicit else contextlib.nullcontext()
        )

    def shardings(self):
        mesh = self.mesh
        specs = {"first": self.first, "bias": self.bias, "second": self.second}
        return {name: NamedSharding(mesh, spec) for name, spec in specs.items()}


LAYOUTS = {
    "data parallel": Layout({"data": 8}),
    "fully sharded": Layout({"data": 8}, P(None, "data"), P("data"), P("data")),
    "tensor parallel": Layout(
        {"data": 2, "model": 4}, P("data", "model"), P("model"), P("model", "data")
    ),
    "explicit axes": Layout(
        {"data": 8}, P(None, "data"), P("data"), P("data"), kind=AxisType.Explicit
    ),
}


def context(layout):
    return LAYOUTS[layout].context() if layout in LAYOUTS else contextlib.nullcontext()


every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def remember_epsilon():
    """A stage that changes nothing and has the last ε as its state."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda updates, state, _: (updates, updates),
    )


ADAMS = optax.scale_by_rms(0.999, eps_in_sqrt=False, bias_correction=True)
ascent = optax.chain(optax_sam.normalized(RHO), remember_epsilon())
METHODS = {
    "sam": optax_sam.sharpness_aware(ascent),
    "saner": optax_sam.sharpness_aware(ascent, combination=optax_sam.down_weight(0.5)),
    "jsam": optax_sam.sharpness_aware(ascent, evaluation=optax_sam.jacobian_only),
    "vasso": optax_sam.sharpness_aware(optax.chain(optax_sam.moving_average(0.2), ascent)),
    "gsam": optax_sam.sharpness_aware(ascent, combination=optax_sam.subtract_orthogonal(0.4)),
    "preconditioned": optax_sam.sharpness_aware(
        optax.chain(ADAMS, ascent),
        evaluation=optax_sam.jacobian_only,
    ),
    "1-SAM": optax_sam.sam(RHO, group_size=1),
    "m-SAM": optax_sam.sam(RHO, group_size=2),
}
GROUPED = ("1-SAM", "m-SAM")
every_method = pytest.mark.parametrize("name", METHODS)
# The rest of the family, made by the functions that users call: their ε is not looked at.
OTHERS = {
    "asam": optax_sam.asam(RHO),
    "lsam": optax_sam.lsam(RHO),
    "friendly_sam": optax_sam.friendly_sam(RHO),
    "wsam": optax_sam.wsam(RHO, base=optax.trace(0.9)),
    "stable_sam": optax_sam.stable_sam(RHO),
    "le_sam": optax_sam.le_sam(0.2, rho_max=RHO),
    "looksam": optax_sam.looksam(RHO, every_k=2),
    "msam": optax_sam.msam(RHO, momentum=0.9),
    "ae_sam": optax_sam.sam(RHO, when=optax_sam.gradient_norm_is_large(0.0)),
}
NCSAM = optax_sam.ncsam(RHO, flip_ratio=0.25, by_weights=True)
BASE = optax.sgd(0.1, momentum=0.9)


def apply_explicitly(params, inputs):
    """The network where JAX gathers nothing by itself."""
    spread = {name: P(*[None] * leaf.ndim) for name, leaf in params.items()}
    return apply_mlp(jax.tree.map(jax.sharding.reshard, params, spread), inputs)


def step_of(name, layout=None):
    """``(init, step)`` of a method, of SGD or of SAM by hand."""
    apply = apply_explicitly if layout == "explicit axes" else apply_mlp
    method = (METHODS | OTHERS | {"ncsam": NCSAM}).get(name)
    tx = BASE if method is None else optax.chain(method, BASE)

    def step(params, state, inputs, labels):
        # A loop over microbatches would reduce the gradients in each of its rounds.
        at_once = len(labels) if name in GROUPED else None
        objective = Objective(apply, inputs, labels, microbatch_size=at_once)

        def loss_fn(params):
            logits = objective.logits(params)
            return objective.loss_from_logits(logits), logits

        grads, logits = jax.grad(loss_fn, has_aux=True)(params)
        if name == "SAM by hand":
            scale = RHO / optax.tree.norm(grads)
            grads = jax.grad(objective)(jax.tree.map(lambda w, g: w + scale * g, params, grads))
        extra = {} if method is None else {"loss_fn": objective, "logits": logits}
        updates, state = tx.update(grads, state, params, **extra)
        return updates, optax.apply_updates(params, updates), state

    return tx.init, jax.jit(step)


def arguments(init, layout=None):
    """Parameters, the state that ``init`` makes of them, and a batch, where the layout has them."""
    params, batch = mlp_parameters(hidden=16, **SIZES), examples(batch_size=16, **SIZES)
    if layout is not None:
        params = jax.device_put(params, layout.shardings())
        batch = jax.device_put(batch, NamedSharding(layout.mesh, P("data")))
    return params, init(params), *batch


@functools.cache
def after_two_steps(name, layout=None):
    init, step = step_of(name, layout)
    with context(layout):
        params, state, *batch = arguments(init, LAYOUTS.get(layout))
        for _ in range(2):
            updates, params, state = step(params, state, *batch)
    return updates, params, state


@every_method
@every_layout
def test_equal_to_a_single_device(name, layout):
    actual, expected = after_two_steps(name, layout), after_two_steps(name)
    chex.assert_trees_all_close(actual, expected, rtol=2e-5, atol=1e-6)


@every_method
@every_layout
def test_everything_lies_as_the_parameters_do(name, layout):
    """Updates, momentum, ε, the average that VaSSO climbs along, and Adam's second moment."""
    expected = LAYOUTS[layout].shardings()
    updates, params, state = after_two_steps(name, layout)
    found = 0
    for tree in (updates, params, arguments(step_of(name)[0], LAYOUTS[layout])[1], state):
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            key = getattr(path[-1], "key", None)
            if key in expected:
                assert leaf.sharding.is_equivalent_to(expected[key], leaf.ndim), path
                found += 1
    trees = 4 + 2 * (name not in GROUPED) + 2 * (name in ("vasso", "preconditioned"))
    assert found == trees * len(expected)


@functools.cache
def collectives(name, layout) -> list[Collective]:
    init, step = step_of(name, layout)
    with context(layout):
        lowered = step.lower(*arguments(init, LAYOUTS[layout]))
    return Program(lowered.compile().as_text()).collectives()


def large(name, layout, kind):
    """The sizes of those that are no scalars: gradients, weights, activations."""
    return sorted(
        one.size
        for one in collectives(name, layout)
        for _ in range(one.times)
        if one.kind == kind and one.size > 16
    )


@every_method
@every_layout
def test_nothing_is_gathered_that_sam_by_hand_does_not_gather(name, layout):
    if layout == "explicit axes" and name in GROUPED:
        pytest.skip("the weights of every group are gathered: docs/guide/devices.md says so")
    for kind in ("all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
        found, by_hand = (large(step, layout, kind) for step in (name, "SAM by hand"))
        assert len(found) <= len(by_hand)
        assert set(found) <= set(large("SGD", layout, kind))


@pytest.mark.parametrize("name", ["SAM by hand", *METHODS])
def test_gradients_are_reduced_once_for_each(name):
    """Groups need no gradient of the batch to climb, so their step sends what a step of SGD sends."""
    of_sgd = large("SGD", "data parallel", "all-reduce")
    count = 1 if name in GROUPED else 2
    found = large(name, "data parallel", "all-reduce")
    assert len(found) == count * len(of_sgd) > 0
    assert sum(found) <= count * sum(of_sgd) + 16  # scalars may travel with them


def test_ncsam_by_weights_moves_no_example():
    """Three reductions of gradients, and of the examples only their gaps travel."""
    of_sgd, found = (large(name, "data parallel", "all-reduce") for name in ("SGD", "ncsam"))
    assert 3 * sum(of_sgd) <= sum(found) <= 3 * sum(of_sgd) + 100, found
    gaps = 16 * 4
    for kind in ("all-gather", "all-to-all", "collective-permute"):
        assert max(large("ncsam", "data parallel", kind), default=0) <= gaps
    actual, expected = after_two_steps("ncsam", "data parallel"), after_two_steps("ncsam")
    chex.assert_trees_all_close(actual, expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", OTHERS)
@every_layout
def test_the_rest_of_the_family(name, layout):
    """As on one device, everything where the parameters are, and no gather that SGD has not."""
    chex.assert_trees_all_close(
        after_two_steps(name, layout), after_two_steps(name), rtol=2e-5, atol=1e-6
    )
    expected = LAYOUTS[layout].shardings()
    for path, leaf in jax.tree_util.tree_leaves_with_path(after_two_steps(name, layout)):
        key = getattr(path[-1], "key", None)
        if key in expected:
            assert leaf.sharding.is_equivalent_to(expected[key], leaf.ndim), path
    for kind in ("all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
        assert set(large(name, layout, kind)) <= set(large("SGD", layout, kind))


def test_microbatches_under_shard_map_are_reduced_once():
    """Under ``jit`` every round of the loop reduces; with an axis name only the mean does."""
    mesh, params = LAYOUTS["data parallel"].mesh, mlp_parameters(hidden=16, **SIZES)

    def direction(params, inputs, labels, axis_name):
        tx = optax_sam.sam(RHO, group_size=1, axis_name=axis_name)
        objective = Objective(apply_mlp, inputs, labels, microbatch_size=2)
        return tx.update(params, tx.init(params), params, loss_fn=objective)[0]

    mapped = jax.shard_map(
        functools.partial(direction, axis_name="data"),
        mesh=mesh,
        in_specs=(P(), P("data"), P("data")),
        out_specs=P(),
    )
    batch = examples(batch_size=16, **SIZES)
    compiled = jax.jit(mapped).lower(params, *batch).compile()
    found = Program(compiled.as_text()).collectives()
    size = sum(leaf.nbytes for leaf in params.values())
    assert size <= sum(one.times * one.size for one in found) <= size + 16
    expected = jax.jit(functools.partial(direction, axis_name=None))(params, *batch)
    chex.assert_trees_all_close(compiled(params, *batch), expected, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("group_size", [1, 4])
def test_constraints_say_that_groups_lie_along_the_batch_axis(group_size):
    """A network is traced on one group, whose examples no mesh can cut; the groups can be."""
    layout = LAYOUTS["data parallel"]
    params, _, *batch = arguments(BASE.init, layout)

    def apply(params, inputs):
        outputs = apply_mlp(params, inputs)
        return jax.lax.with_sharding_constraint(outputs, NamedSharding(layout.mesh, P()))

    def direction(params, inputs, labels):
        tx = optax_sam.sam(RHO, group_size=group_size)
        options = {"microbatch_size": len(labels), "spmd_axis_name": "data"}
        objective = Objective(apply, inputs, labels, **options)
        return tx.update(params, tx.init(params), params, loss_fn=objective)[0]

    text = jax.jit(direction).lower(params, *batch).as_text()
    constraints = [line for line in text.splitlines() if "sharding_constraint" in line]
    assert constraints
    assert all('[{"data"}, {}, {}]' in line for line in constraints)


def test_saying_how_the_examples_lie_mixes_none():
    layout = LAYOUTS["data parallel"]
    params, _, *batch = arguments(BASE.init, layout)

    def apply(params, inputs):
        by_example = NamedSharding(layout.mesh, P("data"))
        return jax.lax.with_sharding_constraint(apply_mlp(params, inputs), by_example)

    assert optax_sam.independence.check_independence(Objective(apply, *batch), params) == "proved"
