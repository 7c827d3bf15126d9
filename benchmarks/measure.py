"""What a step costs: FLOPs, bytes, memory and compile time, and interleaved wall clock."""

import random
import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from benchmarks.architectures import Network, Problem
from benchmarks.training_steps import Row
from optax_sam._cost import multiplications
from optax_sam._jaxprs import inner_jaxprs, open_and_constants

LOOPS = {"scan", "while"}
BRANCHES = "branches"
# Seconds between two samples: the threads of one library go to sleep before the other's turn.
PAUSE = 0.005
# The machine code does not matter where only FLOPs and memory are asked for.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


class Cost(NamedTuple):
    """What the compiler says of a program; ``None`` is what cannot be counted honestly.

    Attributes:
      flops: floating-point operations of a step.
      bytes: bytes read and written.
      temporary: bytes of temporary memory.
      memory: bytes of memory in all: parameters, optimizer state, batch, results and temporaries.
      compile: seconds to trace, lower and compile.
    """

    flops: float | None
    bytes: float | None
    temporary: float
    memory: float
    compile: float


class Training:
    """A compiled step that goes on from its own results, as training does."""

    def __init__(self, program: Callable[..., Any], arguments: tuple):
        self.program, self.arguments = program, arguments

    def __call__(self) -> None:
        params, stats, state, inputs, labels = self.arguments
        params, stats, state, loss = self.program(params, stats, state, inputs, labels)
        jax.block_until_ready((params, loss))
        self.arguments = (params, stats, state, inputs, labels)


def compile_step(
    row: Row, network: Network, problem: Problem, *, quickly: bool = False
) -> tuple[Cost, Training]:
    """Compiles a row, and says what the compiler knows of it.

    XLA counts the body of a loop once. Where a step loops over microbatches, its FLOPs are those of the
    same step with the whole batch in one, which leaves out the additions between microbatches; its
    bytes are not counted. Of two branches XLA counts the dearer one: a step whose branches differ in
    their matrix products is not counted at all.
    """
    program, arguments, used, seconds = _compiled(row.build(network.module), problem, quickly)
    sizes = program.memory_analysis()
    temporary, results = sizes.temp_size_in_bytes, sizes.output_size_in_bytes
    memory = temporary + sizes.argument_size_in_bytes + results - sizes.alias_size_in_bytes
    costs = program.cost_analysis()
    flops, accessed = costs["flops"], costs["bytes accessed"]
    if used & LOOPS:
        flops, accessed = _flops_without_loop(row, network, problem), None
    elif BRANCHES in used:
        flops, accessed = None, None
    return Cost(flops, accessed, temporary, memory, seconds), Training(program, arguments)


def _flops_without_loop(row: Row, network: Network, problem: Problem) -> float | None:
    whole = row.build(network.module, microbatch_size=network.batch_size)
    program, _, used, _ = _compiled(whole, problem, quickly=True)
    return None if used else program.cost_analysis()["flops"]


def _compiled(step, problem: Problem, quickly: bool):
    """``(program, its arguments, control flow in it, seconds)``.

    As in training, the new parameters and states take the place of the old ones. Without that, the
    memory of the results would serve as scratch space and hide what a method needs.
    """
    init, function = step
    carried = (problem.params, problem.stats, init(problem.params))
    arguments = (*jax.tree.map(jnp.copy, carried), problem.inputs, problem.labels)
    started = time.perf_counter()
    traced = jax.jit(function, donate_argnums=(0, 1, 2)).trace(*arguments)
    options = QUICK if quickly and jax.default_backend() == "cpu" else None
    program = traced.lower().compile(options)
    seconds = time.perf_counter() - started
    used = set(_loops(traced.jaxpr))
    least, most = multiplications(traced.jaxpr)
    return program, arguments, used if least == most else {*used, BRANCHES}, seconds


def _loops(program: Any) -> Iterable[str]:
    """The names of the loops with matrix products in a traced program, at any depth.

    A norm is a loop as well, but its body runs once, as it is counted, unless a square overflows.
    """
    for equation in open_and_constants(program)[0].eqns:
        for _, inner in inner_jaxprs(equation):
            if equation.primitive.name in LOOPS and multiplications(inner).most:
                yield equation.primitive.name
            yield from _loops(inner)


def interleave(calls: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every call in every round; the first round, which warms up, is not counted.

    A round calls each once, in an order of its own: a drift of the machine's speed meets all alike, and
    nobody always runs behind the same neighbour.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    shuffle = random.Random(0)
    for round_ in range(rounds + 1):
        for name in shuffle.sample(list(calls), len(calls)):
            time.sleep(PAUSE)
            started = time.perf_counter()
            calls[name]()
            if round_:
                samples[name].append(time.perf_counter() - started)
    return samples


class Ratio(NamedTuple):
    """A median over rounds and its quartiles; a mean has none."""

    typical: float
    low: float | None = None
    high: float | None = None


def ratio(seconds: list[float], base: list[float], varies: bool = False) -> Ratio:
    """Wall clock relative to another row's in the same round; of what varies, the means' ratio."""
    if varies:
        return Ratio(sum(seconds) / sum(base))
    ratios = [a / b for a, b in zip(seconds, base, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return Ratio(middle, low, high)
