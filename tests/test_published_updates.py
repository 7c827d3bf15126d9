"""Compositions that the methods pages recommend, against the published updates written by hand."""

import ast
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_sam
from tests.references import published
from tests.test_docs_pages import DOCS, blocks_of

STEPS = 30
LR = 0.1

pytestmark = pytest.mark.usefixtures("x64")


def apply_fn(params, inputs):
    """A network with a batch normalization, whose scale is a vector but no bias."""
    hidden = inputs @ params["hidden_kernel"] + params["hidden_bias"]
    hidden = (hidden - hidden.mean(0)) / jnp.sqrt(hidden.var(0) + 1e-5)
    hidden = jnp.tanh(hidden * params["norm_scale"] + params["norm_bias"])
    return hidden @ params["out_kernel"] + params["out_bias"]


@functools.cache
def setup():
    random = np.random.default_rng(0)
    shapes = {
        "hidden_kernel": (4, 6),
        "hidden_bias": (6,),
        "norm_scale": (6,),
        "norm_bias": (6,),
        "out_kernel": (6, 3),
        "out_bias": (3,),
    }
    start = {name: random.normal(size=shape) for name, shape in shapes.items()}
    start["norm_scale"] = 1 + 0.3 * start["norm_scale"]
    batches = [(random.normal(size=(12, 4)), random.integers(0, 3, 12)) for _ in range(3)]
    return start, batches


@jax.jit
def jax_gradient(params, inputs, labels):
    return jax.grad(optax_sam.Objective(apply_fn, inputs, labels))(params)


def gradient(params, t):
    gradients = jax_gradient(params, *setup()[1][t % 3])
    return {name: np.asarray(g) for name, g in gradients.items()}


def ours(method, momentum=None):
    """The parameters after every step, as one matrix."""
    start, batches = setup()
    tx = optax.chain(method, optax.sgd(LR, momentum=momentum))

    @jax.jit
    def step(params, state, inputs, labels):
        objective = optax_sam.Objective(apply_fn, inputs, labels)
        grads = jax.grad(objective)(params)
        updates, state = tx.update(grads, state, params, loss_fn=objective)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.asarray, start)
    state, path = tx.init(params), []
    for t in range(STEPS):
        params, state = step(params, state, *batches[t % 3])
        path.append(params)
    return as_matrix(path)


def as_matrix(path):
    return np.array([np.concatenate([np.ravel(p[k]) for k in sorted(p)]) for p in path])


def by_hand(update, **arguments):
    return as_matrix(update(gradient, setup()[0], STEPS, lr=LR, **arguments))


def difference(left, right):
    return np.abs(left[-1] - right[-1]).max() / np.abs(right[-1]).max()


def is_no_bias(params):
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "bias" not in jax.tree_util.keystr(path), params
    )


def is_matrix(params):
    return jax.tree.map(lambda p: p.ndim > 1, params)


def test_asam_as_its_authors_adapt_it():
    """All but the biases are adapted: matrices alone leave out the scales of a normalization."""
    expected = by_hand(published.asam_of_its_authors, rho=0.5, eta=0.01)
    right = ours(optax_sam.asam(0.5, eta=0.01, scale_mask=is_no_bias))
    np.testing.assert_allclose(right, expected, rtol=0, atol=1e-12)
    assert difference(ours(optax_sam.asam(0.5, scale_mask=is_matrix)), expected) > 1e-3


def test_a_radius_per_parameter_group_under_one_norm():
    radii = {k: 0.02 if k.startswith("out") else 0.2 for k in setup()[0]}
    labels = {k: "head" if k.startswith("out") else "body" for k in radii}
    expected = by_hand(published.sam_with_a_radius_per_parameter_group, radii=radii)
    one_norm = optax.chain(
        optax_sam.normalized(1.0),
        optax.partition({"body": optax.scale(0.2), "head": optax.scale(0.02)}, labels),
    )
    right = ours(optax_sam.sharpness_aware(one_norm))
    np.testing.assert_allclose(right, expected, rtol=0, atol=1e-12)
    norm_each = optax.partition(
        {"body": optax_sam.normalized(0.2), "head": optax_sam.normalized(0.02)}, labels
    )
    assert difference(ours(optax_sam.sharpness_aware(norm_each)), expected) > 1e-3


def test_momentum_sam_as_its_authors_move_the_weights():
    expected = by_hand(published.momentum_sam_of_its_authors, rho=0.3, momentum=0.9)
    right = ours(optax_sam.msam(0.3, momentum=0.9), momentum=0.9)
    np.testing.assert_allclose(right, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("which", ["A", "B", "C"])
def test_sam_on_one_set_as_in_the_ablations(which):
    """Their A and C are open: r = 1 and r = 0 belong to no set, which no coordinate here meets."""
    expected = by_hand(published.sam_on_one_set, rho=0.3, which=which)
    stage = optax_sam.restrict_to_coordinates(which, ratio_epsilon=1e-8)
    right = ours(optax_sam.sam(0.3, combination=stage))
    np.testing.assert_allclose(right, expected, rtol=0, atol=1e-10)


def test_where_the_sets_are_closed():
    """Here A, B and C are all coordinates: r = 0 is in C, r = 1 in A. The authors keep g at r = 0."""
    clean, perturbed = jnp.array([1.0, 1.0]), jnp.array([0.0, 1.0])
    for letter, at_zero in (("A", 1.0), ("B", 1.0), ("C", 0.0)):
        stage = optax_sam.restrict_to_coordinates(letter)
        direction, _ = stage.update(perturbed, stage.init(clean), clean_grads=clean)
        assert direction.tolist() == [at_zero, 1.0]


@functools.cache
def recipes():
    """The functions of the page, without its examples."""
    page, namespace = DOCS / "methods" / "recipes.md", {}
    for _, code in blocks_of(page):
        parts = [p for p in ast.parse(code).body if isinstance(p, ast.Import | ast.FunctionDef)]
        exec(compile(ast.Module(parts, []), str(page), "exec"), namespace)
    return namespace


def test_stable_sam_as_its_authors_scale_it():
    expected = by_hand(published.stable_sam_of_its_authors, rho=0.3)
    right = ours(optax_sam.stable_sam(0.3))
    np.testing.assert_allclose(right, expected, rtol=0, atol=1e-10)


def test_saner_in_the_last_layer_as_its_authors_code_has_it():
    """Their alpha is what set B is multiplied by."""
    expected = by_hand(published.saner_in_the_last_layer, rho=0.3, alpha=0.25, last="out_kernel")
    stage = optax_sam.down_weight(0.75, 1e-12, mask=recipes()["only"]("['out_kernel']"))
    right = ours(optax_sam.sam(0.3, combination=stage))
    np.testing.assert_allclose(right, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("update", "perturbation"),
    [
        (
            published.centralized_sam_of_its_authors,
            lambda page: optax.chain(optax_sam.normalized(0.3), page["centralized"]()),
        ),
        (
            published.sam_in_the_maximum_norm,
            lambda page: optax.chain(optax.scale_by_sign(), optax.scale(0.3)),
        ),
        (published.sam_layer_by_layer, lambda page: page["normalized_per_leaf"](0.3)),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_recipe_of_a_perturbation_is_the_published_update(update, perturbation):
    right = ours(optax_sam.sharpness_aware(perturbation(recipes())))
    np.testing.assert_allclose(right, by_hand(update, rho=0.3), rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("names", "mask"),
    [
        (("norm", "bn"), lambda page: page["is_normalization"]),
        (("out_kernel",), lambda page: page["only"]("['out_kernel']")),
    ],
    ids=["SAM-ON", "logits-SAM"],
)
def test_masks_choose_the_layers_of_the_authors(names, mask):
    expected = by_hand(published.sam_on_some_layers, rho=0.3, names=names)
    right = ours(optax_sam.sam(0.3, mask=mask(recipes())))
    np.testing.assert_allclose(right, expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("shape", [(3, 2), (2, 2, 3, 4)], ids=["dense", "convolution"])
def test_optax_centralizes_along_the_other_axis(shape):
    """Its means are those of PyTorch's layout, whose first axis are the outputs."""
    kernel = {"kernel": jnp.arange(float(np.prod(shape))).reshape(shape) ** 2}
    central, _ = recipes()["centralized"]().update(kernel, optax.EmptyState(), kernel)
    transposed = {"kernel": jnp.moveaxis(kernel["kernel"], -1, 0)}
    of_optax, _ = optax.centralize().update(transposed, optax.EmptyState())
    expected = jnp.moveaxis(of_optax["kernel"], 0, -1)
    np.testing.assert_allclose(central["kernel"], expected, rtol=1e-6)


def test_esam_as_in_its_paper():
    """With the masks that the recipe draws."""
    page, (start, batches) = recipes(), setup()
    beta, gamma = 0.6, 0.5
    drawn, state = [], page["random_mask"](beta).init(start)
    for _ in range(STEPS):
        ones = jax.tree.map(jnp.ones_like, start)
        mask, state = page["random_mask"](beta).update(ones, state)
        drawn.append({name: np.asarray(array) * beta for name, array in mask.items()})
    assert 0.4 < np.mean([array.mean() for mask in drawn for array in mask.values()]) < 0.8

    @jax.jit
    def each_loss(params, inputs, labels):
        objective = optax_sam.Objective(apply_fn, inputs, labels)
        return objective.losses_from_logits(objective.logits(params))

    def gradient_on(params, t, chosen):
        inputs, labels = batches[t % 3]
        if chosen is not None:
            inputs, labels = inputs[chosen], labels[chosen]
        return {k: np.asarray(g) for k, g in jax_gradient(params, inputs, labels).items()}

    expected = published.efficient_sam(
        gradient_on,
        lambda params, t: np.asarray(each_loss(params, *batches[t % 3])),
        lambda t: drawn[t],
        start,
        STEPS,
        rho=0.3,
        beta=beta,
        gamma=gamma,
        lr=LR,
    )
    esam = optax_sam.sharpness_aware(
        optax.chain(optax_sam.normalized(0.3), page["random_mask"](beta)),
        evaluation=page["on_the_sharpest"](gamma),
    )
    np.testing.assert_allclose(ours(esam), as_matrix(expected), rtol=0, atol=1e-11)
