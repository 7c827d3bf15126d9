"""Two processes of four devices each: what one process with eight devices computes."""

import sys

import chex
import jax
import numpy as np
import pytest

from tests import test_sharding as sharding
from tests.examples.processes import outputs_of_two

CASES = [
    ("sam", "data parallel"),
    ("saner", "fully sharded"),
    ("preconditioned", "explicit axes"),
    ("jsam", "tensor parallel"),
    ("1-SAM", "fully sharded"),
]

PROGRAM = """
import sys

import jax

coordinator, number, folder = sys.argv[1:]
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 4)
jax.distributed.initialize(coordinator, 2, int(number))

import numpy as np
from jax.experimental import multihost_utils

from tests import test_processes, test_sharding

for case, (name, layout) in enumerate(test_processes.CASES):
    test_sharding.test_everything_lies_as_the_parameters_do(name, layout)
    result = test_sharding.after_two_steps(name, layout)
    whole = multihost_utils.process_allgather(result, tiled=True)
    sent = sorted((c.kind, c.size, c.times) for c in test_sharding.collectives(name, layout))
    if number == "0":
        np.savez(f"{folder}/{case}.npz", *jax.tree.leaves(whole))
        open(f"{folder}/{case}.txt", "w").write(repr(sent))
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What the two processes have written."""
    folder = tmp_path_factory.mktemp("processes")
    command = [sys.executable, "-c", PROGRAM]
    outputs_of_two(lambda address, number: [*command, address, number, str(folder)])
    return folder


@pytest.mark.programs
@pytest.mark.parametrize(("name", "layout"), CASES)
def test_two_processes_are_one_with_all_devices(name, layout, results):
    """Updates, parameters, the states with ε in them, and what the devices send each other."""
    case = CASES.index((name, layout))
    with np.load(results / f"{case}.npz") as file:
        actual = [file[key] for key in file.files]
    expected = jax.tree.leaves(sharding.after_two_steps(name, layout))
    chex.assert_trees_all_close(actual, expected, rtol=2e-5, atol=1e-6)
    sent = sorted((c.kind, c.size, c.times) for c in sharding.collectives(name, layout))
    assert (results / f"{case}.txt").read_text() == repr(sent)
