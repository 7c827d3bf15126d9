"""Mistakes that once passed without a word, each a test named after the audit's item.

Those about axes, weights, penalties, BatchNorm and loss scaling stand beside the tests of these:
``test_parallelism``, ``test_weights_and_penalties``, ``test_microbatches``, ``test_loss_scaling``.
"""

import gc

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_sam
from optax_sam import Objective, _engine
from tests.problems import apply_mlp, examples, mlp_parameters

RHO = 0.3


def objective(**options):
    return Objective(apply_mlp, *examples(), **options)


def direction(tx, loss_fn=None, params=None, **extra):
    loss_fn = objective() if loss_fn is None else loss_fn
    params = mlp_parameters() if params is None else params
    return tx.update(jax.grad(loss_fn)(params), tx.init(params), params, loss_fn=loss_fn, **extra)[
        0
    ]


def assert_close(left, right):
    chex.assert_trees_all_close(left, right, rtol=2e-5, atol=1e-6)


def is_kernel(params):
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


class TestAudit1_2InjectedMasks:
    """``inject_hyperparams`` takes a function for a schedule and calls it with the step."""

    @pytest.mark.parametrize(
        ("method", "name"),
        [(optax_sam.sam, "mask"), (optax_sam.asam, "mask"), (optax_sam.asam, "scale_mask")],
    )
    @pytest.mark.parametrize("jit", [False, True])
    def test_audit_1_2_a_mask_function_is_refused(self, method, name, jit):
        """ε was 0 and the method plain SGD, or ASAM's scaling was lost."""
        tx = optax.inject_hyperparams(method)(rho=RHO, **{name: is_kernel})
        run = jax.jit(lambda: direction(tx)) if jit else lambda: direction(tx)
        with pytest.raises(TypeError, match=rf"{name} must be a pytree.*static_args=\('{name}',\)"):
            run()

    @pytest.mark.parametrize(
        ("method", "name"), [(optax_sam.sam, "mask"), (optax_sam.asam, "scale_mask")]
    )
    def test_audit_1_2_what_the_error_advises(self, method, name):
        injected = optax.inject_hyperparams(method, static_args=(name,))
        actual = direction(injected(rho=RHO, **{name: is_kernel}))
        assert_close(actual, direction(method(RHO, **{name: is_kernel})))
        assert not np.allclose(actual["first"], direction(method(RHO))["first"], rtol=1e-4)


class TestAudit1_6LogSoftmaxHead:
    """The loss is linear in log probabilities, so no point for the logit term matters."""

    @staticmethod
    def with_head(params, inputs):
        return jax.nn.log_softmax(apply_mlp(params, inputs))

    @staticmethod
    def likelihood(log_probabilities, labels):
        return -jnp.take_along_axis(log_probabilities, labels[:, None], 1)[:, 0]

    @pytest.mark.parametrize(
        ("method", "consequence"),
        [(optax_sam.jsam, "J-SAM is then plain SAM"), (optax_sam.lsam, "L-SAM is then the base")],
    )
    def test_audit_1_6_warns(self, method, consequence):
        loss_fn = Objective(self.with_head, *examples(), self.likelihood)
        with pytest.warns(
            UserWarning, match=rf"log_softmax\. {consequence}.*Let the network return"
        ):
            actual = direction(method(RHO), loss_fn)
        plain = direction(optax_sam.sam(RHO if method is optax_sam.jsam else 0.0), loss_fn)
        assert_close(actual, plain)

    def test_audit_1_6_what_the_warning_advises(self):
        """Other losses of raw logits do not warn: warnings are errors here."""
        for loss in (
            lambda z, y: self.likelihood(jax.nn.log_softmax(z), y),
            lambda z, y: jnp.sum((z - jax.nn.one_hot(y, 3)) ** 2, -1),
        ):
            loss_fn = Objective(apply_mlp, *examples(), loss)
            actual = direction(optax_sam.jsam(RHO), loss_fn)
            assert not np.allclose(
                actual["first"], direction(optax_sam.sam(RHO), loss_fn)["first"], rtol=1e-3
            )


class TestAudit1_8MixedExamples:
    """A network whose examples influence each other has no loss per example."""

    @pytest.mark.parametrize(
        "mix", [lambda x: x - x.mean(0), lambda x: x @ x.T @ x], ids=["mean", "gram"]
    )
    def test_audit_1_8_groups_of_one_are_refused(self, mix):
        loss_fn = Objective(lambda p, x: apply_mlp(p, mix(x)), *examples())
        with pytest.raises(ValueError, match=r"examples of the batch are not independent"):
            direction(optax_sam.sam(RHO, group_size=1), loss_fn)

    def test_audit_1_8_what_is_not_proved_warns(self):
        def one_after_the_other(params, inputs):
            return jax.lax.map(lambda x: apply_mlp(params, x), inputs)

        loss_fn = Objective(one_after_the_other, *examples())
        with pytest.warns(UserWarning, match=r"group_size=1 needs examples that.*not be proved"):
            direction(optax_sam.sam(RHO, group_size=1), loss_fn)


class TestAudit1_9LossesOfPairs:
    """Logits (B,) and labels (B, 1) broadcast to a loss of every example with every other one."""

    @pytest.mark.parametrize("shapes", [((8,), (8, 1)), ((8, 1), (8,))], ids=str)
    def test_audit_1_9_is_refused(self, shapes):
        of_logits, of_labels = shapes
        loss_fn = Objective(
            lambda p, x: (x @ p["first"]).sum(-1).reshape(of_logits),
            examples()[0],
            jnp.ones(of_labels),
            lambda z, y: (z - y) ** 2,
        )
        with pytest.raises(
            ValueError, match=r"got shape \(8, 8\).*every other.*\(8, 1\).*same shape"
        ):
            loss_fn(mlp_parameters())

    def test_audit_1_9_as_many_tokens_as_examples_are_no_mistake(self):
        """Shape (8, 8) is right here: the second axis does not grow with the batch."""
        inputs, labels = jnp.ones((8, 8, 4)), jnp.zeros((8, 8), jnp.int32)
        assert Objective(apply_mlp, inputs, labels)(mlp_parameters()).shape == ()


FAST = {
    "chain": lambda: optax.chain(optax_sam.normalized(RHO)),
    "clip": lambda: optax.chain(optax.clip_by_global_norm(0.5), optax_sam.normalized(RHO)),
    "schedule": lambda: optax_sam.normalized(lambda count: RHO / (1 + count)),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax_sam.normalized)(rho=RHO),
    "partition": lambda: optax.partition(
        {"a": optax_sam.normalized(RHO), "b": optax_sam.normalized(0.1)},
        {"first": "a", "bias": "b", "second": "a"},
    ),
}
SLOW = {
    "adaptive in a chain": (
        lambda: optax.chain(optax.add_decayed_weights(0.1), optax_sam.normalized(RHO)),
        "the first stage adds something to the gradient",
    ),
    "moving average": (
        lambda: optax.chain(optax_sam.moving_average(0.5), optax_sam.normalized(RHO)),
        "the first stage adds something to the gradient",
    ),
    "sign": (lambda: optax.scale_by_sign(), "the first stage applies `sign` to the gradient"),
}


def mean_of_groups(make, size):
    """The mean of what each group would do as a batch of its own."""
    inputs, labels = examples()
    each = [
        direction(
            optax_sam.sharpness_aware(make()),
            Objective(apply_mlp, inputs[i : i + size], labels[i : i + size]),
        )
        for i in range(0, 8, size)
    ]
    return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *each)


class TestAudit1_10TheFastPath:
    """It hung on an attribute that wrappers drop: a 25 × cliff without a word."""

    @pytest.mark.parametrize("name", FAST)
    def test_audit_1_10_wrappers_keep_it(self, name, monkeypatch):
        def never(*args, **kwargs):
            raise AssertionError("differentiated every group by itself")

        monkeypatch.setattr(_engine, "mean_over_groups", never)
        tx = optax_sam.sharpness_aware(FAST[name](), group_size=1)
        actual = direction(tx)
        monkeypatch.undo()
        assert_close(actual, mean_of_groups(FAST[name], 1))

    @pytest.mark.parametrize("name", SLOW)
    def test_audit_1_10_others_say_why_not(self, name):
        make, reason = SLOW[name]
        with pytest.warns(UserWarning, match=rf"group_size=2 .*3 to 26 times.*{reason}.*explain"):
            actual = direction(optax_sam.sharpness_aware(make(), group_size=2))
        assert_close(actual, mean_of_groups(make, 2))

    def test_audit_1_10_own_evaluations_say_why_not(self):
        def evaluation(loss_fn, params, perturbation, *, logits=None):
            return optax_sam.full_gradient(loss_fn, params, perturbation)

        tx = optax_sam.sharpness_aware(
            optax_sam.normalized(RHO), evaluation=evaluation, group_size=2
        )
        with pytest.warns(UserWarning, match=r"the evaluation .* is not one of this package"):
            actual = direction(tx)
        assert_close(actual, mean_of_groups(FAST["chain"], 2))

    def test_audit_1_10_the_schedule_advances(self):
        tx = optax_sam.sam(lambda count: RHO / (1 + count), group_size=1)
        params, state = mlp_parameters(), tx.init(mlp_parameters())
        norms = []
        for _ in range(2):
            _, state = tx.update(params, state, params, loss_fn=objective())
            norms.append(float(optax_sam.get_metrics(state)["perturbation_norm"]))
        np.testing.assert_allclose(norms, [RHO, RHO / 2], rtol=1e-5)


class TestAudit1_14Methods:
    @pytest.mark.parametrize(
        "chain",
        [
            lambda: optax.chain(optax_sam.sam(RHO), optax_sam.saner(RHO)),
            lambda: optax.chain(
                optax_sam.jsam(RHO), optax.chain(optax_sam.gsam(RHO), optax.sgd(1.0))
            ),
        ],
        ids=["chain", "nested"],
    )
    @pytest.mark.parametrize("jit", [False, True])
    def test_audit_1_14_two_methods_in_one_chain(self, chain, jit):
        run = jax.jit(lambda: direction(chain())) if jit else lambda: direction(chain())
        with pytest.warns(
            UserWarning, match=r"another one's direction.*combination=optax_sam\.down_"
        ):
            run()

    def test_audit_1_14_methods_side_by_side_are_no_mistake(self):
        """A comparison: the same loss and parameters, and gradients computed anew."""
        loss_fn, params = objective(), mlp_parameters()
        for method in (optax_sam.sam, optax_sam.saner, optax_sam.msam):
            direction(optax.chain(method(RHO), optax.sgd(0.1)), loss_fn, params)

    def test_audit_1_14_nothing_is_kept_alive(self):
        """What the last method gave is remembered by a weak reference."""
        import weakref

        result = direction(optax_sam.sam(RHO))
        reference = weakref.ref(jax.tree.leaves(result)[0])
        del result
        gc.collect()
        assert reference() is None

    @pytest.mark.parametrize(
        ("make", "name"),
        [
            (lambda m: optax_sam.sam(RHO, combination=m), "combination"),
            (lambda m: optax_sam.gsam(RHO, combination=m), "combination"),
            (lambda m: optax_sam.sharpness_aware(m), "perturbation"),
            (lambda m: optax_sam.sharpness_aware(optax.chain(m, optax.scale(1.0))), "perturbation"),
            (lambda m: optax_sam.sometimes(optax_sam.sam(), every_k=2, otherwise=m), "otherwise"),
        ],
    )
    def test_audit_1_14_a_method_is_no_stage(self, make, name):
        with pytest.raises(
            TypeError, match=rf"{name} is a stage.*given a whole method.*down_weight"
        ):
            make(optax_sam.saner(RHO)).init(mlp_parameters())

    @pytest.mark.parametrize(
        ("argument", "meant"),
        [("logit", "logits"), ("loss_fun", "loss_fn"), ("clean_grad", "clean_grads")],
    )
    def test_audit_1_14_misspelled_arguments_of_update(self, argument, meant):
        with pytest.raises(
            TypeError, match=rf"unknown argument {argument}=; did you mean {meant}=\?"
        ):
            direction(optax_sam.jsam(RHO), **{argument: jnp.ones((8, 3))})

    def test_audit_1_14_other_arguments_pass(self):
        direction(optax_sam.sam(RHO), value=1.0, value_fn=objective(), grad=None, batch=3)
        names = ("aux_logits", "ema_logits", "clean_params", "loss_scale")
        direction(optax_sam.sam(RHO), **dict.fromkeys(names, 1.0))

    @pytest.mark.parametrize(
        ("make", "message"),
        [
            (lambda: optax_sam.ncsam(kappa=-0.1), r"kappa must lie in \[0, inf\), got -0\.1"),
            (
                lambda: optax_sam.ncsam(total_steps=10, warmup_steps=20),
                r"warmup_steps=20 leaves none of total_steps=10",
            ),
            (lambda: optax_sam.ncsam(warmup="adam"), "warmup must be 'sgd' or 'sam', got 'adam'"),
            (
                lambda: optax_sam.ncsam(start_step=3, warmup_steps=2),
                "is warmup_steps in ncsam",
            ),
            (
                lambda: optax_sam.sam(RHO, ascent_fraction=0),
                r"ascent_fraction must lie in \(0, 1\]",
            ),
            (lambda: optax_sam.sam(RHO, ascent_steps=0), "ascent_steps must be at least 1, got 0"),
            (lambda: optax_sam.sam(jnp.float32(-0.1)), r"rho must lie in \[0, inf\), got -0\.1"),
            (lambda: optax_sam.sam(jnp.ones(2)), r"rho must be a scalar.*\(2,\)"),
        ],
    )
    def test_audit_1_14_ranges(self, make, message):
        with pytest.raises(ValueError, match=message):
            make()

    def test_audit_1_14_unknown_options(self):
        with pytest.raises(
            TypeError, match=r"unknown option microbatch_size=\. The options of every"
        ):
            optax_sam.sam(RHO, microbatch_size=2)

    def test_audit_1_14_logits_of_another_network(self):
        """Ten classes for a network of three, which NCSAM took."""
        for method in (optax_sam.ncsam, optax_sam.jsam):
            with pytest.raises(
                ValueError, match=r"logits must be those.*\[8, 3\].*got .*\[8, 10\]"
            ):
                direction(method(RHO), logits=jnp.ones((8, 10)))


class TestAudit2Refusals:
    """Each message names the argument, what was given, and the remedy."""

    def update(self, updates, state=None, params=None, loss_fn=None, tx=None):
        tx = optax_sam.sam(RHO) if tx is None else tx
        params = mlp_parameters() if params is None else params
        state = tx.init(params) if state is None else state
        return tx.update(updates, state, params, loss_fn=loss_fn or objective())

    def test_audit_2_gradients_of_another_structure(self):
        params = mlp_parameters()
        with pytest.raises(
            ValueError, match=r"tree structure of params.*value, gradients\).*[Uu]npack"
        ):
            self.update(jax.value_and_grad(objective())(params))
        with pytest.raises(ValueError, match=r"updates must have.*got PyTreeDef\(None\)"):
            self.update(None)
        with pytest.raises(
            ValueError, match=r"must have the shape.*got \(8, 6\)\. Per-example gradients.*averaged"
        ):
            self.update(jax.tree.map(lambda leaf: jnp.stack([leaf] * 8), params))

    @pytest.mark.parametrize(
        "state", [optax.EmptyState(), (), optax.sgd(0.1).init(jnp.ones(2))], ids=str
    )
    def test_audit_2_the_state_of_another_optimizer(self, state):
        with pytest.raises(
            TypeError, match=r"state does not belong.*Make it with tx\.init\(params\)"
        ):
            self.update(mlp_parameters(), state)

    def test_audit_2_a_value_in_place_of_the_loss(self):
        with pytest.raises(
            TypeError, match=r"loss_fn must be a function.*not the value of the loss"
        ):
            self.update(mlp_parameters(), loss_fn=jnp.float32(0.5))

    def test_audit_2_no_loss(self):
        """Flax's own TrainState drops it: the error names the helper."""
        tx, params = optax_sam.sam(RHO), mlp_parameters()
        with pytest.raises(
            TypeError, match=r"optax_sam\.linen\.TrainState.*nnx\.Optimizer\.update"
        ):
            tx.update(params, tx.init(params), params)

    @pytest.mark.parametrize(
        ("labels", "error", "message"),
        [
            (jnp.ones(8), TypeError, r"dtype float32 and shape \(8,\).*astype\(jnp\.int32\)"),
            (jnp.ones(8, bool), TypeError, r"got labels of dtype bool.*astype\(jnp\.int32\)"),
            (jnp.ones((8, 3)), TypeError, r"float32.*loss=optax\.softmax_cross_entropy"),
            (
                jnp.ones((8, 1), jnp.int32),
                ValueError,
                r"shape \(8,\), .*\(8, 1\).*labels\[\.\.\., 0\]",
            ),
            (jnp.ones((8, 3), jnp.int32), ValueError, r"shape \(8, 3\)\. For one-hot"),
        ],
        ids=["float", "bool", "one-hot", "column", "integer one-hot"],
    )
    def test_audit_2_labels_that_do_not_fit_the_default_loss(self, labels, error, message):
        with pytest.raises(error, match=message):
            Objective(apply_mlp, examples()[0], labels)(mlp_parameters())

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int32])
    def test_audit_2_logits_of_another_dtype(self, dtype):
        with pytest.raises(ValueError, match=rf"logits must be.*got .*{jnp.dtype(dtype).name}"):
            direction(optax_sam.jsam(RHO), logits=jnp.ones((8, 3), dtype))

    def test_audit_2_an_empty_batch(self):
        with pytest.raises(ValueError, match=r"no example: the batch axis has length 0"):
            Objective(apply_mlp, jnp.ones((0, 4)), jnp.ones(0, jnp.int32))

    def test_audit_2_python_numbers_as_parameters(self):
        """Plain floats are leaves too."""
        params = {"w": 2.0, "b": 1.0}
        loss_fn = lambda p: (p["w"] ** 2 + p["b"]) * 1.0  # noqa: E731
        actual = direction(optax_sam.sam(0.5), loss_fn, params)
        moved = 2.0 + 0.5 * 4 / 17**0.5
        np.testing.assert_allclose(actual["w"], 2 * moved, rtol=1e-5)

    def test_audit_2_wrappers_that_hide_parameters(self):
        with pytest.raises(TypeError, match=r"needs all parameters.*pass mask= to the method"):
            direction(optax.masked(optax_sam.sam(RHO), is_kernel))


def test_a_plain_loss_is_read_anew_at_every_eager_step():
    """As jax.grad reads it: what it closes over may be another batch."""
    batches = iter((jnp.arange(6.0).reshape(2, 3), 10 + jnp.arange(6.0).reshape(2, 3)))
    tx, params = optax_sam.sam(0.1), jnp.ones(3)
    state = tx.init(params)

    def loss_fn(w):
        return jnp.mean((batch @ w - 1) ** 2)

    for batch in batches:  # noqa: B007 (the loss closes over it)
        grads = jax.grad(loss_fn)(params)
        direction, state = tx.update(grads, state, params, loss_fn=loss_fn)
        expected = jax.grad(loss_fn)(params + 0.1 * grads / optax.tree.norm(grads))
        np.testing.assert_allclose(direction, expected, rtol=1e-5)
