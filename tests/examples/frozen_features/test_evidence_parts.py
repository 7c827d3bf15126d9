"""The reduced data sets of the evidence, and the readings of NCSAM."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_sam
from examples.frozen_features import sets
from examples.frozen_features.compensations import READINGS, Reading, compensated, strength_at
from examples.frozen_features.data import DataError
from examples.frozen_features.recipes import Recipe
from tests.examples.frozen_features.frozen_data import arrays, features


def test_principal_axes_are_orthonormal_and_decorrelate():
    data = features(rows=300)
    axes = sets.principal_axes(data, 5)
    np.testing.assert_allclose(axes.T @ axes, np.eye(5), atol=1e-5)
    standardized = (data.inputs - data.mean) / data.deviation
    covariance = np.cov((standardized @ axes).T, bias=True)
    np.testing.assert_allclose(covariance, np.diag(np.diag(covariance)), atol=1e-4)
    assert (np.diff(np.diag(covariance)) < 0).all()
    assert np.diag(covariance).sum() == pytest.approx(5, rel=1e-4)
    assert (axes[np.abs(axes).argmax(axis=0), np.arange(5)] > 0).all()


def test_a_reduced_set_projects_train_and_test_alike():
    data = features()
    axes = sets.principal_axes(data, 2)
    small = sets.reduced(data, axes)
    for before, after in ((data.inputs, small.inputs), (data.test_inputs, small.test_inputs)):
        expected = (before - data.mean) / data.deviation @ axes
        np.testing.assert_allclose(after, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(small.deviation, small.inputs.std(axis=0), rtol=1e-5)
    np.testing.assert_array_equal(small.labels, data.labels)


def test_a_part_of_the_rows_stays_together_and_is_always_the_same():
    data = features()
    part = sets.subset(data, 30)
    assert part.inputs.shape == (30, 5)
    rows = [int(np.flatnonzero((data.inputs == row).all(axis=1))[0]) for row in part.inputs]
    assert rows == sorted(set(rows))
    np.testing.assert_array_equal(part.labels, data.labels[rows])
    np.testing.assert_array_equal(part.clean_labels, data.clean_labels[rows])
    np.testing.assert_array_equal(sets.subset(data, 30).inputs, part.inputs)
    assert len(part.test_labels) == len(data.test_labels)


def test_every_set_is_read_from_its_file_at_its_size(tmp_path, monkeypatch):
    made = arrays(rows=400, classes=10)
    np.savez(tmp_path / "some.npz", **made, labels_other=made["clean_labels"])
    some = {
        "other": sets.DataSet("some.npz", column="labels_other", rows=200, epochs=7),
        "synthetic": sets.DataSet("some.npz", noise="symmetric", rate=0.3, components=3),
    }
    monkeypatch.setattr(sets, "SETS", some)
    other = sets.load_set("other", tmp_path)
    np.testing.assert_array_equal(other.labels, other.clean_labels)
    assert len(other.labels) == 200
    assert (sets.fitted("other", other).epochs, sets.fitted("other", other, 2).epochs) == (7, 2)
    synthetic = sets.load_set("synthetic", tmp_path)
    assert synthetic.inputs.shape == (400, 3)
    assert np.mean(synthetic.labels != synthetic.clean_labels) == pytest.approx(0.3, abs=0.05)
    assert sets.is_there("other", tmp_path)
    assert not sets.is_there("other", None)
    with pytest.raises(DataError, match=r"--data: 'other' needs a folder"):
        sets.load_set("other", None)
    digest = sets.digest_of("other", tmp_path)
    del made["clean_labels"]
    np.savez(tmp_path / "some.npz", **made, labels_other=made["labels"])
    assert sets.digest_of("other", tmp_path) != digest
    with pytest.raises(DataError, match=r"some.npz has no array 'clean_labels', which 'synthetic'"):
        sets.load_set("synthetic", tmp_path)


def test_every_set_is_in_one_family_and_has_a_heading_of_its_own():
    assert sorted(name for names in sets.FAMILIES.values() for name in names) == sorted(sets.SETS)
    headings = [sets.heading(name) for name in sets.SETS]
    assert len(set(headings)) == len(headings)
    assert sets.heading("cifar10n_reduced_worse") == "images worse"


def test_digits_have_the_noise_that_their_name_says():
    for name, rate in (("digits_symmetric_20", 0.2), ("digits_asymmetric_30", 0.3)):
        data = sets.load_set(name, None)
        wrong = data.labels != data.clean_labels
        assert wrong.mean() == pytest.approx(rate, abs=0.02)
        shift = (data.labels - data.clean_labels)[wrong] % 10
        assert (set(shift) == {1}) == (name == "digits_asymmetric_30")


def problem():
    random = np.random.default_rng(0)
    inputs = jnp.asarray(random.standard_normal((20, 4)), jnp.float32)
    labels = jnp.asarray(random.integers(0, 3, 20), jnp.int32)
    params = jnp.asarray(random.standard_normal((4, 3)), jnp.float32)
    return params, optax_sam.Objective(lambda w, x: x @ w, inputs, labels)


def direction(tx):
    params, objective = problem()
    grads = jax.grad(objective)(params)
    return tx.update(grads, tx.init(params), params, loss_fn=objective)[0]


@functools.cache
def directions():
    """Of all readings with and without strength, of SAM and of the library's NCSAM, in one program."""

    def compute(strength):
        made = {name: compensated(reading, 0.3, strength) for name, reading in READINGS.items()}
        smallest = Reading(examples="smallest", projection=False)
        made["paper, smallest gaps"] = compensated(smallest, 0.3, strength)
        made["opposite"] = compensated(Reading(), 0.3, -strength)
        return {name: direction(tx) for name, tx in made.items()}

    def library():
        free = {"projection": False}
        return {
            "sam": direction(optax_sam.sam(0.3)),
            "paper": direction(optax_sam.ncsam(0.3, 0.2, flip_ratio=0.4)),
            "not projected": direction(optax_sam.ncsam(0.3, 0.2, flip_ratio=0.4, **free)),
            "paper, smallest gaps": direction(
                optax_sam.ncsam(0.3, 0.2, flip_ratio=0.4, deterministic=True, **free)
            ),
        }

    compute = jax.jit(compute)
    return compute(0.2), compute(0.0), jax.jit(library)()


@pytest.mark.programs
@pytest.mark.parametrize("name", ["paper", "not projected", "paper, smallest gaps"])
def test_the_paper_s_reading_is_the_library_s_ncsam(name):
    ours, _, library = directions()
    np.testing.assert_allclose(ours[name], library[name], rtol=1e-4, atol=1e-5)
    assert np.abs(ours["opposite"] - ours[name]).max() > 1e-3


@pytest.mark.parametrize("name", READINGS)
def test_every_reading_without_strength_is_sam(name):
    _, without, library = directions()
    np.testing.assert_allclose(without[name], library["sam"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["smallest gaps", "random examples", "second largest", "fewer flips"]
)
def test_a_reading_differs_from_the_one_that_it_varies(name):
    ours, _, _ = directions()
    assert np.abs(ours[name] - ours["normalized, not projected"]).max() > 1e-5


def test_a_recipe_takes_sam_s_gradient_on_its_coordinates_only():
    @jax.jit
    def compute():
        sam = direction(optax_sam.sam(20.0))
        ours = {
            letters: direction(Recipe("sam", coordinates=letters).build(20.0))
            for letters in ("B", "AC")
        }
        params, objective = problem()
        return sam, ours, jax.grad(objective)(params)

    perturbed, ours, clean = map(jax.device_get, compute())
    weakened = (perturbed / clean > 0) & (perturbed / clean < 1)
    assert 0 < weakened.sum() < weakened.size
    np.testing.assert_allclose(ours["B"], np.where(weakened, perturbed, clean), rtol=1e-5)
    np.testing.assert_allclose(ours["AC"], np.where(weakened, clean, perturbed), rtol=1e-5)


def test_a_normalized_compensation_has_a_share_of_the_radius():
    params, objective = problem()
    tx = compensated(Reading(normalized=True, projection=False, flip_ratio=1.0), 0.3, 0.5)
    logits = objective.logits(params)
    others = jnp.where(jnp.arange(3) == objective.labels[:, None], -jnp.inf, logits).argmax(-1)
    compensation = jax.grad(objective.with_labels(others))(params)
    grads = jax.grad(objective)(params)
    epsilon = 0.3 * grads / jnp.linalg.norm(grads)
    epsilon += 0.5 * 0.3 * compensation / jnp.linalg.norm(compensation)
    expected = jax.grad(objective)(params + epsilon)
    np.testing.assert_allclose(jax.jit(lambda: direction(tx))(), expected, rtol=1e-4, atol=1e-5)


def test_the_strength_grows_to_the_half_and_waits_for_the_warm_up():
    paper = optax_sam.noise_compensation_schedule(0.2, 100)
    for step in (0, 20, 50, 90):
        assert float(strength_at(Reading(), 0.2, step / 100)) == pytest.approx(float(paper(step)))
    assert float(strength_at(Reading(scheduled=False), 0.2, 0.0)) == pytest.approx(0.2)
    late = Reading(scheduled=False, warmup=0.25)
    assert [float(strength_at(late, 0.2, t)) for t in (0.2, 0.25)] == pytest.approx([0.0, 0.2])
    assert isinstance(compensated(Reading(), 0.1, 0.1), optax.GradientTransformationExtraArgs)
