"""The network and its training step, against a plain one: no scan, no rematerialization, one device."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

import optax_sam
from examples.language_model.config import Config
from examples.language_model.devices import make_mesh, shardings
from examples.language_model.methods import gradients, make_method, make_optimizer
from examples.language_model.model import Transformer, merged
from examples.language_model.steps import Trainer
from optax_sam.diagnostics import largest_eigenvalue, sharpness
from tests.examples.language_model.small import batch, config, plain_logits


def plain_loss(params, batch, heads):
    """The mean over the bytes that count."""
    logits = plain_logits(params, batch.inputs, heads)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    return jnp.sum(batch.weights * losses) / jnp.sum(batch.weights)


def pure(tree):
    return nnx.to_pure_dict(tree) if isinstance(tree, nnx.State) else tree


def close(one, other, tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance), one, other)


def trainer_of(settings, devices):
    mesh = make_mesh(settings.model_devices, devices)
    return Trainer(settings, make_optimizer(settings), mesh)


@pytest.fixture(scope="module")
def start():
    """The parameters that every test begins with, and their gradient by the plain network."""
    settings = config()
    _, params = nnx.split(Transformer(settings, nnx.Rngs(0)), nnx.Param)
    params = pure(nnx.as_pure(params))
    return params, jax.jit(jax.value_and_grad(plain_loss), static_argnums=2)


@pytest.mark.programs
@pytest.mark.parametrize("perturb", ["all", "norms"])
def test_a_step_on_four_devices_is_sam_by_hand_on_a_plain_network(start, perturb):
    """Method, scan, rematerialization, token weights, shardings and the mask, all at once."""
    settings = config(method="sam", rho=0.3, perturb=perturb, model_devices=2)
    trainer = trainer_of(settings, jax.devices()[:4])
    state = trainer.initial_state(np.uint32(0))
    check_shares(state)
    params = pure(jax.tree.map(np.asarray, state.params))

    loss, grads = start[1](params, batch(), settings.heads)
    if perturb == "all":
        climbed = grads
    else:
        climbed = jax.tree_util.tree_map_with_path(
            lambda path, g: g * ("scale" in jax.tree_util.keystr(path)), grads
        )
    size = settings.rho / optax.tree.norm(climbed)
    perturbed = jax.tree.map(lambda w, g: w + size * g, params, climbed)
    _, expected = start[1](perturbed, batch(), settings.heads)

    tx = make_optimizer(config(model_devices=2))  # AdamW alone
    updates, _ = tx.update(expected, tx.init(params), params)
    after, metrics = trainer.step(state, batch())
    check_shares(after)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["gradient_norm"], optax.tree.norm(grads), rtol=1e-4)
    moment = optax.tree.get(after.opt_state, "mu")
    clipped = jnp.minimum(1, settings.clip_norm / optax.tree.norm(expected))
    close(pure(jax.tree.map(np.asarray, moment)), optax.tree.scale(0.1 * clipped, expected), 1e-6)
    close(pure(jax.tree.map(np.asarray, after.params)), optax.apply_updates(params, updates), 1e-5)


def check_shares(state):
    """Every device has a quarter of every matrix, and of Adam's moments of it."""
    leaves = jax.tree.flatten_with_path(state)[0]
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path)
        share = leaf.size // leaf.addressable_data(0).size
        assert share == (1 if leaf.ndim == 0 else 2 if "scale" in name else 4), name
    names = [jax.tree_util.keystr(path) for path, _ in leaves]
    assert sum("mu" in name for name in names) == sum("params" in name for name in names) == 11


def test_what_has_no_name_of_a_parameter_is_everywhere():
    mesh = make_mesh(2, jax.devices()[:4])
    tree = {"count": jnp.zeros([], int), "mu": {"head": {"kernel": jnp.zeros((4, 6))}}}
    found = shardings(tree, mesh)
    assert found["count"].spec == PartitionSpec()
    assert found["mu"]["head"]["kernel"].spec == PartitionSpec("data", "model")
    with pytest.raises(ValueError, match="--model-devices: 3 does not divide the 4 devices"):
        make_mesh(3, jax.devices()[:4])


@pytest.mark.programs
def test_the_loss_of_a_text_is_the_mean_over_its_bytes():
    """Batches with less to predict count less."""
    trainer = trainer_of(config(), jax.devices()[:1])
    state = trainer.initial_state(np.uint32(0))
    first = batch()
    second = first._replace(weights=first.weights * (np.arange(16) < 3))
    full, few = (
        plain_loss(pure(jax.tree.map(np.asarray, state.params)), b, 2) for b in (first, second)
    )
    counts = first.weights.sum(), second.weights.sum()
    expected = (full * counts[0] + few * counts[1]) / sum(counts)
    assert abs(full - few) > 1e-3
    np.testing.assert_allclose(trainer.loss(state, [first, second]), expected, rtol=1e-5)


def test_no_byte_sees_a_later_one_and_bfloat16_stays_inside():
    model = Transformer(config(precision="bfloat16"), nnx.Rngs(0))
    tokens = np.random.default_rng(0).integers(0, 256, (1, 16))
    changed = tokens.copy()
    changed[0, 9] += 1
    one, other = nnx.jit(lambda model, tokens: model(tokens))(
        model, jnp.concatenate([tokens, changed % 256])
    )
    assert one.dtype == jnp.float32
    np.testing.assert_array_equal(one[:9], other[:9])
    assert (one[9:] != other[9:]).any(axis=-1).all()
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model))} == {jnp.dtype("float32")}


@pytest.mark.programs
def test_adapters_change_nothing_at_first_and_then_only_themselves(tmp_path, start):
    plain = config()
    settings = config(method="sam", adapter_rank=2, start_from=tmp_path)
    trainer = trainer_of(settings, jax.devices()[:1])
    state = trainer.initial_state(np.uint32(0))
    network = jax.tree.map(np.asarray, state.frozen)
    names = {path[-1].key for path, _ in jax.tree.flatten_with_path(state.params)[0]}
    assert names == {"lora_a", "lora_b"}
    assert jax.tree.structure(pure(network)) == jax.tree.structure(start[0])
    expected = plain_loss(pure(network), batch(), plain.heads)

    _, metrics = trainer.step(state, batch())
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-5)
    state = trainer.initial_state(np.uint32(0))
    for _ in range(3):
        state, _ = trainer.step(state, batch())
    jax.tree.map(np.testing.assert_array_equal, state.frozen, network)
    combined = pure(merged(pure(state.frozen), pure(state.params)))
    adapted = plain_loss(combined, batch(), plain.heads)
    assert adapted < expected - 1e-3
    np.testing.assert_allclose(trainer.loss(state, [batch()]), adapted, rtol=1e-5)


def test_late_sam_begins_where_it_is_told():
    settings = config(method="sam", rho=1.0, steps=8, method_starts=0.5)
    tx = make_method(settings)
    params = {"w": jnp.array(2.0)}
    state, taken = tx.init(params), []
    for _ in range(6):
        direction, state = tx.update(
            {"w": 2 * params["w"]}, state, params, loss_fn=lambda p: p["w"] ** 2
        )
        taken.append(float(direction["w"]))
    assert taken == [4.0] * 4 + [6.0] * 2
    assert gradients(settings) == 8 + 4
    assert gradients(config(steps=8)) == 8
    assert gradients(config(steps=8, method="sam")) == 16
    assert gradients(config(steps=8, method="sam", every_k=3)) == 8 + 3


def test_preconditioned_functional_sam_climbs_by_the_moment_of_adam():
    """With logits w² the Jacobian is 2w, at the moved point; the error is that of the clean one."""
    tx = make_method(config(method="functional_sam", preconditioned=True, rho=0.3))
    objective = optax_sam.Objective(lambda w, x: x * w**2, np.ones((1, 2), "f4"), np.array([0]))
    w, grads, moment = (np.array(x, "f4") for x in ([1, 0.5], [3, 4], [9, 1]))
    updates, _ = tx.update(grads, tx.init(w), w, loss_fn=objective, second_moment=moment)
    error = np.exp(w**2) / np.exp(w**2).sum() - np.array([1, 0])
    expected = 2 * (w + 0.3 * np.array([1, 4]) / np.sqrt(17)) * error
    np.testing.assert_allclose(updates, expected, rtol=1e-5)


@pytest.mark.programs
def test_sharpness_is_that_of_the_plain_network():
    """In float32, also if the network computes in bfloat16."""
    settings = config(precision="bfloat16", layers=1)
    trainer = trainer_of(settings, jax.devices()[:1])
    state = trainer.initial_state(np.uint32(0))
    measured = trainer.sharpness(state, batch(), 0.3, True)
    params = pure(jax.tree.map(np.asarray, state.params))

    @jax.jit
    def loss_fn(params):
        return plain_loss(params, batch(), settings.heads)

    expected = largest_eigenvalue(loss_fn, params, steps=15).value
    np.testing.assert_allclose(measured["eigenvalue"], expected, rtol=1e-3)
    expected = sharpness(optax_sam.sam(0.3), loss_fn, params).rise
    np.testing.assert_allclose(measured["rise"], expected, rtol=1e-4)
    assert trainer.sharpness(state, batch(), 0.3, False).keys() == {"rise"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "samm"}, r"--method: 'samm' is not valid. Did you mean sam\?"),
        ({"precision": "float16"}, r"--precision: 'float16'.*Choose from bfloat16, float32"),
        ({"validation_share": 10}, r"--validation-share: 10.*share in \[0, 1\)"),
        ({"rho": -1}, r"--rho: -1"),
        ({"steps": 0}, r"--steps: 0.*At least 1"),
        ({"steps": 4, "warmup": 0.9}, r"--warmup: 0.9.*none of --steps 4"),
        ({"width": 12}, r"--heads: 4.*twice the number of heads"),
        ({"model_devices": 3}, r"--model-devices: 3.*divide --heads 4"),
        ({"checkpoint_every": 30}, r"--checkpoint-every: 30.*multiple of --evaluate-every 100"),
        ({"adapter_rank": 2}, r"--adapter-rank: 2.*--start-from"),
        ({"perturb": "norms"}, r"--method: 'adamw'.*leave --perturb"),
        ({"seed": -1}, r"--seed: -1"),
        (
            {"preconditioned": True},
            r"--preconditioned: True.*--method functional_sam, not of adamw",
        ),
        ({"pooling": "last"}, r"--pooling: 'last'.*a setting of --task classification"),
        (
            {"task": "classification", "pattern": "*.py"},
            r"--pattern: .*a setting of --task language",
        ),
        ({"task": "classification", "text": "manual"}, r"--text: 'manual'.*has no labels"),
        ({"task": "classification", "noise_rate": 1.5}, r"--noise-rate: 1.5.*share in \[0, 1\)"),
        (
            {"task": "classification", "answer_columns": ("a",), "label_column": "b"},
            r"--label-column: 'b'.*what most answered",
        ),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Config(**settings)
