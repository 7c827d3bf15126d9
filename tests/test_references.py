"""Every method against its slow and obvious version, and the options of the engine against loops."""

import functools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_sam
from tests.references import methods as references
from tests.registry import METHODS, apply_fn, problem

RHO = 0.3
STEPS = 7  # past LookSAM's first five


@functools.cache
def setup():
    """Parameters, the same as a flat vector with its forward function, and three batches."""
    start, _, _ = problem(jnp.float64)
    flat, unravel = jax.flatten_util.ravel_pytree(start)
    batches = [problem(jnp.float64, seed=seed)[1:] for seed in (1, 2, 3)]
    return start, flat, lambda w, x: apply_fn(unravel(w), x), batches


def run_ours(tx, steps=STEPS, microbatch_size=None):
    params, _, _, batches = setup()
    state = tx.init(params)
    directions = []

    @jax.jit
    def step(params, state, inputs, labels):
        loss_fn = optax_sam.Objective(apply_fn, inputs, labels, microbatch_size=microbatch_size)
        grads = jax.grad(loss_fn)(params)
        direction, state = tx.update(grads, state, params, loss_fn=loss_fn)
        return optax.apply_updates(params, optax.tree.scale(-0.1, direction)), state, direction

    for t in range(steps):
        params, state, direction = step(params, state, *batches[t % 3])
        directions.append(jax.flatten_util.ravel_pytree(direction)[0])
    return np.array(directions)


def run_reference(reference, steps=STEPS):
    _, w, forward, batches = setup()
    directions = []
    for t in range(steps):
        direction = reference.direction(references.Problem(forward, *batches[t % 3]), w)
        directions.append(np.asarray(direction))
        w = w - 0.1 * direction
    return np.array(directions)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", METHODS)
def test_method_is_the_obvious_one(name):
    options = {"deterministic": True} if name.startswith("ncsam") else {}
    ours = run_ours(METHODS[name].make(RHO, **options))
    np.testing.assert_allclose(
        ours, run_reference(references.METHODS[name](RHO)), rtol=1e-11, atol=1e-12
    )


class SeveralSteps(references.SAM):
    def direction(self, problem, w):
        climbed = w
        for _ in range(3):
            climbed = climbed + references.towards(problem.grad(climbed), self.rho / 3)
        return problem.grad(climbed)


class PartOfTheBatch(references.SAM):
    def direction(self, problem, w):
        ascent = problem.on(np.arange(3)).grad(w)
        return problem.grad(w + references.towards(ascent, self.rho))


class StepsOnAPart(references.SAM):
    """Every step of the climb sees the same first examples."""

    def direction(self, problem, w):
        part, climbed = problem.on(np.arange(3)), w
        for _ in range(3):
            climbed = climbed + references.towards(part.grad(climbed), self.rho / 3)
        return problem.grad(climbed)


class Groups(references.SAM):
    def direction(self, problem, w):
        parts = [problem.on(np.arange(start, start + 4)) for start in range(0, 12, 4)]
        return sum(references.SAM(self.rho).direction(part, w) for part in parts) / 3


class GroupsOfJSAM(references.JSAM):
    def direction(self, problem, w):
        parts = [problem.on(np.arange(start, start + 4)) for start in range(0, 12, 4)]
        return sum(references.JSAM(self.rho).direction(part, w) for part in parts) / 3


class EveryThird(references.SAM):
    step = 0

    def direction(self, problem, w):
        self.step += 1
        return super().direction(problem, w) if self.step % 3 == 1 else problem.grad(w)


class EveryThirdSANER(references.METHODS["saner"]):
    """The combination belongs to the steps with a second gradient."""

    step = 0

    def direction(self, problem, w):
        self.step += 1
        return super().direction(problem, w) if self.step % 3 == 1 else problem.grad(w)


class DecoupledEveryThird(references.DecoupledWSAM):
    """The momentum sees the steps between, too."""

    step = 0

    def direction(self, problem, w):
        self.step += 1
        if self.step % 3 == 1:
            return super().direction(problem, w)
        self.momentum = 0.9 * self.momentum + problem.grad(w)
        return self.momentum


class LastLayerSANER(references.SAM):
    """Down-weights in the output kernel, the last 18 coordinates."""

    def direction(self, problem, w):
        plain = super().direction(problem, w)
        down_weighted = references.with_saner(references.SAM)(self.rho).direction(problem, w)
        return jnp.concatenate([plain[:-18], down_weighted[-18:]])


def is_large(c):
    return optax_sam.gradient_norm_is_large(optax.linear_schedule(c, -1.0, 6), decay=0.6)


class AESAM(references.SAM):
    """A second gradient where the first one is long for this stage of the training."""

    step = mean = variance = 0

    def is_due(self, g):
        threshold = 1.0 - 2.0 * self.step / 6
        self.step += 1
        self.mean = 0.6 * self.mean + 0.4 * jnp.sum(g**2)
        self.variance = 0.6 * self.variance + 0.4 * (jnp.sum(g**2) - self.mean) ** 2
        return jnp.sum(g**2) >= self.mean + threshold * jnp.sqrt(self.variance)

    def direction(self, problem, w):
        g = problem.grad(w)
        return super().direction(problem, w) if self.is_due(g) else g


class AELookSAM(AESAM):
    def direction(self, problem, w):
        g = problem.grad(w)
        if not self.is_due(g):
            return g + 0.7 * references.towards(self.v, references.length(g))
        perturbed = references.SAM(self.rho).direction(problem, w)
        unit = references.towards(g, 1)
        self.v = perturbed - jnp.dot(perturbed, unit) * unit
        return perturbed


def is_output(params):
    return {name: name == "out" for name in params}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("make", "reference"),
    [
        (lambda: optax_sam.sam(RHO, when=is_large(1.0)), AESAM),
        (lambda: optax_sam.looksam(RHO, every_k=1, when=is_large(1.0)), AELookSAM),
        (
            lambda: optax_sam.wsam(RHO, base=optax.trace(0.9), every_k=3),
            DecoupledEveryThird,
        ),
        (
            lambda: optax_sam.sam(RHO, combination=optax_sam.down_weight(0.5, mask=is_output)),
            LastLayerSANER,
        ),
        (lambda: optax_sam.sam(RHO, ascent_steps=3), SeveralSteps),
        (lambda: optax_sam.sam(RHO, ascent_fraction=0.25), PartOfTheBatch),
        (lambda: optax_sam.sam(RHO, ascent_fraction=1.0), references.SAM),
        (lambda: optax_sam.sam(RHO, ascent_steps=1), references.SAM),
        (lambda: optax_sam.sam(RHO, ascent_steps=3, ascent_fraction=0.25), StepsOnAPart),
        (lambda: optax_sam.sam(RHO, group_size=4), Groups),
        (lambda: optax_sam.saner(RHO, group_size=4), references.with_saner(Groups)),
        (lambda: optax_sam.sam(RHO, every_k=3), EveryThird),
        (lambda: optax_sam.saner(RHO, every_k=3), EveryThirdSANER),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_option_is_the_obvious_one(make, reference):
    np.testing.assert_allclose(
        run_ours(make()), run_reference(reference(RHO)), rtol=1e-11, atol=1e-12
    )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("make", "size", "reference"),
    [
        (lambda: optax_sam.sam(RHO), 3, references.SAM),
        (lambda: optax_sam.jsam(RHO), 3, references.JSAM),
        (lambda: optax_sam.gsam(RHO), 6, references.GSAM),
        (lambda: optax_sam.sam(RHO, group_size=4), 6, Groups),
        (lambda: optax_sam.jsam(RHO, group_size=4), 4, GroupsOfJSAM),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_microbatches_change_nothing(make, size, reference):
    ours = run_ours(make(), microbatch_size=size)
    np.testing.assert_allclose(ours, run_reference(reference(RHO)), rtol=1e-11, atol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("left", "right"),
    [
        (lambda: optax_sam.gsam(RHO, alpha=0.0), lambda: optax_sam.sam(RHO)),
        (lambda: optax_sam.saner(RHO, alpha=0.0), lambda: optax_sam.sam(RHO)),
        (lambda: optax_sam.wsam(RHO, gamma=0.5), lambda: optax_sam.sam(RHO)),
        (lambda: optax_sam.wsam(RHO, gamma=0.0), lambda: optax.identity()),
        (lambda: optax_sam.functional_sam(RHO), lambda: optax_sam.jsam(RHO)),
        (lambda: optax_sam.le_sam(1e6, RHO), lambda: optax_sam.sam(RHO)),
        (lambda: optax_sam.friendly_sam(RHO, sigma=0.0), lambda: optax_sam.sam(RHO)),
        (lambda: optax_sam.vasso(RHO, theta=1.0), lambda: optax_sam.sam(RHO)),
        (lambda: optax_sam.looksam(RHO, every_k=1), lambda: optax_sam.sam(RHO)),
        (lambda: optax_sam.ncsam(RHO, kappa=0.0), lambda: optax_sam.sam(RHO)),
        (lambda: optax_sam.sam(RHO, group_size=12), lambda: optax_sam.sam(RHO)),
        (
            lambda: optax_sam.ncsam(RHO, warmup_steps=STEPS, warmup="sam"),
            lambda: optax_sam.sam(RHO),
        ),
        (lambda: optax_sam.ncsam(RHO, warmup_steps=STEPS), lambda: optax.identity()),
        (
            lambda: optax_sam.sam(RHO, combination=optax_sam.restrict_to_coordinates("ABC")),
            lambda: optax_sam.sam(RHO),
        ),
        (
            lambda: optax_sam.sam(RHO, combination=optax_sam.restrict_to_coordinates("")),
            lambda: optax.identity(),
        ),
    ],
)
def test_identity(left, right):
    right = optax.with_extra_args_support(right())
    np.testing.assert_allclose(run_ours(left()), run_ours(right), rtol=1e-13, atol=1e-15)


@pytest.mark.usefixtures("x64")
def test_preconditioned_by_the_second_moment_of_the_adam_behind():
    params, w, forward, batches = setup()
    preconditioner = optax_sam.scale_by_second_moment()
    tx = optax.chain(
        optax_sam.functional_sam(RHO, preconditioner=preconditioner), optax.adam(0.1, b2=0.9)
    )
    state = tx.init(params)

    @jax.jit
    def step(params, state, inputs, labels):
        loss_fn = optax_sam.Objective(apply_fn, inputs, labels)
        grads, moment = jax.grad(loss_fn)(params), optax.tree.get(state, "nu")
        updates, state = tx.update(grads, state, params, loss_fn=loss_fn, second_moment=moment)
        return optax.apply_updates(params, updates), state

    first = second = np.zeros_like(w)
    for t in range(1, 5):
        problem = references.Problem(forward, *batches[t % 3])
        g = np.asarray(problem.grad(w))
        epsilon = references.towards(g / (np.sqrt(second) + 1e-8), RHO)
        d = np.asarray(problem.product(w + epsilon, w))
        first, second = 0.9 * first + 0.1 * d, 0.9 * second + 0.1 * d**2
        w = w - 0.1 * first / (1 - 0.9**t) / (np.sqrt(second / (1 - 0.9**t)) + 1e-8)
        params, state = step(params, state, *batches[t % 3])
        ours = jax.flatten_util.ravel_pytree(params)[0]
        np.testing.assert_allclose(ours, w, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("rho", [0.1, 0.7])
def test_quadratic_in_closed_form(rho):
    """L = w' H w / 2 gives g' = g + rho H g / |g|."""
    root = np.random.default_rng(0).normal(size=(5, 5))
    hessian = jnp.asarray(root @ root.T)
    w = jnp.arange(1.0, 6.0)
    g = hessian @ w
    tx = optax_sam.sam(rho)
    d, state = tx.update(g, tx.init(w), w, loss_fn=lambda w: w @ hessian @ w / 2)
    np.testing.assert_allclose(d, g + rho * hessian @ g / jnp.linalg.norm(g), rtol=1e-13)
    metrics = optax_sam.get_metrics(state)
    perturbed = w + rho * g / jnp.linalg.norm(g)
    np.testing.assert_allclose(metrics["perturbed_loss"], perturbed @ hessian @ perturbed / 2)
    np.testing.assert_allclose(metrics["gradient_norm"], jnp.linalg.norm(g))


@pytest.mark.usefixtures("x64")
def test_ncsam_resumes_with_the_same_flips():
    """The flips depend on the seed and the step alone."""
    same = run_ours(optax_sam.ncsam(RHO, seed=3)), run_ours(optax_sam.ncsam(RHO, seed=3))
    np.testing.assert_array_equal(*same)
    other = run_ours(optax_sam.ncsam(RHO, seed=4))
    assert not np.allclose(same[0], other)


@pytest.mark.usefixtures("x64")
def test_ncsam_schedule_counts_the_warmup():
    """After a warm-up the strength is that of the progress of the whole training."""
    plain = optax_sam.ncsam(RHO, 0.4, total_steps=20, deterministic=True)
    params, _, _, batches = setup()
    loss_fn = optax_sam.Objective(apply_fn, *batches[0])
    grads = jax.grad(loss_fn)(params)

    def fourth(tx):
        state = tx.init(params)
        update = jax.jit(tx.update)
        for _ in range(4):
            updates, state = update(grads, state, params, loss_fn=loss_fn)
        return updates

    late_sgd = optax_sam.ncsam(RHO, 0.4, total_steps=20, deterministic=True, warmup_steps=3)
    late_sam = optax_sam.ncsam(
        RHO, 0.4, total_steps=20, deterministic=True, warmup_steps=3, warmup="sam"
    )
    rare = optax_sam.ncsam(RHO, 0.4, total_steps=20, deterministic=True, every_k=3)
    for tx in (late_sgd, late_sam, rare):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-14), fourth(tx), fourth(plain)
        )
