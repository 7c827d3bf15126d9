"""Wrappers around stages and methods, against loops by hand."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import optax_sam
from optax_sam import Objective, _axes
from tests.problems import apply_mlp, examples, mlp_parameters

RHO = 0.3


def quartic(w):
    """A loss of a vector whose gradient is 4 w³."""
    return jnp.sum(w**4)


START = jnp.array([1.0, -0.5, 0.25])


def slope(w):
    return 4 * w**3


def unit(v):
    return v / jnp.sqrt(jnp.sum(v**2))


def assert_close(left, right):
    chex.assert_trees_all_close(left, right, rtol=2e-5, atol=1e-6)


def update(tx, state=None, w=START, loss_fn=quartic, **extra):
    state = tx.init(w) if state is None else state
    return tx.update(slope(w), state, w, loss_fn=loss_fn, **extra)


class TestInSteps:
    @pytest.mark.parametrize("steps", [1, 2, 5])
    def test_every_step_has_a_new_gradient(self, steps):
        tx = optax_sam.sharpness_aware(optax_sam.in_steps(optax_sam.normalized(RHO), steps))
        direction, state = update(tx)
        climbed = START
        for _ in range(steps):
            climbed = climbed + RHO / steps * unit(slope(climbed))
        assert_close(direction, slope(climbed))
        norm = optax_sam.get_metrics(state)["perturbation_norm"]
        np.testing.assert_allclose(norm, jnp.linalg.norm(climbed - START), rtol=1e-5)

    def test_only_the_first_step_advances_the_state(self):
        stage = optax.chain(optax_sam.moving_average(0.2), optax_sam.normalized(lambda t: RHO))
        tx = optax_sam.sharpness_aware(optax_sam.in_steps(stage, 3))
        _, state = update(tx)
        assert_close(state.perturbation[0].average, slope(START))
        assert int(optax.tree.get(state.perturbation[1], "count")) == 1

    def test_nested(self):
        """Two steps of two half steps each are four quarter steps."""
        inner = optax_sam.in_steps(optax_sam.normalized(RHO), 2)
        direction, _ = update(optax_sam.sharpness_aware(optax_sam.in_steps(inner, 2)))
        climbed = START
        for _ in range(2):
            half = climbed
            for _ in range(2):  # the inner climb starts anew from w + ε, with half of its length
                half = half + RHO / 2 * unit(slope(half))
            climbed = climbed + (half - climbed) / 2
        assert_close(direction, slope(climbed))

    def test_audit_5_later_gradients_respect_the_mask(self):
        """A frozen leaf has a gradient at w + ε: it must not count in the norm of a later step."""

        def loss_fn(p):
            return jnp.sum(p["a"] ** 2) / 2 + 100 * jnp.sum(p["b"] ** 2) * jnp.sum(p["a"])

        params = {"a": jnp.array([3.0, 4.0]), "b": jnp.array([1.0])}
        tx = optax_sam.sam(RHO, mask={"a": True, "b": False}, ascent_steps=3)
        grads = jax.grad(loss_fn)(params)
        direction, _ = tx.update(grads, tx.init(params), params, loss_fn=loss_fn)
        moved = params
        for _ in range(3):
            moved = moved | {"a": moved["a"] + RHO / 3 * unit(jax.grad(loss_fn)(moved)["a"])}
        assert_close(direction, jax.grad(loss_fn)(moved))

    def test_arguments(self):
        with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
            optax_sam.in_steps(optax_sam.normalized(RHO), 0)
        with pytest.raises(TypeError, match=r"perturbation must be an optax\.Grad.*got 0\.05"):
            optax_sam.in_steps(0.05, 2)
        stage = optax_sam.in_steps(optax_sam.normalized(RHO), 2)
        with pytest.raises(ValueError, match=r"in_steps\(\.\.\.\) .*loss_fn is None: call"):
            stage.update(START, stage.init(START), START)
        with pytest.raises(TypeError, match=r"perturbation is a stage.*given a whole method"):
            optax_sam.in_steps(optax_sam.sam(RHO), 2).init(START)


class TestOnFirst:
    @pytest.mark.parametrize(("fraction", "count"), [(0.01, 1), (0.25, 2), (0.3, 2), (1.0, 8)])
    def test_the_ascent_sees_the_first_examples(self, fraction, count):
        params, objective = mlp_parameters(), Objective(apply_mlp, *examples())
        stage = optax_sam.on_first(optax_sam.normalized(RHO), fraction)
        epsilon, _ = stage.update(params, stage.init(params), params, loss_fn=objective)
        grads = jax.grad(objective.subset(slice(0, count)))(params)
        expected, _ = optax_sam.normalized(RHO).update(grads, optax.EmptyState())
        assert_close(epsilon, expected)

    @pytest.mark.parametrize("order", ["in_steps(on_first)", "on_first(in_steps)"])
    def test_nested_with_steps(self, order):
        """In both orders every step climbs along the part's gradient where the climb has come to."""
        params, objective = mlp_parameters(), Objective(apply_mlp, *examples())
        base = optax_sam.normalized(RHO)
        stage = (
            optax_sam.in_steps(optax_sam.on_first(base, 0.25), 2)
            if order == "in_steps(on_first)"
            else optax_sam.on_first(optax_sam.in_steps(base, 2), 0.25)
        )
        grads = jax.grad(objective)(params)
        epsilon, _ = stage.update(grads, stage.init(params), params, loss_fn=objective)
        part, moved = objective.subset(slice(0, 2)), params
        for _ in range(2):
            ascent, _ = optax_sam.normalized(RHO / 2).update(
                jax.grad(part)(moved), optax.EmptyState()
            )
            moved = jax.tree.map(jnp.add, moved, ascent)
        assert_close(jax.tree.map(jnp.add, params, epsilon), moved)

    def test_a_stage_inside_sees_the_part_and_its_logits(self):
        seen = []

        def look(updates, state, params=None, *, loss_fn, logits, **extra_args):
            seen.append((loss_fn.batch_size, logits.shape))
            return updates, state

        spy = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), look)
        params, objective = mlp_parameters(), Objective(apply_mlp, *examples())
        stage = optax_sam.on_first(spy, 0.5)
        logits = objective.logits(params)
        stage.update(params, stage.init(params), params, loss_fn=objective, logits=logits)
        assert seen == [(4, (4, 3))]

    @pytest.mark.parametrize("fraction", [0, 0.0, 1.5, -0.5, jnp.float32(0.5)], ids=repr)
    def test_fractions(self, fraction):
        with pytest.raises(ValueError, match=r"fraction must lie in .*got"):
            optax_sam.on_first(optax_sam.normalized(RHO), fraction)
        with pytest.raises(ValueError, match=r"ascent_fraction must lie in .*got"):
            optax_sam.sam(RHO, ascent_fraction=fraction)

    def test_a_function_has_no_first_examples(self):
        with pytest.raises(TypeError, match=r"ascent_fraction\) needs to look inside the loss"):
            update(optax_sam.sam(RHO, ascent_fraction=0.5))


class TestAlongPrevious:
    MOMENTUM = 0.9

    def test_momentum_sam_by_hand(self):
        """w - ρ v/|v| with v the accumulated directions; the first step does not climb."""
        tx = optax_sam.along_previous(
            optax_sam.sharpness_aware(
                optax.chain(
                    optax.trace(self.MOMENTUM), optax_sam.normalized(RHO), optax.scale(-1.0)
                )
            )
        )
        named = optax_sam.msam(RHO, self.MOMENTUM)
        w, v = START, jnp.zeros_like(START)
        state, named_state = tx.init(w), named.init(w)
        for step in range(5):
            direction, state = update(tx, state, w)
            same, named_state = update(named, named_state, w)
            moved = w - RHO * unit(v) if step else w
            assert_close(direction, slope(moved))
            assert_close(same, direction)
            v = self.MOMENTUM * v + direction
            w = w - 0.01 * direction
        assert isinstance(state, optax_sam.AlongPreviousState)
        assert_close(state.direction, direction)

    def test_a_combination_gets_the_clean_gradient(self):
        inner = optax_sam.sharpness_aware(
            optax_sam.normalized(RHO), combination=optax_sam.subtract_orthogonal(0.5)
        )
        tx = optax_sam.along_previous(inner)
        w, state, previous = START, tx.init(START), None
        for _ in range(3):
            direction, state = update(tx, state, w)
            perturbed = slope(w if previous is None else w + RHO * unit(previous))
            stage = optax_sam.subtract_orthogonal(0.5)
            expected, _ = stage.update(perturbed, stage.init(w), clean_grads=slope(w))
            assert_close(direction, expected)
            previous, w = direction, w - 0.01 * direction

    def test_the_clean_gradient_is_not_needed(self):
        """Without a combination the updates that come in do not change anything."""
        tx = optax_sam.msam(RHO)
        _, state = update(tx)
        expected, _ = update(tx, state)
        other, _ = tx.update(jnp.full(3, jnp.nan), state, START, loss_fn=quartic)
        chex.assert_trees_all_equal(other, expected)

    def test_what_is_no_method(self):
        with pytest.raises(TypeError, match=r"method must be a sharpness-aware method.*got 3"):
            optax_sam.along_previous(3)

    def test_clean_grads_of_none_are_none(self):
        tx = optax_sam.msam(RHO, combination=optax_sam.down_weight(0.5))
        _, state = update(tx)
        chex.assert_trees_all_equal(update(tx, state, clean_grads=None), update(tx, state))


@pytest.mark.parametrize(
    "wrap",
    [functools.partial(optax_sam.sometimes, every_k=2), optax_sam.along_previous],
    ids=["sometimes", "along_previous"],
)
class TestWrappersAreAroundMethods:
    def test_an_optimizer_behind_the_method_is_refused(self, wrap):
        """On the steps in between the clean gradient would be added to the parameters as it is."""
        inside = optax.chain(optax_sam.sam(RHO), optax.sgd(0.1))
        named = optax.named_chain(("sam", optax_sam.sam(RHO)), ("sgd", optax.sgd(0.1)))
        for tx in (inside, named, optax.chain(inside)):
            with pytest.raises(TypeError, match=r"behind the method.*optax\.chain\("):
                wrap(tx).init(START)
        with pytest.raises(TypeError, match=r"what it was given is none\. Pass e\.g\."):
            wrap(optax.sgd(0.1)).init(START)

    def test_what_stands_in_front_of_a_method_may_stay(self, wrap):
        tx = wrap(optax.chain(optax.clip_by_global_norm(1e9), optax_sam.sam(RHO)))
        expected, _ = update(wrap(optax_sam.sam(RHO)))
        assert_close(update(tx)[0], expected)


class TestCleanGrads:
    """``update(other, ..., clean_grads=g)``: climb along one direction, combine with another."""

    def test_by_hand(self):
        tx, other = optax_sam.wsam(RHO, gamma=0.9), jnp.array([0.0, 1.0, 1.0])
        direction, _ = tx.update(
            other, tx.init(START), START, loss_fn=quartic, clean_grads=slope(START)
        )
        clean, perturbed = slope(START), slope(START + RHO * unit(other))
        assert_close(direction, clean + 9 * (perturbed - clean))

    def test_in_the_dtype_of_the_parameters_on_every_step(self):
        tx = optax_sam.sam(RHO, every_k=2)
        start = START.astype(jnp.bfloat16)
        g, state = slope(START), tx.init(start)
        for _ in range(2):
            direction, state = tx.update(g, state, start, loss_fn=quartic, clean_grads=g)
            assert direction.dtype == jnp.bfloat16
        np.testing.assert_array_equal(direction, g.astype(jnp.bfloat16))

    def test_refusals(self):
        tx = optax_sam.sam(RHO)
        with pytest.raises(ValueError, match="clean_grads must have the tree structure of params"):
            update(tx, clean_grads={"w": START})
        with pytest.raises(ValueError, match=r"clean_grads must have the shape.*got \(2,\)"):
            update(tx, clean_grads=jnp.ones(2))


def ascends(tx, steps, loss_fn=quartic):
    """On which steps the direction is not the clean gradient."""
    state, found = tx.init(START), []
    for _ in range(steps):
        direction, state = update(tx, state, loss_fn=loss_fn)
        found.append(not np.allclose(direction, slope(START)))
    return found


class TestSometimes:
    @pytest.mark.parametrize(
        "options",
        [
            {"every_k": 3},
            {"start_step": 2},
            {"stop_step": 3},
            {"every_k": 2, "start_step": 1, "stop_step": 6},
            {"every_k": 1},
            {"start_step": 3, "stop_step": 3},
        ],
        ids=str,
    )
    def test_which_steps(self, options):
        k = options.get("every_k", 1)
        start, stop = options.get("start_step", 0), options.get("stop_step", 99)
        expected = [start <= t < stop and (t - start) % k == 0 for t in range(8)]
        assert ascends(optax_sam.sometimes(optax_sam.sam(RHO), **options), 8) == expected
        assert ascends(optax_sam.sam(RHO, **options), 8) == expected

    def test_conditions_on_the_data(self):
        def is_long(gradients, params):
            return jnp.linalg.norm(gradients) > params[0]

        tx = optax_sam.sam(RHO, when=is_long)
        for w in (START, 0.1 * START):
            direction, _ = update(tx, w=w)
            holds = float(jnp.linalg.norm(slope(w))) > float(w[0])
            assert holds != np.allclose(direction, slope(w))

    def test_clean_grads_of_none_are_none(self):
        tx = optax_sam.sam(RHO, every_k=2)
        for state in (tx.init(START), update(tx)[1]):
            chex.assert_trees_all_equal(update(tx, state, clean_grads=None), update(tx, state))

    def test_all_conditions_must_hold(self):
        class EveryThird:
            """A condition with a state, which is advanced at every step."""

            def init(self, params):
                return jnp.zeros([], jnp.int32)

            def update(self, gradients, state, params):
                return state % 3 == 0, state + 1

        tx = optax_sam.sam(RHO, every_k=2, when=EveryThird())
        assert ascends(tx, 8) == [t % 6 == 0 for t in range(8)]

    def test_the_second_gradient_is_really_skipped(self):
        evaluations = []

        def counted(w):
            jax.debug.callback(lambda: evaluations.append(1))
            return quartic(w)

        tx = optax_sam.saner(RHO, when=lambda g, w: jnp.asarray(False))
        state = tx.init(START)
        run = jax.jit(lambda s: tx.update(slope(START), s, START, loss_fn=counted))
        for _ in range(3):
            _, state = run(state)
        jax.effects_barrier()
        assert evaluations == []
        assert float(optax_sam.get_metrics(state)["perturbed_loss"]) == 0.0  # its last step: none

    def test_the_method_sees_its_own_steps_only(self):
        radii = jnp.array([0.1, 0.2, 0.3])
        tx = optax_sam.sometimes(optax_sam.sam(lambda count: radii[count]), every_k=2)
        state, norms = tx.init(START), []
        for _ in range(5):
            _, state = update(tx, state)
            norms.append(float(optax_sam.get_metrics(state)["perturbation_norm"]))
        np.testing.assert_allclose(norms, [0.1, 0.1, 0.2, 0.2, 0.3], rtol=1e-5)
        assert isinstance(state, optax_sam.SometimesState)
        assert int(state.step.count) == 5

    def test_what_stands_in_between(self):
        """It sees the method's direction on its steps, and g on the others."""
        seen = []

        def look(updates, state, params=None, *, clean_grads, is_ascent_step, **extra_args):
            seen.append(is_ascent_step)
            factor = 1.0 if is_ascent_step else 7.0
            return jax.tree.map(lambda u: factor * u, updates), state + is_ascent_step

        spy = optax.GradientTransformationExtraArgs(lambda params: jnp.zeros([], jnp.int32), look)
        tx = optax_sam.sometimes(optax_sam.sam(RHO), every_k=2, otherwise=spy)
        first, state = update(tx)
        second, state = update(tx, state)
        assert_close(first, slope(START + RHO * unit(slope(START))))
        assert_close(second, 7 * slope(START))
        assert set(seen) == {True, False}
        assert int(state.otherwise) == 1

    def test_reuse_orthogonal_keeps_a_part_of_the_methods_direction(self):
        """SANER first, then the part orthogonal to g: v is that of the down-weighted gradient."""
        tx = optax_sam.sometimes(
            optax_sam.saner(RHO), every_k=2, otherwise=optax_sam.reuse_orthogonal(0.7)
        )

        def loss_fn(w):  # one coordinate is down-weighted, others are not
            return w[0] ** 4 + jnp.cos(3 * w[1]) + w[2] ** 2

        g = jax.grad(loss_fn)(START)
        state = tx.init(START)
        first, state = tx.update(g, state, START, loss_fn=loss_fn)
        second, _ = tx.update(g, state, START, loss_fn=loss_fn)
        g = np.asarray(g, np.float64)
        d = np.array(jax.grad(loss_fn)(START + RHO * unit(jnp.asarray(g))), np.float64)
        down = (d / g > 0) & (d / g < 1)
        assert 0 < down.sum() < 3
        d[down] *= 0.5
        v = d - d @ g / (g @ g) * g
        np.testing.assert_allclose(first, d, rtol=1e-4)
        expected = g + 0.7 * np.linalg.norm(g) / np.linalg.norm(v) * v
        np.testing.assert_allclose(second, expected, rtol=1e-4)

    @pytest.mark.parametrize("check_vma", [True, False])
    def test_devices_decide_together(self, check_vma):
        """The condition sees the average of the local gradients, and so does the step in between."""
        mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
        inputs, labels = examples(batch_size=16)
        clean = jax.grad(Objective(apply_mlp, inputs, labels))(mlp_parameters())
        bound = 1.01 * float(optax.tree.norm(clean))  # the devices' own are longer

        def is_long(gradients, params):
            return optax.tree.norm(gradients) > bound

        tx = optax_sam.sam(RHO, when=is_long, axis_name="data")

        def local(inputs, labels):
            params, objective = mlp_parameters(), Objective(apply_mlp, inputs, labels)
            grads = jax.grad(objective)(_axes.to_varying(params, "data"))
            direction, _ = tx.update(grads, tx.init(params), params, loss_fn=objective)
            return direction, jax.lax.pmin(optax.tree.norm(grads), "data")

        mapped = jax.shard_map(
            local, mesh=mesh, in_specs=P("data"), out_specs=P(), check_vma=check_vma
        )
        direction, shortest = jax.jit(mapped)(inputs, labels)
        assert float(shortest) > bound
        assert_close(direction, clean)

    def test_refusals(self):
        sam = optax_sam.sam(RHO)
        with pytest.raises(
            ValueError, match=r"needs a condition: every_k, start_step, stop_step or"
        ):
            optax_sam.sometimes(sam)
        with pytest.raises(ValueError, match="every_k must be at least 1, got 0"):
            optax_sam.sometimes(sam, every_k=0)
        with pytest.raises(ValueError, match="start_step must be at least 0, got -1"):
            optax_sam.sam(RHO, start_step=-1)
        with pytest.raises(ValueError, match="stop_step must be at least 5, got 4"):
            optax_sam.sam(RHO, start_step=5, stop_step=4)
        with pytest.raises(TypeError, match=r"when must be a condition such as .*got 3"):
            optax_sam.sam(RHO, when=3)
        with pytest.raises(TypeError, match=r"method must be a sharpness-aware method.*got None"):
            optax_sam.sometimes(None, every_k=2)
        with pytest.raises(TypeError, match=r"otherwise must be an optax\.Gradient.*got 3"):
            optax_sam.sometimes(sam, every_k=2, otherwise=3)
        tx = optax_sam.sometimes(sam, every_k=2)
        with pytest.raises(ValueError, match=r"sometimes\(\.\.\.\) needs the parameters"):
            tx.update(START, tx.init(START), loss_fn=quartic)

    @pytest.mark.parametrize("value", [1.0, jnp.ones(2, bool), 1], ids=repr)
    def test_a_condition_returns_one_bool(self, value):
        with pytest.raises(TypeError, match=r"when.* must return one bool, got .*jnp\.any"):
            update(optax_sam.sam(RHO, when=lambda g, p: value))


class TestGradientNormIsLarge:
    @pytest.mark.parametrize("deviations", [0.0, 1.0, "schedule"])
    def test_against_the_papers_formulas(self, x64, deviations):
        def schedule(step):
            return 1.0 - 2.0 * step / 40

        when = optax_sam.gradient_norm_is_large(
            schedule if deviations == "schedule" else deviations, decay=0.9
        )
        gradients = np.random.default_rng(0).normal(size=(40, 5)) * np.linspace(1, 3, 40)[:, None]
        state = when.init(jnp.zeros(5))
        mean = variance = 0.0
        decisions = []
        for step, gradient in enumerate(gradients):
            holds, state = when.update(jnp.asarray(gradient), state, jnp.zeros(5))
            squared = float(np.sum(gradient**2))
            mean = 0.9 * mean + 0.1 * squared
            variance = 0.9 * variance + 0.1 * (squared - mean) ** 2
            c = schedule(step) if deviations == "schedule" else deviations
            assert bool(holds) == (squared >= mean + c * variance**0.5)
            np.testing.assert_allclose([state.mean, state.variance], [mean, variance], rtol=1e-12)
            decisions.append(bool(holds))
        assert 0 < sum(decisions[1:]) < 39

    def test_in_a_method(self):
        tx = optax_sam.sam(RHO, when=optax_sam.gradient_norm_is_large())
        _, state = jax.jit(functools.partial(update, tx))()
        assert isinstance(state.when, optax_sam.GradientNormState)
        np.testing.assert_allclose(state.when.mean, 0.1 * jnp.sum(slope(START) ** 2), rtol=1e-5)

    def test_a_gradient_that_overflowed_is_forgotten(self):
        when = optax_sam.gradient_norm_is_large()
        state = when.init(START)
        for size in (1.0, 2.0):
            _, state = when.update(size * START, state, START)
        for bad in (np.nan, np.inf, 1e20):
            holds, after = when.update(bad * START, state, START)
            assert bool(holds)
            chex.assert_trees_all_equal(after, state)

    def test_the_state_may_be_donated_and_keeps_its_dtype(self, x64):
        when = optax_sam.gradient_norm_is_large(decay=np.float64(0.9))
        params = jnp.ones(3, jnp.float32)
        state = when.init(params)
        donating = jax.jit(lambda state: when.update(params, state, params)[1], donate_argnums=0)
        assert donating(state).mean.dtype == jnp.float32

    def test_arguments(self):
        with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\), got 1"):
            optax_sam.gradient_norm_is_large(decay=1)
        with pytest.raises(TypeError, match="deviations must be a number or a schedule, got None"):
            optax_sam.gradient_norm_is_large(None)
