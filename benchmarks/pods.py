"""One complete training step, compiled for chips that need not be there, and what is known of it."""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import optax
from jax.sharding import NamedSharding, PartitionSpec

import optax_sam
from benchmarks import layouts
from benchmarks.chips import CHIPS, roofline
from benchmarks.compiled_text import Program, count_once
from benchmarks.pod_networks import PodNetwork
from benchmarks.training_steps import (
    RHO,
    ROWS,
    Row,
    grouped,
    ours,
    sam_by_hand_with_both_losses,
    saner_by_hand,
)

Record = dict[str, Any]

ADAMS = optax.scale_by_rms(0.999, eps_in_sqrt=False, bias_correction=True)  # its second moment

# What is of interest on pods only: what lies where, and groups that fit a chip's part.
STEPS = ROWS | {
    "functional_sam, preconditioned, logits passed": Row(
        ours(optax_sam.functional_sam, RHO, preconditioner=ADAMS, pass_logits=True)
    ),
    "le_sam": Row(ours(optax_sam.le_sam, 0.1, rho_max=RHO)),
    "stable_sam": Row(ours(optax_sam.stable_sam, RHO)),
    "wsam, decoupled": Row(ours(optax_sam.wsam, RHO, base=optax.trace(0.9))),
    "ncsam, flip ratio 0.2 by weights, logits passed": Row(
        ours(optax_sam.ncsam, RHO, flip_ratio=0.2, by_weights=True, pass_logits=True)
    ),
    "SAM by hand, both losses": Row(sam_by_hand_with_both_losses),
    "sam, perturbed loss": Row(ours(optax_sam.sam, RHO, perturbed_loss=True)),
    "SANER by hand": Row(saner_by_hand),
    "m-SAM, m = 8": grouped(optax_sam.sam, 8),
    "1-SAM, one example per chip at a time": grouped(optax_sam.sam, 1)._replace(at_once=1),
}

# Otherwise a product of sharded matrices becomes a loop that passes pieces around, whose rounds the
# text does not tell; with it the chips gather first, and every collective can be counted.
TPU_OPTIONS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


class Cell(NamedTuple):
    """What is compiled: a name of every list."""

    network: str
    layout: str
    chip: str
    chips: int
    step: str


def compile_cell(cell: Cell, network: PodNetwork, devices: Sequence[Any]) -> Record:
    """Compiles a step; nothing is executed, and no array exists.

    FLOPs, bytes, memory and collectives are those of one chip. What does not fit into the memory of
    the chip has an ``error`` in their place.
    """
    record: Record = cell._asdict() | {"batch": network.per_chip * len(devices)}
    started = time.process_time()
    try:
        program = compile_step(cell, network, devices)
    except jax.errors.JaxRuntimeError as error:
        return record | {"error": first_line(error)}
    record["compile"] = time.process_time() - started
    sizes, costs = program.memory_analysis(), program.cost_analysis()
    text = Program(program.as_text())
    found = text.collectives()
    flops, accessed = (
        costs[measure] * text.in_loops(count_once(measure))
        for measure in ("flops", "bytes accessed")
    )
    results = sizes.output_size_in_bytes - sizes.alias_size_in_bytes
    sent = sum(one.times * one.sent for one in found)
    seconds, slowest = roofline(CHIPS[cell.chip], flops, accessed, sent)
    return record | {
        "flops": flops,
        "bytes": accessed,
        "temporary": sizes.temp_size_in_bytes,
        "memory": sizes.temp_size_in_bytes + sizes.argument_size_in_bytes + results,
        "sent": sent,
        "roofline": seconds,
        "slowest": slowest,
        "collectives": [list(one) for one in found],
    }


def compile_step(cell: Cell, network: PodNetwork, devices: Sequence[Any]) -> Any:
    """The compiled step, with the parameters and states that it replaces donated."""
    mesh = layouts.mesh_of(cell.layout, devices)
    batch = network.per_chip * len(devices)
    examples = (
        jax.ShapeDtypeStruct((batch, *network.shape), network.dtype),
        jax.ShapeDtypeStruct((batch, *network.label_shape), "int32"),
    )
    one = jax.ShapeDtypeStruct((1, *network.shape), network.dtype)
    variables = jax.eval_shape(network.module.init, jax.random.key(0), one)
    params = layouts.shard_parameters(cell.layout, mesh, variables["params"])
    stats = layouts.whole(mesh, variables.get("batch_stats", {}))
    module, row = network.module, STEPS[cell.step]
    if "batch" in module.__dataclass_fields__:  # of groups, spmd_axis_name says where they lie
        spec = PartitionSpec() if row.separates else PartitionSpec("data")
        module = module.clone(batch=NamedSharding(mesh, spec))
    options: dict[str, Any] = {}
    if row.separates:  # said here, as JAX's own backend is a CPU, whose default is fewer at a time
        at_once = row.at_once or network.per_chip
        options = {"microbatch_size": at_once * len(devices), "spmd_axis_name": "data"}
    init, step = row.build(module, base=network.optimizer, **options)
    state = layouts.shard_state(mesh, jax.eval_shape(init, params), params)
    carried = (params, stats, state)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, carried)
    jitted = jax.jit(step, donate_argnums=(0, 1, 2), out_shardings=(*shardings, None))
    of_compiler = TPU_OPTIONS if mesh.devices.flat[0].platform == "tpu" else None
    return jitted.lower(*carried, *layouts.shard_batch(mesh, examples)).compile(of_compiler)


def first_line(error: Exception) -> str:
    """What the compiler says, without its report."""
    return str(error).strip().splitlines()[0][:300]
