"""1-SAM of transformers: layers written out, in a loop, and in a loop that rematerializes them.

The compiler counts the body of a loop once, so the multiplications are counted in the traced program,
with all rounds. The processor time is that of all threads together, which other programs disturb less
than the clock on the wall.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

import optax_sam
from benchmarks import measure
from benchmarks.step_costs import divide
from benchmarks.tables import markdown
from benchmarks.training_steps import RHO
from optax_sam._cost import multiplications

Record = dict[str, Any]


class Block(nn.Module):
    """Attention and a perceptron, each behind a LayerNorm; in the form that ``nn.scan`` asks for."""

    heads: int

    @nn.compact
    def __call__(self, x, _=None):
        width = x.shape[-1]
        mask = nn.make_causal_mask(x[..., 0])
        x = x + nn.MultiHeadDotProductAttention(self.heads)(nn.LayerNorm()(x), mask=mask)
        return x + nn.Dense(width)(nn.gelu(nn.Dense(4 * width)(nn.LayerNorm()(x)))), None


class Transformer(nn.Module):
    """A decoder with a tied embedding."""

    layout: str  # a key of LAYOUTS
    depth: int = 4
    width: int = 256
    heads: int = 4
    vocabulary: int = 1024

    @nn.compact
    def __call__(self, tokens):
        embedding = nn.Embed(self.vocabulary, self.width)
        positions = nn.Embed(tokens.shape[1], self.width)
        x = embedding(tokens) + positions(jnp.arange(tokens.shape[1]))
        block = LAYOUTS[self.layout]
        if block is None:
            for _ in range(self.depth):
                x, _ = Block(self.heads)(x)
        else:
            layers = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=self.depth,
            )
            x, _ = layers(self.heads)(x, None)
        return embedding.attend(nn.LayerNorm()(x))


LAYOUTS = {
    "layers written out": None,
    "layers in a loop": Block,
    "rematerialized layers in a loop": nn.remat(Block, prevent_cse=False),
}


class Case(NamedTuple):
    """A transformer and its batch.

    Attributes:
      module: the network.
      batch_size: examples in a step.
      length: tokens in an example.
    """

    module: Transformer
    batch_size: int = 32
    length: int = 32


CASES = [Case(Transformer(layout)) for layout in LAYOUTS]
CASES += [Case(Transformer("rematerialized layers in a loop"), batch_size=16, length=128)]


def sgd(objective: optax_sam.Objective, params: Any) -> Any:
    """The gradient: what every ratio of multiplications is relative to."""
    return jax.grad(objective)(params)


def method(group_size: int | None = None) -> Callable[[optax_sam.Objective, Any], Any]:
    """The direction of ``sam``."""
    tx = optax_sam.sam(RHO, group_size=group_size)

    def direction(objective: optax_sam.Objective, params: Any) -> Any:
        grads = jax.grad(objective)(params)
        return tx.update(grads, tx.init(params), params, loss_fn=objective)[0]

    return direction


STEPS = {
    "SGD": sgd,
    "sam": method(),
    "1-SAM": method(group_size=1),
}


def measure_layers(case: Case, rounds: int | None, progress: Callable[[str], None]) -> list[Record]:
    """One record per step; None for the rounds leaves the time out."""
    module, tokens = case.module, random_tokens(case)
    params = jax.jit(module.init)(jax.random.key(1), tokens[:1])
    base, calls, records = None, [], []
    for name, direction in STEPS.items():
        progress(f"{module.layout}, {case.length} tokens: compiling {name}")

        def step(params, tokens, direction=direction):
            labels = jnp.roll(tokens, -1, axis=1)
            return direction(optax_sam.Objective(module.apply, tokens, labels), params)

        traced = jax.jit(step).trace(params, tokens)
        program = traced.lower().compile(None if rounds else measure.QUICK)
        count = multiplications(traced.jaxpr).most
        base = base or count
        calls.append(functools.partial(program, params, tokens))
        records.append(
            {"layout": module.layout, "batch": case.batch_size, "tokens": case.length, "step": name}
            | {"multiplications": count / base}
            | {"temporary": program.memory_analysis().temp_size_in_bytes / 2**20}
            | dict.fromkeys(CLOCKS)
        )
    sam = [*STEPS].index("sam")
    memory = records[sam]["temporary"]
    for record in records:
        record |= {"temporary_of_sam": divide(record["temporary"], memory)}
        record |= {f"{clock}_of_sam": None for clock in CLOCKS}
    for clock, samples in (seconds_of(calls, rounds) if rounds else {}).items():
        for record, seconds in zip(records, samples, strict=True):
            record[clock] = statistics.median(seconds)
            # Round by round.
            record[f"{clock}_of_sam"] = measure.ratio(seconds, samples[sam]).typical
    return records


CLOCKS = {"time": time.process_time, "wall": time.perf_counter}
MEASURES = {
    "temporary": "temporary memory / sam",
    "time": "processor time / sam",
    "wall": "wall clock / sam",
}


def random_tokens(case: Case) -> jax.Array:
    """Random text."""
    shape = (case.batch_size, case.length)
    return jax.random.randint(jax.random.key(0), shape, 0, case.module.vocabulary)


def seconds_of(calls: list[Callable[[], Any]], rounds: int) -> dict[str, list[list[float]]]:
    """By each clock, the time of each call in each interleaved round; the first round warms up."""
    samples: dict[str, list[list[float]]] = {clock: [[] for _ in calls] for clock in CLOCKS}
    for round_ in range(rounds + 1):
        for number, call in enumerate(calls):
            started = {clock: read() for clock, read in CLOCKS.items()}
            jax.block_until_ready(call())
            if round_:
                for clock, read in CLOCKS.items():
                    samples[clock][number].append(read() - started[clock])
    return samples


def table(records: list[Record]) -> str:
    """The records in Markdown."""
    keys = ("multiplications", "temporary", *(f"{key}_of_sam" for key in MEASURES))
    titles = ("multiplications / SGD", "temporary memory, MiB", *MEASURES.values())
    rows = [
        [f"{r['layout']}, batch {r['batch']} of {r['tokens']} tokens: {r['step']}"]
        + [r[key] for key in keys]
        for r in records
    ]
    return markdown(["", *titles], rows)
