"""The label-noise example: its real loop on tiny settings, and every number it reports."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import report
from config import Config
from data import CONFUSED_DIGITS, NOISE, NUM_TEST, NUM_TRAIN, load_digits
from main import main
from methods import METHODS
from models import MODELS
from train import (
    Epoch,
    TrainState,
    compare,
    evaluate,
    make_optimizer,
    make_train_epoch,
    make_train_step,
)

PROGRAM = Path(__file__).parents[2] / "examples" / "label_noise" / "main.py"
PICTURES = {"label_noise.png", "label_noise.svg", "label_noise_narrow.svg"}
FILES = {"epochs.csv", "results.json", "table.md", ".lock"} | PICTURES


def read_csv(folder):
    with open(folder / "epochs.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.programs
def test_the_real_loop_writes_its_files(tmp_path, capsys):
    config = Config(
        methods=("sgd", "saner"), noise="asymmetric", epochs=2, seeds=(3, 1), output=tmp_path
    )
    main(config)

    assert {path.name for path in tmp_path.iterdir()} == FILES  # and no temporary file is left
    rows = read_csv(tmp_path)
    assert list(rows[0]) == [
        "method",
        "seed",
        "epoch",
        "loss",
        "test_accuracy",
        "clean_fit",
        "memorized",
        "seconds_of_all_seeds",
    ]
    assert [(row["method"], row["epoch"], row["seed"]) for row in rows] == [
        (method, epoch, seed) for epoch in "12" for method in ("sgd", "saner") for seed in "31"
    ]
    for row in rows:
        assert 0 < float(row["loss"]) < 10
        assert float(row["seconds_of_all_seeds"]) > 0
        for share in ("test_accuracy", "clean_fit", "memorized"):
            assert 0 <= float(row[share]) <= 1

    results = json.loads((tmp_path / "results.json").read_text())
    assert results["config"]["rho"] == {"sgd": 0.0, "saner": METHODS["saner"].rho}
    assert results["config"]["noise"] == "asymmetric"
    hashes = load_digits("asymmetric", config.noise_rate, (3, 1)).noise_hashes()
    assert results["labels_sha256"] == dict(zip(("3", "1"), hashes, strict=True))
    assert len(set(hashes)) == 2
    assert {"python", "jax", "flax", "optax", "optax_sam"} <= set(results["versions"])
    assert [(one["method"], one["epoch"]) for one in results["epochs"]] == [
        (method, epoch) for epoch in (1, 2) for method in ("sgd", "saner")
    ]
    assert results["epochs"][0]["loss"] == [float(row["loss"]) for row in rows[:2]]

    assert (tmp_path / "label_noise.png").read_bytes().startswith(b"\x89PNG")
    assert "</svg>" in (tmp_path / "label_noise.svg").read_text()
    table = (tmp_path / "table.md").read_text()
    printed = capsys.readouterr().out
    assert "earlier" not in printed
    for method in ("SGD", "SANER"):
        assert f"| {method} |" in table
        assert method in printed


@pytest.mark.parametrize("noise", sorted(set(NOISE) - {"symmetric"}))
def test_the_real_loop_on_every_kind_of_noise(noise):
    config = Config(methods=("sgd",), noise=noise, epochs=2, seeds=(0,))
    epochs = list(compare(config, load_digits(noise, config.noise_rate, config.seeds)))
    assert [epoch.number for epoch in epochs] == [1, 2]
    assert (epochs[-1].measures["clean_fit"] > epochs[-1].measures["memorized"]).all()


def test_the_same_seeds_give_the_same_results():
    """Also if other seeds run beside them."""

    def measures_of(seeds):
        config = Config(methods=("sam",), epochs=2, seeds=seeds)
        data = load_digits(config.noise, config.noise_rate, seeds)
        return [epoch.measures for epoch in compare(config, data)]

    together, alone = measures_of((0, 5)), measures_of((5,))
    for both, one in zip(together, alone, strict=True):
        assert {name: values[1:].tolist() for name, values in both.items()} == {
            name: values.tolist() for name, values in one.items()
        }
    assert together[1]["loss"][0] != together[1]["loss"][1]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_of_the_table_takes_the_training_step(method):
    model, tx = MODELS["mlp"](), make_optimizer(method, Config(), total_steps=1200)
    inputs, labels = jnp.zeros((8, 8, 8, 1)), jnp.zeros(8, jnp.int32)
    params = jax.eval_shape(model.init, jax.random.key(0), inputs)
    state = TrainState(params, jax.eval_shape(tx.init, params))
    after, loss = jax.eval_shape(make_train_step(model, tx), state, inputs, labels)
    assert loss.shape == ()
    assert jax.tree.all(
        jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype), state, after)
    )


def test_the_optimizer_receives_the_settings():
    config = Config(rho=0.3, alpha=1.0, learning_rate=0.5, weight_decay=0.1)
    tx = make_optimizer("saner", config, total_steps=1)
    params, grads = jnp.array([1.0, 1.0]), jnp.array([0.6, 0.8])

    def loss_fn(w):
        return jnp.sum(jnp.array([0.3, 1.0]) * w)  # 0.3 < 0.6 is down-weighted, 1.0 is not

    updates, opt_state = tx.update(grads, tx.init(params), params, loss_fn=loss_fn)
    np.testing.assert_allclose(optax.tree.get(opt_state, "perturbation_norm"), 0.3, rtol=1e-6)
    np.testing.assert_allclose(updates, [-0.5 * 0.1, -0.5 * 1.1], rtol=1e-6)


def test_measures_by_hand():
    measures = evaluate(
        predictions=np.array([1, 2, 3, 4, 5, 6, 7]),
        labels=np.array([1, 2, 0, 0, 5, 0, 0]),
        changed=np.array([0, 1, 1, 1, 0, 0, 0], bool),
        test_predictions=np.array([0, 1]),
        test_labels=np.array([1, 1]),
    )
    assert measures == {"test_accuracy": 0.5, "clean_fit": 2 / 4, "memorized": 1 / 3}


def test_without_wrong_labels_nothing_is_said_of_them(tmp_path, capsys):
    (tmp_path / "results.json").write_text("{}")
    main(Config(methods=("sgd",), epochs=1, seeds=(0,), noise_rate=0.0, output=tmp_path))
    assert f"{tmp_path} has earlier results. They are rep" in capsys.readouterr().out
    assert read_csv(tmp_path)[0]["memorized"] == ""
    assert json.loads((tmp_path / "results.json").read_text())["epochs"][0]["memorized"] == [None]
    assert "Wrong labels memorized" not in (tmp_path / "label_noise.svg").read_text()
    assert (tmp_path / "table.md").read_text().splitlines()[-1].split(" | ")[3] == "-"


def test_the_summary_by_hand():
    config = Config(methods=("sam", "sgd"), epochs=2, seeds=(0, 1))

    def epoch(method, number, seconds, test):
        measures = {name: np.array([0.25, 0.75]) for name in report.MEASURES}
        return Epoch(method, number, seconds, measures | {"test_accuracy": np.array(test)})

    epochs = [
        epoch("sam", 1, 4.0, [0.9, 0.5]),
        epoch("sgd", 1, 2.0, [0.5, 0.5]),
        epoch("sam", 2, 9.0, [0.7, 0.9]),
        epoch("sgd", 2, 3.0, [0.5, 0.5]),
    ]
    sam, sgd = report.summarize(config, epochs)
    assert sam == ("SAM", "80.0 ± 14.1", "90.0 ± 0.0", "50.0 ± 35.4", "50.0 ± 35.4", "2.50")
    assert sgd[0] == "SGD"
    assert sgd[-1] == "1.00"
    (alone,) = report.summarize(Config(methods=("sam",), epochs=2, seeds=(0, 1)), epochs)
    assert alone[-1] == "-"


def test_the_figure_labels_every_curve_without_overlap():
    config = Config(methods=("sgd", "sam", "saner"), epochs=2, seeds=(0, 1))
    measures = {name: np.array([0.5, 0.6]) for name in report.MEASURES}
    epochs = [Epoch(name, n, 1.0, measures) for n in (1, 2) for name in config.methods]
    figure = report.make_figure(config, epochs)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "Test accuracy",
        "Wrong labels memorized",
    ]
    for axes in figure.axes:
        assert [line.get_color() for line in axes.lines] == ["#7f7f7f", "#1f77b4", "#d1495b"]
        heights = sorted(text.xy[1] for text in axes.texts)
        assert {text.get_text() for text in axes.texts} == {"SGD", "SAM", "SANER"}
        assert np.diff(heights).min() > 0.06


def test_the_split_is_stratified_and_the_test_labels_stay_clean():
    clean = load_digits("symmetric", 0.0, (0,))
    noisy = load_digits("symmetric", 0.4, (0, 1))
    assert clean.inputs.shape == (NUM_TRAIN, 8, 8, 1)
    assert clean.test_inputs.shape == (NUM_TEST, 8, 8, 1)
    shares = [np.bincount(labels) / len(labels) for labels in (clean.labels[0], clean.test_labels)]
    np.testing.assert_allclose(*shares, atol=0.002)
    np.testing.assert_array_equal(noisy.test_labels, clean.test_labels)
    np.testing.assert_array_equal(noisy.changed, noisy.labels != clean.labels)
    assert noisy.changed.sum(axis=1).tolist() == [round(0.4 * NUM_TRAIN)] * 2
    assert (noisy.changed[0] != noisy.changed[1]).any()
    # A seed's noise does not depend on which other seeds run.
    assert load_digits("symmetric", 0.4, (1,)).noise_hashes() == noisy.noise_hashes()[1:]
    # These change the same rows, to other labels.
    flipped = load_digits("pair_flip", 0.4, (1,))
    np.testing.assert_array_equal(flipped.changed, noisy.changed[1:])
    assert flipped.noise_hashes() != noisy.noise_hashes()[1:]


def test_asymmetric_noise_confuses_the_mapped_digits_only():
    clean, noisy = (load_digits("asymmetric", rate, (0,)) for rate in (0.0, 1.0))
    expected = [CONFUSED_DIGITS.get(int(label), int(label)) for label in clean.labels[0]]
    assert noisy.labels[0].tolist() == expected


def test_the_python_loop_and_the_compiled_epoch_agree():
    data = load_digits("symmetric", 0.4, (0,))
    model, tx = MODELS["mlp"](), make_optimizer("saner", Config(), total_steps=5)
    params = model.init(jax.random.key(0), data.inputs[:1])
    arguments = (
        TrainState(params, tx.init(params)),
        jax.random.key(1),
        jnp.asarray(data.inputs),
        jnp.asarray(data.labels[0]),
    )
    train_step = make_train_step(model, tx)
    results = [make_train_epoch(train_step, 256, way)(*arguments) for way in (True, False)]
    for scanned, looped in zip(*map(jax.tree.leaves, results), strict=True):
        np.testing.assert_allclose(scanned, looped, rtol=1e-3, atol=1e-4)


def test_an_epoch_takes_every_step_on_other_examples():
    def train_step(seen, inputs, labels):
        np.testing.assert_equal(inputs.shape, labels.shape)
        return seen.at[inputs].add(1), 1.0 * labels.sum()

    examples = jnp.arange(10)
    orders = []
    for key in map(jax.random.key, range(3)):
        seen, loss = make_train_epoch(train_step, 4, True)(examples * 0, key, examples, examples)
        assert sorted(seen.tolist()) == [0] * 2 + [1] * 8  # the incomplete batch is left out
        assert float(loss) == float((seen * examples).sum()) / 2
        orders.append(seen.tolist())
    assert orders[0] != orders[1] or orders[0] != orders[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"methods": ("sgd", "smm")},
            "--methods: 'smm' is not valid. Did you mean sam. Choose from",
        ),
        ({"methods": ()}, r"--methods: \(\) is not valid. Name at least one"),
        ({"methods": ("sgd", "sgd")}, "--methods: .* Name each one once"),
        ({"seeds": ()}, r"--seeds: \(\) is not valid. Give at least one"),
        ({"seeds": (1, 1)}, "--seeds: .* Name each one once"),
        ({"seeds": (-1,)}, "--seeds: -1 is not valid"),
        ({"noise": "salt"}, "--noise: 'salt' is not valid. Choose from symmetric"),
        ({"noise_rate": 40.0}, "--noise-rate: 40.0 is not valid. It is a share"),
        ({"noise_rate": float("nan")}, "--noise-rate: nan is not valid"),
        ({"model": "vit"}, "--model: 'vit' is not valid. Choose from mlp, cnn"),
        ({"rho": -0.1}, "--rho: -0.1 is not valid"),
        ({"alpha": 1.5}, "--alpha: 1.5 is not valid"),
        ({"epochs": 0}, "--epochs: 0 is not valid"),
        ({"batch_size": 0}, "--batch-size: 0 is not valid"),
        ({"batch_size": 1298}, "--batch-size: 1298 is not valid. It lies in .1, 1297."),
        ({"learning_rate": 0.0}, "--learning-rate: 0.0 is not valid"),
        ({"momentum": 1.0}, "--momentum: 1.0 is not valid"),
        ({"weight_decay": -1e-4}, "--weight-decay: -0.0001 is not valid"),
    ],
)
def test_bad_settings_name_the_flag_the_value_and_the_remedy(arguments, message):
    with pytest.raises(ValueError, match=message):
        Config(**arguments)


@pytest.mark.programs
def test_the_command_line(tmp_path):
    """In a folder of its own, as the README's first command starts it; the other network."""
    flags = ("--methods", "sgd", "--model", "cnn", "--epochs", "1", "--seeds", "0")
    done = subprocess.run(
        [sys.executable, "-W", "error", str(PROGRAM), *flags, "--output", "here"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(PROGRAM.parents[2]), "COLUMNS": "80"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "epoch [%]" in done.stdout
    assert {path.name for path in (tmp_path / "here").iterdir()} == FILES
    results = json.loads((tmp_path / "here" / "results.json").read_text())
    assert results["config"]["model"] == "cnn"


@pytest.mark.programs
def test_the_orderings_of_the_readme_show():
    """SANER > SAM > SGD, J-SAM near SAM, L-SAM near SGD, for a seed that chose nothing."""
    config = Config(seeds=(100,))
    data = load_digits(config.noise, config.noise_rate, config.seeds)
    last = {epoch.method: epoch.measures for epoch in compare(config, data)}
    test = {method: measures["test_accuracy"] for method, measures in last.items()}
    memorized = {method: measures["memorized"] for method, measures in last.items()}
    assert (test["saner"] > test["sgd"] + 0.08).all()  # what the README's first lines promise
    for better, worse in [("saner", "sam"), ("sam", "sgd"), ("jsam", "lsam")]:  # for every seed
        assert (test[better] > test[worse]).all()
        assert (memorized[better] < memorized[worse]).all()
    assert abs(test["jsam"] - test["sam"]).mean() < abs(test["jsam"] - test["sgd"]).mean() / 3
    assert abs(test["lsam"] - test["sgd"]).mean() < abs(test["lsam"] - test["sam"]).mean() / 2
