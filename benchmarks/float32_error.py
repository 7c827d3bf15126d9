"""How exact the per-example path is in float32, next to ``vmap`` over the examples."""

import statistics
from collections.abc import Callable, Iterable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import optax_sam
from benchmarks.architectures import CNN, MLP, Network, ResNet18, objective_of, random_problem
from benchmarks.tables import markdown
from benchmarks.training_steps import RHO, naive_per_example
from optax_sam.per_example import per_example_gradient

Record = dict[str, Any]

BATCH = 8
SEEDS = range(5)
# At a kink (relu, max-pooling) rounding decides which side a value is on; a smooth network has none.
CASES = {
    "MLP, smooth": Network(MLP(activation=nn.tanh), (28, 28, 1), BATCH),
    "MLP": Network(MLP(), (28, 28, 1), BATCH),
    "CNN, smooth": Network(CNN("group", activation=nn.tanh, pool=nn.avg_pool), (32, 32, 3), BATCH),
    "CNN": Network(CNN("group"), (32, 32, 3), BATCH),
    "ResNet-18 of width 16, smooth": Network(
        ResNet18("group", 16, activation=nn.tanh), (32, 32, 3), BATCH
    ),
    "ResNet-18 of width 16": Network(ResNet18("group", 16), (32, 32, 3), BATCH),
}
METHODS = {
    "1-SAM": ("full", optax_sam.full_gradient),
    "1-J-SAM": ("jacobian_only", optax_sam.jacobian_only),
    "1-L-SAM": ("logit_only", optax_sam.logit_only),
}


def measure_errors(name: str, network: Network, seeds: Iterable[int] = SEEDS) -> list[Record]:
    """One record per method: relative errors, medians and worst over random problems.

    The error of a direction is ‖d − d*‖ / ‖d*‖ over all parameters, d* from the naive form in float64.
    """
    naive, ours = directions(network)
    errors: dict[tuple[str, str], list[float]] = {}
    for seed in seeds:
        problem = random_problem(network, seed)
        with jax.enable_x64(True):
            exact = naive(jax.tree.map(widen, problem))
        for form, compute in {"naive": naive, "ours": ours}.items():
            for method, direction in compute(problem).items():
                error = relative_error(direction, exact[method])
                errors.setdefault((method, form), []).append(error)
    return [
        {"network": name, "method": method}
        | {form: statistics.median(errors[method, form]) for form in ("naive", "ours")}
        | {f"{form}_worst": max(errors[method, form]) for form in ("naive", "ours")}
        for method in METHODS
    ]


def directions(network: Network) -> tuple[Callable, Callable]:
    """The naive and our directions of all methods, as functions of a problem."""

    def naive(problem):
        objective = objective_of(network.module, *problem[1:])
        return {
            method: naive_per_example(objective, problem.params, RHO, evaluation)[1]
            for method, (_, evaluation) in METHODS.items()
        }

    def ours(problem):
        objective = objective_of(network.module, *problem[1:])
        return {
            method: per_example_gradient(
                objective, problem.params, RHO, evaluation=evaluation
            ).gradients
            for method, (evaluation, _) in METHODS.items()
        }

    return jax.jit(naive), jax.jit(ours)


def widen(leaf: jax.Array) -> jax.Array:
    """The same numbers in float64."""
    return leaf.astype(jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf


def relative_error(tree: Any, exact: Any) -> float:
    """‖tree − exact‖ / ‖exact‖."""
    leaves = [
        (np.asarray(a, np.float64), np.asarray(b))
        for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(exact), strict=True)
    ]
    difference = sum(np.sum((a - b) ** 2) for a, b in leaves)
    return float(np.sqrt(difference / sum(np.sum(b**2) for _, b in leaves)))


def table(records: list[Record]) -> str:
    """The records in Markdown."""
    header = [
        "network",
        "method",
        "naive vmap",
        "optax_sam",
        "naive vmap, worst",
        "optax_sam, worst",
    ]
    keys = ("naive", "ours", "naive_worst", "ours_worst")
    rows = [[r["network"], r["method"], *(f"{r[key]:.1e}" for key in keys)] for r in records]
    return markdown(header, rows)
