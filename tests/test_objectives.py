"""Objective: the mean loss and its parts, and its life as a pytree."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_sam
from optax_sam import Objective
from tests.problems import apply_mlp, examples, mlp_parameters

pytestmark = pytest.mark.usefixtures("strict_promotion")

cross_entropy = optax.softmax_cross_entropy_with_integer_labels


def mlp_objective(seed=0, **options):
    return Objective(apply_mlp, *examples(seed), **options)


def manual_loss(params, inputs, labels):
    log_probabilities = np.asarray(jax.nn.log_softmax(apply_mlp(params, inputs)))
    return -np.mean([log_probabilities[i, label] for i, label in enumerate(np.asarray(labels))])


def test_the_mean_loss_equals_the_manual_one():
    params, (inputs, labels) = mlp_parameters(), examples()
    np.testing.assert_allclose(
        mlp_objective()(params), manual_loss(params, inputs, labels), rtol=1e-6
    )
    assert mlp_objective().batch_size == 8


def test_the_parts_of_the_loss():
    params, (inputs, labels) = mlp_parameters(), examples()
    objective = mlp_objective()
    logits = objective.logits(params)
    np.testing.assert_array_equal(logits, apply_mlp(params, inputs))
    np.testing.assert_allclose(objective.losses_from_logits(logits), cross_entropy(logits, labels))
    np.testing.assert_allclose(objective.loss_from_logits(logits), objective(params), rtol=1e-6)
    expected = (jax.nn.softmax(logits) - jax.nn.one_hot(labels, 3)) / 8
    np.testing.assert_allclose(objective.logit_gradient(logits), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "indices",
    [slice(2, 6), np.array([5, 0, 0]), jnp.array([7]), np.arange(8) % 2 == 0],
    ids=["slice", "repeated", "one", "mask"],
)
def test_subset(indices):
    params, (inputs, labels) = mlp_parameters(), examples()
    subset = mlp_objective().subset(indices)
    assert subset.batch_size == labels[indices].size
    np.testing.assert_allclose(
        subset(params), manual_loss(params, inputs[indices], labels[indices]), rtol=1e-6
    )


def test_with_labels_and_replace_change_one_thing():
    objective = mlp_objective()
    other = (objective.labels + 1) % 3
    changed = objective.with_labels(other)
    assert changed.labels is other
    assert changed.inputs is objective.inputs
    assert changed.apply_fn is objective.apply_fn
    assert objective.labels is not other
    assert objective.replace(loss=optax.squared_error).loss is optax.squared_error
    assert objective.replace(has_aux=True).has_aux
    sharded = objective.replace(spmd_axis_name="data")
    assert sharded.with_labels(other).spmd_axis_name == "data"
    assert jax.tree.map(lambda leaf: leaf, sharded).spmd_axis_name == "data"


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_groups_give_each_groups_loss(size):
    params, objective = mlp_parameters(), mlp_objective()
    losses = jax.vmap(lambda group: group(params))(objective.groups(size))
    expected = [objective.subset(slice(i, i + size))(params) for i in range(0, 8, size)]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    np.testing.assert_allclose(losses.mean(), objective(params), rtol=1e-5)
    mapped = jax.lax.map(lambda group: group(params), objective.groups(size))
    np.testing.assert_allclose(mapped, losses, rtol=1e-5)


def test_a_mapped_group_knows_its_size():
    sizes = []

    def loss(group):
        sizes.append(group.batch_size)
        return group(mlp_parameters())

    jax.vmap(loss)(mlp_objective().groups(2))
    assert sizes == [2]


def test_groups_refuse_a_size_that_does_not_divide():
    with pytest.raises(ValueError, match=r"group_size=3 must divide the batch of 8.*such as 2"):
        mlp_objective().groups(3)
    with pytest.raises(ValueError, match="group_size must be at least 1, got 0"):
        mlp_objective().groups(0)
    with pytest.raises(TypeError, match=r"group_size must be an integer, got 2\.0"):
        mlp_objective().groups(2.0)


def test_auxiliary_output():
    params, (inputs, labels) = mlp_parameters(), examples()

    def with_aux(params, inputs):
        return apply_mlp(params, inputs), {"size": jnp.asarray(inputs.shape[0])}

    objective = Objective(with_aux, inputs, labels, has_aux=True)
    loss, aux = objective(params)
    np.testing.assert_allclose(loss, mlp_objective()(params))
    assert int(aux["size"]) == 8
    assert objective.logits(params).shape == (8, 3)
    assert objective.logits_and_aux(params)[1] == aux
    assert mlp_objective().logits_and_aux(params)[1] is None
    grads, aux = jax.grad(objective, has_aux=True)(params)
    assert int(aux["size"]) == 8
    chex.assert_trees_all_close(grads, jax.grad(mlp_objective())(params))
    assert int(objective.subset(slice(0, 2))(params)[1]["size"]) == 2


def test_pytrees_as_inputs_and_labels():
    def apply_fn(params, inputs):
        return params * (inputs["left"] - inputs["right"])

    def loss(logits, labels):
        return (logits - labels[0]) ** 2 * labels[1]

    inputs = {"left": jnp.array([1.0, 2.0]), "right": jnp.array([0.5, 1.0])}
    labels = (jnp.array([0.0, 1.0]), jnp.array([1.0, 3.0]))
    objective = Objective(apply_fn, inputs, labels, loss)
    np.testing.assert_allclose(objective(jnp.array(2.0)), (1.0 * 1 + 1.0 * 3) / 2)
    np.testing.assert_allclose(objective.subset(slice(1, 2))(jnp.array(2.0)), 3.0)
    np.testing.assert_allclose(
        jax.vmap(lambda group: group(jnp.array(2.0)))(objective.groups(1)), [1.0, 3.0]
    )


def test_no_labels_at_all():
    """An autoencoder has none; the batch axis is then that of the inputs."""
    objective = Objective(lambda w, x: w * x, jnp.ones((4, 2)), None, lambda z, _: z.sum(-1))
    assert objective.batch_size == 4
    assert float(objective(jnp.array(3.0))) == 6.0


def test_token_losses_are_averaged_over_every_axis():
    """Losses of shape (B, T): one value per token."""
    inputs, labels = jnp.arange(24.0).reshape(2, 3, 4) / 24, jnp.array([[0, 1, 2], [2, 1, 0]])
    params = mlp_parameters()
    objective = Objective(apply_mlp, inputs, labels)
    losses = cross_entropy(apply_mlp(params, inputs), labels)
    assert losses.shape == objective.losses_from_logits(objective.logits(params)).shape == (2, 3)
    np.testing.assert_allclose(objective(params), losses.mean(), rtol=1e-6)
    np.testing.assert_allclose(
        jax.vmap(lambda group: group(params))(objective.groups(1)), losses.mean(1), rtol=1e-6
    )


def test_pytree_round_trip():
    objective = mlp_objective()
    leaves, treedef = jax.tree.flatten(objective)
    assert len(leaves) == 2  # inputs and labels; the callables are static
    rebuilt = jax.tree.unflatten(treedef, leaves)
    assert rebuilt.apply_fn is apply_mlp
    assert rebuilt.loss is objective.loss
    assert rebuilt.has_aux is objective.has_aux
    assert jax.tree.structure(mlp_objective(1)) == treedef
    assert jax.tree.structure(mlp_objective(has_aux=True)) != treedef
    np.testing.assert_array_equal(rebuilt(mlp_parameters()), objective(mlp_parameters()))


def test_tree_map_and_placeholders():
    """JAX rebuilds trees with placeholders as leaves, so rebuilding checks nothing."""
    objective = mlp_objective()
    doubled = jax.tree.map(lambda leaf: leaf + leaf, objective)
    np.testing.assert_array_equal(doubled.inputs, 2 * objective.inputs)
    jax.tree.map(lambda leaf: None, objective)
    jax.tree.unflatten(jax.tree.structure(objective), [object(), object()])
    shapes = jax.eval_shape(lambda objective: objective, objective)
    assert shapes.inputs.shape == (8, 4)


def test_a_partial_keeps_its_arrays_as_leaves():
    scaled = jax.tree_util.Partial(lambda scale, params, x: scale * apply_mlp(params, x), 2.0)
    objective = Objective(scaled, *examples())
    assert len(jax.tree.leaves(objective)) == 3
    loss = jax.tree_util.Partial(lambda factor, z, y: factor * cross_entropy(z, y), 3.0)
    objective = Objective(scaled, *examples(), loss)
    assert len(jax.tree.leaves(objective)) == 4
    rebuilt = jax.tree.unflatten(*reversed(jax.tree.flatten(objective)))
    np.testing.assert_array_equal(rebuilt(mlp_parameters()), objective(mlp_parameters()))


class Network:
    """Like a module: its bound method is made anew at every access, and compares equal."""

    def apply(self, params, inputs):
        return apply_mlp(params, inputs)


def count_traces(make_objective):
    """How often a jitted loss traces over three batches."""
    traces = 0

    @jax.jit
    def loss(params, objective):
        nonlocal traces
        traces += 1
        return objective(params)

    values = [loss(mlp_parameters(), make_objective(*examples(seed))) for seed in range(3)]
    assert len({float(value) for value in values}) == 3  # each batch's own loss
    return traces


def test_new_batches_cross_jit_without_a_retrace():
    network = Network()
    assert network.apply is not network.apply
    assert count_traces(lambda x, y: Objective(network.apply, x, y)) == 1
    assert count_traces(lambda x, y: Objective(apply_mlp, x, y)) == 1

    def scaled(scale, params, inputs):
        return scale * apply_mlp(params, inputs)

    scales = iter([1.0, 2.0, 3.0])
    assert (
        count_traces(
            lambda x, y: Objective(jax.tree_util.Partial(scaled, jnp.array(next(scales))), x, y)
        )
        == 1
    )


def test_a_new_lambda_per_step_retraces_as_documented():
    assert count_traces(lambda x, y: Objective(lambda w, inputs: apply_mlp(w, inputs), x, y)) == 3


def test_gradients_through_jit():
    objective, params = mlp_objective(), mlp_parameters()
    grads = jax.jit(lambda params, objective: jax.grad(objective)(params))(params, objective)
    expected = jax.grad(lambda p: cross_entropy(apply_mlp(p, examples()[0]), examples()[1]).mean())
    chex.assert_trees_all_close(grads, expected(params), rtol=1e-5, atol=1e-7)


def test_repr_names_what_matters():
    text = repr(mlp_objective())
    assert "apply_mlp" in text
    assert "batch_size=8" in text
    assert "softmax_cross_entropy_with_integer_labels" in text


def test_arguments_that_are_not_callable():
    with pytest.raises(TypeError, match=r"apply_fn must be callable, got 3\..*model\.apply"):
        Objective(3, *examples())
    with pytest.raises(TypeError, match="loss must be callable, got 'mse'"):
        Objective(apply_mlp, *examples(), "mse")


def test_batch_axes_that_disagree():
    with pytest.raises(ValueError, match=r"common leading batch axis.*\(8, 4\).*\(7,\)"):
        Objective(apply_mlp, jnp.ones((8, 4)), jnp.zeros(7, jnp.int32))
    with pytest.raises(ValueError, match="common leading batch axis"):
        Objective(apply_mlp, jnp.array(1.0), jnp.array(0))
    with pytest.raises(ValueError, match="common leading batch axis"):
        Objective(apply_mlp, None, None)


def test_a_loss_that_is_averaged_already():
    objective = mlp_objective(loss=lambda z, y: cross_entropy(z, y).mean())
    with pytest.raises(
        ValueError, match=r"one value per example, shape \(8, \.\.\.\), got shape \(\)"
    ):
        objective(mlp_parameters())


def test_auxiliary_output_that_is_not_announced():
    def with_aux(params, inputs):
        return apply_mlp(params, inputs), {}

    with pytest.raises(ValueError, match=r"returned a tuple of 2.*pass has_aux=True"):
        Objective(with_aux, *examples())(mlp_parameters())
    with pytest.raises(ValueError, match=r"with has_aux=True apply_fn must return \(logits, aux\)"):
        mlp_objective(has_aux=True)(mlp_parameters())


@pytest.mark.parametrize("method", [optax_sam.jsam, optax_sam.lsam])
def test_methods_that_need_an_objective_say_so(method):
    tx, params = method(), mlp_parameters()
    with pytest.raises(TypeError, match=r"needs to look inside the loss.*optax_sam\.Objective\("):
        tx.update(params, tx.init(params), params, loss_fn=lambda p: jnp.zeros([]))
