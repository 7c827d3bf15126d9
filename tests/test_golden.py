"""The recorded float64 trajectories are reproduced to 1e-10.

They come from public PyTorch codes, for some methods from an independent implementation
(``tests/golden/README.md``).
"""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_sam
from optax_sam import down_weight
from optax_sam.perturbations.noise_compensation import choose_examples, flip_labels

EPSILON = 1e-8  # the ratio's offset in the SANER authors' code

FIELDS = ["g", "e", "gp", "d", "params"]


def is_weight(params):
    return {name: "weight" in name for name in params}


def saner_code(multiplier):
    return down_weight(1 - multiplier, EPSILON)


NCSAM = {"flip_ratio": 0.2, "deterministic": True}
NOTHING = optax.identity()
PLAIN = (0.0, 0.0)  # weight decay and momentum of the base optimizers
MOMENTUM = (5e-4, 0.9)

# Weight decay and momentum stand inside the method; what the file calls its direction is g.
DECOUPLED = "wsam_decoupled"

# name in golden.npz -> method as a function of rho
METHODS = {
    "sam": optax_sam.sam,
    "asam_eta0": lambda rho: optax_sam.asam(rho, eta=0.0),
    "asam_samsung": lambda rho: optax_sam.asam(rho, eta=0.01, scale_mask=is_weight),
    "saner_a0": lambda rho: optax_sam.saner(rho, alpha=1.0, ratio_epsilon=EPSILON),
    "saner_a0.25": lambda rho: optax_sam.saner(rho, alpha=0.75, ratio_epsilon=EPSILON),
    "saner_a0.5": lambda rho: optax_sam.saner(rho, alpha=0.5, ratio_epsilon=EPSILON),
    "saner_a1": lambda rho: optax_sam.saner(rho, alpha=0.0, ratio_epsilon=EPSILON),
    "asaner_a0.5": lambda rho: optax_sam.asam(rho, eta=0.0, combination=saner_code(0.5)),
    "samonly_B": lambda rho: optax_sam.sam(
        rho, combination=optax_sam.restrict_to_coordinates("B", EPSILON)
    ),
    "samwo_B": lambda rho: optax_sam.sam(
        rho, combination=optax_sam.restrict_to_coordinates("AC", EPSILON)
    ),
    "jsam_n": optax_sam.jsam,
    "lsam_n": optax_sam.lsam,
    "sam_1": lambda rho: optax_sam.sam(rho, group_size=1),
    "jsam_1": lambda rho: optax_sam.jsam(rho, group_size=1),
    "lsam_1": lambda rho: optax_sam.lsam(rho, group_size=1),
    "gsam_g0.01": lambda rho: optax_sam.gsam(rho, alpha=0.01),
    "gsam_g0.1": lambda rho: optax_sam.gsam(rho, alpha=0.1),
    "gsaner_g0.01_a0.5": lambda rho: optax_sam.gsam(rho, 0.01, combination=saner_code(0.5)),
    "gsaner_g0.1_a0.5": lambda rho: optax_sam.gsam(rho, 0.1, combination=saner_code(0.5)),
    "fsam": optax_sam.friendly_sam,
    "fsaner_a0.5": lambda rho: optax_sam.friendly_sam(rho, combination=saner_code(0.5)),
    "vasso": lambda rho: optax_sam.vasso(rho, theta=0.2),
    "vassosaner_a0.5": lambda rho: optax_sam.vasso(rho, 0.2, combination=saner_code(0.5)),
    "wsam_coupled": lambda rho: optax_sam.wsam(rho, gamma=0.9),
    "wsam_decoupled": lambda rho, base=NOTHING: optax_sam.wsam(rho, gamma=0.9, base=base),
    "looksam_paper_k3_a0.7": lambda rho: optax_sam.looksam(rho, 3, 0.7, norm_epsilon=1e-8),
    "ncsam": lambda rho: optax_sam.ncsam(rho, kappa=0.1, **NCSAM),
    "ncsam_s0.01": lambda rho: optax_sam.ncsam(rho, kappa=0.01, **NCSAM),
    "ncsam_noproj": lambda rho: optax_sam.ncsam(rho, kappa=0.1, projection=False, **NCSAM),
}

PROBLEMS = {
    "logreg": lambda p, x: x @ p["weight"] + p["bias"],
    "mlp": lambda p, x: (
        jnp.tanh(x @ p["fc1_weight"] + p["fc1_bias"]) @ p["fc2_weight"] + p["fc2_bias"]
    ),
}


@functools.cache
def golden():
    with np.load(pathlib.Path(__file__).parent / "golden" / "golden.npz") as file:
        return dict(file)


def cases():
    names = {tuple(name.split("/")[:3]) for name in golden()}
    return sorted(case for case in names if case[0] in METHODS and len(case) == 3)


def test_every_golden_method_is_reproduced():
    recorded = {name.split("/")[0] for name in golden()} - {"problem", "edge", "sgd"}
    elsewhere = {
        "looksam_k3_a0.7": "per-tensor norms; the paper's global ones are looksam_paper",
    }
    assert recorded - set(METHODS) == set(elsewhere)


@functools.cache
def compiled_step(method, problem):
    """One compiled training step for all radii, and for the base optimizers, which are arguments."""

    def parts(rho=0.0, decay=0.0, momentum=0.0):
        make = METHODS[method]
        behind = [optax.add_decayed_weights(decay), optax.trace(momentum)]
        if method == DECOUPLED:
            return make(rho, base=optax.chain(*behind)), optax.sgd(0.05)
        return make(rho), optax.chain(*behind, optax.sgd(0.05))

    @jax.jit
    def step(settings, params, state, base_state, inputs, labels):
        tx, base = parts(*settings)
        objective = optax_sam.Objective(PROBLEMS[problem], inputs, labels)
        loss, g = jax.value_and_grad(objective)(params)
        logits = objective.logits(params)
        d, state = tx.update(g, state, params, loss_fn=objective)
        updates, base_state = base.update(d, base_state, params)
        return optax.apply_updates(params, updates), state, base_state, loss, g, d, logits

    return parts(), step


def trajectory(method, problem, config):
    data = golden()
    prefix = f"problem/{problem}/init/"
    names = [name.removeprefix(prefix) for name in data if name.startswith(prefix)]
    order = np.argsort(np.argsort(names))  # jax sorts the leaves by name, the file does not
    flavour, rho = config.split("_rho")
    (tx, base), step = compiled_step(method, problem)
    settings = (float(rho), *(MOMENTUM if flavour == "mom" else PLAIN))
    params = {name: jnp.asarray(data[prefix + name]) for name in names}
    state, base_state = tx.init(params), base.init(params)
    inputs = jnp.asarray(data["problem/X"] / 16.0)
    labels = jnp.asarray(data[f"problem/{problem}/y"].astype(np.int32))

    def in_file_order(tree):
        leaves = jax.tree.leaves(tree)
        return np.concatenate([np.ravel(leaves[i]) for i in order])

    records = []
    for t in range(12):
        rows = slice(32 * (t % 4), 32 * (t % 4) + 32)
        params, state, base_state, loss, g, d, logits = step(
            settings, params, state, base_state, inputs[rows], labels[rows]
        )
        records.append(
            {
                "g": in_file_order(g),
                "d": in_file_order(d),
                "params": in_file_order(params),
                "logits": logits,
                "labels": labels[rows],
                "loss": float(loss),
                "metrics": {k: float(v) for k, v in optax_sam.get_metrics(state).items()},
            }
        )
    return records


@pytest.mark.parametrize(("method", "problem", "config"), cases())
def test_trajectory(method, problem, config):
    data = golden()
    name = f"{method}/{problem}/{config}/"
    with jax.enable_x64(True):
        records = trajectory(method, problem, config)
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-10)

    # LookSAM's metrics stay on the steps between; the file records those steps as unperturbed.
    ascents = slice(None, None, 3 if method.startswith("looksam") else 1)
    close([r["loss"] for r in records], data[name + "loss"][:, 0])
    perturbed_losses = [r["metrics"]["perturbed_loss"] for r in records]
    close(perturbed_losses[ascents], data[name + "loss"][ascents, 1])
    digest = data[name + "digest"]
    probes = data[f"problem/{problem}/probes"]
    fields = ("g", "params") if method == DECOUPLED else ("g", "d", "params")
    for field in fields:
        vectors = np.array([r[field] for r in records])
        ours = np.concatenate(
            [
                np.linalg.norm(vectors, axis=1)[:, None],
                vectors.sum(1)[:, None],
                vectors @ probes.T,
            ],
            axis=1,
        )
        np.testing.assert_allclose(ours, digest[:, FIELDS.index(field)], rtol=1e-9, atol=1e-9)
    epsilon_norms = [r["metrics"]["perturbation_norm"] for r in records]
    if not method.endswith("_1"):  # the file has the norm of the mean, the metric the mean norm
        np.testing.assert_allclose(
            epsilon_norms[ascents], digest[ascents, FIELDS.index("e"), 0], rtol=1e-9
        )
    if name + "params_final" in data:
        close(records[-1]["params"], data[name + "params_final"])
    if name + "mask_count" in data and method not in ("samonly_B", "samwo_B"):  # without the metric
        size = records[0]["params"].size
        fractions = [r["metrics"]["down_weighted_fraction"] for r in records]
        close(np.array(fractions) * size, data[name + "mask_count"])
    if name + "full_all" in data:
        for t, full in enumerate(data[name + "full_all"]):
            for field in fields:
                close(records[t][field], full[FIELDS.index(field)])
    if name + "full_step5" in data and problem == "mlp" and "d" in fields:
        close(records[5]["d"], data[name + "full_step5"][1])
    if method.startswith("ncsam"):
        with jax.enable_x64(True):
            for t, record in enumerate(records):
                chosen = choose_examples(record["logits"], NCSAM["flip_ratio"], None)
                flipped = flip_labels(record["logits"], record["labels"])[chosen]
                np.testing.assert_array_equal(chosen, data[name + "sel"][t])
                np.testing.assert_array_equal(flipped, data[name + "flip"][t])
