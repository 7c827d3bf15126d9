"""The first page: what it promises, the picture and the program are one."""

import ast
import inspect
import re
import shlex
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from config import Config
from train import make_optimizer

import optax_sam

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "docs" / "results" / "label_noise"


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def recipe():
    return re.search(r"^tx = (.*)$", blocks("python")[0], re.MULTILINE)[1]


def caption():
    """The text in italics under the picture, in one line."""
    return " ".join(re.search(r"\n\*(scikit.*?)\*\n", README, re.DOTALL)[1].split())


def test_the_top_is_what_it_is_then_the_picture_its_recipe_and_the_quick_start():
    parts = ["# optax_sam", "<picture>", "*scikit-learn's", "tx = optax.chain(", "## Quick start"]
    places = [README.index(part) for part in parts]
    assert places == sorted(places)
    assert README[: places[1]].count(". ") + README[: places[1]].count(".\n") == 2  # sentences
    pictures = re.findall(r'"(docs/images/[^"]+)"', README[places[1] : places[2]])
    assert pictures == ["docs/images/label_noise_narrow.svg", "docs/images/label_noise.svg"]
    assert all((ROOT / picture).is_file() for picture in pictures)


def test_the_lines_of_how_it_composes_are_right():
    """Every line of the second block, with a network and its batch."""
    names = {
        **{"jax": jax, "optax": __import__("optax"), "optax_sam": optax_sam},
        "apply_fn": lambda params, inputs: inputs @ params["w"],
        "inputs": jnp.ones((64, 3)),
        "labels": jnp.arange(64) % 2,
        "weights": jnp.ones(64),
    }
    params = {"w": jnp.ones((3, 2)), "b": jnp.zeros(2)}
    statements = ast.parse(blocks("python")[1]).body
    assert len(statements) == 8
    for statement in statements:
        made = eval(compile(ast.Expression(statement.value), "README.md", "eval"), names)
        if isinstance(made, optax_sam.Objective):
            assert jnp.isfinite(made(params))
        else:
            made.init(params)


def test_two_commands_each_on_one_line():
    install, test = blocks("bash")
    for block in (install, test):
        assert block.count("\n") == 1
        assert block.startswith("python3 -m venv .venv && .venv/bin/pip install -q -e ")
    program = shlex.split(install)[-1]
    assert program == "examples/label_noise/main.py"  # without flags: the default settings
    assert (ROOT / program).is_file()
    assert test.rstrip().endswith("-m pytest -n 2")


def test_recipe_picture_and_program_have_the_same_settings():
    config = Config()
    assert config.momentum == 0
    assert recipe() == (
        f"optax.chain(optax_sam.saner(rho={config.rho_of('saner'):g}), "
        f"optax.sgd({config.learning_rate:g}))"
    )
    assert config.alpha == inspect.signature(optax_sam.saner).parameters["alpha"].default
    settings = (
        f"learning rate {config.learning_rate:g}, no momentum, ρ = {config.rho_of('saner'):g}"
    )
    assert f"{100 * config.noise_rate:g} % wrong labels" in caption()
    assert f"{settings} for every method" in caption()
    assert {config.rho_of(method) for method in config.methods if method != "sgd"} == {
        config.rho_of("saner")
    }


@pytest.mark.parametrize("alone", ["examples/plain_step.py"])
def test_the_one_page_example_is_the_recipe(alone):
    code = (ROOT / alone).read_text(encoding="utf-8")
    assert blocks("python")[0].split("\n", 2)[2].strip() in code.replace("\n\n\n", "\n\n")


@pytest.mark.programs
def test_the_recipe_is_the_step_of_the_program():
    model = nn.Dense(10)
    namespace = {"model": model}
    exec(blocks("python")[0], namespace)
    inputs = jax.random.normal(jax.random.key(0), (32, 64))
    labels = jnp.arange(32) % 10
    params = model.init(jax.random.key(1), inputs)
    state = namespace["tx"].init(params)
    after, _, loss = namespace["train_step"](params, state, inputs, labels)

    tx = make_optimizer("saner", Config(), total_steps=1)
    objective = optax_sam.Objective(model.apply, inputs, labels)
    grads = jax.grad(objective)(params)
    updates, _ = tx.update(grads, tx.init(params), params, loss_fn=objective)
    expected = jax.tree.map(jnp.add, params, updates)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), after, expected
    )
    np.testing.assert_allclose(loss, objective(params), rtol=1e-6)


def test_the_caption_quotes_the_committed_tables_and_the_gain_is_clear():
    quoted = []
    for name in ("table.md", "held_out_seeds.md"):
        table = (RESULTS / name).read_text(encoding="utf-8")
        accuracy = dict(re.findall(r"^\| ([\w-]+) \| ([\d.]+) ±", table, re.MULTILINE))
        quoted += [accuracy["SGD"], accuracy["SANER"]]
        assert float(accuracy["SANER"]) - float(accuracy["SGD"]) >= 8
    assert re.findall(r"([\d.]+) %", caption())[1:] == quoted


def test_tables_can_be_read_at_80_columns():
    tables = [line for line in README.splitlines() if line.startswith("|")]
    assert len(tables) > 10
    assert max(map(len, tables)) <= 80
