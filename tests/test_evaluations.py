"""Stage 2: the gradient at the perturbed point, whole and by factors."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_sam
from optax_sam import Objective
from tests.problems import apply_linear, apply_mlp, examples, linear_parameters, mlp_parameters
from tests.references.jacobians import factored_gradient

pytestmark = pytest.mark.usefixtures("strict_promotion")

cross_entropy = optax.softmax_cross_entropy_with_integer_labels


def direction_like(params, seed=1, size=0.3):
    """A random perturbation of visible size."""
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noise = [
        size * jax.random.normal(key, leaf.shape, leaf.dtype)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, noise)


def add(left, right):
    return jax.tree.map(jnp.add, left, right)


class TestPerturbThenEvaluate:
    @pytest.mark.parametrize("jit", [False, True])
    def test_is_value_and_grad_at_the_perturbed_point(self, jit):
        params, objective = mlp_parameters(), Objective(apply_mlp, *examples())
        perturbation = direction_like(params)

        def call(params, perturbation):
            return optax_sam.perturb_then_evaluate(objective, params, perturbation)

        actual = (jax.jit(call) if jit else call)(params, perturbation)
        expected = jax.value_and_grad(objective)(add(params, perturbation))
        chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-7)
        clean = jax.value_and_grad(objective)(params)
        assert abs(float(actual[0] - clean[0])) > 1e-3  # it did move

    def test_auxiliary_output_comes_from_the_perturbed_point(self):
        def loss_fn(w):
            return jnp.sum(w**2), {"w": w}

        (loss, aux), grads = optax_sam.perturb_then_evaluate(loss_fn, jnp.ones(2), jnp.ones(2))
        assert float(loss) == 8.0
        assert aux["w"].tolist() == [2.0, 2.0]
        assert grads.tolist() == [4.0, 4.0]

    def test_an_objective_knows_its_auxiliary_output(self):
        objective = Objective(
            lambda p, x: (apply_mlp(p, x), {"x": x.sum()}), *examples(), has_aux=True
        )
        params = mlp_parameters()
        zeros = jax.tree.map(jnp.zeros_like, params)
        (_, aux), _ = optax_sam.perturb_then_evaluate(objective, params, zeros)
        np.testing.assert_allclose(aux["x"], examples()[0].sum(), rtol=1e-5)
        loss, _ = optax_sam.full_gradient(objective, params, zeros)
        np.testing.assert_allclose(loss, objective(params)[0], rtol=1e-6)

    def test_full_gradient_discards_the_auxiliary_output(self):
        loss, grads = optax_sam.full_gradient(
            lambda w: (jnp.sum(w**2), {"w": w}), jnp.ones(2), jnp.ones(2)
        )
        assert float(loss) == 8.0
        assert grads.tolist() == [4.0, 4.0]

    @pytest.mark.parametrize("jit", [False, True])
    def test_leaves_that_cannot_be_perturbed(self, jit):
        """Integer and None leaves and empty subtrees survive with zero or no gradient."""
        params = {"w": jnp.array([1.0, 2.0]), "steps": jnp.array([3]), "none": None, "empty": {}}
        perturbation = {"w": jnp.array([0.5, 0.5]), "steps": jnp.array([7]), "none": None}
        perturbation["empty"] = {}

        def loss_fn(p):
            return jnp.sum(p["w"] ** 2) * p["steps"][0].astype(jnp.float32)

        def call(params, perturbation):
            return optax_sam.perturb_then_evaluate(loss_fn, params, perturbation)

        loss, grads = (jax.jit(call) if jit else call)(params, perturbation)
        assert float(loss) == 3 * (2.25 + 6.25)  # the integer leaf stayed 3
        assert grads["w"].tolist() == [9.0, 15.0]
        assert grads["steps"].tolist() == [0]
        assert grads["steps"].dtype == params["steps"].dtype
        chex.assert_trees_all_equal_structs(grads, params)

    @pytest.mark.parametrize("params", [{}, (), None, {"none": None}])
    def test_empty_trees(self, params):
        loss, grads = optax_sam.perturb_then_evaluate(lambda p: jnp.array(2.0), params, params)
        assert float(loss) == 2.0
        assert grads == params

    def test_gradients_keep_each_leafs_dtype(self):
        params = {"half": jnp.ones(2, jnp.bfloat16), "single": jnp.ones(2)}
        perturbation = jax.tree.map(lambda leaf: jnp.ones(2), params)  # a wider perturbation

        def loss_fn(p):
            return jnp.sum(p["half"].astype(jnp.float32) * p["single"])

        _, grads = optax_sam.perturb_then_evaluate(loss_fn, params, perturbation)
        chex.assert_trees_all_equal_dtypes(grads, params)
        assert grads["half"].tolist() == [2.0, 2.0]

    def test_eager_calls_of_a_pytree_trace_once(self):
        """New batches of the same shape in an Objective or a Partial compile nothing."""
        traces = []

        def apply_fn(params, inputs):
            traces.append(1)
            return apply_mlp(params, inputs)

        params = mlp_parameters()
        zeros = jax.tree.map(jnp.zeros_like, params)
        losses = set()
        for seed in range(4):
            objective = Objective(apply_fn, *examples(seed))
            losses.add(float(optax_sam.perturb_then_evaluate(objective, params, zeros)[0]))
        assert len(traces) == 1
        assert len(losses) == 4

        def loss_fn(batch, params):
            traces.append(1)
            return jnp.sum(params["bias"]) * batch

        traces.clear()
        values = [
            float(
                optax_sam.perturb_then_evaluate(
                    jax.tree_util.Partial(loss_fn, jnp.array(batch)), params, zeros
                )[0]
            )
            for batch in (1.0, 2.0)
        ]
        assert len(traces) == 1
        np.testing.assert_allclose(values[1], 2 * values[0], rtol=1e-6)

    def test_eager_calls_read_a_plain_function_anew(self):
        traces = []

        def loss_fn(w):
            traces.append(1)
            return jnp.sum(w**2)

        for _ in range(3):
            optax_sam.perturb_then_evaluate(loss_fn, jnp.ones(2), jnp.ones(2))
        assert len(traces) == 3

    def test_parameters_and_perturbation_are_not_written(self):
        params, objective = mlp_parameters(), Objective(apply_mlp, *examples())
        perturbation = direction_like(params)
        before = jax.tree.map(np.array, (params, perturbation))
        optax_sam.perturb_then_evaluate(objective, params, perturbation)
        chex.assert_trees_all_equal((params, perturbation), before)

    def test_no_tracer_leaks(self):
        """Neither from a pytree, nor from a closure over the caller's traced batch."""
        with jax.checking_leaks():
            params, (inputs, labels) = mlp_parameters(), examples()
            perturbation = direction_like(params)

            @jax.jit
            def step(params, inputs, labels):
                objective = Objective(apply_mlp, inputs, labels)
                first = optax_sam.perturb_then_evaluate(objective, params, perturbation)

                def closure(p):
                    return cross_entropy(apply_mlp(p, inputs), labels).mean()

                return first, optax_sam.perturb_then_evaluate(closure, params, perturbation)

            first, second = step(params, inputs, labels)
            optax_sam.perturb_then_evaluate(
                Objective(apply_mlp, inputs, labels), params, perturbation
            )
        chex.assert_trees_all_close(first, second)

    def test_a_closure_over_a_traced_batch_with_concrete_parameters(self):
        """Only the loss knows of the trace here: nothing of it may stay behind."""
        with jax.checking_leaks():
            params, perturbation = np.ones(2, np.float32), np.ones(2, np.float32)

            @jax.jit
            def loss_on(batch):
                return optax_sam.perturb_then_evaluate(
                    lambda w: jnp.sum((w - batch) ** 2), params, perturbation
                )[0]

            assert float(loss_on(jnp.array([1.0, 2.0]))) == 1.0

    def test_transformations_go_through(self):
        """grad, vmap and scan of the primitive."""

        def perturbed_gradient(w, rho):
            return optax_sam.perturb_then_evaluate(lambda v: jnp.sum(v**3), w, rho * w)[1]

        w = jnp.array([1.0, 2.0])
        jacobian = jax.jacfwd(perturbed_gradient)(w, 0.5)
        np.testing.assert_allclose(jacobian, np.diag(6 * 1.5**2 * np.asarray(w)), rtol=1e-6)
        batched = jax.vmap(perturbed_gradient, (0, None))(jnp.stack([w, 2 * w]), 0.5)
        np.testing.assert_allclose(batched[1], 4 * batched[0], rtol=1e-6)
        _, scanned = jax.lax.scan(lambda c, x: (c, perturbed_gradient(w, x)), 0, jnp.arange(2.0))
        np.testing.assert_allclose(scanned[0], 3 * w**2, rtol=1e-6)

    def test_refuses_value_and_grad_in_place_of_the_loss(self):
        value_and_grad = jax.value_and_grad(lambda w: jnp.sum(w**2))
        with pytest.raises(TypeError, match=r"not jax\.value_and_grad\(loss\)"):
            optax_sam.perturb_then_evaluate(value_and_grad, jnp.ones(2), jnp.ones(2))
        nested = jax.value_and_grad(lambda w: (jnp.sum(w**2), w), has_aux=True)
        with pytest.raises(TypeError, match=r"not jax\.value_and_grad\(loss\)"):
            optax_sam.perturb_then_evaluate(nested, jnp.ones(2), jnp.ones(2))

    def test_refuses_auxiliary_output_that_cannot_be_told_from_gradients(self):
        with pytest.raises(
            TypeError, match=r"looks like the parameters.*return loss, \{'aux': aux\}"
        ):
            optax_sam.perturb_then_evaluate(lambda w: (w.sum(), w), jnp.ones(2), jnp.ones(2))
        with pytest.raises(TypeError, match=r"got a tuple of 3.*one dictionary"):
            optax_sam.perturb_then_evaluate(lambda w: (w.sum(), 1, 2), jnp.ones(2), jnp.ones(2))

    def test_refuses_losses_that_are_no_scalars(self):
        call = optax_sam.perturb_then_evaluate
        with pytest.raises(TypeError, match=r"scalar loss, got shape \(2,\).*mean over the batch"):
            call(lambda w: w**2, jnp.ones(2), jnp.ones(2))
        with pytest.raises(TypeError, match=r"scalar loss, got shape \(\) and dtype int32"):
            call(lambda w: jnp.array(1), jnp.ones(2), jnp.ones(2))
        with pytest.raises(TypeError, match=r"loss_fn must be callable, got 3\."):
            call(3, jnp.ones(2), jnp.ones(2))

    @pytest.mark.parametrize("value", [None, "loss", {"loss": 1.0}, [1.0]])
    def test_refuses_a_loss_that_is_no_array(self, value):
        """A forgotten return gives None: the error names the loss, not an internal dtype."""
        with pytest.raises(TypeError, match="loss_fn must return a scalar loss"):
            optax_sam.perturb_then_evaluate(lambda w: value, jnp.ones(2), jnp.ones(2))


FACTORED = {
    "jacobian_only": (optax_sam.jacobian_only, lambda w, moved: (moved, w)),
    "logit_only": (optax_sam.logit_only, lambda w, moved: (w, moved)),
}
both_factored = pytest.mark.parametrize(
    ("evaluation", "points"), FACTORED.values(), ids=FACTORED.keys()
)


class TestFactoredGradients:
    @both_factored
    @pytest.mark.parametrize(
        "loss",
        [
            cross_entropy,
            lambda z, y: jnp.sum((z - jax.nn.one_hot(y, 3, dtype=z.dtype)) ** 2, -1),
            lambda z, y: jnp.log1p(jnp.sum(z**2, -1)),
        ],
        ids=["cross-entropy", "squared error", "no labels"],
    )
    @pytest.mark.parametrize("jit", [False, True])
    def test_equals_the_reference_that_forms_jacobians(self, x64, evaluation, points, loss, jit):
        params, (inputs, labels) = mlp_parameters(), examples()
        perturbation = direction_like(params)
        moved = add(params, perturbation)

        def call(params, perturbation):
            return evaluation(Objective(apply_mlp, inputs, labels, loss), params, perturbation)

        value, actual = (jax.jit(call) if jit else call)(params, perturbation)
        expected = factored_gradient(apply_mlp, loss, inputs, labels, *points(params, moved))
        chex.assert_trees_all_close(actual, expected, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(value, loss(apply_mlp(moved, inputs), labels).mean(), rtol=1e-12)
        assert actual["first"].dtype == jnp.float64
        other = factored_gradient(apply_mlp, loss, inputs, labels, moved, moved)
        assert not np.allclose(actual["first"], other["first"], rtol=1e-3)  # it is not SAM's

    @both_factored
    def test_token_logits(self, x64, evaluation, points):
        inputs = jax.random.normal(jax.random.key(0), (2, 5, 4))
        labels = jax.random.randint(jax.random.key(1), (2, 5), 0, 3)
        params = mlp_parameters()
        perturbation = direction_like(params)
        moved = add(params, perturbation)
        _, actual = evaluation(Objective(apply_mlp, inputs, labels), params, perturbation)

        def per_example(z, y):
            return cross_entropy(z, y).mean(-1)

        expected = factored_gradient(apply_mlp, per_example, inputs, labels, *points(params, moved))
        chex.assert_trees_all_close(actual, expected, rtol=1e-12, atol=1e-14)

    def test_linear_models(self, x64):
        """There the Jacobian is constant: J-SAM is the base optimizer, and L-SAM is SAM."""
        params, objective = linear_parameters(), Objective(apply_linear, *examples())
        perturbation = direction_like(params)
        _, jacobian = optax_sam.jacobian_only(objective, params, perturbation)
        chex.assert_trees_all_close(jacobian, jax.grad(objective)(params), atol=1e-15)
        _, logit = optax_sam.logit_only(objective, params, perturbation)
        _, full = optax_sam.full_gradient(objective, params, perturbation)
        chex.assert_trees_all_close(logit, full, atol=1e-15)

    @both_factored
    def test_zero_perturbation_is_the_gradient(self, x64, evaluation, points):
        del points
        params, objective = mlp_parameters(), Objective(apply_mlp, *examples())
        zeros = jax.tree.map(jnp.zeros_like, params)
        loss, grads = evaluation(objective, params, zeros)
        chex.assert_trees_all_close(
            (loss, grads), jax.value_and_grad(objective)(params), rtol=1e-14, atol=1e-16
        )

    def test_the_factors_share_the_loss_at_the_perturbed_point(self, x64):
        params, objective = mlp_parameters(), Objective(apply_mlp, *examples())
        perturbation = direction_like(params)
        losses = [
            evaluation(objective, params, perturbation)[0]
            for evaluation in (
                optax_sam.full_gradient,
                optax_sam.jacobian_only,
                optax_sam.logit_only,
            )
        ]
        np.testing.assert_allclose(losses, objective(add(params, perturbation)), rtol=1e-14)

    def test_logits_given_are_the_ones_used(self):
        params, (inputs, labels) = mlp_parameters(), examples()
        objective, perturbation = Objective(apply_mlp, inputs, labels), direction_like(params)
        _, without = optax_sam.jacobian_only(objective, params, perturbation)
        _, given = optax_sam.jacobian_only(
            objective, params, perturbation, logits=apply_mlp(params, inputs)
        )
        chex.assert_trees_all_close(given, without, rtol=1e-6)
        _, other = optax_sam.jacobian_only(
            objective, params, perturbation, logits=jnp.zeros((8, 3))
        )
        assert not np.allclose(other["first"], without["first"], rtol=1e-2)

    def test_given_logits_save_a_forward_pass(self):
        traces = []

        def apply_fn(params, inputs):
            traces.append(1)
            return apply_mlp(params, inputs)

        params, (inputs, labels) = mlp_parameters(), examples()
        objective, perturbation = Objective(apply_fn, inputs, labels), direction_like(params)
        optax_sam.jacobian_only(objective, params, perturbation)
        assert len(traces) == 2
        traces.clear()
        logits = apply_mlp(params, inputs)
        optax_sam.jacobian_only(objective, params, perturbation, logits=logits)
        assert len(traces) == 1

    @pytest.mark.parametrize("shape", [(7, 3), (3,), ()])
    def test_refuses_logits_of_other_examples(self, shape):
        params, objective = mlp_parameters(), Objective(apply_mlp, *examples())
        with pytest.raises(ValueError, match="logits must be those of the objective's 8 examples"):
            optax_sam.jacobian_only(objective, params, params, logits=jnp.zeros(shape))

    def test_refuses_logits_of_another_number_of_classes(self):
        params, objective = mlp_parameters(), Objective(apply_mlp, *examples())
        with pytest.raises(ValueError, match=r"objective's 8 examples, float32\[8, 3\]"):
            optax_sam.jacobian_only(objective, params, params, logits=jnp.zeros((8, 4)))

    @both_factored
    def test_refuses_a_bare_function(self, evaluation, points):
        del points
        with pytest.raises(TypeError, match=r"needs to look inside the loss.*Objective\("):
            evaluation(lambda w: jnp.sum(w), jnp.ones(2), jnp.ones(2))

    @both_factored
    def test_auxiliary_output_is_discarded(self, evaluation, points):
        del points
        params = mlp_parameters()
        perturbation = direction_like(params)
        plain = Objective(apply_mlp, *examples())
        with_aux = Objective(lambda p, x: (apply_mlp(p, x), x), *examples(), has_aux=True)
        chex.assert_trees_all_close(
            evaluation(with_aux, params, perturbation), evaluation(plain, params, perturbation)
        )

    @both_factored
    def test_leaves_that_cannot_be_perturbed(self, evaluation, points):
        del points
        params = linear_parameters() | {"steps": jnp.array([3]), "none": None, "empty": {}}
        objective = Objective(
            lambda p, x: apply_linear(p, x) * p["steps"].astype(x.dtype), *examples()
        )
        perturbation = params | {"steps": jnp.array([100])}
        _, grads = evaluation(objective, params, perturbation)
        chex.assert_trees_all_equal_structs(grads, params)
        chex.assert_trees_all_equal_dtypes(grads, params)
        assert grads["steps"].tolist() == [0]
        assert float(jnp.abs(grads["weight"]).max()) > 0

    @both_factored
    def test_no_jacobian_is_formed(self, evaluation, points):
        """No array of size examples x classes x parameters, nor examples x parameters."""
        del points
        params = mlp_parameters(features=16, hidden=32, classes=10)
        objective = Objective(apply_mlp, *examples(batch_size=64, features=16, classes=10))
        jaxpr = jax.make_jaxpr(lambda p, e: evaluation(objective, p, e))(params, params)
        number_of_parameters = sum(leaf.size for leaf in jax.tree.leaves(params))
        assert largest_array(jaxpr.jaxpr) < 64 * number_of_parameters
        # The measure itself sees a Jacobian where there is one.
        reference = jax.make_jaxpr(lambda p: jax.jacrev(objective.logits)(p))(params)
        assert largest_array(reference.jaxpr) >= 64 * 10 * 16 * 32

    @both_factored
    def test_parameters_are_not_written(self, evaluation, points):
        del points
        params, objective = mlp_parameters(), Objective(apply_mlp, *examples())
        perturbation = direction_like(params)
        before = jax.tree.map(np.array, (params, perturbation))
        evaluation(objective, params, perturbation)
        chex.assert_trees_all_equal((params, perturbation), before)

    @both_factored
    def test_no_tracer_leaks(self, evaluation, points):
        del points
        with jax.checking_leaks():
            params = mlp_parameters()
            perturbation = direction_like(params)
            jax.jit(lambda p, x, y: evaluation(Objective(apply_mlp, x, y), p, perturbation))(
                params, *examples()
            )


def largest_array(jaxpr):
    """The number of elements of the largest intermediate array, in nested programs too."""
    sizes = [0]
    for equation in jaxpr.eqns:
        sizes += [np.prod(v.aval.shape, dtype=int) for v in equation.outvars]
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                sizes.append(largest_array(inner))
    return int(max(sizes))


@pytest.mark.parametrize("label", [-1.0, 1.0])
@pytest.mark.parametrize("rho", [0.0, 0.05, 0.7])
def test_jsam_of_a_two_layer_linear_network_in_closed_form(x64, label, rho):
    """f = v^T W x with the logistic loss, one example (Baek et al. 2024, section 4.3).

    With z = W x, s = sigmoid(-t f) and J = sqrt(|Wx|^2 + |x|^2 |v|^2) the descent direction is
    s (t v x^T - (rho/J) z x^T) for W and s (t z - (rho/J) |x|^2 v) for v: an L2 pull on the
    activations and on the last layer.
    """
    keys = jax.random.split(jax.random.key(3), 3)
    params = {"W": jax.random.normal(keys[0], (5, 4)), "v": jax.random.normal(keys[1], (5,))}
    x = jax.random.normal(keys[2], (4,))

    def apply_fn(params, inputs):
        return (inputs @ params["W"].T) @ params["v"]

    objective = Objective(
        apply_fn, x[None], jnp.array([label]), lambda f, t: jax.nn.softplus(-t * f)
    )
    tx = optax_sam.jsam(rho)
    grads = jax.grad(objective)(params)
    direction, _ = tx.update(grads, tx.init(params), params, loss_fn=objective)

    z, v = params["W"] @ x, params["v"]
    sigma = jax.nn.sigmoid(-label * (v @ z))
    length = jnp.sqrt(z @ z + (x @ x) * (v @ v))
    expected = {
        "W": sigma * (label * jnp.outer(v, x) - rho / length * jnp.outer(z, x)),
        "v": sigma * (label * z - rho / length * (x @ x) * v),
    }
    chex.assert_trees_all_close(
        jax.tree.map(jnp.negative, direction), expected, rtol=1e-13, atol=1e-15
    )


def tree_norm(tree):
    return jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree)))


def normalized_by_hand(params, grads):
    return jax.tree.map(lambda g: 0.3 * g / tree_norm(grads), grads)


def adaptive_by_hand(params, grads):
    scales = jax.tree.map(lambda p: jnp.abs(p) + 0.01, params)
    scaled = jax.tree.map(jnp.multiply, scales, grads)
    return jax.tree.map(lambda t, s: 0.3 * t * s / tree_norm(scaled), scales, scaled)


def full_by_hand(objective, params, moved, grads):
    return jax.grad(objective)(moved)


def down_weighted_by_hand(objective, params, moved, grads):
    def weaken(g, moved_g):
        return jnp.where((moved_g / g > 0) & (moved_g / g < 1), 0.5 * moved_g, moved_g)

    return jax.tree.map(weaken, grads, jax.grad(objective)(moved))


def pulled_back(objective, jacobian_at, logits_at):
    """The network's Jacobian at one point, transposed, times the logit term at another."""

    def mean_loss(logits):
        return cross_entropy(logits, objective.labels).mean()

    _, pull = jax.vjp(objective.logits, jacobian_at)
    return pull(jax.grad(mean_loss)(objective.logits(logits_at)))[0]


SECOND_ORDER = {  # method, its perturbation and its direction by hand
    "sam": (optax_sam.sam(0.3), normalized_by_hand, full_by_hand),
    "asam": (optax_sam.asam(0.3, eta=0.01), adaptive_by_hand, full_by_hand),
    "saner": (optax_sam.saner(0.3, alpha=0.5), normalized_by_hand, down_weighted_by_hand),
    "jsam": (
        optax_sam.jsam(0.3),
        normalized_by_hand,
        lambda objective, params, moved, grads: pulled_back(objective, moved, params),
    ),
    "lsam": (
        optax_sam.lsam(0.3),
        normalized_by_hand,
        lambda objective, params, moved, grads: pulled_back(objective, params, moved),
    ),
}


@pytest.mark.parametrize("name", SECOND_ORDER)
def test_second_order_derivatives_through_the_update(name, x64):
    """Meta-learning differentiates through the step: it must see the derivative of epsilon."""
    params, objective = mlp_parameters(), Objective(apply_mlp, *examples())
    tx, perturbation_by_hand, direction_by_hand = SECOND_ORDER[name]

    def after_our_step(params, rate):
        grads = jax.grad(objective)(params)
        direction, _ = tx.update(grads, tx.init(params), params, loss_fn=objective)
        return objective(jax.tree.map(lambda p, d: p - rate * d, params, direction))

    def after_step_by_hand(params, rate):
        grads = jax.grad(objective)(params)
        moved = add(params, perturbation_by_hand(params, grads))
        direction = direction_by_hand(objective, params, moved, grads)
        return objective(jax.tree.map(lambda p, d: p - rate * d, params, direction))

    ours = jax.jit(jax.value_and_grad(after_our_step, argnums=(0, 1)))(params, 0.5)
    by_hand = jax.jit(jax.value_and_grad(after_step_by_hand, argnums=(0, 1)))(params, 0.5)
    chex.assert_trees_all_close(ours, by_hand, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("method", [optax_sam.sam, optax_sam.jsam, optax_sam.lsam])
def test_donation(method):
    """Parameters and state may be donated: neither the update nor the state aliases them."""
    tx = optax.chain(method(0.05), optax.sgd(0.1, momentum=0.9))

    def step(params, state, inputs, labels):
        objective = Objective(apply_mlp, inputs, labels)
        grads = jax.grad(objective)(params)
        updates, state = tx.update(grads, state, params, loss_fn=objective)
        return optax.apply_updates(params, updates), state

    donating, plain = jax.jit(step, donate_argnums=(0, 1)), jax.jit(step)
    params, expected = mlp_parameters(), mlp_parameters()
    state, expected_state = tx.init(params), tx.init(expected)
    for seed in range(3):
        old = params
        params, state = donating(params, state, *examples(seed))
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
        expected, expected_state = plain(expected, expected_state, *examples(seed))
    chex.assert_trees_all_close((params, state), (expected, expected_state), rtol=1e-6)


def test_eager_update_of_fresh_objectives_traces_once():
    """The engine, called eagerly with a new batch every step, compiles the evaluation once."""
    traces = []

    def apply_fn(params, inputs):
        traces.append(1)
        return apply_mlp(params, inputs)

    params, tx = mlp_parameters(), optax_sam.sam(0.1)
    state = tx.init(params)
    for seed in range(4):
        objective = Objective(apply_fn, *examples(seed))
        _, state = tx.update(params, state, params, loss_fn=objective)
    assert len(traces) == 1
