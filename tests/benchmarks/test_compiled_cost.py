"""What the methods cost in compiled FLOPs: the numbers that the design promises, on small networks.

FLOPs are deterministic, so they can be asserted where wall clock cannot. The networks compile in a
second or two, and their batches are large enough that the methods' arithmetic on the parameters is
below one percent of a gradient.
"""

import functools

import flax.linen as nn
import jax
import pytest

import optax_sam
from benchmarks import measure
from benchmarks.architectures import CNN, MLP, Network, random_problem
from benchmarks.training_steps import RHO, ROWS, Row, ours

pytestmark = pytest.mark.programs  # a step of CI
PERCEPTRON = Network(MLP(64, depth=4), (2, 2, 3), 1024)
CONVOLUTIONS = {
    norm: Network(CNN(norm, width=16, depth=1), (16, 16, 3), 16) for norm in ("group", "batch")
}
problem_of = functools.cache(random_problem)


class OneConvolution(nn.Module):
    """The per-example path of a convolution is a loop over groups of examples."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), use_bias=False)(x))
        return nn.Dense(10, name="head")(x.mean((1, 2)))


@functools.cache
def flops_of(step: str, network: Network) -> float:
    return measure.compile_step(ROWS[step], network, problem_of(network), quickly=True)[0].flops


def ratio_to_sgd(step: str, network: Network) -> float:
    return flops_of(step, network) / flops_of("SGD", network)


# A gradient is a forward pass and two such for the backward pass. By hand SAM is 2.00 exactly.
@pytest.mark.parametrize(
    ("step", "low", "high"),
    [
        ("SAM by hand", 1.98, 2.01),
        ("sam", 1.98, 2.02),
        ("asam", 1.98, 2.02),
        ("saner", 1.98, 2.02),
        ("gsam", 1.98, 2.02),
        ("friendly_sam", 1.98, 2.02),
        ("vasso", 1.98, 2.02),
        ("wsam", 1.98, 2.02),
        ("msam, perturbed loss", 0.98, 1.02),
        # The loss at w is a forward pass of its own.
        ("msam", 1.30, 1.37),
        ("SGD, last-layer penalty", 0.98, 1.05),
        # One gradient at w + ε, a quarter of one at w, and the forward pass for the reported loss.
        ("sam, ascent on a quarter", 1.55, 1.62),
        ("sam, two ascent steps", 2.97, 3.02),
    ],
)
def test_dense_layers(step, low, high):
    assert low <= ratio_to_sgd(step, PERCEPTRON) <= high


# The methods that take a gradient apart. With dense layers XLA would find what they compute twice.
@pytest.mark.parametrize(
    ("step", "low", "high"),
    [
        ("sam", 1.98, 2.02),
        ("jsam, logits passed", 1.98, 2.02),
        ("lsam", 1.96, 2.02),
        ("ncsam, flip ratio 0.2, logits passed", 2.15, 2.25),
        # The logits at w, computed twice: what passing them on saves.
        ("jsam", 2.2, 2.34),
    ],
)
def test_group_norm(step, low, high):
    assert low <= ratio_to_sgd(step, CONVOLUTIONS["group"]) <= high


@pytest.mark.parametrize(
    ("step", "low", "high"),
    [
        ("sam", 1.98, 2.02),
        ("jsam, logits passed", 1.98, 2.02),
        # The batch statistics need the forward pass at w, whichever loss is reported.
        ("msam, perturbed loss", 1.30, 1.37),
    ],
)
def test_batch_norm(step, low, high):
    assert low <= ratio_to_sgd(step, CONVOLUTIONS["batch"]) <= high


@pytest.mark.parametrize(
    ("network", "low", "high"),
    [
        (PERCEPTRON, 1.0, 1.05),
        # With normalization layers the compiler does not find that the two forward passes are one.
        (CONVOLUTIONS["group"], 1.25, 1.34),
    ],
    ids=["dense", "group norm"],
)
def test_a_perturbation_of_the_output_layer_only(network, low, high):
    def is_output_kernel(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: jax.tree_util.keystr(path).endswith("['head']['kernel']"), params
        )

    row = Row(ours(optax_sam.sam, RHO, mask=is_output_kernel))
    cost, _ = measure.compile_step(row, network, problem_of(network), quickly=True)
    assert low <= cost.flops / flops_of("SGD", network) <= high


@pytest.mark.parametrize(
    ("step", "module"), [("sam, microbatches of 16", MLP(16)), ("1-SAM", OneConvolution())]
)
def test_all_rounds_of_a_loop_are_counted(step, module):
    """XLA counts the body once, which would make a larger batch as cheap as a microbatch."""
    once, twice = (flops_of(step, Network(module, (6, 6, 3), size)) for size in (16, 32))
    assert twice == pytest.approx(2 * once, rel=0.1)


def test_what_differs_from_step_to_step_is_not_counted():
    network = Network(MLP(8), (2, 2, 1), 4)
    cost, _ = measure.compile_step(ROWS["sam, every 5"], network, random_problem(network))
    assert cost.flops is None
    assert cost.bytes is None
    assert cost.memory > cost.temporary > 0
