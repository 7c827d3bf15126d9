"""Data parallelism on four simulated devices: sharded jit, pmap, shard_map, vmap with an axis."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_sam
from optax_sam import Objective, _axes
from tests.problems import apply_mlp, examples, mlp_parameters

DEVICES = 4
BATCH = 16
RHO = 0.3

METHODS = {
    "sam": optax_sam.sam,
    "saner": functools.partial(optax_sam.saner, alpha=0.5),
    "jsam": optax_sam.jsam,
    "gsam": optax_sam.gsam,
    "vasso": optax_sam.vasso,
}
every_method = pytest.mark.parametrize("name", METHODS)


@functools.cache
def mesh():
    return jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))


def batch(seed=0):
    return examples(seed, batch_size=BATCH)


def shards(seed=0):
    """The batch as four batches, one per device."""
    return jax.tree.map(lambda x: x.reshape(DEVICES, -1, *x.shape[1:]), batch(seed))


def assert_close(left, right):
    chex.assert_trees_all_close(left, right, rtol=2e-5, atol=1e-6)


def update_on(tx, inputs, labels, *, gradients="local", axis_name=None, state=None):
    """One update from the gradients of a batch, which may be averaged over the axis."""
    params, objective = mlp_parameters(), Objective(apply_mlp, inputs, labels)
    grads = jax.grad(objective)(_axes.to_varying(params, axis_name))
    if gradients == "averaged":
        grads = jax.lax.pmean(grads, axis_name)
    state = tx.init(params) if state is None else state
    return tx.update(grads, state, params, loss_fn=objective)


def under_shard_map(function, check_vma=True):
    """``function(inputs, labels)`` on the four shards; the results must be replicated."""
    specs = (P("data"), P("data"))
    mapped = jax.shard_map(
        function, mesh=mesh(), in_specs=specs, out_specs=P(), check_vma=check_vma
    )
    return jax.jit(mapped)(*batch())


def under_pmap(function):
    """The same under pmap: every device's result, which must be one and the same."""
    results = jax.pmap(function, axis_name="data", devices=jax.devices()[:DEVICES])(*shards())
    return first_of_equal(results)


def under_vmap(function):
    """The same under vmap with an axis name."""
    return first_of_equal(jax.jit(jax.vmap(function, axis_name="data"))(*shards()))


def first_of_equal(results):
    """The first result, after a check that every device has the same."""
    for device in range(1, DEVICES):
        chex.assert_trees_all_equal(
            jax.tree.map(lambda x: x[0], results),
            jax.tree.map(lambda x, device=device: x[device], results),
        )
    return jax.tree.map(lambda x: x[0], results)


RUNNERS = {
    "shard_map": under_shard_map,
    "shard_map unchecked": functools.partial(under_shard_map, check_vma=False),
    "pmap": under_pmap,
    "vmap": under_vmap,
}
every_runner = pytest.mark.parametrize("run", RUNNERS)


@functools.cache
def parallel(run, gradients):
    """``(updates, state)`` of every method after one step; one program for all of them."""

    def on_shard(inputs, labels):
        return {
            name: update_on(
                make(RHO, axis_name="data"),
                inputs,
                labels,
                gradients=gradients,
                axis_name="data",
            )
            for name, make in METHODS.items()
        }

    return RUNNERS[run](on_shard)


@functools.cache
def on_whole_batch():
    """The same on one device that sees the whole batch."""
    return jax.jit(
        lambda x, y: {name: update_on(make(RHO), x, y) for name, make in METHODS.items()}
    )(*batch())


@functools.cache
def on_each_shard():
    """The same on each shard by itself, without any axis name; stacked."""
    return jax.jit(
        jax.vmap(lambda x, y: {name: update_on(make(RHO), x, y) for name, make in METHODS.items()})
    )(*shards())


def test_there_are_four_devices():
    assert jax.device_count() >= DEVICES


@pytest.mark.parametrize("name", ["saner", "vasso"])
def test_jit_with_sharded_arrays_equals_a_single_device(name):
    """No axis name: epsilon is that of the global batch, over two steps with state."""
    tx = METHODS[name](RHO)
    step = jax.jit(lambda state, x, y: update_on(tx, x, y, state=state))
    sharding = NamedSharding(mesh(), P("data"))
    single = tx.init(mlp_parameters())
    sharded = jax.device_put(single, NamedSharding(mesh(), P()))
    for seed in range(2):
        expected, single = step(single, *batch(seed))
        actual, sharded = step(sharded, *jax.device_put(batch(seed), sharding))
        assert_close((actual, sharded), (expected, single))


@every_runner
@every_method
def test_averaged_gradients_give_one_perturbation_for_the_global_batch(name, run):
    """Update and state equal those of a single device that sees the whole batch."""
    assert_close(parallel(run, "averaged")[name][0], on_whole_batch()[name][0])
    actual, expected = parallel(run, "averaged")[name][1], on_whole_batch()[name][1]
    assert_close(actual.perturbation, expected.perturbation)


@every_runner
@pytest.mark.parametrize("name", ["sam", "jsam", "vasso"])
def test_local_gradients_give_one_perturbation_per_device(name, run):
    """m-sharpness: the update is the mean of what each shard would do on its own."""
    expected = jax.tree.map(lambda leaf: leaf.mean(0), on_each_shard()[name][0])
    assert_close(parallel(run, "local")[name][0], expected)
    other = on_whole_batch()[name][0]
    differences = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), expected, other)
    assert max(jax.tree.leaves(differences)) > 1e-3  # the two readings do differ here


@every_runner
@pytest.mark.parametrize(
    ("name", "combination"),
    [("saner", optax_sam.down_weight(0.5)), ("gsam", optax_sam.subtract_orthogonal(0.1))],
    ids=["saner", "gsam"],
)
def test_combinations_act_on_the_averages(name, combination, run):
    """Also with one perturbation per device, g' and g are averaged before they meet."""
    perturbed = jax.tree.map(lambda leaf: leaf.mean(0), on_each_shard()["sam"][0])
    clean = jax.grad(Objective(apply_mlp, *batch()))(mlp_parameters())
    expected, state = combination.update(perturbed, combination.init(clean), clean_grads=clean)
    direction, actual_state = parallel(run, "local")[name]
    assert_close(direction, expected)
    if name == "saner":
        fraction = optax_sam.get_metrics(actual_state)["down_weighted_fraction"]
        np.testing.assert_allclose(fraction, state.down_weighted_fraction, rtol=1e-6)
        assert 0 < fraction < 1


@every_runner
@every_method
@pytest.mark.parametrize("gradients", ["local", "averaged"])
def test_metrics_are_replicated_averages(name, run, gradients):
    """``out_specs=P()`` accepts them and every device has the same, see the runners."""
    metrics = optax_sam.get_metrics(parallel(run, gradients)[name][1])
    reference = on_each_shard() if gradients == "local" else on_whole_batch()
    expected = jax.tree.map(jnp.mean, reference[name][1].metrics)
    np.testing.assert_allclose(metrics["perturbation_norm"], expected.perturbation_norm, rtol=1e-4)
    np.testing.assert_allclose(metrics["perturbed_loss"], expected.perturbed_loss, rtol=1e-4)
    np.testing.assert_allclose(metrics["gradient_norm"], expected.gradient_norm, rtol=1e-4)


def test_axis_names_may_be_a_tuple():
    tx = optax_sam.sam(RHO, axis_name=("data",))

    def on_shard(inputs, labels):
        return update_on(tx, inputs, labels, gradients="averaged", axis_name="data")[0]

    assert_close(under_shard_map(on_shard), on_whole_batch()["sam"][0])


def test_two_mesh_axes():
    square = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    tx = optax_sam.sam(RHO, axis_name=("x", "y"))

    def on_shard(inputs, labels):
        return update_on(tx, inputs, labels, gradients="averaged", axis_name=("x", "y"))[0]

    spec = P(("x", "y"))
    mapped = jax.shard_map(on_shard, mesh=square, in_specs=(spec, spec), out_specs=P())
    assert_close(jax.jit(mapped)(*batch()), on_whole_batch()["sam"][0])


MAPPED = ["shard_map", "shard_map unchecked", "pmap"]


@pytest.mark.parametrize("run", MAPPED)
@pytest.mark.parametrize(
    "tx",
    [optax_sam.sam(RHO), optax_sam.jsam(RHO, group_size=1), optax_sam.saner(RHO, every_k=2)],
    ids=["sam", "groups", "sometimes"],
)
def test_audit_1_1_axis_name_forgotten(run, tx):
    """Averaged gradients went in and were perturbed on each device's own shard: the devices drifted."""

    def on_shard(inputs, labels):
        objective = Objective(apply_mlp, inputs, labels)
        params = mlp_parameters()
        return tx.update(params, tx.init(params), params, loss_fn=objective)[0]

    with pytest.raises(
        ValueError, match=r"over the axis 'data'.*drift apart.*axis_name='data'.*axis_name=\(\)"
    ):
        RUNNERS[run](on_shard)


@pytest.mark.parametrize("run", ["shard_map unchecked", "pmap"])
def test_audit_1_1_each_device_may_go_its_own_way(run):
    """``axis_name=()`` says that nothing is to be averaged."""
    tx = optax_sam.sam(RHO, axis_name=())

    def on_shard(inputs, labels):
        direction, _ = update_on(tx, inputs, labels, axis_name="data")
        return jax.lax.all_gather(direction, "data")

    assert_close(RUNNERS[run](on_shard), on_each_shard()["sam"][0])


@pytest.mark.parametrize(
    "method",
    [
        functools.partial(optax_sam.sam, every_k=2),
        functools.partial(optax_sam.vasso, group_size=1),
    ],
    ids=["every_k", "groups in a loop"],
)
@pytest.mark.filterwarnings("ignore:group_size=1 differentiates")
def test_an_ensemble_of_one_network_per_device(method):
    """Parameters of its own on every device: with checks, loops and branches must be told."""
    inputs, labels = examples(batch_size=32)  # more groups than side by side
    tx = method(RHO, axis_name=())
    sizes = jnp.arange(1.0, 1 + DEVICES)

    def one(size, objective):
        params = jax.tree.map(lambda leaf: size * leaf, mlp_parameters())
        grads = jax.grad(objective)(params)
        return tx.update(grads, tx.init(params), params, loss_fn=objective)[0]

    def of_batch(sizes, inputs, labels):
        direction = one(sizes[0], Objective(apply_mlp, inputs, labels))
        return jax.tree.map(lambda leaf: leaf[None], direction)

    mapped = jax.shard_map(
        of_batch, mesh=mesh(), in_specs=(P("data"), P(), P()), out_specs=P("data")
    )
    ours = jax.jit(mapped)(sizes, inputs, labels)
    expected = jax.jit(one)(sizes[2], Objective(apply_mlp, inputs, labels))
    assert_close(jax.tree.map(lambda leaf: leaf[2], ours), expected)


def test_ncsam_after_a_warm_up_by_sam():
    """The branch without a compensation does not see the examples of the device."""
    options = {"kappa": 0.1, "flip_ratio": 0.5, "total_steps": 10}
    waits = optax_sam.ncsam(RHO, **options, warmup_steps=3, warmup="sam", axis_name="data")

    def on_shard(inputs, labels):
        return update_on(waits, inputs, labels, gradients="averaged", axis_name="data")[0]

    expected, _ = update_on(optax_sam.sam(RHO), *batch())
    assert_close(under_shard_map(on_shard), expected)


def test_a_scalar_parameters_average_counts_by_weight():
    """A temperature has an average too, which is no constant of the stage."""
    weights = jnp.ones(BATCH).at[: BATCH // DEVICES].set(3.0)
    tx = optax_sam.vasso(RHO, axis_name="data")
    whole = optax_sam.vasso(RHO)
    params = {"scale": jnp.float32(1.5), "w": mlp_parameters()["first"][:, :3]}

    def apply(params, inputs):
        return params["scale"] * jnp.tanh(inputs @ params["w"])

    def state_of(tx, objective, axis_name=None):
        grads = jax.grad(objective)(_axes.to_varying(params, axis_name))
        return tx.update(grads, tx.init(params), params, loss_fn=objective)[1].perturbation

    def on_shard(inputs, labels, weights):
        return state_of(tx, Objective(apply, inputs, labels, weights=weights), "data")

    inputs, labels = batch()
    expected = state_of(whole, Objective(apply, inputs, labels, weights=weights))
    mapped = jax.shard_map(on_shard, mesh=mesh(), in_specs=P("data"), out_specs=P())
    assert_close(jax.jit(mapped)(inputs, labels, weights), expected)


def test_audit_1_1_jit_and_vmap_need_no_axis_name():
    """``vmap`` maps over seeds or folds; sharded arrays under ``jit`` are one global batch."""
    tx = optax_sam.sam(RHO)
    each = jax.vmap(lambda x, y: update_on(tx, x, y)[0], axis_name="seeds")(*shards())
    assert_close(each, on_each_shard()["sam"][0])
    sharding = NamedSharding(mesh(), P("data"))
    sharded = jax.device_put(batch(), sharding)
    with jax.set_mesh(mesh()):
        actual = jax.jit(lambda x, y: update_on(tx, x, y)[0])(*sharded)
    assert_close(actual, on_whole_batch()["sam"][0])


@pytest.mark.parametrize(
    "make",
    [functools.partial(optax_sam.sam, RHO), functools.partial(optax_sam.sam, RHO, every_k=2)],
    ids=["method", "sometimes"],
)
def test_an_axis_name_that_nobody_maps(make):
    with pytest.raises(ValueError, match=r"axis_name='dta' names no mapped axis.*leave it out"):
        update_on(make(axis_name="dta"), *batch())

    def on_shard(inputs, labels):
        return update_on(make(axis_name="dta"), inputs, labels)[0]

    with pytest.raises(ValueError, match=r"axis_name='dta' names.*mapped here are \('data',\)"):
        under_shard_map(on_shard)
    with pytest.raises(
        TypeError, match=r"axis_name must be.*got \['data'\].*\('hosts', 'devices'\)"
    ):
        make(axis_name=["data"])


@pytest.mark.parametrize("microbatch_size", [None, 1])
def test_a_loss_averaged_by_the_caller(microbatch_size):
    """Gradients of a loss that is one and the same on all devices."""

    def on_shard(inputs, labels, axis_name=()):
        objective = Objective(apply_mlp, inputs, labels, microbatch_size=microbatch_size)
        params = mlp_parameters()

        def loss_fn(params):
            return jax.lax.pmean(objective(params), "data")

        tx = optax_sam.sam(RHO, axis_name=axis_name)
        return tx.update(jax.grad(loss_fn)(params), tx.init(params), params, loss_fn=loss_fn)[0]

    assert_close(under_shard_map(on_shard), on_whole_batch()["sam"][0])
    with pytest.raises(ValueError, match=r"the same along the mapped axis 'data'.*axis_name=\(\)"):
        under_shard_map(functools.partial(on_shard, axis_name="data"))


def test_an_axis_that_is_declined_though_the_loss_differs_along_it():
    """Differentiating in replicated parameters would sum over the devices."""

    def on_shard(inputs, labels):
        return update_on(optax_sam.sam(RHO, axis_name=()), inputs, labels)[0]

    with pytest.raises(ValueError, match=r"differs along the mapped axis 'data'.*axis_name='data'"):
        under_shard_map(on_shard)


@pytest.mark.parametrize("run", ["shard_map", "pmap"])
def test_steps_without_a_second_gradient_average_the_clean_one(run):
    """Local gradients go in at every step; between two ascents their mean comes out."""
    tx = optax_sam.sam(RHO, every_k=2, axis_name="data")

    def on_shard(inputs, labels):
        _, state = update_on(tx, inputs, labels, axis_name="data")
        return update_on(tx, inputs, labels, axis_name="data", state=state)[0]

    expected = jax.grad(Objective(apply_mlp, *batch()))(mlp_parameters())
    assert_close(RUNNERS[run](on_shard), expected)


@pytest.mark.parametrize("run", ["shard_map", "pmap"])
def test_leaves_without_a_gradient(run):
    """Integer and None leaves stay replicated: their zero update passes ``out_specs=P()``."""

    def on_shard(inputs, labels):
        params = mlp_parameters() | {"steps": jnp.array([3]), "none": None}
        objective = Objective(apply_mlp, inputs, labels)
        tx = optax_sam.saner(RHO, axis_name="data")
        zeros = jax.tree.map(jnp.zeros_like, params)
        return tx.update(zeros, tx.init(params), params, loss_fn=objective)[0]

    updates = RUNNERS[run](on_shard)
    assert updates["steps"].tolist() == [0]
    assert updates["none"] is None


@pytest.mark.parametrize("run", ["shard_map", "pmap"])
def test_masks_and_schedules_in_parallel(run):
    options = {"mask": {"first": True, "bias": False, "second": False}}

    def rho(count):
        return RHO / (count + 1)

    def on_shard(inputs, labels):
        tx = optax_sam.sam(rho, axis_name="data", **options)
        return update_on(tx, inputs, labels, gradients="averaged", axis_name="data")

    expected, _ = jax.jit(lambda x, y: update_on(optax_sam.sam(rho, **options), x, y))(*batch())
    actual, state = RUNNERS[run](on_shard)
    assert_close(actual, expected)
    assert int(optax.tree.get(state, "count")) == 1


def test_a_training_run_equals_a_single_device():
    """Ten steps with momentum and weight decay under shard_map, averaged gradients."""
    optimizer = [optax.add_decayed_weights(5e-4), optax.sgd(0.1, momentum=0.9)]
    alone = optax.chain(optax_sam.saner(0.1), *optimizer)
    together = optax.chain(optax_sam.saner(0.1, axis_name="data"), *optimizer)

    def step(tx, axis_name, params, state, inputs, labels):
        objective = Objective(apply_mlp, inputs, labels)
        grads = jax.grad(objective)(_axes.to_varying(params, axis_name))
        grads = jax.lax.pmean(grads, axis_name) if axis_name else grads
        updates, state = tx.update(grads, state, params, loss_fn=objective)
        return optax.apply_updates(params, updates), state

    one = jax.jit(functools.partial(step, alone, None))
    mapped = jax.shard_map(
        functools.partial(step, together, "data"),
        mesh=mesh(),
        in_specs=(P(), P(), P("data"), P("data")),
        out_specs=P(),
    )
    four = jax.jit(mapped)
    expected = actual = (mlp_parameters(), alone.init(mlp_parameters()))
    for seed in range(10):
        expected, actual = one(*expected, *batch(seed)), four(*actual, *batch(seed))
    chex.assert_trees_all_close(actual[0], expected[0], rtol=1e-3, atol=1e-4)
