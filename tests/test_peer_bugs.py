"""An acceptance suite of bugs seen in other implementations: each test shows this library free of one.

The numbers order the list; every docstring names where the bug was seen. Only this library is
asserted on, so that a fix elsewhere breaks nothing here.
"""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import optax_sam
from optax_sam import Objective
from tests.problems import apply_mlp, examples, mlp_parameters

METHODS = {
    "sam": optax_sam.sam,
    "asam": optax_sam.asam,
    "saner": optax_sam.saner,
    "jsam": optax_sam.jsam,
    "lsam": optax_sam.lsam,
}
every_method = pytest.mark.parametrize("make", METHODS.values(), ids=METHODS.keys())


def mlp_objective(seed=0, **options):
    return Objective(apply_mlp, *examples(seed), **options)


def step(tx, params, state, objective):
    """One complete training step."""
    grads = jax.grad(objective)(params)
    updates, state = tx.update(grads, state, params, loss_fn=objective)
    return optax.apply_updates(params, updates), state


def by_hand(params, objective, rho=0.05):
    """SAM's gradient, written out."""
    grads = jax.grad(objective)(params)
    norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads)))
    return jax.grad(objective)(jax.tree.map(lambda p, g: p + rho * g / norm, params, grads))


def assert_close(left, right):
    chex.assert_trees_all_close(left, right, rtol=2e-5, atol=1e-6)


@every_method
def test_01_a_zero_gradient_gives_no_nan(make):
    """Permanent NaN in optax.contrib.sam (both modes), google-research/sam and big_vision's GSAM."""
    tx = optax.chain(make(0.05), optax.sgd(0.1, momentum=0.9))
    params = jax.tree.map(jnp.zeros_like, mlp_parameters())
    objective = mlp_objective(loss=lambda z, y: jnp.sum(z**2, -1))  # its minimum is at zero
    state = tx.init(params)
    params, state = step(tx, params, state, objective)
    chex.assert_tree_all_finite((params, state))
    params, state = step(tx, mlp_parameters(), state, mlp_objective())  # and it recovers
    chex.assert_tree_all_finite((params, state))
    assert float(optax_sam.get_metrics(state)["perturbation_norm"]) > 0


@every_method
def test_02_a_schedule_of_rho_advances(make):
    """Frozen at step 0 in optax.contrib.sam, whose default resets the adversary's state."""
    tx = make(lambda count: jnp.array([0.1, 0.2, 0.4])[count])
    params, objective = mlp_parameters(), mlp_objective()
    state, norms = tx.init(params), []
    for _ in range(3):
        _, state = tx.update(jax.grad(objective)(params), state, params, loss_fn=objective)
        norms.append(float(optax_sam.get_metrics(state)["perturbation_norm"]))
    np.testing.assert_allclose(np.divide(norms, norms[0]), [1, 2, 4], rtol=1e-4)


def test_03_clipping_and_weight_decay_act_where_they_stand():
    """Silently lost in front of optax.contrib.sam, and breaking its restore behind it."""
    params, objective = mlp_parameters(), mlp_objective()
    decay = optax.add_decayed_weights(0.5)
    grads = jax.grad(objective)(params)

    behind = optax.chain(optax_sam.sam(0.05), optax.clip_by_global_norm(0.01), decay)
    updates, _ = behind.update(grads, behind.init(params), params, loss_fn=objective)
    sharp = by_hand(params, objective)
    norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(sharp)))
    expected = jax.tree.map(lambda g, p: 0.01 * g / norm + 0.5 * p, sharp, params)
    assert_close(updates, expected)

    front = optax.chain(decay, optax_sam.sam(0.05))
    updates, _ = front.update(grads, front.init(params), params, loss_fn=objective)
    ascent = jax.tree.map(lambda g, p: g + 0.5 * p, grads, params)
    length = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(ascent)))
    moved = jax.tree.map(lambda p, g: p + 0.05 * g / length, params, ascent)
    assert_close(updates, jax.grad(objective)(moved))


@every_method
def test_04_both_passes_accumulate(make):
    """Under MultiSteps optax.contrib.sam takes the second gradient on the last microbatch only."""
    params, objective = mlp_parameters(), mlp_objective()
    tx, cut = make(0.05), objective.replace(microbatch_size=2)
    loss, grads = jax.value_and_grad(cut)(params)
    actual, state = tx.update(grads, tx.init(params), params, loss_fn=cut)
    np.testing.assert_allclose(loss, objective(params), rtol=1e-6)
    expected, expected_state = tx.update(
        jax.grad(objective)(params), tx.init(params), params, loss_fn=objective
    )
    assert_close(actual, expected)
    assert_close(optax_sam.get_metrics(state), optax_sam.get_metrics(expected_state))


@pytest.mark.parametrize("check_vma", [True, False])
def test_05_the_update_does_not_grow_with_the_number_of_devices(check_vma):
    """With check_vma the update of optax.contrib.sam is exactly n_devices times too large."""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    tx, params = optax_sam.sam(0.05, axis_name="data"), mlp_parameters()
    global_grads = jax.grad(mlp_objective())(params)

    def on_shard(inputs, labels):
        objective = Objective(apply_mlp, inputs, labels)
        return tx.update(global_grads, tx.init(params), params, loss_fn=objective)[0]

    mapped = jax.shard_map(
        on_shard,
        mesh=mesh,
        in_specs=(P("data"), P("data")),
        out_specs=P(),
        check_vma=check_vma,
    )
    assert_close(jax.jit(mapped)(*examples()), by_hand(params, mlp_objective()))


@every_method
@pytest.mark.parametrize(
    "behind",
    [
        lambda: optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau()),
        lambda: optax.polyak_sgd(0.1),
        lambda: optax.contrib.momo(0.1),
    ],
    ids=["reduce_on_plateau", "polyak", "momo"],
)
def test_06_extra_arguments_of_others_pass_through(make, behind):
    """Unexpected keywords raise in optax.contrib.sam."""
    tx = optax.chain(make(0.05), behind())
    params, objective = mlp_parameters(), mlp_objective()
    value, grads = jax.value_and_grad(objective)(params)
    updates, _ = tx.update(
        grads, tx.init(params), params, loss_fn=objective, value=value, unknown="ignored"
    )
    assert any(leaf.any() for leaf in jax.tree.leaves(updates))


@every_method
def test_07_every_step_is_whole(make):
    """optax.contrib.sam in transparent mode: donation fails, a checkpoint or an evaluation between
    the two calls of a step sees perturbed weights, and a PRNG key in the state breaks."""
    tx = optax.chain(make(0.05), with_key(), optax.sgd(0.1, momentum=0.9))
    donating = jax.jit(
        lambda params, state, x, y: step(tx, params, state, Objective(apply_mlp, x, y)),
        donate_argnums=(0, 1),
    )
    params, state = mlp_parameters(), tx.init(mlp_parameters())
    for seed in range(4):
        params, state = donating(params, state, *examples(seed))
        if seed == 1:
            checkpoint = jax.tree.map(jnp.copy, (params, state))
    for seed in (2, 3):
        checkpoint = donating(*checkpoint, *examples(seed))
    chex.assert_trees_all_equal(checkpoint[0], params)


def with_key():
    """A transformation with a typed PRNG key in its state."""

    def update(updates, key, params=None):
        del params
        key, used = jax.random.split(key)
        noise = 1e-3 * jax.random.normal(used)
        return jax.tree.map(lambda u: u + noise, updates), key

    return optax.GradientTransformation(lambda params: jax.random.key(0), update)


@pytest.mark.parametrize("size", [1e4, 1e-7])
def test_08_half_precision_norms(size):
    """The norm overflows in optax.contrib.sam, so that epsilon is zero even at rho = 10; the 1e-12 of
    the PyTorch codes vanishes in float16."""
    params = {"w": jnp.ones(4096, jnp.float16)}
    grads = {"w": jnp.full(4096, size, jnp.float16)}
    tx = optax_sam.sam(10.0)

    def loss_fn(p):
        return jnp.sum(p["w"].astype(jnp.float32) ** 2)

    updates, state = tx.update(grads, tx.init(params), params, loss_fn=loss_fn)
    np.testing.assert_allclose(optax_sam.get_metrics(state)["perturbation_norm"], 10, rtol=1e-3)
    np.testing.assert_allclose(updates["w"], 2 * (1 + 10 / 64), rtol=2e-3)


@every_method
def test_09_frozen_leaves_stay(make):
    """optax.masked inside optax.contrib.sam moves frozen leaves by -g/|g|, and MaskedNode reaches the
    loss."""
    frozen = {"first": False, "bias": False, "second": True}
    seen = []

    def apply_fn(params, inputs):
        seen.append(jax.tree.structure(params))
        return apply_mlp(params, inputs)

    tx = optax.chain(
        make(5.0, mask=frozen),
        optax.sgd(0.1),
        optax.masked(optax.set_to_zero(), jax.tree.map(lambda keep: not keep, frozen)),
    )
    params = mlp_parameters()
    after, _ = step(tx, params, tx.init(params), Objective(apply_fn, *examples()))
    chex.assert_trees_all_equal(after["first"], params["first"])
    chex.assert_trees_all_equal(after["bias"], params["bias"])
    assert (after["second"] != params["second"]).any()
    assert set(seen) == {jax.tree.structure(params)}


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize("behind", [optax.sgd(0.1), optax.adam(1.0)], ids=["sgd", "adam"])
def test_10_rho_is_the_length_of_the_perturbation(scale, behind):
    """With optax.contrib.sam rho hides in an adversarial optimizer: sgd(rho) without normalization
    or adam(rho) are easily passed and mean something else."""
    tx = optax.chain(optax_sam.sam(0.3), behind)
    params = mlp_parameters()
    objective = mlp_objective(
        loss=lambda z, y: scale * optax.softmax_cross_entropy_with_integer_labels(z, y)
    )
    _, state = step(tx, params, tx.init(params), objective)
    np.testing.assert_allclose(optax_sam.get_metrics(state)["perturbation_norm"], 0.3, rtol=1e-5)


@pytest.mark.parametrize("make", [optax_sam.sam, optax_sam.asam, optax_sam.saner])
def test_11_value_and_grad_in_place_of_the_loss_is_refused(make):
    """Several codes accept it silently and differentiate something else."""
    tx, params = make(0.05), mlp_parameters()
    grads = jax.grad(mlp_objective())(params)
    with pytest.raises(TypeError, match=r"Pass the loss itself, not jax\.value_and_grad\(loss\)"):
        tx.update(grads, tx.init(params), params, loss_fn=jax.value_and_grad(mlp_objective()))


@every_method
def test_12_the_reported_loss_is_the_clean_one(make):
    """google-research/sam logs loss and accuracy of the perturbed logits as those of training."""
    params, objective, tx = mlp_parameters(), mlp_objective(), make(0.5)
    loss, grads = jax.value_and_grad(objective)(params)
    _, state = tx.update(grads, tx.init(params), params, loss_fn=objective)
    perturbed_loss = optax_sam.get_metrics(state)["perturbed_loss"]
    np.testing.assert_allclose(loss, objective(params), rtol=1e-6)
    assert float(perturbed_loss) > float(loss) + 1e-3  # apart, and by its own name


# 14, a resumed run that differs: tests/examples/image_classification/test_image_runs.py resumes one.


# 15, weights left perturbed, or drifting by restoring with a subtraction, in several PyTorch codes:
# tests/test_contracts.py, test_zero_learning_rate_keeps_the_parameters_bit_identical.


class Network(nn.Module):
    """A network with batch statistics and dropout."""

    @nn.compact
    def __call__(self, inputs):
        hidden = nn.BatchNorm(use_running_average=False, momentum=0.5)(nn.Dense(16)(inputs))
        hidden = nn.Dropout(0.5, deterministic=False)(nn.tanh(hidden))
        return nn.Dense(3)(hidden)


@pytest.mark.parametrize("make", [optax_sam.sam, optax_sam.jsam], ids=["sam", "jsam"])
def test_17_batch_statistics_and_dropout_masks_are_those_of_the_clean_pass(make):
    """Statistics updated twice or by the perturbed pass, another mask in each pass (many codes)."""
    model, (inputs, labels) = Network(), examples(batch_size=16)
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    variables = model.init(keys, inputs)
    tx = make(0.9)
    statistics = variables["batch_stats"]

    def objective_of(statistics, key):
        def apply_fn(params, x):
            return model.apply(
                {"params": params, "batch_stats": statistics},
                x,
                rngs={"dropout": key},
                mutable=["batch_stats"],
            )

        return Objective(apply_fn, inputs, labels, has_aux=True)

    @jax.jit
    def train_step(params, state, statistics, key):
        objective = objective_of(statistics, key)
        (loss, updated), grads = jax.value_and_grad(objective, has_aux=True)(params)
        direction, state = tx.update(grads, state, params, loss_fn=objective)
        return loss, direction, state, updated["batch_stats"]

    params, key = variables["params"], jax.random.key(7)
    _, direction, state, after = train_step(params, tx.init(params), statistics, key)
    # Statistics: one update, with the moments of the clean activations.
    activations = nn.Dense(16).apply({"params": params["Dense_0"]}, inputs)
    np.testing.assert_allclose(
        after["BatchNorm_0"]["mean"], 0.5 * activations.mean(0), rtol=1e-4, atol=1e-6
    )
    # Dropout: at rho = 0 both passes see the same loss, which they cannot with two masks.
    zero = make(0.0)
    objective = objective_of(statistics, key)
    (loss, _), grads = jax.value_and_grad(objective, has_aux=True)(params)
    _, unmoved = zero.update(grads, zero.init(params), params, loss_fn=objective)
    np.testing.assert_allclose(optax_sam.get_metrics(unmoved)["perturbed_loss"], loss, rtol=1e-5)
    other_mask = objective_of(statistics, jax.random.key(8))(params)[0]
    assert abs(float(other_mask - loss)) > 1e-3
    assert np.isfinite(optax_sam.get_metrics(state)["perturbed_loss"])
    assert jax.tree.structure(direction) == jax.tree.structure(params)


def test_13_gsam_subtracts_a_part_of_the_raw_clean_gradient():
    """A clean gradient normalized before it is split changes its weight (init2winit)."""
    clean, perturbed = jnp.array([30.0, 40.0]), jnp.array([2.0, 0.0])
    stage = optax_sam.subtract_orthogonal(alpha=0.5)
    direction, _ = stage.update(perturbed, stage.init(clean), clean_grads=clean)
    np.testing.assert_allclose(direction, [2.0, -20.0], rtol=1e-6)


def test_13_adaptive_is_asam():
    """Scaled by t squared, normalized by the norm of t g (big_vision's "adaptive" is another)."""
    params, grads = jnp.array([2.0, -0.5]), jnp.array([1.0, 3.0])
    stage = optax_sam.adaptive(rho=0.7, eta=0.0)
    epsilon, _ = stage.update(grads, stage.init(params), params)
    scaled = np.abs(params) * grads
    np.testing.assert_allclose(
        epsilon, 0.7 * np.abs(params) * scaled / np.linalg.norm(scaled), rtol=1e-6
    )


@pytest.mark.parametrize("make", [optax_sam.looksam, optax_sam.sam], ids=["looksam", "sam"])
def test_16_the_second_gradient_is_really_skipped(make):
    """LookSAM that evaluates at every step saves nothing (pytorch_optimizer)."""
    evaluations = []

    def loss_fn(w):
        jax.debug.callback(lambda: evaluations.append(1))
        return jnp.sum(w**4)

    tx = make(0.1, every_k=3)
    w = jnp.array([1.0, 2.0])
    state, counts = tx.init(w), []
    update = jax.jit(lambda g, s, w: tx.update(g, s, w, loss_fn=loss_fn))
    for _ in range(6):
        evaluations.clear()
        _, state = update(4 * w**3, state, w)
        jax.effects_barrier()
        counts.append(len(evaluations))
    assert counts == [1, 0, 0, 1, 0, 0]


def test_16_looksam_does_not_double_the_gradient_between():
    """Without an orthogonal part to reuse, the step between is the gradient itself."""
    tx = optax_sam.looksam(0.1, every_k=2)
    w = jnp.array([3.0, 4.0])
    state = tx.init(w)
    for _ in range(2):  # of an isotropic quadratic: g' is parallel to g
        direction, state = tx.update(w, state, w, loss_fn=lambda w: jnp.sum(w**2) / 2)
    np.testing.assert_array_equal(direction, w)


def test_16_friendly_sam_averages_the_raw_gradient():
    """An average over the already subtracted gradient drifts away (pytorch_optimizer 3.9)."""
    stage = optax_sam.subtract_moving_average(sigma=1.0, decay=0.5)
    state = stage.init(jnp.zeros(1))
    for gradient in (4.0, 2.0, 6.0):
        _, state = stage.update(jnp.full(1, gradient), state)
    np.testing.assert_allclose(state.average, [4.5])  # of 4, then 3, then 4.5


# 18, gradients of microbatches summed instead of averaged (Keras): tests/test_microbatches.py,
# test_value_and_gradient.
