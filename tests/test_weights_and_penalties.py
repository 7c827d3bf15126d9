"""Weights and penalties of an objective: by hand, in parts, in groups and over devices."""

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

RHO = 0.3
BATCH = 8
METHODS = {"sam": optax_sam.sam, "jsam": optax_sam.jsam, "lsam": optax_sam.lsam}
every_method = pytest.mark.parametrize("name", METHODS)

cross_entropy = optax.softmax_cross_entropy_with_integer_labels


def penalty(params):
    """Weight decay inside the loss, of visible size."""
    return 0.1 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))


def nothing(params):
    return 0.0 * sum(jnp.sum(leaf) for leaf in jax.tree.leaves(params))


def tokens():
    """Inputs and labels of two tokens per example, and a weight for each."""
    keys = jax.random.split(jax.random.key(5), 3)
    inputs = jax.random.normal(keys[0], (BATCH, 2, 4))
    labels = jax.random.randint(keys[1], (BATCH, 2), 0, 3)
    return inputs, labels, jax.random.uniform(keys[2], (BATCH, 2)).at[3].set(0.0)


def batch(kind="per example"):
    """``(inputs, labels, weights)``; the weights differ between the halves of the batch."""
    if kind == "per token":
        return tokens()
    weights = jnp.array([0.0, 3.0, 1.0, 1.0, 0.5, 0.25, 0.0, 0.25])
    if kind == "per example of tokens":
        return *tokens()[:2], weights
    return *examples(batch_size=BATCH), weights


KINDS = ["per example", "per token", "per example of tokens"]


def add(*trees):
    return jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]), *trees)


def climbed(params, grads, rho=RHO):
    norm = jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(grads)))
    return jax.tree.map(lambda p, g: p + rho * g / norm, params, grads)


@functools.partial(jax.jit, static_argnames=("name", "penalty"))
def by_hand(name, params, inputs, labels, weights, penalty=nothing):
    """One direction of a method, written out with the weights in the sum."""

    def of_logits(logits):
        losses = cross_entropy(logits, labels)
        each = jnp.broadcast_to(
            weights.reshape(*weights.shape, *(1,) * (losses.ndim - weights.ndim)), losses.shape
        )
        return jnp.sum(each * losses) / jnp.sum(each)

    def loss(params):
        return of_logits(apply_mlp(params, inputs)) + penalty(params)

    moved = climbed(params, jax.grad(loss)(params))
    if name == "sam":
        return jax.grad(loss)(moved)
    jacobian_at, term_at = {"jsam": (moved, params), "lsam": (params, moved)}[name]
    _, pull = jax.vjp(lambda p: apply_mlp(p, inputs), jacobian_at)
    (direction,) = pull(jax.grad(of_logits)(apply_mlp(term_at, inputs)))
    return add(direction, jax.grad(penalty)(moved))


def groups_by_hand(name, params, inputs, labels, weights, size, penalty=nothing):
    """Each group's direction counts by its share of the weights; groups without any by nothing."""
    total, directions = jnp.sum(weights), []
    for start in range(0, BATCH, size):
        group = [array[start : start + size] for array in (inputs, labels, weights)]
        if jnp.sum(group[2]) > 0:
            share = jnp.sum(group[2]) / total
            direction = by_hand(name, params, *group, penalty)
            directions.append(jax.tree.map(lambda leaf, share=share: share * leaf, direction))
    return add(*directions)


def direction_of(tx, inputs, labels, weights, **options):
    @jax.jit  # operation by operation, each would be compiled
    def update(params, inputs, labels, weights):
        objective = Objective(apply_mlp, inputs, labels, weights=weights, **options)
        return tx.update(jax.grad(objective)(params), tx.init(params), params, loss_fn=objective)

    return update(mlp_parameters(), inputs, labels, weights)


def assert_close(left, right):
    chex.assert_trees_all_close(left, right, rtol=2e-5, atol=1e-6)


def assert_exact(left, right):
    chex.assert_trees_all_close(left, right, rtol=1e-11, atol=1e-13)


@pytest.mark.usefixtures("x64")
class TestWeights:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("microbatch_size", [None, 2])
    def test_the_loss_is_the_weighted_mean(self, kind, microbatch_size):
        inputs, labels, weights = batch(kind)
        objective = Objective(
            apply_mlp, inputs, labels, weights=weights, microbatch_size=microbatch_size
        )
        losses = np.asarray(cross_entropy(apply_mlp(mlp_parameters(), inputs), labels))
        each = weights if losses.ndim == weights.ndim else np.repeat(weights[:, None], 2, 1)
        expected = np.average(losses, weights=each)
        np.testing.assert_allclose(objective(mlp_parameters()), expected, rtol=1e-12)
        np.testing.assert_allclose(objective.total_weight, np.sum(weights), rtol=1e-12)

    @every_method
    @pytest.mark.parametrize("kind", KINDS)
    def test_every_evaluation(self, name, kind):
        actual, _ = direction_of(METHODS[name](RHO), *batch(kind))
        assert_exact(actual, by_hand(name, mlp_parameters(), *batch(kind)))

    @every_method
    @pytest.mark.parametrize("kind", ["per example", "per token"])
    def test_audit_1_4_token_weights_with_microbatches(self, name, kind):
        """A weighted mean written inside of ``loss`` was one of each microbatch: 25 % off."""
        actual, _ = direction_of(METHODS[name](RHO), *batch(kind), microbatch_size=2)
        assert_exact(actual, by_hand(name, mlp_parameters(), *batch(kind)))

    @every_method
    @pytest.mark.parametrize("size", [1, 2])
    @pytest.mark.parametrize("kind", ["per example", "per token"])
    def test_audit_1_4_token_weights_with_groups(self, name, size, kind):
        """A group counts by its share of the weights, not as one of B/m groups."""
        actual, _ = direction_of(METHODS[name](RHO, group_size=size), *batch(kind))
        assert_exact(actual, groups_by_hand(name, mlp_parameters(), *batch(kind), size))

    def test_groups_differentiated_by_themselves(self):
        """The path of every other perturbation."""
        tx = optax_sam.sharpness_aware(
            optax.chain(optax.trace(0.5), optax_sam.normalized(RHO)), group_size=2
        )
        with pytest.warns(UserWarning, match="group_size=2 differentiates every group by itself"):
            actual, state = direction_of(tx, *batch("per token"))
        assert_exact(actual, groups_by_hand("sam", mlp_parameters(), *batch("per token"), 2))
        # The state kept of the groups is their weighted mean: the gradient of the batch.
        objective = Objective(apply_mlp, *tokens()[:2], weights=tokens()[2])
        assert_exact(state.perturbation[0].trace, jax.grad(objective)(mlp_parameters()))

    @pytest.mark.parametrize("size", [1, 2, None])
    def test_metrics_of_groups_are_weighted(self, size):
        inputs, labels, weights = batch()
        if size is None:
            _, state = direction_of(optax_sam.sam(RHO), inputs, labels, weights)
            groups = [slice(None)]
        else:
            _, state = direction_of(optax_sam.sam(RHO, group_size=size), inputs, labels, weights)
            groups = [slice(start, start + size) for start in range(0, BATCH, size)]
        losses, shares, params = [], [], mlp_parameters()
        for group in groups:
            shares.append(float(weights[group].sum() / weights.sum()))
            if shares[-1]:
                part = Objective(apply_mlp, inputs[group], labels[group], weights=weights[group])
                losses.append(float(part(climbed(params, jax.grad(part)(params)))))
            else:
                losses.append(0.0)
        metrics = optax_sam.get_metrics(state)
        np.testing.assert_allclose(metrics["perturbed_loss"], np.dot(losses, shares), rtol=1e-9)
        np.testing.assert_allclose(metrics["perturbation_norm"], RHO, rtol=1e-9)

    @pytest.mark.parametrize(
        "options",
        [{}, {"microbatch_size": 2}, {"group_size": 1}, {"group_size": 2}],
        ids=["batch", "microbatches", "one by one", "groups"],
    )
    @every_method
    def test_weights_that_are_all_zero_give_zero(self, name, options):
        """A batch of padding: nothing to learn, and no NaN."""
        options = dict(options)
        tx = METHODS[name](RHO, group_size=options.pop("group_size", None))
        inputs, labels, weights = batch()
        direction, state = direction_of(tx, inputs, labels, jnp.zeros_like(weights), **options)
        assert all((leaf == 0).all() for leaf in jax.tree.leaves(direction))
        assert all(float(value) == 0 for value in optax_sam.get_metrics(state).values())

    @pytest.mark.parametrize("size", [None, 2])
    def test_labels_of_examples_without_weight_may_be_anything(self, size):
        """As 255 in segmentation, for which the loss itself is NaN."""
        inputs, labels, weights = batch()
        tx = optax_sam.jsam(RHO, group_size=size)
        expected = direction_of(tx, inputs, labels, weights)
        found = direction_of(tx, inputs, jnp.where(weights == 0, 255, labels), weights)
        chex.assert_trees_all_equal(found, expected)

    def test_integer_and_bool_weights_are_numbers(self):
        inputs, labels, _ = batch()
        mask = np.arange(BATCH) % 3 == 0
        actual, _ = direction_of(optax_sam.sam(RHO), inputs, labels, jnp.asarray(mask))
        assert_exact(
            actual, by_hand("sam", mlp_parameters(), inputs[mask], labels[mask], jnp.ones(3))
        )

    def test_weights_count_relative_to_each_other(self):
        inputs, labels, weights = batch()
        actual, _ = direction_of(optax_sam.jsam(RHO), inputs, labels, 1000 * weights)
        assert_exact(actual, by_hand("jsam", mlp_parameters(), inputs, labels, weights))

    def test_subsets_take_their_weights_along(self):
        inputs, labels, weights = batch()
        part = Objective(apply_mlp, inputs, labels, weights=weights).subset(slice(1, 4))
        losses = cross_entropy(apply_mlp(mlp_parameters(), inputs[1:4]), labels[1:4])
        expected = np.average(losses, weights=weights[1:4])
        np.testing.assert_allclose(part(mlp_parameters()), expected, rtol=1e-12)

    def test_wrong_weights(self):
        inputs, labels, weights = batch()
        make = functools.partial(Objective, apply_mlp, inputs, labels)
        with pytest.raises(ValueError, match=r"one common leading batch axis.*'weights': \(7,\)"):
            make(weights=weights[1:])
        with pytest.raises(TypeError, match=r"weights must be an array of numbers.*got \[1\.0"):
            make(weights=[1.0] * BATCH)
        with pytest.raises(
            ValueError, match=r"weights must have shape \(8,\) like the losses.*got \(8, 1\)"
        ):
            make(weights=weights[:, None])(mlp_parameters())


@pytest.mark.usefixtures("x64")
class TestPenalty:
    def test_the_loss_and_its_gradient(self):
        inputs, labels, weights = batch()
        objective = Objective(apply_mlp, inputs, labels, weights=weights, penalty=penalty)
        plain, params = objective.replace(penalty=None), mlp_parameters()
        np.testing.assert_allclose(objective(params), plain(params) + penalty(params), rtol=1e-12)
        cut = jax.value_and_grad(objective.replace(microbatch_size=2))(params)
        assert_exact(cut, jax.value_and_grad(objective)(params))

    @every_method
    @pytest.mark.parametrize("microbatch_size", [None, 2])
    def test_audit_1_5_a_penalty_is_perturbed_once(self, name, microbatch_size):
        """Following the error message to make an ``Objective`` dropped it: 5 % of g'."""
        actual, state = direction_of(
            METHODS[name](RHO), *batch(), penalty=penalty, microbatch_size=microbatch_size
        )
        assert_exact(actual, by_hand(name, mlp_parameters(), *batch(), penalty))
        inputs, labels, weights = batch()
        objective = Objective(apply_mlp, inputs, labels, weights=weights, penalty=penalty)
        moved = climbed(mlp_parameters(), jax.grad(objective)(mlp_parameters()))
        loss = optax_sam.get_metrics(state)["perturbed_loss"]
        np.testing.assert_allclose(loss, objective(moved), rtol=1e-11)

    @every_method
    def test_audit_1_5_each_group_perturbs_the_penalty(self, name):
        tx = METHODS[name](RHO, group_size=2)
        inputs, labels, weights = batch()
        weights = weights + 0.5  # a group without weights climbs along its penalty
        with pytest.warns(UserWarning, match=r"group_size=2 .*the objective has a penalty"):
            actual, _ = direction_of(tx, inputs, labels, weights, penalty=penalty)
        expected = groups_by_hand(name, mlp_parameters(), inputs, labels, weights, 2, penalty)
        assert_exact(actual, expected)

    def test_zero_weights_leave_the_penalty(self):
        inputs, labels, weights = batch()
        actual, _ = direction_of(
            optax_sam.sam(RHO), inputs, labels, 0 * weights, penalty=penalty, microbatch_size=2
        )
        params = mlp_parameters()
        assert_exact(actual, jax.grad(penalty)(climbed(params, jax.grad(penalty)(params))))

    def test_a_mask_holds_for_the_penalty(self):
        """Masked leaves do not climb along the penalty either, also in later steps of the climb."""
        mask = {"first": True, "bias": False, "second": False}
        inputs, labels, weights = batch()
        tx = optax_sam.sam(RHO, mask=mask, ascent_steps=2)
        actual, _ = direction_of(tx, inputs, labels, weights, penalty=penalty)
        objective = Objective(apply_mlp, inputs, labels, weights=weights, penalty=penalty)
        moved = mlp_parameters()
        for _ in range(2):
            grads = jax.grad(objective)(moved)
            kept = {k: g if mask[k] else jnp.zeros_like(g) for k, g in grads.items()}
            moved = climbed(moved, kept, RHO / 2)
        assert_exact(actual, jax.grad(objective)(moved))

    @pytest.mark.parametrize(
        "wrong",
        [lambda p: p["bias"], lambda p: jnp.array(1), lambda p: 3],
        ids=["vector", "integer", "python"],
    )
    def test_a_penalty_is_a_scalar(self, wrong):
        objective = Objective(apply_mlp, *examples(), penalty=wrong)
        with pytest.raises(TypeError, match=r"penalty must return a scalar, got (float|int)"):
            objective(mlp_parameters())

    def test_a_penalty_is_a_function(self):
        with pytest.raises(TypeError, match=r"penalty must be callable, got 0\.1"):
            Objective(apply_mlp, *examples(), penalty=0.1)

    def test_per_example_gradient_refuses_a_penalty(self):
        objective = Objective(apply_mlp, *examples(), penalty=penalty)
        with pytest.raises(ValueError, match=r"takes no penalty.*group_size="):
            optax_sam.per_example.per_example_gradient(objective, mlp_parameters(), RHO)


@pytest.mark.usefixtures("strict_promotion")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sam", {}),
        ("lsam", {"microbatch_size": 2}),
        ("jsam", {"microbatch_size": 2}),
        ("sam", {"group_size": 1}),
        ("jsam", {"group_size": 1}),
        ("jsam", {"loss_scale": 2.0**8}),
    ],
    ids=str,
)
def test_half_precision_mixes_no_dtypes_by_itself(name, options):
    """Under strict promotion JAX refuses to; the weights are of another dtype than the network."""
    inputs, labels, weights = batch()
    options = dict(options)
    tx = METHODS[name](RHO, group_size=options.pop("group_size", None))
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), mlp_parameters())
    half = Objective(apply_mlp, inputs.astype(jnp.bfloat16), labels, weights=weights, **options)
    update = jax.jit(lambda p: tx.update(jax.grad(half)(p), tx.init(p), p, loss_fn=half))
    actual, _ = update(params)
    chex.assert_trees_all_equal_dtypes(actual, params)
    expected, _ = direction_of(METHODS[name](RHO), inputs, labels, weights)
    size = float(optax.tree.norm(expected))
    assert 0.5 * size < float(optax.tree.norm(actual)) < 2 * size


DEVICES = 4


def on_devices(function, how):
    """``function(inputs, labels, weights)`` on a quarter of the batch each; replicated results."""
    if how == "pmap":
        parts = [x.reshape(DEVICES, -1, *x.shape[1:]) for x in batch()]
        results = jax.pmap(function, axis_name="data", devices=jax.devices()[:DEVICES])(*parts)
        for device in range(1, DEVICES):
            chex.assert_trees_all_equal(
                jax.tree.map(lambda x: x[0], results),
                jax.tree.map(lambda x, device=device: x[device], results),
            )
        return jax.tree.map(lambda x: x[0], results)
    mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(P("data"),) * 3,
        out_specs=P(),
        check_vma=how == "shard_map",
    )
    return jax.jit(mapped)(*batch())


def average(objective, grads):
    """What a training step with weights does to its gradients before ``update``."""
    weight = objective.total_weight
    total = jax.lax.psum(weight, "data")
    return jax.tree.map(lambda g: jax.lax.psum(weight * g, "data") / total, grads)


class TestDevices:
    """The devices hold 3.0, 2.0, 0.75 and 0.25 of the weights."""

    @pytest.mark.parametrize("options", [{}, {"microbatch_size": 2}, {"group_size": 2}], ids=str)
    def test_a_sharded_batch_under_jit(self, options):
        mesh = jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))
        options = dict(options)
        tx = optax_sam.jsam(RHO, group_size=options.pop("group_size", None))
        step = jax.jit(lambda *arrays: direction_of(tx, *arrays, **options))
        sharded = jax.device_put(batch(), NamedSharding(mesh, P("data")))
        assert_close(step(*sharded), step(*batch()))

    @pytest.mark.parametrize("how", ["shard_map", "shard_map unchecked", "pmap"])
    def test_unequal_weights_per_device(self, how):
        """Local gradients: each device's direction counts by its weights, as a group's does."""
        txs = {
            "sam": optax_sam.sam(RHO, axis_name="data"),
            "jsam": optax_sam.jsam(RHO, axis_name="data"),
            "saner": optax_sam.saner(RHO, axis_name="data"),
            "vasso": optax_sam.vasso(RHO, axis_name="data"),
        }

        def local(inputs, labels, weights):
            params = mlp_parameters()
            objective = Objective(apply_mlp, inputs, labels, weights=weights)
            grads = jax.grad(objective)(_axes.to_varying(params, "data"))
            averaged = average(objective, grads)
            own = {
                name: tx.update(grads, tx.init(params), params, loss_fn=objective)
                for name, tx in txs.items()
            }
            tx = txs["sam"]
            own["averaged"] = tx.update(averaged, tx.init(params), params, loss_fn=objective)
            return own

        actual, params = on_devices(local, how), mlp_parameters()
        for name in ("sam", "jsam"):
            assert_close(actual[name][0], groups_by_hand(name, params, *batch(), 2))
        inputs, labels, weights = batch()
        clean = jax.grad(Objective(apply_mlp, inputs, labels, weights=weights))(params)
        combination = optax_sam.down_weight(0.5)
        expected, _ = combination.update(
            groups_by_hand("sam", params, *batch(), 2), combination.init(params), clean_grads=clean
        )
        assert_close(actual["saner"][0], expected)
        assert_close(actual["vasso"][1].perturbation[0].average, clean)
        assert_close(actual["averaged"][0], by_hand("sam", params, *batch()))
        metrics = optax_sam.get_metrics(actual["averaged"][1])
        objective = Objective(apply_mlp, inputs, labels, weights=weights)
        np.testing.assert_allclose(
            metrics["perturbed_loss"], objective(climbed(params, clean)), rtol=1e-5
        )

    @pytest.mark.parametrize("how", ["shard_map", "pmap"])
    def test_steps_between_average_by_weight(self, how):
        tx = optax_sam.sam(RHO, start_step=5, axis_name="data")

        def local(inputs, labels, weights):
            params = mlp_parameters()
            objective = Objective(apply_mlp, inputs, labels, weights=weights)
            grads = jax.grad(objective)(_axes.to_varying(params, "data"))
            return tx.update(grads, tx.init(params), params, loss_fn=objective)[0]

        inputs, labels, weights = batch()
        clean = jax.grad(Objective(apply_mlp, inputs, labels, weights=weights))(mlp_parameters())
        assert_close(on_devices(local, how), clean)
