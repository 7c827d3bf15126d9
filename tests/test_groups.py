"""m-SAM over groups and over devices, and microbatches in every pass."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_sam
from optax_sam import Objective
from optax_sam.per_example import gradient
from tests.problems import apply_mlp, examples, mlp_parameters

DEVICES, BATCH, RHO = 4, 16, 0.3
METHODS = {"saner": optax_sam.saner, "jsam": optax_sam.jsam}


def assert_close(left, right):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6), left, right)


def convolve(kernel, images):
    numbers = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=numbers)
    return y.mean((1, 2))


def update(tx, inputs, labels, **options):
    """One update; the options are the objective's."""
    return update_of(tx, Objective(apply_mlp, inputs, labels, **options))


@functools.partial(jax.jit, static_argnums=0)
def update_of(tx, objective):
    params = mlp_parameters()
    grads = jax.grad(objective)(params)
    return tx.update(grads, tx.init(params), params, loss_fn=objective)[0]


@pytest.mark.parametrize(
    ("how", "name"),
    [
        *[(how, "saner") for how in ("pmap", "shard_map", "shard_map unchecked", "jit")],
        *[(how, "jsam") for how in ("shard_map", "jit")],
    ],
)
def test_per_device_perturbations_are_the_groups_of_one_device(name, how):
    inputs, labels = examples(batch_size=BATCH)
    grouped = METHODS[name](RHO, group_size=BATCH // DEVICES)
    expected = jax.jit(functools.partial(update, grouped))(inputs, labels)
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    if how == "jit":
        sharding = NamedSharding(mesh, P("data"))
        ours = jax.jit(functools.partial(update, grouped))(
            *jax.device_put((inputs, labels), sharding)
        )
        assert_close(ours, expected)
        return

    def local(inputs, labels):
        """The documented recipe: a truly local gradient, under every kind of mapping."""
        params, objective = mlp_parameters(), Objective(apply_mlp, inputs, labels)
        varying = optax_sam._axes.to_varying(params, "data")
        tx = METHODS[name](RHO, axis_name="data")
        grads = jax.grad(objective)(varying)
        return tx.update(grads, tx.init(params), params, loss_fn=objective)[0]

    if how == "pmap":
        split = [x.reshape(DEVICES, -1, *x.shape[1:]) for x in (inputs, labels)]
        mapped = jax.pmap(local, axis_name="data", devices=jax.devices()[:DEVICES])(*split)
        ours = jax.tree.map(lambda x: x[0], mapped)
    else:
        ours = jax.jit(
            jax.shard_map(
                local,
                mesh=mesh,
                in_specs=(P("data"), P("data")),
                out_specs=P(),
                check_vma=how == "shard_map",
            )
        )(inputs, labels)
    assert_close(ours, expected)


@pytest.mark.parametrize(("name", "size"), [("saner", 1), ("jsam", 2), ("saner", 8)])
def test_result_does_not_depend_on_the_microbatch(name, size):
    inputs, labels = examples(batch_size=BATCH)
    tx = METHODS[name](RHO, group_size=size)
    small, whole = (
        jax.jit(functools.partial(update, tx, microbatch_size=m))(inputs, labels) for m in (8, None)
    )
    assert_close(small, whole)


@pytest.mark.parametrize(
    ("tx", "options"),
    [
        (optax_sam.jsam(RHO, group_size=1), {}),
        (optax_sam.friendly_sam(RHO, group_size=2), {}),
        (optax_sam.saner(RHO), {"microbatch_size": 2}),
        (optax_sam.ncsam(RHO, kappa=0.1, flip_ratio=0.3), {}),
        (optax_sam.ncsam(RHO, kappa=0.1, flip_ratio=0.3, by_weights=True), {}),
        (optax_sam.jsam(RHO, ascent_fraction=0.4), {}),
    ],
    ids=["jsam", "friendly_sam", "microbatches", "ncsam", "ncsam by weights", "ascent_fraction"],
)
@pytest.mark.filterwarnings(r"ignore:group_size=2 differentiates")
def test_explicit_sharding_gives_the_same(tx, options):
    """The axes that ``jax.make_mesh`` makes by itself: JAX types shards, and refuses to cut them."""
    inputs, labels = examples(batch_size=BATCH)
    step = jax.jit(functools.partial(update, tx, **options))
    expected = step(inputs, labels)
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Explicit,))
    sharded = jax.device_put((inputs, labels), NamedSharding(mesh, P("data")))
    with jax.set_mesh(mesh):
        assert_close(step(*sharded), expected)


@pytest.mark.filterwarnings(r"ignore:group_size=2 differentiates")
def test_a_radius_does_not_drift():
    """It is the same for all groups; a mean by their rounded shares would be another number."""
    inputs, labels = examples(batch_size=6)
    radius = optax.inject_hyperparams(optax_sam.normalized)(rho=0.1)
    tx = optax_sam.sharpness_aware(radius, group_size=2)
    objective = Objective(
        apply_mlp,
        inputs,
        labels,
        weights=jax.random.uniform(jax.random.key(0), (6,)),
        penalty=lambda params: 1e-3 * optax.tree.norm(params, squared=True),
    )
    params = mlp_parameters()
    step = jax.jit(lambda state, o: tx.update(params, state, params, loss_fn=o)[1])
    state = tx.init(params)
    for _ in range(20):
        state = step(state, objective)
        assert state.perturbation.hyperparams["rho"] == jnp.float32(0.1)


@pytest.mark.parametrize("options", [{}, {"group_size": 2}], ids=["batch", "groups"])
@pytest.mark.filterwarnings(r"ignore:group_size=2 differentiates")
def test_a_scalar_that_changes_is_the_new_one(options):
    """Not the old one and the change, in which a small number behind a large one would be lost."""

    def forget(updates, state, params=None):
        return updates, jnp.where(state == 1e6, 1e-3, state)

    stage = optax.GradientTransformation(lambda params: jnp.float32(1e6), forget)
    tx = optax_sam.sharpness_aware(optax.chain(stage, optax_sam.normalized(0.1)), **options)
    inputs, labels = examples(batch_size=6)
    params = mlp_parameters()
    objective = Objective(apply_mlp, inputs, labels, penalty=lambda params: jnp.zeros([]))
    _, state = tx.update(params, tx.init(params), params, loss_fn=objective)
    np.testing.assert_allclose(state.perturbation[0], 1e-3, rtol=1e-6)


@pytest.mark.filterwarnings(r"ignore:group_size=4 differentiates")
def test_statistics_of_a_group_are_its_own():
    """Batch norm mixes the examples of a group, which is what it does on a device of its own."""

    def apply(params, inputs):
        hidden = inputs @ params["first"] + params["bias"]
        hidden = (hidden - hidden.mean(0)) / (hidden.std(0) + 0.1)
        return jnp.tanh(hidden) @ params["second"]

    def direction(inputs, labels, **options):
        return update_of(optax_sam.asam(RHO, **options), Objective(apply, inputs, labels))

    inputs, labels = examples(batch_size=8)
    halves = [direction(inputs[part], labels[part]) for part in (slice(0, 4), slice(4, 8))]
    expected = jax.tree.map(lambda a, b: (a + b) / 2, *halves)
    assert_close(direction(inputs, labels, group_size=4), expected)


@pytest.mark.parametrize(("group_size", "microbatch_size"), [(1, None), (None, 8)])
def test_loops_over_a_sharded_batch_use_all_devices(group_size, microbatch_size):
    """Under jit every microbatch is spread over the devices."""
    tx = optax_sam.sam(RHO, group_size=group_size)
    params = {"kernel": jnp.zeros((3, 3, 1, 8)), "head": jnp.zeros((8, 4))}
    inputs, labels = jnp.zeros((64, 8, 8, 1)), jnp.zeros(64, jnp.int32)

    def apply(params, images):
        return jnp.tanh(convolve(params["kernel"], images)) @ params["head"]

    def direction(params, inputs, labels):
        objective = Objective(apply, inputs, labels, microbatch_size=microbatch_size)
        return tx.update(params, tx.init(params), params, loss_fn=objective)[0]

    def flops(data):
        compiled = jax.jit(direction).lower(params, *data).compile()
        return compiled.cost_analysis()["flops"]  # of one device

    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    sharded = jax.device_put((inputs, labels), NamedSharding(mesh, P("data")))
    assert flops(sharded) < 1.1 / DEVICES * flops((inputs, labels))


MANY_PASSES = {
    "sam": optax_sam.sam,
    "several steps": functools.partial(optax_sam.sam, ascent_steps=3),
    "a part of the batch": functools.partial(optax_sam.sam, ascent_fraction=0.8),  # 12 of 16
    "jsam": optax_sam.jsam,
    "lsam": optax_sam.lsam,
    "ncsam": functools.partial(optax_sam.ncsam, kappa=0.5, flip_ratio=0.4),
}


@pytest.mark.parametrize("name", MANY_PASSES)
def test_microbatches_of_every_pass_give_the_whole_batch(name):
    inputs, labels = examples(batch_size=BATCH)
    cut, whole = (
        jax.jit(functools.partial(update, MANY_PASSES[name](RHO), microbatch_size=size))(
            inputs, labels
        )
        for size in (4, None)
    )
    assert_close(cut, whole)


@pytest.mark.parametrize("name", MANY_PASSES)
def test_the_memory_is_that_of_one_microbatch(name):
    """Neither activations of the whole batch, nor gradients of several microbatches side by side."""
    size, width = 256, 512
    inputs, labels = jnp.zeros((size, 16)), jnp.zeros(size, jnp.int32)
    params = {"a": jnp.zeros((16, width)), "b": jnp.zeros((width, 4))}
    tx = MANY_PASSES[name](RHO)

    def apply(params, inputs):
        return jnp.tanh(inputs @ params["a"]) @ params["b"]

    def temporary(microbatch_size):
        def step(params, state, inputs, labels):
            objective = Objective(apply, inputs, labels, microbatch_size=microbatch_size)
            return tx.update(jax.grad(objective)(params), state, params, loss_fn=objective)

        program = jax.jit(step).lower(params, tx.init(params), inputs, labels).compile()
        return program.memory_analysis().temp_size_in_bytes

    weights = 4 * (16 + 4) * width
    # A few gradients and perturbations; eight microbatches side by side would be eight gradients more.
    assert temporary(2) < 7 * weights < temporary(None)


@pytest.mark.parametrize("size", [1, 4])
def test_zero_rho_descends_along_the_gradient(size):
    inputs, labels = examples(batch_size=8)
    clean = jax.grad(Objective(apply_mlp, inputs, labels))(mlp_parameters())
    assert_close(update(optax_sam.sam(0.0, group_size=size), inputs, labels), clean)


@pytest.mark.parametrize("size", [1, 4, 16])
@pytest.mark.filterwarnings(r"ignore:group_size=\d+ differentiates")
def test_groups_keep_no_copies_of_large_weights(size):
    """Differentiating each group by itself has a gradient and perturbed weights for each at work."""
    inputs, labels = jnp.zeros((64, 512)), jnp.zeros(64, jnp.int32)
    params = {"a": jnp.zeros((512, 512)), "b": jnp.zeros((512, 4))}

    def temporary(method):
        def direction(params, inputs, labels):
            objective = Objective(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], inputs, labels)
            tx = method(RHO, group_size=size)
            return tx.update(params, tx.init(params), params, loss_fn=objective)[0]

        program = jax.jit(direction).lower(params, inputs, labels).compile()
        return program.memory_analysis().temp_size_in_bytes

    weights = 4 * 512 * (512 + 4)
    assert (
        temporary(optax_sam.sam) < 1.5 * weights < 2 * weights < temporary(optax_sam.friendly_sam)
    )


def test_groups_are_differentiated_by_themselves_where_that_is_faster():
    def is_worthwhile(apply, params, shape, size):
        objective = Objective(apply, jnp.zeros((32, *shape)), jnp.zeros(32, jnp.int32))
        mask = jax.tree.map(lambda _: True, params)
        return gradient.is_worthwhile(objective, params, mask, size)

    kernel, image = jnp.zeros((3, 3, 1, 4)), (6, 6, 1)
    assert is_worthwhile(convolve, kernel, image, 8)
    assert not is_worthwhile(convolve, kernel, image, 16)
    # Sixteen examples of one position are few beside 512 inputs and outputs, of 100 positions not.
    weights = jnp.zeros((512, 512))
    assert is_worthwhile(lambda w, x: x @ w, weights, (512,), 16)
    assert not is_worthwhile(lambda w, x: (x @ w).mean(1), weights, (100, 512), 16)


@pytest.mark.parametrize("method", [optax_sam.asam, optax_sam.friendly_sam])
@pytest.mark.filterwarnings(r"ignore:group_size=1 differentiates")
def test_groups_of_one_without_a_fast_path(method):
    """The grouped form of any perturbation; the mean of one-example steps is the reference."""
    inputs, labels = examples(batch_size=8)
    ours = update(method(RHO, group_size=1), inputs, labels)
    each = [update(method(RHO), inputs[i : i + 1], labels[i : i + 1]) for i in range(8)]
    assert_close(ours, jax.tree.map(lambda *x: jnp.mean(jnp.stack(x), 0), *each))


def test_errors_name_the_argument():
    inputs, labels = examples(batch_size=8)
    with pytest.raises(ValueError, match=r"group_size=3 must divide the batch of 8 .* such as 2"):
        update(optax_sam.sam(RHO, group_size=3), inputs, labels)
    with pytest.raises(ValueError, match="group_size must be at least 1, got 0"):
        optax_sam.sam(RHO, group_size=0)
    with pytest.raises(
        ValueError, match="msam climbs along its own last direction, so group_size=2"
    ):
        optax_sam.msam(RHO, group_size=2)
    with pytest.raises(
        ValueError, match=r"ascent_fraction=0\.5 cannot be combined with group_size=2"
    ):
        optax_sam.sam(RHO, group_size=2, ascent_fraction=0.5)
    tx = optax_sam.sam(RHO, group_size=2)
    w = jnp.ones(2)
    with pytest.raises(TypeError, match=r"group_size needs to look inside the loss.*Objective\("):
        tx.update(w, tx.init(w), w, loss_fn=lambda w: jnp.sum(w**2))


def test_along_previous_refuses_groups():
    inputs, labels = examples(batch_size=8)
    tx = optax_sam.along_previous(optax_sam.sam(RHO, group_size=2))
    with pytest.raises(ValueError, match=r"group_size each group climbs.*along_previous"):
        update(tx, inputs, labels)
