"""The benchmark program: its bookkeeping, and a whole run on tiny networks."""

import csv
import re

import jax
import numpy as np
import pytest

from benchmarks import (
    cost,
    float32_error,
    growth,
    layers,
    measure,
    overhead,
    step_costs,
    tables,
    training_steps,
)
from benchmarks.architectures import CNN, MLP, NETWORKS, Network, ResNet18, random_problem

TINY = Network(MLP(8), (2, 2, 1), batch_size=4, rounds=5)


def test_interleave_calls_each_once_a_round_after_a_warm_up():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    samples = measure.interleave(calls, rounds=4)
    assert {name: len(seconds) for name, seconds in samples.items()} == dict.fromkeys("abc", 4)
    rounds = [order[start : start + 3] for start in range(0, 15, 3)]
    assert all(sorted(round_) == list("abc") for round_ in rounds)
    assert len({tuple(round_) for round_ in rounds}) > 1  # not always behind the same neighbour


def test_a_csv_keeps_small_numbers(tmp_path):
    tables.write_csv(tmp_path / "t.csv", [{"small": 4.8123456789e-07, "large": 123456.0, "n": 3}])
    assert (tmp_path / "t.csv").read_text() == "small,large,n\n4.81235e-07,123456.0,3\n"


def test_a_size_that_axes_share_has_the_rows_of_each_axis():
    """It is measured once, with the rows of all."""
    sizes = {(point.axis, point.value): point for point in growth.points("MLP")}
    batch, width = sizes["batch", 128], sizes["width", 1024]
    assert batch.network == width.network
    costs = {step: measure.Cost(1.0, 1.0, 1.0, 1.0, 1.0) for step in batch.rows}
    base = dict.fromkeys(growth.MEASURES, 1.0)
    of_width = [record["step"] for record in growth._records("MLP", width, costs, {}, base)]
    assert growth.MICROBATCHES in batch.rows
    assert growth.MICROBATCHES not in of_width


def test_ratio_compares_within_a_round():
    drifting = [1.0, 2.0, 4.0]  # the machine slows down; the ratio does not
    assert measure.ratio([2.0, 4.0, 8.0], drifting) == (2.0, 2.0, 2.0)
    assert measure.ratio([1.0, 1.0, 10.0], [1.0, 1.0, 1.0], varies=True) == (4.0, None, None)


def test_rows_respect_the_network_and_the_batch():
    def rows(norm, batch_size):
        return step_costs.rows_for(Network(CNN(norm), (8, 8, 3), batch_size)).keys()

    assert rows("group", 16) == training_steps.ROWS.keys()
    assert not any("-SAM" in name or "microbatch" in name for name in rows("batch", 16))
    assert "m-SAM, m = 4" in rows("group", 8)
    assert "m-SAM, m = 16" not in rows("group", 8)


def test_a_step_goes_on_from_its_own_results():
    problem = random_problem(TINY)
    _, call = measure.compile_step(training_steps.ROWS["sam"], TINY, problem)
    before = np.copy(problem.params["head"]["kernel"])
    call()
    first = np.copy(call.arguments[0]["head"]["kernel"])
    call()
    assert not np.array_equal(first, call.arguments[0]["head"]["kernel"])
    np.testing.assert_array_equal(problem.params["head"]["kernel"], before)  # others use it too


def test_naive_per_example_is_what_the_name_says():
    problem = random_problem(TINY)
    results = {
        name: compute(problem)["1-SAM"]
        for name, compute in zip(("naive", "ours"), float32_error.directions(TINY), strict=True)
    }
    assert float32_error.relative_error(results["ours"], results["naive"]) < 1e-5
    halved = jax.tree.map(lambda leaf: leaf / 2, results["naive"])
    np.testing.assert_allclose(float32_error.relative_error(halved, results["naive"]), 0.5)


def test_interval_of_a_median():
    low, high = overhead.median_interval([float(i) for i in range(1001)])
    assert low == pytest.approx(500 - 0.98 * np.sqrt(1001), abs=1)
    assert high == pytest.approx(500 + 0.98 * np.sqrt(1001), abs=1.5)


@pytest.mark.programs
def test_the_whole_program(tmp_path, monkeypatch, capsys):
    chosen = ("SGD", "sam", "sam, every 5", "1-SAM, naive vmap", "1-SAM")
    monkeypatch.setattr(step_costs, "ROWS", {name: training_steps.ROWS[name] for name in chosen})
    for name in list(NETWORKS):
        monkeypatch.delitem(NETWORKS, name)
    monkeypatch.setitem(NETWORKS, "MLP", TINY)
    sizes = {"batch": (4, 8), "m": (2,)}
    monkeypatch.setattr(growth, "VALUES", {"MLP": sizes})
    monkeypatch.setattr(overhead, "CASES", {"MLP": (TINY, 10)})
    monkeypatch.setattr(float32_error, "CASES", {"MLP": TINY})
    small = layers.Transformer("layers written out", depth=0, width=16, vocabulary=30)
    monkeypatch.setattr(layers, "CASES", [layers.Case(small, batch_size=4, length=3)])
    cost.main(["--everything", "--output", str(tmp_path)])
    assert {path.name for path in tmp_path.iterdir()} == {
        *("machine.md", "mlp.md", "steps.csv", "mlp.svg"),
        *("growth_mlp.md", "growth.csv", "growth_mlp.svg"),
        *("overhead.md", "overhead.csv", "float32_error.md", "float32_error.csv"),
        *("layers.md", "layers.csv"),
    }
    with (tmp_path / "steps.csv").open(newline="") as file:
        rows = {row["step"]: row for row in csv.DictReader(file)}
    assert rows.keys() >= set(chosen)
    assert float(rows["SGD"]["flops"]) == float(rows["SGD"]["wall"]) == 1
    assert rows["sam, every 5"]["flops"] == rows["sam, every 5"]["wall_low"] == ""
    assert float(rows["1-SAM, naive vmap"]["memory"]) > 1
    with (tmp_path / "growth.csv").open(newline="") as file:
        grown = {(r["axis"], r["value"], r["step"]): r for r in csv.DictReader(file)}
    assert float(grown["batch", "4", "SGD"]["sgd_flops"]) == 1
    assert float(grown["batch", "8", "SGD"]["sgd_flops"]) > 1.5
    assert ("m", "2", "m-SAM") in grown
    assert "| sam | " in capsys.readouterr().out
    assert re.search(r"jax \d", (tmp_path / "machine.md").read_text())


def test_a_system_that_does_not_tell_its_memory(monkeypatch):
    def unknown(name):
        raise ValueError(f"unrecognized configuration name {name}")

    monkeypatch.setattr("os.sysconf", unknown)
    assert step_costs.fits(1e30)


def test_rows_of_other_networks_stay(tmp_path):
    """The documentation's command for one network must not delete what another command measured."""
    report = cost.Report(tmp_path)
    for network, flops in (("MLP", 1.0), ("CNN", 2.0), ("MLP", 3.0)):
        report.records("steps", [{"network": network, "flops": flops}])
    with (tmp_path / "steps.csv").open(newline="", encoding="utf-8") as file:
        rows = [(row["network"], float(row["flops"])) for row in csv.DictReader(file)]
    assert rows == [("CNN", 2.0), ("MLP", 3.0)]


def test_rounds_must_cover_all_steps_of_a_period(capsys):
    with pytest.raises(SystemExit):
        cost.main(["--rounds", "7"])
    assert "multiple of 5" in capsys.readouterr().err


class TestTorchPeer:
    """The networks and the formula of the rows that appear where PyTorch is installed."""

    @pytest.fixture
    def torch_peer(self):
        pytest.importorskip("torch")
        from benchmarks import torch_peer

        return torch_peer

    @pytest.mark.parametrize(
        "network",
        [
            Network(MLP(8), (4, 4, 1), 2),
            Network(CNN("group", 8), (8, 8, 3), 2),
            Network(CNN("batch", 8), (8, 8, 3), 2),
            Network(ResNet18("batch", 8), (16, 16, 3), 2),
        ],
        ids=["MLP", "CNN, GroupNorm", "CNN, BatchNorm", "ResNet-18"],
    )
    def test_networks_have_the_same_parameters(self, torch_peer, network):
        shapes = jax.eval_shape(lambda: random_problem(network)).params
        ours = sorted(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(shapes))
        theirs = sorted(p.numel() for p in torch_peer.twin(network).parameters())
        assert theirs == ours

    def test_formula(self, torch_peer):
        torch = torch_peer.torch
        w = torch.tensor([3.0, 4.0], requires_grad=True)
        sam = torch_peer.TwoStepSAM([w], torch.optim.SGD([w], lr=0.1), rho=0.5)
        (w**2).sum().backward()
        sam.first_step()
        w.grad = None
        (w**2).sum().backward()
        sam.second_step()
        np.testing.assert_allclose(w.detach(), [3 - 0.66, 4 - 0.88], rtol=1e-6)

    def test_every_step_trains(self, torch_peer):
        for name, step in torch_peer.steps(TINY, random_problem(TINY)).items():
            losses = [step() for _ in range(10)]
            assert losses[-1] < losses[0], name
