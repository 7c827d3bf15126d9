"""A problem of twelve numbers, and a step of every method written by hand around optax's parts.

Everything runs without ``jit``. The references of ``tests/references`` say what a method does; here
they are given another clean gradient, and a function of ε.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax

import optax_sam
from tests import registry
from tests.references import methods as references

RHO = 0.1
LEARNING_RATE = 0.1
STEPS = 2

# All named methods of the registry, without the crossings with SANER.
METHODS: dict[str, Callable[..., optax.GradientTransformationExtraArgs]] = {
    "sam": optax_sam.sam,
    "asam": optax_sam.asam,
    "saner": optax_sam.saner,
    "jsam": optax_sam.jsam,
    "lsam": optax_sam.lsam,
    "ncsam": functools.partial(optax_sam.ncsam, kappa=0.1, flip_ratio=0.5, deterministic=True),
    "gsam": optax_sam.gsam,
    "friendly_sam": optax_sam.friendly_sam,
    "vasso": optax_sam.vasso,
    "wsam": optax_sam.wsam,
    "looksam": optax_sam.looksam,
    "msam": optax_sam.msam,
    "functional_sam": registry.functional_sam,
    "stable_sam": optax_sam.stable_sam,
    "le_sam": registry.le_sam,
}

Stage = optax.GradientTransformation
Method = optax.GradientTransformation


def with_perturbation(method: str, wrap: Callable[[Stage], Stage], rho: Any = RHO) -> Method:
    """The method with something around, or behind, its first stage."""
    normalized = optax_sam.normalized(rho)
    build = optax_sam.sharpness_aware
    match method:
        case "sam":
            return build(wrap(normalized))
        case "asam":
            return build(wrap(optax_sam.adaptive(rho)))
        case "saner":
            return build(wrap(normalized), combination=optax_sam.down_weight(0.5))
        case "jsam":
            return build(wrap(normalized), evaluation=optax_sam.jacobian_only)
        case "lsam":
            return build(wrap(normalized), evaluation=optax_sam.logit_only)
        case "ncsam":
            compensation = optax_sam.add_noise_compensation(0.1, 0.5, deterministic=True)
            ball = optax_sam.project_to_ball(rho)
            return build(wrap(optax.chain(normalized, compensation, ball)))
        case "gsam":
            return build(wrap(normalized), combination=optax_sam.subtract_orthogonal(0.1))
        case "friendly_sam":
            return build(wrap(optax.chain(optax_sam.subtract_moving_average(), normalized)))
        case "vasso":
            return build(wrap(optax.chain(optax_sam.moving_average(0.2), normalized)))
        case "wsam":
            return build(wrap(normalized), combination=optax_sam.extrapolate(0.9))
        case "looksam":
            reused = optax_sam.reuse_orthogonal(0.7)
            return optax_sam.sometimes(build(wrap(normalized)), every_k=5, otherwise=reused)
        case "msam":
            ascent = optax.chain(optax.trace(0.9), normalized, optax.scale(-1.0))
            return optax_sam.along_previous(build(wrap(ascent)))
        case "functional_sam":
            ascent = optax.chain(registry.ADAMS, normalized)
            return build(wrap(ascent), evaluation=optax_sam.jacobian_only)
        case "stable_sam":
            return build(wrap(normalized), combination=optax_sam.renormalize())
        case "le_sam":
            return build(wrap(optax_sam.loss_budget(0.2, rho)))
    raise KeyError(method)


# --- the problem -----------------------------------------------------------------------------------


cross_entropy = jax.jit(optax.softmax_cross_entropy_with_integer_labels)


@jax.jit
def apply_fn(params: Any, inputs: jax.Array) -> jax.Array:
    """A network with two hidden units and three classes."""
    return jnp.tanh(inputs @ params["hidden"] + params["bias"]) @ params["out"]


@dataclasses.dataclass(frozen=True)
class Step:
    """Where a step is taken: parameters, a batch, and what follows from them."""

    index: int
    params: Any
    inputs: jax.Array
    labels: jax.Array

    @functools.cached_property
    def objective(self) -> optax_sam.Objective:
        """The loss that our method gets."""
        return optax_sam.Objective(apply_fn, self.inputs, self.labels, cross_entropy)

    @functools.cached_property
    def gradients(self) -> Any:
        """The clean gradient."""
        return unflat(self.problem.grad(flat(self.params)))

    @functools.cached_property
    def gradients_per_example(self) -> Any:
        """The clean gradients of the examples, with a leading axis."""
        rows = range(len(self.labels))
        each = [self.problem.on(jnp.array([row])).grad(flat(self.params)) for row in rows]
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(unflat, each))

    @functools.cached_property
    def problem(self) -> references.Problem:
        """The loss that a reference gets."""
        return references.Problem(flat_forward, self.inputs, self.labels)

    @functools.cached_property
    def value(self) -> jax.Array:
        """The clean loss."""
        return references.mean_loss(flat_forward, flat(self.params), self.inputs, self.labels)

    def extra(self, names: tuple[str, ...]) -> dict[str, Any]:
        """The keyword arguments that other transformations ask for."""
        known = {
            "value": lambda: self.value,
            "grad": lambda: self.gradients,
            "value_fn": lambda: value_fn,
            "obj_fn": lambda: self.objective,
        }
        return {name: known[name]() for name in names}


def value_fn(
    params: Any,
    loss_fn: Any,
    logits: Any = None,
    clean_grads: Any = None,
    is_ascent_step: Any = None,
) -> jax.Array:
    """What a line search calls: it must name every extra argument that is in the chain."""
    del logits, clean_grads, is_ascent_step
    value: jax.Array = loss_fn(params)
    return value


@functools.cache
def _start() -> tuple[Any, Callable[[jax.Array], Any]]:
    random = np.random.default_rng(0)
    params = {
        "bias": jnp.asarray(0.1 * random.normal(size=2)),
        "hidden": jnp.asarray(random.normal(size=(2, 2))),
        "out": jnp.asarray(random.normal(size=(2, 3))),
    }
    return params, jax.flatten_util.ravel_pytree(params)[1]


def flat(tree: Any) -> jax.Array:
    """A pytree like the parameters as one vector."""
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def unflat(vector: Any) -> Any:
    """The vector as a pytree like the parameters."""
    return _start()[1](jnp.asarray(vector))


def flat_forward(w: jax.Array, inputs: jax.Array) -> jax.Array:
    """The network as a function of one vector."""
    return apply_fn(_start()[1](w), inputs)


@functools.cache
def steps() -> tuple[Step, ...]:
    """Two steps: other parameters and another batch each, the same for every cell."""
    params, _ = _start()
    found = []
    for index in range(STEPS):
        random = np.random.default_rng(10 + index)
        inputs = jnp.asarray(random.normal(size=(6, 2)))
        labels = jnp.asarray(random.integers(0, 3, size=6))
        found.append(Step(index, params, inputs, labels))
        params = jax.tree.map(lambda p, r=random: p + 0.05 * r.normal(size=p.shape), params)
    return tuple(found)


# --- by hand ---------------------------------------------------------------------------------------


class WithCleanGradient(references.Problem):
    """The problem where the gradient at w is what stands before the method made of it."""

    def __init__(self, problem: references.Problem, w: jax.Array, clean: jax.Array):
        super().__init__(problem.forward, problem.inputs, problem.labels)
        self.w, self.clean = w, clean

    def grad(self, w: jax.Array) -> jax.Array:
        """The gradient that a method asks for."""
        return self.clean if w is self.w else super().grad(w)


class ByHand:
    """A method as its reference, fed with pytrees."""

    def __init__(self, method: str, rho: float = RHO):
        self.reference: Any = references.METHODS[method](rho)
        self.climb: Callable[[references.Problem, Any], Any] = self.reference.epsilon
        self.reference.epsilon = self._epsilon
        self.after_climb: Callable[[Any], Any] = lambda epsilon: epsilon

    def _epsilon(self, problem: references.Problem, w: jax.Array) -> jax.Array:
        return flat(self.after_climb(unflat(self.climb(problem, w))))

    def direction(self, step: Step, clean: Any = None) -> Any:
        """What the method passes on, from the clean gradient or what was made of it."""
        w = flat(step.params)
        clean = step.gradients if clean is None else clean
        problem = WithCleanGradient(step.problem, w, flat(clean))
        return unflat(self.reference.direction(problem, w))


class Applied:
    """A transformation that is fed by hand, one step after the other."""

    def __init__(self, tx: Any, params: Any):
        self.tx = tx if isinstance(tx, optax.MultiSteps) else optax.with_extra_args_support(tx)
        self.state = self.tx.init(params)

    def __call__(self, updates: Any, params: Any, **extra: Any) -> Any:
        updates, self.state = self.tx.update(updates, self.state, params, **extra)
        return updates


def descend(direction: Any) -> Any:
    """SGD."""
    return jax.tree.map(lambda leaf: -LEARNING_RATE * leaf, direction)


def updates_of(
    tx: Any,
    extra: tuple[str, ...] = (),
    *,
    gradients: Callable[[Step], Any] = lambda step: step.gradients,
    params: Callable[[Step], Any] = lambda step: jax.tree.map(jnp.array, step.params),
) -> list[Any]:
    """What a whole optimizer makes of the two steps."""
    apply = Applied(tx, params(steps()[0]))
    return [
        apply(gradients(step), params(step), loss_fn=step.objective, **step.extra(extra))
        for step in steps()
    ]


def distance(left: list[Any], right: list[Any]) -> float:
    """The largest difference, relative to the largest number where that is above one."""
    worst = 0.0
    for one, other in zip(left, right, strict=True):
        if jax.tree.structure(one) != jax.tree.structure(other):
            return float("inf")
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
            a, b = np.asarray(a), np.asarray(b)
            if a.shape != b.shape:
                return float("inf")
            gap = np.abs(a - b) / max(1.0, float(np.max(np.abs(b), initial=0.0)))
            worst = max(worst, float("inf") if np.isnan(gap).any() else float(gap.max()))
    return worst
