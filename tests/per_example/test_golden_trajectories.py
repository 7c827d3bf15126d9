"""1-SAM, 1-J-SAM and 1-L-SAM reproduce recorded float64 trajectories to 1e-10."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from optax_sam import Objective
from optax_sam.per_example import per_example_gradient

EVALUATIONS = {"sam_1": "full", "jsam_1": "jacobian_only", "lsam_1": "logit_only"}
FIELDS = ["g", "e", "gp", "d", "params"]
PROBLEMS = {
    "logreg": lambda p, x: x @ p["weight"] + p["bias"],
    "mlp": lambda p, x: (
        jnp.tanh(x @ p["fc1_weight"] + p["fc1_bias"]) @ p["fc2_weight"] + p["fc2_bias"]
    ),
}


@functools.cache
def golden():
    with np.load(pathlib.Path(__file__).parents[1] / "golden" / "golden.npz") as file:
        return dict(file)


CASES = sorted({tuple(name.split("/")[:3]) for name in golden() if name.split("/")[0][-2:] == "_1"})


@functools.cache
def compiled(method, problem):
    def gradient(params, rho, inputs, labels):
        objective = Objective(PROBLEMS[problem], inputs, labels)
        return per_example_gradient(objective, params, rho, evaluation=EVALUATIONS[method])

    return jax.jit(gradient)


@pytest.mark.parametrize(("method", "problem", "config"), CASES)
def test_trajectory(method, problem, config, x64):
    data, record = golden(), f"{method}/{problem}/{config}/"
    prefix = f"problem/{problem}/init/"
    names = [name.removeprefix(prefix) for name in data if name.startswith(prefix)]
    params = {name: jnp.asarray(data[prefix + name]) for name in names}
    inputs = jnp.asarray(data["problem/X"] / 16.0)
    labels = jnp.asarray(data[f"problem/{problem}/y"].astype(np.int32))
    flavour, rho = config.split("_rho")
    decay, momentum = (5e-4, 0.9) if flavour == "mom" else (0.0, 0.0)
    tx = optax.chain(optax.add_decayed_weights(decay), optax.sgd(0.05, momentum=momentum))
    state = tx.init(params)
    update = jax.jit(tx.update)

    def flat(tree):  # in the order of the file
        return np.concatenate([np.ravel(tree[name]) for name in names])

    def digest(vector):
        probes = data[f"problem/{problem}/probes"]
        return [np.linalg.norm(vector), vector.sum(), *(probes @ vector)]

    for step in range(12):
        rows = slice(32 * (step % 4), 32 * (step % 4) + 32)
        result = compiled(method, problem)(params, float(rho), inputs[rows], labels[rows])
        losses = [result.loss, result.perturbed_loss]
        np.testing.assert_allclose(losses, data[record + "loss"][step], rtol=0, atol=1e-10)
        updates, state = update(result.gradients, state, params)
        params = optax.apply_updates(params, updates)
        vectors = {"g": result.clean_gradients, "d": result.gradients, "params": params}
        for field, tree in vectors.items():
            expected = data[record + "digest"][step, FIELDS.index(field)]
            np.testing.assert_allclose(digest(flat(tree)), expected, rtol=1e-9, atol=1e-10)
        if step == 5 and record + "full_step5" in data and problem == "mlp":
            expected = data[record + "full_step5"][1]
            np.testing.assert_allclose(flat(result.gradients), expected, rtol=0, atol=1e-10)
    if record + "params_final" in data:
        expected = data[record + "params_final"]
        np.testing.assert_allclose(flat(params), expected, rtol=0, atol=1e-10)
