"""What every method promises, for every row of the registry."""

import copy
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_sam
from tests.registry import METHODS, apply_fn, objective, problem

# Of the crossings with SANER, whose numbers the references check, the two that share most code; they
# run on one of CI's two Pythons.
CROSSINGS = [pytest.param(n, marks=pytest.mark.slow) for n in ("gsam+saner", "looksam+saner")]
NAMED = [name for name in METHODS if "+" not in name]
every_method = pytest.mark.parametrize("name", NAMED)
every_row = pytest.mark.parametrize("name", [*NAMED, *CROSSINGS])
# One for each part of the code that a promise could break in: a combination, an evaluation, a stage
# that differentiates the loss, and the wrappers around a method.
# With ρ = 0 the optimizing compiler makes another program of these than of the base optimizer.
ROUNDED_OTHERWISE = ("saner", "restricted", "jsam", "functional_sam", "lsam", "stable_sam")
one_of_each = pytest.mark.parametrize("name", ["saner", "jsam", "ncsam", "looksam", "msam"])


# Without LLVM's optimizations the arithmetic is that of the program as it is written.
AS_WRITTEN = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
LLVM_OPTIMIZES = os.environ.get("JAX_DISABLE_MOST_OPTIMIZATIONS") != "1"


def assert_same(left, right):
    jax.tree.map(np.testing.assert_array_equal, left, right)


def assert_close(left, right, **tolerance):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            np.asarray(a, np.float64), np.asarray(b, np.float64), **tolerance
        ),
        left,
        right,
    )


def one_update(tx, params, loss_fn, state=None, **extra):
    grads = jax.grad(loss_fn)(params)
    state = tx.init(params) if state is None else state
    return tx.update(grads, state, params, loss_fn=loss_fn, **extra)


def train(tx, steps=6, dtype=jnp.float32, jit=True, batches=3, params=None, compiler_options=None):
    """Trains over a few batches; returns the parameters and the state."""
    start, _, _ = problem(dtype)
    params = start if params is None else params
    state = tx.init(params)

    def step(params, state, inputs, labels):
        loss_fn = optax_sam.Objective(apply_fn, inputs, labels)
        grads = jax.grad(loss_fn)(params)
        updates, state = tx.update(grads, state, params, loss_fn=loss_fn)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, compiler_options=compiler_options) if jit else step
    for t in range(steps):
        _, inputs, labels = problem(dtype, seed=1 + t % batches)
        params, state = step(params, state, inputs, labels)
    return params, state


@one_of_each
def test_is_a_transformation_with_extra_arguments(name):
    tx = METHODS[name].make(0.1)
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    params, loss_fn = objective()
    plain, _ = one_update(tx, params, loss_fn)
    extra, _ = one_update(tx, params, loss_fn, value=1.0, anything="else")
    assert_same(plain, extra)


@every_row
def test_perturbs(name):
    """The update differs from the clean gradient, so the tests below are not about SGD."""
    params, _ = train(optax.chain(METHODS[name].make(0.3), optax.sgd(0.1)))
    base, _ = train(optax.sgd(0.1))
    assert (
        max(jax.tree.leaves(jax.tree.map(lambda a, b: jnp.abs(a - b).max(), params, base))) > 1e-3
    )


@pytest.mark.parametrize(
    ("name", "compiler_options"),
    [
        *[
            pytest.param(name, AS_WRITTEN, id=f"{name}-as written")
            for name in [*NAMED, "gsam+saner"]
        ],
        *[pytest.param(name, None, id=f"{name}-compiled") for name in ("sam", "saner", "ncsam")],
    ],
)
def test_zero_rho_is_the_base_optimizer(name, compiler_options):
    row = METHODS[name]
    tx = optax.chain(row.make(0.0), optax.sgd(0.1, momentum=0.9))
    params, _ = train(tx, compiler_options=compiler_options)
    base = optax.chain(row.base, optax.sgd(0.1, momentum=0.9))
    base, _ = train(base, compiler_options=compiler_options)
    if not row.zero_rho_is_base:
        assert_close(params, base, rtol=2e-5, atol=1e-6)
    elif LLVM_OPTIMIZES and name.split("+")[-1] in ROUNDED_OTHERWISE:
        # Optimized programs that are not the same may differ in a last bit.
        assert_close(params, base, rtol=1e-6, atol=1e-7)
    else:
        assert_same(params, base)


@one_of_each
def test_zero_learning_rate_keeps_the_parameters_bit_identical(name):
    start, _, _ = problem()
    params, _ = train(optax.chain(METHODS[name].make(0.3), optax.sgd(0.0)))
    assert_same(params, start)


@one_of_each
def test_schedule_of_a_constant_is_the_constant(name):
    row = METHODS[name]
    constant, _ = train(optax.chain(row.make(0.2), optax.sgd(0.1)))
    schedule, _ = train(optax.chain(row.make(lambda count: 0.2), optax.sgd(0.1)))
    assert_same(constant, schedule)


@every_method
def test_schedule_advances(name):
    row = METHODS[name]
    radii = jnp.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    tx = row.make(lambda count: radii[count])
    params, _ = objective()
    state, norms = tx.init(params), []
    loss_fns = [objective(seed=s)[1] for s in range(6)]
    for f in loss_fns:
        _, state = one_update(tx, params, f, state)
        norms.append(optax_sam.get_metrics(state)["perturbation_norm"])
    if name.startswith("looksam"):
        # The schedule counts the steps with a second gradient: 0 and 5.
        np.testing.assert_allclose([norms[0], norms[5]], radii[:2], rtol=1e-5)
    elif row.perturbation_norm_is_rho:
        first = 0 if row.perturbs_at_once else 1
        np.testing.assert_allclose(norms[first:], radii[first:], rtol=1e-5)
    else:
        assert np.all(np.diff(norms) != 0)


@one_of_each  # of all others, the composition matrix
def test_inject_hyperparams(name):
    row = METHODS[name]
    if row.make is getattr(optax_sam, name, None):
        factory = optax.inject_hyperparams(row.make, static_args=row.static_args)
    else:
        factory = optax.inject_hyperparams(lambda rho: row.make(rho))
    injected, state = train(optax.chain(factory(rho=0.2), optax.sgd(0.1)))
    plain, _ = train(optax.chain(row.make(0.2), optax.sgd(0.1)))
    assert_close(injected, plain, rtol=1e-6, atol=1e-7)
    assert float(state[0].hyperparams["rho"]) == pytest.approx(0.2)


@every_method
def test_named_methods_show_the_options_of_the_engine(name):
    if not hasattr(optax_sam, name):
        pytest.skip("a composition, not a named method")
    import inspect

    shown = inspect.signature(getattr(optax_sam, name)).parameters
    assert not any(p.kind is p.VAR_KEYWORD for p in shown.values())
    assert {"combination", "mask", "axis_name", "every_k"} <= set(shown)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *[(name, jnp.bfloat16) for name in [*NAMED, "gsam+saner"]],
        *[(name, jnp.float16) for name in ("sam", "jsam", "ncsam")],
    ],
)
def test_updates_keep_dtype_and_structure(name, dtype):
    tx = METHODS[name].make(0.1)
    params, loss_fn = objective(dtype)
    state = tx.init(params)
    for _ in range(2):
        updates, state = one_update(tx, params, loss_fn, state)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    for update, param in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True):
        assert update.dtype == param.dtype
        assert update.shape == param.shape
        assert jnp.isfinite(update).all()
    metrics = optax_sam.get_metrics(state)
    assert all(value.dtype == jnp.float32 for value in metrics.values())


@one_of_each
def test_half_precision_follows_single_precision(name):
    """To 0.02 of the update, from which the clean gradient is three times as far."""
    row = METHODS[name]
    tx = row.make(0.3)
    params, loss_fn = objective(jnp.bfloat16)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    wide_loss = optax_sam.Objective(apply_fn, loss_fn.inputs.astype(jnp.float32), loss_fn.labels)
    state, wide_state = tx.init(params), tx.init(wide)
    update = jax.jit(functools.partial(one_update, tx))
    for _ in range(1 if row.perturbs_at_once else 2):
        half, state = update(params, loss_fn, state)
        single, wide_state = update(wide, wide_loss, wide_state)
    half = jax.tree.map(lambda x: x.astype(jnp.float32), half)
    scale = optax.tree.norm(single)
    assert optax.tree.norm(optax.tree.sub(half, single)) < 0.02 * scale
    clean = jax.grad(wide_loss)(wide)
    assert optax.tree.norm(optax.tree.sub(clean, single)) > 0.06 * scale


@every_row
def test_zero_gradient_gives_no_perturbation_and_no_nan(name):
    tx = METHODS[name].make(0.1)
    params, inputs, labels = problem()
    flat = optax_sam.Objective(lambda p, x: 0 * apply_fn(p, x), inputs, labels)
    state = tx.init(params)
    for _ in range(7):  # past the steps between of LookSAM
        updates, state = one_update(tx, params, flat, state)
    assert all(jnp.all(u == 0) for u in jax.tree.leaves(updates))
    assert optax_sam.get_metrics(state)["perturbation_norm"] == 0


@one_of_each
def test_recovers_after_a_zero_gradient(name):
    tx = METHODS[name].make(0.1)
    params, loss_fn = objective()
    flat = loss_fn.replace(apply_fn=lambda p, x: 0 * apply_fn(p, x))
    _, state = one_update(tx, params, flat)
    for _ in range(3):
        updates, state = one_update(tx, params, loss_fn, state)
    assert all(jnp.isfinite(u).all() for u in jax.tree.leaves(updates))
    assert optax.tree.norm(updates) > 0


@one_of_each
def test_nan_is_passed_on(name):
    tx = METHODS[name].make(0.1)
    params, loss_fn = objective()
    params["out"]["kernel"] = params["out"]["kernel"].at[0, 0].set(jnp.nan)
    updates, _ = one_update(tx, params, loss_fn)
    assert any(jnp.isnan(u).any() for u in jax.tree.leaves(updates))


@one_of_each
def test_integer_and_none_leaves_survive(name):
    tx = optax.chain(METHODS[name].make(0.1), optax.sgd(0.1, momentum=0.9))
    params, inputs, labels = problem()
    mixed = {"float": params, "steps": jnp.arange(3), "nothing": None}
    loss_fn = optax_sam.Objective(
        lambda p, x: apply_fn(p["float"], x) * p["steps"][1], inputs, labels
    )
    grads = jax.grad(loss_fn, allow_int=True)(mixed)
    state = tx.init(mixed)
    dtypes = jax.tree.map(jnp.result_type, state[0])
    for _ in range(2):
        updates, state = tx.update(grads, state, mixed, loss_fn=loss_fn)
    assert jax.tree.map(jnp.result_type, state[0]) == dtypes  # which every_k= and scans ask for
    new = optax.apply_updates(mixed, updates)
    np.testing.assert_array_equal(new["steps"], mixed["steps"])
    assert new["steps"].dtype == mixed["steps"].dtype
    alone = optax.chain(METHODS[name].make(0.1), optax.sgd(0.1, momentum=0.9))
    plain = optax_sam.Objective(apply_fn, inputs, labels)
    state = alone.init(params)
    for _ in range(2):
        expected, state = alone.update(grads["float"], state, params, loss_fn=plain)
    assert_close(updates["float"], expected, rtol=1e-5, atol=1e-6)


def test_a_moment_in_another_dtype_keeps_it():
    base = optax.trace(0.9, accumulator_dtype=jnp.float32)
    tx, params = optax_sam.wsam(0.1, base=base), {"w": jnp.ones(2), "steps": jnp.arange(3)}

    def loss_fn(params):
        return jnp.sum(params["w"] ** 2)

    state = tx.init(params)
    dtypes = jax.tree.map(jnp.result_type, state)
    grads = jax.grad(loss_fn, allow_int=True)(params)
    _, state = tx.update(grads, state, params, loss_fn=loss_fn)
    assert jax.tree.map(jnp.result_type, state) == dtypes


@one_of_each
def test_empty_tree_survives(name):
    tx = METHODS[name].make(0.1)
    _, loss_fn = objective()
    constant = loss_fn.replace(apply_fn=lambda p, x: x[:, :3])
    updates, state = tx.update({}, tx.init({}), {}, loss_fn=constant)
    assert updates == {}
    assert jnp.isfinite(optax_sam.get_metrics(state)["perturbed_loss"])


def test_empty_tree_survives_by_the_fast_path():
    tx = optax_sam.sam(0.1, group_size=1)
    _, loss_fn = objective()
    updates, state = tx.update(
        {}, tx.init({}), {}, loss_fn=loss_fn.replace(apply_fn=lambda p, x: x[:, :3])
    )
    assert updates == {}
    assert optax_sam.get_metrics(state)["perturbation_norm"] == 0


def test_inject_hyperparams_of_ncsam_itself():
    """It passes every option on, those that are None too."""
    factory = optax.inject_hyperparams(
        optax_sam.ncsam, static_args=("flip_ratio", "warmup_steps", "total_steps")
    )
    state = factory(0.1, flip_ratio=0.5, warmup_steps=10).init(objective()[0])
    assert state.hyperparams["rho"] == jnp.float32(0.1)
    with pytest.raises(ValueError, match="start_step=3 is warmup_steps in ncsam"):
        optax_sam.ncsam(0.1, start_step=3)


@pytest.mark.parametrize("copied", [copy.deepcopy, functools.partial(jax.tree.map, lambda x: x)])
def test_a_copy_of_a_stage_is_a_stage(copied):
    params, loss_fn = objective()
    stage = optax_sam.normalized(0.1)
    expected, state = one_update(optax_sam.sharpness_aware(stage), params, loss_fn)
    direction, other = one_update(optax_sam.sharpness_aware(copied(stage)), params, loss_fn)
    assert_same(direction, expected)
    assert_close(other.metrics, state.metrics)


@every_row
def test_state_keeps_its_structure_shapes_and_dtypes(name):
    """Which is what a compiled loop, a checkpoint and donation ask for."""
    tx = METHODS[name].make(lambda count: 0.1)
    params, loss_fn = objective()
    state = tx.init(params)
    spec = jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), state)
    _, state = jax.jit(lambda p, s: one_update(tx, p, loss_fn, s))(params, state)
    assert spec == jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), state)


@one_of_each
def test_runs_inside_a_scan(name):
    tx = optax.chain(METHODS[name].make(0.1), optax.sgd(0.1))
    params, loss_fn = objective()

    def step(carry, _):
        params, state = carry
        updates, state = one_update(tx, params, loss_fn, state)
        return (optax.apply_updates(params, updates), state), None

    (scanned, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=4)
    looped, state = params, tx.init(params)
    for _ in range(4):
        (looped, state), _ = step((looped, state), None)
    assert_close(scanned, looped, rtol=1e-4, atol=1e-5)


@one_of_each
def test_jit_equals_eager(name):
    if METHODS[name].selects_coordinates:
        pytest.skip("rounding moves coordinates between the groups")
    tx = optax.chain(METHODS[name].make(0.1), optax.sgd(0.1))
    assert_close(train(tx)[0], train(tx, jit=False)[0], rtol=1e-4, atol=1e-5)


@one_of_each
def test_donation_and_no_aliased_buffers(name):
    tx = optax.chain(METHODS[name].make(0.1), optax.sgd(0.1, momentum=0.9))
    params, loss_fn = objective()
    params = jax.tree.map(jnp.copy, params)
    state = tx.init(params)
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((params, state))]
    assert len(set(pointers)) == len(pointers)

    def step(params, state):
        updates, state = one_update(tx, params, loss_fn, state)
        return optax.apply_updates(params, updates), state

    expected, _ = jax.jit(step)(params, state)
    donating = jax.jit(step, donate_argnums=(0, 1))
    donated, state = donating(params, state)
    assert_same(donated, expected)
    donating(donated, state)


@every_method
def test_one_trace(name):
    row = METHODS[name]
    tx = row.make(0.1)
    params, inputs, labels = problem()
    traces = 0

    def counted(params, inputs):
        nonlocal traces
        traces += 1
        return apply_fn(params, inputs)

    @jax.jit
    def step(grads, state, params, loss_fn):
        return tx.update(grads, state, params, loss_fn=loss_fn)

    state = tx.init(params)
    for seed in range(3):
        _, inputs, labels = problem(seed=seed)
        loss_fn = optax_sam.Objective(counted, inputs, labels)
        _, state = step(params, state, params, loss_fn)
    assert traces == row.loss_traces


@pytest.mark.filterwarnings("ignore:the derivative of the loss in the network's output")
@every_method
def test_masked_leaves_are_not_perturbed(name):
    """In a separable loss an unperturbed leaf sees its own clean gradient, a perturbed one does not."""
    row = METHODS[name]
    if not row.separable:
        pytest.skip("the combination mixes the leaves")
    params = {"a": jnp.array([1.0, -2.0]), "b": jnp.array([0.5, 3.0])}

    def logits(params, inputs):
        value = jnp.sum(params["a"] ** 4) - jnp.sum(params["b"] ** 4)
        return inputs * value

    def loss(logits, labels):
        return logits[:, 0]  # linear in the logits: the loss is a**4 - b**4

    loss_fn = optax_sam.Objective(
        logits, jnp.tile(jnp.array([[1.0, 0.0]]), (4, 1)), jnp.zeros(4, jnp.int32), loss
    )
    tx = row.make(0.5, mask={"a": False, "b": True})
    state = tx.init(params)
    for _ in range(2 if not row.perturbs_at_once else 1):
        updates, state = one_update(tx, params, loss_fn, state)
    clean = jax.grad(loss_fn)(params)
    if name != "lsam":  # its logit term is constant here, so L-SAM is SGD in this problem
        assert not np.allclose(updates["b"], clean["b"], rtol=1e-3)
    np.testing.assert_allclose(updates["a"], clean["a"], rtol=1e-6)
    if row.perturbation_norm_is_rho:
        norm = optax_sam.get_metrics(state)["perturbation_norm"]
        np.testing.assert_allclose(norm, 0.5, rtol=1e-6)


@one_of_each
def test_what_stands_behind_acts_on_the_direction(name):
    method = METHODS[name].make(0.2)
    params, loss_fn = objective()
    direction, _ = one_update(method, params, loss_fn)
    chained = optax.chain(method, optax.add_decayed_weights(0.1), optax.scale(-0.5))
    updates, _ = one_update(chained, params, loss_fn)
    expected = jax.tree.map(lambda d, p: -0.5 * (d + 0.1 * p), direction, params)
    assert_close(updates, expected, rtol=1e-6, atol=1e-7)


@one_of_each
def test_missing_arguments_say_the_remedy(name):
    tx = METHODS[name].make(0.1)
    params, loss_fn = objective()
    state = tx.init(params)
    with pytest.raises(TypeError, match=r"loss_fn=loss_fn.*drops extra arguments"):
        tx.update(params, state, params)
    with pytest.raises(ValueError, match=r"(perturbs|needs) the parameters"):
        tx.update(params, state, loss_fn=loss_fn)


@every_method
def test_negative_rho_is_refused(name):
    with pytest.raises(ValueError, match=r"rho(_max)? must lie in \[0, inf\), got -0.1"):
        METHODS[name].make(-0.1)


@one_of_each
def test_complex_parameters_are_refused(name):
    with pytest.raises(TypeError, match=r"\['w'\] is complex"):
        METHODS[name].make(0.1).init({"w": jnp.ones(2, jnp.complex64)})


@every_method
def test_every_k_takes_the_base_optimizers_steps_between(name):
    if name.startswith("looksam"):
        pytest.skip("it has an every_k of its own")
    row = METHODS[name]
    tx = row.make(0.3, every_k=3)
    params, loss_fn = objective()
    grads = jax.grad(loss_fn)(params)
    state, base_state = tx.init(params), row.base.init(params)
    always, _ = one_update(row.make(0.3), params, loss_fn)
    for step in range(4):
        updates, state = jax.jit(tx.update)(grads, state, params, loss_fn=loss_fn)
        base, base_state = row.base.update(grads, base_state)
        if step % 3 and "decoupled" in name:  # which computes: optimized, it may round otherwise
            assert_close(updates, base, rtol=1e-6, atol=1e-7)
        elif step % 3:
            assert_same(updates, base)
        elif step == 0:
            assert_close(updates, always, rtol=2e-4, atol=1e-5)
        elif row.perturbs_at_once and "friendly" not in name:
            assert not np.allclose(updates["out"]["kernel"], grads["out"]["kernel"], atol=1e-4)


@one_of_each
def test_late_start_and_stop(name):
    if name.startswith("ncsam"):
        pytest.skip("its warm-up is the late start")
    row = METHODS[name]
    tx = optax.chain(row.make(0.3, start_step=2, stop_step=4), optax.sgd(0.1))
    base = optax.sgd(0.1)
    assert_same(train(tx, steps=2)[0], train(base, steps=2)[0])
    four, _ = train(tx, steps=4)
    assert not np.allclose(four["out"]["kernel"], train(base, steps=4)[0]["out"]["kernel"])
    late, state = train(tx, steps=6)
    start, _ = train(tx, steps=4)
    params, _ = start, state
    for t in (4, 5):
        _, inputs, labels = problem(seed=1 + t % 3)
        grads = jax.jit(jax.grad(optax_sam.Objective(apply_fn, inputs, labels)))(params)
        params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    assert_close(late, params, rtol=1e-5, atol=1e-6)
