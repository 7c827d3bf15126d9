"""What a perturbation per example (1-SAM) costs, next to one perturbation per batch (SAM).

    python benchmarks/per_example.py                      # MLP, CNN and ResNet, batch 64 and 128
    python benchmarks/per_example.py --full               # and a ResNet-18 of width 64
    python benchmarks/per_example.py --output results.csv # also writes the numbers

Every row is one jitted gradient computation. All rows of a network run in one interleaved loop, so a
drift of the machine's speed meets every row alike; wall clock is the median over the rounds. FLOPs are
those of the compiled program for one chunk of 8 examples, because XLA counts the body of a loop once.
Memory is the compiled program's temporary memory. Only ratios are meant to be compared.
"""

import argparse
import csv
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import optax_sam
from optax_sam.convolutions import canonical_convolutions
from optax_sam.per_example import per_example_gradient

RHO = 0.05
CHUNK = 8  # examples whose FLOPs are counted


class MLP(nn.Module):
    """784-1024-1024-10."""

    @nn.compact
    def __call__(self, x):
        x = x.reshape(x.shape[0], -1)
        for _ in range(2):
            x = nn.relu(nn.Dense(1024)(x))
        return nn.Dense(10)(x)


class CNN(nn.Module):
    """Six 3 × 3 convolutions in three resolutions, with GroupNorm."""

    @nn.compact
    def __call__(self, x):
        for width in (32, 64, 128):
            for _ in range(2):
                x = nn.Conv(width, (3, 3), use_bias=False)(x)
                x = nn.relu(nn.GroupNorm(8)(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(10)(x.mean((1, 2)))


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    width: int
    stride: int

    @nn.compact
    def __call__(self, x):
        def convolution(x, size, stride):
            x = nn.Conv(self.width, (size, size), (stride, stride), use_bias=False)(x)
            return nn.GroupNorm(8)(x)

        y = convolution(nn.relu(convolution(x, 3, self.stride)), 3, 1)
        if x.shape != y.shape:
            x = convolution(x, 1, self.stride)
        return nn.relu(x + y)


class ResNet18(nn.Module):
    """The ResNet-18 for 32 × 32 images, with GroupNorm."""

    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.GroupNorm(8)(nn.Conv(self.width, (3, 3), use_bias=False)(x)))
        for stage in range(4):
            for block in range(2):
                x = Block(self.width * 2**stage, 2 if stage and not block else 1)(x)
        return nn.Dense(10)(x.mean((1, 2)))


NETWORKS = {
    "MLP": (MLP(), (784,)),
    "CNN": (CNN(), (32, 32, 3)),
    "ResNet-18, width 32": (ResNet18(32), (32, 32, 3)),
}
FULL = {"ResNet-18, width 64": (ResNet18(64), (32, 32, 3))}


def sgd(objective, params):
    """The gradient of the batch."""
    return jax.grad(objective)(params)


def climb(params, gradients):
    """``w + ρ g / ‖g‖``."""
    scale = RHO / optax.tree.norm(gradients)
    return jax.tree.map(lambda p, g: p + scale * g, params, gradients)


def sam(objective, params):
    """Batch SAM, by hand."""
    return jax.grad(objective)(climb(params, jax.grad(objective)(params)))


def sam_in_chunks(objective, params):
    """Batch SAM, both gradients accumulated over chunks of 8 in a loop: the caches' share."""

    def gradient(params):
        chunks = objective.groups(CHUNK)

        def one(inputs, labels):
            return jax.grad(objective.replace(inputs=inputs, labels=labels))(params)

        def add(total, chunk):
            return jax.tree.map(jnp.add, total, canonical_convolutions(one)(*chunk)), None

        zeros = jax.tree.map(jnp.zeros_like, params)
        total, _ = jax.lax.scan(add, zeros, (chunks.inputs, chunks.labels))
        return jax.tree.map(lambda leaf: leaf * (CHUNK / objective.batch_size), total)

    return gradient(climb(params, gradient(params)))


def naive_vmap(objective, params):
    """1-SAM with everything per example."""
    groups = objective.groups(1)

    def one(inputs, labels):
        return sam(objective.replace(inputs=inputs, labels=labels), params)

    each = jax.vmap(one)(groups.inputs, groups.labels)
    return jax.tree.map(lambda leaf: leaf.mean(0), each)


def one_at_a_time(objective, params):
    """1-SAM by a loop over the examples, with canonical convolutions."""
    groups = objective.groups(1)

    def one(inputs, labels):
        return sam(objective.replace(inputs=inputs, labels=labels), params)

    def add(total, example):
        return jax.tree.map(jnp.add, total, canonical_convolutions(one)(*example)), None

    zeros = jax.tree.map(jnp.zeros_like, params)
    total, _ = jax.lax.scan(add, zeros, (groups.inputs, groups.labels))
    return jax.tree.map(lambda leaf: leaf / objective.batch_size, total)


def ours(evaluation: str) -> Callable:
    """This package."""

    def gradient(objective, params):
        return per_example_gradient(objective, params, RHO, evaluation=evaluation).gradients

    return gradient


ROWS = {
    "SGD": sgd,
    "SAM": sam,
    "SAM in chunks of 8": sam_in_chunks,
    "1-SAM, naive vmap": naive_vmap,
    "1-SAM, one example at a time": one_at_a_time,
    "1-SAM, optax_sam": ours("full"),
    "1-J-SAM, optax_sam": ours("jacobian_only"),
    "1-L-SAM, optax_sam": ours("logit_only"),
}
LOOPS = ("SAM in chunks of 8", "1-SAM, one example at a time")


def problem(network: nn.Module, shape: tuple[int, ...], batch_size: int):
    """A random objective and parameters."""
    keys = jax.random.split(jax.random.key(0), 3)
    inputs = jax.random.normal(keys[0], (batch_size, *shape))
    labels = jax.random.randint(keys[1], (batch_size,), 0, 10)
    params = network.init(keys[2], inputs[:1])
    return optax_sam.Objective(network.apply, inputs, labels), params


def flops(row: Callable, network: nn.Module, shape: tuple[int, ...]) -> float:
    """FLOPs of the program for one chunk, which contains no loop."""
    compiled = jax.jit(row).lower(*problem(network, shape, CHUNK)).compile()
    return compiled.cost_analysis()["flops"]


def measure(network, shape, batch_size: int, rounds: int, rows: dict[str, Callable]) -> list[dict]:
    """One result per row."""
    arguments = problem(network, shape, batch_size)
    results, programs = [], {}
    for name, row in rows.items():
        started = time.perf_counter()
        compiled = jax.jit(row).lower(*arguments).compile()
        results.append(
            {
                "row": name,
                "compile": time.perf_counter() - started,
                "memory": compiled.memory_analysis().temp_size_in_bytes,
                "flops": None if name in LOOPS else flops(row, network, shape),
            }
        )
        programs[name] = compiled
    samples: dict[str, list[float]] = {name: [] for name in programs}
    for round_ in range(rounds + 1):
        for name, compiled in programs.items():
            started = time.perf_counter()
            jax.block_until_ready(compiled(*arguments))
            if round_:  # the first round warms up
                samples[name].append(time.perf_counter() - started)
    for result in results:
        times = samples[result["row"]]
        result["seconds"] = statistics.median(times)
        result["spread"] = (max(times) - min(times)) / result["seconds"]
    return results


def compare(results: list[dict]) -> list[dict]:
    """The ratios: wall clock and memory to SAM, FLOPs and wall clock to SGD."""
    of = {result["row"]: result for result in results}
    return [
        {
            "row": r["row"],
            "wall clock / SAM": r["seconds"] / of["SAM"]["seconds"],
            "wall clock / SGD": r["seconds"] / of["SGD"]["seconds"],
            "spread": r["spread"],
            "memory / SAM": r["memory"] / of["SAM"]["memory"],
            "FLOPs / SGD": r["flops"] / of["SGD"]["flops"] if r["flops"] else None,
            "compile, s": r["compile"],
        }
        for r in results
    ]


def markdown(title: str, rows: list[dict]) -> str:
    """The rows as a Markdown table."""
    keys = [key for key in rows[0] if key != "row"]
    lines = [f"| {title} | " + " | ".join(keys) + " |", "|---|" + "---:|" * len(keys)]
    for row in rows:
        cells = ["–" if row[key] is None else f"{row[key]:.2f}" for key in keys]
        lines.append(f"| {row['row']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> list[dict]:
    """Measures, prints the tables and writes the CSV."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--networks", nargs="+", choices=[*NETWORKS, *FULL], default=None)
    parser.add_argument("--full", action="store_true", help="add the ResNet-18 of width 64")
    parser.add_argument("--rounds", type=int, default=7, help="interleaved rounds of timing")
    parser.add_argument("--skip", nargs="+", choices=ROWS, default=[], help="rows to leave out")
    parser.add_argument("--output", type=Path, help="CSV file for the ratios")
    options = parser.parse_args(arguments)
    networks = NETWORKS | FULL
    chosen = options.networks or [*NETWORKS, *(FULL if options.full else {})]
    rows = {name: row for name, row in ROWS.items() if name not in options.skip}
    device = jax.devices()[0]
    print(f"jax {jax.__version__} on {device.platform} ({device.device_kind})\n")
    table = []
    for name in chosen:
        for batch_size in options.batch_sizes:
            results = measure(*networks[name], batch_size, options.rounds, rows)
            ratios = compare(results)
            print(markdown(f"{name}, batch {batch_size}", ratios) + "\n", flush=True)
            table += [{"network": name, "batch": batch_size} | row for row in ratios]
            gc.collect()
    if options.output:
        with options.output.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(table[0]))
            writer.writeheader()
            writer.writerows(table)
    return table


if __name__ == "__main__":
    main(sys.argv[1:])
