"""What a training step costs, as a multiple of the plain SGD step.

    python benchmarks/cost.py                  # compiled FLOPs and memory, deterministic
    python benchmarks/cost.py --time           # and wall clock, interleaved

Every row is one complete jitted training step (loss, gradients, method, SGD with momentum, new
parameters). FLOPs and peak temporary memory are those of the compiled program; wall clock is the median
over interleaved rounds, so that a drift of the machine's speed meets every row alike.
"""

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import optax

import optax_sam
from optax_sam.linen import capture_layer_input


class MLP(nn.Module):
    """Two hidden layers of 512 units."""

    @nn.compact
    def __call__(self, x, train: bool = True):
        x = x.reshape(x.shape[0], -1)
        for _ in range(2):
            x = nn.relu(nn.Dense(512)(x))
        return nn.Dense(10)(x)


class CNN(nn.Module):
    """Six 3 × 3 convolutions in three resolutions, with GroupNorm or BatchNorm."""

    norm: str = "group"

    @nn.compact
    def __call__(self, x, train: bool = True):
        for width in (32, 64, 128):
            for _ in range(2):
                x = nn.Conv(width, (3, 3), use_bias=False)(x)
                if self.norm == "group":
                    x = nn.GroupNorm(8)(x)
                else:
                    x = nn.BatchNorm(use_running_average=not train)(x)
                x = nn.relu(x)
            x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(10)(x.mean((1, 2)))


NETWORKS = {
    "MLP": MLP(),
    "CNN, GroupNorm": CNN("group"),
    "CNN, BatchNorm": CNN("batch"),
}

LAST_LAYER = {"MLP": "Dense_2", "CNN, GroupNorm": "Dense_0", "CNN, BatchNorm": "Dense_0"}


class Row(NamedTuple):
    """A method, and what the training step does for it.

    Attributes:
      method: the transformation in front of the base optimizer.
      pass_logits: the step hands its logits on.
      perturbed_loss: the step reports the metric in place of the loss at w.
    """

    method: optax.GradientTransformation
    pass_logits: bool = False
    perturbed_loss: bool = False


METHODS = {
    "sam": Row(optax_sam.sam(0.05)),
    "asam": Row(optax_sam.asam(0.5)),
    "saner": Row(optax_sam.saner(0.05)),
    "jsam": Row(optax_sam.jsam(0.05)),
    "jsam, logits passed": Row(optax_sam.jsam(0.05), pass_logits=True),
    "lsam": Row(optax_sam.lsam(0.05)),
    "ncsam, flip ratio 0.2, logits passed": Row(
        optax_sam.ncsam(0.05, flip_ratio=0.2), pass_logits=True
    ),
    "gsam": Row(optax_sam.gsam(0.05)),
    "friendly_sam": Row(optax_sam.friendly_sam(0.05)),
    "vasso": Row(optax_sam.vasso(0.05)),
    "wsam": Row(optax_sam.wsam(0.05)),
    "looksam, every 5 (wall clock: mean)": Row(optax_sam.looksam(0.05, every_k=5)),
    "sam, every 5 (wall clock: mean)": Row(optax_sam.sam(0.05, every_k=5)),
    "msam": Row(optax_sam.msam(1.0)),
    "msam, reporting the perturbed loss": Row(optax_sam.msam(1.0), perturbed_loss=True),
    "sam, ascent on a quarter": Row(optax_sam.sam(0.05, ascent_fraction=0.25)),
    "sam, two ascent steps": Row(optax_sam.sam(0.05, ascent_steps=2)),
}


def base_optimizer() -> optax.GradientTransformation:
    """The optimizer behind every method."""
    return optax.sgd(0.1, momentum=0.9)


def problem(network: nn.Module, batch_size: int):
    """Parameters, batch statistics, inputs and labels of a random problem."""
    keys = jax.random.split(jax.random.key(0), 3)
    inputs = jax.random.normal(keys[0], (batch_size, 32, 32, 3))
    labels = jax.random.randint(keys[1], (batch_size,), 0, 10)
    variables = network.init(keys[2], inputs[:1])
    return variables["params"], variables.get("batch_stats", {}), inputs, labels


def objective_of(network: nn.Module, statistics_, inputs, labels) -> optax_sam.Objective:
    """The network's loss; new batch statistics are the auxiliary output."""

    def apply_fn(params, x):
        logits, updated = network.apply(
            {"params": params, "batch_stats": statistics_}, x, mutable=["batch_stats"]
        )
        return logits, updated.get("batch_stats", {})

    return optax_sam.Objective(apply_fn, inputs, labels, has_aux=True)


def sgd_step(network: nn.Module) -> tuple[Callable, Callable]:
    """The plain step: what every ratio is relative to."""
    tx = base_optimizer()

    def step(params, stats, state, inputs, labels):
        objective = objective_of(network, stats, inputs, labels)
        (loss, stats), grads = jax.value_and_grad(objective, has_aux=True)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), stats, state, loss

    return tx.init, step


def hand_written_step(network: nn.Module) -> tuple[Callable, Callable]:
    """SAM as one writes it by hand: the floor."""
    tx = base_optimizer()

    def step(params, stats, state, inputs, labels):
        objective = objective_of(network, stats, inputs, labels)
        (loss, new_stats), grads = jax.value_and_grad(objective, has_aux=True)(params)
        scale = 0.05 / optax.tree.norm(grads)
        perturbed = jax.tree.map(lambda p, g: p + scale * g, params, grads)
        grads = jax.grad(objective, has_aux=True)(perturbed)[0]
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), new_stats, state, loss

    return tx.init, step


def optax_contrib_step(network: nn.Module, opaque: bool) -> tuple[Callable, Callable]:
    """``optax.contrib.sam``: opaque is one call with two gradients, transparent two calls."""
    adversary = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
    tx = optax.contrib.sam(base_optimizer(), adversary, sync_period=2, opaque_mode=opaque)

    def step(params, stats, state, inputs, labels):
        objective = objective_of(network, stats, inputs, labels)

        def grad_fn(p, _):
            return jax.grad(objective, has_aux=True)(p)[0]

        (loss, new_stats), grads = jax.value_and_grad(objective, has_aux=True)(params)
        if opaque:
            updates, state = tx.update(grads, state, params, grad_fn=grad_fn)
            return optax.apply_updates(params, updates), new_stats, state, loss
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        updates, state = tx.update(grad_fn(params, None), state, params)
        return optax.apply_updates(params, updates), new_stats, state, loss

    return tx.init, step


def penalized_step(network: nn.Module, last_layer: str) -> tuple[Callable, Callable]:
    """SGD with the penalty that stands in for J-SAM."""
    tx = base_optimizer()
    apply_fn = capture_layer_input(network, last_layer)

    def step(params, stats, state, inputs, labels):
        def loss_fn(params):
            variables = {"params": params, "batch_stats": stats}
            (logits, new), hidden = apply_fn(variables, inputs, mutable=["batch_stats"])
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            penalty = optax_sam.last_layer_penalty(
                hidden,
                params[last_layer]["kernel"],
                activation_coefficient=0.01,
                weight_coefficient=0.01,
            )
            return losses.mean() + penalty, new.get("batch_stats", {})

        (loss, new_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), new_stats, state, loss

    return tx.init, step


def method_step(network: nn.Module, row: Row) -> tuple[Callable, Callable]:
    """A method of this package in front of the base optimizer."""
    tx = optax.chain(row.method, base_optimizer())

    def step(params, stats, state, inputs, labels):
        objective = objective_of(network, stats, inputs, labels)

        def loss_fn(params):
            logits, stats = objective.logits_and_aux(params)
            return objective.loss_from_logits(logits), (logits, stats)

        (loss, (logits, stats)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        extra = {"logits": logits} if row.pass_logits else {}
        updates, state = tx.update(grads, state, params, loss_fn=objective, **extra)
        if row.perturbed_loss:
            loss = optax_sam.get_metrics(state)["perturbed_loss"]
        return optax.apply_updates(params, updates), stats, state, loss

    return tx.init, step


def rows_of(network: nn.Module, last_layer: str) -> dict[str, tuple[Callable, Callable]]:
    """The steps that are compared."""
    rows = {
        "SGD": sgd_step(network),
        "SAM by hand": hand_written_step(network),
        "optax.contrib.sam, opaque": optax_contrib_step(network, opaque=True),
        "optax.contrib.sam, transparent": optax_contrib_step(network, opaque=False),
    }
    for name, row in METHODS.items():
        rows[name] = method_step(network, row)
    rows["SGD with the last-layer penalty"] = penalized_step(network, last_layer)
    return rows


class Training:
    """A compiled step that goes on from its own results, as training does."""

    def __init__(self, compiled: Callable, arguments: tuple):
        self.compiled, self.arguments = compiled, arguments

    def __call__(self) -> None:
        params, stats, state, inputs, labels = self.arguments
        params, stats, state, loss = self.compiled(params, stats, state, inputs, labels)
        jax.block_until_ready((params, loss))
        self.arguments = (params, stats, state, inputs, labels)


def measure(name: str, batch_size: int, timed: bool, rounds: int) -> list[dict]:
    """One result per row: FLOPs, temporary memory and, if asked for, wall clock."""
    network = NETWORKS[name]
    params, stats, inputs, labels = problem(network, batch_size)
    results, calls = [], {}
    for row_name, (init, step) in rows_of(network, LAST_LAYER[name]).items():
        arguments = (params, stats, init(params), inputs, labels)
        started = time.perf_counter()
        compiled = jax.jit(step).lower(*arguments).compile()
        results.append(
            {
                "step": row_name,
                "flops": compiled.cost_analysis()["flops"],
                "memory": compiled.memory_analysis().temp_size_in_bytes,
                "compile_seconds": time.perf_counter() - started,
            }
        )
        calls[row_name] = Training(compiled, arguments)
    if timed:
        samples: dict[str, list[float]] = {name: [] for name in calls}
        for round_ in range(rounds + 1):
            for name, call in calls.items():
                started = time.perf_counter()
                call()
                if round_:  # the first round warms up
                    samples[name].append(time.perf_counter() - started)
        for result in results:
            # A step that skips most of its second gradients has no typical duration.
            average = statistics.mean if "mean" in result["step"] else statistics.median
            result["seconds"] = average(samples[result["step"]])
    return results


def ratios(results: list[dict]) -> list[dict]:
    """Every figure relative to the SGD row, which comes first."""
    base = results[0]
    return [
        {"step": r["step"]} | {key: r[key] / base[key] for key in r if key != "step"}
        for r in results
    ]


def markdown(network: str, rows: list[dict]) -> str:
    """The ratios as a Markdown table."""
    titles = {
        "flops": "FLOPs",
        "memory": "temporary memory",
        "compile_seconds": "compile time",
        "seconds": "wall clock",
    }
    keys = [key for key in rows[0] if key != "step"]
    lines = [
        f"| {network} | " + " | ".join(titles[key] for key in keys) + " |",
        "|---|" + "---|" * len(keys),
    ]
    for row in rows:
        lines.append(f"| {row['step']} | " + " | ".join(f"{row[key]:.2f}" for key in keys) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> list[dict]:
    """Measures, prints the tables and writes the CSV."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch-size", type=int, default=128, help="examples in a step")
    parser.add_argument("--network", choices=[*NETWORKS, "all"], default="all")
    parser.add_argument("--time", action="store_true", help="also measure the wall clock")
    parser.add_argument("--rounds", type=int, default=10, help="interleaved rounds of timing")
    parser.add_argument("--output", type=Path, help="CSV file for the ratios")
    options = parser.parse_args(arguments)
    device = jax.devices()[0]
    print(
        f"jax {jax.__version__} on {device.platform} ({device.device_kind}), "
        f"batch {options.batch_size}; ratios to the SGD step\n"
    )
    table = []
    for name in NETWORKS:
        if options.network in (name, "all"):
            rows = ratios(measure(name, options.batch_size, options.time, options.rounds))
            print(markdown(name, rows) + "\n")
            table += [{"network": name} | row for row in rows]
    if options.output:
        with options.output.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(table[0]))
            writer.writeheader()
            writer.writerows(table)
    return table


if __name__ == "__main__":
    main(sys.argv[1:])
